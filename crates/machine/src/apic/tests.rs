use std::sync::Arc;

use super::*;
use crate::irq::{Controllers, Msi};
use crate::irqs::Irqs;
use crate::{Bus, Clock, Registers, Timers};

const ENABLE: u32 = 0x1ff;

struct Bed {
    clock: Arc<Clock>,
    timers: Timers,
    apics: Apics,
    irqs: Arc<Irqs>,
}

fn bed(count: u32) -> Bed {
    let clock = Arc::new(Clock::manual(2_000_000));
    let timers = Timers::new(clock.clone()).unwrap();
    let apics = Apics::new(count, &clock, &timers);
    let irqs = Irqs::new(Arc::new(apics.clone()));
    for n in 0..count {
        apics.local(n).unwrap().write(0xf0, ENABLE);
    }
    Bed { clock, timers, apics, irqs }
}

impl Bed {
    fn local(&self, n: u32) -> Arc<Local> {
        self.apics.local(n).unwrap()
    }

    /// Which processors have `vector` requested.
    fn requested(&self, vector: u8) -> Vec<u32> {
        (0..8).filter(|&n| self.apics.local(n).is_some_and(|l| l.is_active(vector))).collect()
    }
}

#[test]
fn priorities_decide_what_is_delivered() {
    let bed = bed(1);
    let local = bed.local(0);
    for vector in [0x31, 0x51, 0x41] {
        bed.irqs.msi(Msi { address: 0xfee0_0000, data: vector });
    }
    assert_eq!(local.pending(), INTERRUPT);
    assert_eq!(local.acknowledge(), Some(0x51));
    assert_eq!(local.pending(), 0, "0x41 waits for the end of 0x51");
    assert_eq!(local.acknowledge(), None);
    local.write(0xb0, 0);
    local.set_tpr(4);
    assert_eq!(local.pending(), 0, "TPR holds 0x41 back");
    local.set_tpr(3);
    assert_eq!(local.acknowledge(), Some(0x41));
    local.write(0xb0, 0);
    local.set_tpr(0);
    assert_eq!(local.acknowledge(), Some(0x31));
}

#[test]
fn interprocessor_interrupts_reach_whom_they_name() {
    let bed = bed(4);
    let sender = bed.local(1);
    let send = |high: u32, low: u32| {
        sender.write(0x310, high);
        sender.write(0x300, low);
    };
    send(2 << 24, 0x40);
    assert_eq!(bed.requested(0x40), [2]);
    send(0xff << 24, 0x41);
    assert_eq!(bed.requested(0x41), [0, 1, 2, 3]);
    send(0, 1 << 18 | 0x42);
    assert_eq!(bed.requested(0x42), [1]);
    send(0, 3 << 18 | 0x43);
    assert_eq!(bed.requested(0x43), [0, 2, 3]);
    for n in 0..4 {
        bed.local(n).write(0xd0, 1 << (24 + n));
    }
    send(0b1010 << 24, 1 << 11 | 0x44);
    assert_eq!(bed.requested(0x44), [1, 3]);
    for n in 0..4 {
        bed.local(n).write(0xe0, 0x0fff_ffff);
        bed.local(n).write(0xd0, (0x10 * (n / 2) + (1 << (n % 2))) << 24);
    }
    send(0x13 << 24, 1 << 11 | 0x45);
    assert_eq!(bed.requested(0x45), [2, 3], "cluster 1");
    send(3 << 24, 0x4500);
    assert!(bed.local(3).take_events().init);
    send(3 << 24, 0x4612);
    assert_eq!(bed.local(3).take_events(), Events { sipi: Some(0x12), ..Events::default() });
    assert_eq!(bed.local(3).pending() & EVENT, 0);
}

#[test]
fn x2apic_is_entered_and_left_by_the_book() {
    let bed = bed(2);
    let local = bed.local(1);
    let base = local.read_msr(0x1b).unwrap();
    assert_eq!(local.read_msr(0x802), None, "in xAPIC mode its MSRs are not there");
    assert_eq!(local.write_msr(0x1b, base | 1 << 10), Some(()));
    assert_eq!(local.read_msr(0x802), Some(1));
    assert_eq!(local.read_msr(0x80d), Some(2));
    assert_eq!(local.write_msr(0x1b, base), None, "not back to xAPIC");
    assert_eq!(local.write_msr(0x80b, 1), None);
    assert_eq!(local.write_msr(0x83f, 0x55), Some(()));
    assert_eq!(local.acknowledge(), Some(0x55));
    assert_eq!(local.write_msr(0x830, 0x66), Some(()), "to processor 0");
    assert_eq!(bed.requested(0x66), [0]);
    assert_eq!(local.write_msr(0x1b, base & !(1 << 11)), Some(()), "off");
    assert_eq!(local.write_msr(0x1b, base | 1 << 10), None, "not from off to x2APIC");
    assert_eq!(local.write_msr(0x1b, base), Some(()));
}

