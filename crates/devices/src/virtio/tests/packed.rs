//! A driver of a packed ring by hand.

use machine::Memory;
use vm_memory::{Bytes, GuestAddress};

use crate::dma::{fetch, le16, le32, store};
use crate::testing::Random;
use crate::virtio::packed::Packed;
use crate::virtio::request::Request;

/// Room for the largest ring.
const RING: u64 = 0x10_0000;
const DRIVER: u64 = 0x2_0000;
const DEVICE: u64 = 0x2_0010;
const TABLES: u64 = 0x20_0000;
const WRAP: u16 = 1 << 15;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

struct Driver {
    memory: Memory,
    size: u16,
    /// Index and wrap counter of the next descriptor to make available, and of the next to be used.
    next: (u16, bool),
    used: (u16, bool),
    /// Places that requests take, by the id of their buffers.
    places: Vec<Option<u16>>,
}

fn advance(place: &mut (u16, bool), n: u16, size: u16) {
    place.0 += n;
    if place.0 >= size {
        *place = (place.0 - size, !place.1);
    }
}

impl Driver {
    fn new(size: u16, event_idx: bool) -> (Self, Packed) {
        Self::at(0, size, event_idx)
    }

    /// Both are at place `index` of the ring.
    fn at(index: u16, size: u16, event_idx: bool) -> (Self, Packed) {
        let memory = Memory::new(4 << 20, 0).unwrap();
        let next = [WRAP | index; 2];
        let packed = Packed::new(size, [RING, DRIVER, DEVICE], next, &memory, event_idx).unwrap();
        let places = vec![None; size.min(256).into()];
        (Self { memory, size, next: (index, true), used: (index, true), places }, packed)
    }

    fn descriptor(&self, at: u64, address: u64, len: u32, id: u16) {
        store(&self.memory, at, &address.to_le_bytes()).unwrap();
        store(&self.memory, at + 8, &len.to_le_bytes()).unwrap();
        store(&self.memory, at + 12, &id.to_le_bytes()).unwrap();
    }

    fn flags(&self, place: (u16, bool), flags: u16) {
        let bits = if place.1 { 1 << 7 } else { 1 << 15 };
        store(&self.memory, RING + 16 * u64::from(place.0) + 14, &(flags | bits).to_le_bytes()).unwrap();
    }

    /// Makes a request of `pieces` available: the first half is read, the rest written.
    fn offer(&mut self, id: u16, pieces: u16, indirect: bool) {
        let write = |n: u16| if n >= pieces / 2 { WRITE } else { 0 };
        let address = |n: u16| 0x8_0000 + 64 * u64::from(n);
        let first = self.next;
        if indirect {
            let table = TABLES + 0x400 * u64::from(id);
            for n in 0..pieces {
                let at = table + 16 * u64::from(n);
                self.descriptor(at, address(n), 32, 0);
                store(&self.memory, at + 14, &write(n).to_le_bytes()).unwrap();
            }
            self.descriptor(RING + 16 * u64::from(first.0), table, 16 * u32::from(pieces), id);
            self.flags(first, INDIRECT);
            advance(&mut self.next, 1, self.size);
        } else {
            let flags = |n: u16| write(n) | if n + 1 < pieces { NEXT } else { 0 };
            for n in 0..pieces {
                let place = self.next;
                self.descriptor(RING + 16 * u64::from(place.0), address(n), 32, id);
                if n > 0 {
                    self.flags(place, flags(n));
                }
                advance(&mut self.next, 1, self.size);
            }
            self.flags(first, flags(0));
        }
        self.places[usize::from(id)] = Some(if indirect { 1 } else { pieces });
    }

    /// The buffer that the device has used next, and the bytes that it wrote.
    fn collect(&mut self) -> Option<(u16, u32)> {
        let d: [u8; 16] = fetch(&self.memory, RING + 16 * u64::from(self.used.0)).unwrap();
        let flags = le16(&d, 14);
        let done = flags & 1 << 7 != 0;
        if done != (flags >> 15 != 0) || done != self.used.1 {
            return None;
        }
        let (id, len) = (le16(&d, 12), le32(&d, 8));
        let places = self.places[usize::from(id)].take().expect("a buffer that was offered");
        advance(&mut self.used, places, self.size);
        Some((id, len))
    }

    /// Asks to hear when the place `n` places on is used, by the event index; or by the flag.
    fn want(&self, place: Option<(u16, bool)>, flag: u16) {
        let (index, wrap) = place.unwrap_or((0, false));
        let event = u32::from(flag) << 16 | u32::from(index | if wrap { WRAP } else { 0 });
        self.memory.guest().write_obj(event, GuestAddress(DRIVER)).unwrap();
    }
}

fn taken(packed: &mut Packed, memory: &Memory) -> Request {
    packed.take(memory).unwrap().expect("a request")
}

