//! A SATA controller as in Intel's ICH9 (AHCI 1.3.1), with disks and CD-ROM drives at up to six ports. Of the older IDE
//! interface there is nothing.
//!
//! A thread for each port executes its commands one after the other, also those that are queued. What breaks the rules stops
//! its port with an error that the driver finds in the port's interrupt status, until the driver starts the port again.

mod ata;
mod atapi;
mod fis;
mod identify;
mod registers;
#[cfg(test)]
mod tests;
mod worker;

use std::fmt;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use disks::Disk;
use memory::Memory;
use serde::{Deserialize, Serialize};

use crate::dma::{Fault, Pieces};
use crate::pci::{Address, Bar, Config, Function, Id};
use crate::{Saved, join, lock, read_words, write_words};

pub use ata::AtaState;
pub use atapi::{AtapiState, Sense};
use fis::{Done, Taskfile};
pub use registers::PORTS;
use registers::{PORT_BASE, PORT_SIZE, Registers};

/// Where it is in a PC with Intel's Q35.
pub const ADDRESS: Address = match Address::new(0x1f, 2) {
    Some(address) => address,
    None => panic!("a device has eight functions"),
};
/// The BAR with its registers.
const ABAR: usize = 5;
/// Configuration: how ports are used, which firmware and drivers write; 0x40 says AHCI.
const MAP: usize = 0x90;

/// What is at a port.
#[derive(Clone, Debug)]
pub enum Attached {
    /// A disk, with its serial number, of which the guest sees 20 letters.
    Disk(Arc<Disk>, String),
    /// A CD-ROM drive with a medium, which is only read.
    Cd(Arc<Disk>, String),
}

/// What a device remembers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnitState {
    /// A disk.
    Disk(AtaState),
    /// A CD-ROM drive.
    Cd(AtapiState),
}

/// The controller's state, with that of its devices. Its configuration space is saved with the PCI host's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AhciState {
    registers: Registers,
    units: Vec<UnitState>,
}

/// Where a command's data is.
struct Io<'a> {
    memory: &'a Memory,
    pieces: &'a Pieces,
}

/// A device at a port.
#[derive(Debug)]
enum Unit {
    Disk(ata::Ata),
    Cd(atapi::Atapi),
}

impl Unit {
    fn new(attached: &Attached) -> Self {
        match attached {
            Attached::Disk(disk, serial) => Self::Disk(ata::Ata::new(disk.clone(), serial)),
            Attached::Cd(disk, serial) => Self::Cd(atapi::Atapi::new(disk.clone(), serial)),
        }
    }

    fn signature(&self) -> Done {
        match self {
            Self::Disk(_) => ata::Ata::signature(),
            Self::Cd(_) => atapi::Atapi::signature(),
        }
    }

    fn command(&mut self, task: &Taskfile, packet: &[u8; 16], io: &Io<'_>) -> Result<Done, Fault> {
        match self {
            Self::Disk(disk) => disk.command(task, io),
            Self::Cd(cd) => cd.command(task, packet, io),
        }
    }

    fn state(&self) -> UnitState {
        match self {
            Self::Disk(disk) => UnitState::Disk(disk.state.clone()),
            Self::Cd(cd) => UnitState::Cd(cd.state.clone()),
        }
    }

    fn set_state(&mut self, state: &UnitState) {
        match (self, state) {
            (Self::Disk(disk), UnitState::Disk(state)) => disk.set_state(state),
            (Self::Cd(cd), UnitState::Cd(state)) => cd.state = state.clone(),
            // Another machine's: the device stays as it is.
            _ => {}
        }
    }
}

/// The controller as a PCI function, for [`ADDRESS`].
pub struct Ahci {
    inner: Arc<Inner>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Inner {
    config: Config,
    memory: Memory,
    registers: Mutex<Registers>,
    /// By port. A thread holds its unit while it is at a command, so whoever holds a unit knows that it touches no memory.
    /// Units are locked before registers.
    units: Vec<Mutex<Unit>>,
    /// Tells a port's thread that there may be work.
    wakes: Vec<Condvar>,
    stopped: std::sync::atomic::AtomicBool,
}

impl fmt::Debug for Ahci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ahci").field("units", &self.inner.units).finish_non_exhaustive()
    }
}

