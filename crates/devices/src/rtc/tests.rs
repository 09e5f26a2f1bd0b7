use super::*;
use crate::testing::{Probe, batter, probe, through_json, time};
use std::time::Duration;

/// Thursday, 29 February 2024, 23:59:58 UTC.
const NOW: u64 = 1_709_251_198;
const SECOND_NS: u64 = SECOND as u64;

fn rtc(ram: u64) -> (Arc<Rtc>, Arc<Probe>, Timers) {
    let (clock, timers) = time();
    let (irq, pin) = probe();
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(NOW);
    (Rtc::new(irq, clock, &timers, now, ram), pin, timers)
}

fn get(rtc: &Rtc, index: u64) -> u64 {
    rtc.write(0, 1, index);
    rtc.read(1, 1)
}

fn put(rtc: &Rtc, index: u64, value: u64) {
    rtc.write(0, 1, index);
    rtc.write(1, 1, value);
}

fn date(rtc: &Rtc) -> [u64; 8] {
    [0x32, 9, 8, 7, 6, 4, 2, 0].map(|index| get(rtc, index))
}

#[test]
fn the_time_goes_on_in_every_format() {
    let (rtc, _, timers) = rtc(1 << 30);
    assert_eq!(date(&rtc), [0x20, 0x24, 2, 0x29, 5, 0x23, 0x59, 0x58]);
    put(&rtc, 0xb, 4);
    assert_eq!(date(&rtc), [20, 24, 2, 29, 5, 0x8b, 59, 58]);
    timers.advance(2 * SECOND_NS);
    assert_eq!(date(&rtc), [20, 24, 3, 1, 6, 12, 0, 0], "12 o'clock in the night");
}

#[test]
fn a_guest_sets_the_time() {
    let (rtc, _, timers) = rtc(1 << 30);
    put(&rtc, 0xb, 0x86);
    for (index, value) in [(0x32, 19), (9, 99), (8, 12), (7, 31), (4, 23), (2, 59), (0, 59)] {
        put(&rtc, index, value);
    }
    timers.advance(5 * SECOND_NS);
    assert_eq!(get(&rtc, 0), 59, "stands while it is set");
    put(&rtc, 0xb, 6);
    timers.advance(SECOND_NS);
    assert_eq!(date(&rtc), [20, 0, 1, 1, 7, 0, 0, 0]);
}

#[test]
fn updates_are_announced_and_interrupt() {
    let (rtc, pin, timers) = rtc(1 << 30);
    put(&rtc, 0xb, 0x12);
    timers.advance(SECOND_NS - 200_000);
    assert_eq!(get(&rtc, 0xa), 0xa6);
    assert!(!pin.level());
    timers.advance(200_000);
    assert_eq!(get(&rtc, 0xa), 0x26);
    assert!(pin.level());
    assert_eq!(get(&rtc, 0xc), 0x90 | 0x40);
    assert!(!pin.level());
    timers.advance(SECOND_NS);
    assert_eq!(pin.edges(), 2);
}

#[test]
fn the_alarm_rings_at_its_time() {
    let (rtc, pin, timers) = rtc(1 << 30);
    for (index, value) in [(1, 3), (3, 0), (5, 0xff)] {
        put(&rtc, index, value);
    }
    put(&rtc, 0xb, 0x22);
    timers.advance(4 * SECOND_NS);
    assert!(!pin.level());
    timers.advance(SECOND_NS);
    assert!(pin.level());
    assert_eq!(get(&rtc, 0xc) & 0xa0, 0xa0);
    timers.advance(3599 * SECOND_NS);
    assert!(!pin.level());
    timers.advance(SECOND_NS);
    assert!(pin.level(), "and again the next hour");
}

#[test]
fn periodic_interrupts_come_as_fast_as_they_are_read() {
    let (rtc, pin, timers) = rtc(1 << 30);
    put(&rtc, 0xb, 0x42);
    timers.advance(SECOND_NS);
    assert_eq!(pin.edges(), 1, "until it is read");
    let mut n = 0;
    for _ in 0..10_000 {
        timers.advance(100_000);
        if get(&rtc, 0xc) & 0x40 != 0 {
            n += 1;
        }
    }
    assert!((1023..=1025).contains(&n), "{n}");
}

#[test]
fn a_read_of_the_flags_lowers_the_line_whatever_the_clock_does_meanwhile() {
    // Time goes on in the clock only, so nothing but the reads changes the line.
    let (_, timers) = time();
    let (irq, pin) = probe();
    let rtc = Rtc::new(irq, Arc::new(Clock::host(1_000_000)), &timers, SystemTime::UNIX_EPOCH, 1 << 30);
    put(&rtc, 0xa, 0x23); // 8,192 Hz
    put(&rtc, 0xb, 0x40);
    for _ in 0..100_000 {
        get(&rtc, 0xc);
        assert!(!pin.level());
    }
}

#[test]
fn memory_is_told_in_every_form() {
    let (rtc, ..) = rtc(5 << 30);
    let word = |index| get(&rtc, index) | get(&rtc, index + 1) << 8;
    assert_eq!([0x15, 0x17, 0x30, 0x34].map(word), [640, 0xffff, 0xffff, 0x7f00]);
    assert_eq!(word(0x5b) | get(&rtc, 0x5d) << 16, 3 << 14);
    put(&rtc, 0xf, 0xa);
    assert_eq!(get(&rtc, 0xf), 0xa);
    rtc.write(2, 1, 0x10);
    rtc.write(3, 1, 0x77);
    assert_eq!(rtc.read(3, 1), 0x77);
    assert_eq!(get(&rtc, 0xd), 0x80);
}

#[test]
fn a_hostile_guest_is_bounded_and_its_state_moves() {
    let (rtc, _, timers) = rtc(1 << 20);
    batter(&*rtc, 4, 100_000, Some(&timers));
    let (other, ..) = self::rtc(1 << 20);
    let state = through_json(&rtc.state());
    other.set_state(&state);
    assert_eq!(rtc.state(), state);
    other.set_state(&Saved::V1(State { index: [255; 2], bytes: vec![], ahead: i64::MAX, seen: u64::MAX }));
    batter(&*other, 4, 10_000, Some(&timers));
    other.set_state(&Saved::V1(State { index: [255; 2], bytes: vec![0x7f; 300], ahead: i64::MIN, seen: 0 }));
    batter(&*other, 4, 10_000, Some(&timers));
}
