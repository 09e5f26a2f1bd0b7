//! Random instructions with operands that lead somewhere.

use iced_x86::{
    Code, EncodingKind, FlowControl, Instruction, Mnemonic as M, OpCodeOperandKind as K, OpKind, Register,
};
use native::oracle;

use super::case::Case;
use super::layout::{DATA_AT, DATA_PAGES};
use super::program::{Fix, Program};
use crate::fuzz::{Random, suits};

/// Instruction codes by what they work on.
pub struct Catalog {
    integer: Vec<Code>,
    vector: Vec<Code>,
    other: Vec<Code>,
}

impl Catalog {
    /// All that a program in a mode may have anywhere.
    pub fn new(bits: u32) -> Self {
        let mode = if bits == 64 { oracle::Mode::Long } else { oracle::Mode::Compat32 };
        let mut all = Self { integer: Vec::new(), vector: Vec::new(), other: Vec::new() };
        for code in Code::values().filter(|&c| suits(c, mode)) {
            let mut i = Instruction::default();
            i.set_code(code);
            if i.flow_control() != FlowControl::Next || code.mnemonic() == M::Wait {
                continue;
            }
            // Several steps with exceptions each: what a step after one that faults does to MXCSR is the processor's affair.
            if matches!(code.mnemonic(), M::Dpps | M::Dppd | M::Vdpps | M::Vdppd) {
                continue;
            }
            let kinds = code.op_code().op_kinds();
            let is = |what: &[K]| kinds.iter().any(|k| what.contains(k));
            let vsib = is(&[K::mem_vsib32x, K::mem_vsib32y, K::mem_vsib64x, K::mem_vsib64y]);
            let vectors = is(&[
                K::xmm_reg,
                K::xmm_rm,
                K::xmm_or_mem,
                K::xmm_vvvv,
                K::ymm_reg,
                K::ymm_rm,
                K::ymm_or_mem,
                K::ymm_vvvv,
            ]);
            let mmx = is(&[K::mm_reg, K::mm_rm, K::mm_or_mem]);
            let x87 = format!("{code:?}").starts_with('F');
            if vsib || mmx || x87 {
                all.other.push(code);
            } else if vectors {
                all.vector.push(code);
            } else if code.encoding() == EncodingKind::VEX || code.encoding() == EncodingKind::Legacy {
                all.integer.push(code);
            }
        }
        all
    }

    /// Any.
    pub fn any(&self, random: &mut Random) -> Code {
        let list = match random.below(16) {
            0..10 => &self.integer,
            10..15 => &self.vector,
            _ => &self.other,
        };
        list[random.below(list.len() as u32) as usize]
    }
}

/// A linear address in the data pages, often near a page's end.
pub fn spot(case: &Case, random: &mut Random) -> u64 {
    let page = u64::from(random.below(DATA_PAGES as u32));
    let within = match random.below(6) {
        0 => 0xfc0 + u64::from(random.below(64)),
        1 => 0x1000 - (1 << random.below(6)),
        2 => u64::from(random.below(0x1000)),
        _ => u64::from(random.below(0x80)) * 32,
    };
    case.offset() + DATA_AT + 0x1000 * page + within
}

/// Appends a random instruction, and what it needs before it. `spare` are registers that it does not write.
pub fn random(p: &mut Program, case: &Case, catalog: &Catalog, spare: u16, random: &mut Random) {
    for _ in 0..8 {
        let code = catalog.any(random);
        if let Some(i) = (Filler { p, case, bits: case.mode.bits(), random, spare }).fill(code)
            && p.writes(&i) & spare == 0
            && p.push(i, Fix::None)
        {
            if i.rflags_undefined() != 0 && random.below(8) < 5 {
                define_flags(p, spare, random);
            }
            return;
        }
    }
}

/// Appends an instruction that defines all status flags.
fn define_flags(p: &mut Program, spare: u16, random: &mut Random) {
    let n = random.below(8);
    let codes = [Code::Cmp_rm32_r32, Code::Add_rm32_r32, Code::Sub_rm8_r8, Code::Cmp_rm16_r16];
    let code = codes[if spare >> n & 1 != 0 { 0 } else { random.below(4) as usize }];
    let first = match code {
        Code::Sub_rm8_r8 => Register::AL,
        Code::Cmp_rm16_r16 => Register::AX,
        _ => Register::EAX,
    };
    let n = if code == Code::Sub_rm8_r8 { n & 3 } else { n };
    if spare >> n & 1 != 0 && code != Code::Cmp_rm32_r32 {
        return;
    }
    if let Ok(i) = Instruction::with2(code, first + n, first + random.below(4)) {
        p.push(i, Fix::None);
    }
}

/// Fills in operands.
struct Filler<'a> {
    p: &'a mut Program,
    case: &'a Case,
    bits: u32,
    random: &'a mut Random,
    spare: u16,
}

