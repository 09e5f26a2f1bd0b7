use super::*;
use crate::testing::{batter, through_json};
use machine::Registers;

fn video() -> Video {
    let (_, [window]) = memory::Memory::with_windows(1 << 20, 0, [MEMORY as u64]).unwrap();
    window
}

fn picture(vga: &Vga) -> Picture {
    let mut picture = Picture::default();
    vga.draw(&mut picture);
    picture
}

fn buses(vga: &Arc<Vga>) -> (Bus, Bus) {
    let (ports, mmio) = (Bus::default(), Bus::default());
    vga.insert(&ports, &mmio).unwrap();
    (ports, mmio)
}

fn set(ports: &Bus, port: u64, values: &[(u8, u8)]) {
    for (index, value) in values {
        ports.write(port, 2, u64::from(*value) << 8 | u64::from(*index));
    }
}

/// The attribute controller with 16 colours of its own, and the screen on.
fn attributes(ports: &Bus, mode: u8) {
    ports.read(0x3da, 1);
    for index in 0..16 {
        ports.write(0x3c0, 1, index);
        ports.write(0x3c0, 1, index);
    }
    for (index, value) in [(0x10, mode), (0x12, 0xf), (0x13, 0), (0x14, 0)] {
        ports.write(0x3c0, 1, index);
        ports.write(0x3c0, 1, value.into());
    }
    ports.write(0x3c0, 1, 0x20);
    ports.write(0x3c8, 1, 0);
    for n in 0..16 {
        [n, n * 2, 63 - n].iter().for_each(|part| ports.write(0x3c9, 1, *part));
    }
}

fn pixel(n: u32) -> u32 {
    let part = |v: u32| v << 2 | v >> 4;
    part(n) << 16 | part(n * 2) << 8 | part(63 - n)
}

/// Two by two characters of 8 by 16 pixels.
fn small(ports: &Bus, rows: u8) {
    set(
        ports,
        0x3d4,
        &[(0x11, 0), (1, 1), (7, 0), (9, 0x40 | (rows - 1)), (0xc, 0), (0xd, 0), (0x12, 31), (0x13, 1)],
    );
    set(ports, 0x3d4, &[(0x17, 0xa3), (0x18, 0xff), (7, 0x10), (0xa, 0x20)]);
}

#[test]
fn text_is_drawn_with_the_font_in_plane_2() {
    let vga = Vga::new(video());
    let (ports, mmio) = buses(&vga);
    small(&ports, 16);
    attributes(&ports, 4);
    // The font of character 1, by planes: a row for each of its bits.
    set(&ports, 0x3c4, &[(1, 1), (2, 4), (3, 0), (4, 6)]);
    set(&ports, 0x3ce, &[(5, 0), (6, 4), (8, 0xff)]);
    (0..8).for_each(|row| mmio.write(0xa_0000 + 32 + row, 1, 0x80 >> row));
    // The text, at the second line's second column.
    set(&ports, 0x3c4, &[(2, 3), (4, 2)]);
    set(&ports, 0x3ce, &[(5, 0x10), (6, 0xe)]);
    mmio.write(0xb_8006, 2, 0x2501);
    assert_eq!(mmio.read(0xb_8006, 2), 0x2501);
    assert_eq!(mmio.read(0xa_0000, 1), 0xff, "the window is at b8000 alone");
    let shown = picture(&vga);
    assert_eq!(shown.size(), (16, 32));
    for row in 0..16 {
        for column in 0..8 {
            let expected = if row == column { 5 } else { 2 };
            assert_eq!(shown.row(16 + row)[8 + column as usize], pixel(expected), "{row} {column}");
        }
    }
    assert_eq!(shown.row(0)[0], pixel(0));
    // A cursor over the last two rows of that cell.
    set(&ports, 0x3d4, &[(0xa, 14), (0xb, 15), (0xe, 0), (0xf, 3)]);
    let shown = picture(&vga);
    assert_eq!([shown.row(29)[8], shown.row(30)[8], shown.row(31)[15]], [2, 5, 5].map(pixel));
    // With 9 pixels to a character, and the start one character on.
    set(&ports, 0x3c4, &[(1, 0)]);
    set(&ports, 0x3d4, &[(0xd, 1)]);
    let shown = picture(&vga);
    assert_eq!((shown.size(), shown.row(16)[0], shown.row(16)[8]), ((18, 32), pixel(5), pixel(2)));
    // Off.
    ports.read(0x3da, 1);
    ports.write(0x3c0, 1, 0);
    assert!(picture(&vga).row(16).iter().all(|p| *p == 0));
}

