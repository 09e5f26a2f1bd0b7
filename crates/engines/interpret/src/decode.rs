//! From an iced-x86 instruction to an [`Op`].

use iced_x86::{CpuidFeature, Instruction, Mnemonic, OpKind, Register};
use x86::cpuid::{Cpuid, Feature};
use x86::segment::index;

use crate::op::{HIGH, Handler, Op, slot};
use crate::{dispatch, system};

/// The number by which ops name a register.
fn number(r: Register) -> u8 {
    match r {
        Register::AH | Register::CH | Register::DH | Register::BH => {
            HIGH | (r as u32 - Register::AH as u32) as u8
        }
        // iced counts AH to BH among the 8-bit registers.
        r if r.is_gpr8() => (r.full_register().number() & 15) as u8,
        _ => (r.number() & 15) as u8,
    }
}

/// The slot that a base or index register stands for.
fn address_register(r: Register) -> u8 {
    match r {
        Register::RIP | Register::EIP => slot::START,
        r if r.is_gpr16() || r.is_gpr32() || r.is_gpr64() => r.number() as u8,
        _ => slot::ZERO,
    }
}

fn address_size(i: &Instruction) -> u8 {
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => return 2,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => return 4,
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => return 8,
            _ => {}
        }
    }
    let size = |r: Register| if r == Register::None || !is_address(r) { 0 } else { r.size() as u8 };
    match size(i.memory_base()).max(size(i.memory_index())) {
        0 => match i.memory_displ_size() {
            8 => 8,
            2 => 2,
            _ => 4,
        },
        n => n,
    }
}

fn is_address(r: Register) -> bool {
    r.is_gpr16() || r.is_gpr32() || r.is_gpr64() || matches!(r, Register::RIP | Register::EIP)
}

/// Bytes of operand `n`.
pub fn operand_size(i: &Instruction, n: u32) -> u8 {
    match i.op_kind(n) {
        OpKind::Register => i.op_register(n).size() as u8,
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        _ => i.memory_size().size() as u8,
    }
}

/// Compiles an instruction that was decoded with its offset from the block's start as its address. `bits` is the code
/// segment's mode.
pub fn compile(i: &Instruction, bits: u8, cpuid: &Cpuid) -> Op {
    let mut op = Op {
        run: system::ud,
        imm: 0,
        disp: 0,
        instruction: None,
        end: i.next_ip() as u16,
        len: i.len() as u8,
        dst: 0,
        src: 0,
        third: 0,
        base: slot::ZERO,
        index: slot::ZERO,
        scale: 0,
        seg_slot: slot::ZERO,
        segment: index::DS as u8,
        flat: false,
        address_size: 0,
        size: 0,
        lock: i.has_lock_prefix(),
        memory: false,
    };
    if i.is_invalid() || !supported(i, cpuid) {
        return op;
    }
    operands(i, bits, &mut op);
    op.run = handler(i, &mut op, cpuid);
    op
}

fn handler(i: &Instruction, op: &mut Op, cpuid: &Cpuid) -> Handler {
    if let Some(h) = dispatch::count_zeros(i, op, cpuid) {
        return h;
    }
    if let Some(h) = dispatch::integer(i, op) {
        return h;
    }
    if let Some(h) = dispatch::control(i, op) {
        return h;
    }
    op.instruction = Some(Box::new(*i));
    dispatch::system(i, op).or_else(|| crate::simd::handler(i, op)).unwrap_or(system::ud)
}

fn operands(i: &Instruction, bits: u8, op: &mut Op) {
    let mut memory = false;
    for n in 0..i.op_count().min(3) {
        match i.op_kind(n) {
            OpKind::Register => {
                let r = number(i.op_register(n));
                match n {
                    0 => op.dst = r,
                    1 => op.src = r,
                    _ => op.third = r,
                }
            }
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                op.imm = i.near_branch_target().wrapping_sub(i.next_ip());
            }
            OpKind::FarBranch16 | OpKind::FarBranch32 => {}
            OpKind::Memory
            | OpKind::MemorySegSI
            | OpKind::MemorySegDI
            | OpKind::MemorySegESI
            | OpKind::MemorySegEDI
            | OpKind::MemorySegRSI
            | OpKind::MemorySegRDI
            | OpKind::MemoryESDI
            | OpKind::MemoryESEDI
            | OpKind::MemoryESRDI => memory = true,
            _ => op.imm = i.immediate(n),
        }
    }
    // The fourth operand of some VEX instructions is an immediate or a register that only the whole instruction tells.
    if i.op_count() > 0 {
        op.size = operand_size(i, 0);
    }
    if memory {
        op.memory = true;
        op.base = address_register(i.memory_base());
        op.index = address_register(i.memory_index());
        op.scale = i.memory_index_scale().trailing_zeros() as u8;
        op.disp = i.memory_displacement64();
        op.segment = segment(i, bits);
        op.address_size = address_size(i);
        op.flat = bits == 64 && op.address_size == 8;
        op.seg_slot = match usize::from(op.segment) {
            index::FS => slot::FS,
            index::GS => slot::GS,
            _ => slot::ZERO,
        };
    }
}

