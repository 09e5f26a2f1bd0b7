//! A driver of the graphics adapter.

use screens::{Picture, Source};

use super::*;
use crate::Saved;
use crate::testing::through_json;
use crate::virtio::gpu::Gpu;

const ANSWER: u64 = DATA + 0x8000;
const OK: u32 = 0x1100;

struct Graphics {
    driver: Driver,
    gpu: Arc<Gpu>,
    /// How many the cursor's queue has had.
    commands: u16,
}

impl Graphics {
    fn new() -> Self {
        let memory = Memory::new(4 << 20, 0).unwrap();
        let gpu = Arc::new(Gpu::new(memory.clone()));
        let driver = Driver::of(gpu.clone(), memory, None);
        driver.enable(256);
        driver.status(15);
        Self { driver, gpu, commands: 0 }
    }

    /// A command of these words; gives the answer's type.
    fn ask(&mut self, kind: u32, body: &[u32]) -> u32 {
        let header = [kind, 1, 0x1234, 0, 0, 0];
        let words = header.iter().chain(body).flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>();
        let d = &mut self.driver;
        d.memory.guest().write_slice(&words, GuestAddress(DATA)).unwrap();
        d.descriptor(0, DATA, words.len() as u32, NEXT, 1);
        d.descriptor(1, ANSWER, 2048, WRITE, 0);
        assert!(d.offer());
        assert_eq!((d.get::<u32>(ANSWER + 4), d.get::<u32>(ANSWER + 8)), (1, 0x1234), "the fence");
        d.get(ANSWER)
    }

    /// A command by the cursor's queue, which is set up anew for it in place of the other.
    fn cursor(mut self, kind: u32, body: &[u32]) -> Self {
        let d = &mut self.driver;
        let words: Vec<u8> = [kind, 0, 0, 0, 0, 0].iter().chain(body).flat_map(|w| w.to_le_bytes()).collect();
        d.memory.guest().write_slice(&words, GuestAddress(DATA)).unwrap();
        d.descriptor(0, DATA, words.len() as u32, 0, 0);
        let used = 0x5_0000;
        d.write(0x16, 2, 1);
        if d.read(0x1c, 2) == 0 {
            d.write(0x18, 2, 16);
            for (at, address) in [(0x20, DESCRIPTORS), (0x28, 0x3_0000), (0x30, used)] {
                d.write(at, 4, address);
                d.write(at + 4, 4, 0);
            }
            d.write(0x1c, 2, 1);
            self.commands = 0;
        }
        self.commands += 1;
        let d = &self.driver;
        d.put(0x3_0000 + 2, self.commands);
        d.put(0x3_0000 + 4 + 2 * u64::from(self.commands - 1), 0u16);
        d.pci.write_bar(0, NOTIFY + 4, 2, 1);
        until("the cursor's command is served", || d.get::<u16>(used + 2) == self.commands);
        self
    }

    fn picture(&self) -> Picture {
        let mut picture = Picture::default();
        self.gpu.draw(&mut picture);
        picture
    }
}

#[test]
fn what_is_drawn_is_shown_where_it_is_to_be() {
    let mut g = Graphics::new();
    assert_eq!(g.ask(0x100, &[]), 0x1101);
    let (width, height) = screens::edid::PREFERRED;
    assert_eq!([0, 4, 8, 12, 16].map(|at| g.driver.get::<u32>(ANSWER + 24 + at)), [0, 0, width, height, 1]);
    assert_eq!(g.ask(0x10a, &[0, 0]), 0x1104);
    assert_eq!(g.driver.get::<u64>(ANSWER + 32), 0x00ff_ffff_ffff_ff00);
    assert_eq!(g.picture().size(), (width, height));
    // 8 by 4 pixels, B8G8R8X8, in three pieces of memory.
    assert_eq!(g.ask(0x101, &[7, 2, 8, 4]), OK);
    let at = 0x10_0000u32;
    assert_eq!(g.ask(0x106, &[7, 3, at, 0, 20, 0, at + 0x1000, 0, 60, 0, at + 0x2000, 0, 48, 0]), OK);
    let bytes: Vec<u8> = (0..32u32).flat_map(|n| (0xaa00_0000 | (n * 0x10203)).to_le_bytes()).collect();
    for (piece, address) in [(&bytes[..20], at), (&bytes[20..80], at + 0x1000), (&bytes[80..], at + 0x2000)] {
        g.driver.memory.guest().write_slice(piece, GuestAddress(address.into())).unwrap();
    }
    // All but the first column and row; the offset is where that begins in memory.
    assert_eq!(g.ask(0x105, &[1, 1, 7, 3, 36, 0, 7, 0]), OK);
    assert_eq!(g.ask(0x103, &[0, 1, 8, 3, 0, 7]), OK);
    assert_eq!(g.ask(0x104, &[0, 0, 8, 4, 7, 0]), OK);
    let shown = g.picture();
    assert_eq!(shown.size(), (8, 3));
    for y in 0..3 {
        let expected: Vec<u32> =
            (0..8).map(|x| if x == 0 { 0 } else { ((y + 1) * 8 + x) * 0x10203 }).collect();
        assert_eq!(shown.row(y), expected, "row {y}");
    }
    // Another adapter goes on from here.
    let other = Gpu::new(g.driver.memory.clone());
    other.set_state(&through_json(&g.gpu.state()));
    let mut again = Picture::default();
    other.draw(&mut again);
    assert_eq!(again, shown);
    // What is no longer there is not shown.
    assert_eq!(g.ask(0x102, &[7, 0]), OK);
    assert_ne!(g.picture(), shown);
}

