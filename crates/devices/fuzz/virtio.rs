//! A guest that does anything at all to a virtio device.

use std::sync::Arc;

use devices::pci::Function;
use devices::virtio::{Device, Pci};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use memory::Memory;

use crate::{Step, Target, memory, put, run};

/// Where queue 0 has its parts; those of the others follow.
const PLACES: u64 = 0x1_0000;
const APART: u64 = 0x8000;
/// Of a split ring: descriptors, available ring, used ring. Of a packed one: descriptors, the driver's and the device's events.
const PARTS: [u64; 3] = [0, 0x2000, 0x4000];
const HEADER: u64 = 0x6000;
const ENTRIES: u16 = 64;
const PACKED: u64 = 1 << 34;

/// A request: a header, and a chain of descriptors after the header's.
#[derive(Arbitrary, Debug)]
pub struct Command {
    queue: u8,
    header: [u8; 16],
    /// Bytes of the header that are told of.
    len: u8,
    /// Address, length, flags, and the next one unless it is the one that follows (of a packed ring: which buffer it is).
    chain: Vec<(u32, u16, u8, Option<u8>)>,
    /// How many requests the ring says that there are.
    more: u8,
    /// What the host does meanwhile.
    host: u8,
}

#[derive(Arbitrary, Debug)]
pub struct Input {
    /// The driver is there, and the queues enabled.
    started: bool,
    /// The features that it does not accept.
    refused: u64,
    steps: Vec<Step<Command>>,
}

struct Virtio<F> {
    pci: Arc<Pci>,
    memory: Memory,
    /// Where the driver is in each ring.
    indices: Vec<u16>,
    packed: bool,
    host: F,
}

/// A descriptor of a chain: address, length, flags, next or buffer.
type Descriptor = (u32, u32, u16, u16);

impl<F> Virtio<F> {
    fn write(&self, at: u64, size: u8, value: u64) {
        self.pci.write_bar(0, at, size, value);
    }

    fn start(&mut self, refused: u64) {
        self.write(0x14, 1, 3);
        let mut features = 0;
        for half in 0..2 {
            self.write(0, 4, half);
            let version = if half == 1 { 1 } else { 0 };
            let taken = self.pci.read_bar(0, 4, 4) & !(refused >> (32 * half)) | version;
            self.write(8, 4, half);
            self.write(0xc, 4, taken);
            features |= taken << (32 * half);
        }
        self.packed = features & PACKED != 0;
        self.write(0x14, 1, 11);
        for queue in 0..self.indices.len() as u64 {
            self.write(0x16, 2, queue);
            self.write(0x18, 2, ENTRIES.into());
            for (n, part) in (0..).zip(PARTS) {
                self.write(0x20 + 8 * n, 8, PLACES + queue * APART + part);
            }
            self.write(0x1c, 2, 1);
        }
        self.write(0x14, 1, 15);
    }

    fn put_descriptor(&self, at: u64, (address, len, flags, last): Descriptor) {
        put(&self.memory, at, &u64::from(address).to_le_bytes());
        put(&self.memory, at + 8, &len.to_le_bytes());
        let (flags, last) = (flags.to_le_bytes(), last.to_le_bytes());
        let words = if self.packed { [last, flags] } else { [flags, last] };
        put(&self.memory, at + 12, words.as_flattened());
    }

    fn offer_split(&mut self, queue: usize, chain: &[Descriptor], more: u16) {
        let place = PLACES + queue as u64 * APART;
        for (n, &descriptor) in (0..).zip(chain) {
            self.put_descriptor(place + 16 * n, descriptor);
        }
        let index = self.indices[queue];
        put(&self.memory, place + PARTS[1] + 4 + 2 * u64::from(index % ENTRIES), &[0, 0]);
        self.indices[queue] = index.wrapping_add(1 + more);
        put(&self.memory, place + PARTS[1] + 2, &self.indices[queue].to_le_bytes());
    }

    fn offer_packed(&mut self, queue: usize, chain: &[Descriptor], more: u16) {
        let place = PLACES + queue as u64 * APART;
        let mut index = self.indices[queue];
        for &(address, len, flags, id) in chain {
            let owner = if index / ENTRIES % 2 == 0 { 1 << 7 } else { 1 << 15 };
            let at = place + 16 * u64::from(index % ENTRIES);
            self.put_descriptor(at, (address, len, flags | owner, id));
            index = index.wrapping_add(1);
        }
        self.indices[queue] = index.wrapping_add(more);
    }
}

impl<F: FnMut(u8)> Target for Virtio<F> {
    type Command = Command;
    const BAR: usize = 0;

    fn function(&self) -> &dyn Function {
        &*self.pci
    }

    fn command(&mut self, c: Command) {
        (self.host)(c.host);
        let queue = usize::from(c.queue) % self.indices.len();
        let header = PLACES + queue as u64 * APART + HEADER;
        put(&self.memory, header, &c.header);
        let last = c.chain.len().min(32) as u16;
        let link = |n: u16| u16::from(n < last);
        let mut chain = vec![(header as u32, u32::from(c.len % 17), link(0), 1)];
        for (n, &(address, len, flags, next)) in (1..=last).zip(&c.chain) {
            let flags = u16::from(flags & 6) | link(n);
            // Often in memory, and sometimes not.
            let address = address & 0x3f_ffff;
            chain.push((address, len.into(), flags, next.map_or(n + 1, u16::from)));
        }
        let more = u16::from(c.more & 3);
        if self.packed {
            self.offer_packed(queue, &chain, more);
        } else {
            self.offer_split(queue, &chain, more);
        }
        self.write(0x3000 + 4 * queue as u64, 2, queue as u64);
    }

    fn drain(&self) {
        self.pci.drain();
    }

    fn save(&self) {
        self.pci.set_state(&self.pci.state());
    }
}

/// Runs `input` on a function for `device`.
pub fn fuzz(device: Arc<dyn Device>, input: Input) {
    fuzz_with(device, memory(), input, |_| {});
}

/// Runs `input` on a function for `device` in `memory`, while the host does with it what `host` makes of a number.
pub fn fuzz_with(device: Arc<dyn Device>, memory: Memory, input: Input, host: impl FnMut(u8)) {
    let indices = vec![0; device.queues().len()];
    let pci = Pci::new(device, memory.clone()).expect("threads");
    let mut virtio = Virtio { pci, memory: memory.clone(), indices, packed: false, host };
    virtio.function().config().set(4, &[6]);
    if input.started {
        virtio.start(input.refused);
    }
    run(&mut virtio, &memory, input.steps);
    virtio.write(0x14, 1, 0);
    assert_eq!(virtio.pci.read_bar(0, 0x14, 1), 0, "it comes back from a reset");
}
