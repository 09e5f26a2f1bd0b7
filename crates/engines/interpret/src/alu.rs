//! Two-operand arithmetic, INC to NEG, shifts and rotates: the hot core.

use crate::core::Core;
use crate::flags::Lazy;
use crate::op::{Flow, Op, Result};
use crate::word::Word;

/// An operation on two operands that sets flags.
pub trait Alu {
    /// Whether the first operand is written.
    const WRITES: bool = true;
    /// Computes it and sets the flags.
    fn run<T: Word>(c: &mut Core, a: T, b: T) -> T;
}

macro_rules! alu {
    ($($name:ident, $writes:literal, |$c:ident, $a:ident, $b:ident| $body:expr;)*) => {$(
        /// The instruction of this name.
        pub struct $name;
        impl Alu for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn run<T: Word>($c: &mut Core, $a: T, $b: T) -> T {
                $body
            }
        }
    )*};
}

#[inline(always)]
fn add<T: Word>(c: &mut Core, a: T, b: T, carry: bool) -> T {
    let res = T::of(a.u().wrapping_add(b.u()).wrapping_add(carry.into()));
    c.lazy = Lazy::add(a, b, res);
    res
}

#[inline(always)]
fn sub<T: Word>(c: &mut Core, a: T, b: T, borrow: bool) -> T {
    let res = T::of(a.u().wrapping_sub(b.u()).wrapping_sub(borrow.into()));
    c.lazy = Lazy::sub(a, b, res);
    res
}

#[inline(always)]
fn logic<T: Word>(c: &mut Core, res: u64) -> T {
    let res = T::of(res);
    c.lazy = Lazy::logic(res);
    res
}

alu! {
    Add, true, |c, a, b| add(c, a, b, false);
    Or, true, |c, a, b| logic(c, a.u() | b.u());
    Adc, true, |c, a, b| { let carry = c.lazy.cf(); add(c, a, b, carry) };
    Sbb, true, |c, a, b| { let borrow = c.lazy.cf(); sub(c, a, b, borrow) };
    And, true, |c, a, b| logic(c, a.u() & b.u());
    Sub, true, |c, a, b| sub(c, a, b, false);
    Xor, true, |c, a, b| logic(c, a.u() ^ b.u());
    Cmp, false, |c, a, b| sub(c, a, b, false);
    Test, false, |c, a, b| logic(c, a.u() & b.u());
}

/// `op r/m, r`.
pub fn rm_r<T: Word, A: Alu, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let b = T::get(c, op.src);
    rm_value::<T, A, M>(c, op, b)
}

/// `op r/m, imm`.
pub fn rm_i<T: Word, A: Alu, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    rm_value::<T, A, M>(c, op, T::of(op.imm))
}

#[inline(always)]
fn rm_value<T: Word, A: Alu, const M: bool>(c: &mut Core, op: &Op, b: T) -> Result<Flow> {
    if A::WRITES {
        c.modify_rm::<T, M>(op, |c, a| A::run(c, a, b))
    } else {
        let a = c.get_rm::<T, M>(op, op.dst)?;
        A::run(c, a, b);
        Ok(Flow::Next)
    }
}

/// `op r, m`.
pub fn r_m<T: Word, A: Alu>(c: &mut Core, op: &Op) -> Result<Flow> {
    let b = c.load::<T>(op)?;
    let a = T::get(c, op.dst);
    let res = A::run(c, a, b);
    if A::WRITES {
        T::set(c, op.dst, res);
    }
    Ok(Flow::Next)
}

/// INC, and DEC with `D`: CF stays.
pub fn inc<T: Word, const D: bool, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.modify_rm::<T, M>(op, |c, a| {
        let cf = c.lazy.cf();
        let one = T::of(1);
        let res = if D { sub(c, a, one, false) } else { add(c, a, one, false) };
        c.lazy = c.lazy.with_cf(cf);
        res
    })
}

/// NEG.
pub fn neg<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.modify_rm::<T, M>(op, |c, a| sub(c, T::of(0), a, false))
}

/// NOT.
pub fn not<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.modify_rm::<T, M>(op, |_, a| T::of(!a.u()))
}

/// A shift or rotate by a count that is already masked to 5 or 6 bits and not 0.
pub trait Shift {
    /// Computes it and sets the flags.
    fn run<T: Word>(c: &mut Core, a: T, n: u32) -> T;
}

/// SHL.
pub struct Shl;
/// SHR.
pub struct Shr;
/// SAR.
pub struct Sar;
/// ROL.
pub struct Rol;
/// ROR.
pub struct Ror;
/// RCL.
pub struct Rcl;
/// RCR.
pub struct Rcr;

#[inline(always)]
fn sign<T: Word>(v: u64) -> bool {
    v >> (T::BITS - 1) & 1 != 0
}

impl Shift for Shl {
    #[inline(always)]
    fn run<T: Word>(c: &mut Core, a: T, n: u32) -> T {
        let res = T::of(a.u() << n);
        // For counts beyond the width, the processor shifts zeroes through CF.
        let cf = n <= T::BITS && a.u() >> (T::BITS - n) & 1 != 0;
        c.lazy = Lazy::shift(res, cf, sign::<T>(res.u()) != cf);
        res
    }
}

