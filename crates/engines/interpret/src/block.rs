//! Decoded blocks, cached by where their code lies in guest memory.

use iced_x86::{Decoder, DecoderError, DecoderOptions, FlowControl};
use rustc_hash::FxHashMap;
use x86::Exception;
use x86::cpuid::Vendor;

use crate::core::Core;
use crate::decode::compile;
use crate::op::{Op, Result};

/// Instructions in a block at most.
const LENGTH: usize = 32;
/// Blocks, and ops in them, at most: then the cache is emptied.
const BLOCKS: usize = 1 << 16;
const OPS: usize = 1 << 19;
/// Bytes of the longest instruction.
const LONGEST: usize = 15;
const PAGE: u64 = 0x1000;

/// A block's number in the cache.
pub type Id = u32;

/// The block that is at a linear address, in a fetch context ([`Core::context`]).
#[derive(Clone, Copy, Default)]
struct Jump {
    linear: u64,
    /// Never 0 in an entry that is in use.
    context: u64,
    to: Id,
}

/// Entries of the table of jumps.
const JUMPS: usize = 4096;

/// A run of decoded instructions, in one page but for the last instruction of one that is alone.
pub struct Block {
    /// Its instructions.
    pub ops: Box<[Op]>,
    /// Bytes.
    pub len: u64,
    /// Offset of its first byte in guest memory.
    offset: u64,
    generation: u32,
    /// Offset and generation of the page that an instruction reaches into.
    second: Option<(u64, u32)>,
    bits: u8,
}

/// All blocks of a vCPU.
pub struct Cache {
    blocks: Vec<Block>,
    /// Blocks by where execution came to, so that most need not be looked up by where they lie in memory.
    jumps: Box<[Jump; JUMPS]>,
    index: FxHashMap<u64, Id>,
    ops: usize,
    /// A block whose code does not lie in memory, or that is to be looked at only once.
    single: Option<Block>,
}

/// The block that is not in the cache.
pub const SINGLE: Id = Id::MAX;

#[inline]
fn slot(linear: u64) -> usize {
    (linear ^ linear >> 12) as usize & (JUMPS - 1)
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            blocks: Vec::new(),
            jumps: Box::new([Jump::default(); JUMPS]),
            index: FxHashMap::default(),
            ops: 0,
            single: None,
        }
    }
}

impl Cache {
    /// The block of a number that [`Cache::find`] or [`Cache::seen`] just gave.
    #[inline]
    pub fn get(&self, id: Id) -> Option<&Block> {
        if id == SINGLE { self.single.as_ref() } else { self.blocks.get(id as usize) }
    }

    /// The block at RIP, if it was there before and is still right.
    #[inline]
    pub fn seen(&self, core: &Core) -> Option<Id> {
        let linear = core.code_linear(core.rip);
        let jump = &self.jumps[slot(linear)];
        if jump.linear != linear || jump.context != core.context {
            return None;
        }
        let block = self.blocks.get(jump.to as usize)?;
        let fresh = block.second.is_none() && core.memory.code().generation(block.offset) == block.generation;
        fresh.then_some(jump.to)
    }

    /// Remembers that the block at RIP is `to`.
    pub fn remember(&mut self, core: &Core, to: Id) {
        if to != SINGLE {
            let linear = core.code_linear(core.rip);
            self.jumps[slot(linear)] = Jump { linear, context: core.context, to };
        }
    }

    /// The block at RIP, decoded now if need be.
    ///
    /// # Errors
    /// The fetch faults.
    pub fn find(&mut self, core: &mut Core) -> Result<Id> {
        let linear = core.code_linear(core.rip);
        let Some(offset) = core.fetch(linear)? else {
            return self.device_block(core, linear);
        };
        let key = offset << 2 | u64::from(core.bits >> 5);
        let mut replace = None;
        if let Some(&id) = self.index.get(&key)
            && let Some(block) = self.blocks.get(id as usize)
        {
            let generation = core.memory.code().generation(block.offset);
            let fresh = generation == block.generation && block.bits == core.bits;
            // Only then is it an instruction that reaches there: else the page must not be touched.
            let whole = match block.second.filter(|_| fresh) {
                None => fresh,
                Some((at, generation)) => {
                    let next_page = (linear & !(PAGE - 1)).wrapping_add(PAGE);
                    core.fetch(next_page)? == Some(at) && core.memory.code().generation(at) == generation
                }
            };
            if whole {
                return Ok(id);
            }
            replace = Some(id);
        }
        let block = decode(core, offset, linear)?;
        core.count.decoded += 1;
        self.ops += block.ops.len();
        if let Some(id) = replace
            && let Some(slot) = self.blocks.get_mut(id as usize)
        {
            self.ops -= slot.ops.len();
            *slot = block;
            return Ok(id);
        }
        if self.blocks.len() >= BLOCKS || self.ops > OPS {
            self.clear(core);
            self.ops = block.ops.len();
        }
        let id = self.blocks.len() as Id;
        self.blocks.push(block);
        self.index.insert(key, id);
        Ok(id)
    }

    /// Forgets all blocks.
    pub fn clear(&mut self, core: &mut Core) {
        core.count.flushes += 1;
        self.blocks.clear();
        self.jumps.fill(Jump::default());
        self.index.clear();
        self.ops = 0;
    }

