//! Delivery of interrupts and exceptions (SDM vol. 3A, chapter 6), and IRET.

use machine::cpu::Activity;
use x86::exception::vector;
use x86::segment::{attr, index};
use x86::{Exception, Segment, flags};

use crate::core::{Core, attention};
use crate::mmu::canonical;
use crate::op::{Fault, Flow, Op, Result};
use crate::segment::{kind, null_stack, v8086};
use crate::task::Why;
use crate::word::Word;

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// An exception, or single step.
    Exception,
    /// External interrupt or NMI.
    External,
    /// INT n, INT3, INTO: checks the gate's DPL.
    Software,
}

/// A gate of the IDT, which is present and may be used: its first 8 bytes, in long mode the other 8, and its type.
struct Gate {
    low: u64,
    high: u64,
    kind: u8,
}

/// A triple fault.
pub struct Shutdown;

/// A pushed frame, while it is being built: nothing of the state changes until all of it is written.
struct Stack {
    base: u64,
    sp: u64,
    mask: u64,
    size: u64,
    limit: Segment,
    cpl: u8,
}

fn contributory(v: u8) -> bool {
    matches!(v, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP)
}

impl Core {
    /// Delivers an exception, with the double faults that may follow (SDM vol. 3A, table 6-5).
    ///
    /// # Errors
    /// A triple fault.
    pub fn deliver_exception(&mut self, first: Exception) -> std::result::Result<(), Shutdown> {
        let mut current = first;
        loop {
            self.count.exceptions += 1;
            match current.vector {
                vector::PF => self.s.cr2 = current.address,
                vector::DB => {
                    self.s.dr6 = self.s.dr6 & !0xf | current.address;
                    self.s.dr7 &= !x86::control::dr7::GD;
                }
                _ => {}
            }
            let Err(Fault) = self.deliver(current.vector, Source::Exception, current.error_code) else {
                return Ok(());
            };
            let second = self.exception;
            let double = current.vector == vector::DF;
            let worse = contributory(current.vector) && contributory(second.vector)
                || current.vector == vector::PF
                    && (contributory(second.vector) || second.vector == vector::PF);
            if double {
                self.s.activity = Activity::Shutdown;
                return Err(Shutdown);
            }
            current = if worse { Exception::with_code(vector::DF, 0) } else { second };
        }
    }

    /// Delivers an external interrupt or a software one.
    ///
    /// # Errors
    /// The exception that delivery met is in [`Core::exception`].
    pub fn deliver(&mut self, v: u8, source: Source, code: Option<u32>) -> Result<()> {
        // Faults push RF set, so that a breakpoint on the instruction does not come again.
        let fault = source == Source::Exception && !matches!(v, vector::DB | vector::BP | vector::OF);
        let rf = if fault { flags::RF } else { 0 };
        let external = u32::from(source != Source::Software);
        let result = if self.s.cr0 & x86::control::cr0::PE == 0 {
            self.deliver_real(v)
        } else {
            self.gate(v, source, external).and_then(|gate| {
                if self.long() {
                    self.deliver_long(&gate, code, rf, external)
                } else {
                    self.deliver_protected(&gate, source, code, rf, external)
                }
            })
        };
        if result.is_ok() {
            self.attend(attention::SHADOW, false);
            self.delivered = true;
        }
        result
    }

    fn deliver_real(&mut self, v: u8) -> Result<()> {
        let at = u64::from(v) * 4;
        if at + 3 > self.s.idtr.limit.into() {
            return self.raise(Exception::with_code(vector::GP, u32::from(v) * 8 + 2));
        }
        let entry = self.read_system::<u32>(self.s.idtr.base.wrapping_add(at))?;
        let rsp = self.r[x86::gpr::RSP];
        let flags = self.get_flags() as u16;
        let (cs, ip) = (self.s.segments[index::CS].selector, self.rip as u16);
        for word in [flags, cs, ip] {
            if let Err(e) = self.push(word) {
                self.r[x86::gpr::RSP] = rsp;
                return Err(e);
            }
        }
        self.set_system_flags(self.rflags & !(flags::IF | flags::TF | flags::AC | flags::RF));
        let selector = (entry >> 16) as u16;
        let cs = Segment { selector, base: u64::from(selector) << 4, ..self.s.segments[index::CS] };
        self.set_segment(index::CS, cs);
        self.rip = (entry & 0xffff).into();
        Ok(())
    }

