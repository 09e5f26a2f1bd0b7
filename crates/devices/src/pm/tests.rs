use super::*;
use crate::testing::{Probe, batter, probe, through_json, time};

fn pm() -> (Arc<Pm>, Arc<Probe>, Power, Timers) {
    let (clock, timers) = time();
    let (sci, pin) = probe();
    let power = Power::default();
    (Pm::new(sci, power.clone(), clock, &timers), pin, power, timers)
}

#[test]
fn the_timer_counts_at_its_rate_and_wraps() {
    let (pm, pin, _, timers) = pm();
    timers.advance(1_000_000_000);
    assert_eq!(pm.read(8, 4), 3_579_545);
    pm.write(2, 2, 1);
    timers.advance(1_343_000_000);
    assert!(!pin.level());
    timers.advance(1_000_000);
    assert!(pin.level(), "bit 23 changed");
    assert_eq!(pm.read(0, 2), 1);
    pm.write(0, 2, 1);
    assert!(!pin.level());
    timers.advance(2_343_000_000);
    assert!(pin.level());
    assert!(pm.read(8, 4) < 8_000, "wrapped");
}

#[test]
fn the_power_button_interrupts_who_listens() {
    let (pm, pin, power, _timers) = pm();
    pm.press_power_button();
    assert!(!pin.level());
    pm.write(2, 2, 1 << 8);
    assert!(pin.level());
    pm.smi().write(0, 1, ACPI_DISABLE.into());
    assert!(!pin.level());
    assert_eq!(pm.read(4, 2) & 1, 0);
    pm.smi().write(0, 1, ACPI_ENABLE.into());
    assert!(pin.level());
    pm.write(0, 2, 1 << 8);
    assert!(!pin.level());
    pm.raise_gpe(3);
    pm.write(0x28, 1, 8);
    assert!(pin.level());
    pm.write(0x20, 4, 8);
    assert!(!pin.level());
    assert_eq!(power.requested(), None);
}

#[test]
fn sleep_type_5_powers_off() {
    for (value, end) in
        [(0x2000, Some(End::PowerOff)), (0x3c01, Some(End::PowerOff)), (0x1c01, None), (0x2400, None)]
    {
        let (pm, _, power, _timers) = pm();
        pm.write(4, 2, value);
        assert_eq!(power.requested(), end, "{value:#x}");
        assert_eq!(pm.read(4, 2) & 0x2001, 1);
    }
}

#[test]
fn a_hostile_guest_is_bounded_and_its_state_moves() {
    let (pm, .., timers) = pm();
    batter(&*pm, 0x80, 100_000, Some(&timers));
    batter(&*pm.smi(), 2, 10_000, Some(&timers));
    let (other, ..) = self::pm();
    let state = through_json(&pm.state());
    other.set_state(&state);
    assert_eq!(pm.state(), state);
    other.set_state(&Saved::V1(State { half_turns: u64::MAX, enable: 1, ..State::default() }));
}
