//! Instructions of operating systems that are too frequent to leave to the reference engine: interrupts on and off, the
//! flags, SWAPGS, selectors, and the override of SMAP. At privilege level 0 they change the frame; else they are left to it after all.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::asm::{cc, frame, reg};
use crate::block::{Builder, Cold, Kind, Mode};
use crate::frame::at;
use crate::seats::number;

const IF: u32 = 1 << 9;
const AC: u32 = 1 << 18;
const STATUS: u32 = 0x8d5;

/// The number of the segment register that a MOV reads.
fn selector(i: &Instruction) -> Option<i32> {
    let from = i.op1_register();
    (i.op1_kind() == OpKind::Register && from.is_segment_register()).then(|| from.number() as i32)
}

impl Builder<'_, '_> {
    /// Whether the instruction is one of these.
    pub fn is_system(&self, i: &Instruction) -> bool {
        match i.mnemonic() {
            Mnemonic::Cli | Mnemonic::Sti => true,
            Mnemonic::Cld => self.c.mode.0 & Mode::DF == 0,
            Mnemonic::Mov => {
                selector(i).is_some() && i.op0_kind() == OpKind::Register && i.op0_register().size() >= 4
            }
            Mnemonic::Pushfq | Mnemonic::Pushfd => i.stack_pointer_increment() == -self.c.mode.word(),
            Mnemonic::Swapgs => self.c.mode.wide(),
            Mnemonic::Stac | Mnemonic::Clac => self.c.host.fsgsbase,
            _ => false,
        }
    }

    /// Rewrites it.
    pub fn system(&mut self, i: &Instruction) {
        match i.mnemonic() {
            Mnemonic::Pushfq | Mnemonic::Pushfd => return self.push_flags(),
            // DF is clear in this mode.
            Mnemonic::Cld => return,
            Mnemonic::Mov => {
                self.a.load(reg::T, frame(at::SELECTORS + 8 * selector(i).unwrap_or(0)));
                return self.assign(number(i.op0_register()), reg::T);
            }
            _ => {}
        }
        self.release_flags();
        self.a.cmp_imm(frame(at::SYSTEM), 0);
        let mut otherwise = vec![self.a.jump_if(cc::Z)];
        match i.mnemonic() {
            Mnemonic::Cli => self.a.and_mem(frame(at::RFLAGS), !IF),
            Mnemonic::Sti => {
                // An interrupt that waits is taken after the next instruction.
                self.a.cmp_imm64(frame(at::POLL), 0);
                otherwise.push(self.a.jump_if(cc::NZ));
                self.a.or_mem(frame(at::RFLAGS), IF);
            }
            Mnemonic::Swapgs => {
                self.a.load(reg::T, frame(at::GS));
                self.a.load(reg::U, frame(at::KERNEL_GS));
                self.a.store(frame(at::GS), reg::U);
                self.a.store(frame(at::KERNEL_GS), reg::T);
            }
            Mnemonic::Stac => {
                self.a.or_mem(frame(at::RFLAGS), AC);
                self.use_table(at::TABLE_AC);
            }
            _ => {
                self.a.and_mem(frame(at::RFLAGS), !AC);
                self.use_table(at::TABLE);
            }
        }
        self.flags_lost();
        // It is lost when the reference engine executes the instruction after all.
        self.owner = None;
        let op = self.op(i);
        let here = self.a.address();
        let site = self.site(Kind::Helper { op }, i.ip() as u16, here);
        self.cold.extend(otherwise.into_iter().map(|from| Cold::Leave { from, site }));
    }

    fn use_table(&mut self, field: i32) {
        self.a.load(reg::T, frame(field));
        self.a.raw(&[0xf3, 0x48, 0x0f, 0xae, 0xdf]); // WRGSBASE RDI
    }

    /// PUSHF of the mode's own size, which no privilege level changes.
    fn push_flags(&mut self) {
        self.flags_to_host();
        self.flags_to_memory();
        self.a.raw(&[0x9c, 0x5f]); // PUSHFQ; POP RDI
        self.a.and_imm32(reg::T, STATUS);
        self.a.rm(false, &[0x0b], reg::T, frame(at::RFLAGS)); // OR
        self.flags_lost();
        self.a.store(frame(at::SCRATCH2), reg::T);
        self.push_scratch();
    }
}
