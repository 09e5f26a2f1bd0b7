//! Forms of instructions, and random cases of them.

use iced_x86::{
    Code, CpuidFeature as F, Encoder, EncodingKind, Instruction, Mnemonic as M, OpCodeOperandKind as K,
    OpKind, Register,
};
use native::oracle::{CODE, Case, CpuImage, DATA, DATA_SIZE, Mode, READ_ONLY, WINDOW};

use super::Random;

/// An instruction code in a mode, with the operand that may be either in a register or in memory.
#[derive(Clone, Debug)]
pub struct Form {
    code: Code,
    mode: Mode,
    memory: bool,
}

/// Offset of the window in the data pages: around their middle, so that operands cross a page at times.
pub const AT: usize = 0x1000 - WINDOW / 2;

/// All forms.
pub fn forms() -> Vec<Form> {
    let mut all = Vec::new();
    for mode in [Mode::Long, Mode::Compat32, Mode::Protected16] {
        for code in Code::values().filter(|c| suits(*c, mode)) {
            let kinds = code.op_code().op_kinds();
            let either = kinds.iter().any(|k| is_either(*k));
            let memory = kinds.iter().any(|k| is_memory(*k));
            if either || !memory {
                all.push(Form { code, mode, memory: false });
            }
            if either || memory {
                all.push(Form { code, mode, memory: true });
            }
        }
    }
    all
}

/// Whether an instruction can be compared: user-mode, with a result that depends on nothing but its operands.
pub(crate) fn suits(code: Code, mode: Mode) -> bool {
    let info = code.op_code();
    let in_mode = match mode {
        Mode::Long => info.mode64() && info.long_mode(),
        Mode::Compat32 => info.mode32() && info.compatibility_mode(),
        Mode::Protected16 => info.mode16() && info.compatibility_mode(),
    };
    let encoding = matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
    if !in_mode
        || !encoding
        || !info.is_instruction()
        || info.encoding() == EncodingKind::D3NOW
        || !info.cpl3()
    {
        return false;
    }
    let left_out = matches!(
        code.mnemonic(),
        // The system's business.
        M::Syscall | M::Sysenter | M::Sysexit | M::Sysret | M::Int | M::Int1 | M::In | M::Out | M::Insb | M::Insw | M::Insd
            | M::Outsb | M::Outsw | M::Outsd | M::Cli | M::Sti | M::Iret | M::Iretd | M::Iretq | M::Vmcall | M::Vmmcall
            | M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Lar | M::Lsl | M::Verr | M::Verw | M::Arpl
            | M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss | M::Retf | M::Hlt
            // Other segments, and what depends on the host.
            | M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase | M::Cpuid | M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdrand
            | M::Rdseed | M::Rdpmc | M::Xgetbv | M::Xsave | M::Xsave64 | M::Xsavec | M::Xsavec64 | M::Xsaveopt
            | M::Xsaveopt64 | M::Xrstor | M::Xrstor64 | M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 | M::Xbegin
            | M::Xend | M::Xabort | M::Xtest | M::Umonitor | M::Umwait | M::Tpause | M::Enqcmd | M::Ud0
            // Their environment holds pointers and opcodes, which processors differ in.
            | M::Fnstenv | M::Fnsave | M::Fldenv | M::Frstor | M::Fnstdw | M::Fnstsg | M::Fstdw | M::Fstsg | M::Frstpm
            | M::Fnsetpm | M::Fsetpm
            // FWAIT and an instruction, to assemblers; pops of TF, to the oracle a trap.
            | M::Finit | M::Fclex | M::Fdisi | M::Feni | M::Fsave | M::Fstcw | M::Fstenv | M::Fstsw
            | M::Popf | M::Popfd | M::Popfq
            // An alias that no assembler makes.
            | M::Fstpnce
            // Undefined here and there by design.
            | M::Ud1 | M::Ud2 | M::Jmpe | M::Montmul | M::Loadall | M::Reservednop | M::Clzero
    );
    // Far branches meet the descriptors of the system; the oracle has no upper half of ESP in 16-bit code.
    let far = matches!(
        code,
        Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
            | Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
    );
    let esp =
        mode == Mode::Protected16 && matches!(code, Code::Enterd_imm16_imm8 | Code::Pushad | Code::Leaved);
    !left_out && !far && !esp && code.cpuid_features().iter().all(|f| has(*f))
}

