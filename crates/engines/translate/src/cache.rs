//! All translated code of a vCPU: blocks by where their guest code lies in memory.
//!
//! What belongs to a page of guest memory lives and dies together: only blocks of one page are linked to each other, so that
//! when the page's code changes nothing else has to be looked after but the table of jumps.

use std::time::Instant;

use interpret::op::Op;
use memory::Memory;
use rustc_hash::FxHashMap;

use crate::Error;
use crate::asm::{Asm, frame as field};
use crate::block::{Builder, Context, Kind, Mark, Mode, Output, Site, Tools};
use crate::buffer::Buffer;
use crate::decode::{Bytes, Page};
use crate::frame::{Frame, at};
use crate::host::Host;
use crate::stubs::Stubs;
use crate::trace::Trace;

/// A block of translated code.
pub struct Block {
    /// Number in [`Cache::pages`] of the page of blocks that it is linked to, which is its own or covers the same memory.
    page: u32,
    /// Host address and length.
    host: u64,
    len: u32,
    marks: Box<[Mark]>,
    ops: Box<[Op]>,
}

/// What was made of a page of guest memory, in one mode.
struct PageCode {
    offset: u64,
    mode: Mode,
    generation: u32,
    /// Host addresses by offset in the page.
    entries: FxHashMap<u16, u64>,
    /// Instructions that reach from one page into the next, of which this is one: offset in the first, host address.
    straddlers: Vec<(u16, u64)>,
}

/// An instruction that reaches into the next page.
struct Straddler {
    host: u64,
    /// Offset of the second page, and both pages' generations.
    next: u64,
    generations: (u32, u32),
}

/// A block that was looked up lately: processes that come and go jump to the same code.
#[derive(Clone, Copy)]
struct Recent {
    offset: u64,
    mode: Mode,
    /// Of its page. While that stands, so does the block.
    generation: u32,
    host: u64,
}

impl Recent {
    const COUNT: usize = 1 << 13;
    const NONE: Self = Self { offset: u64::MAX, mode: Mode(0), generation: 0, host: 0 };

    /// Where one is that begins at `offset`.
    fn slot(offset: u64, mode: Mode) -> usize {
        (offset ^ offset >> 13 ^ u64::from(mode.0) << 9) as usize % Self::COUNT
    }
}

/// Counters.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Blocks translated.
    pub blocks: u64,
    /// Guest instructions in them.
    pub instructions: u64,
    /// Pages of code thrown away because they changed.
    pub invalidated: u64,
    /// Nanoseconds spent on translating.
    pub nanoseconds: u64,
    /// Times that the code cache was emptied.
    pub flushes: u64,
}

/// The code cache.
pub struct Cache {
    buffer: Buffer,
    tools: Tools,
    /// The page that is being looked at.
    bytes: Box<Bytes>,
    /// Entry and exit.
    pub stubs: Stubs,
    /// Bytes of the stubs, which stay.
    keep: usize,
    host: Host,
    blocks: Vec<Block>,
    sites: Vec<Site>,
    pages: Vec<PageCode>,
    index: FxHashMap<(u64, Mode), u32>,
    straddlers: FxHashMap<(u64, Mode), Straddler>,
    recent: Box<[Recent; Recent::COUNT]>,
    changes: u64,
    /// Where developers read what becomes of blocks.
    pub trace: Option<Trace>,
    unlinked: bool,
    all_flags: bool,
    keep_lock: bool,
    /// What tests do to rewritten code.
    #[cfg(test)]
    pub spoil: Option<fn(&mut [u8])>,
    /// What tests do while code is rewritten, once.
    #[cfg(test)]
    pub meanwhile: Option<Box<dyn FnOnce() + Send>>,
    /// What happened.
    pub count: Counters,
}

/// Bytes of code for each site, and for each block, below which the cache counts as full: what is known about code is bounded
/// by the code's own size. Usual code has twice as many and more.
const SITE: usize = 24;
const BLOCK: usize = 64;