    fn gate_fault<T>(&mut self, v: u8, vector: u8, external: u32) -> Result<T> {
        self.raise(Exception::with_code(v, u32::from(vector) << 3 | 2 | external))
    }

    /// Reads the gate of vector `v`, and checks what all kinds of gates have in common.
    fn gate(&mut self, v: u8, source: Source, external: u32) -> Result<Gate> {
        let long = self.long();
        let size = if long { 16 } else { 8 };
        let at = u64::from(v) * size;
        if at + size - 1 > self.s.idtr.limit.into() {
            return self.gate_fault(vector::GP, v, external);
        }
        let at = self.s.idtr.base.wrapping_add(at);
        let low = self.read_system::<u64>(at)?;
        let high = if long { self.read_system::<u64>(at.wrapping_add(8))? } else { 0 };
        let k = (low >> 40) as u8 & 0x1f;
        let dpl = (low >> 45) as u8 & 3;
        let known = match k {
            kind::INTERRUPT_GATE | kind::TRAP_GATE => high >> 40 & 0x1f == 0,
            kind::TASK_GATE | kind::INTERRUPT_GATE16 | kind::TRAP_GATE16 => !long,
            _ => false,
        };
        if !known || source == Source::Software && dpl < self.cpl {
            return self.gate_fault(vector::GP, v, external);
        }
        if low >> 47 & 1 == 0 {
            return self.gate_fault(vector::NP, v, external);
        }
        Ok(Gate { low, high, kind: k })
    }

    fn deliver_long(&mut self, gate: &Gate, code: Option<u32>, rf: u64, external: u32) -> Result<()> {
        let (low, high) = (gate.low, gate.high);
        let target = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        let selector = (low >> 16) as u16;
        let (cs, cpl) = self.gate_code_segment(selector, external, true)?;
        let ist = low >> 32 & 7;
        let inward = cpl < self.cpl;
        let sp = if ist != 0 {
            self.tss_stack_long(0x24 + 8 * (ist - 1))?
        } else if inward {
            self.tss_stack_long(4 + 8 * u64::from(cpl))?
        } else {
            self.r[x86::gpr::RSP]
        };
        if !canonical(target) {
            return self.raise(Exception::with_code(vector::GP, 0));
        }
        let old = self.s.segments;
        let frame = [
            old[index::SS].selector.into(),
            self.r[x86::gpr::RSP],
            self.get_flags() | rf,
            old[index::CS].selector.into(),
            self.rip,
        ];
        let mut stack =
            Stack { base: 0, sp: sp & !15, mask: u64::MAX, size: 8, limit: Segment::default(), cpl };
        for word in frame {
            self.stack_push(&mut stack, word)?;
        }
        if let Some(code) = code {
            self.stack_push(&mut stack, code.into())?;
        }
        self.r[x86::gpr::RSP] = stack.sp;
        if inward {
            self.set_segment(index::SS, null_stack(cpl.into(), cpl));
        }
        self.set_segment(index::CS, Segment { selector: selector & !3 | u16::from(cpl), ..cs });
        self.set_cpl(cpl);
        self.rip = target;
        self.gate_flags(gate.kind == kind::INTERRUPT_GATE);
        Ok(())
    }

    fn gate_flags(&mut self, interrupt: bool) {
        let clear = flags::TF | flags::NT | flags::RF | flags::VM | if interrupt { flags::IF } else { 0 };
        self.set_system_flags(self.rflags & !clear);
    }

