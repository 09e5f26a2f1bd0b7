//! Random numbers that find edges.

use native::SimdState;

/// xorshift64*: small, and the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `bound`, which is not 0.
    pub fn below(&mut self, bound: u32) -> u32 {
        (self.bits() >> 32) as u32 % bound
    }

    /// One time in `n`.
    pub fn one_in(&mut self, n: u32) -> bool {
        self.below(n) == 0
    }

    /// An integer, often at an edge.
    pub fn integer(&mut self) -> u64 {
        const EDGES: [u64; 12] = [
            0,
            1,
            2,
            u64::MAX,
            1 << 63,
            i64::MAX as u64,
            0x8000_0000,
            0x7fff_ffff,
            0x8000,
            0x7fff,
            0x80,
            0x7f,
        ];
        let value = self.bits();
        match self.below(6) {
            0 => value & 0xff,
            1 => EDGES[value as usize % EDGES.len()],
            2 => value & self.bits() & self.bits(),
            3 => value >> self.below(64),
            _ => value,
        }
    }

    /// A floating-point number with a sign, often at an edge.
    fn float(&mut self, exponent_bits: u32, fraction_bits: u32) -> u64 {
        let bias: u64 = (1 << (exponent_bits - 1)) - 1;
        let top: u64 = (1 << exponent_bits) - 1;
        let exponent = match self.below(8) {
            0 => 0,
            1 => top,
            2 => 1 + u64::from(self.below(2)),
            3 => top - 1 - u64::from(self.below(2)),
            4 => bias + u64::from(self.below(66)),
            5 => u64::from(self.below(top as u32 + 1)),
            _ => bias - 4 + u64::from(self.below(8)),
        };
        let ones = (1 << fraction_bits) - 1;
        let fraction = match self.below(5) {
            0 => 0,
            1 => 1 << self.below(fraction_bits),
            2 => ones - u64::from(self.below(2)),
            _ => self.bits() & ones,
        };
        (self.bits() >> 63) << (exponent_bits + fraction_bits) | (exponent & top) << fraction_bits | fraction
    }

    /// 16 bytes of integers, singles, doubles or noise.
    pub fn vector(&mut self) -> u128 {
        let mut bytes = [0; 16];
        match self.below(4) {
            0 => {
                bytes.chunks_mut(4).for_each(|p| p.copy_from_slice(&(self.float(8, 23) as u32).to_le_bytes()))
            }
            1 => bytes.chunks_mut(8).for_each(|p| p.copy_from_slice(&self.float(11, 52).to_le_bytes())),
            2 => bytes.chunks_mut(8).for_each(|p| p.copy_from_slice(&self.integer().to_le_bytes())),
            _ => bytes.chunks_mut(8).for_each(|p| p.copy_from_slice(&self.bits().to_le_bytes())),
        }
        u128::from_le_bytes(bytes)
    }

    fn extended(&mut self) -> u128 {
        let (edges, n) = ([0, 1, 0x7ffe, 0x7fff], self.below(4) as usize);
        let exponent = match self.below(4) {
            0 => self.bits() >> 49,
            1 => edges[n],
            _ => 0x3fff - 8 + u64::from(self.below(80)),
        };
        let integer = if exponent != 0 && !self.one_in(8) { 1 << 63 } else { 0 };
        let fraction = self.float(11, 52) << 11 & !(1 << 63);
        let sign = self.bits() & 0x8000;
        u128::from(exponent & 0x7fff | sign) << 64 | u128::from(integer | fraction)
    }

    /// A whole x87, MMX, SSE and AVX state.
    pub fn simd(&mut self) -> SimdState {
        let mut state = SimdState::default();
        for half in state.ymm.iter_mut().flatten() {
            *half = self.vector();
        }
        for register in &mut state.fpr {
            *register = self.extended();
        }
        if self.one_in(3) {
            state.mxcsr = self.bits() as u32 & 0xffff;
        } else {
            state.mxcsr = 0x1f80 | self.bits() as u32 & 0xe03f;
        }
        state.fcw = if self.one_in(3) {
            0x040 | self.bits() as u16 & 0xf3f
        } else {
            0x07f | self.bits() as u16 & 0xf00
        };
        let pending = if self.one_in(8) { 0x3f } else { state.fcw & 0x3f };
        state.fsw = self.bits() as u16 & (0x7f40 | pending);
        if state.fsw & !state.fcw & 0x3f != 0 {
            state.fsw |= 0x8080;
        }
        state.ftw = if self.one_in(2) { 0xff } else { self.bits() as u8 };
        state
    }
}
