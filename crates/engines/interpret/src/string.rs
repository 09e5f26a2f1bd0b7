//! String instructions, with their repeat prefixes. A fault, or an interrupt, between two iterations finds registers that
//! tell how far it came.

use iced_x86::{Instruction, Mnemonic, OpKind};
use x86::gpr::{RCX, RDI, RDX, RSI};
use x86::segment::index;

use crate::alu::{Alu, Cmp};
use crate::core::Core;
use crate::op::{Flow, Handler, Op, Result};
use crate::word::Word;

/// Iterations after which a repeated instruction lets interrupts in.
const SLICE: u64 = 4096;

/// Repeat prefixes, in [`Op::imm`].
mod rep {
    pub const NONE: u64 = 0;
    pub const E: u64 = 1;
    pub const NE: u64 = 2;
}

const ES: u8 = index::ES as u8;

/// What a string instruction does in one iteration.
trait Body<T: Word> {
    /// It ends a block: a device may want an interrupt after it.
    const ENDS: bool = false;
    /// The iteration. Registers change only if it succeeds. False ends the repetition (REPE, REPNE).
    fn once(c: &mut Core, op: &Op) -> Result<bool>;
    /// Does several iterations at once where that is the same; how many it did.
    fn bulk(_c: &mut Core, _op: &Op, _count: u64) -> u64 {
        0
    }
}

struct Movs;
struct Stos;
struct Lods;
struct Cmps;
struct Scas;
struct Ins;
struct Outs;

fn mask(op: &Op) -> u64 {
    u64::MAX >> (64 - 8 * u32::from(op.address_size.clamp(1, 8)))
}

fn advance(c: &mut Core, op: &Op, reg: usize, by: u64) {
    let by = if c.rflags & x86::flags::DF != 0 { by.wrapping_neg() } else { by };
    set(c, op, reg, c.r[reg].wrapping_add(by));
}

/// Writes a register with the width of the address size: 32 bits clear the upper half, 16 bits leave the rest.
fn set(c: &mut Core, op: &Op, reg: usize, v: u64) {
    c.r[reg] = match op.address_size {
        8 => v,
        4 => v & 0xffff_ffff,
        _ => c.r[reg] & !0xffff | v & 0xffff,
    };
}

fn source<T: Word>(c: &mut Core, op: &Op) -> Result<T> {
    let linear = c.linear(op.segment, c.r[RSI] & mask(op), T::SIZE, false)?;
    c.read(linear, op.segment)
}

fn destination(c: &mut Core, op: &Op, size: u64, write: bool) -> Result<u64> {
    c.linear(ES, c.r[RDI] & mask(op), size, write)
}

/// The linear address that a register holds, if a run from there within its page needs no more checks: in a flat segment.
fn run_from(c: &mut Core, op: &Op, reg: usize, segment: u8, write: bool) -> Option<u64> {
    let at = c.r[reg] & mask(op);
    match (c.bits, op.address_size) {
        (64, 8) => c.linear(segment, at, 1, write).ok(),
        (32, 4) => (c.flat >> segment >> (8 * u32::from(write)) & 1 != 0).then_some(at),
        _ => None,
    }
}

/// How many iterations stay in one page, the first being at `linear`.
fn in_page(c: &Core, linear: u64, size: u64) -> u64 {
    let to_end = 0x1000 - (linear & 0xfff);
    match c.rflags & x86::flags::DF != 0 {
        true if to_end < size => 0,
        true => (linear & 0xfff) / size + 1,
        false => to_end / size,
    }
}

impl<T: Word> Body<T> for Movs {
    fn once(c: &mut Core, op: &Op) -> Result<bool> {
        let v = source::<T>(c, op)?;
        let to = destination(c, op, T::SIZE, true)?;
        c.write(to, ES, v)?;
        advance(c, op, RSI, T::SIZE);
        advance(c, op, RDI, T::SIZE);
        Ok(true)
    }

