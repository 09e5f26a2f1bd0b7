//! Which CPUID features listed instructions may belong to, and whether the host has them.

use iced_x86::CpuidFeature;

/// Whether instructions of `feature` may be listed at all.
pub(crate) fn known(feature: CpuidFeature) -> bool {
    present(feature).is_some()
}

/// Whether the host's processor, and system, offer `feature`.
pub(crate) fn host_has(feature: CpuidFeature) -> bool {
    present(feature) == Some(true)
}

fn present(feature: CpuidFeature) -> Option<bool> {
    use CpuidFeature::*;
    macro_rules! has {
        ($name:tt) => {
            std::arch::is_x86_feature_detected!($name)
        };
    }
    Some(match feature {
        // Part of every x86-64 processor.
        FPU | FPU287 | FPU387 | CMOV | MMX | SSE | SSE2 | FXSR => true,
        SSE3 => has!("sse3"),
        SSSE3 => has!("ssse3"),
        SSE4_1 => has!("sse4.1"),
        SSE4_2 => has!("sse4.2"),
        SSE4A => has!("sse4a"),
        AES => has!("aes"),
        PCLMULQDQ => has!("pclmulqdq"),
        SHA => has!("sha"),
        AVX => has!("avx"),
        AVX2 => has!("avx2"),
        FMA => has!("fma"),
        F16C => has!("f16c"),
        VAES => has!("vaes"),
        VPCLMULQDQ => has!("vpclmulqdq"),
        GFNI => has!("gfni"),
        BMI1 => has!("bmi1"),
        BMI2 => has!("bmi2"),
        ADX => has!("adx"),
        LZCNT => has!("lzcnt"),
        POPCNT => has!("popcnt"),
        _ => return None,
    })
}
