//! Loading segment registers: descriptors, checks, accessed bits.

use x86::exception::vector;
use x86::segment::{attr, index};
use x86::{Exception, Segment, Table};

use crate::core::Core;
use crate::op::{Flow, Op, Result};
use crate::word::Word;

/// Types of system descriptors (SDM vol. 3A, table 3-2).
pub mod kind {
    pub const TSS16: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL_GATE16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT_GATE16: u8 = 6;
    pub const TRAP_GATE16: u8 = 7;
    pub const TSS: u8 = 9;
    pub const TSS_BUSY: u8 = 11;
    pub const CALL_GATE: u8 = 12;
    pub const INTERRUPT_GATE: u8 = 14;
    pub const TRAP_GATE: u8 = 15;
}

/// Bits of a selector.
const TI: u16 = 4;

/// A descriptor with where it came from.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    /// As a segment register would hold it.
    pub segment: Segment,
    /// The first eight bytes.
    pub raw: u64,
    /// Linear address.
    pub at: u64,
}

impl Core {
    /// An exception that names a selector.
    pub fn selector_fault<T>(&mut self, v: u8, selector: u16) -> Result<T> {
        self.raise(Exception::with_code(v, (selector & !3).into()))
    }

    /// Reads the descriptor of `selector`, which is not null. `v` is raised when it lies outside its table.
    pub fn descriptor(&mut self, selector: u16, v: u8) -> Result<Descriptor> {
        let table = if selector & TI != 0 {
            let ldtr = &self.s.ldtr;
            if !ldtr.usable() {
                return self.selector_fault(v, selector);
            }
            (ldtr.base, u64::from(ldtr.limit))
        } else {
            (self.s.gdtr.base, self.s.gdtr.limit.into())
        };
        let offset = u64::from(selector & !7);
        if offset + 7 > table.1 {
            return self.selector_fault(v, selector);
        }
        let at = table.0.wrapping_add(offset);
        let raw = self.read_system::<u64>(at)?;
        Ok(Descriptor { segment: Segment::from_descriptor(selector, raw), raw, at })
    }

    /// The upper half of a system descriptor's base in long mode. Its type bits must be zero.
    pub fn upper_base(&mut self, d: &mut Descriptor, v: u8) -> Result<()> {
        if self.long() {
            let selector = d.segment.selector;
            let limit = if selector & TI != 0 { self.s.ldtr.limit } else { self.s.gdtr.limit.into() };
            if u32::from(selector & !7) + 15 > limit {
                return self.selector_fault(v, selector);
            }
            let high = self.read_system::<u64>(d.at.wrapping_add(8))?;
            if high >> 40 & 0x1f != 0 {
                return self.selector_fault(v, selector);
            }
            d.segment.base |= high << 32;
            if !crate::mmu::canonical(d.segment.base) {
                return self.selector_fault(v, selector);
            }
        }
        Ok(())
    }

    /// Sets the accessed bit of a code or data segment's descriptor.
    pub fn set_accessed(&mut self, d: &mut Descriptor) -> Result<()> {
        if d.segment.attributes & attr::ACCESSED == 0 {
            let at = d.at.wrapping_add(5);
            let byte = (d.raw >> 40) as u8 | 1;
            self.write_system(at, byte)?;
            d.segment.attributes |= attr::ACCESSED;
        }
        Ok(())
    }

    /// Loads DS, ES, FS, GS or SS, as MOV and POP do.
    pub fn load_segment(&mut self, n: usize, selector: u16) -> Result<()> {
        if !self.protected() {
            let old = self.s.segments[n];
            // The limit of before stays in real mode ("unreal" mode rests on it).
            let segment = if self.v8086() {
                v8086(selector)
            } else {
                Segment { selector, base: u64::from(selector) << 4, ..old }
            };
            self.set_segment(n, segment);
            return Ok(());
        }
        let segment = if n == index::SS {
            self.stack_segment(selector, self.cpl, vector::GP)?
        } else {
            self.data_segment(n, selector)?
        };
        self.set_segment(n, segment);
        Ok(())
    }

