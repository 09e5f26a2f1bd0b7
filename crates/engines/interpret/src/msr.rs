//! Model-specific registers.

use x86::control::{cr0, efer};
use x86::cpuid::{Feature, Vendor};
use x86::msr;
use x86::segment::index;

use crate::core::Core;
use crate::mmu::canonical;

/// Eight variable-range MTRRs, fixed ranges, write-combining.
const MTRR_CAP: u64 = 8 | 1 << 8 | 1 << 10;

/// Memory types that PAT and MTRRs may hold.
fn memory_type(t: u64, pat: bool) -> bool {
    matches!(t, 0 | 1 | 4 | 5 | 6) || pat && t == 7
}

impl Core {
    fn fixed_mtrr(number: u32) -> Option<usize> {
        Some(match number {
            msr::MTRR_FIX64K_00000 => 0,
            msr::MTRR_FIX16K_80000 => 1,
            msr::MTRR_FIX16K_A0000 => 2,
            msr::MTRR_FIX4K_C0000..0x270 => 3 + (number - msr::MTRR_FIX4K_C0000) as usize,
            _ => return None,
        })
    }

    /// Reads an MSR; `None` for those that are not there.
    pub fn read_msr(&mut self, number: u32) -> Option<u64> {
        let m = &self.s.msrs;
        Some(match number {
            msr::TSC => self.tsc(),
            msr::TSC_ADJUST if self.cpuid.has(Feature::TSC_ADJUST) => m.tsc_adjust,
            msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC..0x900 => return self.local.read_msr(number),
            msr::PLATFORM_ID | msr::BIOS_SIGN_ID | msr::MCG_STATUS | 0 | 1 => 0,
            msr::MCG_CAP => 0,
            msr::FEATURE_CONTROL => 1,
            msr::MTRR_CAP => MTRR_CAP,
            msr::SYSENTER_CS => m.sysenter_cs,
            msr::SYSENTER_ESP => m.sysenter_esp,
            msr::SYSENTER_EIP => m.sysenter_eip,
            msr::MISC_ENABLE => m.misc_enable,
            msr::DEBUGCTL => 0,
            msr::MTRR_PHYS_BASE0..0x210 => m.mtrr_variable[(number - msr::MTRR_PHYS_BASE0) as usize],
            msr::MTRR_FIX64K_00000..0x270 => m.mtrr_fixed[Self::fixed_mtrr(number)?],
            msr::PAT => m.pat,
            msr::MTRR_DEF_TYPE => m.mtrr_def_type,
            msr::XSS if self.cpuid.has(Feature::XSAVES) => m.xss,
            msr::EFER => self.s.efer,
            msr::STAR => m.star,
            msr::LSTAR => m.lstar,
            msr::CSTAR => m.cstar,
            msr::SFMASK => m.sfmask,
            msr::FS_BASE => self.s.segments[index::FS].base,
            msr::GS_BASE => self.s.segments[index::GS].base,
            msr::KERNEL_GS_BASE => m.kernel_gs_base,
            msr::TSC_AUX if self.cpuid.has(Feature::RDTSCP) || self.cpuid.has(Feature::RDPID) => m.tsc_aux,
            // The counters never count.
            msr::AMD_SYSCFG
            | msr::AMD_HWCR
            | msr::AMD_VM_CR
            | msr::AMD_PERFORMANCE..=msr::AMD_PERFORMANCE_LAST
                if self.cpuid.vendor() == Vendor::Amd =>
            {
                0
            }
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => m.kvm_system_time,
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => m.kvm_wall_clock,
            msr::KVM_POLL_CONTROL => m.kvm_poll_control,
            _ => return None,
        })
    }

