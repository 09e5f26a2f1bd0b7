//! The canonical form of x87, MMX, SSE and AVX registers, and back.

use machine::cpu::Fpu;
use native::SimdState;

/// Registers as engines hand them over.
pub fn to_canonical(s: &SimdState) -> Fpu {
    let mut fpu = Fpu {
        fcw: s.fcw,
        fsw: s.fsw,
        ftw: s.ftw,
        fop: s.fop,
        fip: s.fip,
        fdp: s.fdp,
        mxcsr: s.mxcsr,
        ..Fpu::default()
    };
    for i in 0..8 {
        fpu.st[i].copy_from_slice(&s.fpr[(s.top() + i) % 8].to_le_bytes()[..10]);
    }
    for (to, from) in fpu.ymm.iter_mut().zip(&s.ymm) {
        to[..16].copy_from_slice(&from[0].to_le_bytes());
        to[16..].copy_from_slice(&from[1].to_le_bytes());
    }
    fpu
}

/// Takes registers that an engine handed over.
pub fn from_canonical(fpu: &Fpu) -> SimdState {
    let mut s = SimdState {
        fcw: fpu.fcw,
        fsw: fpu.fsw,
        ftw: fpu.ftw,
        fop: fpu.fop,
        fip: fpu.fip,
        fdp: fpu.fdp,
        // Bits that no processor has would be #GP, on the host's processor too.
        mxcsr: fpu.mxcsr & 0xffff,
        ..SimdState::default()
    };
    for i in 0..8 {
        let mut value = [0; 16];
        value[..10].copy_from_slice(&fpu.st[i]);
        let at = (s.top() + i) % 8;
        s.fpr[at] = u128::from_le_bytes(value);
    }
    for (to, from) in s.ymm.iter_mut().zip(&fpu.ymm) {
        let half = |at: usize| u128::from_le_bytes(std::array::from_fn(|i| from[at + i]));
        *to = [half(0), half(16)];
    }
    s
}