#[test]
fn requests_of_all_shapes_go_around_many_times_in_any_order() {
    let mut random = Random::new();
    for size in [1u16, 3, 8, 255, 32768] {
        let (mut driver, mut packed) = Driver::at(size.saturating_sub(10), size, false);
        let (mut taken, mut served) = (Vec::new(), 0);
        for _ in 0..4000 {
            let free = size - driver.places.iter().flatten().sum::<u16>();
            let id = driver.places.iter().position(Option::is_none);
            match (random.below(3), id) {
                (0, Some(id)) if free > 0 => {
                    let indirect = random.below(3) == 0;
                    let most = if indirect { 40 } else { free.min(9) };
                    driver.offer(id as u16, 1 + random.below(most.into()) as u16, indirect);
                }
                (1, _) => {
                    taken.extend(packed.take(&driver.memory).unwrap());
                }
                (2, _) if !taken.is_empty() => {
                    let request = taken.swap_remove(random.below(taken.len() as u64) as usize);
                    let written = request.open(&driver.memory).1.available_bytes() as u32;
                    packed.give(&driver.memory, &request, written).unwrap();
                    served += 1;
                    assert_eq!(driver.collect(), Some((request.id, written)));
                }
                _ => {}
            }
            // Saved and restored, where nothing is under way.
            if taken.is_empty() && random.below(9) == 0 {
                let next = packed.next();
                packed = Packed::new(size, [RING, DRIVER, DEVICE], next, &driver.memory, false).unwrap();
            }
        }
        assert!(served > 300, "{size}: {served}");
    }
}

#[test]
fn the_driver_hears_when_it_wants_to() {
    let (mut driver, mut packed) = Driver::new(4, true);
    let mut round = |pieces, wants: Option<u16>, flag| {
        let place = wants.map(|n| {
            let mut place = driver.used;
            advance(&mut place, n, 4);
            place
        });
        driver.want(place, flag);
        driver.offer(0, pieces, false);
        let request = taken(&mut packed, &driver.memory);
        packed.give(&driver.memory, &request, 0).unwrap();
        driver.collect().unwrap();
        packed.is_awaited(&driver.memory).unwrap()
    };
    for _ in 0..20 {
        assert!(round(2, None, 0), "enabled");
        assert!(!round(2, None, 1), "disabled");
        assert!(round(2, Some(0), 2), "when it is used");
        assert!(round(2, Some(1), 2), "when its second place is used");
        assert!(!round(2, Some(2), 2), "when the next one is");
        assert!(!round(2, Some(3), 2), "when the one after it is");
        // By one more, so that the ring's end is met at other moments.
        round(1, None, 1);
    }
}

#[test]
fn the_device_says_when_it_wants_to_hear() {
    let event = |memory: &Memory| memory.guest().read_obj::<u32>(GuestAddress(DEVICE)).unwrap();
    for (event_idx, enabled) in [(false, 0), (true, 2 << 16 | u32::from(WRAP) | 2)] {
        let (mut driver, mut packed) = Driver::new(4, event_idx);
        driver.offer(0, 2, false);
        taken(&mut packed, &driver.memory);
        packed.listen(&driver.memory, false).unwrap();
        assert_eq!(event(&driver.memory), 1 << 16);
        packed.listen(&driver.memory, true).unwrap();
        assert_eq!(event(&driver.memory), enabled);
    }
}

#[test]
fn what_breaks_the_rules_is_broken() {
    type Break = fn(&mut Driver);
    let breaks: [(&str, Break); 6] = [
        ("a chain without end", |d| (0..4).for_each(|n| d.flags((n, true), NEXT))),
        ("beyond memory", |d| {
            d.descriptor(RING, u64::MAX - 3, 32, 0);
            d.flags((0, true), WRITE);
        }),
        ("to be read after what is to be written", |d| {
            d.descriptor(RING, TABLES, 32, 0);
            d.flags((1, true), 0);
            d.flags((0, true), WRITE | NEXT);
        }),
        ("a table of half a descriptor", |d| {
            d.descriptor(RING, TABLES, 24, 0);
            d.flags((0, true), INDIRECT);
        }),
        ("a table in nowhere", |d| {
            d.descriptor(RING, u64::MAX - 15, 32, 0);
            d.flags((0, true), INDIRECT);
        }),
        ("a table in a chain", |d| {
            d.descriptor(RING, TABLES, 16, 0);
            d.flags((0, true), INDIRECT | NEXT);
        }),
    ];
    for (what, spoil) in breaks {
        let (mut driver, mut packed) = Driver::new(4, false);
        spoil(&mut driver);
        assert!(packed.take(&driver.memory).is_err(), "{what}");
    }
    // More than the ring holds: what is taken is made available again before it is given back.
    let (mut driver, mut packed) = Driver::new(4, false);
    for n in 0..5 {
        driver.offer(n % 4, 1, false);
        assert_eq!(packed.take(&driver.memory).is_err(), n == 4);
    }
}

#[test]
fn rings_that_cannot_be_are_none() {
    let memory = Memory::new(4 << 20, 0).unwrap();
    assert!(Packed::new(0, [RING, DRIVER, DEVICE], Packed::START, &memory, false).is_none(), "no places");
    for (rings, next) in [
        ([RING + 8, DRIVER, DEVICE], Packed::START),
        ([RING, DRIVER + 2, DEVICE], Packed::START),
        ([RING, DRIVER, 1 << 30], Packed::START),
        ([u64::MAX - 15, DRIVER, DEVICE], Packed::START),
        ([RING, DRIVER, DEVICE], [8, WRAP]),
    ] {
        assert!(Packed::new(8, rings, next, &memory, false).is_none(), "{rings:x?} {next:x?}");
    }
}
