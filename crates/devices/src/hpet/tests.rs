use super::*;
use crate::testing::{Probe, batter, probe, through_json, time};
use std::sync::mpsc;

struct Bed {
    hpet: Arc<Hpet>,
    pins: Vec<Arc<Probe>>,
    messages: mpsc::Receiver<Msi>,
    timers: Timers,
}

fn bed() -> Bed {
    let (clock, timers) = time();
    let (lines, pins): (Vec<_>, Vec<_>) = (0..24).map(|_| probe()).unzip();
    // One pin for each GSI, whichever comparator holds it.
    let (tx, messages) = mpsc::channel();
    let tx = Mutex::new(tx);
    let hpet = Hpet::new(
        |gsi| lines[usize::from(gsi)].clone(),
        move |msi| lock(&tx).send(msi).unwrap_or(()),
        clock,
        &timers,
    );
    Bed { hpet, pins, messages, timers }
}

const CONFIG: u64 = 0x10;
const COUNTER: u64 = 0xf0;

#[test]
fn the_counter_runs_while_enabled() {
    let bed = bed();
    assert_eq!(bed.hpet.read(0, 8), 0x0098_9680_8086_a201);
    bed.timers.advance(1000);
    assert_eq!(bed.hpet.read(COUNTER, 8), 0);
    bed.hpet.write(CONFIG, 8, 1);
    bed.timers.advance(1_000_000);
    assert_eq!(bed.hpet.read(COUNTER, 8), 100_000);
    bed.hpet.write(CONFIG, 4, 0);
    bed.timers.advance(1_000_000);
    assert_eq!(bed.hpet.read(COUNTER, 8), 100_000);
    bed.hpet.write(COUNTER, 8, 0x1_ffff_fff0);
    bed.hpet.write(CONFIG, 4, 1);
    bed.timers.advance(1_000);
    assert_eq!((bed.hpet.read(COUNTER, 4), bed.hpet.read(COUNTER + 4, 4)), (0x54, 2));
}

/// As Linux sets its clock event device: periodic, legacy replacement.
#[test]
fn periodic_legacy_interrupts_take_the_pits_place() {
    let bed = bed();
    let pit = bed.hpet.gate(bed.hpet.lines[2][0].clone());
    pit.pulse();
    assert_eq!(bed.pins[0].edges(), 1);
    bed.hpet.write(CONFIG, 4, 3);
    pit.pulse();
    assert_eq!(bed.pins[0].edges(), 0);
    bed.hpet.write(0x100, 4, tn::INTERRUPT | tn::PERIODIC | tn::SET_VALUE | tn::MODE_32);
    bed.hpet.write(0x108, 4, 400_000);
    bed.hpet.write(0x108, 4, 100_000);
    bed.timers.advance(3_999_990);
    assert_eq!(bed.pins[0].edges(), 0);
    bed.timers.advance(10);
    assert_eq!(bed.pins[0].edges(), 1);
    bed.timers.advance(10_000_000);
    assert_eq!(bed.pins[0].edges(), 10);
    bed.hpet.write(0x108, 4, 1);
    bed.timers.advance(10_000_000);
    let edges = bed.pins[0].edges();
    assert!((1..=201).contains(&edges), "no storm: {edges}");
    bed.hpet.write(CONFIG, 4, 1);
    bed.hpet.write(0x100, 4, 0);
    pit.set(true);
    assert!(bed.pins[0].level());
}

#[test]
fn one_shots_interrupt_by_level_and_by_message() {
    let bed = bed();
    bed.hpet.write(CONFIG, 8, 1);
    bed.hpet.write(0x140, 8, tn::INTERRUPT | tn::LEVEL | 20 << 9);
    bed.hpet.write(0x148, 8, 1000);
    bed.timers.advance(9_999);
    assert!(!bed.pins[20].level());
    bed.timers.advance(1);
    assert!(bed.pins[20].level());
    assert_eq!(bed.hpet.read(0x20, 4), 4);
    bed.hpet.write(0x20, 4, 4);
    assert!(!bed.pins[20].level());
    bed.timers.advance(1_000_000_000);
    assert!(!bed.pins[20].level());
    bed.hpet.write(0x130, 8, 0xfee0_1000_0000_0051);
    bed.hpet.write(0x120, 8, tn::INTERRUPT | tn::FSB);
    bed.hpet.write(0x128, 8, bed.hpet.read(COUNTER, 8) - 5);
    bed.timers.advance(1);
    assert_eq!(
        bed.messages.try_iter().collect::<Vec<_>>(),
        [Msi { address: 0xfee0_1000, data: 0x51 }],
        "what is just past is due now"
    );
}

#[test]
fn a_hostile_guest_is_bounded_and_its_state_moves() {
    let bed = bed();
    bed.hpet.write(CONFIG, 4, 1);
    batter(&*bed.hpet, 0x400, 50_000, Some(&bed.timers));
    batter(&*bed.hpet, 0x160, 50_000, Some(&bed.timers));
    let other = self::bed();
    let state = through_json(&bed.hpet.state());
    other.hpet.set_state(&state);
    assert_eq!(other.hpet.state(), state);
    let comparators = [Comparator { config: !0, value: !0, period: !0, fsb: !0, waits: true }; COMPARATORS];
    other.hpet.set_state(&Saved::V1(State { config: !0, status: !0, counter: !0, comparators }));
    batter(&*other.hpet, 0x400, 10_000, Some(&other.timers));
}
