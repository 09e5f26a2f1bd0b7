//! What the host's processor and kernel offer.

/// What translated code may use.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// BEXTR.
    pub bmi1: bool,
    /// YMM registers, saved by the kernel too.
    pub avx: bool,
    /// WRGSBASE in user mode.
    pub fsgsbase: bool,
}

/// AT_HWCAP2 bit: the kernel lets user mode write FS and GS base.
const HWCAP2_FSGSBASE: u64 = 1 << 1;

impl Host {
    /// This host's.
    pub fn detect() -> Self {
        // SAFETY: reads a word of the auxiliary vector.
        let hwcap2 = unsafe { libc::getauxval(libc::AT_HWCAP2) };
        Self {
            bmi1: std::arch::is_x86_feature_detected!("bmi1"),
            avx: std::arch::is_x86_feature_detected!("avx"),
            fsgsbase: hwcap2 & HWCAP2_FSGSBASE != 0,
        }
    }

    /// Sets this thread's GS base, which Rust code does not use.
    #[inline]
    pub fn set_gs_base(self, base: u64) {
        if self.fsgsbase {
            // SAFETY: the kernel allows the instruction; nothing in this process but translated code uses GS.
            unsafe { std::arch::asm!("wrgsbase {}", in(reg) base, options(nostack, preserves_flags)) };
        } else {
            const ARCH_SET_GS: libc::c_int = 0x1001;
            // SAFETY: as above.
            unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) };
        }
    }
}
