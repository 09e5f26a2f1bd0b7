//! The NVMe controller.
#![no_main]

use std::sync::Arc;

use devices::nvme::Nvme;
use devices::pci::Function;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use lodge_devices_fuzz::{Step, Target, disk, memory, put, run};
use memory::Memory;

const QUEUES: u32 = 0x1_0000;
const ENTRIES: u32 = 8;

#[derive(Arbitrary, Debug)]
struct Command {
    queue: u8,
    opcode: u8,
    flags: u8,
    namespace: Option<u32>,
    prp: [u32; 2],
    words: [u32; 3],
    /// Its completion is read.
    read: bool,
}

#[derive(Arbitrary, Debug)]
struct Input {
    /// The controller is enabled and has queues.
    started: bool,
    steps: Vec<Step<Command>>,
}

struct Controller {
    nvme: Arc<Nvme>,
    memory: Memory,
    tails: [u32; 3],
}

impl Controller {
    fn write(&self, at: u64, value: u32) {
        self.nvme.write_bar(0, at, 4, value.into());
    }

    fn create(&mut self, n: u32) {
        for (opcode, at, word) in [(5, 0x8000, n << 16 | 3), (1, 0, n << 16 | 1)] {
            self.command(Command {
                queue: 0,
                opcode,
                flags: 0,
                namespace: None,
                prp: [QUEUES + at + n * 0x1000, 0],
                words: [(ENTRIES - 1) << 16 | n, word, 0],
                read: true,
            });
        }
    }
}

impl Target for Controller {
    type Command = Command;
    const BAR: usize = 0;

    fn function(&self) -> &dyn Function {
        &*self.nvme
    }

    fn command(&mut self, c: Command) {
        let n = usize::from(c.queue % 3);
        let mut entry = [0; 64];
        entry[..2].copy_from_slice(&[c.opcode, c.flags]);
        entry[4..8].copy_from_slice(&c.namespace.unwrap_or(1).to_le_bytes());
        for (at, prp) in [24, 32].into_iter().zip(c.prp) {
            // Often in memory, and sometimes not.
            entry[at..at + 4].copy_from_slice(&(prp & 0x7f_ffff).to_le_bytes());
        }
        for (at, word) in [40, 44, 48].into_iter().zip(c.words) {
            entry[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        put(&self.memory, u64::from(QUEUES + n as u32 * 0x1000 + 64 * self.tails[n]), &entry);
        self.tails[n] = (self.tails[n] + 1) % ENTRIES;
        let doorbell = 0x1000 + 8 * n as u64;
        self.write(doorbell, self.tails[n]);
        self.drain();
        if c.read {
            self.write(doorbell + 4, self.tails[n]);
        }
    }

    fn drain(&self) {
        self.nvme.drain();
    }

    fn save(&self) {
        self.nvme.set_state(&self.nvme.state());
    }
}

fuzz_target!(|input: Input| {
    let memory = memory();
    let nvme = Nvme::new(disk(), "fuzz", 2, memory.clone()).expect("threads");
    let mut controller = Controller { nvme, memory: memory.clone(), tails: [0; 3] };
    controller.function().config().set(4, &[6]);
    if input.started {
        controller.write(0x24, (ENTRIES - 1) << 16 | (ENTRIES - 1));
        controller.write(0x28, QUEUES);
        controller.write(0x30, QUEUES + 0x8000);
        controller.write(0x14, 0x46_0001);
        controller.create(1);
        controller.create(2);
    }
    run(&mut controller, &memory, input.steps);
    // The end of a shutdown stays to be seen until a reset, which is only of a controller that is enabled.
    controller.write(0x14, 1);
    controller.write(0x14, 0);
    controller.drain();
    assert_eq!(controller.nvme.read_bar(0, 0x1c, 4), 0, "it comes back from a reset");
});
