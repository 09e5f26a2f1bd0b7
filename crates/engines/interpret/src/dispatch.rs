//! Which handler executes which instruction.

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind};
use x86::cpuid::{Cpuid, Feature};

use crate::alu::{self, Adc, Add, And, Cmp, Or, Rcl, Rcr, Rol, Ror, Sar, Sbb, Shl, Shr, Sub, Test, Xor};
use crate::decode::operand_size;
use crate::op::{Handler, Op};
use crate::{bmi, far, integer as int, mov, segment, string, system as sys, xsave};

/// A handler that is generic over the operand size, of `$op.size`.
macro_rules! sized {
    ($op:expr, $($f:ident)::+ $(, $g:tt)*) => {
        match $op.size {
            1 => $($f)::+::<u8 $(, $g)*> as Handler,
            2 => $($f)::+::<u16 $(, $g)*>,
            4 => $($f)::+::<u32 $(, $g)*>,
            _ => $($f)::+::<u64 $(, $g)*>,
        }
    };
}

/// As `sized`, and over whether an operand is in memory.
macro_rules! rm {
    ($op:expr, $($f:ident)::+ $(, $g:tt)*) => {
        if $op.memory { sized!($op, $($f)::+ $(, $g)*, true) } else { sized!($op, $($f)::+ $(, $g)*, false) }
    };
}

fn is_memory(i: &Instruction, n: u32) -> bool {
    i.op_count() > n && i.op_kind(n) == OpKind::Memory
}

fn is_register(i: &Instruction, n: u32) -> bool {
    i.op_count() > n && i.op_kind(n) == OpKind::Register
}

macro_rules! alu_forms {
    ($i:expr, $op:expr, $a:ident) => {
        if is_memory($i, 1) {
            sized!($op, alu::r_m, $a)
        } else if is_register($i, 1) {
            rm!($op, alu::rm_r, $a)
        } else {
            rm!($op, alu::rm_i, $a)
        }
    };
}

macro_rules! shift_forms {
    ($i:expr, $op:expr, $s:ident) => {
        if is_register($i, 1) { rm!($op, alu::shift_cl, $s) } else { rm!($op, alu::shift_i, $s) }
    };
}

macro_rules! bit_forms {
    ($i:expr, $op:expr, $k:literal) => {
        if is_register($i, 1) { rm!($op, int::bt_r, $k) } else { rm!($op, int::bt_i, $k) }
    };
}

macro_rules! extend_forms {
    ($i:expr, $op:expr, $x:literal) => {{
        // MOVSXD to 16 bits reads 32 from memory all the same, as measured.
        let narrow = $i.mnemonic() == M::Movsxd && $op.memory;
        let from = if narrow { 4 } else { operand_size($i, 1) };
        macro_rules! to {
            ($t:ty) => {
                match (from, $op.memory) {
                    (1, false) => mov::extend::<$t, u8, $x, false> as Handler,
                    (1, true) => mov::extend::<$t, u8, $x, true>,
                    (2, false) => mov::extend::<$t, u16, $x, false>,
                    (2, true) => mov::extend::<$t, u16, $x, true>,
                    (_, false) => mov::extend::<$t, u32, $x, false>,
                    (_, true) => mov::extend::<$t, u32, $x, true>,
                }
            };
        }
        match $op.size {
            2 => to!(u16),
            4 => to!(u32),
            _ => to!(u64),
        }
    }};
}

fn moves(i: &Instruction, op: &mut Op) -> Option<Handler> {
    let segment = |n| is_register(i, n) && i.op_register(n).is_segment_register();
    if segment(0) || segment(1) {
        return None;
    }
    if is_register(i, 0) && !(i.op0_register().is_gpr()) || is_register(i, 1) && !(i.op1_register().is_gpr())
    {
        return None;
    }
    Some(if is_memory(i, 1) || is_register(i, 0) && is_register(i, 1) {
        rm!(op, mov::mov_r_rm)
    } else if is_register(i, 1) {
        sized!(op, mov::mov_m_r)
    } else {
        rm!(op, mov::mov_rm_i)
    })
}