/// Features that both sides have where there is AVX2; the host's are asked for by the guest's processor.
fn has(feature: F) -> bool {
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::FPU
            | F::FPU287
            | F::FPU387
            | F::CMOV
            | F::CX8
            | F::CMPXCHG16B
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::POPCNT
            | F::AES
            | F::PCLMULQDQ
            | F::AVX
            | F::AVX2
            | F::FMA
            | F::F16C
            | F::BMI1
            | F::BMI2
            | F::LZCNT
            | F::MOVBE
            | F::ADX
            | F::SHA
            | F::MULTIBYTENOP
            | F::PAUSE
    )
}

fn is_either(k: K) -> bool {
    matches!(
        k,
        K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
            | K::mm_or_mem
            | K::r32_or_mem_mpx
            | K::r64_or_mem_mpx
    )
}

fn is_memory(k: K) -> bool {
    matches!(k, K::mem | K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y)
}

/// A case in the making: its operands are drawn one after the other.
struct Draft<'a> {
    i: Instruction,
    bits: u32,
    /// Where the data pages begin.
    data: u64,
    image: CpuImage,
    random: &'a mut Random,
}

impl Form {
    /// Its name: mnemonic, code, mode and kind of operand, in lower case.
    pub fn name(&self) -> String {
        let kind = if self.memory { "memory" } else { "registers" };
        format!("{:?}/{:?}/{:?}/{kind}", self.code.mnemonic(), self.code, self.mode).to_lowercase()
    }