    /// Code in a device's registers: one instruction at a time, never kept.
    fn device_block(&mut self, core: &mut Core, linear: u64) -> Result<Id> {
        let mut bytes = [0; LONGEST];
        for (i, b) in bytes.iter_mut().enumerate() {
            let gpa = core.peek(linear.wrapping_add(i as u64)).unwrap_or(u64::MAX);
            *b = core.machine.mmio.read(gpa, 1) as u8;
        }
        let mut ops = Vec::with_capacity(1);
        one(core, &bytes, 0, &mut ops)?;
        let len = ops.first().map_or(1, |op: &Op| op.len.into());
        self.single = Some(block(core, ops, len, 0, 0, None));
        Ok(SINGLE)
    }
}

fn block(
    core: &Core,
    ops: Vec<Op>,
    len: u64,
    offset: u64,
    generation: u32,
    second: Option<(u64, u32)>,
) -> Block {
    Block { ops: ops.into(), len, offset, generation, second, bits: core.bits }
}

/// How instructions are decoded for this processor.
pub fn options(core: &Core) -> u32 {
    if core.cpuid.vendor() == Vendor::Amd { DecoderOptions::AMD } else { DecoderOptions::NONE }
}

/// Decodes one instruction from bytes that are all there are.
fn one(core: &mut Core, bytes: &[u8], at: u64, ops: &mut Vec<Op>) -> Result<bool> {
    let mut decoder = Decoder::with_ip(core.bits.into(), bytes, at, options(core));
    let i = decoder.decode();
    if i.is_invalid() && bytes.len() >= LONGEST && too_long(bytes, core.bits) {
        return core.raise(Exception::GP0);
    }
    let mut op = compile(&i, core.bits, &core.cpuid);
    if op.len == 0 {
        op.len = 1;
    }
    ops.push(op);
    Ok(ends(&i))
}

/// Whether an instruction that iced refuses would be one if it were not longer than 15 bytes: it is looked at without the
/// prefixes that repeat.
fn too_long(bytes: &[u8], bits: u8) -> bool {
    let prefix = |b: u8| {
        matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
            || bits == 64 && b & 0xf0 == 0x40
    };
    let prefixes = bytes.iter().take_while(|&&b| prefix(b)).count();
    if prefixes == bytes.len() {
        return true;
    }
    let (before, rest) = bytes.split_at(prefixes);
    let mut short: Vec<u8> = Vec::with_capacity(2 * LONGEST);
    for &b in before {
        if short.last() != Some(&b) {
            short.push(b);
        }
    }
    let dropped = prefixes - short.len();
    short.extend(rest);
    short.resize(2 * LONGEST, 0);
    let i = Decoder::new(bits.into(), &short, DecoderOptions::NONE).decode();
    !i.is_invalid() && i.len() + dropped > LONGEST
}

/// Whether the block ends with this instruction. It goes on after a conditional branch, which may not be taken.
fn ends(i: &iced_x86::Instruction) -> bool {
    !matches!(i.flow_control(), FlowControl::Next | FlowControl::ConditionalBranch)
}

fn decode(core: &mut Core, offset: u64, linear: u64) -> Result<Block> {
    let memory = core.memory.clone();
    let code = memory.code();
    // Generation first, then the marks, then the bytes: see `memory::code`.
    let generation = code.generation(offset);
    let room = PAGE - (offset & (PAGE - 1));
    let window = room.min((LENGTH * LONGEST) as u64);
    code.mark(offset, window.min(64));
    let mut marked = window.min(64);
    let mut bytes = [0; LENGTH * LONGEST];
    memory.read(offset, &mut bytes[..marked as usize]);
    let mut ops: Vec<Op> = Vec::with_capacity(8);
    let mut at = 0u64;
    while ops.len() < LENGTH && at < room {
        // Lines are marked as decoding reaches them.
        if marked < window && at + LONGEST as u64 > marked {
            let more = (marked + 64).min(window);
            code.mark(offset + marked, more - marked);
            memory.read(offset + marked, &mut bytes[marked as usize..more as usize]);
            marked = more;
        }
        let end = (at + LONGEST as u64).min(marked);
        let piece = &bytes[at as usize..end as usize];
        let mut decoder = Decoder::with_ip(core.bits.into(), piece, at, options(core));
        let i = decoder.decode();
        if i.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes && piece.len() < LONGEST {
            if ops.is_empty() {
                return crossing(core, offset, linear, generation, piece);
            }
            break;
        }
        if i.is_invalid() && !ops.is_empty() {
            // Perhaps never reached: it becomes a block of its own when it is.
            break;
        }
        let stop = one(core, piece, at, &mut ops)?;
        let len = ops.last().map_or(1, |op| u64::from(op.len));
        if i.is_invalid() {
            at += len;
            break;
        }
        at += len;
        if stop {
            break;
        }
    }
    Ok(block(core, ops, at, offset, generation, None))
}

/// An instruction that reaches into the next page, in a block of its own.
fn crossing(core: &mut Core, offset: u64, linear: u64, generation: u32, first: &[u8]) -> Result<Block> {
    let next_page = (linear & !(PAGE - 1)).wrapping_add(PAGE);
    let mut bytes = [0; LONGEST];
    let have = first.len();
    bytes[..have].copy_from_slice(first);
    let mut second = None;
    match core.fetch(next_page)? {
        Some(at) => {
            let memory = core.memory.clone();
            second = Some((at, memory.code().generation(at)));
            memory.code().mark(at, LONGEST as u64);
            memory.read(at, &mut bytes[have..]);
        }
        None => bytes[have..].fill(0xff),
    }
    let mut ops = Vec::with_capacity(1);
    one(core, &bytes, 0, &mut ops)?;
    let len = ops.first().map_or(1, |op| u64::from(op.len));
    // An instruction whose second page is a device is decoded anew each time: its generation never fits.
    let second = second.or(Some((u64::MAX, 0)));
    Ok(block(core, ops, len, offset, generation, second))
}