impl Shift for Shr {
    #[inline(always)]
    fn run<T: Word>(c: &mut Core, a: T, n: u32) -> T {
        let res = T::of(a.u() >> n);
        let cf = a.u() >> (n - 1) & 1 != 0;
        // OF for a count of 1 is the operand's sign; this is what processors give for other counts too.
        c.lazy = Lazy::shift(res, cf, sign::<T>(res.u() ^ (res.u() << 1)));
        res
    }
}

impl Shift for Sar {
    #[inline(always)]
    fn run<T: Word>(c: &mut Core, a: T, n: u32) -> T {
        let wide = a.s() as i64;
        let res = T::of((wide >> n.min(63)) as u64);
        let cf = (wide >> (n - 1).min(63)) & 1 != 0;
        c.lazy = Lazy::shift(res, cf, false);
        res
    }
}

impl Shift for Rol {
    #[inline(always)]
    fn run<T: Word>(c: &mut Core, a: T, n: u32) -> T {
        let n = n % T::BITS;
        let res = if n == 0 { a } else { T::of(a.u() << n | a.u() >> (T::BITS - n)) };
        let cf = res.u() & 1 != 0;
        c.lazy = c.lazy.with_cf_of(cf, sign::<T>(res.u()) != cf);
        res
    }
}

impl Shift for Ror {
    #[inline(always)]
    fn run<T: Word>(c: &mut Core, a: T, n: u32) -> T {
        let n = n % T::BITS;
        let res = if n == 0 { a } else { T::of(a.u() >> n | a.u() << (T::BITS - n)) };
        let cf = sign::<T>(res.u());
        c.lazy = c.lazy.with_cf_of(cf, sign::<T>(res.u() ^ (res.u() << 1)));
        res
    }
}

/// Rotates CF and, below it, `a` to the left by `n`, which is at most their width; the new `a` and CF.
#[inline(always)]
fn through_carry<T: Word>(cf: bool, a: T, n: u32) -> (T, bool) {
    let wide = u128::from(cf) << T::BITS | u128::from(a.u());
    let turned = wide << n | wide >> (T::BITS + 1 - n);
    (T::of(turned as u64), turned >> T::BITS & 1 != 0)
}

impl Shift for Rcl {
    #[inline(always)]
    fn run<T: Word>(c: &mut Core, a: T, n: u32) -> T {
        let n = n % (T::BITS + 1);
        if n == 0 {
            return a;
        }
        let (res, cf) = through_carry(c.lazy.cf(), a, n);
        c.lazy = c.lazy.with_cf_of(cf, sign::<T>(res.u()) != cf);
        res
    }
}

impl Shift for Rcr {
    #[inline(always)]
    fn run<T: Word>(c: &mut Core, a: T, n: u32) -> T {
        let n = n % (T::BITS + 1);
        if n == 0 {
            return a;
        }
        let (res, cf) = through_carry(c.lazy.cf(), a, T::BITS + 1 - n);
        c.lazy = c.lazy.with_cf_of(cf, sign::<T>(res.u() ^ (res.u() << 1)));
        res
    }
}

#[inline(always)]
fn shift<T: Word, S: Shift, const M: bool>(c: &mut Core, op: &Op, count: u64) -> Result<Flow> {
    let n = (count & if T::SIZE == 8 { 63 } else { 31 }) as u32;
    if n == 0 {
        // A count of 0 changes no flag; the operand is still accessed, and a 32-bit register's upper half cleared.
        return c.modify_rm::<T, M>(op, |_, a| a);
    }
    c.modify_rm::<T, M>(op, |c, a| S::run(c, a, n))
}

/// `op r/m, imm8`.
pub fn shift_i<T: Word, S: Shift, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    shift::<T, S, M>(c, op, op.imm)
}

/// `op r/m, cl`.
pub fn shift_cl<T: Word, S: Shift, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let count = c.r[x86::gpr::RCX];
    shift::<T, S, M>(c, op, count)
}

/// SHLD, and SHRD with `R`; `CL` takes the count from CL.
pub fn double_shift<T: Word, const R: bool, const CL: bool, const M: bool>(
    c: &mut Core,
    op: &Op,
) -> Result<Flow> {
    let count = if CL { c.r[x86::gpr::RCX] } else { op.imm };
    let n = (count & if T::SIZE == 8 { 63 } else { 31 }) as u32;
    let fill = T::get(c, op.src).u();
    c.modify_rm::<T, M>(op, |c, a| {
        if n == 0 {
            return a;
        }
        // Counts beyond 16 of 16-bit operands are undefined by the manual; processors shift in the pattern again.
        let (a, bits) = (a.u(), T::BITS);
        let (res, cf) = if R {
            let wide = u128::from(a) | u128::from(fill) << bits | u128::from(a) << (2 * bits).min(127);
            ((wide >> n) as u64, wide >> (n - 1) & 1 != 0)
        } else if n <= bits {
            let low = if n == bits { fill } else { a << n | fill >> (bits - n) };
            (low, a >> (bits - n) & 1 != 0)
        } else {
            let n = n - bits;
            (fill << n | a >> (bits - n), fill >> (bits - n) & 1 != 0)
        };
        let res = T::of(res);
        c.lazy = Lazy::shift(res, cf, sign::<T>(res.u() ^ a));
        res
    })
}
