//! The six status flags, kept as the last result and its carries, and worked out when somebody asks.

use x86::flags::{AF, CF, OF, PF, SF, ZF};

use crate::word::Word;

/// Status flags, lazily.
///
/// `aux` holds CF in bit 63; CF^OF in bit 62 (for an addition: the carries out of and into the sign bit, which fall out
/// of one expression); SF's difference from `res`'s sign in bit 61; AF in bit 3; in bits 8 to 15 a byte that PF's parity
/// takes in besides `res`. The last two make every combination of flags possible.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lazy {
    /// Sign-extended result: zero exactly if ZF.
    pub res: u64,
    /// The rest.
    pub aux: u64,
}

const TOP: u64 = 3 << 62;

impl Lazy {
    /// After a bitwise operation: CF, OF and AF clear.
    #[inline(always)]
    pub fn logic<T: Word>(res: T) -> Self {
        Self { res: res.s(), aux: 0 }
    }

    /// With the vector of carries out of each bit.
    #[inline(always)]
    pub fn carries<T: Word>(res: T, carries: u64) -> Self {
        Self { res: res.s(), aux: (carries << (64 - T::BITS)) & TOP | carries & 8 }
    }

    /// After `a + b (+ carry) = res`.
    #[inline(always)]
    pub fn add<T: Word>(a: T, b: T, res: T) -> Self {
        let (a, b, r) = (a.u(), b.u(), res.u());
        Self::carries(res, (a & b) | ((a | b) & !r))
    }

    /// After `a - b (- borrow) = res`.
    #[inline(always)]
    pub fn sub<T: Word>(a: T, b: T, res: T) -> Self {
        let (a, b, r) = (a.u(), b.u(), res.u());
        Self::carries(res, (!a & b) | ((!a | b) & r))
    }

    /// With a result's SF, ZF and PF, and these CF and OF; AF clear.
    #[inline(always)]
    pub fn shift<T: Word>(res: T, cf: bool, of: bool) -> Self {
        Self { res: res.s(), aux: u64::from(cf) << 63 | u64::from(cf ^ of) << 62 }
    }

    /// The carry flag.
    #[inline(always)]
    pub fn cf(self) -> bool {
        self.aux >> 63 != 0
    }

    /// The overflow flag.
    #[inline(always)]
    pub fn of(self) -> bool {
        (self.aux ^ (self.aux << 1)) >> 63 != 0
    }

    /// The zero flag.
    #[inline(always)]
    pub fn zf(self) -> bool {
        self.res == 0
    }

    /// The sign flag.
    #[inline(always)]
    pub fn sf(self) -> bool {
        (self.res ^ (self.aux << 2)) >> 63 != 0
    }

    /// The parity flag.
    #[inline(always)]
    pub fn pf(self) -> bool {
        ((self.res ^ (self.aux >> 8)) as u8).count_ones() & 1 == 0
    }

    /// The auxiliary carry flag.
    #[inline(always)]
    pub fn af(self) -> bool {
        self.aux & 8 != 0
    }

    /// These flags with CF as given.
    #[inline(always)]
    pub fn with_cf(self, cf: bool) -> Self {
        self.with_cf_of(cf, self.of())
    }

    /// These flags with CF and OF as given.
    #[inline(always)]
    pub fn with_cf_of(self, cf: bool, of: bool) -> Self {
        Self { res: self.res, aux: self.aux & !TOP | u64::from(cf) << 63 | u64::from(cf ^ of) << 62 }
    }

    /// The flags in their places in RFLAGS.
    pub fn bits(self) -> u64 {
        let bit = |set: bool, flag: u64| if set { flag } else { 0 };
        bit(self.cf(), CF)
            | bit(self.pf(), PF)
            | bit(self.af(), AF)
            | bit(self.zf(), ZF)
            | bit(self.sf(), SF)
            | bit(self.of(), OF)
    }

    /// From RFLAGS.
    pub fn from_bits(flags: u64) -> Self {
        let cf = flags & CF != 0;
        let of = flags & OF != 0;
        let res = if flags & ZF != 0 { 0 } else { 1 << 32 };
        let pdb = if flags & PF != 0 { 0 } else { 1 << 8 };
        let aux = u64::from(cf) << 63
            | u64::from(cf ^ of) << 62
            | u64::from(flags & SF != 0) << 61
            | if flags & AF != 0 { 8 } else { 0 }
            | pdb;
        Self { res, aux }
    }

    /// Condition `cc` of Jcc, SETcc and CMOVcc (SDM vol. 2D, table B-10).
    #[inline(always)]
    pub fn condition(self, cc: u8) -> bool {
        let holds = match cc >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() || self.sf() != self.of(),
        };
        holds != (cc & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_survives() {
        for n in 0..64u64 {
            let bits = [CF, PF, AF, ZF, SF, OF];
            let flags: u64 = (0..6).filter(|i| n >> i & 1 != 0).map(|i| bits[i]).sum();
            assert_eq!(Lazy::from_bits(flags).bits(), flags);
            assert_eq!(Lazy::from_bits(flags).with_cf(true).bits(), flags | CF);
        }
    }

    #[test]
    fn additions_and_subtractions_as_the_manual_has_them() {
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                let sum = Lazy::add(a, b, a.wrapping_add(b));
                assert_eq!(sum.cf(), a.checked_add(b).is_none());
                assert_eq!(sum.of(), (a as i8).checked_add(b as i8).is_none());
                assert_eq!(sum.af(), (a & 15) + (b & 15) > 15);
                let difference = Lazy::sub(a, b, a.wrapping_sub(b));
                assert_eq!(difference.cf(), a < b);
                assert_eq!(difference.of(), (a as i8).checked_sub(b as i8).is_none());
                assert_eq!(difference.af(), (a & 15) < (b & 15));
                assert_eq!(difference.sf(), (a.wrapping_sub(b) as i8) < 0);
            }
        }
    }
}