#[test]
fn planes_are_written_in_every_mode() {
    let vga = Vga::new(video());
    let (ports, mmio) = buses(&vga);
    small(&ports, 1);
    attributes(&ports, 1);
    set(&ports, 0x3c4, &[(1, 1), (2, 0xf), (4, 6)]);
    set(&ports, 0x3ce, &[(0, 0), (1, 0), (3, 0), (4, 0), (5, 0), (6, 5), (7, 0xf), (8, 0xff)]);
    let colour = |x: usize| {
        let shown = picture(&vga).row(0)[x];
        (0..16).find(|n| pixel(*n) == shown).unwrap()
    };
    // Mode 0: all planes in the mask.
    set(&ports, 0x3c4, &[(2, 5)]);
    mmio.write(0xa_0000, 1, 0x80);
    assert_eq!((colour(0), colour(1)), (5, 0));
    set(&ports, 0x3c4, &[(2, 0xf)]);
    // Mode 0 with set/reset and a bit mask: only that pixel, from the latches of a read.
    set(&ports, 0x3ce, &[(0, 9), (1, 0xf), (8, 0x40)]);
    mmio.read(0xa_0000, 1);
    mmio.write(0xa_0000, 1, 0);
    assert_eq!((colour(0), colour(1), colour(2)), (5, 9, 0));
    // Mode 1 copies four planes.
    set(&ports, 0x3ce, &[(5, 1)]);
    mmio.read(0xa_0000, 1);
    mmio.write(0xa_0001, 1, 0);
    assert_eq!((colour(8), colour(9)), (5, 9));
    // Mode 2: the value is a colour. Here mixed by exclusive or.
    set(&ports, 0x3ce, &[(5, 2), (8, 0xc0), (3, 0x18)]);
    mmio.read(0xa_0000, 1);
    mmio.write(0xa_0000, 1, 3);
    assert_eq!((colour(0), colour(1), colour(2)), (6, 10, 0));
    // Mode 3: the value is a mask for set/reset's colour.
    set(&ports, 0x3ce, &[(5, 3), (8, 0xff), (3, 0), (0, 12)]);
    mmio.read(0xa_0000, 1);
    mmio.write(0xa_0000, 1, 1);
    assert_eq!((colour(0), colour(1), colour(7)), (6, 10, 12));
    // Read mode 1 finds pixels by colour.
    set(&ports, 0x3ce, &[(5, 8), (2, 10)]);
    assert_eq!(mmio.read(0xa_0000, 1), 0x40);
    // Only two planes are looked at.
    set(&ports, 0x3ce, &[(7, 2), (2, 2)]);
    assert_eq!(mmio.read(0xa_0000, 1), 0xc0);
}

#[test]
fn mode_13h_has_a_byte_for_each_pixel() {
    let vga = Vga::new(video());
    let (ports, mmio) = buses(&vga);
    small(&ports, 2);
    attributes(&ports, 0x41);
    set(&ports, 0x3c4, &[(1, 1), (2, 0xf), (4, 0xe)]);
    set(&ports, 0x3ce, &[(5, 0x40), (6, 5)]);
    mmio.write(0xa_0000, 8, 0x0807_0605_0403_0201);
    mmio.write(0xa_0008, 1, 9);
    let shown = picture(&vga);
    assert_eq!(
        [shown.row(0)[0], shown.row(1)[1], shown.row(0)[2], shown.row(0)[15]],
        [1, 1, 2, 8].map(pixel)
    );
    assert_eq!((shown.row(2)[0], shown.row(4)[0]), (pixel(9), pixel(0)));
}

fn dispi(ports: &Bus, index: u64, value: u64) {
    ports.write(0x1ce, 2, index);
    ports.write(0x1d0, 2, value);
}

