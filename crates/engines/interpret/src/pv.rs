//! What Linux guests find paravirtual: KVM's clock (Linux, Documentation/virt/kvm/x86/msr.rst). And random numbers.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{SystemTime, UNIX_EPOCH};

use x86::msr;

use crate::core::Core;

/// State of one vCPU's paravirtual side.
#[derive(Default)]
pub struct Pv {
    seed: RandomState,
    drawn: u64,
}

impl Pv {
    /// A random number: SipHash under a key from the host's entropy, of a counter.
    pub fn random(&mut self) -> u64 {
        self.drawn += 1;
        let mut hasher = self.seed.build_hasher();
        hasher.write_u64(self.drawn);
        hasher.finish()
    }
}

/// Whether the TSC is the same on all vCPUs, in `pvclock_vcpu_time_info::flags`.
const TSC_STABLE: u8 = 1;

/// The multiplier and shift by which TSC ticks become nanoseconds: `ns = ((ticks << shift) * mul) >> 32`.
pub fn scale(tsc_khz: u64) -> (u32, i8) {
    let mut hz = u128::from(tsc_khz.max(1)) * 1000;
    let mut shift = 0i8;
    let target = 1_000_000_000u128;
    while hz > target * 2 {
        hz >>= 1;
        shift -= 1;
    }
    while hz <= target {
        hz <<= 1;
        shift += 1;
    }
    (((target << 32) / hz) as u32, shift)
}

impl Core {
    /// Writes the MSRs that KVM's paravirtual interface has.
    pub fn write_kvm_msr(&mut self, number: u32, value: u64) -> Option<()> {
        match number {
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => {
                self.s.msrs.kvm_system_time = value;
                if value & 1 != 0 {
                    self.fill_system_time(value & !1);
                }
            }
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => {
                self.s.msrs.kvm_wall_clock = value;
                self.fill_wall_clock(value);
            }
            msr::KVM_POLL_CONTROL => self.s.msrs.kvm_poll_control = value & 1,
            _ => return None,
        }
        Some(())
    }

    fn store_guest(&mut self, gpa: u64, bytes: &[u8]) {
        for (i, &b) in bytes.iter().enumerate() {
            if let Some(r) =
                self.memory.region(gpa.wrapping_add(i as u64)).filter(|r| r.kind == memory::Kind::Ram)
            {
                let offset = gpa.wrapping_add(i as u64) - r.gpa + r.offset;
                self.hit |= self.memory.store(offset, b);
            }
        }
    }

    /// Fills `pvclock_vcpu_time_info`. The scale never changes, so once is enough.
    fn fill_system_time(&mut self, gpa: u64) {
        let clock = &self.machine.clock;
        let now = clock.now();
        let tsc = clock.tsc_at(now).wrapping_add(self.s.msrs.tsc_offset);
        let (mul, shift) = scale(clock.tsc_khz());
        let mut info = [0; 32];
        info[0..4].copy_from_slice(&2u32.to_le_bytes());
        info[8..16].copy_from_slice(&tsc.to_le_bytes());
        info[16..24].copy_from_slice(&now.to_le_bytes());
        info[24..28].copy_from_slice(&mul.to_le_bytes());
        info[28] = shift as u8;
        info[29] = TSC_STABLE;
        self.store_guest(gpa, &info);
    }

    /// Fills `pvclock_wall_clock`: the time of day when the system time was 0.
    fn fill_wall_clock(&mut self, gpa: u64) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let boot = now.as_nanos().saturating_sub(self.machine.clock.now().into());
        let mut info = [0; 12];
        info[0..4].copy_from_slice(&2u32.to_le_bytes());
        info[4..8].copy_from_slice(&((boot / 1_000_000_000) as u32).to_le_bytes());
        info[8..12].copy_from_slice(&((boot % 1_000_000_000) as u32).to_le_bytes());
        self.store_guest(gpa, &info);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn ticks_scale_to_nanoseconds() {
        for khz in [1_000_000, 2_445_426, 3_999_999, 50_000] {
            let (mul, shift) = super::scale(khz);
            let ticks = u128::from(khz) * 1000;
            let shifted = if shift < 0 { ticks >> -shift } else { ticks << shift };
            let ns = (shifted * u128::from(mul)) >> 32;
            assert!(ns.abs_diff(1_000_000_000) < 3, "{khz} kHz: a second is {ns} ns");
        }
    }
}
