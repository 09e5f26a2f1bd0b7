//! How an x87 instruction can run with only the registers that it needs.
//!
//! FXRSTOR, FXSAVE and FNINIT together cost over 100 ns. When all exceptions are masked, the registers read are not
//! empty and the one pushed to is, loading ST(0) and ST(i) onto the host's empty stack gives the same results.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

const C0: u16 = 1 << 8;
pub(crate) const C1: u16 = 1 << 9;
pub(crate) const C2: u16 = 1 << 10;
const C3: u16 = 1 << 14;
/// The condition code in the status word.
pub(crate) const CONDITIONS: u16 = C0 | C1 | C2 | C3;

/// What an x87 instruction reads and leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    /// It reads ST(0).
    pub top: bool,
    /// The `i` of its ST(i), if that is not ST(0).
    pub other: Option<u8>,
    /// ST(i) is only written, so it may be empty.
    pub other_may_be_empty: bool,
    pub pops: u8,
    pub pushes: bool,
    /// The condition bits of the status word that it changes.
    pub conditions: u16,
    /// FPREM or FPREM1.
    pub remainder: bool,
}

impl Plan {
    /// Whether ST(0), or the register pushed, is on the host's stack afterwards.
    pub fn stores_top(&self) -> bool {
        self.pushes || (self.top && self.pops == 0)
    }

    /// Whether ST(i) is on the host's stack afterwards.
    pub fn stores_other(&self) -> bool {
        self.other.is_some() && self.pops < 2
    }
}

/// The plan of `instruction`, and the instruction to execute: its ST(i) is the host's ST(1), or ST(0) if that is
/// all there is. `None`: only the slow way is right.
#[rustfmt::skip]
pub(crate) fn plan(instruction: &Instruction) -> Option<(Plan, Instruction)> {
    use Mnemonic::*;
    let in_memory = (0..instruction.op_count()).any(|i| instruction.op_kind(i) == OpKind::Memory);
    let mnemonic = instruction.mnemonic();
    let (implicit, pops, conditions) = match mnemonic {
        Fabs | Fchs | Fsqrt | Frndint | F2xm1 => (0, 0, C1),
        Fsin | Fcos => (0, 0, C1 | C2),
        Ftst | Fxam => (0, 0, CONDITIONS),
        Fadd | Fsub | Fsubr | Fmul | Fdiv | Fdivr | Fiadd | Fisub | Fisubr | Fimul | Fidiv | Fidivr => (0, 0, C1),
        Faddp | Fsubp | Fsubrp | Fmulp | Fdivp | Fdivrp => (1, 1, C1),
        Fcom | Fucom | Ficom => (0, 0, CONDITIONS),
        Fcomp | Fucomp | Ficomp => (0, 1, CONDITIONS),
        Fcompp | Fucompp => (1, 2, CONDITIONS),
        Fcomi | Fucomi => (0, 0, 0),
        Fcomip | Fucomip => (0, 1, 0),
        Fcmovb | Fcmovbe | Fcmove | Fcmovnb | Fcmovnbe | Fcmovne | Fcmovnu | Fcmovu => (0, 0, 0),
        Fxch => (0, 0, C1),
        Fscale => (1, 0, C1),
        Fprem | Fprem1 => (1, 0, CONDITIONS),
        Fpatan | Fyl2x | Fyl2xp1 => (1, 1, C1),
        Fst | Fist => (0, 0, C1),
        Fstp | Fistp | Fisttp | Fbstp => (0, 1, C1),
        Fld | Fild | Fbld | Fld1 | Fldl2e | Fldl2t | Fldlg2 | Fldln2 | Fldpi | Fldz => (0, 0, C1),
        _ => return None,
    };
    let pushes = matches!(mnemonic, Fld | Fild | Fbld | Fld1 | Fldl2e | Fldl2t | Fldlg2 | Fldln2 | Fldpi | Fldz);
    let mut inner = *instruction;
    let mut other = if instruction.op_count() == 0 && implicit == 1 { Some(1) } else { None };
    for i in 0..instruction.op_count() {
        let register = instruction.op_register(i);
        if instruction.op_kind(i) == OpKind::Register && register.is_st() && register != Register::ST0 {
            other = Some(register.number() as u8);
            // FLD ST(i) finds it on top of the host's stack, the others below ST(0).
            inner.set_op_register(i, if pushes { Register::ST0 } else { Register::ST1 });
        }
    }
    let register_form = instruction.op_count() != 0 && !in_memory;
    if register_form && other.is_none() && (pushes || matches!(mnemonic, Faddp | Fsubp | Fsubrp | Fmulp | Fdivp | Fdivrp)) {
        // FLD ST(0) would need it twice; FADDP ST(0) leaves its result in the register that it pops.
        return None;
    }
    let other_may_be_empty = matches!(mnemonic, Fst | Fstp);
    let remainder = matches!(mnemonic, Fprem | Fprem1);
    Some((Plan { top: !pushes, other, other_may_be_empty, pops, pushes, conditions, remainder }, inner))
}
