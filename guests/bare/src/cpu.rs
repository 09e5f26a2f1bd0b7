//! One function per privileged instruction, and who runs us.

use core::arch::{asm, x86_64::__cpuid_count};

use crate::acpi;

macro_rules! port {
    ($read:ident, $write:ident, $type:ty, $in:literal, $out:literal, $reg:tt) => {
        /// Reads an I/O port.
        pub fn $read(port: u16) -> $type {
            let value: $type;
            // SAFETY: a device's answer touches no memory of ours.
            unsafe { asm!($in, in("dx") port, out($reg) value, options(nomem, nostack, preserves_flags)) };
            value
        }

        /// Writes an I/O port.
        pub fn $write(port: u16, value: $type) {
            // SAFETY: no device here masters the bus into our memory.
            unsafe { asm!($out, in("dx") port, in($reg) value, options(nomem, nostack, preserves_flags)) };
        }
    };
}
port!(inb, outb, u8, "in al, dx", "out dx, al", "al");
port!(inw, outw, u16, "in ax, dx", "out dx, ax", "ax");
port!(inl, outl, u32, "in eax, dx", "out dx, eax", "eax");

macro_rules! control {
    ($read:ident, $write:ident, $in:literal, $out:literal) => {
        /// Reads the register.
        pub fn $read() -> u64 {
            let value: u64;
            // SAFETY: reading changes nothing.
            unsafe { asm!($in, out(reg) value, options(nostack)) };
            value
        }

        /// Writes the register.
        ///
        /// # Safety
        /// The code that runs must still be mapped and legal with the new value.
        pub unsafe fn $write(value: u64) {
            // SAFETY: the caller's promise.
            unsafe { asm!($out, in(reg) value, options(nostack)) };
        }
    };
}
control!(cr0, set_cr0, "mov {}, cr0", "mov cr0, {}");
control!(cr2, set_cr2, "mov {}, cr2", "mov cr2, {}");
control!(cr3, set_cr3, "mov {}, cr3", "mov cr3, {}");
control!(cr4, set_cr4, "mov {}, cr4", "mov cr4, {}");
control!(cr8, set_cr8, "mov {}, cr8", "mov cr8, {}");
control!(dr0, set_dr0, "mov {}, dr0", "mov dr0, {}");
control!(dr1, set_dr1, "mov {}, dr1", "mov dr1, {}");
control!(dr2, set_dr2, "mov {}, dr2", "mov dr2, {}");
control!(dr3, set_dr3, "mov {}, dr3", "mov dr3, {}");
control!(dr6, set_dr6, "mov {}, dr6", "mov dr6, {}");
control!(dr7, set_dr7, "mov {}, dr7", "mov dr7, {}");

/// CR0 bits.
pub const CR0_TS: u64 = 1 << 3;
/// Write protect.
pub const CR0_WP: u64 = 1 << 16;
/// Alignment mask.
pub const CR0_AM: u64 = 1 << 18;
/// CR4 bits: global pages.
pub const CR4_PGE: u64 = 1 << 7;
/// Process-context identifiers.
pub const CR4_PCIDE: u64 = 1 << 17;
/// Supervisor-mode execution prevention.
pub const CR4_SMEP: u64 = 1 << 20;
/// Supervisor-mode access prevention.
pub const CR4_SMAP: u64 = 1 << 21;

/// MSRs.
pub const EFER: u32 = 0xc000_0080;
/// SYSCALL segments.
pub const STAR: u32 = 0xc000_0081;
/// SYSCALL entry.
pub const LSTAR: u32 = 0xc000_0082;
/// SYSCALL entry from compatibility mode.
pub const CSTAR: u32 = 0xc000_0083;
/// RFLAGS that SYSCALL clears.
pub const SFMASK: u32 = 0xc000_0084;
/// FS base.
pub const FS_BASE: u32 = 0xc000_0100;
/// GS base.
pub const GS_BASE: u32 = 0xc000_0101;
/// What SWAPGS exchanges with the GS base.
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Reads an MSR.
pub fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading changes nothing; an unknown MSR raises an exception that a test catches.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR.
///
/// # Safety
/// The code that runs must still be legal with the new value.
pub unsafe fn wrmsr(msr: u32, value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack))
    };
}

/// CPUID: [EAX, EBX, ECX, EDX].
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = __cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// Bit `bit` of register `register` (0 = EAX … 3 = EDX) of a CPUID leaf; no when the leaf does not exist.
pub fn has(leaf: u32, register: usize, bit: u32) -> bool {
    cpuid(leaf & 0x8000_0000, 0)[0] >= leaf && cpuid(leaf, 0)[register] >> bit & 1 != 0
}

/// Whether the CPU calls itself Intel's; AMD's (and compatible ones) otherwise.
pub fn is_intel() -> bool {
    cpuid(0, 0)[1] == u32::from_le_bytes(*b"Genu")
}

/// Whether CMPXCHG16B exists.
pub fn has_cx16() -> bool {
    has(1, 2, 13)
}

/// Number of physical address bits.
pub fn physical_bits() -> u32 {
    if cpuid(0x8000_0000, 0)[0] >= 0x8000_0008 { cpuid(0x8000_0008, 0)[0] & 0xff } else { 36 }
}

/// Whether QEMU's translator runs the guest, as CPUID leaf 0x4000_0000 says; or it runs the hypervisor below, which
/// the word `on-tcg` on the command line has to say.
pub fn on_tcg() -> bool {
    let [_, b, c, d] = if has(1, 2, 31) { cpuid(0x4000_0000, 0) } else { [0; 4] };
    [b, c, d] == [b"TCGT", b"CGTC", b"GTCG"].map(|s| u32::from_le_bytes(*s))
        || acpi::command_line_has(b"on-tcg")
}

/// Reads the time-stamp counter, after all earlier instructions.
pub fn rdtsc() -> u64 {
    // SAFETY: both are available on every 64-bit CPU and change nothing.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    }
}

/// Drops the translation of one page.
pub fn invlpg(address: u64) {
    // SAFETY: at worst a page walk more.
    unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack, preserves_flags)) };
}

/// Allows interrupts.
pub fn sti() {
    // SAFETY: every vector has a handler from start() on.
    unsafe { asm!("sti") };
}

/// Forbids interrupts.
pub fn cli() {
    // SAFETY: changes no memory.
    unsafe { asm!("cli") };
}

/// Allows interrupts, sleeps until one came, forbids them.
pub fn wait_for_interrupt() {
    // SAFETY: every vector has a handler from start() on.
    unsafe { asm!("sti", "hlt", "cli") };
}

/// RFLAGS.
pub fn flags() -> u64 {
    let value: u64;
    // SAFETY: pushes and pops one word.
    unsafe { asm!("pushfq", "pop {}", out(reg) value) };
    value
}