#[test]
fn timers_count_and_fire() {
    let bed = bed(1);
    let local = bed.local(0);
    local.write(0x3e0, 0x3); // divide by 16
    local.write(0x320, 0x80);
    local.write(0x380, 1000);
    bed.timers.advance(8000);
    assert_eq!(local.read(0x390), 500);
    assert_eq!(local.pending(), 0);
    bed.timers.advance(8000);
    assert_eq!((local.acknowledge(), local.read(0x390)), (Some(0x80), 0));
    local.write(0xb0, 0);

    local.write(0x320, 0x81 | 1 << 17);
    local.write(0x380, 10_000);
    for _ in 0..3 {
        bed.timers.advance(160_000);
        assert_eq!(local.acknowledge(), Some(0x81));
        local.write(0xb0, 0);
    }

    local.write(0x320, 0x82 | 2 << 17);
    bed.timers.advance(1_000_000);
    assert_eq!(local.pending(), 0, "the periodic timer has ended");
    local.write_msr(0x6e0, bed.clock.tsc() + 2000);
    bed.timers.advance(999);
    assert_eq!((local.pending(), local.read_msr(0x6e0)), (0, Some(bed.clock.tsc() + 2)));
    bed.timers.advance(1);
    assert_eq!((local.acknowledge(), local.read_msr(0x6e0)), (Some(0x82), Some(0)));
}

#[test]
fn level_interrupts_come_again_until_the_device_lets_go() {
    let bed = bed(1);
    let (local, line) = (bed.local(0), bed.irqs.line(20));
    let other = bed.irqs.line(20);
    let ioapic = bed.irqs.ioapic();
    ioapic.write(0, 4, 0x10 + 2 * 20);
    ioapic.write(0x10, 4, 0x8000 | 0x70);
    line.set(true);
    other.set(true);
    assert_eq!(local.acknowledge(), Some(0x70));
    assert_eq!(local.acknowledge(), None);
    line.set(false);
    local.write(0xb0, 0);
    assert_eq!(local.acknowledge(), Some(0x70), "the other user still holds the line");
    other.set(false);
    local.write(0xb0, 0);
    assert_eq!(local.pending(), 0);
}

#[test]
fn the_8259s_reach_the_boot_processor_by_virtual_wire() {
    let bed = bed(2);
    let ports = Bus::default();
    bed.irqs.insert(&ports, &Bus::default()).unwrap();
    for (command, data, vectors, wiring) in [(0x20, 0x21, 0x30, 4), (0xa0, 0xa1, 0x38, 2)] {
        ports.write(command, 1, 0x11);
        for icw in [vectors, wiring, 1, 0] {
            ports.write(data, 1, icw);
        }
    }
    let (local, timer, rtc) = (bed.local(0), bed.irqs.line(0), bed.irqs.line(8));
    rtc.pulse();
    assert_eq!(local.pending(), 0, "an edge that is gone before it is acknowledged is none");
    rtc.set(true);
    assert_eq!(local.pending(), INTERRUPT);
    assert_eq!(local.acknowledge(), Some(0x38));
    timer.set(true);
    assert_eq!(local.acknowledge(), Some(0x30), "of higher priority");
    assert_eq!(bed.local(1).pending(), 0, "LINT0 of the others is masked");
    ports.write(0x20, 1, 0x20);
    ports.write(0x20, 1, 0x20);
    ports.write(0xa0, 1, 0x20);
    timer.set(false);
    timer.set(true);
    timer.set(false);
    assert_eq!(bed.irqs.acknowledge(), Some(0x37), "spurious");
    ports.write(0x21, 1, 1);
    timer.set(true);
    assert_eq!(local.pending(), 0, "masked");
}

#[test]
fn garbage_in_every_register_is_survived() {
    let mut x = 0x2545_f491_4f6c_dd1d_u64;
    println!("seed {x:#x}");
    let bed = bed(3);
    let ports = Bus::default();
    let mmio = Bus::default();
    bed.irqs.insert(&ports, &mmio).unwrap();
    for _ in 0..200_000 {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let (local, value) = (bed.local((x >> 8) as u32 % 3), x >> 20);
        match x % 7 {
            0 => local.write((x >> 40) as u16, value as u32),
            1 => drop(local.write_msr(0x800 + (x >> 40) as u32 % 256, value & 0xfff)),
            2 if x & 1 << 63 == 0 => drop(local.write_msr(0x1b, 0xfee0_0000 | value & 0xf00)),
            2 => drop(local.write_msr(0x6e0, x)),
            3 => ports.write([0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1][(x >> 40) as usize % 6], 1, value & 0xff),
            4 => mmio.write(IOAPIC_BASE + [0, 0x10, 0x40][(x >> 40) as usize % 3], 4, value),
            5 => bed.irqs.line((x >> 40) as u8).pulse(),
            _ => {
                local.acknowledge();
                local.read((x >> 40) as u16);
                local.take_events();
                bed.timers.advance(value & 0xffff);
            }
        }
    }
}

