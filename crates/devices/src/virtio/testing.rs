//! A driver for the tests of devices: all queues enabled, requests of one piece to read and one to write.

use std::sync::Arc;

use memory::Memory;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{Device, Pci};
use crate::pci::Function;
use crate::testing::until;

/// Parts of the BAR.
const CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
/// Where queue 0 has its rings; those of the others follow.
const RINGS: u64 = 0x10_0000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const APART: u64 = 0x4000;
/// Where its requests' bytes are: each has a slot, half of which is read.
const DATA: u64 = 0x80_0000;
const SLOT: u64 = 0x4000;
const SLOTS: u16 = 8;

pub struct Driver {
    pub pci: Arc<Pci>,
    pub memory: Memory,
    /// Requests that were offered, and that came back, by queue.
    counts: Vec<(u16, u16)>,
}

impl Driver {
    /// A driver that accepts these of the device's features.
    pub fn new(device: Arc<dyn Device>, features: u64) -> Self {
        Self::with(device, features, Memory::new(32 << 20, 0).unwrap())
    }

    pub fn with(device: Arc<dyn Device>, features: u64, memory: Memory) -> Self {
        let counts = vec![(0, 0); device.queues().len()];
        let pci = Pci::new(device, memory.clone()).unwrap();
        // Memory and bus master.
        pci.config().set(4, &[6]);
        let mut this = Self { pci, memory, counts };
        this.start(features);
        this
    }

    /// Resets the device and starts it.
    pub fn start(&mut self, features: u64) {
        for status in [0, 3] {
            self.write(0x14, 1, status);
        }
        for (n, bits) in [features & 0xffff_ffff, features >> 32 | 1].into_iter().enumerate() {
            self.write(8, 4, n as u64);
            self.write(0xc, 4, bits);
        }
        self.write(0x14, 1, 11);
        assert_eq!(self.read(0x14, 1), 11, "features are accepted");
        for q in 0..self.counts.len() as u64 {
            let rings = RINGS + q * APART;
            self.memory.guest().write_slice(&[0; APART as usize], GuestAddress(rings)).unwrap();
            self.write(0x16, 2, q);
            self.write(0x18, 2, u64::from(2 * SLOTS));
            for (n, at) in [0, AVAILABLE, USED].into_iter().enumerate() {
                self.write(0x20 + 8 * n as u64, 8, rings + at);
            }
            self.write(0x1c, 2, 1);
        }
        self.counts.fill((0, 0));
        self.write(0x14, 1, 15);
    }

    pub fn read(&self, at: u64, size: u8) -> u64 {
        self.pci.read_bar(0, at, size)
    }

    pub fn write(&self, at: u64, size: u8, value: u64) {
        self.pci.write_bar(0, at, size, value);
    }

    pub fn config(&self, at: u64, size: u8) -> u64 {
        self.read(CONFIG + at, size)
    }

    pub fn set_config(&self, at: u64, size: u8, value: u64) {
        self.write(CONFIG + at, size, value);
    }

    pub fn needs_reset(&self) -> bool {
        self.read(0x14, 1) & 0x40 != 0
    }

    fn put<T: ByteValued>(&self, at: u64, value: T) {
        self.memory.guest().write_obj(value, GuestAddress(at)).unwrap();
    }

    /// Offers a request with these bytes to read, and room for so many.
    pub fn offer(&mut self, queue: usize, bytes: &[u8], room: usize) {
        assert!(bytes.len() <= SLOT as usize / 2 && room <= SLOT as usize / 2);
        let slot = u64::from(self.counts[queue].0 % SLOTS);
        let data = DATA + (queue as u64 * u64::from(SLOTS) + slot) * SLOT;
        self.memory.guest().write_slice(bytes, GuestAddress(data)).unwrap();
        let pieces = [(data, bytes.len(), 0u16), (data + SLOT / 2, room, 2)];
        self.offer_pieces(queue, pieces.into_iter().filter(|piece| piece.1 > 0).collect());
    }

    /// Offers a request of one or two pieces: address, bytes, and flags.
    pub fn offer_pieces(&mut self, queue: usize, pieces: Vec<(u64, usize, u16)>) {
        let rings = RINGS + queue as u64 * APART;
        let slot = self.counts[queue].0 % SLOTS;
        for (n, (at, len, flags)) in pieces.iter().enumerate() {
            let index = 2 * slot + n as u16;
            let descriptor = rings + 16 * u64::from(index);
            self.put(descriptor, *at);
            self.put(descriptor + 8, *len as u32);
            self.put(descriptor + 12, flags | u16::from(n + 1 < pieces.len()));
            self.put(descriptor + 14, index + 1);
        }
        let next = &mut self.counts[queue].0;
        let at = rings + AVAILABLE + 4 + 2 * u64::from(*next % (2 * SLOTS));
        *next += 1;
        let next = *next;
        self.put(at, 2 * slot);
        self.put(rings + AVAILABLE + 2, next);
        self.write(NOTIFY + 4 * queue as u64, 2, queue as u64);
    }

    /// What was written into the next request that came back, if one has.
    pub fn collect(&mut self, queue: usize) -> Option<Vec<u8>> {
        let used = RINGS + queue as u64 * APART + USED;
        let done = self.counts[queue].1;
        let get = |at: u64| self.memory.guest().read_obj::<u32>(GuestAddress(at)).unwrap();
        if (get(used) >> 16) as u16 == done {
            return None;
        }
        let element = used + 4 + 8 * u64::from(done % (2 * SLOTS));
        let slot = u64::from(get(element) / 2);
        let mut bytes = vec![0; get(element + 4) as usize];
        let data = DATA + (queue as u64 * u64::from(SLOTS) + slot) * SLOT + SLOT / 2;
        self.memory.guest().read_slice(&mut bytes, GuestAddress(data)).unwrap();
        self.counts[queue].1 += 1;
        Some(bytes)
    }

    /// Waits for the next request to come back.
    #[track_caller]
    pub fn wait(&mut self, queue: usize) -> Vec<u8> {
        let mut bytes = None;
        until("the request comes back", || {
            bytes = self.collect(queue);
            bytes.is_some()
        });
        bytes.unwrap()
    }

    #[track_caller]
    pub fn call(&mut self, queue: usize, bytes: &[u8], room: usize) -> Vec<u8> {
        self.offer(queue, bytes, room);
        self.wait(queue)
    }
}
