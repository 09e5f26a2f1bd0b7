//! Far jumps, calls and returns, call gates, and the fast system calls.

use iced_x86::OpKind;
use x86::control::efer;
use x86::cpuid::Vendor;
use x86::exception::vector;
use x86::gpr::{R11, RBP, RCX, RDX, RSP};
use x86::segment::{attr, index};
use x86::{Segment, flags};

use crate::core::Core;
use crate::mmu::canonical;
use crate::op::{Flow, Op, Result};
use crate::segment::{Descriptor, kind, null_stack, v8086};
use crate::task::Why;
use crate::word::Word;

/// A code segment with all of the address space, as SYSCALL and SYSENTER load it.
fn flat_code(selector: u16, dpl: u8, long: bool) -> Segment {
    let mode = if long { attr::L } else { attr::DB };
    let attributes = attr::P
        | attr::S
        | attr::CODE
        | attr::RW
        | attr::ACCESSED
        | attr::G
        | mode
        | u16::from(dpl) << attr::DPL_SHIFT;
    Segment { selector, attributes, limit: u32::MAX, base: 0 }
}

/// A stack segment with all of the address space.
fn flat_stack(selector: u16, dpl: u8) -> Segment {
    let attributes = attr::P
        | attr::S
        | attr::RW
        | attr::ACCESSED
        | attr::G
        | attr::DB
        | u16::from(dpl) << attr::DPL_SHIFT;
    Segment { selector, attributes, limit: u32::MAX, base: 0 }
}

/// The selector and offset that a far branch names.
fn target<T: Word>(c: &mut Core, op: &Op) -> Result<(u16, u64)> {
    let Some(i) = &op.instruction else { return c.ud() };
    match i.op0_kind() {
        OpKind::FarBranch16 => Ok((i.far_branch_selector(), i.far_branch16().into())),
        OpKind::FarBranch32 => Ok((i.far_branch_selector(), i.far_branch32().into())),
        _ => {
            let linear = c.operand(op, T::SIZE + 2, false)?;
            let offset = c.read::<T>(linear, op.segment)?.u();
            Ok((c.read::<u16>(linear.wrapping_add(T::SIZE), op.segment)?, offset))
        }
    }
}

/// JMP far.
pub fn jmp<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let (selector, offset) = target::<T>(c, op)?;
    if !c.protected() {
        return real_jump(c, selector, offset);
    }
    let mut d = code_or_gate(c, selector)?;
    let s = d.segment;
    if s.has(attr::S) {
        direct(c, &mut d, selector)?;
        return arrive(c, d.segment, offset);
    }
    match s.kind() {
        kind::CALL_GATE | kind::CALL_GATE16 => {
            let (mut d, selector, offset, _) = through_gate(c, &d)?;
            let dpl = d.segment.dpl();
            let conforming = d.segment.has(attr::DC);
            if conforming && dpl > c.cpl || !conforming && dpl != c.cpl {
                return c.selector_fault(vector::GP, selector);
            }
            c.set_accessed(&mut d)?;
            d.segment.selector = selector & !3 | u16::from(c.cpl);
            arrive(c, d.segment, offset)
        }
        _ => to_task(c, &d, selector, Why::Jump, op),
    }
}

fn real_jump(c: &mut Core, selector: u16, offset: u64) -> Result<Flow> {
    if offset > c.s.segments[index::CS].limit.into() {
        return c.gp();
    }
    let segment = if c.v8086() {
        v8086(selector)
    } else {
        Segment { selector, base: u64::from(selector) << 4, ..c.s.segments[index::CS] }
    };
    c.set_segment(index::CS, segment);
    c.rip = offset;
    Ok(Flow::Jump)
}

fn code_or_gate(c: &mut Core, selector: u16) -> Result<Descriptor> {
    if selector & !3 == 0 {
        return c.gp();
    }
    c.descriptor(selector, vector::GP)
}

/// Checks a code segment that is named directly, and completes its descriptor.
fn direct(c: &mut Core, d: &mut Descriptor, selector: u16) -> Result<()> {
    let s = d.segment;
    let rpl = (selector & 3) as u8;
    let allowed = if s.has(attr::DC) { s.dpl() <= c.cpl } else { rpl <= c.cpl && s.dpl() == c.cpl };
    let both = c.long() && s.has(attr::L | attr::DB);
    if !s.has(attr::CODE) || !allowed || both {
        return c.selector_fault(vector::GP, selector);
    }
    if !s.has(attr::P) {
        return c.selector_fault(vector::NP, selector);
    }
    c.set_accessed(d)?;
    d.segment.selector = selector & !3 | u16::from(c.cpl);
    Ok(())
}

fn inside(c: &mut Core, segment: &Segment, offset: u64) -> Result<()> {
    let ok =
        if c.long() && segment.has(attr::L) { canonical(offset) } else { offset <= segment.limit.into() };
    if ok { Ok(()) } else { c.gp() }
}