/// Integer arithmetic and moves.
#[rustfmt::skip]
pub fn integer(i: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match i.mnemonic() {
        M::Mov => return moves(i, op),
        M::Movnti => sized!(op, mov::mov_m_r),
        M::Add => alu_forms!(i, op, Add),
        M::Or => alu_forms!(i, op, Or),
        M::Adc => alu_forms!(i, op, Adc),
        M::Sbb => alu_forms!(i, op, Sbb),
        M::And => alu_forms!(i, op, And),
        M::Sub => alu_forms!(i, op, Sub),
        M::Xor => alu_forms!(i, op, Xor),
        M::Cmp => alu_forms!(i, op, Cmp),
        M::Test => alu_forms!(i, op, Test),
        M::Inc => rm!(op, alu::inc, false),
        M::Dec => rm!(op, alu::inc, true),
        M::Neg => rm!(op, alu::neg),
        M::Not => rm!(op, alu::not),
        M::Shl | M::Sal => shift_forms!(i, op, Shl),
        M::Shr => shift_forms!(i, op, Shr),
        M::Sar => shift_forms!(i, op, Sar),
        M::Rol => shift_forms!(i, op, Rol),
        M::Ror => shift_forms!(i, op, Ror),
        M::Rcl => shift_forms!(i, op, Rcl),
        M::Rcr => shift_forms!(i, op, Rcr),
        M::Shld if is_register(i, 2) => rm!(op, alu::double_shift, false, true),
        M::Shld => rm!(op, alu::double_shift, false, false),
        M::Shrd if is_register(i, 2) => rm!(op, alu::double_shift, true, true),
        M::Shrd => rm!(op, alu::double_shift, true, false),
        M::Lea => sized!(op, mov::lea),
        M::Movzx => extend_forms!(i, op, false),
        M::Movsx | M::Movsxd => extend_forms!(i, op, true),
        M::Xchg => {
            // Memory may be named first or second; here it is always the first operand.
            if is_memory(i, 1) {
                op.src = op.dst;
            }
            rm!(op, mov::xchg)
        }
        M::Xadd => rm!(op, int::xadd),
        M::Cmpxchg => rm!(op, int::cmpxchg),
        M::Cmpxchg8b => int::cmpxchg8b,
        M::Cmpxchg16b => int::cmpxchg16b,
        M::Mul => rm!(op, int::mul, false),
        M::Imul => match i.op_count() {
            1 => rm!(op, int::mul, true),
            2 => rm!(op, int::imul_r_rm),
            _ => rm!(op, int::imul_i),
        },
        M::Div => rm!(op, int::div),
        M::Idiv => rm!(op, int::idiv),
        M::Bt => bit_forms!(i, op, 0),
        M::Bts => bit_forms!(i, op, 1),
        M::Btr => bit_forms!(i, op, 2),
        M::Btc => bit_forms!(i, op, 3),
        M::Bsf => rm!(op, int::bsf, false),
        M::Bsr => rm!(op, int::bsf, true),
        M::Popcnt => rm!(op, int::popcnt),
        M::Bswap => sized!(op, int::bswap),
        M::Movbe if is_memory(i, 0) => sized!(op, int::movbe, true),
        M::Movbe => sized!(op, int::movbe, false),
        M::Crc32 => {
            let size = op.size;
            op.size = operand_size(i, 1);
            let h = rm!(op, int::crc32);
            op.size = size;
            h
        }
        M::Adcx => rm!(op, int::adx, false),
        M::Adox => rm!(op, int::adx, true),
        M::Cbw => int::cbw::<u16, u8>,
        M::Cwde => int::cbw::<u32, u16>,
        M::Cdqe => int::cbw::<u64, u32>,
        M::Cwd => int::cwd::<u16>,
        M::Cdq => int::cwd::<u32>,
        M::Cqo => int::cwd::<u64>,
        M::Lahf => int::lahf,
        M::Sahf => int::sahf,
        M::Clc => int::carry::<0>,
        M::Stc => int::carry::<1>,
        M::Cmc => int::carry::<2>,
        M::Cld => int::direction::<false>,
        M::Std => int::direction::<true>,
        M::Daa => int::daa::<false>,
        M::Das => int::daa::<true>,
        M::Aaa => int::aaa::<false>,
        M::Aas => int::aaa::<true>,
        M::Aam => int::aam,
        M::Aad => int::aad,
        M::Salc => int::salc,
        M::Bound => sized!(op, int::bound),
        M::Andn => rm!(op, bmi::andn),
        M::Bextr => rm!(op, bmi::bextr),
        M::Blsr => rm!(op, bmi::bls, 0),
        M::Blsmsk => rm!(op, bmi::bls, 1),
        M::Blsi => rm!(op, bmi::bls, 2),
        M::Bzhi => rm!(op, bmi::bzhi),
        M::Mulx => rm!(op, bmi::mulx),
        M::Pdep => rm!(op, bmi::pdep, false),
        M::Pext => rm!(op, bmi::pdep, true),
        M::Rorx => rm!(op, bmi::rorx),
        M::Shlx => rm!(op, bmi::shx, 0),
        M::Shrx => rm!(op, bmi::shx, 1),
        M::Sarx => rm!(op, bmi::shx, 2),
        // Among them hints that newer processors understand: RDSSP without shadow stacks is one.
        M::Nop | M::Reservednop | M::Pause | M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2
        | M::Prefetchw | M::Prefetchwt1 | M::Prefetch | M::Endbr64 | M::Endbr32 | M::Rdsspd | M::Rdsspq | M::Cldemote | M::Lfence | M::Mfence | M::Sfence => mov::nop,
        _ => return None,
    })
}

