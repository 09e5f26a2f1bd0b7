//! What branches, calls and returns become.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind};

use crate::asm::{Mem, based, cc, frame, reg};
use crate::block::{Builder, Cold, Kind};
use crate::decode::{self, is_near};
use crate::frame::at;

impl Builder<'_, '_> {
    /// Whether the instruction is a near branch, call or return of the mode's own size.
    pub fn is_control(&self, i: &Instruction) -> bool {
        let word = self.c.mode.word();
        if is_near(i) && i32::try_from(self.target(i) as i64).is_err() {
            return false;
        }
        match i.flow_control() {
            FlowControl::ConditionalBranch => {
                // LOOP and JCXZ count in a register of the address size; of the mode's own size only.
                i.is_jcc_short_or_near() && i.op0_kind() != OpKind::NearBranch16 || self.counts(i)
            }
            FlowControl::UnconditionalBranch => is_near(i) && i.op0_kind() != OpKind::NearBranch16,
            FlowControl::Call => {
                is_near(i) && i.op0_kind() != OpKind::NearBranch16 && i.stack_pointer_increment() == -word
            }
            FlowControl::IndirectBranch | FlowControl::IndirectCall => {
                let size = match i.op0_kind() {
                    OpKind::Register => i.op0_register().size() as i32,
                    OpKind::Memory => i.memory_size().size() as i32,
                    _ => 0,
                };
                matches!(i.mnemonic(), Mnemonic::Jmp | Mnemonic::Call)
                    && size == word
                    && !is_far(i)
                    && !self.segment_is_special(i)
                    && !self.address_is_special(i)
            }
            FlowControl::Return => {
                i.mnemonic() == Mnemonic::Ret
                    && matches!(
                        (i.code(), word),
                        (iced_x86::Code::Retnq | iced_x86::Code::Retnq_imm16, 8)
                            | (iced_x86::Code::Retnd | iced_x86::Code::Retnd_imm16, 4)
                    )
            }
            _ => false,
        }
    }

    /// Whether it is LOOP, LOOPE, LOOPNE or JCXZ with a counter of the mode's size.
    fn counts(&self, i: &Instruction) -> bool {
        use Mnemonic as M;
        if !is_near(i) || i.op0_kind() == OpKind::NearBranch16 {
            return false;
        }
        match i.mnemonic() {
            M::Jrcxz => true,
            M::Jecxz => !self.c.mode.wide(),
            M::Loop | M::Loope | M::Loopne => {
                use iced_x86::Code as C;
                let wide =
                    matches!(i.code(), C::Loop_rel8_64_RCX | C::Loope_rel8_64_RCX | C::Loopne_rel8_64_RCX);
                let narrow =
                    matches!(i.code(), C::Loop_rel8_32_ECX | C::Loope_rel8_32_ECX | C::Loopne_rel8_32_ECX);
                if self.c.mode.wide() { wide } else { narrow }
            }
            _ => false,
        }
    }

    /// Rewrites a branch. Tells whether execution can go on behind it.
    pub fn control(&mut self, i: &Instruction) -> bool {
        match i.flow_control() {
            FlowControl::ConditionalBranch => {
                match decode::condition(i).filter(|_| !self.counts(i)) {
                    Some(condition) => self.branch(i, condition),
                    None => self.count(i),
                }
                return true;
            }
            FlowControl::UnconditionalBranch => {
                let target = self.target(i);
                self.edge(target, target <= i.ip());
            }
            FlowControl::Call => {
                self.push_return(i);
                let target = self.target(i);
                // A call into the same page is linked; recursion is a loop, so it is polled.
                self.edge(target, target <= i.ip());
            }
            FlowControl::IndirectBranch => {
                self.flags_to_memory();
                self.load_operand(i);
                self.jump_anywhere(0);
            }
            FlowControl::IndirectCall => {
                self.flags_to_memory();
                self.load_operand(i);
                // A call that faults pushes nothing.
                self.check_canonical(0);
                self.a.store(frame(at::TARGET), reg::T);
                self.push_return(i);
                self.a.load(reg::T, frame(at::TARGET));
                self.jump(self.c.mode.word());
            }
            _ => {
                self.flags_to_memory();
                self.pop_to_t();
                let more = if i.op_count() > 0 { i32::from(i.immediate16()) } else { 0 };
                self.move_stack(self.c.mode.word() + more);
                self.jump_anywhere(-self.c.mode.word() - more);
            }
        }
        false
    }

    /// Pushes the address of the next instruction.
    fn push_return(&mut self, i: &Instruction) {
        let to = self.push_place();
        let (to, r) = self.temporary(to);
        self.a.load(r, frame(at::PAGE));
        self.a.lea(self.c.mode.wide(), r, based(r, i.next_ip() as i32));
        self.store_word(to, r);
        self.move_stack(-self.c.mode.word());
    }

    /// Jcc.
    fn branch(&mut self, i: &Instruction, condition: u8) {
        let target = self.target(i);
        let back = target <= i.ip();
        self.flags_to_host();
        if self.is_elsewhere(target) {
            // The flags are saved where the branch is taken, which it may never be.
            let from = self.a.jump_if(condition);
            let (delta, guest, flags) = (target as i32, self.guest, self.flags);
            self.cold.push(Cold::Jump { from, delta, guest, flags });
            return;
        }
        if self.live_at(target) != 0 && !back {
            self.flags_to_memory();
        }
        if back {
            let over = self.a.jump_if(condition ^ 1);
            let kept = self.flags;
            self.edge(target, true);
            self.flags = kept;
            self.a.bind(over);
        } else {
            let from = self.a.jump_if(condition);
            self.link(from, target as u16);
        }
    }