    /// The code segment that a gate names, and the privilege it gives.
    fn gate_code_segment(&mut self, selector: u16, external: u32, long: bool) -> Result<(Segment, u8)> {
        let fail =
            |c: &mut Self, v: u8| c.raise(Exception::with_code(v, u32::from(selector & !3) | external));
        if selector & !3 == 0 {
            return self.raise(Exception::with_code(vector::GP, external));
        }
        let mut d = match self.descriptor(selector, vector::GP) {
            Ok(d) => d,
            Err(e) => {
                self.meets_delivery(external);
                return Err(e);
            }
        };
        let s = d.segment;
        let mode = !long || s.has(attr::L) && !s.has(attr::DB);
        if !s.has(attr::S | attr::CODE) || s.dpl() > self.cpl || !mode {
            return fail(self, vector::GP);
        }
        if !s.has(attr::P) {
            return fail(self, vector::NP);
        }
        self.set_accessed(&mut d)?;
        let cpl = if s.has(attr::DC) { self.cpl } else { s.dpl() };
        Ok((d.segment, cpl))
    }

    /// A stack pointer of the 64-bit TSS.
    pub fn tss_stack_long(&mut self, offset: u64) -> Result<u64> {
        if offset + 7 > self.s.tr.limit.into() {
            return self.selector_fault(vector::TS, self.s.tr.selector);
        }
        let sp = self.read_system::<u64>(self.s.tr.base.wrapping_add(offset))?;
        if canonical(sp) { Ok(sp) } else { self.raise(Exception::SS0) }
    }

    /// SS and ESP for privilege `cpl` from the 32-bit or 16-bit TSS.
    pub fn tss_stack(&mut self, cpl: u8) -> Result<(u16, u64)> {
        let tr = self.s.tr;
        let wide = tr.kind() & 8 != 0;
        let (at, size) = if wide { (4 + 8 * u64::from(cpl), 8) } else { (2 + 4 * u64::from(cpl), 4) };
        if at + size - 1 > tr.limit.into() {
            return self.selector_fault(vector::TS, tr.selector);
        }
        let base = tr.base.wrapping_add(at);
        if wide {
            let sp = self.read_system::<u32>(base)?;
            Ok((self.read_system::<u16>(base.wrapping_add(4))?, sp.into()))
        } else {
            let sp = self.read_system::<u16>(base)?;
            Ok((self.read_system::<u16>(base.wrapping_add(2))?, sp.into()))
        }
    }

    fn new_stack(&self, ss: Segment, sp: u64, cpl: u8, size: u64) -> Stack {
        let mask = if self.long() && !ss.usable() {
            u64::MAX
        } else if ss.has(attr::DB) {
            0xffff_ffff
        } else {
            0xffff
        };
        Stack { base: ss.base, sp, mask, size, limit: ss, cpl }
    }

    /// Pushes on a stack that is not yet the current one, with the rights of its privilege level.
    fn stack_push(&mut self, stack: &mut Stack, value: u64) -> Result<()> {
        let sp = stack.sp.wrapping_sub(stack.size) & stack.mask;
        if stack.mask != u64::MAX {
            let s = &stack.limit;
            let last = sp + stack.size - 1;
            let inside = if s.has(attr::DC) {
                sp > s.limit.into() && last <= stack.mask
            } else {
                last <= s.limit.into()
            };
            if !inside {
                return self.raise(Exception::with_code(vector::SS, 0));
            }
        }
        let linear = stack.base.wrapping_add(sp);
        let (cpl, rip) = (self.cpl, self.bits);
        // Pushes are made with the new privilege.
        self.cpl = stack.cpl;
        self.bits = if stack.mask == u64::MAX { 64 } else { rip };
        self.rights_changed();
        let linear = if self.long() { linear } else { linear & 0xffff_ffff };
        let result = match stack.size {
            8 => self.write(linear, index::SS as u8, value),
            4 => self.write(linear, index::SS as u8, value as u32),
            _ => self.write(linear, index::SS as u8, value as u16),
        };
        self.cpl = cpl;
        self.bits = rip;
        self.rights_changed();
        result?;
        stack.sp = stack.sp & !stack.mask | sp;
        Ok(())
    }

