//! Interrupts from their sources, through PIC, IOAPIC and LAPIC, to the instruction boundary that takes them.
#![no_std]
#![no_main]

#[path = "interrupts/boundary.rs"]
mod boundary;
#[path = "interrupts/controllers.rs"]
mod controllers;
#[path = "interrupts/local.rs"]
mod local;

use bare::{
    apic::{self, LVT_LINT0, MASKED},
    pic,
    report::Report,
    timer, trap,
};

bare::guest!(main);

fn main() {
    let mut t = Report::new("interrupts");
    // The firmware's last tick must be over before the PIC forgets it.
    pic::init();
    timer::pit_stop();
    timer::pause();
    pic::init();
    apic::enable();
    apic::write(LVT_LINT0, MASKED);
    for vector in 0x30..0xf0 {
        trap::set_eoi(vector, 1);
    }
    local::run(&mut t);
    boundary::run(&mut t);
    controllers::run(&mut t);
    local::x2apic(&mut t);
    t.eq("no spurious interrupt", trap::count(0xff), 0);
    t.end()
}