impl Filler<'_> {
    fn fill(&mut self, code: Code) -> Option<Instruction> {
        let mut i = Instruction::default();
        i.set_code(code);
        let kinds = code.op_code().op_kinds();
        let in_memory = self.random.below(5) < 3;
        for (n, &kind) in kinds.iter().enumerate() {
            self.operand(&mut i, n as u32, kind, in_memory)?;
        }
        self.strings(kinds);
        if i.op0_kind() == OpKind::Memory && code.op_code().can_use_lock_prefix() && self.random.one_in(3) {
            i.set_has_lock_prefix(true);
        }
        let by_register = matches!(code.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
            && i.op0_kind() == OpKind::Memory
            && i.op1_kind() == OpKind::Register;
        if by_register && self.random.below(8) != 0 {
            let n = i.op1_register().full_register().number();
            let used = [i.memory_base(), i.memory_index()].map(Register::full_register);
            if n != 4 && self.spare >> n & 1 == 0 && !used.contains(&i.op1_register().full_register()) {
                let value = u64::from(self.random.below(0x8000)).wrapping_sub(0x2000);
                self.p.set(n, value);
            }
        }
        if code.op_code().can_use_rep_prefix() && self.random.one_in(2) {
            if self.spare & 2 == 0 {
                let most = if self.random.one_in(4) { 200 } else { 9 };
                let count = u64::from(self.random.below(most));
                self.p.set(1, count);
            }
            if code.op_code().can_use_repne_prefix() && self.random.one_in(2) {
                i.set_has_repne_prefix(true);
            } else {
                i.set_has_rep_prefix(true);
            }
        }
        Some(i)
    }

    /// Where string instructions read and write.
    fn strings(&mut self, kinds: &[K]) {
        let uses = |k: &[K]| kinds.iter().any(|x| k.contains(x));
        for (n, used) in [(6, uses(&[K::seg_rSI])), (7, uses(&[K::es_rDI, K::seg_rDI]))] {
            if used && self.spare >> n & 1 == 0 && self.random.below(12) != 0 {
                let to = spot(self.case, self.random);
                self.p.set(n, to);
            }
        }
        if uses(&[K::seg_rBX_al]) && self.spare & 8 == 0 {
            let to = spot(self.case, self.random);
            self.p.set(3, to);
        }
    }

    fn operand(&mut self, i: &mut Instruction, n: u32, kind: K, in_memory: bool) -> Option<()> {
        let bits = self.bits;
        let count = if bits == 64 { 16 } else { 8 };
        let either = matches!(
            kind,
            K::r8_or_mem
                | K::r16_or_mem
                | K::r32_or_mem
                | K::r64_or_mem
                | K::xmm_or_mem
                | K::ymm_or_mem
                | K::mm_or_mem
                | K::r32_or_mem_mpx
                | K::r64_or_mem_mpx
        );
        if kind == K::mem || either && in_memory {
            return self.memory(i, n);
        }
        let width = usize::from(bits == 64);
        let (first, count) = match kind {
            K::r8_or_mem | K::r8_reg | K::r8_opcode => (Register::AL, if bits == 64 { 20 } else { 8 }),
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode => (Register::AX, count),
            K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => (Register::EAX, count),
            K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => (Register::RAX, count),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => (Register::XMM0, count),
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => (Register::YMM0, count),
            K::mm_or_mem | K::mm_reg | K::mm_rm => (Register::MM0, 8),
            K::st0 => (Register::ST0, 1),
            K::sti_opcode => (Register::ST0, 8),
            K::al => (Register::AL, 1),
            K::cl => (Register::CL, 1),
            K::ax => (Register::AX, 1),
            K::dx => (Register::DX, 1),
            K::eax => (Register::EAX, 1),
            K::rax => (Register::RAX, 1),
            _ => return self.immediate(i, n, kind, width),
        };
        i.set_op_kind(n, OpKind::Register);
        // RSP seldom, for everything hangs on it.
        let mut number = self.random.below(count);
        if first.is_gpr() && number == 4 && count > 8 && !self.random.one_in(4) {
            number = 10 + self.random.below(2);
        }
        i.set_op_register(n, first + number);
        Some(())
    }

    fn immediate(&mut self, i: &mut Instruction, n: u32, kind: K, width: usize) -> Option<()> {
        let random = &mut *self.random;
        let (op, value) = match kind {
            K::imm8 => {
                let second =
                    (0..n).any(|m| i.op_kind(m) == OpKind::Immediate8 || i.op_kind(m) == OpKind::Immediate16);
                if second {
                    i.set_op_kind(n, OpKind::Immediate8_2nd);
                    i.set_immediate8_2nd(random.bits() as u8 & 3);
                    return Some(());
                }
                (OpKind::Immediate8, random.bits() & 0xff)
            }
            K::imm8_const_1 => (OpKind::Immediate8, 1),
            K::imm8sex16 => (OpKind::Immediate8to16, random.bits() as i8 as u64),
            K::imm8sex32 => (OpKind::Immediate8to32, random.bits() as i8 as u64),
            K::imm8sex64 => (OpKind::Immediate8to64, random.bits() as i8 as u64),
            K::imm16 => {
                (OpKind::Immediate16, random.integer() & if random.one_in(2) { 0x1f } else { 0xffff })
            }
            K::imm32 => (OpKind::Immediate32, random.integer() & 0xffff_ffff),
            K::imm32sex64 => (OpKind::Immediate32to64, random.integer() as i32 as u64),
            K::imm64 => (OpKind::Immediate64, random.integer()),
            K::seg_rSI => ([OpKind::MemorySegESI, OpKind::MemorySegRSI][width], 0),
            K::es_rDI => ([OpKind::MemoryESEDI, OpKind::MemoryESRDI][width], 0),
            K::seg_rDI => ([OpKind::MemorySegEDI, OpKind::MemorySegRDI][width], 0),
            K::seg_rBX_al => {
                i.set_op_kind(n, OpKind::Memory);
                i.set_memory_base([Register::EBX, Register::RBX][width]);
                i.set_memory_index(Register::AL);
                return Some(());
            }
            K::mem_offs => {
                i.set_op_kind(n, OpKind::Memory);
                i.set_memory_displacement64(spot(self.case, random));
                i.set_memory_displ_size(if width == 1 { 8 } else { 4 });
                return Some(());
            }
            _ => return None,
        };
        i.set_op_kind(n, op);
        match op {
            OpKind::Immediate8 => i.set_immediate8(value as u8),
            OpKind::Immediate8to16 => i.set_immediate8to16(value as i16),
            OpKind::Immediate8to32 => i.set_immediate8to32(value as i32),
            OpKind::Immediate8to64 => i.set_immediate8to64(value as i64),
            OpKind::Immediate16 => i.set_immediate16(value as u16),
            OpKind::Immediate32 => i.set_immediate32(value as u32),
            OpKind::Immediate32to64 => i.set_immediate32to64(value as i64),
            OpKind::Immediate64 => i.set_immediate64(value),
            _ => {}
        }
        Some(())
    }

    /// An operand in memory: most lie in the data pages.
    fn memory(&mut self, i: &mut Instruction, n: u32) -> Option<()> {
        let long = self.bits == 64;
        i.set_op_kind(n, OpKind::Memory);
        let mut target = spot(self.case, self.random);
        if self.random.one_in(12) {
            let segment = self.random.below(2) as usize;
            i.set_segment_prefix([Register::FS, Register::GS][segment]);
            target = target.wrapping_sub(self.case.bases[segment]);
        } else if self.random.one_in(40) {
            let first = [Register::ES, Register::CS, Register::SS, Register::DS];
            i.set_segment_prefix(first[self.random.below(4) as usize]);
        }
        let near = |to: u64| i32::try_from(to as i64).is_ok() || !long;
        match self.random.below(12) {
            0 | 1 if long && i.segment_prefix() == Register::None => {
                i.set_memory_base(Register::RIP);
                i.set_memory_displacement64(target);
                i.set_memory_displ_size(8);
                return Some(());
            }
            2 if near(target) => {
                i.set_memory_displacement64(if long { target } else { target & 0xffff_ffff });
                i.set_memory_displ_size(if long { 8 } else { 4 });
                return Some(());
            }
            _ => {}
        }
        let base = self.pointer(target)?;
        let narrow = long && !self.case.high && self.random.one_in(24);
        let first = if long && !narrow { Register::RAX } else { Register::EAX };
        let mut rest = target.wrapping_sub(self.p.known[base].unwrap_or(target));
        i.set_memory_base(first + base as u32);
        let index = self.random.below(if long { 16 } else { 8 }) as usize;
        if index != 4
            && self.random.one_in(3)
            && let Some(value) = self.p.known[index]
        {
            let scale = 1 << self.random.below(4);
            i.set_memory_index(first + index as u32);
            i.set_memory_index_scale(scale);
            rest = rest.wrapping_sub(value.wrapping_mul(scale.into()));
        }
        if !long || narrow {
            rest = rest as i32 as u64;
        }
        i32::try_from(rest as i64).ok()?;
        let small = i8::try_from(rest as i64).is_ok();
        let rest = if long { rest } else { rest & 0xffff_ffff };
        i.set_memory_displacement64(rest);
        let whole = if long && !narrow { 8 } else { 4 };
        i.set_memory_displ_size(if rest == 0 { u32::from(base == 5) } else { if small { 1 } else { whole } });
        Some(())
    }

    /// A register that leads to about `target`.
    fn pointer(&mut self, target: u64) -> Option<usize> {
        let count = if self.bits == 64 { 16 } else { 8 };
        if self.random.one_in(60) {
            return Some(self.random.below(count) as usize);
        }
        let near = |v: u64| {
            let by = target.wrapping_sub(v);
            self.bits == 32 || i32::try_from(by as i64).is_ok()
        };
        let start = self.random.below(count) as usize;
        let found = (0..count as usize)
            .map(|n| (start + n) % count as usize)
            .find(|&n| self.p.known[n].is_some_and(near));
        if let Some(n) = found.filter(|_| !self.random.one_in(6)) {
            return Some(n);
        }
        let n = self.random.below(count) as usize;
        if n == 4 || self.spare >> n & 1 != 0 {
            return found;
        }
        let by = self.random.bits() as i8 as u64;
        self.p.set(n, target.wrapping_add(by));
        Some(n)
    }
}
