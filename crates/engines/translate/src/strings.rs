//! String instructions that move forward (DF is part of the [`Mode`]): one element like any access; STOS and MOVS with REP
//! by the host's own, as long as they stay in one page. The rest is left to the reference engine.

use iced_x86::{Code, Instruction, MemoryOperand, Mnemonic, OpKind, Register};

use crate::asm::{Mem, cc, frame, reg};
use crate::block::{Builder, Cold, Kind, Mode};
use crate::frame::at;
use crate::seats::register;

const RAX: u8 = 0;
const RCX: u8 = 1;
const RSI: u8 = 6;
const RDI: u8 = 7;
/// Host registers that hold the guest's RSI and RDI.
const SOURCE: u8 = 11;
const TARGET: u8 = 15;

/// What a string instruction does with each element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum String {
    Load,
    Store,
    Scan,
    Move,
    Compare,
}

impl String {
    /// What it is, if it is one; and the size of its elements in bytes.
    pub fn of(i: &Instruction) -> Option<(Self, u32)> {
        use Mnemonic as M;
        let what = match i.mnemonic() {
            M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => Self::Load,
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => Self::Store,
            M::Scasb | M::Scasw | M::Scasd | M::Scasq => Self::Scan,
            M::Movsb | M::Movsw | M::Movsd | M::Movsq => Self::Move,
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => Self::Compare,
            _ => return None,
        };
        // MOVSD and CMPSD are SSE's, too.
        i.is_string_instruction().then_some((what, i.memory_size().size() as u32))
    }

    /// Whether each element is read at RSI, and whether each is at RDI.
    fn uses(self) -> (bool, bool) {
        (matches!(self, Self::Load | Self::Move | Self::Compare), self != Self::Load)
    }
}

fn repeats(i: &Instruction) -> bool {
    i.has_rep_prefix() || i.has_repne_prefix()
}

/// Registers that a host's REP STOS or REP MOVS had not brought up to date when it faulted: RDI, and for MOVS RSI, are as
/// they were before, RCX is not. Gives by how many bytes they are to be advanced, for each element that is done.
pub fn behind(i: &Instruction) -> Option<(&'static [u8], u64)> {
    match String::of(i) {
        Some((String::Store, size)) if repeats(i) => Some((&[RDI], size.into())),
        Some((String::Move, size)) if repeats(i) => Some((&[RDI, RSI], size.into())),
        _ => None,
    }
}

impl Builder<'_, '_> {
    /// Whether the instruction is a string instruction that is rewritten.
    pub fn is_string(&self, i: &Instruction) -> bool {
        let Some((what, _)) = String::of(i) else { return false };
        if self.c.mode.0 & Mode::DF != 0 || repeats(i) && self.c.unlinked {
            return false;
        }
        let wide = self.c.mode.wide();
        let plain = (0..i.op_count()).all(|n| match i.op_kind(n) {
            OpKind::Register => true,
            OpKind::MemorySegRSI => wide && !matches!(i.memory_segment(), Register::FS | Register::GS),
            OpKind::MemorySegESI => {
                !wide && !matches!(i.memory_segment(), Register::CS | Register::FS | Register::GS)
            }
            OpKind::MemoryESRDI => wide,
            OpKind::MemoryESEDI => !wide,
            _ => false,
        });
        plain && (!repeats(i) || matches!(what, String::Store | String::Move))
    }

    /// Rewrites it.
    pub fn string(&mut self, i: &Instruction) {
        let Some((what, size)) = String::of(i) else { return };
        if repeats(i) {
            return self.repeat(i, what, size);
        }
        match what {
            String::Load => self.plain(
                i,
                [Code::Mov_r8_rm8, Code::Mov_r16_rm16, Code::Mov_r32_rm32, Code::Mov_r64_rm64],
                RSI,
                size,
            ),
            String::Store => self.plain(
                i,
                [Code::Mov_rm8_r8, Code::Mov_rm16_r16, Code::Mov_rm32_r32, Code::Mov_rm64_r64],
                RDI,
                size,
            ),
            String::Scan => self.plain(
                i,
                [Code::Cmp_r8_rm8, Code::Cmp_r16_rm16, Code::Cmp_r32_rm32, Code::Cmp_r64_rm64],
                RDI,
                size,
            ),
            String::Move => {
                let to = self.source_kept(size, true);
                let (to, r) = self.temporary(to);
                self.a.load(r, frame(at::SCRATCH2));
                self.a.store_sized(size, to, r);
            }
            String::Compare => {
                let with = self.source_kept(size, false);
                let (with, r) = self.temporary(with);
                self.a.load(r, frame(at::SCRATCH2));
                self.a.cmp_sized(size, r, with);
                self.flags_written(i);
            }
        }
        let (source, target) = what.uses();
        for r in [source.then_some(SOURCE), target.then_some(TARGET)].into_iter().flatten() {
            self.a.lea(self.c.mode.wide(), r, crate::asm::based(r, size as i32));
        }
    }