fn arrive(c: &mut Core, segment: Segment, offset: u64) -> Result<Flow> {
    let offset = if c.long() && segment.has(attr::L) { offset } else { offset & 0xffff_ffff };
    inside(c, &segment, offset)?;
    c.set_segment(index::CS, segment);
    c.rip = offset;
    Ok(Flow::Jump)
}

/// The code segment that a call gate leads to, its selector, the offset, and the parameter count.
fn through_gate(c: &mut Core, gate: &Descriptor) -> Result<(Descriptor, u16, u64, u64)> {
    let g = gate.segment;
    let named = g.selector;
    if g.dpl() < c.cpl || g.dpl() < (named & 3) as u8 {
        return c.selector_fault(vector::GP, named);
    }
    if !g.has(attr::P) {
        return c.selector_fault(vector::NP, named);
    }
    let long = c.long();
    let wide = g.kind() == kind::CALL_GATE;
    if long && !wide {
        return c.selector_fault(vector::GP, named);
    }
    let mut offset = gate.raw & 0xffff;
    if wide {
        offset |= gate.raw >> 32 & 0xffff_0000;
    }
    if long {
        let high = c.read_system::<u64>(gate.at.wrapping_add(8))?;
        if high >> 40 & 0x1f != 0 {
            return c.selector_fault(vector::GP, named);
        }
        offset |= high << 32;
    }
    let selector = (gate.raw >> 16) as u16;
    if selector & !3 == 0 {
        return c.gp();
    }
    let d = c.descriptor(selector, vector::GP)?;
    let s = d.segment;
    let mode = !long || s.has(attr::L) && !s.has(attr::DB);
    if !s.has(attr::S | attr::CODE) || s.dpl() > c.cpl || !mode {
        return c.selector_fault(vector::GP, selector);
    }
    if !s.has(attr::P) {
        return c.selector_fault(vector::NP, selector);
    }
    Ok((d, selector, offset, gate.raw >> 32 & 0x1f))
}

/// A far transfer to a TSS or task gate.
fn to_task(c: &mut Core, d: &Descriptor, selector: u16, why: Why, op: &Op) -> Result<Flow> {
    let s = d.segment;
    let tss = matches!(s.kind(), kind::TSS | kind::TSS16);
    if c.long() || s.has(attr::S) || !(tss || s.kind() == kind::TASK_GATE) {
        return c.selector_fault(vector::GP, selector);
    }
    if s.dpl() < c.cpl || s.dpl() < (selector & 3) as u8 {
        return c.selector_fault(vector::GP, selector);
    }
    let tss = if tss {
        selector
    } else {
        if !s.has(attr::P) {
            return c.selector_fault(vector::NP, selector);
        }
        (d.raw >> 16) as u16
    };
    let start = c.rip;
    c.rip = c.next_rip(op);
    match c.switch_by_instruction(tss, why) {
        Ok(()) => Ok(Flow::Jump),
        Err(e) => {
            c.rip = start;
            Err(e)
        }
    }
}

/// CALL far.
pub fn call<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let (selector, offset) = target::<T>(c, op)?;
    let next = c.next_rip(op);
    let old = c.s.segments[index::CS].selector;
    if !c.protected() {
        if offset > c.s.segments[index::CS].limit.into() {
            return c.gp();
        }
        push_pair::<T>(c, old, next)?;
        return real_jump(c, selector, offset);
    }
    let mut d = code_or_gate(c, selector)?;
    if d.segment.has(attr::S) {
        direct(c, &mut d, selector)?;
        let offset = if c.long() && d.segment.has(attr::L) { offset } else { offset & 0xffff_ffff };
        inside(c, &d.segment, offset)?;
        push_pair::<T>(c, old, next)?;
        return arrive(c, d.segment, offset);
    }
    match d.segment.kind() {
        kind::CALL_GATE | kind::CALL_GATE16 => call_gate(c, &d, next),
        _ => to_task(c, &d, selector, Why::Call, op),
    }
}

fn push_pair<T: Word>(c: &mut Core, cs: u16, ip: u64) -> Result<()> {
    let rsp = c.r[RSP];
    let result = c.push(T::of(cs.into())).and_then(|_| c.push(T::of(ip)));
    if result.is_err() {
        c.r[RSP] = rsp;
    }
    result.map(|_| ())
}