/// The segment of the memory operand. In 64-bit mode prefixes other than FS and GS count for nothing.
fn segment(i: &Instruction, bits: u8) -> u8 {
    match (bits, i.memory_segment()) {
        (64, Register::ES | Register::CS | Register::SS | Register::DS) => {
            let stack =
                matches!(i.memory_base(), Register::RSP | Register::RBP | Register::ESP | Register::EBP);
            (if stack { index::SS } else { index::DS }) as u8
        }
        (_, r) => number(r) % 6,
    }
}

/// Whether the CPUID model has what the instruction needs.
pub fn supported(i: &Instruction, cpuid: &Cpuid) -> bool {
    use Mnemonic as M;
    // These are other instructions where the feature is missing, many of them ones that do nothing.
    if matches!(
        i.mnemonic(),
        M::Tzcnt | M::Lzcnt | M::Pause | M::Rdsspd | M::Rdsspq | M::Cldemote | M::Prefetchwt1
    ) {
        return true;
    }
    i.cpuid_features().iter().all(|&f| match needed(f) {
        Some(feature) => cpuid.has(feature),
        None => KNOWN.contains(&f),
    })
}

/// Features that every model has, and those that [`crate::system`] judges by itself.
const KNOWN: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::CPUID,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
    CpuidFeature::VMX,
    CpuidFeature::SVM,
    CpuidFeature::SMX,
    CpuidFeature::CET_IBT,
    CpuidFeature::RDPMC,
    CpuidFeature::SYSCALL,
];

fn needed(f: CpuidFeature) -> Option<Feature> {
    Some(match f {
        CpuidFeature::ADX => Feature::ADX,
        CpuidFeature::AES => Feature::AES,
        CpuidFeature::AVX => Feature::AVX,
        CpuidFeature::AVX2 => Feature::AVX2,
        CpuidFeature::BMI1 => Feature::BMI1,
        CpuidFeature::BMI2 => Feature::BMI2,
        CpuidFeature::CLFLUSHOPT => Feature::CLFLUSHOPT,
        CpuidFeature::CLFSH => Feature::CLFLUSH,
        CpuidFeature::CLWB => Feature::CLWB,
        CpuidFeature::CLZERO => Feature::CLZERO,
        CpuidFeature::CMOV => Feature::CMOV,
        CpuidFeature::CMPXCHG16B => Feature::CX16,
        CpuidFeature::CX8 => Feature::CX8,
        CpuidFeature::F16C => Feature::F16C,
        CpuidFeature::FMA => Feature::FMA,
        CpuidFeature::FSGSBASE => Feature::FSGSBASE,
        CpuidFeature::FXSR => Feature::FXSR,
        CpuidFeature::INVPCID => Feature::INVPCID,
        CpuidFeature::LZCNT => Feature::LZCNT,
        CpuidFeature::MMX => Feature::MMX,
        CpuidFeature::MONITOR => Feature::MONITOR,
        CpuidFeature::MOVBE => Feature::MOVBE,
        CpuidFeature::MSR => Feature::MSR,
        CpuidFeature::PCLMULQDQ => Feature::PCLMULQDQ,
        CpuidFeature::POPCNT => Feature::POPCNT,
        CpuidFeature::PREFETCHW => Feature::PREFETCHW,
        CpuidFeature::RDPID => Feature::RDPID,
        CpuidFeature::RDRAND => Feature::RDRAND,
        CpuidFeature::RDSEED => Feature::RDSEED,
        CpuidFeature::RDTSCP => Feature::RDTSCP,
        CpuidFeature::SEP => Feature::SEP,
        CpuidFeature::SHA => Feature::SHA,
        CpuidFeature::SMAP => Feature::SMAP,
        CpuidFeature::SSE => Feature::SSE,
        CpuidFeature::SSE2 => Feature::SSE2,
        CpuidFeature::SSE3 => Feature::SSE3,
        CpuidFeature::SSE4_1 => Feature::SSE4_1,
        CpuidFeature::SSE4_2 => Feature::SSE4_2,
        CpuidFeature::SSE4A => Feature::SSE4A,
        CpuidFeature::SSSE3 => Feature::SSSE3,
        CpuidFeature::TSC => Feature::TSC,
        CpuidFeature::VAES => Feature::VAES,
        CpuidFeature::VPCLMULQDQ => Feature::VPCLMULQDQ,
        CpuidFeature::XSAVE => Feature::XSAVE,
        CpuidFeature::XSAVEC => Feature::XSAVEC,
        CpuidFeature::XSAVEOPT => Feature::XSAVEOPT,
        CpuidFeature::XSAVES => Feature::XSAVES,
        CpuidFeature::WBNOINVD => Feature::WBNOINVD,
        _ => return None,
    })
}