impl Cache {
    /// An empty cache of `size` bytes. `keep_lock`: LOCK is needed.
    ///
    /// # Errors
    /// The host gives no memory.
    pub fn new(size: usize, host: Host, keep_lock: bool) -> Result<Self, Error> {
        let mut buffer = Buffer::new(size)?;
        let stubs = Stubs::new(&mut buffer, host);
        Ok(Self {
            keep: buffer.used(),
            buffer,
            tools: Tools::new(),
            bytes: Box::new([0; _]),
            stubs,
            host,
            blocks: Vec::new(),
            sites: Vec::new(),
            pages: Vec::new(),
            index: FxHashMap::default(),
            straddlers: FxHashMap::default(),
            recent: Box::new([Recent::NONE; _]),
            changes: 0,
            trace: None,
            unlinked: false,
            all_flags: false,
            keep_lock,
            #[cfg(test)]
            spoil: None,
            #[cfg(test)]
            meanwhile: None,
            count: Counters::default(),
        })
    }

    /// Host addresses of code.
    pub fn range(&self) -> (u64, u64) {
        self.buffer.range()
    }

    /// Host addresses of translated code: without the stubs, whose faults are never a guest's.
    pub fn blocks(&self) -> (u64, u64) {
        let (first, last) = self.buffer.range();
        (first + self.keep as u64, last)
    }

    /// Bytes of code.
    pub fn used(&self) -> usize {
        self.buffer.used()
    }

    /// A site by its number.
    pub fn site(&self, n: u32) -> Option<Site> {
        self.sites.get(n as usize).copied()
    }

    /// An instruction of a block for the reference engine.
    #[inline]
    pub fn op(&self, block: u32, op: u32) -> Option<&Op> {
        self.blocks.get(block as usize)?.ops.get(op as usize)
    }

    /// What lies at a host address in translated code.
    pub fn mark(&self, host: u64) -> Option<(Mark, u64)> {
        let n = self.blocks.partition_point(|b| b.host <= host).checked_sub(1)?;
        let block = &self.blocks[n];
        let offset = host - block.host;
        if offset >= block.len.into() {
            return None;
        }
        let m = block.marks.partition_point(|m| u64::from(m.host) <= offset).checked_sub(1)?;
        let mark = block.marks[m];
        Some((mark, block.host + u64::from(mark.host)))
    }

    /// Whether the code of a block is as it was when it was translated.
    pub fn is_fresh(&self, block: u32, memory: &Memory) -> bool {
        let page = self.blocks.get(block as usize).and_then(|b| self.pages.get(b.page as usize));
        page.is_some_and(|p| memory.code().generation(p.offset) == p.generation)
    }

    /// The count of changes that the cache has taken note of.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Throws away what was made of code that has changed since. Tells whether there was something.
    pub fn refresh(&mut self, memory: &Memory) -> bool {
        let changes = memory.code().changes();
        if changes == self.changes {
            return false;
        }
        self.changes = changes;
        let stale = |n: &&u32| {
            let page = &self.pages[**n as usize];
            memory.code().generation(page.offset) != page.generation
        };
        let stale: Vec<u32> = self.index.values().filter(stale).copied().collect();
        stale.iter().for_each(|&n| self.drop_page(n as usize));
        !stale.is_empty()
    }

    fn drop_page(&mut self, n: usize) {
        let page = &mut self.pages[n];
        self.index.remove(&(page.offset, page.mode));
        let mut gone = std::mem::take(&mut page.straddlers);
        gone.extend(page.entries.drain());
        gone.into_iter().for_each(|(guest, host)| self.retire(guest, host));
        self.count.invalidated += 1;
    }

    /// Has whoever comes to a block, by the table of jumps or by a link, leave instead.
    fn retire(&mut self, guest: u16, host: u64) {
        let number = self.sites.len() as u32;
        self.sites.push(Site { kind: Kind::Stale, guest, block: 0, host });
        let mut code = Asm::new(host);
        code.store_imm32(field(at::SITE), number);
        code.jump_to(self.stubs.site);
        self.buffer.replace(host, &code.code);
    }