#[test]
fn the_frame_buffer_in_every_depth() {
    let vga = Vga::new(video());
    let (ports, mmio) = buses(&vga);
    ports.write(0x1ce, 2, 0);
    assert_eq!(ports.read(0x1cf, 2), 0xb0c5);
    assert_eq!(ports.read(0x1d0, 2), 0xb0c5);
    attributes(&ports, 1);
    for (depth, bytes, value, expected) in [
        (8, 1, 3, pixel(3)),
        (15, 2, 0x7c1f, 0xff00ff),
        (16, 2, 0xffe0, 0xffff00),
        (24, 3, 0x12_3456, 0x123456),
        (32, 4, 0xff12_3456, 0x123456),
    ] {
        dispi(&ports, 4, 0);
        [(1, 100), (2, 50), (3, depth), (4, 0x41)].iter().for_each(|(i, v)| dispi(&ports, *i, *v));
        let at = (100 * 7 + 9) * bytes;
        (0..bytes).for_each(|n| vga.write_bar(0, at + n, 1, value >> (8 * n) & 0xff));
        let shown = picture(&vga);
        assert_eq!(
            (shown.size(), shown.row(7)[9], shown.row(7)[8]),
            ((100, 50), expected, if depth == 8 { pixel(0) } else { 0 }),
            "{depth}"
        );
        // Panned, with a wider buffer.
        dispi(&ports, 6, 200);
        dispi(&ports, 8, 100);
        assert_eq!(picture(&vga).row(3)[9], expected, "{depth}");
        // Through the window.
        dispi(&ports, 5, 0);
        assert_eq!(mmio.read(0xa_0000 + at, 1), value & 0xff);
    }
    // By the registers in BAR 2; memory is cleared when the mode is set, unless the driver says no.
    vga.write_bar(2, 0x508, 2, 0);
    vga.write_bar(2, 0x502, 2, 640);
    vga.write_bar(2, 0x508, 2, 0xc1);
    assert_ne!(vga.read_bar(0, (100 * 7 + 9) * 4, 4), 0);
    assert_eq!((vga.read_bar(2, 0x502, 2), picture(&vga).size().0), (640, 640));
    vga.write_bar(2, 0x508, 2, 0);
    vga.write_bar(2, 0x508, 2, 0x41);
    assert_eq!(vga.read_bar(0, (100 * 7 + 9) * 4, 4), 0);
    assert_eq!(vga.read_bar(2, 0, 8), 0x00ff_ffff_ffff_ff00, "EDID");
}

#[test]
fn a_hostile_guest_is_bounded_and_its_state_moves() {
    struct All(Arc<Vga>, Bus, Bus);
    impl Registers for All {
        fn read(&self, offset: u64, size: u8) -> u64 {
            match offset {
                ..0x30 => self.1.read(PORTS.start + offset, size),
                0x30..0x34 => self.1.read(DISPI.start + offset - 0x30, size),
                0x40..0x80 => self.0.read_bar(2, offset - 0x40 + 0x4f0, size),
                0x80..0x90 => self.0.read_bar(0, offset - 0x80 + MEMORY as u64 - 8, size),
                _ => self.2.read(WINDOW.start + offset * 0x1f3 % WINDOW.len, size),
            }
        }
        fn write(&self, offset: u64, size: u8, value: u64) {
            match offset {
                ..0x30 => self.1.write(PORTS.start + offset, size, value),
                0x30..0x34 => self.1.write(DISPI.start + offset - 0x30, size, value),
                0x40..0x80 => self.0.write_bar(2, offset - 0x40 + 0x4f0, size, value),
                0x80..0x90 => self.0.write_bar(0, offset - 0x80 + MEMORY as u64 - 8, size, value),
                _ => self.2.write(WINDOW.start + offset * 0x1f3 % WINDOW.len, size, value),
            }
        }
    }
    let vga = Vga::new(video());
    let (ports, mmio) = buses(&vga);
    let all = All(vga.clone(), ports, mmio);
    for _ in 0..40 {
        batter(&all, 0x100, 5_000, None);
        picture(&vga);
        // Off and on again, for else it is seldom on.
        all.write(0x30, 2, 4);
        all.write(0x31, 2, 0x81 * (picture(&vga).size().0 as u64 & 1));
    }
    let other = Vga::new(video());
    other.set_state(&through_json(&vga.state()));
    assert_eq!(other.state(), vga.state());
    assert_eq!(picture(&other), picture(&vga));
    let Saved::V1(mut state) = vga.state();
    state.legacy.palette.clear();
    state.legacy.dac.1 = 200;
    other.set_state(&Saved::V1(state));
    other.state.lock().unwrap().legacy.write(0x19, 1);
    picture(&other);
}