    /// Writes an MSR; `None` is #GP(0).
    pub fn write_msr(&mut self, number: u32, value: u64) -> Option<()> {
        let address = |v: u64| canonical(v).then_some(v);
        match number {
            msr::TSC => {
                let delta = value.wrapping_sub(self.tsc());
                self.move_tsc(delta);
            }
            msr::TSC_ADJUST if self.cpuid.has(Feature::TSC_ADJUST) => {
                self.move_tsc(value.wrapping_sub(self.s.msrs.tsc_adjust));
            }
            msr::APIC_BASE => {
                self.local.write_msr(number, value)?;
                // The page of its registers may have moved.
                self.tlb.flush_all();
                self.context_changed();
            }
            msr::TSC_DEADLINE | msr::X2APIC..0x900 => return self.local.write_msr(number, value),
            msr::BIOS_UPDT_TRIG | msr::BIOS_SIGN_ID | msr::MCG_STATUS | msr::DEBUGCTL => {}
            msr::SYSENTER_CS => self.s.msrs.sysenter_cs = value & 0xffff_ffff,
            msr::SYSENTER_ESP => self.s.msrs.sysenter_esp = address(value)?,
            msr::SYSENTER_EIP => self.s.msrs.sysenter_eip = address(value)?,
            msr::MISC_ENABLE => self.s.msrs.misc_enable = value,
            msr::MTRR_PHYS_BASE0..0x210 => {
                self.s.msrs.mtrr_variable[(number - msr::MTRR_PHYS_BASE0) as usize] = value;
            }
            msr::MTRR_FIX64K_00000..0x270 => {
                if !value.to_le_bytes().iter().all(|&t| memory_type(t.into(), false)) {
                    return None;
                }
                self.s.msrs.mtrr_fixed[Self::fixed_mtrr(number)?] = value;
            }
            msr::MTRR_DEF_TYPE => {
                if value & !0xcff != 0 || !memory_type(value & 0xff, false) {
                    return None;
                }
                self.s.msrs.mtrr_def_type = value;
            }
            msr::PAT => {
                if !value.to_le_bytes().iter().all(|&t| memory_type(t.into(), true)) {
                    return None;
                }
                self.s.msrs.pat = value;
            }
            msr::XSS if self.cpuid.has(Feature::XSAVES) && value == 0 => self.s.msrs.xss = 0,
            msr::EFER => return self.write_efer(value),
            msr::STAR => self.s.msrs.star = value,
            msr::LSTAR => self.s.msrs.lstar = address(value)?,
            msr::CSTAR => self.s.msrs.cstar = address(value)?,
            msr::SFMASK => self.s.msrs.sfmask = value & 0xffff_ffff,
            msr::FS_BASE => self.set_base(index::FS, address(value)?),
            msr::GS_BASE => self.set_base(index::GS, address(value)?),
            msr::KERNEL_GS_BASE => self.s.msrs.kernel_gs_base = address(value)?,
            msr::TSC_AUX if self.cpuid.has(Feature::RDTSCP) || self.cpuid.has(Feature::RDPID) => {
                if value >> 32 != 0 {
                    return None;
                }
                self.s.msrs.tsc_aux = value;
            }
            msr::AMD_SYSCFG | msr::AMD_HWCR | msr::AMD_PERFORMANCE..=msr::AMD_PERFORMANCE_LAST
                if self.cpuid.vendor() == Vendor::Amd => {}
            _ => return self.write_kvm_msr(number, value),
        }
        Some(())
    }

    fn move_tsc(&mut self, by: u64) {
        let m = &mut self.s.msrs;
        m.tsc_offset = m.tsc_offset.wrapping_add(by);
        m.tsc_adjust = m.tsc_adjust.wrapping_add(by);
        self.local.set_tsc_offset(m.tsc_offset);
    }

    fn write_efer(&mut self, value: u64) -> Option<()> {
        let has = |f, bit| if self.cpuid.has(f) { bit } else { 0 };
        let defined = has(Feature::SYSCALL, efer::SCE)
            | has(Feature::LM, efer::LME | efer::LMA)
            | has(Feature::NX, efer::NXE)
            | has(Feature::FXSR_OPT, efer::FFXSR);
        let old = self.s.efer;
        let lme_changes = (old ^ value) & efer::LME != 0;
        if value & !defined != 0 || lme_changes && self.s.cr0 & cr0::PG != 0 {
            return None;
        }
        // LMA follows from LME and CR0.PG alone.
        self.s.efer = value & !efer::LMA | old & efer::LMA;
        if (old ^ value) & efer::NXE != 0 {
            self.tlb.flush_all();
        }
        self.code_segment_changed();
        Some(())
    }
}