    /// Whether a target is not in this page whole, so that it is looked up.
    fn is_elsewhere(&mut self, target: u64) -> bool {
        target >= 0x1000 || self.c.alone || self.page.one(target).is_none()
    }

    /// LOOP, LOOPE, LOOPNE, JCXZ: the host's own, over a jump.
    fn count(&mut self, i: &Instruction) {
        let target = self.target(i);
        let live = if self.is_elsewhere(target) { decode::STATUS } else { self.live_at(target) };
        if decode::reads(i) != 0 {
            self.flags_to_host();
        }
        if live != 0 {
            self.flags_to_memory();
        }
        let opcode = match i.mnemonic() {
            Mnemonic::Loopne => 0xe0,
            Mnemonic::Loope => 0xe1,
            Mnemonic::Loop => 0xe2,
            _ => 0xe3,
        };
        if !self.c.mode.wide() {
            self.a.raw(&[0x67]);
        }
        // Taken: over the jump that leads on.
        self.a.raw(&[opcode, 5]);
        let on = self.a.jump();
        let kept = self.flags;
        self.edge(target, target <= i.ip());
        self.flags = kept;
        self.a.bind(on);
    }

    /// Goes on at `target`, from the start of the page; `poll` if that could close a loop.
    pub fn edge(&mut self, target: u64, poll: bool) {
        if self.is_elsewhere(target) {
            self.flags_to_memory();
            return self.jump_by(target as i32);
        }
        let target = target as u16;
        if self.live_at(target.into()) != 0 {
            self.flags_to_memory();
        }
        if poll {
            self.a.cmp_imm(frame(at::POLL), 0);
            let rung = self.a.jump_if(cc::NZ);
            let site = self.site(Kind::Poll, target, 0);
            self.cold.push(Cold::Leave { from: rung, site });
        }
        let from = self.a.jump();
        self.link(from, target);
    }

    /// Lets a branch lead to a block of this page, now or when there is one.
    fn link(&mut self, from: crate::asm::Fixup, target: u16) {
        let own = target == self.start && self.c.mode == self.c.mode.linked();
        let known = if self.c.unlinked {
            None
        } else if own {
            Some(self.a.base)
        } else {
            (self.c.find)(target)
        };
        match known {
            Some(host) => self.a.point(from, host),
            None => {
                let site = self.site(Kind::Link, target, self.a.base + from.0 as u64);
                self.cold.push(Cold::Leave { from, site });
            }
        }
    }

    /// Goes on in another page, `delta` from the start of this one.
    pub fn jump_by(&mut self, delta: i32) {
        self.a.load(reg::T, frame(at::PAGE));
        self.a.lea(self.c.mode.wide(), reg::T, based(reg::T, delta));
        self.jump(0);
    }

    /// Goes on at the linear address in RDI, which the guest chose. One that is not canonical must not get to the table of
    /// jumps: with the salt added it could be what another address has with another salt.
    fn jump_anywhere(&mut self, undo: i32) {
        self.check_canonical(undo);
        self.jump(undo);
    }

    /// Leaves if the linear address in RDI is not canonical. The flags are in memory.
    fn check_canonical(&mut self, undo: i32) {
        if self.c.mode.wide() {
            self.owner = None;
            self.flags_lost();
            self.a.load(reg::U, frame(at::HALF));
            self.a.add64(reg::U, reg::T);
            self.a.raw(&[0x48, 0xc1, 0xee, 48]); // SHR RSI, 48
            let from = self.a.jump_if(cc::NZ);
            let site = self.site(Kind::Wild { undo }, self.guest, 0);
            self.cold.push(Cold::Leave { from, site });
        }
    }

    /// Goes on at the linear address in RDI, which is canonical or directly behind such. The flags are in memory.
    fn jump(&mut self, undo: i32) {
        let entry =
            |field: i32| Mem { base: Some(reg::RSP), index: Some((reg::U, 3)), disp: at::JUMPS + field };
        self.a.add(reg::T, frame(at::SALT));
        self.a.zero_extend16(reg::U, reg::T);
        self.a.add32(reg::U, reg::U);
        self.a.cmp(reg::T, entry(0));
        let from = self.a.jump_if(cc::NZ);
        let site = self.site(Kind::Jump { undo }, self.guest, 0);
        self.cold.push(Cold::Leave { from, site });
        self.a.rm(true, &[0x2b], reg::T, frame(at::OWN_SALT)); // SUB
        self.a.raw(&[0x48, 0x81, 0xe7, 0x00, 0xf0, 0xff, 0xff]); // AND RDI, -4096
        self.a.store(frame(at::PAGE), reg::T);
        self.a.jump_mem(entry(8));
    }
}

/// Whether an indirect branch goes through a far pointer.
pub fn is_far(i: &Instruction) -> bool {
    use iced_x86::Code as C;
    matches!(
        i.code(),
        C::Jmp_m1616 | C::Jmp_m1632 | C::Jmp_m1664 | C::Call_m1616 | C::Call_m1632 | C::Call_m1664
    )
}
