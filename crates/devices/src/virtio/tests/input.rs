//! A driver of keyboard and tablet.

use screens::{Input, Key, Point};

use super::*;
use crate::virtio::input::{InputDevice, Kind};

fn plugged(kind: Kind) -> (Driver, Arc<InputDevice>) {
    let device = Arc::new(InputDevice::new(kind));
    let driver = Driver::of(device.clone(), Memory::new(4 << 20, 0).unwrap(), None);
    driver.enable(256);
    driver.status(15);
    (driver, device)
}

/// Offers room for an event, and gives it: type, code, value.
fn event(d: &mut Driver) -> (u16, u16, u32) {
    d.descriptor(0, DATA, 8, WRITE, 0);
    assert!(d.offer());
    (d.get(DATA), d.get(DATA + 2), d.get(DATA + 4))
}

fn table(d: &Driver, select: u64, part: u64) -> Vec<u8> {
    d.pci.write_bar(0, CONFIG, 1, select);
    d.pci.write_bar(0, CONFIG + 1, 1, part);
    let size = d.pci.read_bar(0, CONFIG + 2, 1);
    (0..size).map(|n| d.pci.read_bar(0, CONFIG + 8 + n, 1) as u8).collect()
}

#[test]
fn keys_are_events() {
    let (mut d, keyboard) = plugged(Kind::Keyboard);
    assert_eq!(table(&d, 1, 0), b"Lodge keyboard");
    let keys = table(&d, 0x11, 1);
    for (code, has) in [(30, true), (0, false), (111, true), (0x6e, true)] {
        assert_eq!(keys[code / 8] >> (code % 8) & 1 != 0, has, "{code}");
    }
    assert!(table(&d, 0x11, 3).is_empty(), "no axes");
    assert!(table(&d, 0xff, 0xff).is_empty());
    assert!(keyboard.key(Key(30), true) && keyboard.key(Key(30), false));
    assert_eq!([(); 4].map(|()| event(&mut d)), [(1, 30, 1), (0, 0, 0), (1, 30, 0), (0, 0, 0)]);
    assert!(!keyboard.point(Point::default()));
    // A driver that takes nothing: there is an end.
    assert!((0..10_000).take_while(|_| keyboard.key(Key(30), true)).count() < 1000);
    assert!(keyboard.key(Key(30), false), "room to let go");
    d.status(0);
    assert!(!keyboard.key(Key(30), true), "nobody is there");
}

#[test]
fn the_tablet_is_where_the_pointer_is() {
    let (mut d, tablet) = plugged(Kind::Tablet);
    assert_eq!(table(&d, 0x12, 0)[4..8], 0x7fffu32.to_le_bytes());
    let point = |x, y, buttons| tablet.point(Point { x, y, size: (101, 201), buttons });
    assert!(point(100, 100, 0));
    assert_eq!([(); 3].map(|()| event(&mut d)), [(3, 0, 0x7fff), (3, 1, 0x3fff), (0, 0, 0)]);
    // Right, and the wheel away; both up again.
    assert!(point(100, 100, 0xc));
    assert_eq!([(); 3].map(|()| event(&mut d)), [(1, 0x111, 1), (2, 8, 1), (0, 0, 0)]);
    assert!(point(100, 100, 0));
    assert_eq!([(); 2].map(|()| event(&mut d)), [(1, 0x111, 0), (0, 0, 0)]);
    assert!(point(100, 100, 0), "nothing new");
    assert!(point(0, 0, 0));
    assert_eq!(event(&mut d), (3, 0, 0));
}