    fn data_segment(&mut self, n: usize, selector: u16) -> Result<Segment> {
        if selector & !3 == 0 {
            // The base of FS and GS survives a null selector on AMD and is cleared on Intel.
            let keep = self.cpuid.vendor() == x86::cpuid::Vendor::Amd && self.long();
            let base = if keep { self.s.segments[n].base } else { 0 };
            return Ok(Segment { selector, base, ..Segment::default() });
        }
        let mut d = self.descriptor(selector, vector::GP)?;
        let s = d.segment;
        let code = s.has(attr::CODE);
        let conforming = code && s.has(attr::DC);
        let readable = s.has(attr::S) && (!code || s.has(attr::RW));
        let rpl = (selector & 3) as u8;
        if !readable || (!conforming && rpl.max(self.cpl) > s.dpl()) {
            return self.selector_fault(vector::GP, selector);
        }
        if !s.has(attr::P) {
            return self.selector_fault(vector::NP, selector);
        }
        self.set_accessed(&mut d)?;
        Ok(d.segment)
    }

    /// Checks a stack segment for privilege `cpl`. `v` is #GP, or #TS when a TSS named it.
    pub fn stack_segment(&mut self, selector: u16, cpl: u8, v: u8) -> Result<Segment> {
        let rpl = (selector & 3) as u8;
        if selector & !3 == 0 {
            // In 64-bit mode SS may be null below privilege 3.
            if self.bits == 64 && cpl != 3 && rpl == cpl {
                return Ok(null_stack(selector, cpl));
            }
            return self.selector_fault(v, selector);
        }
        let mut d = self.descriptor(selector, v)?;
        let s = d.segment;
        let writable = s.has(attr::S | attr::RW) && !s.has(attr::CODE);
        if rpl != cpl || !writable || s.dpl() != cpl {
            return self.selector_fault(v, selector);
        }
        if !s.has(attr::P) {
            return self.selector_fault(vector::SS, selector);
        }
        self.set_accessed(&mut d)?;
        Ok(d.segment)
    }

    /// Makes DS, ES, FS and GS null if the new privilege level may not have them (returns outward).
    pub fn drop_privileged_segments(&mut self) {
        for n in [index::ES, index::DS, index::FS, index::GS] {
            let s = self.s.segments[n];
            let conforming = s.has(attr::CODE | attr::DC);
            if s.usable() && s.has(attr::S) && !conforming && s.dpl() < self.cpl {
                self.set_segment(n, Segment::default());
            }
        }
    }
}

/// A segment of virtual-8086 mode.
pub fn v8086(selector: u16) -> Segment {
    Segment {
        selector,
        attributes: attr::P | attr::S | attr::RW | attr::ACCESSED | 3 << attr::DPL_SHIFT,
        limit: 0xffff,
        base: u64::from(selector) << 4,
    }
}

/// The null SS that interrupts load in long mode.
pub fn null_stack(selector: u16, cpl: u8) -> Segment {
    Segment { selector, attributes: u16::from(cpl) << attr::DPL_SHIFT, limit: 0, base: 0 }
}

/// MOV sreg, r/m16.
pub fn mov_to<const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let n = usize::from(op.dst) % 6;
    if n == index::CS {
        return c.ud();
    }
    let v = c.get_rm::<u16, M>(op, op.src)?;
    c.load_segment(n, v)?;
    Ok(loaded(c, n))
}

/// After SS, interrupts wait for one instruction; other loads matter only where segments do.
fn loaded(c: &mut Core, n: usize) -> Flow {
    if n == index::SS {
        c.attend(crate::core::attention::SHADOW, true);
        c.traps_wait = true;
        Flow::End
    } else {
        Flow::Next
    }
}

/// MOV r/m, sreg. Registers get it zero-extended; memory 16 bits.
pub fn mov_from<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let v = c.s.segments[usize::from(op.src) % 6].selector;
    if M {
        c.store(op, v)
    } else {
        T::set(c, op.dst, T::of(v.into()));
        Ok(Flow::Next)
    }
}

