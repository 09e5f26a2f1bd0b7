//! PIT, PM timer, and waiting.

use crate::{
    acpi,
    cpu::{self, inb, inl, outb, rdtsc},
};

/// PIT ticks a second.
pub const PIT_HZ: u64 = 1_193_182;
/// PM timer ticks a second.
pub const PM_HZ: u64 = 3_579_545;
/// Give up after so many TSC cycles: some ten seconds, for two CPUs that race may share one of a busy host.
const PATIENCE: u64 = 36_000_000_000;

/// Programs a PIT channel: mode, and a 16-bit count (0 means 65,536).
pub fn pit(channel: u8, mode: u8, count: u16) {
    outb(0x43, channel << 6 | 0x30 | mode << 1);
    outb(0x40 + u16::from(channel), count as u8);
    outb(0x40 + u16::from(channel), (count >> 8) as u8);
}

/// Latches and reads a PIT channel's count.
pub fn pit_count(channel: u8) -> u16 {
    outb(0x43, channel << 6);
    let port = 0x40 + u16::from(channel);
    let low = inb(port);
    u16::from(low) | u16::from(inb(port)) << 8
}

/// Stops PIT channel 0, after a last edge at once: mode 0 counts down once only.
pub fn pit_stop() {
    pit(0, 0, 1);
}

/// The ACPI PM timer.
#[derive(Clone, Copy)]
pub struct PmTimer {
    port: u16,
    bits: u32,
}

impl PmTimer {
    /// Where the FADT says it is.
    pub fn find() -> Option<Self> {
        acpi::pm_timer().map(|(port, bits)| PmTimer { port, bits })
    }

    /// The counter.
    pub fn read(self) -> u64 {
        u64::from(inl(self.port)) & ((1 << self.bits) - 1)
    }

    /// Ticks from an earlier value to now; less than 4 s must have passed.
    pub fn since(self, earlier: u64) -> u64 {
        self.read().wrapping_sub(earlier) & ((1 << self.bits) - 1)
    }

    /// Waits so many milliseconds, interrupts as they are.
    pub fn wait(self, milliseconds: u64) {
        let begin = self.read();
        let start = rdtsc();
        while self.since(begin) < PM_HZ * milliseconds / 1000 && rdtsc() - start < PATIENCE {
            core::hint::spin_loop();
        }
    }
}

/// Waits with interrupts allowed until something holds; false when patience ends first. Forbids interrupts at the end.
pub fn until(mut holds: impl FnMut() -> bool) -> bool {
    let start = rdtsc();
    cpu::sti();
    loop {
        let done = holds();
        if done || rdtsc() - start > PATIENCE {
            cpu::cli();
            return done;
        }
        core::hint::spin_loop();
    }
}

/// Gives interrupts some ten milliseconds to come; forbids them at the end.
pub fn pause() {
    let start = rdtsc();
    cpu::sti();
    while rdtsc() - start < 40_000_000 {
        core::hint::spin_loop();
    }
    cpu::cli();
}