fn call_gate(c: &mut Core, gate: &Descriptor, next: u64) -> Result<Flow> {
    let (mut d, selector, offset, params) = through_gate(c, gate)?;
    let s = d.segment;
    let wide = gate.segment.kind() == kind::CALL_GATE;
    let long = c.long();
    let old = c.s.segments;
    inside(c, &s, offset)?;
    c.set_accessed(&mut d)?;
    if s.has(attr::DC) || s.dpl() == c.cpl {
        d.segment.selector = selector & !3 | u16::from(c.cpl);
        match (long, wide) {
            (true, _) => push_pair::<u64>(c, old[index::CS].selector, next)?,
            (_, true) => push_pair::<u32>(c, old[index::CS].selector, next)?,
            _ => push_pair::<u16>(c, old[index::CS].selector, next)?,
        }
        return arrive(c, d.segment, offset);
    }
    let cpl = s.dpl();
    let old_sp = c.r[RSP];
    let size: u64 = if long {
        8
    } else if wide {
        4
    } else {
        2
    };
    let mut frame: Vec<u64> = vec![old[index::SS].selector.into(), old_sp];
    if !long {
        for n in (0..params).rev() {
            frame.push(if wide {
                c.stack_read::<u32>(4 * n)?.into()
            } else {
                c.stack_read::<u16>(2 * n)?.into()
            });
        }
    }
    frame.extend([old[index::CS].selector.into(), next]);
    let (ss, sp) = if long {
        (null_stack(cpl.into(), cpl), c.tss_stack_long(4 + 8 * u64::from(cpl))?)
    } else {
        let (ss, sp) = c.tss_stack(cpl)?;
        (c.stack_segment(ss, cpl, vector::TS)?, sp)
    };
    let sp = c.push_frame(ss, sp, cpl, size, &frame)?;
    d.segment.selector = selector & !3 | u16::from(cpl);
    c.set_segment(index::CS, d.segment);
    c.set_cpl(cpl);
    c.set_segment(index::SS, ss);
    c.r[RSP] = sp;
    c.rip = offset;
    Ok(Flow::Jump)
}

/// RETF, with the bytes to drop in `imm`.
pub fn ret<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let rip = c.stack_read::<T>(0)?.u();
    let cs = c.stack_read::<T>(T::SIZE)?.u() as u16;
    let drop = op.imm & 0xffff;
    let after = c.stack_at(2 * T::SIZE + drop);
    if !c.protected() {
        let flow = real_jump(c, cs, rip)?;
        c.set_stack(after);
        return Ok(flow);
    }
    let rpl = (cs & 3) as u8;
    let (segment, cpl) = c.return_code_segment(cs)?;
    let outward = rpl > c.cpl;
    inside(c, &segment, rip)?;
    if !outward {
        let mask = c.stack_mask;
        c.set_segment(index::CS, segment);
        c.r[RSP] = c.r[RSP] & !mask | after & mask;
        c.rip = rip;
        return Ok(Flow::Jump);
    }
    let sp = c.stack_read::<T>(2 * T::SIZE + drop)?.u();
    let selector = c.stack_read::<T>(3 * T::SIZE + drop)?.u() as u16;
    let to64 = c.long() && segment.has(attr::L);
    let null = selector & !3 == 0 && to64 && cpl != 3 && (selector & 3) as u8 == cpl;
    let ss = if null { null_stack(selector, cpl) } else { c.return_stack(selector, cpl)? };
    c.set_segment(index::CS, segment);
    c.set_cpl(cpl);
    c.set_segment(index::SS, ss);
    c.return_sp(sp.wrapping_add(drop));
    c.drop_privileged_segments();
    c.rip = rip;
    Ok(Flow::Jump)
}

/// SYSCALL (APM vol. 3).
pub fn syscall(c: &mut Core, op: &Op) -> Result<Flow> {
    let intel_32 = c.cpuid.vendor() == Vendor::Intel && c.bits != 64;
    if c.s.efer & efer::SCE == 0 || !c.protected() || intel_32 {
        return c.ud();
    }
    c.delivered = true;
    let msrs = &c.s.msrs;
    let cs = (msrs.star >> 32) as u16 & !3;
    let next = c.next_rip(op);
    if c.long() {
        let target = if c.bits == 64 { msrs.lstar } else { msrs.cstar };
        let mask = msrs.sfmask;
        c.r[RCX] = next;
        c.r[R11] = c.get_flags() & !flags::RF;
        let new = c.get_flags() & !(mask | flags::RF);
        c.set_segment(index::CS, flat_code(cs, 0, true));
        c.set_segment(index::SS, flat_stack(cs.wrapping_add(8), 0));
        c.cpl = 0;
        c.set_flags(new);
        c.rip = target;
    } else {
        let target = msrs.star & 0xffff_ffff;
        c.r[RCX] = next & 0xffff_ffff;
        c.set_segment(index::CS, flat_code(cs, 0, false));
        c.set_segment(index::SS, flat_stack(cs.wrapping_add(8), 0));
        c.cpl = 0;
        c.set_system_flags(c.rflags & !(flags::IF | flags::VM | flags::RF));
        c.rip = target;
    }
    Ok(Flow::Jump)
}

