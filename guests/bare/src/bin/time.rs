//! Clocks and timers: that they run, agree roughly, fire when due and not before. Bounds suit a busy emulator.
#![no_std]
#![no_main]

#[path = "time/hpet.rs"]
mod hpet;
#[path = "time/local.rs"]
mod local;

use bare::{
    apic,
    cpu::{self, inb, outb, rdtsc},
    pic,
    report::Report,
    timer::{self, PIT_HZ, PM_HZ, PmTimer},
    trap,
};

bare::guest!(main);

fn main() {
    let mut t = Report::new("time");
    pic::init();
    timer::pit_stop();
    apic::enable();
    apic::write(apic::LVT_LINT0, apic::MASKED);
    for vector in 0x30..0xf0 {
        trap::set_eoi(vector, 1);
    }
    tsc(&mut t);
    pit_counter(&mut t);
    rtc(&mut t);
    match PmTimer::find() {
        Some(pm) => {
            pm_timer(&mut t, pm);
            pit_interrupts(&mut t, pm);
            local::run(&mut t, pm);
            hpet::run(&mut t, pm);
        }
        None => t.check("PM timer in the FADT", false),
    }
    t.end()
}

fn tsc(t: &mut Report) {
    let mut last = rdtsc();
    let mut monotonic = true;
    for _ in 0..20_000 {
        let now = rdtsc();
        monotonic &= now >= last;
        last = now;
    }
    t.check("TSC never goes back", monotonic);
    if cpu::has(0x8000_0001, 3, 27) {
        let before = rdtsc();
        let mut aux = 0;
        // SAFETY: CPUID has it.
        let now = unsafe { core::arch::x86_64::__rdtscp(&mut aux) };
        t.check("RDTSCP follows RDTSC", now >= before && rdtsc() >= now);
        // SAFETY: TSC_AUX is free.
        unsafe { cpu::wrmsr(0xc000_0103, 0x1234) };
        // SAFETY: CPUID has it.
        unsafe { core::arch::x86_64::__rdtscp(&mut aux) };
        t.eq("RDTSCP gives TSC_AUX", aux, 0x1234);
    }
    let (before, msr) = (rdtsc(), cpu::rdmsr(0x10));
    t.tcg("reads as zero").check("IA32_TSC reads the TSC", msr >= before && rdtsc() >= msr);
}

/// Channel 2, whose gate and output port 0x61 has.
fn pit_counter(t: &mut Report) {
    let gate = inb(0x61) & 0xfc;
    outb(0x61, gate | 1);
    timer::pit(2, 0, 11932);
    t.eq("PIT channel 2, output low", inb(0x61) & 0x20, 0);
    let begin = rdtsc();
    t.check("PIT channel 2, output high in the end", timer::until(|| inb(0x61) & 0x20 != 0));
    t.within("10 ms in TSC cycles", rdtsc() - begin, 500_000, 12_000_000_000);

    timer::pit(2, 0, 0xffff);
    let first = timer::pit_count(2);
    t.check("PIT channel 2 counts down", timer::until(|| timer::pit_count(2) < first));
    outb(0x61, gate);
    let held = timer::pit_count(2);
    timer::pause();
    t.tcg("counts on").eq("PIT channel 2, gate low holds the count", timer::pit_count(2), held);
    outb(0x61, gate | 1);
    t.check("PIT channel 2, gate high lets it go on", timer::until(|| timer::pit_count(2) != held));

    // Read-back: status and count of channel 2 together; status first.
    outb(0x43, 0xc0 | 2 << 2);
    let (status, low, high) = (inb(0x42), inb(0x42), inb(0x42));
    t.eq("PIT read-back, mode and access", status & 0x3f, 0x30);
    t.check("PIT read-back, count", u16::from(low) | u16::from(high) << 8 != 0);
    timer::pit(2, 2, 1000);
    let mut largest = 0;
    for _ in 0..2000 {
        largest = largest.max(timer::pit_count(2));
    }
    t.within("PIT mode 2 stays within its period", largest.into(), 1, 1000);
    outb(0x61, gate);
}

fn cmos(register: u8) -> u8 {
    outb(0x70, register);
    inb(0x71)
}

fn rtc(t: &mut Report) {
    let binary = cmos(0x0b) & 4 != 0;
    let value = |register| {
        let v = cmos(register);
        if binary { v } else { (v >> 4) * 10 + (v & 15) }
    };
    t.check("RTC, valid RAM and time", cmos(0x0d) & 0x80 != 0);
    t.within("RTC, month", value(8).into(), 1, 12);
    t.within("RTC, day", value(7).into(), 1, 31);
    t.within("RTC, minute", value(2).into(), 0, 59);
    cmos(0x0c);
    t.check("RTC, update-ended flag", timer::until(|| cmos(0x0c) & 0x10 != 0));
    let first = value(0);
    t.check("RTC, next update", timer::until(|| cmos(0x0c) & 0x10 != 0));
    let step = (value(0) + 60 - first) % 60;
    // A busy host may let more than one pass.
    t.within("RTC, seconds go on", step.into(), 1, 10);
    t.check("RTC, update in progress ends", timer::until(|| cmos(0x0a) & 0x80 == 0));
}

fn pm_timer(t: &mut Report, pm: PmTimer) {
    let first = pm.read();
    t.check("PM timer runs", timer::until(|| pm.since(first) > 1000));
    // 20 ms by the PIT, seen by the PM timer.
    let gate = inb(0x61) & 0xfc;
    outb(0x61, gate | 1);
    let begin = pm.read();
    timer::pit(2, 0, (PIT_HZ / 50) as u16);
    timer::until(|| inb(0x61) & 0x20 != 0);
    t.within("20 ms of the PIT in PM timer ticks", pm.since(begin), PM_HZ / 51, PM_HZ);
    outb(0x61, gate);
    // The TSC's rate, twice: the same within a factor of two.
    let rate = || {
        let (pm_begin, begin) = (pm.read(), rdtsc());
        pm.wait(50);
        (rdtsc() - begin) / (pm.since(pm_begin) / 1000).max(1)
    };
    let (one, two) = (rate(), rate());
    t.within("TSC to PM timer, steady", two, one / 2, one * 2);
}

/// Channel 0 at 100 Hz by the PIC for 300 ms.
fn pit_interrupts(t: &mut Report, pm: PmTimer) {
    trap::set_eoi(0x20, 2);
    apic::write(apic::LVT_LINT0, 0x700);
    pic::unmask(1);
    timer::pit(0, 2, (PIT_HZ / 100) as u16);
    trap::reset_count(0x20);
    let begin = pm.read();
    cpu::sti();
    pm.wait(300);
    let milliseconds = pm.since(begin) * 1000 / PM_HZ;
    let ticks = trap::count(0x20).into();
    cpu::cli();
    t.within("PIT at 100 Hz", ticks, 3, milliseconds / 10 + 3);
    timer::pit_stop();
    pic::unmask(0);
    apic::write(apic::LVT_LINT0, apic::MASKED);
}
