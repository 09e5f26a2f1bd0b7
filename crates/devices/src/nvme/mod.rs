//! An NVMe controller with one namespace (NVM Express Base Specification 1.4).
//!
//! A thread for each submission queue does its commands one after the other. What breaks the rules ends a command with an error
//! status or, where the controller cannot say so any more (queues beside memory, doorbells beyond a queue's end), puts the
//! controller in its fatal state, until the driver resets it.

mod admin;
mod command;
mod identify;
mod io;
mod registers;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use disks::Disk;
use memory::Memory;
use serde::{Deserialize, Serialize};

use crate::pci::{Bar, Config, Function, Id};
use crate::{Saved, join, lock, read_words, write_words};
use command::Status;
use registers::{Registers, reg};

/// What drivers know it by is its class; the rest is that of another well-known virtual controller.
const ID: Id =
    Id { vendor: 0x1b36, device: 0x10, revision: 2, class: 0x01_0802, subsystem: (0x1af4, 0x1100) };
/// Registers, then doorbells.
const BAR: u64 = 0x4000;
const SECTOR: u64 = 512;
/// I/O queues of either kind: OVMF makes two, whatever the controller says that it has.
const FEWEST_QUEUES: u32 = 2;
/// And at most.
pub const MOST_QUEUES: u32 = 32;

type Result<T> = std::result::Result<T, Status>;

/// The controller's state. Its configuration space is saved with the PCI host's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NvmeState {
    registers: Registers,
}

/// The controller as a PCI function.
pub struct Nvme {
    inner: Arc<Inner>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Inner {
    config: Config,
    memory: Memory,
    disk: Arc<Disk>,
    serial: String,
    registers: Mutex<Registers>,
    /// By submission queue. A thread holds its turn while it is at a command, so whoever holds a turn knows that the queue
    /// touches no memory. Turns are locked before registers.
    turns: Vec<Mutex<()>>,
    /// Tells a queue's thread that there may be work.
    wakes: Vec<Condvar>,
    /// A command has ended.
    idle: Condvar,
    stopped: AtomicBool,
}

impl fmt::Debug for Nvme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nvme").field("disk", &self.inner.disk).finish_non_exhaustive()
    }
}

impl Nvme {
    /// A controller for `disk`, with `queues` (2 to [`MOST_QUEUES`]) I/O queues, which works in `memory`. The guest sees 20
    /// letters of the serial number.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn new(disk: Arc<Disk>, serial: &str, queues: u32, memory: Memory) -> std::io::Result<Arc<Self>> {
        let queues = queues.clamp(FEWEST_QUEUES, MOST_QUEUES) as usize + 1;
        let mut config = Config::new(ID);
        config.use_intx();
        config.add_bar(Bar::Memory64(BAR));
        config.add_msi();
        config.add_msix(queues as u16);
        let inner = Arc::new(Inner {
            config,
            memory,
            disk,
            serial: serial.into(),
            registers: Mutex::new(Registers::new(queues)),
            turns: (0..queues).map(|_| Mutex::new(())).collect(),
            wakes: (0..queues).map(|_| Condvar::new()).collect(),
            idle: Condvar::new(),
            stopped: AtomicBool::new(false),
        });
        let this = Arc::new(Self { inner: inner.clone(), threads: Mutex::default() });
        for n in 0..queues {
            let inner = inner.clone();
            let thread =
                std::thread::Builder::new().name(format!("nvme-{n}")).spawn(move || inner.serve(n))?;
            lock(&this.threads).push(thread);
        }
        Ok(this)
    }

    /// Does all that there is to do, so that a fuzzer's input always does the same.
    #[cfg(fuzzing)]
    pub fn drain(&self) {
        let work = |n| {
            let registers = lock(&self.inner.registers);
            let command = registers.has_command(n) && self.inner.config.bus_master();
            registers.busy[n] || command || n == 0 && registers.wants_shutdown()
        };
        while let Some(n) = (0..self.inner.turns.len()).find(|&n| work(n)) {
            self.inner.step(n);
        }
    }

    /// Its registers and queues.
    pub fn state(&self) -> Saved<NvmeState> {
        let _turns: Vec<_> = self.inner.turns.iter().map(lock).collect();
        Saved::V1(NvmeState { registers: lock(&self.inner.registers).clone() })
    }

    /// Goes on from `state`.
    pub fn set_state(&self, state: &Saved<NvmeState>) {
        let Saved::V1(state) = state;
        let _turns: Vec<_> = self.inner.turns.iter().map(lock).collect();
        let mut registers = lock(&self.inner.registers);
        registers.set(&state.registers);
        self.inner.config.set_intx(registers.asks());
        self.inner.wakes.iter().for_each(Condvar::notify_all);
    }
}

impl Drop for Nvme {
    fn drop(&mut self) {
        {
            let _registers = lock(&self.inner.registers);
            self.inner.stopped.store(true, Ordering::SeqCst);
            self.inner.wakes.iter().for_each(Condvar::notify_all);
        }
        join(&self.threads);
    }
}

impl Function for Nvme {
    fn config(&self) -> &Config {
        &self.inner.config
    }

    fn read_bar(&self, bar: usize, offset: u64, size: u8) -> u64 {
        if bar != 0 {
            return 0;
        }
        let registers = lock(&self.inner.registers);
        read_words(offset, size, |at| registers.read(at))
    }

    fn write_bar(&self, bar: usize, offset: u64, size: u8, value: u64) {
        // A doorbell is one word, however wide the write.
        let size = if offset < reg::DOORBELLS { size } else { size.min(4) };
        if bar == 0 {
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
        registers.write(at, value);
        self.config.set_intx(registers.asks());
        self.wake(&registers);
    }

    /// Wakes whoever has work now.
    fn wake(&self, registers: &Registers) {
        for (n, wake) in self.wakes.iter().enumerate() {
            if registers.has_command(n) || n == 0 && registers.wants_shutdown() {
                wake.notify_all();
            }
        }
    }

    /// Waits for work of queue `n`. False if there will be none any more.
    fn wait(&self, n: usize) -> bool {
        let mut registers = lock(&self.registers);
        loop {
            if self.stopped.load(Ordering::SeqCst) {
                return false;
            }
            let command = registers.has_command(n) && self.config.bus_master();
            if command || n == 0 && registers.wants_shutdown() {
                return true;
            }
            registers = self.wakes[n].wait(registers).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// The thread of queue `n`, until the controller goes.
    fn serve(&self, n: usize) {
        while self.wait(n) {
            self.step(n);
        }
    }

    /// Does the next command of queue `n`, if there is one.
    fn step(&self, n: usize) {
        let _turn = lock(&self.turns[n]);
        if n == 0 && lock(&self.registers).wants_shutdown() {
            // There is nobody to tell if it fails.
            let _ = self.disk.flush();
            lock(&self.registers).end_shutdown();
        }
        let Some(taken) = lock(&self.registers).take(n, &self.memory) else { return };
        let end = if n == 0 { self.administrate(&taken.command) } else { self.perform(&taken.command) };
        let end = match end {
            Ok(result) => result.map(|result| (Status::OK, result)),
            Err(status) => Some((status, 0)),
        };
        let mut registers = lock(&self.registers);
        let vector = registers.finish(n, &taken, end, &self.memory);
        self.config.set_intx(registers.asks());
        if let Some(vector) = vector {
            self.config.notify(vector);
        }
        self.wake(&registers);
        self.idle.notify_all();
    }
}
