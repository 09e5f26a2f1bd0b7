//! Many threads at once: no lock is waited for in a circle, and nobody sleeps through an interrupt.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::irq::Msi;
use crate::irqs::Irqs;
use crate::{Bus, Clock, Registers, Timers};

/// Far longer than any of these takes: whoever waits so long is stuck.
const STUCK: Duration = Duration::from_secs(60);

/// Runs `f` on a thread of its own, and fails if it never ends.
fn finishes(f: impl FnOnce() + Send + 'static) {
    let (done, ended) = mpsc::channel();
    let thread = thread::spawn(move || {
        f();
        let _ = done.send(());
    });
    match ended.recv_timeout(STUCK) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("a deadlock, or a lost wake-up"),
        _ => thread.join().unwrap(),
    }
}

fn machine(count: u32) -> (Timers, Apics, Arc<Irqs>) {
    let clock = Arc::new(Clock::host(2_000_000));
    let timers = Timers::new(clock.clone()).unwrap();
    let apics = Apics::new(count, &clock, &timers);
    let irqs = Irqs::new(Arc::new(apics.clone()));
    (0..count).for_each(|n| apics.local(n).unwrap().write(0xf0, 0x1ff));
    (timers, apics, irqs)
}

#[test]
fn nobody_sleeps_through_an_interrupt() {
    finishes(|| {
        let (_timers, apics, _irqs) = machine(2);
        let players = [0, 1].map(|me| {
            let (local, other) = (apics.local(me).unwrap(), (1 - me) << 24);
            thread::spawn(move || {
                for turn in 0..20_000 {
                    if turn > 0 || me == 0 {
                        local.write(0x310, other);
                        local.write(0x300, 0x50);
                    }
                    while local.acknowledge().is_none() {
                        local.wait(true);
                    }
                    local.write(0xb0, 0);
                }
                // The last ball of player 1 has been sent; that of player 0 is the one it waited for.
                local.write(0x310, other);
                local.write(0x300, 0x50);
            })
        });
        players.into_iter().for_each(|player| player.join().unwrap());
    });
}

#[test]
fn four_processors_and_their_devices_do_not_block_each_other() {
    finishes(|| {
        let (timers, apics, irqs) = machine(4);
        let (ports, mmio) = (Bus::default(), Bus::default());
        irqs.insert(&ports, &mmio).unwrap();
        for icw in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3), (0x21, 0)] {
            ports.write(icw.0, 1, icw.1);
        }
        for pin in 16..24u64 {
            for (register, value) in [(0x11 + 2 * pin, (pin % 4) << 56 >> 32), (0x10 + 2 * pin, 0x8060 + pin)]
            {
                irqs.ioapic().write(0, 4, register);
                irqs.ioapic().write(0x10, 4, value);
            }
        }
        let (stop, taken) = (Arc::new(AtomicBool::new(false)), AtomicU64::new(0));
        thread::scope(|scope| {
            for me in 0..4u32 {
                let (local, irqs, ports, stop, taken) =
                    (apics.local(me).unwrap(), &irqs, &ports, &stop, &taken);
                scope.spawn(move || {
                    let lines = [0, 4, 17, 20 + me as u8].map(|gsi| irqs.line(gsi));
                    local.write(0x320, 0x90 | 1 << 17);
                    local.write(0x380, 30_000);
                    let mut x = 0x9e37_79b9_7f4a_7c15_u64 + u64::from(me);
                    while !stop.load(Ordering::Relaxed) {
                        x ^= x << 13;
                        x ^= x >> 7;
                        x ^= x << 17;
                        match x >> 8 & 7 {
                            0 => local.write(0x300, 3 << 18 | 0x40 | me),
                            1 => irqs.msi(Msi { address: 0xfeef_f000, data: 0x150 }),
                            2..=4 => lines[(x >> 16) as usize & 3].set(x >> 20 & 1 != 0),
                            5 => ports.write(0x21, 1, x >> 16 & 0x12),
                            6 => local.set_tpr((x >> 16) as u8 & 7),
                            _ => local.wait(true), // the periodic timer ends it, if nothing else
                        }
                        local.set_tpr(0);
                        local.take_events();
                        while local.pending() & INTERRUPT != 0 && local.acknowledge().is_some() {
                            local.write(0xb0, 0);
                            taken.fetch_add(1, Ordering::Relaxed);
                            lines.iter().for_each(|line| line.set(false));
                            if stop.load(Ordering::Relaxed) {
                                break;
                            }
                        }
                    }
                });
            }
            let end = Instant::now() + Duration::from_secs(1);
            while Instant::now() < end {
                thread::sleep(Duration::from_millis(5));
                irqs.set_state(&irqs.state());
                (0..4).for_each(|n| apics.local(n).unwrap().kick());
            }
            stop.store(true, Ordering::Relaxed);
            (0..4).for_each(|n| apics.local(n).unwrap().kick());
        });
        drop(timers);
        assert!(taken.into_inner() > 1000, "interrupts got through");
    });
}
