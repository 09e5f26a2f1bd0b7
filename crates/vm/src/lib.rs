//! A virtual machine as its owner knows it: configuration in, running machine out.
//!
//! The only place that puts engine, devices and guest together: [`assemble`] is the list of what is in the PC.
#![forbid(unsafe_code)]

mod assemble;
mod config;
mod console;
pub mod control;
mod cpus;
mod error;
mod firmware;
mod gdb;
pub mod host;
mod nics;
mod port;
mod storage;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use machine::cpu::Stats;

pub use boot::is_disk;
pub use config::{
    Balloon, Boot, Choice, Config, Disk, DiskBus, Display, Firmware, Guest, Header, Link, Mac, Nic, NicModel,
    Plugs, Share, Sockets, Variables,
};
pub use console::Console;
pub use devices::virtio::fs::LONGEST_TAG;
pub use error::Error;
pub use machine::Power;
pub use machine::power::End;
pub use nics::Nics;
pub use port::{Count, Limits, Traffic};
pub use screens::Screen;
pub use shares::Share as ShareDirectory;
pub use storage::{Disks, Refusal};
pub use x86::cpuid::Model;

use assemble::Assembly;
use cpus::Cpus;

/// A virtual machine.
pub struct Vm {
    assembly: Assembly,
    cpus: Arc<Cpus>,
    console: Arc<Console>,
    power: Power,
    assembled: Duration,
    ran: Duration,
    paused: bool,
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm")
            .field("engine", &self.assembly.engine)
            .field("cpus", &self.cpus)
            .finish_non_exhaustive()
    }
}

/// What a VM did.
#[derive(Clone, Debug)]
pub struct Report {
    /// What ran it.
    pub engine: &'static str,
    /// How long each phase took.
    pub phases: Vec<(&'static str, Duration)>,
    /// What each vCPU counted.
    pub cpus: Vec<Stats>,
    /// Bytes of host memory that the guest's took at the end.
    pub held: u64,
}

impl Vm {
    /// A machine that is ready to run.
    ///
    /// # Errors
    /// The configuration is not one that can be, a file is not what it has to be, or the host refuses something.
    pub fn new(config: &Config, console: &Arc<Console>) -> Result<Self, Error> {
        Self::restart(config, console, &Power::default())
    }

    /// The same machine again, after a reset; its end is told to the same `power`.
    ///
    /// # Errors
    /// As [`Vm::new`].
    pub fn restart(config: &Config, console: &Arc<Console>, power: &Power) -> Result<Self, Error> {
        let begun = Instant::now();
        let mut assembly = assemble::assemble(config, console, power)?;
        let cpus = Arc::new(Cpus::start(std::mem::take(&mut assembly.vcpus), power)?);
        Ok(Self {
            assembly,
            cpus,
            console: console.clone(),
            power: power.clone(),
            assembled: begun.elapsed(),
            ran: Duration::ZERO,
            paused: false,
        })
    }

    /// What runs it.
    pub fn engine(&self) -> &'static str {
        self.assembly.engine
    }

    /// The power switch.
    pub fn power(&self) -> &Power {
        &self.power
    }

    /// Lets gdb control the guest, at this address. The guest waits for it.
    ///
    /// # Errors
    /// The address cannot be listened at.
    pub fn debug(&mut self, listener: std::net::TcpListener) -> Result<(), Error> {
        self.paused = true;
        gdb::serve(listener, &self.cpus, &self.assembly.machine.memory, &self.power)
    }

    /// Runs the guest until it ends, or until `deadline`: then there is no end.
    pub fn run(&mut self, deadline: Option<Instant>) -> Option<End> {
        let begun = Instant::now();
        if !self.paused {
            self.cpus.resume_all();
        }
        let end = self.power.wait(deadline);
        self.cpus.pause_all();
        self.ran = begun.elapsed();
        match end {
            // A kernel that panicked resets the machine, if it was told to.
            Some(End::Reset) if self.console.panicked() => Some(End::Panic),
            end => end,
        }
    }

    /// Ends the threads; what was counted.
    pub fn stop(self) -> Report {
        Report {
            engine: self.assembly.engine,
            phases: vec![("machine ready after", self.assembled), ("guest ran for", self.ran)],
            cpus: self.cpus.stop(),
            held: self.assembly.machine.memory.held(),
        }
    }
}
