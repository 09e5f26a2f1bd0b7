//! The LAPIC timer.

use bare::{
    apic::{self, LVT_TIMER, MASKED, TIMER_CURRENT, TIMER_DIVIDE, TIMER_INITIAL},
    cpu::{self, rdtsc},
    report::Report,
    timer::{self, PM_HZ, PmTimer},
    trap,
};

const PERIODIC: u32 = 1 << 17;
const DEADLINE: u32 = 1 << 18;
const TSC_DEADLINE: u32 = 0x6e0;
/// Divide by 1, by 16.
const BY_1: u32 = 0b1011;
const BY_16: u32 = 0b0011;

pub fn run(t: &mut Report, pm: PmTimer) {
    let rate = counter(t, pm);
    one_shot(t, pm, rate);
    periodic(t, pm, rate);
    deadline(t, pm);
    apic::write(LVT_TIMER, MASKED);
    apic::write(TIMER_INITIAL, 0);
}

/// Ticks a millisecond, undivided.
fn counter(t: &mut Report, pm: PmTimer) -> u64 {
    apic::write(LVT_TIMER, MASKED);
    let rate = |divide| {
        apic::write(TIMER_DIVIDE, divide);
        apic::write(TIMER_INITIAL, u32::MAX);
        let begin = pm.read();
        pm.wait(20);
        let passed = u64::from(u32::MAX - apic::read(TIMER_CURRENT));
        passed * PM_HZ / 1000 / pm.since(begin).max(1)
    };
    let slow = rate(BY_16);
    let fast = rate(BY_1);
    t.check("LAPIC timer counts", slow > 0);
    t.within("LAPIC timer, divide by 1 to by 16", fast, slow * 8, slow * 32);
    apic::write(TIMER_INITIAL, 0);
    t.eq("LAPIC timer, 0 stops it", apic::read(TIMER_CURRENT), 0);
    fast
}

fn one_shot(t: &mut Report, pm: PmTimer, rate: u64) {
    apic::write(LVT_TIMER, 0x80);
    let begin = pm.read();
    apic::write(TIMER_INITIAL, (rate * 10).min(u32::MAX.into()) as u32);
    t.check("LAPIC timer, one-shot fires", timer::until(|| trap::count(0x80) != 0));
    t.within("not before its 10 ms", pm.since(begin) * 1000 / PM_HZ, 7, 2000);
    pm_wait_enabled(pm, 30);
    t.eq("and once", (trap::count(0x80), apic::read(TIMER_CURRENT)), (1, 0));

    apic::write(LVT_TIMER, 0x81 | MASKED);
    apic::write(TIMER_INITIAL, 1000);
    pm_wait_enabled(pm, 10);
    t.eq("LAPIC timer, masked", trap::count(0x81), 0);

    // Halted, nothing but the timer to wake it.
    apic::write(LVT_TIMER, 0x82);
    apic::write(TIMER_INITIAL, (rate * 5).min(u32::MAX.into()) as u32);
    while trap::count(0x82) == 0 {
        cpu::wait_for_interrupt();
    }
    t.eq("LAPIC timer ends HLT", trap::count(0x82), 1);
}

fn pm_wait_enabled(pm: PmTimer, milliseconds: u64) {
    cpu::sti();
    pm.wait(milliseconds);
    cpu::cli();
}

fn periodic(t: &mut Report, pm: PmTimer, rate: u64) {
    apic::write(LVT_TIMER, 0x83 | PERIODIC);
    let begin = pm.read();
    apic::write(TIMER_INITIAL, (rate * 10).min(u32::MAX.into()) as u32);
    t.check("LAPIC timer, periodic", timer::until(|| trap::count(0x83) >= 5));
    t.within("5 periods of 10 ms", pm.since(begin) * 1000 / PM_HZ, 35, 4000);
    apic::write(TIMER_INITIAL, 0);
    pm_wait_enabled(pm, 5);
    trap::reset_count(0x83);
    pm_wait_enabled(pm, 30);
    t.eq("LAPIC timer, stopped", trap::count(0x83), 0);
}

fn deadline(t: &mut Report, pm: PmTimer) {
    if !cpu::has(1, 2, 24) {
        return t.skip("TSC-deadline timer", "not in CPUID");
    }
    let begin = rdtsc();
    pm.wait(20);
    let per_ms = (rdtsc() - begin) / 20;
    apic::write(LVT_TIMER, 0x84 | DEADLINE);
    // SDM 3A, 11.5.4.1: a fence between the memory-mapped write and the MSR's.
    // SAFETY: a fence; then the LAPIC timer.
    let arm = |tsc: u64| unsafe {
        core::arch::x86_64::_mm_mfence();
        cpu::wrmsr(TSC_DEADLINE, tsc);
    };
    let due = rdtsc() + per_ms * 10;
    arm(due);
    t.eq("TSC deadline reads back", cpu::rdmsr(TSC_DEADLINE), due);
    t.check("TSC deadline fires", timer::until(|| trap::count(0x84) != 0));
    t.check("not before", rdtsc() >= due);
    t.eq("TSC deadline, 0 afterwards", cpu::rdmsr(TSC_DEADLINE), 0);
    arm(1);
    t.check("TSC deadline in the past fires at once", timer::until(|| trap::count(0x84) == 2));
    arm(rdtsc() + per_ms * 20);
    arm(0);
    pm_wait_enabled(pm, 60);
    t.eq("TSC deadline disarmed", trap::count(0x84), 2);
    apic::write(LVT_TIMER, 0x84);
    arm(rdtsc() + per_ms);
    t.eq("TSC deadline in another mode is ignored", cpu::rdmsr(TSC_DEADLINE), 0);
}