/// SYSRET, to 64-bit code with `L`.
pub fn sysret<const L: bool>(c: &mut Core, _: &Op) -> Result<Flow> {
    let intel_32 = c.cpuid.vendor() == Vendor::Intel && c.bits != 64;
    if c.s.efer & efer::SCE == 0 || !c.protected() || intel_32 {
        return c.ud();
    }
    if c.cpl != 0 {
        return c.gp();
    }
    let base = (c.s.msrs.star >> 48) as u16;
    let rip = if L { c.r[RCX] } else { c.r[RCX] & 0xffff_ffff };
    // Intel checks the address here, with privilege 0; on AMD the fetch faults at privilege 3.
    if c.cpuid.vendor() == Vendor::Intel && !canonical(rip) {
        return c.gp();
    }
    let cs = if L { base.wrapping_add(16) } else { base } | 3;
    let long = c.long();
    c.set_segment(index::CS, flat_code(cs, 3, L));
    c.set_segment(index::SS, flat_stack(base.wrapping_add(8) | 3, 3));
    c.cpl = 3;
    if long {
        let new = c.r[R11] & (flags::DEFINED & !(flags::RF | flags::VM));
        c.set_flags(new);
    } else {
        c.set_system_flags(c.rflags | flags::IF);
    }
    c.rip = rip;
    Ok(Flow::Jump)
}

/// SYSENTER. AMD has it in legacy mode alone.
pub fn sysenter(c: &mut Core, _: &Op) -> Result<Flow> {
    if c.cpuid.vendor() == Vendor::Amd && c.long() {
        return c.ud();
    }
    let msrs = &c.s.msrs;
    let cs = msrs.sysenter_cs as u16 & !3;
    if c.s.cr0 & x86::control::cr0::PE == 0 || cs == 0 {
        return c.gp();
    }
    let (rip, rsp) = (msrs.sysenter_eip, msrs.sysenter_esp);
    let long = c.long();
    c.set_system_flags(c.rflags & !(flags::VM | flags::IF | flags::RF));
    c.set_segment(index::CS, flat_code(cs, 0, long));
    c.set_segment(index::SS, flat_stack(cs.wrapping_add(8), 0));
    c.set_cpl(0);
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    c.r[RSP] = rsp & mask;
    c.rip = rip & mask;
    Ok(Flow::Jump)
}

/// SYSEXIT, to 64-bit code with `L`.
pub fn sysexit<const L: bool>(c: &mut Core, _: &Op) -> Result<Flow> {
    if c.cpuid.vendor() == Vendor::Amd && c.long() {
        return c.ud();
    }
    let base = c.s.msrs.sysenter_cs as u16 & !3;
    if c.cpl != 0 || !c.protected() || base == 0 {
        return c.gp();
    }
    let (rip, rsp) = (c.r[RDX], c.r[RCX]);
    if L && !(canonical(rip) && canonical(rsp)) {
        return c.gp();
    }
    let cs = base.wrapping_add(if L { 32 } else { 16 }) | 3;
    c.set_segment(index::CS, flat_code(cs, 3, L));
    c.set_segment(index::SS, flat_stack(cs.wrapping_add(8) | 3, 3));
    c.set_cpl(3);
    let mask = if L { u64::MAX } else { 0xffff_ffff };
    c.rip = rip & mask;
    c.r[RSP] = rsp & mask;
    Ok(Flow::Jump)
}

/// ENTER.
pub fn enter<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let Some(i) = &op.instruction else { return c.ud() };
    let (size, level) = (u64::from(i.immediate16()), u64::from(i.immediate8_2nd() & 31));
    let rsp = c.r[RSP];
    let result = enter_frame::<T>(c, size, level);
    if result.is_err() {
        c.r[RSP] = rsp;
    }
    result
}

fn enter_frame<T: Word>(c: &mut Core, size: u64, level: u64) -> Result<Flow> {
    const SS: u8 = index::SS as u8;
    let rbp = T::get(c, RBP as u8);
    c.push(rbp)?;
    let frame = T::of(c.r[RSP]);
    let mut from = c.r[RBP];
    for _ in 1..level {
        from = from.wrapping_sub(T::SIZE) & c.stack_mask;
        let linear = c.linear(SS, from, T::SIZE, false)?;
        let v = c.read::<T>(linear, SS)?;
        c.push(v)?;
    }
    if level > 0 {
        c.push(frame)?;
    }
    let sp = c.stack_at(size.wrapping_neg());
    // The processor makes sure that the new top of the stack can be written.
    let linear = c.linear(SS, sp, T::SIZE, true)?;
    c.place(linear, T::SIZE, true, SS, c.bank)?;
    c.set_stack(sp);
    T::set(c, RBP as u8, frame);
    Ok(if c.hit { Flow::End } else { Flow::Next })
}