    /// An instruction with RAX and the element at a register.
    fn plain(&mut self, i: &Instruction, codes: [Code; 4], at: u8, size: u32) {
        let code = codes[size.trailing_zeros() as usize & 3];
        let accumulator = register(RAX, size as usize);
        let memory = MemoryOperand::with_base(register(at, if self.c.mode.wide() { 8 } else { 4 }));
        let stores = matches!(code.mnemonic(), Mnemonic::Mov) && at == RDI;
        let made = if stores {
            Instruction::with2(code, memory, accumulator)
        } else {
            Instruction::with2(code, accumulator, memory)
        };
        // The codes and operands above fit each other.
        let Ok(mut made) = made else { return };
        made.set_ip(i.ip());
        made.set_len(i.len());
        self.copy(&made);
    }

    /// Takes the element at RSI to the frame's second scratch field. Gives the operand for the element at RDI, which is to be
    /// read or written.
    fn source_kept(&mut self, size: u32, write: bool) -> Mem {
        let from = self.access(size, false, None, |b| b.pointer(SOURCE));
        self.a.load_sized(size, reg::T, from);
        self.a.store(frame(at::SCRATCH2), reg::T);
        self.access(size, write, None, |b| b.pointer(TARGET))
    }

    /// The linear address in a host register to RDI.
    fn pointer(&mut self, from: u8) {
        if self.c.mode.wide() { self.a.mov(reg::T, from) } else { self.a.mov32(reg::T, from) }
    }

    /// STOS or MOVS with REP. Should it fault, then at the host's own instruction, and RSI and RDI are [`behind`].
    fn repeat(&mut self, i: &Instruction, what: String, size: u32) {
        let wide = self.c.mode.wide();
        self.release_flags();
        self.flags_lost();
        self.mark(true);
        self.owner = None;
        let retry = self.a.address();
        if !wide {
            self.a.mov32(RCX, RCX);
        }
        self.a.test(RCX);
        let done = self.a.jump_if(cc::Z);
        let mut slow = Vec::new();
        let (source, _) = what.uses();
        if source {
            self.run_in_page(SOURCE, size, false, retry, &mut slow);
            self.a.store(frame(at::SCRATCH), reg::U);
        }
        self.run_in_page(TARGET, size, true, retry, &mut slow);
        self.a.store(frame(at::SCRATCH2), RCX);
        self.a.mov(reg::T, reg::U);
        if source {
            self.a.load(reg::U, frame(at::SCRATCH));
        }
        self.a.rep(if source { 0xa4 } else { 0xaa }, size);
        self.a.load(reg::U, frame(at::SCRATCH2));
        let scale = size.trailing_zeros() as u8;
        for r in [source.then_some(SOURCE), Some(TARGET)].into_iter().flatten() {
            self.a.lea(wide, r, Mem { base: Some(r), index: Some((reg::U, scale)), disp: 0 });
        }
        self.a.bind(done);
        let op = self.op(i);
        let here = self.a.address();
        let site = self.site(Kind::Helper { op }, self.guest, here);
        self.cold.extend(slow.into_iter().map(|from| Cold::Leave { from, site }));
    }

    /// The host address of RCX elements at a host register's linear address to RSI; goes to `slow` if they do not lie in one
    /// page.
    fn run_in_page(&mut self, at: u8, size: u32, write: bool, retry: u64, slow: &mut Vec<crate::asm::Fixup>) {
        self.pointer(at);
        self.look_up();
        let missing = self.a.jump_if(cc::Z);
        let site = self.site(Kind::Access { size: size as u8, write, align: 0 }, self.guest, retry);
        self.cold.push(Cold::Leave { from: missing, site });
        self.a.add64(reg::U, reg::T);
        self.a.and_imm32(reg::T, 0xfff);
        self.a.cmp64_imm32(RCX, 0x1000);
        slow.push(self.a.jump_if(cc::A));
        let end = Mem { base: Some(reg::T), index: Some((RCX, size.trailing_zeros() as u8)), disp: 0 };
        self.a.lea(true, reg::T, end);
        self.a.cmp_imm32(reg::T, 0x1000);
        slow.push(self.a.jump_if(cc::A));
    }
}