/// PUSH sreg.
pub fn push<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let v = c.s.segments[usize::from(op.dst) % 6].selector;
    if T::SIZE == 4 {
        // Processors write the lower half alone.
        let sp = c.stack_at(4u64.wrapping_neg());
        let linear = c.linear(index::SS as u8, sp, 4, true)?;
        let flow = c.write(linear, index::SS as u8, v)?;
        c.set_stack(sp);
        return Ok(flow);
    }
    c.push(T::of(v.into()))
}

/// POP sreg.
pub fn pop<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let n = usize::from(op.dst) % 6;
    let v = c.stack_read::<T>(0)?.u() as u16;
    let sp = c.stack_at(T::SIZE);
    let mask = c.stack_mask;
    c.load_segment(n, v)?;
    let rsp = x86::gpr::RSP;
    c.r[rsp] = c.r[rsp] & !mask | sp & mask;
    Ok(loaded(c, n))
}

/// LDS, LES, LFS, LGS, LSS.
pub fn load_far<T: Word, const N: usize>(c: &mut Core, op: &Op) -> Result<Flow> {
    let linear = c.operand(op, T::SIZE + 2, false)?;
    let offset = c.read::<T>(linear, op.segment)?;
    let selector = c.read::<u16>(linear.wrapping_add(T::SIZE), op.segment)?;
    c.load_segment(N, selector)?;
    T::set(c, op.dst, offset);
    Ok(Flow::Next)
}

fn table_at(c: &mut Core, op: &Op) -> Result<(u64, u64)> {
    let linear = c.operand(op, 10, false)?;
    Ok((linear, linear.wrapping_add(2)))
}

/// LGDT, and LIDT with `I`.
pub fn load_table<const I: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    if c.cpl != 0 {
        return c.gp();
    }
    let (linear, after) = table_at(c, op)?;
    let limit = c.read::<u16>(linear, op.segment)?;
    let base = if c.bits == 64 {
        c.read::<u64>(after, op.segment)?
    } else {
        let base = c.read::<u32>(after, op.segment)?.into();
        if op.size == 2 { base & 0xff_ffff } else { base }
    };
    if !crate::mmu::canonical(base) {
        return c.gp();
    }
    let table = Table { base, limit };
    if I {
        c.s.idtr = table
    } else {
        c.s.gdtr = table
    }
    Ok(Flow::Next)
}

/// SGDT, and SIDT with `I`.
pub fn store_table<const I: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.check_umip()?;
    let table = if I { c.s.idtr } else { c.s.gdtr };
    let (linear, _) = table_at(c, op)?;
    let size = if c.bits == 64 { 10 } else { 6 };
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let place = c.place(linear, size, true, op.segment, c.bank)?;
    c.place_write_bytes(&place, &bytes[..size as usize]);
    Ok(Flow::End)
}

/// SLDT, and STR with `T`.
pub fn store_system<W: Word, const T: bool, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    if !c.protected() {
        return c.ud();
    }
    c.check_umip()?;
    let v = if T { c.s.tr.selector } else { c.s.ldtr.selector };
    if M {
        c.store(op, v)
    } else {
        W::set(c, op.dst, W::of(v.into()));
        Ok(Flow::Next)
    }
}

/// LLDT.
pub fn lldt<const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let selector = system_selector::<M>(c, op)?;
    if selector & !3 == 0 {
        c.s.ldtr = Segment { selector, ..Segment::default() };
        return Ok(Flow::Next);
    }
    let mut d = global(c, selector)?;
    if d.segment.has(attr::S) || d.segment.kind() != kind::LDT {
        return c.selector_fault(vector::GP, selector);
    }
    if !d.segment.has(attr::P) {
        return c.selector_fault(vector::NP, selector);
    }
    c.upper_base(&mut d, vector::GP)?;
    c.s.ldtr = d.segment;
    Ok(Flow::Next)
}

