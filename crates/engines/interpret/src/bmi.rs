//! BMI1 and BMI2: VEX-encoded integer instructions, for which no vector state need be enabled.

use x86::cpuid::Feature;
use x86::gpr::RDX;

use crate::core::Core;
use crate::flags::Lazy;
use crate::op::{Flow, Op, Result};
use crate::word::Word;

/// ANDN.
pub fn andn<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.need(Feature::BMI1)?;
    let b = c.get_rm::<T, M>(op, op.third)?.u();
    let res = T::of(!T::get(c, op.src).u() & b);
    c.lazy = Lazy::logic(res);
    T::set(c, op.dst, res);
    Ok(Flow::Next)
}

/// BEXTR.
pub fn bextr<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.need(Feature::BMI1)?;
    let a = c.get_rm::<T, M>(op, op.src)?.u();
    let control = T::get(c, op.third).u();
    let (start, len) = (control as u8, (control >> 8) as u8);
    let v = if start > 63 { 0 } else { a >> start };
    let res = T::of(if len > 63 { v } else { v & ((1 << len) - 1) });
    c.lazy = Lazy::logic(res);
    T::set(c, op.dst, res);
    Ok(Flow::Next)
}

/// BLSR (0), BLSMSK (1), BLSI (2).
pub fn bls<T: Word, const K: u8, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.need(Feature::BMI1)?;
    let a = c.get_rm::<T, M>(op, op.src)?.u();
    let less = a.wrapping_sub(1);
    let res = T::of(match K {
        0 => a & less,
        1 => a ^ less,
        _ => a & a.wrapping_neg(),
    });
    let cf = if K == 2 { a != 0 } else { a == 0 };
    c.lazy = Lazy::shift(res, cf, false);
    T::set(c, op.dst, res);
    Ok(Flow::Next)
}

/// BZHI.
pub fn bzhi<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.need(Feature::BMI2)?;
    let a = c.get_rm::<T, M>(op, op.src)?.u();
    let n = u32::from(T::get(c, op.third).u() as u8);
    let res = T::of(if n >= T::BITS { a } else { a & ((1 << n) - 1) });
    c.lazy = Lazy::shift(res, n >= T::BITS, false);
    T::set(c, op.dst, res);
    Ok(Flow::Next)
}

/// MULX.
pub fn mulx<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.need(Feature::BMI2)?;
    let b = c.get_rm::<T, M>(op, op.third)?.u();
    let p = u128::from(T::get(c, RDX as u8).u()) * u128::from(b);
    // The high half is written last: it wins when both are one register.
    T::set(c, op.src, T::of(p as u64));
    T::set(c, op.dst, T::of((p >> T::BITS) as u64));
    Ok(Flow::Next)
}

/// PDEP, and PEXT with `X`.
pub fn pdep<T: Word, const X: bool, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.need(Feature::BMI2)?;
    let mut mask = c.get_rm::<T, M>(op, op.third)?.u();
    let v = T::get(c, op.src).u();
    let (mut res, mut n) = (0, 0);
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        if X {
            res |= u64::from(v & lowest != 0) << n;
        } else if v >> n & 1 != 0 {
            res |= lowest;
        }
        mask ^= lowest;
        n += 1;
    }
    T::set(c, op.dst, T::of(res));
    Ok(Flow::Next)
}

/// RORX.
pub fn rorx<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.need(Feature::BMI2)?;
    let a = c.get_rm::<T, M>(op, op.src)?.u();
    let n = op.imm as u32 & (T::BITS - 1);
    T::set(c, op.dst, if n == 0 { T::of(a) } else { T::of(a >> n | a << (T::BITS - n)) });
    Ok(Flow::Next)
}

/// SHLX (0), SHRX (1), SARX (2).
pub fn shx<T: Word, const K: u8, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.need(Feature::BMI2)?;
    let a = c.get_rm::<T, M>(op, op.src)?;
    let n = T::get(c, op.third).u() as u32 & (T::BITS - 1);
    let res = match K {
        0 => a.u() << n,
        1 => a.u() >> n,
        _ => ((a.s() as i64) >> n) as u64,
    };
    T::set(c, op.dst, T::of(res));
    Ok(Flow::Next)
}
