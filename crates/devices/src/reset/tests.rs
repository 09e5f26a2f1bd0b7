use super::*;
use crate::testing::{batter, probe, through_json};

fn controller() -> (Arc<I8042>, Arc<crate::testing::Probe>, Power) {
    controller_with(Plugged::Nothing)
}

fn controller_with(plugged: Plugged) -> (Arc<I8042>, Arc<crate::testing::Probe>, Power) {
    let (irq, pin) = probe();
    let power = Power::default();
    (I8042::new(plugged, irq, Line::unconnected(), power.clone()), pin, power)
}

#[test]
fn a_keyboard_answers_what_firmware_asks() {
    let (i8042, ..) = controller_with(Plugged::Keyboard);
    let (data, command) = (i8042.data(), i8042.command());
    for (asked, answers) in [
        (0xff, vec![0xfa, 0xaa]),
        (0xf2, vec![0xfa, 0xab, 0x83]),
        (0xf0, vec![0xfa]),
        (0, vec![0xfa, 2]),
        (0x12, vec![0xfe]),
    ] {
        data.write(0, 1, asked);
        for answer in answers {
            assert_eq!((command.read(0, 1) & 1, data.read(0, 1)), (1, answer), "to {asked:#x}");
        }
        assert_eq!(command.read(0, 1) & 1, 0, "no more to {asked:#x}");
    }
}

#[test]
fn reset_control_wants_an_edge() {
    let power = Power::default();
    let control = Control::new(power.clone());
    control.write(0, 1, 2);
    assert_eq!(power.requested(), None);
    control.write(0, 1, 6);
    assert_eq!(power.requested(), Some(End::Reset));
    assert_eq!(control.read(0, 1), 6);
    power.clear();
    control.write(0, 1, 6);
    assert_eq!(power.requested(), None);
    let fast = FastA20::new(power.clone());
    fast.write(0, 1, 2);
    assert_eq!((fast.read(0, 1), power.requested()), (2, None));
    fast.write(0, 1, 3);
    assert_eq!(power.requested(), Some(End::Reset));
}

/// The steps of Linux' i8042 driver.
#[test]
fn the_probe_of_a_driver_needs_no_waiting() {
    let (i8042, pin, power) = controller();
    let (data, command) = (i8042.data(), i8042.command());
    let ask = |c: u64| {
        command.write(0, 1, c);
        assert_eq!(command.read(0, 1) & 1, 1, "answer to {c:#x}");
        data.read(0, 1)
    };
    assert_eq!(command.read(0, 1) & 3, 0, "nothing to flush");
    assert_eq!(ask(0xaa), 0x55);
    assert_eq!(ask(0xab), 0);
    let ctr = ask(0x20);
    assert_eq!(ctr & 0x30, 0x30);
    command.write(0, 1, 0x60);
    data.write(0, 1, 0x45);
    assert_eq!(ask(0x20), 0x45);
    assert_eq!(pin.edges(), 1, "one for each answer since interrupts were on");
    command.write(0, 1, 0xd3);
    data.write(0, 1, 0x5a);
    assert_eq!(command.read(0, 1) & 0x21, 1, "no mouse's port");
    data.read(0, 1);
    assert!(![0, 0xfa, 0xff].contains(&ask(0xa9)));
    pin.edges();
    data.write(0, 1, 0xf2);
    assert_eq!((pin.edges(), command.read(0, 1) & 0x41, data.read(0, 1)), (1, 0x41, 0xfe), "no keyboard");
    assert_eq!(command.read(0, 1) & 1, 0);
    assert_eq!(power.requested(), None);
}

#[test]
fn resets_by_pulse_and_by_output_port() {
    let (i8042, _, power) = controller();
    i8042.command().write(0, 1, 0xff);
    assert_eq!(power.requested(), None);
    i8042.command().write(0, 1, 0xfe);
    assert_eq!(power.requested(), Some(End::Reset));
    power.clear();
    i8042.command().write(0, 1, 0xd1);
    i8042.data().write(0, 1, 0xdf);
    i8042.command().write(0, 1, 0xd0);
    assert_eq!((i8042.data().read(0, 1), power.requested()), (0xdf, None));
    i8042.command().write(0, 1, 0xd1);
    i8042.data().write(0, 1, 0xde);
    assert_eq!(power.requested(), Some(End::Reset));
}

#[test]
fn a_hostile_guest_is_bounded_and_its_state_moves() {
    struct Both(Arc<dyn Registers>, Arc<dyn Registers>);
    impl Registers for Both {
        fn read(&self, offset: u64, size: u8) -> u64 {
            if offset == 0 { self.0.read(0, size) } else { self.1.read(0, size) }
        }
        fn write(&self, offset: u64, size: u8, value: u64) {
            if offset == 0 { self.0.write(0, size, value) } else { self.1.write(0, size, value) }
        }
    }
    let (i8042, ..) = controller_with(Plugged::Keyboard);
    batter(&Both(i8042.data(), i8042.command()), 2, 200_000, None);
    let (other, ..) = controller();
    other.set_state(&through_json(&i8042.state()));
    assert_eq!(other.state(), i8042.state());
    let Saved::V1(mut state) = i8042.state();
    state.ram.clear();
    other.set_state(&Saved::V1(state));
    other.command().read(0, 1);
}