    /// Pushes `frame` on a stack that is not yet the current one; the stack pointer after it.
    pub fn push_frame(&mut self, ss: Segment, sp: u64, cpl: u8, size: u64, frame: &[u64]) -> Result<u64> {
        let mut stack = self.new_stack(ss, sp, cpl, size);
        for &word in frame {
            self.stack_push(&mut stack, word)?;
        }
        Ok(stack.sp)
    }

    fn deliver_protected(
        &mut self,
        gate: &Gate,
        source: Source,
        code: Option<u32>,
        rf: u64,
        external: u32,
    ) -> Result<()> {
        let (gate, k) = (gate.low, gate.kind);
        let selector = (gate >> 16) as u16;
        if k == kind::TASK_GATE {
            return self.deliver_to_task(selector, source, code, rf);
        }
        let wide = k & 8 != 0;
        let target = if wide { gate & 0xffff | gate >> 32 & 0xffff_0000 } else { gate & 0xffff };
        let (cs, cpl) = self.gate_code_segment(selector, external, false)?;
        let from_v8086 = self.v8086();
        if from_v8086 && cpl != 0 {
            return self.raise(Exception::with_code(vector::GP, u32::from(selector & !3) | external));
        }
        if target > cs.limit.into() {
            return self.raise(Exception::with_code(vector::GP, external));
        }
        let old = self.s.segments;
        let size = if wide { 4 } else { 2 };
        let old_sp = self.r[x86::gpr::RSP];
        let inward = cpl < self.cpl;
        let (ss, sp) = if inward {
            let (selector, sp) = self.tss_stack(cpl)?;
            let ss = match self.stack_segment(selector, cpl, vector::TS) {
                Ok(ss) => ss,
                Err(e) => {
                    self.meets_delivery(external);
                    return Err(e);
                }
            };
            (ss, sp)
        } else {
            (old[index::SS], old_sp)
        };
        let mut stack = self.new_stack(ss, sp, cpl, size);
        let flags = self.get_flags() | rf;
        let mut frame: Vec<u64> = Vec::with_capacity(10);
        if from_v8086 {
            frame.extend([index::GS, index::FS, index::DS, index::ES].map(|n| u64::from(old[n].selector)));
        }
        if inward {
            frame.extend([old[index::SS].selector.into(), old_sp]);
        }
        frame.extend([flags, old[index::CS].selector.into(), self.rip]);
        frame.extend(code.map(u64::from));
        for word in frame {
            self.stack_push(&mut stack, word)?;
        }
        if inward {
            self.set_segment(index::SS, ss);
            self.r[x86::gpr::RSP] = stack.sp;
        } else {
            self.set_stack(stack.sp);
        }
        self.gate_flags(k & 1 == 0);
        if from_v8086 {
            for n in [index::ES, index::DS, index::FS, index::GS] {
                self.set_segment(n, Segment::default());
            }
        }
        self.set_segment(index::CS, Segment { selector: selector & !3 | u16::from(cpl), ..cs });
        self.set_cpl(cpl);
        self.rip = target;
        Ok(())
    }

    fn deliver_to_task(&mut self, selector: u16, source: Source, code: Option<u32>, rf: u64) -> Result<()> {
        if source == Source::Software {
            return self.switch_by_instruction(selector, Why::Interrupt);
        }
        self.rflags |= rf;
        let result = self.task_switch(selector, Why::Interrupt, code).and_then(|begun| begun);
        if result.is_err() {
            self.meets_delivery(1);
        }
        result
    }

    /// Notes in the exception that an event's delivery has met whether that event was external to the program.
    fn meets_delivery(&mut self, external: u32) {
        // Bit 0 of a page fault's code is something else.
        if self.exception.vector != vector::PF {
            self.exception.error_code = self.exception.error_code.map(|c| c | external);
        }
    }