/// TZCNT and LZCNT, which are BSF and BSR on processors without them.
pub fn count_zeros(i: &Instruction, op: &Op, cpuid: &Cpuid) -> Option<Handler> {
    Some(match i.mnemonic() {
        M::Tzcnt if cpuid.has(Feature::BMI1) => rm!(op, int::tzcnt, false),
        M::Tzcnt => rm!(op, int::bsf, false),
        M::Lzcnt if cpuid.has(Feature::LZCNT) => rm!(op, int::tzcnt, true),
        M::Lzcnt => rm!(op, int::bsf, true),
        _ => return None,
    })
}

macro_rules! conditions {
    ($cc:expr, $t:ty; $($n:literal)*) => {
        match $cc { $($n => mov::jcc::<$t, $n> as Handler,)* _ => mov::jcc::<$t, 15> }
    };
}

/// Bytes that an instruction pushes or pops, which is the operand size of stack instructions.
fn stack_size(i: &Instruction) -> u8 {
    i.stack_pointer_increment().unsigned_abs() as u8
}

/// Branches, stack instructions and conditions.
pub fn control(i: &Instruction, op: &mut Op) -> Option<Handler> {
    use iced_x86::ConditionCode;
    let cc = i.condition_code();
    if cc != ConditionCode::None {
        let number = condition_number(cc);
        let name = i.mnemonic();
        if i.is_jcc_short_or_near() {
            return Some(match op.size {
                2 => conditions!(number, u16; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
                4 => conditions!(number, u32; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
                _ => conditions!(number, u64; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
            });
        }
        if !matches!(name, M::Loope | M::Loopne) {
            // SETcc and CMOVcc. Others (FCMOVcc and the like) are not ours.
            if is_register(i, 0) && !i.op0_register().is_gpr() {
                return None;
            }
            op.imm = number.into();
            return match i.op_count() {
                1 if op.memory => Some(mov::setcc::<true>),
                1 => Some(mov::setcc::<false>),
                2 => Some(rm!(op, mov::cmov)),
                _ => None,
            };
        }
    }
    near(i, op)
}

fn near(i: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match i.mnemonic() {
        M::Jmp if is_memory(i, 0) || is_register(i, 0) => rm_far(i, op, false)?,
        M::Jmp if is_near(i) => sized!(op, mov::jmp),
        M::Call if is_memory(i, 0) || is_register(i, 0) => rm_far(i, op, true)?,
        M::Call if is_near(i) => sized!(op, mov::call),
        M::Ret => {
            op.size = match i.code() {
                Code::Retnw | Code::Retnw_imm16 => 2,
                Code::Retnd | Code::Retnd_imm16 => 4,
                _ => 8,
            };
            sized!(op, mov::ret)
        }
        M::Jcxz => sized!(op, mov::jcxz, u16),
        M::Jecxz => sized!(op, mov::jcxz, u32),
        M::Jrcxz => sized!(op, mov::jcxz, u64),
        M::Loop | M::Loope | M::Loopne => loops(i, op),
        M::Push if !is_segment(i) => {
            op.size = stack_size(i);
            if op.memory {
                sized!(op, mov::push_m)
            } else if is_register(i, 0) {
                sized!(op, mov::push_r)
            } else {
                sized!(op, mov::push_i)
            }
        }
        M::Pop if !is_segment(i) => {
            op.size = stack_size(i);
            if op.memory {
                // The displacement counts from the stack pointer after the pop, which is what it then is.
                sized!(op, mov::pop_m)
            } else {
                sized!(op, mov::pop_r)
            }
        }
        M::Leave => {
            op.size = stack_size_leave(i);
            sized!(op, mov::leave)
        }
        _ => return None,
    })
}

fn stack_size_leave(i: &Instruction) -> u8 {
    match i.code() {
        Code::Leavew => 2,
        Code::Leaved => 4,
        _ => 8,
    }
}

fn is_segment(i: &Instruction) -> bool {
    is_register(i, 0) && i.op0_register().is_segment_register()
}

fn is_near(i: &Instruction) -> bool {
    matches!(i.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
}

fn rm_far(i: &Instruction, op: &mut Op, call: bool) -> Option<Handler> {
    if i.is_jmp_far_indirect() || i.is_call_far_indirect() {
        return None;
    }
    Some(if call { rm!(op, mov::call_rm) } else { rm!(op, mov::jmp_rm) })
}

fn loops(i: &Instruction, op: &Op) -> Handler {
    use iced_x86::Register;
    // The counter's width is in the code alone: iced names it as the implicit register.
    let counter = match i.code() {
        c if COUNT_16.contains(&c) => Register::CX,
        c if COUNT_32.contains(&c) => Register::ECX,
        _ => Register::RCX,
    };
    macro_rules! kind {
        ($a:ident) => {
            match i.mnemonic() {
                M::Loop => sized!(op, mov::loops, $a, 0),
                M::Loope => sized!(op, mov::loops, $a, 1),
                _ => sized!(op, mov::loops, $a, 2),
            }
        };
    }
    match counter {
        Register::CX => kind!(u16),
        Register::ECX => kind!(u32),
        _ => kind!(u64),
    }
}

const COUNT_16: [Code; 9] = [
    Code::Loop_rel8_16_CX,
    Code::Loop_rel8_32_CX,
    Code::Loope_rel8_16_CX,
    Code::Loope_rel8_32_CX,
    Code::Loopne_rel8_16_CX,
    Code::Loopne_rel8_32_CX,
    Code::Loop_rel8_16_CX,
    Code::Loope_rel8_16_CX,
    Code::Loopne_rel8_16_CX,
];
const COUNT_32: [Code; 9] = [
    Code::Loop_rel8_16_ECX,
    Code::Loop_rel8_32_ECX,
    Code::Loop_rel8_64_ECX,
    Code::Loope_rel8_16_ECX,
    Code::Loope_rel8_32_ECX,
    Code::Loope_rel8_64_ECX,
    Code::Loopne_rel8_16_ECX,
    Code::Loopne_rel8_32_ECX,
    Code::Loopne_rel8_64_ECX,
];

fn condition_number(cc: iced_x86::ConditionCode) -> u8 {
    use iced_x86::ConditionCode as C;
    match cc {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        _ => 15,
    }
}

/// Segment registers, far transfers, system instructions and string instructions.
#[rustfmt::skip]
pub fn system(i: &Instruction, op: &mut Op) -> Option<Handler> {
    if let Some(h) = string::handler(i, op) {
        return Some(h);
    }
    if let Some(h) = far_transfers(i, op) {
        return Some(h);
    }
    if let Some(h) = descriptors(i, op) {
        return Some(h);
    }
    if let Some(h) = privileged(i, op) {
        return Some(h);
    }
    Some(match i.mnemonic() {
        M::Pushf | M::Pushfd | M::Pushfq => {
            op.size = stack_size(i);
            sized!(op, sys::pushf)
        }
        M::Popf | M::Popfd | M::Popfq => {
            op.size = stack_size(i);
            sized!(op, sys::popf)
        }
        M::Pusha | M::Pushad | M::Popa | M::Popad => {
            op.size = if matches!(i.mnemonic(), M::Pusha | M::Popa) { 2 } else { 4 };
            let wide = op.size == 4;
            match (matches!(i.mnemonic(), M::Pusha | M::Pushad), wide) {
                (true, false) => mov::pusha::<u16>,
                (true, true) => mov::pusha::<u32>,
                (false, false) => mov::popa::<u16>,
                (false, true) => mov::popa::<u32>,
            }
        }
        M::Enter => {
            op.size = match i.code() { Code::Enterw_imm16_imm8 => 2, Code::Enterd_imm16_imm8 => 4, _ => 8 };
            sized!(op, far::enter)
        }
        M::Xlatb => sys::xlat,
        M::In => ports(i, op, true),
        M::Out => ports(i, op, false),
        M::Cpuid => sys::cpuid,
        M::Rdtsc => sys::rdtsc::<false>,
        M::Rdtscp => sys::rdtsc::<true>,
        M::Rdpid => sys::rdpid,
        M::Rdrand | M::Rdseed => sized!(op, sys::rdrand),
        M::Clflush | M::Clflushopt | M::Clwb => sys::clflush,
        M::Vmcall | M::Vmmcall => sys::hypercall,
        M::Ud0 | M::Ud1 | M::Ud2 => sys::ud,
        M::Fxsave | M::Fxsave64 => xsave::fxsave,
        M::Fxrstor | M::Fxrstor64 => xsave::fxrstor,
        M::Xsave | M::Xsave64 => xsave::save::<{ xsave::PLAIN }>,
        M::Xsaveopt | M::Xsaveopt64 => xsave::save::<{ xsave::OPT }>,
        M::Xsavec | M::Xsavec64 => xsave::save::<{ xsave::COMPACT }>,
        M::Xsaves | M::Xsaves64 => xsave::save::<{ xsave::SUPERVISOR }>,
        M::Xrstor | M::Xrstor64 => xsave::restore::<false>,
        M::Xrstors | M::Xrstors64 => xsave::restore::<true>,
        M::Xgetbv => xsave::xgetbv,
        M::Xsetbv => xsave::xsetbv,
        M::Ldmxcsr | M::Vldmxcsr => xsave::ldmxcsr,
        M::Stmxcsr | M::Vstmxcsr => xsave::stmxcsr,
        _ => return None,
    })
}

fn ports(i: &Instruction, op: &mut Op, input: bool) -> Handler {
    let dx = |n| is_register(i, n) && i.op_register(n) == iced_x86::Register::DX;
    let data = if input { i.op0_register() } else { i.op1_register() };
    op.size = data.size() as u8;
    match (input, dx(if input { 1 } else { 0 })) {
        (true, true) => sized!(op, sys::input, true),
        (true, false) => sized!(op, sys::input, false),
        (false, true) => sized!(op, sys::output, true),
        (false, false) => sized!(op, sys::output, false),
    }
}

fn far_transfers(i: &Instruction, op: &mut Op) -> Option<Handler> {
    use crate::interrupt;
    let far_size = |i: &Instruction| match i.op0_kind() {
        OpKind::FarBranch16 => 2,
        OpKind::FarBranch32 => 4,
        _ => i.memory_size().size().saturating_sub(2) as u8,
    };
    Some(match i.mnemonic() {
        M::Jmp => {
            op.size = far_size(i);
            sized!(op, far::jmp)
        }
        M::Call => {
            op.size = far_size(i);
            sized!(op, far::call)
        }
        M::Retf => {
            op.size = match i.code() {
                Code::Retfw | Code::Retfw_imm16 => 2,
                Code::Retfd | Code::Retfd_imm16 => 4,
                _ => 8,
            };
            sized!(op, far::ret)
        }
        M::Iret => interrupt::iret::<u16>,
        M::Iretd => interrupt::iret::<u32>,
        M::Iretq => interrupt::iret::<u64>,
        M::Int => {
            op.size = 0;
            interrupt::int
        }
        M::Int3 => {
            (op.imm, op.size) = (3, 1);
            interrupt::int
        }
        M::Into => {
            (op.imm, op.size) = (4, 1);
            interrupt::into
        }
        M::Int1 => interrupt::int1,
        M::Syscall => far::syscall,
        M::Sysret => far::sysret::<false>,
        M::Sysretq => far::sysret::<true>,
        M::Sysenter => far::sysenter,
        M::Sysexit => far::sysexit::<false>,
        M::Sysexitq => far::sysexit::<true>,
        _ => return None,
    })
}

#[rustfmt::skip]
fn descriptors(i: &Instruction, op: &mut Op) -> Option<Handler> {
    use x86::segment::index;
    let (memory, segment0) = (op.memory, is_segment(i));
    Some(match i.mnemonic() {
        M::Mov if segment0 && memory => segment::mov_to::<true>,
        M::Mov if segment0 => segment::mov_to::<false>,
        M::Mov if is_register(i, 1) && i.op1_register().is_segment_register() => rm!(op, segment::mov_from),
        M::Push => { op.size = stack_size(i); sized!(op, segment::push) }
        M::Pop => { op.size = stack_size(i); sized!(op, segment::pop) }
        M::Lds => sized!(op, segment::load_far, { index::DS }),
        M::Les => sized!(op, segment::load_far, { index::ES }),
        M::Lfs => sized!(op, segment::load_far, { index::FS }),
        M::Lgs => sized!(op, segment::load_far, { index::GS }),
        M::Lss => sized!(op, segment::load_far, { index::SS }),
        M::Lgdt | M::Lidt | M::Sgdt | M::Sidt => {
            op.size = match i.code() {
                Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => 2,
                _ => 4,
            };
            match i.mnemonic() {
                M::Lgdt => segment::load_table::<false>,
                M::Lidt => segment::load_table::<true>,
                M::Sgdt => segment::store_table::<false>,
                _ => segment::store_table::<true>,
            }
        }
        M::Sldt => rm!(op, segment::store_system, false),
        M::Str => rm!(op, segment::store_system, true),
        M::Lldt if memory => segment::lldt::<true>,
        M::Lldt => segment::lldt::<false>,
        M::Ltr if memory => segment::ltr::<true>,
        M::Ltr => segment::ltr::<false>,
        M::Lar => rm!(op, segment::ask, 0),
        M::Lsl => rm!(op, segment::ask, 1),
        M::Verr => rm!(op, segment::ask, 2),
        M::Verw => rm!(op, segment::ask, 3),
        M::Arpl if memory => segment::arpl::<true>,
        M::Arpl => segment::arpl::<false>,
        _ => return None,
    })
}

fn privileged(i: &Instruction, op: &mut Op) -> Option<Handler> {
    use x86::segment::index;
    let memory = op.memory;
    Some(match i.mnemonic() {
        M::Mov if is_register(i, 0) && i.op0_register().is_cr() => sys::mov_to_cr,
        M::Mov if is_register(i, 1) && i.op1_register().is_cr() => sys::mov_from_cr,
        M::Mov if is_register(i, 0) && i.op0_register().is_dr() => sys::mov_to_dr,
        M::Mov if is_register(i, 1) && i.op1_register().is_dr() => sys::mov_from_dr,
        M::Cli => sys::cli,
        M::Sti => sys::sti,
        M::Hlt => sys::hlt,
        M::Clts => sys::clts,
        M::Stac => sys::ac::<true>,
        M::Clac => sys::ac::<false>,
        M::Smsw => rm!(op, sys::smsw),
        M::Lmsw if memory => sys::lmsw::<true>,
        M::Lmsw => sys::lmsw::<false>,
        M::Invlpg => sys::invlpg,
        M::Invpcid => sys::invpcid,
        M::Invd | M::Wbinvd | M::Wbnoinvd => sys::wbinvd,
        M::Swapgs => sys::swapgs,
        M::Rdfsbase => sized!(op, sys::rdbase, { index::FS }),
        M::Rdgsbase => sized!(op, sys::rdbase, { index::GS }),
        M::Wrfsbase => sized!(op, sys::wrbase, { index::FS }),
        M::Wrgsbase => sized!(op, sys::wrbase, { index::GS }),
        M::Rdmsr => sys::rdmsr,
        M::Wrmsr => sys::wrmsr,
        M::Rdpmc => sys::gp,
        M::Monitor | M::Mwait => sys::ud,
        M::Rsm => sys::ud,
        _ => return None,
    })
}
