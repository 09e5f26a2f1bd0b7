//! A guest that does anything at all to a virtio device.

use std::sync::Arc;

use devices::pci::Function;
use devices::virtio::{Device, Pci};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use memory::Memory;

use crate::{Step, Target, memory, put, run};

const TABLE: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x1_2000;
const USED: u64 = 0x1_4000;
const HEADER: u64 = 0x1_6000;
const ENTRIES: u16 = 64;

/// A request: a header, and a chain of descriptors after the header's.
#[derive(Arbitrary, Debug)]
pub struct Command {
    header: [u8; 16],
    /// Address, length, flags, and the next one unless it is the one that follows.
    chain: Vec<(u32, u16, u8, Option<u8>)>,
    /// How many requests the ring says that there are.
    more: u8,
}

#[derive(Arbitrary, Debug)]
pub struct Input {
    /// The driver is there, and the queue enabled.
    started: bool,
    steps: Vec<Step<Command>>,
}

struct Virtio {
    pci: Arc<Pci>,
    memory: Memory,
    index: u16,
}

impl Virtio {
    fn write(&self, at: u64, size: u8, value: u64) {
        self.pci.write_bar(0, at, size, value);
    }
}

impl Target for Virtio {
    type Command = Command;
    const BAR: usize = 0;

    fn function(&self) -> &dyn Function {
        &*self.pci
    }

    fn command(&mut self, c: Command) {
        put(&self.memory, HEADER, &c.header);
        let last = c.chain.len().min(32);
        for n in 0..=last as u16 {
            let link = if usize::from(n) < last { 1 } else { 0 };
            let (address, len, flags, next) = match usize::from(n).checked_sub(1) {
                None => (HEADER as u32, 16, link, None),
                Some(at) => {
                    let (address, len, flags, next) = c.chain[at];
                    // Often in memory, and sometimes not.
                    (address & 0x3f_ffff, u32::from(len), flags & 6 | link, next)
                }
            };
            let next = next.map_or(n + 1, u16::from);
            let at = TABLE + 16 * u64::from(n);
            put(&self.memory, at, &u64::from(address).to_le_bytes());
            put(&self.memory, at + 8, &len.to_le_bytes());
            put(&self.memory, at + 12, &[flags, 0]);
            put(&self.memory, at + 14, &next.to_le_bytes());
        }
        put(&self.memory, AVAILABLE + 4 + 2 * u64::from(self.index % ENTRIES), &[0, 0]);
        self.index = self.index.wrapping_add(1 + u16::from(c.more & 3));
        put(&self.memory, AVAILABLE + 2, &self.index.to_le_bytes());
        self.write(0x3000, 2, 0);
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
    let memory = memory();
    let pci = Pci::new(device, memory.clone()).expect("threads");
    let mut virtio = Virtio { pci, memory: memory.clone(), index: 0 };
    virtio.function().config().set(4, &[6]);
    if input.started {
        virtio.write(0x14, 1, 3);
        virtio.write(8, 4, 1);
        virtio.write(0xc, 4, 1);
        virtio.write(0x14, 1, 11);
        virtio.write(0x18, 2, ENTRIES.into());
        for (at, ring) in [(0x20, TABLE), (0x28, AVAILABLE), (0x30, USED)] {
            virtio.write(at, 8, ring);
        }
        virtio.write(0x1c, 2, 1);
        virtio.write(0x14, 1, 15);
    }
    run(&mut virtio, &memory, input.steps);
    virtio.write(0x14, 1, 0);
    assert_eq!(virtio.pci.read_bar(0, 0x14, 1), 0, "it comes back from a reset");
}