    /// Forgets everything.
    pub fn flush(&mut self, frame: &Frame) {
        self.blocks.clear();
        self.sites.clear();
        self.pages.clear();
        self.index.clear();
        self.straddlers.clear();
        self.recent.fill(Recent::NONE);
        frame.clear_jumps();
        self.buffer.truncate(self.keep);
        self.count.flushes += 1;
    }

    /// The page of guest memory at `offset`, by its number here.
    fn page(&mut self, memory: &Memory, offset: u64, mode: Mode) -> u32 {
        let generation = memory.code().generation(offset);
        if let Some(&n) = self.index.get(&(offset, mode)) {
            if self.pages[n as usize].generation == generation {
                return n;
            }
            self.drop_page(n as usize);
        }
        let n = self.pages.len() as u32;
        self.pages.push(PageCode {
            offset,
            mode,
            generation,
            entries: FxHashMap::default(),
            straddlers: Vec::new(),
        });
        self.index.insert((offset, mode), n);
        n
    }

    /// The host address of the block at `offset` in guest memory, translated now if need be. None if it cannot be: the code changes
    /// meanwhile, or there is no room even in an empty cache.
    pub fn find(&mut self, vcpu: &mut interpret::Cpu, frame: &Frame, offset: u64, mode: Mode) -> Option<u64> {
        let memory = &vcpu.core().memory;
        let recent = self.recent[Recent::slot(offset, mode)];
        let generation = memory.code().generation(offset);
        if (recent.offset, recent.mode, recent.generation) == (offset, mode, generation) {
            return Some(recent.host);
        }
        let memory = memory.clone();
        let n = self.page(&memory, offset & !0xfff, mode);
        let start = (offset & 0xfff) as u16;
        let host = match self.pages[n as usize].entries.get(&start) {
            Some(&host) => host,
            None => {
                let (n, output) = self.build(vcpu, frame, offset, None, mode)?;
                let host = self.keep(n, output);
                let n = self.page(&memory, offset & !0xfff, mode);
                // Bytes of before another vCPU's store are not the page's of now.
                if self.pages[n as usize].generation != generation {
                    return None;
                }
                self.pages[n as usize].entries.insert(start, host);
                host
            }
        };
        self.recent[Recent::slot(offset, mode)] = Recent { offset, mode, generation, host };
        Some(host)
    }

    /// The host address of the one instruction at `offset`, which reaches into the page at `next`. None as for [`Cache::find`].
    pub fn straddler(
        &mut self,
        vcpu: &mut interpret::Cpu,
        frame: &Frame,
        (offset, next): (u64, u64),
        mode: Mode,
    ) -> Option<u64> {
        let memory = vcpu.core().memory.clone();
        let generations =
            |memory: &Memory| (memory.code().generation(offset), memory.code().generation(next));
        let before = generations(&memory);
        if let Some(s) = self.straddlers.get(&(offset, mode))
            && (s.next, s.generations) == (next, before)
        {
            return Some(s.host);
        }
        let (n, output) = self.build(vcpu, frame, offset, Some(next), mode)?;
        let host = self.keep(n, output);
        // Both pages must be looked after, as they were when they were read.
        let second = self.page(&memory, next & !0xfff, mode);
        if generations(&memory) != before {
            return None;
        }
        self.straddlers.insert((offset, mode), Straddler { host, next, generations: before });
        for n in [n, second] {
            self.pages[n as usize].straddlers.push(((offset & 0xfff) as u16, host));
        }
        Some(host)
    }

