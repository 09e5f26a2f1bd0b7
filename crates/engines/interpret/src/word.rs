//! The integers that instructions work on.

use crate::core::Core;

/// An operand of 1, 2, 4 or 8 bytes.
pub trait Word: memory::Int + Default + Copy + Eq + 'static {
    /// Bytes.
    const SIZE: u64;
    /// Bits.
    const BITS: u32;
    /// The low bits of `v`.
    fn of(v: u64) -> Self;
    /// Zero-extended.
    fn u(self) -> u64;
    /// Sign-extended.
    fn s(self) -> u64;
    /// Reads register `n` (see [`crate::op::HIGH`]).
    fn get(c: &Core, n: u8) -> Self;
    /// Writes register `n`, as the processor does for this size.
    fn set(c: &mut Core, n: u8, v: Self);
}

macro_rules! word {
    ($t:ty, $s:ty, |$c:ident, $n:ident| $get:expr, |$cs:ident, $ns:ident, $vs:ident| $set:expr) => {
        impl Word for $t {
            const SIZE: u64 = size_of::<$t>() as u64;
            const BITS: u32 = <$t>::BITS;
            #[inline(always)]
            fn of(v: u64) -> Self {
                v as $t
            }
            #[inline(always)]
            fn u(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn s(self) -> u64 {
                self as $s as i64 as u64
            }
            #[inline(always)]
            fn get($c: &Core, $n: u8) -> Self {
                $get
            }
            #[inline(always)]
            fn set($cs: &mut Core, $ns: u8, $vs: Self) {
                $set
            }
        }
    };
}

#[inline(always)]
fn at(n: u8) -> usize {
    usize::from(n & 31)
}

word!(u64, i64, |c, n| c.r[at(n)], |c, n, v| c.r[at(n)] = v);
word!(u32, i32, |c, n| c.r[at(n)] as u32, |c, n, v| c.r[at(n)] = v.into());
word!(u16, i16, |c, n| c.r[at(n)] as u16, |c, n, v| c.r[at(n)] = c.r[at(n)] & !0xffff | u64::from(v));
word!(u8, i8, |c, n| (c.r[at(n)] >> ((n >> 5) * 8)) as u8, |c, n, v| {
    let shift = (n >> 5) * 8;
    c.r[at(n)] = c.r[at(n)] & !(0xff << shift) | u64::from(v) << shift
});