/// LTR.
pub fn ltr<const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let selector = system_selector::<M>(c, op)?;
    if selector & !3 == 0 {
        return c.gp();
    }
    let mut d = global(c, selector)?;
    let k = d.segment.kind();
    let available = k == kind::TSS || (k == kind::TSS16 && !c.long());
    if d.segment.has(attr::S) || !available {
        return c.selector_fault(vector::GP, selector);
    }
    if !d.segment.has(attr::P) {
        return c.selector_fault(vector::NP, selector);
    }
    c.upper_base(&mut d, vector::GP)?;
    c.write_system(d.at.wrapping_add(5), (d.raw >> 40) as u8 | 2)?;
    d.segment.attributes |= 2;
    c.s.tr = d.segment;
    Ok(Flow::Next)
}

fn system_selector<const M: bool>(c: &mut Core, op: &Op) -> Result<u16> {
    if !c.protected() {
        return c.ud();
    }
    if c.cpl != 0 {
        return c.gp();
    }
    c.get_rm::<u16, M>(op, op.dst)
}

fn global(c: &mut Core, selector: u16) -> Result<Descriptor> {
    if selector & TI != 0 {
        return c.selector_fault(vector::GP, selector);
    }
    c.descriptor(selector, vector::GP)
}

/// LAR (`K` 0), LSL (1), VERR (2), VERW (3): ask about a selector; ZF is the answer.
pub fn ask<W: Word, const K: u8, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    if !c.protected() {
        return c.ud();
    }
    let reg = if K < 2 { op.src } else { op.dst };
    let selector = c.get_rm::<u16, M>(op, reg)?;
    let answer = lookup::<K>(c, selector)?;
    let zf = if answer.is_some() { x86::flags::ZF } else { 0 };
    c.lazy = crate::flags::Lazy::from_bits(c.lazy.bits() & !x86::flags::ZF | zf);
    if let Some(v) = answer.filter(|_| K < 2) {
        W::set(c, op.dst, W::of(v));
    }
    Ok(Flow::Next)
}

fn lookup<const K: u8>(c: &mut Core, selector: u16) -> Result<Option<u64>> {
    if selector & !3 == 0 {
        return Ok(None);
    }
    let d = match c.descriptor(selector, vector::GP) {
        Ok(d) => d,
        // Outside the table is an answer; a page fault is a fault.
        Err(_) if c.exception.vector == vector::GP => return Ok(None),
        Err(e) => return Err(e),
    };
    let s = d.segment;
    let code = s.has(attr::S | attr::CODE);
    let conforming = code && s.has(attr::DC);
    let allowed = conforming || (selector & 3).max(c.cpl.into()) <= s.dpl().into();
    if !allowed {
        return Ok(None);
    }
    let long = c.long();
    Ok(match K {
        0 => {
            let known = s.has(attr::S)
                || match s.kind() {
                    kind::LDT | kind::TSS | kind::TSS_BUSY | kind::CALL_GATE => true,
                    kind::TSS16 | kind::TSS16_BUSY | kind::CALL_GATE16 | kind::TASK_GATE => !long,
                    _ => false,
                };
            known.then_some(d.raw >> 32 & 0x00ff_ff00)
        }
        1 => {
            let known = s.has(attr::S)
                || match s.kind() {
                    kind::LDT | kind::TSS | kind::TSS_BUSY => true,
                    kind::TSS16 | kind::TSS16_BUSY => !long,
                    _ => false,
                };
            known.then_some(s.limit.into())
        }
        2 => (s.has(attr::S) && (!code || s.has(attr::RW))).then_some(0),
        _ => (s.has(attr::S | attr::RW) && !code).then_some(0),
    })
}

/// ARPL.
pub fn arpl<const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    if !c.protected() {
        return c.ud();
    }
    let rpl = u16::get(c, op.src) & 3;
    c.modify_rm::<u16, M>(op, |c, v| {
        let low = v & 3 < rpl;
        let zf = if low { x86::flags::ZF } else { 0 };
        c.lazy = crate::flags::Lazy::from_bits(c.lazy.bits() & !x86::flags::ZF | zf);
        if low { v & !3 | rpl } else { v }
    })
}