#[test]
fn a_viewer_chooses_the_size_and_sees_the_cursor() {
    let mut g = Graphics::new();
    assert_eq!(g.gpu.cursor(), None, "the viewer's own");
    assert!(g.gpu.resize(800, 600));
    assert_eq!(g.driver.pci.read_bar(0, CONFIG, 4), 1, "the display changed");
    g.driver.pci.write_bar(0, CONFIG + 4, 4, 1);
    assert_eq!(g.driver.pci.read_bar(0, CONFIG, 4), 0);
    g.ask(0x100, &[]);
    assert_eq!((g.driver.get::<u32>(ANSWER + 32), g.driver.get::<u32>(ANSWER + 36)), (800, 600));
    // A cursor, by its own queue.
    assert_eq!(g.ask(0x101, &[5, 1, 64, 64]), OK);
    assert_eq!(g.ask(0x106, &[5, 1, 0x10_0000, 0, 64 * 64 * 4, 0]), OK);
    g.driver.put(0x10_0000 + 4 * (64 * 3 + 2), 0x80ff_ffffu32);
    assert_eq!(g.ask(0x105, &[0, 0, 64, 64, 0, 0, 5, 0]), OK);
    let g = g.cursor(0x300, &[0, 10, 10, 0, 5, 2, 3, 0]);
    let cursor = g.gpu.cursor().expect("it was set");
    assert_eq!((cursor.hot, cursor.picture.row(3)[2]), ((2, 3), 0x80ff_ffff));
    let g = g.cursor(0x300, &[0, 10, 10, 0, 0, 0, 0, 0]);
    assert_eq!(g.gpu.cursor().expect("it was set").picture.size(), (0, 0), "hidden");
}

#[test]
fn commands_that_make_no_sense_are_answered_so() {
    let mut g = Graphics::new();
    assert_eq!(g.ask(0x101, &[1, 2, 64, 64]), OK);
    for (kind, body, answer) in [
        (0x999, &[][..], 0x1200),
        (0x101, &[1, 2, 8, 8], 0x1203),  // it is there already
        (0x101, &[0, 2, 8, 8], 0x1203),  // 0 is none
        (0x101, &[2, 99, 8, 8], 0x1205), // no such format
        (0x101, &[2, 2, 0, 8], 0x1205),  // nothing to see
        (0x101, &[2, 2, u32::MAX, u32::MAX], 0x1201),
        (0x101, &[2, 2, 16384, 16384], 0x1201), // more than there may be
        (0x102, &[9, 0], 0x1203),
        (0x103, &[0, 0, 64, 64, 1, 1], 0x1202),
        (0x103, &[0, 0, 65, 64, 0, 1], 0x1205),
        (0x103, &[u32::MAX, 0, 2, 64, 0, 1], 0x1205),
        (0x105, &[0, 0, 64, 64, 0, 0, 9, 0], 0x1203),
        (0x105, &[60, 60, 5, 5, 0, 0, 1, 0], 0x1205),
        (0x105, &[0, 0, 64, 64, u32::MAX, u32::MAX, 1, 0], OK), // from nowhere
        (0x106, &[1, 1_000_000], 0x1205),
        (0x106, &[1, 2, 0, 0, 1, 0], 0x1205), // shorter than it says
        (0x106, &[1, 1, u32::MAX, u32::MAX, u32::MAX, 0], OK),
        (0x105, &[0, 0, 64, 64, 0, 0, 1, 0], OK), // from beyond memory
        (0x10a, &[3, 0], 0x1202),
    ] {
        assert_eq!(g.ask(kind, body), answer, "{kind:#x} {body:x?}");
    }
}

/// Whatever the driver says, the device answers, and draws something.
#[test]
fn a_hostile_driver_is_bounded() {
    let mut random = crate::testing::Random::new();
    let mut g = Graphics::new();
    let kinds = [0x100, 0x101, 0x102, 0x103, 0x104, 0x105, 0x106, 0x107, 0x10a, 0x300, 0x301, 0x999];
    for n in 0..2000 {
        let mut word = || match random.below(8) {
            0 => u32::MAX - random.below(3) as u32,
            1 => random.next() as u32,
            2 => 64,
            3 => 1 << random.below(32),
            _ => random.below(5) as u32,
        };
        let body: [u32; 12] = std::array::from_fn(|_| word());
        let (kind, len) = (kinds[random.below(12) as usize], random.below(13) as usize);
        let answer = g.ask(kind, &body[..len]);
        assert!((0x1100..0x1300).contains(&answer), "{kind:#x} {body:x?}: {answer:#x}");
        if n % 100 == 0 {
            let Saved::V1(state) = g.gpu.state();
            assert!(state.resources.values().map(|r| r.count()).sum::<u64>() <= 64 << 20);
            g.picture();
        }
    }
}