    /// Flags that POPF and IRET may change at the current privilege.
    pub fn changeable_flags(&self, size: u64) -> u64 {
        let mut mask = flags::STATUS | flags::TF | flags::DF | flags::NT;
        if size > 2 {
            mask |= flags::AC | flags::ID | flags::RF;
        }
        if self.cpl == 0 {
            mask |= flags::IOPL;
        }
        if self.cpl <= self.iopl() {
            mask |= flags::IF;
        }
        mask
    }
}

/// INT n, INT3, INTO, INT1; the vector is in `imm`.
pub fn int(c: &mut Core, op: &Op) -> Result<Flow> {
    let v = op.imm as u8;
    if c.v8086() && c.iopl() < 3 && op.size == 0 {
        return c.gp();
    }
    let start = c.rip;
    c.rip = c.next_rip(op);
    match c.deliver(v, Source::Software, None) {
        Ok(()) => Ok(Flow::Jump),
        Err(e) => {
            c.rip = start;
            Err(e)
        }
    }
}

/// INTO.
pub fn into(c: &mut Core, op: &Op) -> Result<Flow> {
    if c.lazy.of() { int(c, op) } else { Ok(Flow::Next) }
}

/// INT1: a #DB without DR6 bits, that checks no gate's DPL.
pub fn int1(c: &mut Core, op: &Op) -> Result<Flow> {
    let start = c.rip;
    c.rip = c.next_rip(op);
    match c.deliver(vector::DB, Source::Exception, None) {
        Ok(()) => Ok(Flow::Jump),
        Err(e) => {
            c.rip = start;
            Err(e)
        }
    }
}

/// IRET.
pub fn iret<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    if !c.protected() {
        return iret_real::<T>(c);
    }
    if c.rflags & flags::NT != 0 {
        if c.long() {
            return c.gp();
        }
        c.rip = c.next_rip(op);
        let link = c.read_system::<u16>(c.s.tr.base)?;
        c.switch_by_instruction(link, Why::Return)?;
        return Ok(Flow::Jump);
    }
    let rip = c.stack_read::<T>(0)?.u();
    let cs = c.stack_read::<T>(T::SIZE)?.u() as u16;
    let new_flags = c.stack_read::<T>(2 * T::SIZE)?.u();
    if new_flags & flags::VM != 0 && c.cpl == 0 && !c.long() && T::SIZE == 4 {
        return iret_v8086(c, rip, cs, new_flags);
    }
    iret_protected::<T>(c, rip, cs, new_flags)
}

fn iret_real<T: Word>(c: &mut Core) -> Result<Flow> {
    if c.v8086() && c.iopl() < 3 {
        return c.gp();
    }
    let rip = c.stack_read::<T>(0)?.u();
    let cs = c.stack_read::<T>(T::SIZE)?.u() as u16;
    let new_flags = c.stack_read::<T>(2 * T::SIZE)?.u();
    if rip > c.s.segments[index::CS].limit.into() {
        return c.gp();
    }
    c.set_stack(c.stack_at(3 * T::SIZE));
    let mask = c.changeable_flags(T::SIZE) & if c.v8086() { !flags::IOPL } else { u64::MAX };
    let segment = if c.v8086() {
        v8086(cs)
    } else {
        Segment { selector: cs, base: u64::from(cs) << 4, ..c.s.segments[index::CS] }
    };
    c.set_segment(index::CS, segment);
    let old = c.get_flags();
    c.set_flags(old & !mask | new_flags & mask);
    c.rip = rip;
    c.nmi_done();
    Ok(Flow::Jump)
}

fn iret_v8086(c: &mut Core, rip: u64, cs: u16, new_flags: u64) -> Result<Flow> {
    let sp = c.stack_read::<u32>(12)?;
    let mut selectors = [0; 5];
    for (i, s) in selectors.iter_mut().enumerate() {
        *s = c.stack_read::<u32>(16 + 4 * i as u64)? as u16;
    }
    c.set_flags(new_flags);
    for (n, s) in [index::SS, index::ES, index::DS, index::FS, index::GS].into_iter().zip(selectors) {
        c.set_segment(n, v8086(s));
    }
    c.set_segment(index::CS, v8086(cs));
    c.r[x86::gpr::RSP] = sp.into();
    c.rip = rip & 0xffff;
    c.set_cpl(3);
    c.nmi_done();
    Ok(Flow::Jump)
}