    /// Within a page of RAM on both sides: forward, overlaps must be no closer than eight bytes for the instruction's order;
    /// backward, there must be none.
    fn bulk(c: &mut Core, op: &Op, count: u64) -> u64 {
        let Some(from) = run_from(c, op, RSI, op.segment, false) else { return 0 };
        let Some(to) = run_from(c, op, RDI, ES, true) else { return 0 };
        let n = count.min(in_page(c, from, T::SIZE)).min(in_page(c, to, T::SIZE));
        let (source, target) = (c.tlb.entry(c.bank, from), c.tlb.entry(c.bank, to));
        if n * T::SIZE < 16 || source.read != from & !0xfff || target.write != to & !0xfff {
            return 0;
        }
        let (mut a, mut b) = (source.offset | from & 0xfff, target.offset | to & 0xfff);
        let bytes = n * T::SIZE;
        if c.rflags & x86::flags::DF != 0 {
            (a, b) = (a + T::SIZE - bytes, b + T::SIZE - bytes);
            if a.abs_diff(b) < bytes {
                return 0;
            }
        } else if b.wrapping_sub(a) < 8 {
            return 0;
        }
        c.hit |= c.memory.copy(a, b, bytes);
        advance(c, op, RSI, bytes);
        advance(c, op, RDI, bytes);
        n
    }
}

impl<T: Word> Body<T> for Stos {
    fn once(c: &mut Core, op: &Op) -> Result<bool> {
        let to = destination(c, op, T::SIZE, true)?;
        c.write(to, ES, T::get(c, 0))?;
        advance(c, op, RDI, T::SIZE);
        Ok(true)
    }

    fn bulk(c: &mut Core, op: &Op, count: u64) -> u64 {
        let Some(to) = run_from(c, op, RDI, ES, true) else { return 0 };
        if c.rflags & x86::flags::DF != 0 {
            return 0;
        }
        let n = count.min(in_page(c, to, T::SIZE));
        let target = c.tlb.entry(c.bank, to);
        if n * T::SIZE < 16 || target.write != to & !0xfff {
            return 0;
        }
        let b = target.offset | to & 0xfff;
        let v = T::get(c, 0);
        // The pattern repeats: eight bytes of it are right at every multiple of the operand's size.
        let wide = match T::SIZE {
            1 => v.u() * 0x0101_0101_0101_0101,
            2 => v.u() * 0x0001_0001_0001_0001,
            4 => v.u() << 32 | v.u(),
            _ => v.u(),
        };
        let bytes = n * T::SIZE;
        let words = bytes / 8;
        let mut hit = c.memory.fill(b, wide, words);
        for i in words * 8 / T::SIZE..n {
            hit |= c.memory.store(b + i * T::SIZE, v);
        }
        c.hit |= hit;
        advance(c, op, RDI, bytes);
        n
    }
}

impl<T: Word> Body<T> for Lods {
    fn once(c: &mut Core, op: &Op) -> Result<bool> {
        let v = source::<T>(c, op)?;
        T::set(c, 0, v);
        advance(c, op, RSI, T::SIZE);
        Ok(true)
    }
}

fn goes_on(c: &Core, op: &Op) -> bool {
    match op.imm {
        rep::E => c.lazy.zf(),
        rep::NE => !c.lazy.zf(),
        _ => true,
    }
}

impl<T: Word> Body<T> for Cmps {
    fn once(c: &mut Core, op: &Op) -> Result<bool> {
        let a = source::<T>(c, op)?;
        let to = destination(c, op, T::SIZE, false)?;
        let b = c.read::<T>(to, ES)?;
        Cmp::run(c, a, b);
        advance(c, op, RSI, T::SIZE);
        advance(c, op, RDI, T::SIZE);
        Ok(goes_on(c, op))
    }
}

impl<T: Word> Body<T> for Scas {
    fn once(c: &mut Core, op: &Op) -> Result<bool> {
        let to = destination(c, op, T::SIZE, false)?;
        let b = c.read::<T>(to, ES)?;
        let a = T::get(c, 0);
        Cmp::run(c, a, b);
        advance(c, op, RDI, T::SIZE);
        Ok(goes_on(c, op))
    }
}

impl<T: Word> Body<T> for Ins {
    const ENDS: bool = true;

