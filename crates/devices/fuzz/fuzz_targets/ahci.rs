//! The SATA controller with a disk and a CD.
#![no_main]

use std::sync::Arc;

use devices::ahci::{Ahci, Attached};
use devices::pci::Function;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use lodge_devices_fuzz::{Step, Target, disk, memory, put, run};
use memory::Memory;

const LISTS: u32 = 0x1_0000;
const RECEIVED: u32 = 0x1_2000;
const TABLES: u32 = 0x2_0000;

#[derive(Arbitrary, Debug)]
struct Command {
    cd: bool,
    slot: u8,
    flags: u16,
    /// It is a register FIS with a command.
    sound: bool,
    fis: [u8; 20],
    packet: [u8; 12],
    pieces: Vec<(u32, u16)>,
    more_pieces: u16,
}

#[derive(Arbitrary, Debug)]
struct Input {
    /// The ports are started first.
    started: bool,
    steps: Vec<Step<Command>>,
}

struct Sata {
    ahci: Arc<Ahci>,
    memory: Memory,
}

impl Sata {
    fn write(&self, at: u64, value: u32) {
        self.ahci.write_bar(Self::BAR, at, 4, value.into());
    }
}

impl Target for Sata {
    type Command = Command;
    const BAR: usize = 5;

    fn function(&self) -> &dyn Function {
        &*self.ahci
    }

    fn command(&mut self, mut c: Command) {
        let (port, slot) = (u32::from(c.cd), u32::from(c.slot & 31));
        let table = TABLES + slot * 0x1000;
        let pieces = c.pieces.len().min(64);
        if c.sound {
            c.flags = c.flags & !0x1f | 5;
            c.fis[..2].copy_from_slice(&[0x27, 0x80]);
        }
        let count = (pieces as u16).saturating_add(if c.sound { c.more_pieces & 3 } else { c.more_pieces });
        let header = u32::from(count) << 16 | u32::from(c.flags);
        let at = u64::from(LISTS + port * 0x400 + slot * 32);
        put(&self.memory, at, &header.to_le_bytes());
        put(&self.memory, at + 8, &u64::from(table).to_le_bytes());
        put(&self.memory, table.into(), &c.fis);
        put(&self.memory, u64::from(table) + 0x40, &c.packet);
        for (n, (address, len)) in c.pieces.iter().take(pieces).enumerate() {
            let at = u64::from(table) + 0x80 + 16 * n as u64;
            // Often in memory, and sometimes not.
            put(&self.memory, at, &u64::from(address & 0x7f_ffff).to_le_bytes());
            put(&self.memory, at + 12, &u32::from(*len).to_le_bytes());
        }
        let registers = u64::from(0x100 + port * 0x80);
        if matches!(c.fis[2], 0x60 | 0x61) {
            self.write(registers + 0x34, 1 << slot);
        }
        self.write(registers + 0x38, 1 << slot);
    }

    fn drain(&self) {
        self.ahci.drain();
    }

    fn save(&self) {
        self.ahci.set_state(&self.ahci.state());
    }
}

fuzz_target!(|input: Input| {
    let memory = memory();
    let devices = [Attached::Disk(disk(), "fuzz".into()), Attached::Cd(disk(), "fuzz".into())];
    let ahci = Ahci::new(&devices, memory.clone()).expect("threads");
    let mut sata = Sata { ahci, memory: memory.clone() };
    sata.function().config().set(4, &[6]);
    sata.drain();
    if input.started {
        sata.write(4, 2);
        for port in 0..2 {
            let at = u64::from(0x100 + port * 0x80);
            sata.write(at, LISTS + port * 0x400);
            sata.write(at + 8, RECEIVED + port * 0x100);
            sata.write(at + 0x14, u32::MAX);
            sata.write(at + 0x18, 0x11);
        }
    }
    run(&mut sata, &memory, input.steps);
    sata.write(4, 1);
    sata.drain();
    assert_eq!(sata.ahci.read_bar(5, 4, 4), 1 << 31, "it comes back from a reset");
    assert_eq!(sata.ahci.read_bar(5, 0x120, 4), 0x150, "and so does its disk");
});