    fn build(
        &mut self,
        vcpu: &mut interpret::Cpu,
        frame: &Frame,
        offset: u64,
        next: Option<u64>,
        mode: Mode,
    ) -> Option<(u32, Output)> {
        let core = vcpu.core();
        let (memory, cpuid, options) = (core.memory.clone(), core.cpuid.clone(), interpret::options(core));
        for _ in 0..2 {
            let n = self.page(&memory, offset & !0xfff, mode.linked());
            let entries = &self.pages[n as usize].entries;
            let context = Context {
                host: self.host,
                stubs: self.stubs,
                cpuid: &cpuid,
                mode,
                vcpu,
                find: &|at| entries.get(&at).copied(),
                alone: next.is_some(),
                unlinked: self.unlinked,
                all_flags: self.all_flags,
                keep_lock: self.keep_lock,
                block: self.blocks.len() as u32,
                first_site: self.sites.len(),
            };
            let page = Page::new(&memory, offset, next, (mode.bits(), options), &mut self.bytes);
            let begun = Instant::now();
            let start = (offset & 0xfff) as u16;
            let output = Builder::build(context, page, start, self.buffer.next(), &mut self.tools);
            #[cfg(test)]
            let output = self.spoiled(output);
            self.count.nanoseconds += begun.elapsed().as_nanos() as u64;
            if self.buffer.fits(output.code.len()) && self.has_room(output.sites.len()) {
                if let Some(trace) = &self.trace {
                    let guest = output.instructions.iter().flat_map(|i| {
                        let at = i.ip() as usize;
                        self.bytes[at..at + i.len()].iter().copied()
                    });
                    let (guest, at): (Vec<u8>, _) = (guest.collect(), self.buffer.next());
                    trace.block(offset & !0xfff, start, mode.bits(), &guest, at, &output.code);
                }
                return Some((n, output));
            }
            self.flush(frame);
        }
        None
    }

    #[cfg(test)]
    fn spoiled(&mut self, mut output: Output) -> Output {
        if let Some(meanwhile) = self.meanwhile.take() {
            meanwhile();
        }
        if let Some(spoil) = self.spoil {
            spoil(&mut output.code);
        }
        output
    }

    /// Whether a block with so many sites may still be described.
    fn has_room(&self, sites: usize) -> bool {
        let (first, last) = self.buffer.range();
        let size = (last - first) as usize;
        self.sites.len() + sites <= size / SITE && self.blocks.len() < size / BLOCK
    }

    fn keep(&mut self, page: u32, mut output: Output) -> u64 {
        let host = self.buffer.next();
        self.buffer.push(&output.code);
        self.count.blocks += 1;
        self.count.instructions += output.instructions.len() as u64;
        self.blocks.push(Block {
            page,
            host,
            len: output.code.len() as u32,
            marks: output.marks.as_slice().into(),
            ops: output.ops.drain(..).collect(),
        });
        self.sites.extend_from_slice(&output.sites);
        self.tools.take_back(output);
        host
    }

    /// The block in the same page as `site` at its target, and with it the link. `None` if it has to be translated first.
    pub fn link(&mut self, site: &Site) -> Option<u64> {
        let block = self.blocks.get(site.block as usize)?;
        let target = *self.pages.get(block.page as usize)?.entries.get(&site.guest)?;
        self.patch(site, target);
        Some(target)
    }

    /// From now on blocks are linked to nothing, so that each is left at its end.
    pub fn keep_unlinked(&mut self) {
        self.unlinked = true;
    }

    /// From now on blocks keep dead status flags too wherever an exception or an interrupt may push them, or not.
    pub fn keep_all_flags(&mut self, all: bool, frame: &Frame) {
        self.all_flags = all;
        self.flush(frame);
    }

    /// Start and bytes of the block at a host address.
    pub fn code(&self, host: u64) -> Option<(u64, &[u8])> {
        let n = self.blocks.partition_point(|b| b.host <= host).checked_sub(1)?;
        let block = &self.blocks[n];
        Some((block.host, self.buffer.bytes(block.host, block.len as usize)))
    }

    /// Lets the branch of a site lead to the code at `host`.
    pub fn patch(&mut self, site: &Site, host: u64) {
        if self.unlinked {
            return;
        }
        self.buffer.patch(site.host, host.wrapping_sub(site.host + 4) as i32);
    }

    /// Where the page of a block lies in guest memory, and the mode of blocks that it is linked to.
    pub fn place(&self, block: u32) -> Option<(u64, Mode)> {
        let page = self.pages.get(self.blocks.get(block as usize)?.page as usize)?;
        Some((page.offset, page.mode))
    }
}