fn iret_protected<T: Word>(c: &mut Core, rip: u64, cs: u16, new_flags: u64) -> Result<Flow> {
    let rpl = (cs & 3) as u8;
    let (segment, new_cpl) = c.return_code_segment(cs)?;
    let outward = rpl > c.cpl;
    let to64 = c.long() && segment.has(attr::L);
    let pops_stack = outward || c.bits == 64;
    let mut stack = None;
    if pops_stack {
        let sp = c.stack_read::<T>(3 * T::SIZE)?.u();
        let selector = c.stack_read::<T>(4 * T::SIZE)?.u() as u16;
        // A null SS is fine for 64-bit code below privilege 3.
        let null = selector & !3 == 0 && to64 && new_cpl != 3 && (selector & 3) as u8 == new_cpl;
        let ss = if null { null_stack(selector, new_cpl) } else { c.return_stack(selector, new_cpl)? };
        stack = Some((ss, sp));
    }
    let inside = if to64 { canonical(rip) } else { rip <= segment.limit.into() };
    if !inside {
        return c.gp();
    }
    let mask = c.changeable_flags(T::SIZE);
    let flags = c.get_flags() & !mask | new_flags & mask;
    let (old_mask, after) = (c.stack_mask, c.stack_at(3 * T::SIZE));
    c.set_segment(index::CS, segment);
    c.set_cpl(new_cpl);
    match stack {
        Some((ss, sp)) => {
            c.set_segment(index::SS, ss);
            c.return_sp(sp);
        }
        None => c.r[x86::gpr::RSP] = c.r[x86::gpr::RSP] & !old_mask | after,
    }
    c.set_flags(flags);
    if outward {
        c.drop_privileged_segments();
    }
    c.rip = rip;
    c.nmi_done();
    Ok(Flow::Jump)
}

impl Core {
    /// IRET ends the blocking of NMIs.
    pub fn nmi_done(&mut self) {
        if std::mem::take(&mut self.s.events.nmi_blocked) && self.s.events.nmi_pending {
            self.attend(attention::EVENT, true);
        }
    }

    /// Checks the code segment that a far return or IRET goes to; and the privilege level there.
    pub fn return_code_segment(&mut self, selector: u16) -> Result<(Segment, u8)> {
        if selector & !3 == 0 {
            return self.gp();
        }
        let rpl = (selector & 3) as u8;
        let mut d = self.descriptor(selector, vector::GP)?;
        let s = d.segment;
        let dpl_ok = if s.has(attr::DC) { s.dpl() <= rpl } else { s.dpl() == rpl };
        let both = self.long() && s.has(attr::L | attr::DB);
        if !s.has(attr::S | attr::CODE) || rpl < self.cpl || !dpl_ok || both {
            return self.selector_fault(vector::GP, selector);
        }
        if !s.has(attr::P) {
            return self.selector_fault(vector::NP, selector);
        }
        self.set_accessed(&mut d)?;
        Ok((d.segment, rpl))
    }

    /// Checks the stack segment that a return gives back.
    pub fn return_stack(&mut self, selector: u16, cpl: u8) -> Result<Segment> {
        if selector & !3 == 0 {
            return self.gp();
        }
        let bits = std::mem::replace(&mut self.bits, 32);
        let result = self.stack_segment(selector, cpl, vector::GP);
        self.bits = bits;
        result
    }

    /// Sets the stack pointer that a return to an outer level pops.
    pub fn return_sp(&mut self, sp: u64) {
        let rsp = &mut self.r[x86::gpr::RSP];
        *rsp = match self.stack_mask {
            u64::MAX => sp,
            0xffff_ffff => sp & 0xffff_ffff,
            mask => *rsp & !mask | sp & mask,
        };
    }
}