    fn once(c: &mut Core, op: &Op) -> Result<bool> {
        let port = c.r[RDX] as u16;
        c.check_port(port, T::SIZE as u8)?;
        let to = destination(c, op, T::SIZE, true)?;
        // The port is read only once the store cannot fault.
        let place = c.place(to, T::SIZE, true, ES, c.bank)?;
        let v = c.port_read(port, T::SIZE as u8);
        c.place_write(&place, T::SIZE, v);
        advance(c, op, RDI, T::SIZE);
        Ok(true)
    }
}

impl<T: Word> Body<T> for Outs {
    const ENDS: bool = true;

    fn once(c: &mut Core, op: &Op) -> Result<bool> {
        let port = c.r[RDX] as u16;
        c.check_port(port, T::SIZE as u8)?;
        let v = source::<T>(c, op)?;
        c.port_write(port, T::SIZE as u8, v.u());
        advance(c, op, RSI, T::SIZE);
        Ok(true)
    }
}

fn run<T: Word, B: Body<T>>(c: &mut Core, op: &Op) -> Result<Flow> {
    if op.imm == rep::NONE {
        B::once(c, op)?;
        return Ok(if c.hit || B::ENDS { Flow::End } else { Flow::Next });
    }
    // A trap after each iteration is what single-stepping shows.
    let slice = if c.attention == 0 { SLICE } else { 1 };
    let mut done = 0;
    while done < slice {
        let count = c.r[RCX] & mask(op);
        if count == 0 {
            return Ok(if c.hit || B::ENDS { Flow::End } else { Flow::Next });
        }
        let bulk = if slice > 1 { B::bulk(c, op, count.min(slice - done)) } else { 0 };
        if bulk > 0 {
            set(c, op, RCX, count - bulk);
            done += bulk;
        } else {
            let more = B::once(c, op)?;
            set(c, op, RCX, count - 1);
            done += 1;
            if !more {
                return Ok(if c.hit || B::ENDS { Flow::End } else { Flow::Next });
            }
        }
        // Overwriting itself does not stop it: what was fetched goes on until something interrupts it.
    }
    let left = c.r[RCX] & mask(op);
    Ok(if left == 0 { Flow::End } else { Flow::Again })
}

fn sized<B>(size: u8) -> Handler
where
    B: Body<u8> + Body<u16> + Body<u32> + Body<u64>,
{
    match size {
        1 => run::<u8, B>,
        2 => run::<u16, B>,
        4 => run::<u32, B>,
        _ => run::<u64, B>,
    }
}

/// The handler of a string instruction.
pub fn handler(i: &Instruction, op: &mut Op) -> Option<Handler> {
    if !(0..i.op_count()).any(|n| is_string(i.op_kind(n))) {
        return None;
    }
    let size = i.memory_size().size() as u8;
    let compares = matches!(
        i.mnemonic(),
        Mnemonic::Cmpsb
            | Mnemonic::Cmpsw
            | Mnemonic::Cmpsd
            | Mnemonic::Cmpsq
            | Mnemonic::Scasb
            | Mnemonic::Scasw
            | Mnemonic::Scasd
            | Mnemonic::Scasq
    );
    op.imm = match (i.has_rep_prefix(), i.has_repne_prefix()) {
        (false, false) => rep::NONE,
        (_, true) if compares => rep::NE,
        _ => rep::E,
    };
    use Mnemonic as M;
    Some(match i.mnemonic() {
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => sized::<Movs>(size),
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => sized::<Stos>(size),
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => sized::<Lods>(size),
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => sized::<Cmps>(size),
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => sized::<Scas>(size),
        M::Insb | M::Insw | M::Insd => sized::<Ins>(size),
        M::Outsb | M::Outsw | M::Outsd => sized::<Outs>(size),
        _ => return None,
    })
}

fn is_string(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::MemorySegSI
            | OpKind::MemorySegESI
            | OpKind::MemorySegRSI
            | OpKind::MemoryESDI
            | OpKind::MemoryESEDI
            | OpKind::MemoryESRDI
    )
}
