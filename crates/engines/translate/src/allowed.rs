//! Which instructions are executed by the host's processor as they are, but for where their operands lie.
//!
//! The list is of what is allowed, not of what is not: it is what stands between a guest and the host. Everything else is
//! left to the reference engine.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::seats::is_high;

/// What an instruction needs of the processor's mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// General registers alone.
    Integer,
    /// XMM registers, encoded without VEX: CR0 and CR4 must allow SSE.
    Sse,
    /// XMM or YMM registers, encoded with VEX: CR4 and XCR0 must allow AVX.
    Avx,
}

/// The class of an instruction that may be executed as it is, with its operands in general registers, vector registers,
/// immediates and at most one explicit operand in memory.
pub fn class(i: &Instruction) -> Option<Class> {
    let mut vectors = false;
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Register => {
                let r = i.op_register(n);
                if r.is_xmm() || r.is_ymm() {
                    vectors = true;
                } else if !r.is_gpr() {
                    return None;
                }
            }
            OpKind::Memory => {
                let plain = |r: Register| r == Register::None || r.is_gpr32() || r.is_gpr64();
                let base = i.memory_base();
                if !(plain(base) || base == Register::RIP) || !plain(i.memory_index()) {
                    return None;
                }
            }
            OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => {}
            _ => return None,
        }
    }
    let vex = i.encoding() == iced_x86::EncodingKind::VEX;
    if integer(i) {
        return Some(Class::Integer);
    }
    if !vector(i, vectors) {
        return None;
    }
    Some(if vex { Class::Avx } else { Class::Sse })
}

#[rustfmt::skip]
fn integer(i: &Instruction) -> bool {
    use Mnemonic::*;
    match i.mnemonic() {
        Mov | Movzx | Movsx | Movsxd | Add | Or | Adc | Sbb | And | Sub | Xor | Cmp | Test | Inc | Dec | Neg | Not
        | Mul | Imul | Div | Idiv | Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd | Bswap | Xchg | Xadd
        | Cmpxchg | Cmpxchg8b | Cmpxchg16b | Bsf | Bsr | Popcnt | Tzcnt | Lzcnt | Movbe | Crc32 | Adcx | Adox | Andn
        | Bextr | Blsi | Blsmsk | Blsr | Bzhi | Mulx | Pdep | Pext | Rorx | Sarx | Shlx | Shrx | Movnti
        | Lfence | Mfence | Sfence | Pause | Cbw | Cwde | Cdqe | Cwd | Cdq | Cqo | Cmc | Clc | Stc | Lahf | Sahf
        | Seta | Setae | Setb | Setbe | Sete | Setne | Setg | Setge | Setl | Setle | Seto | Setno | Setp | Setnp
        | Sets | Setns | Cmova | Cmovae | Cmovb | Cmovbe | Cmove | Cmovne | Cmovg | Cmovge | Cmovl | Cmovle | Cmovo
        | Cmovno | Cmovp | Cmovnp | Cmovs | Cmovns => true,
        // With a register as the bit's number the operand in memory may lie far from its address.
        Bt | Bts | Btr | Btc => !is_bit_string(i),
        _ => false,
    }
}

/// Whether the instruction works on a bit string in memory, the bit's number being in a register.
pub fn is_bit_string(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(i.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
        && i.op0_kind() == OpKind::Memory
        && i.op1_kind() == OpKind::Register
}

fn vector(i: &Instruction, vectors: bool) -> bool {
    use Mnemonic as M;
    match i.mnemonic() {
        M::Vzeroupper | M::Vzeroall => true,
        // More than one operand in memory, or one without a name, or one of which parts are left out.
        M::Maskmovdqu | M::Vmaskmovdqu | M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => {
            false
        }
        M::Movntps
        | M::Movntpd
        | M::Movntdq
        | M::Vmovntps
        | M::Vmovntpd
        | M::Vmovntdq
        | M::Movntdqa
        | M::Vmovntdqa => vectors,
        _ => vectors && native::listed(i.code()) && !i.is_vsib() && !mmx(i),
    }
}

fn mmx(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm())
}

/// Whether an instruction names one of AH to BH, which rules out the registers that need a REX prefix.
pub fn names_high(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && is_high(i.op_register(n)))
}