#[test]
fn a_deadline_beyond_all_time_does_not_fire() {
    let bed = bed(1);
    let local = bed.local(0);
    local.write(0x320, 0x82 | 2 << 17);
    local.set_tsc_offset(5_000_000_000);
    for deadline in [u64::MAX, 1 << 63] {
        local.write_msr(0x6e0, deadline);
        bed.timers.advance(1_000_000_000);
        assert_eq!((local.pending(), local.read_msr(0x6e0)), (0, Some(deadline)));
    }
    local.write_msr(0x6e0, 4_000_000_000); // long past: the offset alone is more
    bed.timers.advance(0);
    assert_eq!(local.acknowledge(), Some(0x82));
}

#[test]
fn an_apic_that_software_disabled_takes_no_interrupt() {
    let bed = bed(2);
    let lowest = Msi { address: 0xfeef_f000, data: 0x100 | 0x51 };
    bed.local(1).set_tpr(1);
    bed.local(0).write(0xf0, 0xff);
    bed.irqs.msi(lowest);
    assert_eq!(bed.requested(0x51), [1], "0 has the lower priority, but is off");

    let ioapic = bed.irqs.ioapic();
    ioapic.write(0, 4, 0x10 + 2 * 20);
    ioapic.write(0x10, 4, 0x8000 | 0x70); // to processor 0
    bed.irqs.line(20).pulse();
    assert_eq!(ioapic.read(0x10, 4) & 1 << 14, 0, "nobody took it, so none will end it");
}

#[test]
fn lint0_gives_fixed_interrupts_too() {
    let bed = bed(1);
    let (ports, local, timer) = (Bus::default(), bed.local(0), bed.irqs.line(0));
    bed.irqs.insert(&ports, &Bus::default()).unwrap();
    for (port, icw) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3)] {
        ports.write(port, 1, icw);
    }
    local.write(0x350, 0x44);
    timer.set(true);
    assert_eq!(local.acknowledge(), Some(0x44));
    local.write(0xb0, 0);
    assert_eq!(local.pending(), 0, "INTR rose once");
}

#[test]
fn the_second_8259_asks_again_when_it_ends_by_itself() {
    let bed = bed(1);
    let ports = Bus::default();
    bed.irqs.insert(&ports, &Bus::default()).unwrap();
    for (command, data, vectors, wiring) in [(0x20, 0x21, 0x30, 4), (0xa0, 0xa1, 0x38, 2)] {
        ports.write(command, 1, 0x11);
        for icw in [vectors, wiring, 3, 0] {
            ports.write(data, 1, icw); // with automatic EOI
        }
    }
    let (local, lines) = (bed.local(0), [8, 11, 13].map(|gsi| bed.irqs.line(gsi)));
    lines.iter().for_each(|line| line.set(true));
    assert_eq!([0; 4].map(|_| local.acknowledge()), [Some(0x38), Some(0x3b), Some(0x3d), None]);
    lines.iter().for_each(|line| line.set(false));
    lines.iter().for_each(|line| line.set(true));
    for (port, taken) in [(0x20, 0x82), (0xa0, 0x80)] {
        ports.write(port, 1, 0x0c);
        assert_eq!(ports.read(port, 1), taken, "polls take IRQ 8");
    }
    assert_eq!(local.acknowledge(), Some(0x3b));
}

#[test]
fn a_saved_machine_goes_on() {
    let (old, new) = (bed(1), bed(1));
    let line = old.irqs.line(20);
    for bed in [&old, &new] {
        bed.timers.advance(1000);
    }
    let ioapic = old.irqs.ioapic();
    ioapic.write(0, 4, 0x10 + 2 * 20);
    ioapic.write(0x10, 4, 0x8000 | 0x70);
    line.set(true);
    let local = old.local(0);
    assert_eq!(local.acknowledge(), Some(0x70));
    local.write(0x320, 0x90);
    local.write(0x380, 500);
    local.write(0x300, 1 << 18 | 0x400); // an NMI to itself

    let again = new.irqs.line(20);
    new.irqs.set_state(&old.irqs.state());
    new.local(0).set_state(&local.state());
    again.set(true);
    let local = new.local(0);
    assert_eq!(local.take_events(), Events { nmi: true, ..Events::default() });
    new.timers.advance(1000);
    assert_eq!(local.acknowledge(), Some(0x90));
    local.write(0xb0, 0);
    local.write(0xb0, 0);
    assert_eq!(local.acknowledge(), Some(0x70), "the device holds its line still");
}
