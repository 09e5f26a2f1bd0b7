//! The HPET (IA-PC HPET specification 1.0a).

use bare::{
    acpi, apic, cpu, pic,
    report::Report,
    timer::{self, PM_HZ, PmTimer},
    trap,
};

#[derive(Clone, Copy)]
struct Hpet(u64);

impl Hpet {
    fn read(self, register: u64) -> u64 {
        // SAFETY: device registers, identity-mapped.
        unsafe { ((self.0 + register) as *const u64).read_volatile() }
    }

    fn write(self, register: u64, value: u64) {
        // SAFETY: as read(); it does not master the bus.
        unsafe { ((self.0 + register) as *mut u64).write_volatile(value) };
    }
}

const CONFIG: u64 = 0x10;
const COUNTER: u64 = 0xf0;
const TIMER0: u64 = 0x100;
const COMPARATOR0: u64 = 0x108;

pub fn run(t: &mut Report, pm: PmTimer) {
    let Some(base) = acpi::hpet().filter(|&a| (3 << 30..4 << 30).contains(&a)) else {
        return t.skip("HPET", "no ACPI table for it");
    };
    let hpet = Hpet(base);
    let capabilities = hpet.read(0);
    let period = capabilities >> 32;
    t.within("HPET period, fs", period, 1, 100_000_000);
    t.within("HPET timers", (capabilities >> 8 & 31) + 1, 3, 32);
    hpet.write(CONFIG, 0);
    hpet.write(COUNTER, 0);
    timer::pause();
    t.eq("HPET, stopped", hpet.read(COUNTER), 0);
    hpet.write(CONFIG, 1);
    let (begin, first) = (pm.read(), hpet.read(COUNTER));
    pm.wait(30);
    // Nanoseconds by each.
    let by_hpet = (hpet.read(COUNTER) - first) * (period / 1000) / 1000;
    let by_pm = pm.since(begin) * 1_000_000_000 / PM_HZ;
    t.within("HPET and PM timer, 30 ms", by_hpet, by_pm / 2, by_pm * 2);
    interrupt(t, hpet, pm, period);
    hpet.write(CONFIG, 0);
}

/// Timer 0, one-shot, edge, on the highest pin that it can have.
fn interrupt(t: &mut Report, hpet: Hpet, pm: PmTimer, period: u64) {
    let pins = hpet.read(TIMER0) >> 32 & 0xff_ffff;
    if pins == 0 {
        return t.check("HPET timer 0 has a pin", false);
    }
    let pin = 63 - pins.leading_zeros();
    pic::route(pin, 0x90, apic::id());
    let ticks = 10_000_000_000_000 / period.max(1);
    // Stopped while it is set up: between two writes a comparator may match.
    hpet.write(CONFIG, 0);
    hpet.write(COUNTER, 0);
    hpet.write(COMPARATOR0, ticks);
    hpet.write(TIMER0, u64::from(pin) << 9 | 1 << 2);
    let begin = pm.read();
    hpet.write(CONFIG, 1);
    t.check("HPET timer 0 fires", timer::until(|| trap::count(0x90) != 0));
    t.within("not before its 10 ms", pm.since(begin) * 1000 / PM_HZ, 9, 3000);
    cpu::sti();
    pm.wait(30);
    cpu::cli();
    t.eq("and once", trap::count(0x90), 1);
    if hpet.read(TIMER0) & 1 << 4 != 0 {
        hpet.write(CONFIG, 0);
        hpet.write(COUNTER, 0);
        hpet.write(TIMER0, u64::from(pin) << 9 | 1 << 2 | 1 << 3 | 1 << 6);
        hpet.write(COMPARATOR0, ticks);
        hpet.write(COMPARATOR0, ticks);
        hpet.write(CONFIG, 1);
        t.check("HPET timer 0, periodic", timer::until(|| trap::count(0x90) >= 4));
    }
    hpet.write(TIMER0, 0);
    pic::route(pin, pic::MASKED, 0);
}
