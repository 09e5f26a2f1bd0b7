//! The Intel network controller at a cable that brings all frames back.
#![no_main]

use std::sync::{Arc, OnceLock};

use devices::e1000::E1000;
use devices::net::{Guest, Header, Link};
use devices::pci::Function;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use lodge_devices_fuzz::{Step, Target, memory, put, run};
use machine::{Clock, Timers};
use memory::Memory;

const RINGS: [u32; 2] = [0x1_0000, 0x1_1000];
/// Registers of the receive ring, and of the one for transmission.
const BASES: [u64; 2] = [0x2800, 0x3800];

/// A descriptor in one of the rings, and the ring's tail behind it.
#[derive(Arbitrary, Debug)]
struct Command {
    transmit: bool,
    at: u8,
    address: u32,
    length: u16,
    command: u8,
    kind: u8,
    rest: u32,
    /// A frame comes from the cable.
    frame: Option<(u8, u16)>,
}

#[derive(Arbitrary, Debug)]
struct Input {
    /// The rings are set up first, of so many times 8 descriptors.
    rings: Option<u8>,
    steps: Vec<Step<Command>>,
}

#[derive(Default)]
struct Mirror(OnceLock<Guest>);

impl Link for Mirror {
    fn connect(&self, guest: Guest) {
        let _ = self.0.set(guest);
    }

    fn send(&self, header: &Header, frame: &[u8]) {
        assert_eq!(*header, Header::default());
        if let Some(guest) = self.0.get() {
            guest.deliver(header, frame);
        }
    }
}

struct Nic {
    nic: Arc<E1000>,
    link: Arc<Mirror>,
    memory: Memory,
}

impl Nic {
    fn write(&self, at: u64, value: u32) {
        self.nic.write_bar(0, at, 4, value.into());
    }
}

impl Target for Nic {
    type Command = Command;
    const BAR: usize = 0;

    fn function(&self) -> &dyn Function {
        &*self.nic
    }

    fn command(&mut self, c: Command) {
        let n = usize::from(c.transmit);
        let at = u64::from(RINGS[n]) + 16 * u64::from(c.at);
        put(&self.memory, at, &u64::from(c.address & 0x3f_ffff).to_le_bytes());
        let [low, high] = c.length.to_le_bytes();
        put(&self.memory, at + 8, &[low, high, c.kind, c.command]);
        put(&self.memory, at + 12, &c.rest.to_le_bytes());
        self.write(BASES[n] + 0x18, u32::from(c.at) + 1);
        if let (Some((to, len)), Some(guest)) = (c.frame, self.link.0.get()) {
            guest.deliver(&Header::default(), &vec![to; usize::from(len)]);
        }
    }

    fn drain(&self) {
        self.nic.drain();
    }

    fn save(&self) {
        self.nic.set_state(&self.nic.state());
    }
}

fuzz_target!(|input: Input| {
    let memory = memory();
    let link = Arc::new(Mirror::default());
    let clock = Arc::new(Clock::manual(1_000_000));
    let timers = Timers::new(clock.clone()).expect("a thread");
    let nic = E1000::new([2, 0, 0, 0, 0, 1], link.clone(), memory.clone(), clock, &timers).expect("a thread");
    let mut target = Nic { nic, link, memory: memory.clone() };
    if let Some(size) = input.rings {
        for (base, ring) in BASES.into_iter().zip(RINGS) {
            target.write(base, ring);
            target.write(base + 8, u32::from(size) * 128);
        }
        target.write(0x100, 1 << 15 | 0x1a);
        target.write(0x400, 0xa);
        target.nic.config().set(4, &[6]);
    }
    run(&mut target, &memory, input.steps);
});