    /// A random case; `None` where this kind of operand has no encoding.
    pub fn case(&self, random: &mut Random) -> Option<Case> {
        let mut image = CpuImage { simd: random.simd(), ..CpuImage::default() };
        for gpr in &mut image.gpr {
            *gpr = random.integer();
        }
        let (bits, data) = match self.mode {
            Mode::Long => (64, DATA),
            Mode::Compat32 => (32, DATA),
            // Segments have bases: offsets count from the pages' start.
            Mode::Protected16 => (16, 0),
        };
        image.rip = if self.mode == Mode::Protected16 { 0x100 } else { CODE + 0x100 };
        image.rflags = 0x202 | random.bits() & 0x8d5;
        if random.one_in(4) {
            image.rflags |= 1 << 10; // DF
        }
        let mut memory = [0; WINDOW];
        memory.chunks_mut(16).for_each(|c| c.copy_from_slice(&random.vector().to_le_bytes()));

        let mut draft = Draft { i: Instruction::default(), bits, data, image, random };
        draft.i.set_code(self.code);
        let kinds = self.code.op_code().op_kinds();
        for (n, &kind) in kinds.iter().enumerate() {
            self.operand(&mut draft, n as u32, kind)?;
        }
        let Draft { mut i, mut image, random, .. } = draft;
        // A bit string that is as far away as an address may lie in the oracle itself.
        let bits_by_register = matches!(self.code.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
            && i.op0_kind() == OpKind::Memory
            && i.op1_kind() == OpKind::Register;
        let offset = i.op1_register().full_register();
        let address =
            [i.memory_base().full_register(), i.memory_index().full_register(), Register::R10, Register::RSP];
        if bits_by_register && address.contains(&offset) {
            return None;
        }
        // The oracle cannot load the upper half of ESP there.
        if self.mode == Mode::Protected16 && (0..i.op_count()).any(|n| i.op_register(n) == Register::ESP) {
            return None;
        }
        self.implicit(data, &mut image, random);
        let lockable = self.code.op_code().can_use_lock_prefix() && i.op0_kind() == OpKind::Memory;
        if lockable && random.one_in(2) {
            i.set_has_lock_prefix(true);
        }
        if self.code.op_code().can_use_rep_prefix() && random.one_in(2) {
            image.gpr[1] = u64::from(random.below(6));
            if self.code.op_code().can_use_repne_prefix() && random.one_in(2) {
                i.set_has_repne_prefix(true);
            } else {
                i.set_has_rep_prefix(true);
            }
        }
        if bits != 64 {
            image.gpr.iter_mut().for_each(|r| *r &= 0xffff_ffff);
            image.gpr[8..].fill(0);
            image.simd.ymm[8..].fill([0; 2]);
        }
        let mut encoder = Encoder::new(bits);
        encoder.encode(&i, image.rip).ok()?;
        let branches = i.flow_control() != iced_x86::FlowControl::Next;
        Some(Case { code: encoder.take_buffer(), mode: self.mode, step: branches, image, window: AT, memory })
    }

    /// Registers that an instruction uses without naming them.
    fn implicit(&self, data: u64, image: &mut CpuImage, random: &mut Random) {
        let mut point = |n: usize| image.gpr[n] = data + (AT + 64 + random.below(64) as usize) as u64;
        // The stack, and where string instructions read and write.
        point(4);
        let kinds = self.code.op_code().op_kinds();
        if kinds.iter().any(|k| matches!(k, K::seg_rSI | K::es_rDI | K::seg_rDI)) {
            point(6);
            point(7);
        }
        if kinds.contains(&K::seg_rBX_al) || self.code.mnemonic() == M::Xlatb {
            image.gpr[3] = data + AT as u64;
            image.gpr[0] &= !0x80;
        }
        if matches!(self.code.mnemonic(), M::Enter | M::Leave) {
            image.gpr[5] = data + (AT + 96) as u64;
        }
    }

    fn operand(&self, draft: &mut Draft, n: u32, kind: K) -> Option<()> {
        if is_memory(kind) || is_either(kind) && self.memory {
            return self.memory(draft, n, kind);
        }
        let bits = draft.bits;
        let Draft { i, random, .. } = draft;
        let count = if bits == 64 { 16 } else { 8 };
        let mut register = |first: Register, count: u32| {
            i.set_op_kind(n, OpKind::Register);
            i.set_op_register(n, first + random.below(count));
        };
        let code = if bits == 16 { 0 } else { CODE };
        match kind {
            K::r8_or_mem | K::r8_reg | K::r8_opcode if bits == 64 => register(Register::AL, 20),
            K::r8_or_mem | K::r8_reg | K::r8_opcode => register(Register::AL, 8),
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode => register(Register::AX, count),
            K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
                register(Register::EAX, count)
            }
            K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
                register(Register::RAX, count)
            }
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => {
                register(Register::XMM0, count)
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
                register(Register::YMM0, count)
            }
            K::mm_or_mem | K::mm_reg | K::mm_rm => register(Register::MM0, 8),
            K::st0 => register(Register::ST0, 1),
            K::sti_opcode => register(Register::ST0, 8),
            K::al => register(Register::AL, 1),
            K::cl => register(Register::CL, 1),
            K::ax => register(Register::AX, 1),
            K::dx => register(Register::DX, 1),
            K::eax => register(Register::EAX, 1),
            K::rax => register(Register::RAX, 1),
            K::imm8 => {
                let value = random.bits() as u8;
                if i.op_count() > n
                    && (0..n)
                        .any(|m| i.op_kind(m) == OpKind::Immediate8 || i.op_kind(m) == OpKind::Immediate16)
                {
                    i.set_op_kind(n, OpKind::Immediate8_2nd);
                    // ENTER's nesting level stays within the window.
                    i.set_immediate8_2nd(value & 3);
                } else {
                    i.set_op_kind(n, OpKind::Immediate8);
                    i.set_immediate8(value);
                }
            }
            K::imm8_const_1 => {
                i.set_op_kind(n, OpKind::Immediate8);
                i.set_immediate8(1);
            }
            K::imm8sex16 => {
                i.set_op_kind(n, OpKind::Immediate8to16);
                i.set_immediate8to16(random.bits() as i8 as i16);
            }
            K::imm8sex32 => {
                i.set_op_kind(n, OpKind::Immediate8to32);
                i.set_immediate8to32((random.bits() as i8).into());
            }
            K::imm8sex64 => {
                i.set_op_kind(n, OpKind::Immediate8to64);
                i.set_immediate8to64((random.bits() as i8).into());
            }
            K::imm16 => {
                i.set_op_kind(n, OpKind::Immediate16);
                // ENTER's and RET's counts stay within the window.
                let small = matches!(self.code.mnemonic(), M::Enter | M::Ret);
                i.set_immediate16(if small { random.below(32) as u16 } else { random.integer() as u16 });
            }
            K::imm32 => {
                i.set_op_kind(n, OpKind::Immediate32);
                i.set_immediate32(random.integer() as u32);
            }
            K::imm32sex64 => {
                i.set_op_kind(n, OpKind::Immediate32to64);
                i.set_immediate32to64((random.integer() as i32).into());
            }
            K::imm64 => {
                i.set_op_kind(n, OpKind::Immediate64);
                i.set_immediate64(random.integer());
            }
            K::br16_1 | K::br16_2 => {
                i.set_op_kind(n, OpKind::NearBranch16);
                i.set_near_branch16((code + 0x80 + u64::from(random.below(0x100))) as u16);
            }
            K::br32_1 | K::br32_4 => {
                i.set_op_kind(n, OpKind::NearBranch32);
                i.set_near_branch32((code + 0x80 + u64::from(random.below(0x100))) as u32);
            }
            K::br64_1 | K::br64_4 => {
                i.set_op_kind(n, OpKind::NearBranch64);
                i.set_near_branch64(code + 0x80 + u64::from(random.below(0x100)));
            }
            K::seg_rSI => i.set_op_kind(
                n,
                [OpKind::MemorySegSI, OpKind::MemorySegESI, OpKind::MemorySegRSI][width(bits)],
            ),
            K::es_rDI => {
                i.set_op_kind(n, [OpKind::MemoryESDI, OpKind::MemoryESEDI, OpKind::MemoryESRDI][width(bits)])
            }
            K::seg_rDI => i.set_op_kind(
                n,
                [OpKind::MemorySegDI, OpKind::MemorySegEDI, OpKind::MemorySegRDI][width(bits)],
            ),
            K::seg_rBX_al => {
                i.set_op_kind(n, OpKind::Memory);
                i.set_memory_base([Register::BX, Register::EBX, Register::RBX][width(bits)]);
                i.set_memory_index(Register::AL);
            }
            _ => return None,
        }
        Some(())
    }

    /// An operand in memory: base, at times an index, and a displacement; in the window nearly always.
    fn memory(&self, draft: &mut Draft, n: u32, kind: K) -> Option<()> {
        let (bits, data) = (draft.bits, draft.data);
        let Draft { i, image, random, .. } = draft;
        i.set_op_kind(n, OpKind::Memory);
        let aligned = if random.one_in(4) { 1 } else { 32 };
        let spot = u64::from(random.below(WINDOW as u32 - 96)) / aligned * aligned + 32;
        let mut target = data + AT as u64 + spot;
        if random.one_in(24) {
            let edges = [data.wrapping_sub(3), data + DATA_SIZE as u64 - 3, READ_ONLY + 8, 0, 0xffff_fff0];
            target = edges[random.below(5) as usize];
            if bits == 16 {
                target = (DATA_SIZE as u64) - u64::from(random.below(12));
            }
        }
        let displacement = i64::from(random.bits() as i8);
        let mut base = [3usize, 5, 6, 7, 0, 9, 12, 13][random.below(if bits == 64 { 8 } else { 5 }) as usize];
        if bits == 16 {
            base = [3, 6, 7][random.below(3) as usize];
        }
        let first = [Register::AX, Register::EAX, Register::RAX][width(bits)];
        i.set_memory_base(first + base as u32);
        i.set_memory_displacement64(displacement as u64 & (u64::MAX >> (64 - bits)));
        i.set_memory_displ_size(1);
        if bits == 16 {
            i.set_memory_displ_size(1);
        }
        image.gpr[base] = target.wrapping_sub(displacement as u64);
        let vsib = match kind {
            K::mem_vsib32x | K::mem_vsib64x => Some(Register::XMM0),
            K::mem_vsib32y | K::mem_vsib64y => Some(Register::YMM0),
            _ => None,
        };
        if let Some(vector) = vsib {
            let index = random.below(8);
            i.set_memory_index(vector + index);
            i.set_memory_index_scale(1 << random.below(2));
            // Small offsets, so that elements lie in the window.
            let wide = matches!(kind, K::mem_vsib64x | K::mem_vsib64y);
            for half in &mut image.simd.ymm[index as usize] {
                let element = |r: &mut Random| i64::from(r.below(24)) - 12;
                *half = if wide {
                    u128::from(element(random) as u64) | u128::from(element(random) as u64) << 64
                } else {
                    (0..4).fold(0, |v, k| v | u128::from(element(random) as i32 as u32) << (32 * k))
                };
            }
        } else if bits != 16 && random.one_in(4) {
            let index = if bits == 64 { 10 } else { 2 };
            if index != base {
                i.set_memory_index(first + index as u32);
                let scale = 1 << random.below(4);
                i.set_memory_index_scale(scale);
                let by = u64::from(random.below(16));
                image.gpr[index] = by;
                image.gpr[base] = image.gpr[base].wrapping_sub(by * u64::from(scale));
            }
        }
        // Bit strings reach as far as their register says.
        if matches!(self.code.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc) {
            image
                .gpr
                .iter_mut()
                .enumerate()
                .filter(|(r, _)| *r != base && *r != 10)
                .for_each(|(_, v)| *v &= 0x1f);
        }
        Some(())
    }
}

fn width(bits: u32) -> usize {
    match bits {
        16 => 0,
        32 => 1,
        _ => 2,
    }
}
