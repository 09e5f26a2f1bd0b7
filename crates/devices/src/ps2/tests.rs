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
    let (i8042, ..) = controller_with(Plugged::Both);
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

fn typist() -> (Arc<I8042>, Arc<dyn Registers>, Arc<crate::testing::Probe>) {
    let (i8042, pin, _) = controller_with(Plugged::Both);
    i8042.command().write(0, 1, 0x60);
    i8042.data().write(0, 1, 0x47);
    let data = i8042.data();
    (i8042, data, pin)
}

fn drain(i8042: &Arc<I8042>) -> Vec<u8> {
    let (data, command) = (i8042.data(), i8042.command());
    std::iter::from_fn(|| (command.read(0, 1) & 1 != 0).then(|| data.read(0, 1) as u8)).collect()
}

#[test]
fn keys_arrive_in_both_sets() {
    let (i8042, data, pin) = typist();
    pin.edges();
    let (a, f7, delete, pause) = (Key(30), Key(65), Key(111), Key(119));
    for key in [a, f7, delete, pause] {
        assert!(i8042.key(key, true) && i8042.key(key, false));
    }
    assert_eq!(pin.edges(), 1, "for the first byte");
    let set1 = [0x1e, 0x9e, 0x41, 0xc1, 0xe0, 0x53, 0xe0, 0xd3, 0xe0, 0x46, 0xe0, 0xc6];
    assert_eq!(drain(&i8042), set1);
    assert_eq!(pin.edges(), set1.len() - 1);
    // Without the controller's translation.
    i8042.command().write(0, 1, 0x60);
    data.write(0, 1, 0x07);
    for key in [a, f7, delete] {
        assert!(i8042.key(key, true) && i8042.key(key, false));
    }
    let set2 = [0x1c, 0xf0, 0x1c, 0x83, 0xf0, 0x83, 0xe0, 0x71, 0xe0, 0xf0, 0x71];
    assert_eq!(drain(&i8042), set2);
    // The keyboard's own set 1.
    [0xf0, 1].iter().for_each(|byte| data.write(0, 1, *byte));
    assert_eq!(drain(&i8042), [0xfa, 0xfa]);
    assert!(i8042.key(delete, true) && i8042.key(delete, false));
    assert_eq!(drain(&i8042), [0xe0, 0x53, 0xe0, 0xd3]);
    // Off, and turned off at the controller: keys wait.
    data.write(0, 1, 0xf5);
    assert!(!i8042.key(a, true));
    data.write(0, 1, 0xf4);
    drain(&i8042);
    i8042.command().write(0, 1, 0xad);
    assert!(i8042.key(a, true));
    assert_eq!(drain(&i8042), Vec::<u8>::new());
    i8042.command().write(0, 1, 0xae);
    assert_eq!(drain(&i8042), [0x1c]);
    // A guest that does not read: there is room to let go what is down.
    let down = (0..200).filter(|_| i8042.key(a, true)).count();
    assert!((10..100).contains(&down), "{down}");
    assert!(i8042.key(a, false));
}

/// The steps of Linux' psmouse.
#[test]
fn a_driver_finds_wheel_and_buttons() {
    let (i8042, data, _) = typist();
    let ask = |bytes: &[u8]| {
        for byte in bytes {
            i8042.command().write(0, 1, 0xd4);
            assert_eq!(i8042.command().read(0, 1) & 1, 0);
            data.write(0, 1, (*byte).into());
            assert_eq!(i8042.command().read(0, 1) & 0x21, 0x21, "to {byte:#x}");
            assert_eq!(data.read(0, 1), 0xfa, "to {byte:#x}");
        }
        drain(&i8042)
    };
    i8042.command().write(0, 1, 0xa9);
    assert_eq!(drain(&i8042), [0]);
    assert_eq!(ask(&[0xff]), [0xaa, 0]);
    assert_eq!(ask(&[0xf3, 200, 0xf3, 100, 0xf3, 80, 0xf2]), [3]);
    assert_eq!(ask(&[0xf3, 200, 0xf3, 200, 0xf3, 80, 0xf2]), [4]);
    let point = |x, y, buttons| i8042.point(Point { x, y, size: (640, 480), buttons });
    assert!(!point(10, 10, 0), "nobody listens");
    assert_eq!(ask(&[0xf4]), Vec::<u8>::new());
    point(10, 10, 0);
    assert_eq!(drain(&i8042), Vec::<u8>::new(), "where it is is not told");
    point(15, 20, 0);
    assert_eq!(drain(&i8042), [0x28, 5, 0xf6, 0]);
    // Left and right; the wheel away from the user; back.
    point(15, 20, 5);
    point(15, 20, 0xd);
    point(15, 20, 0x85);
    assert_eq!(drain(&i8042), [0x0b, 0, 0, 0, 0x0b, 0, 0, 0xf, 0x0b, 0, 0, 0x10]);
    // Far: several packets. The sum is right though nobody reads in between.
    point(15, 20, 0);
    drain(&i8042);
    (0..100).for_each(|n| assert!(point(16 + n * 6, 20 + n * 4, 0)));
    let bytes = drain(&i8042);
    let sum = bytes.chunks(4).fold((0, 0), |(x, y), p| {
        let signed = |v: u8, bit: u8| i32::from(v) - if p[0] & bit != 0 { 256 } else { 0 };
        (x + signed(p[1], 0x10), y + signed(p[2], 0x20))
    });
    assert_eq!(sum, (595, -396));
    assert_eq!(ask(&[0xe9]), [0x20, 2, 80]);
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
    let (i8042, ..) = controller_with(Plugged::Both);
    let mut random = crate::testing::Random::new();
    for _ in 0..200 {
        batter(&Both(i8042.data(), i8042.command()), 2, 1000, None);
        i8042.key(Key(random.below(0x300) as u16), random.below(2) == 0);
        let (x, y) = (random.below(1 << 32) as u32, random.below(1 << 13) as u32);
        i8042.point(Point { x, y, size: (640, 480), buttons: random.next() as u16 });
    }
    let (other, ..) = controller();
    other.set_state(&through_json(&i8042.state()));
    assert_eq!(other.state(), i8042.state());
    let Saved::V1(mut state) = i8042.state();
    state.ram.clear();
    other.set_state(&Saved::V1(state));
    other.command().read(0, 1);
}
