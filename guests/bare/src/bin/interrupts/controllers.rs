//! PIC by the LAPIC's LINT0, and IOAPIC, with PIT, RTC and COM1 as sources.

use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

use bare::{
    apic::{self, LVT_LINT0},
    cpu::{inb, outb},
    pic::{self, LEVEL, LOGICAL, MASKED, REMOTE},
    report::Report,
    timer,
    trap::{self, Frame},
};

const EXTINT: u32 = 0x700;

static STATE: AtomicU32 = AtomicU32::new(0);

pub fn run(t: &mut Report) {
    pic_path(t);
    slave(t);
    ioapic_registers(t);
    ioapic_edge(t);
    ioapic_level(t);
}

fn see_service(_: &mut Frame) -> bool {
    STATE.store(pic::in_service().into(), SeqCst);
    false
}

fn pic_path(t: &mut Report) {
    t.eq("PIC masks as written", (inb(0x21), inb(0xa1)), (0xff, 0xff));
    trap::set_eoi(0x20, 2);
    trap::hook(0x20, Some(see_service));
    apic::write(LVT_LINT0, EXTINT);
    timer::pit(0, 0, 1000);
    timer::until(|| pic::requested() & 1 != 0);
    t.eq("PIC, masked line is requested only", (pic::requested() & 1, trap::count(0x20)), (1, 0));
    pic::unmask(1);
    t.check("PIC, IRQ 0 arrives", timer::until(|| trap::count(0x20) != 0));
    timer::pause();
    t.eq("PIC, it comes once", trap::count(0x20), 1);
    t.eq("PIC, in service in its handler", STATE.load(SeqCst), 1);
    t.eq("PIC, not in service after EOI", pic::in_service(), 0);

    trap::hook(0x20, None);
    trap::reset_count(0x20);
    timer::pit(0, 2, 11932);
    t.check("PIC, a periodic PIT", timer::until(|| trap::count(0x20) >= 5));
    apic::write(LVT_LINT0, EXTINT | apic::MASKED);
    timer::pause();
    trap::reset_count(0x20);
    timer::pause();
    t.eq("LINT0 masked", trap::count(0x20), 0);
    timer::pit_stop();
    pic::unmask(0);
    apic::write(LVT_LINT0, EXTINT);
}

fn cmos(register: u8) -> u8 {
    outb(0x70, register);
    inb(0x71)
}

fn set_cmos(register: u8, value: u8) {
    outb(0x70, register);
    outb(0x71, value);
}

/// Each periodic RTC interrupt needs a read of register C.
fn on_rtc(_: &mut Frame) -> bool {
    STATE.store(u32::from(pic::in_service()) << 8 | u32::from(cmos(0x0c)), SeqCst);
    false
}

fn slave(t: &mut Report) {
    trap::set_eoi(0x28, 3);
    trap::hook(0x28, Some(on_rtc));
    let (a, b) = (cmos(0x0a), cmos(0x0b));
    set_cmos(0x0a, a & 0xf0 | 6);
    set_cmos(0x0b, b & 0x8f | 0x40);
    cmos(0x0c);
    pic::unmask(0x104);
    t.check("PIC, IRQ 8 by the cascade", timer::until(|| trap::count(0x28) >= 3));
    let state = STATE.load(SeqCst);
    t.eq("PIC, both in service", state >> 8, 0x104);
    t.eq("RTC, flags in register C", state & 0xc0, 0xc0);
    set_cmos(0x0b, b);
    cmos(0x0c);
    pic::unmask(0);
    trap::hook(0x28, None);
    apic::write(LVT_LINT0, EXTINT | apic::MASKED);
}

fn ioapic_registers(t: &mut Report) {
    let version = pic::ioapic(1);
    t.check("IOAPIC version", matches!(version & 0xff, 0x11 | 0x20));
    t.within("IOAPIC pins", (version >> 16 & 0xff).into(), 23, 239);
    for pin in 0..24 {
        pic::route(pin, MASKED, 0);
    }
    pic::set_ioapic(0x10 + 2 * 20, MASKED | LEVEL | 0x77);
    pic::set_ioapic(0x11 + 2 * 20, 0x0500_0000);
    let entry = (pic::routed(20), pic::ioapic(0x11 + 2 * 20));
    t.eq("IOAPIC entry reads as written", entry, (MASKED | LEVEL | 0x77, 0x0500_0000));
    pic::set_ioapic(0x10 + 2 * 20, MASKED | REMOTE | 1 << 12);
    t.eq("IOAPIC status bits are read-only", pic::routed(20), MASKED);
    pic::route(20, MASKED, 0);
}

fn ioapic_edge(t: &mut Report) {
    let once = |low: u32, destination: u32, vector: u64| {
        trap::reset_count(vector);
        pic::route(2, low | vector as u32, destination);
        timer::pit(0, 0, 1000);
        let arrived = timer::until(|| trap::count(vector) != 0);
        timer::pause();
        arrived && trap::count(vector) == 1
    };
    t.check("IOAPIC, PIT on pin 2, once", once(0, apic::id(), 0x61));
    t.check("IOAPIC, logical destination", once(LOGICAL, 1, 0x62));
    t.check("IOAPIC, lowest priority", once(LOGICAL | 1 << 8, 1, 0x63));
    trap::reset_count(0x64);
    pic::route(2, MASKED | 0x64, apic::id());
    timer::pit(0, 0, 1000);
    timer::pause();
    t.eq("IOAPIC, masked", trap::count(0x64), 0);
    pic::route(2, 0x65, apic::id());
    timer::pit(0, 2, 11932);
    t.check("IOAPIC, a periodic PIT", timer::until(|| trap::count(0x65) >= 5));
    timer::pit_stop();
    pic::route(2, MASKED, 0);
    timer::pause();
}

/// COM1 keeps its line up until its cause is gone, which is so at the third interrupt.
fn on_serial(_: &mut Frame) -> bool {
    STATE.store(pic::routed(4), SeqCst);
    if trap::count(0x66) == 3 {
        outb(0x3f9, 0);
    }
    false
}

fn ioapic_level(t: &mut Report) {
    trap::hook(0x66, Some(on_serial));
    outb(0x3fc, 0x0b);
    pic::route(4, LEVEL | 0x66, apic::id());
    outb(0x3f9, 2);
    t.check("IOAPIC, level: comes again while the line is up", timer::until(|| trap::count(0x66) >= 3));
    timer::pause();
    t.eq("IOAPIC, level: ends with the line", trap::count(0x66), 3);
    t.check("IOAPIC, remote IRR in the handler", STATE.load(SeqCst) & REMOTE != 0);
    t.eq("IOAPIC, remote IRR after EOI", pic::routed(4) & REMOTE, 0);
    pic::route(4, MASKED, 0);
    outb(0x3f9, 0);
    outb(0x3fc, 3);
    trap::hook(0x66, None);
}
