use super::*;
use crate::testing::{Probe, batter, probe, through_json, time};

const TICKS_1000: u64 = 838_096;

fn pit() -> (Arc<Pit>, Arc<Probe>, Timers) {
    let (clock, timers) = time();
    let (irq, pin) = probe();
    (Pit::new(irq, clock, &timers), pin, timers)
}

fn program(pit: &Pit, control: u64, count: u64) {
    pit.write(3, 1, control);
    let port = control >> 6;
    pit.write(port, 1, count & 0xff);
    pit.write(port, 1, count >> 8);
}

#[test]
fn periodic_modes_tick_at_their_rate() {
    for control in [0x34, 0x36] {
        let (pit, pin, timers) = pit();
        program(&pit, control, 11932); // 100 Hz
        pin.edges();
        timers.advance(1_000_000_000);
        assert!((99..=100).contains(&pin.edges()), "mode {}", control >> 1 & 7);
        pit.write(3, 1, 0x30);
        assert!(!pin.level());
        timers.advance(1_000_000_000);
        assert_eq!(pin.edges(), 0);
    }
}

#[test]
fn one_shots_fire_once() {
    for control in [0x30, 0x38] {
        let (pit, pin, timers) = pit();
        program(&pit, control, 1000);
        pin.edges();
        timers.advance(TICKS_1000 - 1000);
        assert_eq!(pin.edges(), 0);
        timers.advance(2000);
        assert_eq!(pin.edges(), 1, "{control:#x}");
        assert!(pin.level());
        timers.advance(1_000_000_000);
        assert_eq!(pin.edges(), 0);
        program(&pit, control, 1000);
        pin.edges();
        timers.advance(TICKS_1000 + 1000);
        assert_eq!(pin.edges(), 1);
    }
}

/// A guest that asks for a tick each microsecond gets one each 50.
#[test]
fn ticks_are_no_storm() {
    let (pit, pin, timers) = pit();
    program(&pit, 0x34, 1);
    pin.edges();
    timers.advance(1_000_000);
    assert_eq!(pin.edges(), 20);
}

#[test]
fn counts_are_latched_and_read_back() {
    let (pit, _, timers) = pit();
    program(&pit, 0x34, 10_000);
    timers.advance(TICKS_1000 + 10);
    pit.write(3, 1, 0);
    timers.advance(TICKS_1000);
    assert_eq!(pit.read(0, 1) | pit.read(0, 1) << 8, 9_000);
    let live = pit.read(0, 1) | pit.read(0, 1) << 8;
    assert_eq!(live, 8_000);
    pit.write(3, 1, 0xc2); // status and count of counter 0
    assert_eq!(pit.read(0, 1), 0xb4);
    assert_eq!(pit.read(0, 1) | pit.read(0, 1) << 8, 8_000);
    // Mode 3 goes down by two.
    program(&pit, 0xb6, 10_000);
    pit.control_b().write(0, 1, 1);
    timers.advance(TICKS_1000 + 10);
    assert_eq!(pit.read(2, 1) | pit.read(2, 1) << 8, 8_000);
    // Decimal.
    program(&pit, 0x71, 0x2000);
    timers.advance(TICKS_1000 + 10);
    assert_eq!(pit.read(1, 1) | pit.read(1, 1) << 8, 0x1000);
}

/// As Linux calibrates its TSC: mode 0 on counter 2, watching its output at port 0x61.
#[test]
fn counter_2_answers_to_its_gate() {
    let (pit, _, timers) = pit();
    let port = pit.control_b();
    port.write(0, 1, 1);
    program(&pit, 0xb0, 1000);
    timers.advance(TICKS_1000 / 2);
    assert_eq!(port.read(0, 1) & 0x21, 1);
    port.write(0, 1, 0);
    timers.advance(TICKS_1000);
    assert_eq!(port.read(0, 1) & 0x20, 0, "the gate holds it");
    port.write(0, 1, 1);
    timers.advance(TICKS_1000 / 2 + 2000);
    assert_eq!(port.read(0, 1) & 0x20, 0x20);
    let refresh = port.read(0, 1) & 0x10;
    timers.advance(REFRESH);
    assert_ne!(port.read(0, 1) & 0x10, refresh);
}

#[test]
fn a_hostile_guest_is_bounded_and_its_state_moves() {
    let (pit, _, timers) = pit();
    batter(&*pit, 4, 50_000, Some(&timers));
    batter(&*pit.control_b(), 1, 10_000, Some(&timers));
    let (other, ..) = self::pit();
    let state = through_json(&pit.state());
    other.set_state(&state);
    assert_eq!(pit.state(), state);
    let Saved::V1(mut state) = state;
    state.counters = [Counter { count: 0, mode: 9, start: Some(u64::MAX), ..Counter::reset(true) }; 3];
    other.set_state(&Saved::V1(state));
    other.read(0, 4);
}