fn configuration() -> Config {
    let mut config = Config::new(Id {
        vendor: 0x8086,
        device: 0x2922,
        revision: 2,
        class: 0x01_0601,
        subsystem: (0x1af4, 0x1100),
    });
    config.use_intx();
    config.add_bar_at(ABAR, Bar::Memory32((PORT_BASE + PORTS as u64 * PORT_SIZE) as u32));
    config.add_msi();
    config.put(MAP, &[0x40]);
    config.allow(MAP, &[0, 0, 0x3f, 0]);
    config
}

impl Ahci {
    /// A controller with `devices` at its first ports, which works in `memory`.
    ///
    /// # Errors
    /// The host gives no thread.
    ///
    /// # Panics
    /// There are more devices than [`PORTS`].
    pub fn new(devices: &[Attached], memory: Memory) -> std::io::Result<Arc<Self>> {
        assert!(devices.len() <= PORTS, "the controller has {PORTS} ports");
        let inner = Arc::new(Inner {
            config: configuration(),
            memory,
            registers: Mutex::new(Registers::new((1 << devices.len()) - 1)),
            units: devices.iter().map(|device| Mutex::new(Unit::new(device))).collect(),
            wakes: devices.iter().map(|_| Condvar::new()).collect(),
            stopped: false.into(),
        });
        let this = Arc::new(Self { inner: inner.clone(), threads: Mutex::default() });
        for n in 0..devices.len() {
            let inner = inner.clone();
            let thread =
                std::thread::Builder::new().name(format!("sata-{n}")).spawn(move || inner.serve(n))?;
            lock(&this.threads).push(thread);
        }
        Ok(this)
    }

    /// Does all that there is to do, so that a fuzzer's input always does the same.
    #[cfg(fuzzing)]
    pub fn drain(&self) {
        for n in 0..self.inner.units.len() {
            while self.inner.has_work(n) {
                self.inner.step(n);
            }
        }
    }

    /// Its registers, and what its devices remember.
    pub fn state(&self) -> Saved<AhciState> {
        let units: Vec<_> = self.inner.units.iter().map(lock).collect();
        let registers = lock(&self.inner.registers).clone();
        Saved::V1(AhciState { registers, units: units.iter().map(|unit| unit.state()).collect() })
    }

    /// Goes on from `state`, at a controller with the same devices.
    pub fn set_state(&self, state: &Saved<AhciState>) {
        let Saved::V1(state) = state;
        let mut units: Vec<_> = self.inner.units.iter().map(lock).collect();
        units.iter_mut().zip(&state.units).for_each(|(unit, state)| unit.set_state(state));
        let mut registers = lock(&self.inner.registers);
        registers.set(&state.registers);
        self.inner.settle(&mut registers, false);
        self.inner.wakes.iter().for_each(Condvar::notify_all);
    }
}

impl Drop for Ahci {
    fn drop(&mut self) {
        self.inner.stop();
        join(&self.threads);
    }
}

impl Function for Ahci {
    fn config(&self) -> &Config {
        &self.inner.config
    }

    fn read_bar(&self, bar: usize, offset: u64, size: u8) -> u64 {
        if bar != ABAR {
            return 0;
        }
        let registers = lock(&self.inner.registers);
        read_words(offset, size, |at| registers.read(at))
    }

    fn write_bar(&self, bar: usize, offset: u64, size: u8, value: u64) {
        if bar == ABAR {
            write_words(offset, size, value, |at, word| self.inner.write(at, word));
        }
    }

    fn config_written(&self, _: u8) {
        // It may be bus master now.
        let _registers = lock(&self.inner.registers);
        self.inner.wakes.iter().for_each(Condvar::notify_all);
    }
}

impl Inner {
    fn write(&self, at: u64, value: u32) {
        let mut registers = lock(&self.registers);
        let again = registers.write(at, value);
        self.settle(&mut registers, again);
        self.wakes.iter().enumerate().filter(|(n, _)| registers.ports[*n].has_work()).for_each(
            |(_, wake)| {
                wake.notify_all();
            },
        );
    }

    /// Brings the interrupt up to date; `tell` if something happened that a message is to tell.
    fn settle(&self, registers: &mut Registers, tell: bool) {
        let level = registers.settle();
        self.config.set_intx(level);
        if level && tell {
            self.config.notify(0);
        }
    }
}
