//! Numbers of model-specific registers (SDM vol. 4; APM vol. 2, appendix A; KVM's from Linux, Documentation/virt/kvm/x86/msr.rst).
#![allow(missing_docs)]

pub const TSC: u32 = 0x10;
pub const PLATFORM_ID: u32 = 0x17;
pub const APIC_BASE: u32 = 0x1b;
pub const FEATURE_CONTROL: u32 = 0x3a;
pub const TSC_ADJUST: u32 = 0x3b;
pub const SPEC_CTRL: u32 = 0x48;
pub const PRED_CMD: u32 = 0x49;
pub const BIOS_UPDT_TRIG: u32 = 0x79;
pub const BIOS_SIGN_ID: u32 = 0x8b;
pub const MTRR_CAP: u32 = 0xfe;
pub const ARCH_CAPABILITIES: u32 = 0x10a;
pub const SYSENTER_CS: u32 = 0x174;
pub const SYSENTER_ESP: u32 = 0x175;
pub const SYSENTER_EIP: u32 = 0x176;
pub const MCG_CAP: u32 = 0x179;
pub const MCG_STATUS: u32 = 0x17a;
pub const MISC_ENABLE: u32 = 0x1a0;
pub const DEBUGCTL: u32 = 0x1d9;
pub const MTRR_PHYS_BASE0: u32 = 0x200;
pub const MTRR_FIX64K_00000: u32 = 0x250;
pub const MTRR_FIX16K_80000: u32 = 0x258;
pub const MTRR_FIX16K_A0000: u32 = 0x259;
pub const MTRR_FIX4K_C0000: u32 = 0x268;
pub const PAT: u32 = 0x277;
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
pub const MC0_CTL: u32 = 0x400;
pub const TSC_DEADLINE: u32 = 0x6e0;
/// First of the 256 MSRs through which an x2APIC is read and written.
pub const X2APIC: u32 = 0x800;
pub const XSS: u32 = 0xda0;
pub const EFER: u32 = 0xc000_0080;
pub const STAR: u32 = 0xc000_0081;
pub const LSTAR: u32 = 0xc000_0082;
pub const CSTAR: u32 = 0xc000_0083;
pub const SFMASK: u32 = 0xc000_0084;
pub const FS_BASE: u32 = 0xc000_0100;
pub const GS_BASE: u32 = 0xc000_0101;
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const TSC_AUX: u32 = 0xc000_0103;
/// Four performance counters' selections and four counts, which every AMD processor has (APM vol. 2, 13.2.1).
pub const AMD_PERFORMANCE: u32 = 0xc001_0000;
/// The last of them.
pub const AMD_PERFORMANCE_LAST: u32 = 0xc001_0007;
pub const AMD_SYSCFG: u32 = 0xc001_0010;
pub const AMD_HWCR: u32 = 0xc001_0015;
pub const AMD_VM_CR: u32 = 0xc001_0114;

pub const KVM_WALL_CLOCK: u32 = 0x11;
pub const KVM_SYSTEM_TIME: u32 = 0x12;
pub const KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
pub const KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
pub const KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;
pub const KVM_STEAL_TIME: u32 = 0x4b56_4d03;
pub const KVM_PV_EOI_EN: u32 = 0x4b56_4d04;
pub const KVM_POLL_CONTROL: u32 = 0x4b56_4d05;

/// The PAT after reset: WB, WT, UC-, UC, twice (SDM vol. 3A, 11.12.4).
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;
