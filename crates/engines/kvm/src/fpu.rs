//! x87, SSE and AVX state, between the canonical form and the XSAVE area (SDM vol. 1, 13.4; non-compacted).

use kvm_bindings::kvm_xsave;
use machine::cpu::Fpu;
use x86::control::xcr0;

/// Offset of XSTATE_BV, in the XSAVE header.
const XSTATE_BV: usize = 512;
/// Offset of the upper halves of YMM0–15. CPUID leaf 0xd gives it; every processor with AVX has it here, and so does Linux.
const YMM_HIGH: usize = 576;

/// The bytes of an XSAVE area.
type Area = [u8; 4096];

fn bytes(xsave: &kvm_xsave) -> Area {
    let mut area = [0; 4096];
    for (to, from) in area.chunks_exact_mut(4).zip(&xsave.region) {
        to.copy_from_slice(&from.to_le_bytes());
    }
    area
}

fn get<const N: usize>(area: &Area, at: usize) -> [u8; N] {
    std::array::from_fn(|i| area[at + i])
}

/// Reads an XSAVE area.
pub fn from_xsave(xsave: &kvm_xsave) -> Fpu {
    let area = bytes(xsave);
    let present = u64::from_le_bytes(get(&area, XSTATE_BV));
    let mut fpu = Fpu::default();
    if present & xcr0::X87 != 0 {
        fpu.fcw = u16::from_le_bytes(get(&area, 0));
        fpu.fsw = u16::from_le_bytes(get(&area, 2));
        fpu.ftw = area[4];
        fpu.fop = u16::from_le_bytes(get(&area, 6));
        fpu.fip = u64::from_le_bytes(get(&area, 8));
        fpu.fdp = u64::from_le_bytes(get(&area, 16));
        fpu.st = std::array::from_fn(|i| get(&area, 32 + 16 * i));
    }
    // MXCSR belongs to SSE and AVX alike.
    if present & (xcr0::SSE | xcr0::AVX) != 0 {
        fpu.mxcsr = u32::from_le_bytes(get(&area, 24));
    }
    for (i, ymm) in fpu.ymm.iter_mut().enumerate() {
        if present & xcr0::SSE != 0 {
            ymm[..16].copy_from_slice(&get::<16>(&area, 160 + 16 * i));
        }
        if present & xcr0::AVX != 0 {
            ymm[16..].copy_from_slice(&get::<16>(&area, YMM_HIGH + 16 * i));
        }
    }
    fpu
}

/// Writes an XSAVE area for a guest whose processor has the components `features` (bits of XCR0).
pub fn to_xsave(fpu: &Fpu, features: u64) -> kvm_xsave {
    let mut area: Area = [0; 4096];
    let mut put = |at: usize, bytes: &[u8]| area[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &fpu.fcw.to_le_bytes());
    put(2, &fpu.fsw.to_le_bytes());
    put(4, &[fpu.ftw]);
    put(6, &fpu.fop.to_le_bytes());
    put(8, &fpu.fip.to_le_bytes());
    put(16, &fpu.fdp.to_le_bytes());
    put(24, &fpu.mxcsr.to_le_bytes());
    for i in 0..8 {
        put(32 + 16 * i, &fpu.st[i]);
    }
    for (i, ymm) in fpu.ymm.iter().enumerate() {
        put(160 + 16 * i, &ymm[..16]);
        put(YMM_HIGH + 16 * i, &ymm[16..]);
    }
    let present = (features & xcr0::AVX) | xcr0::X87 | xcr0::SSE;
    put(XSTATE_BV, &present.to_le_bytes());
    let mut xsave = kvm_xsave::default();
    for (to, from) in xsave.region.iter_mut().zip(area.chunks_exact(4)) {
        *to = u32::from_le_bytes([from[0], from[1], from[2], from[3]]);
    }
    xsave
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Fpu {
        let mut fpu = Fpu {
            fcw: 0x27f,
            fsw: 0x3800,
            ftw: 0x81,
            fop: 0x123,
            fip: 0x1122_3344_5566,
            fdp: 7,
            mxcsr: 0x1fa0,
            ..Fpu::default()
        };
        for i in 0..8 {
            fpu.st[i] = std::array::from_fn(|j| (16 * i + j) as u8);
        }
        for i in 0..16 {
            fpu.ymm[i] = std::array::from_fn(|j| (i * 32 + j) as u8);
        }
        fpu
    }

    #[test]
    fn there_and_back() {
        assert_eq!(from_xsave(&to_xsave(&sample(), xcr0::X87 | xcr0::SSE | xcr0::AVX)), sample());
    }

    #[test]
    fn absent_components_are_in_their_initial_state() {
        let mut xsave = to_xsave(&sample(), 7);
        xsave.region[XSTATE_BV / 4] = 0;
        assert_eq!(from_xsave(&xsave), Fpu::default());
        xsave.region[XSTATE_BV / 4] = xcr0::AVX as u32;
        let fpu = from_xsave(&xsave);
        assert_eq!((fpu.fcw, fpu.mxcsr), (0x37f, 0x1fa0));
        assert_eq!((fpu.ymm[3][0], fpu.ymm[3][16]), (0, 3 * 32 + 16));
    }

    #[test]
    fn places_are_those_of_the_manual() {
        // SDM vol. 1, tables 10-2 and 13-1.
        let area = bytes(&to_xsave(&sample(), 7));
        assert_eq!(area[0..2], 0x27fu16.to_le_bytes());
        assert_eq!(area[24..28], 0x1fa0u32.to_le_bytes());
        assert_eq!(area[48], 16, "ST(1)");
        assert_eq!(area[176], 32, "XMM1");
        assert_eq!(area[592], 48, "YMM1's upper half");
    }
}
