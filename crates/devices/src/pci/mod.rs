//! PCI: a host bridge as in Intel's Q35, the ICH9's LPC bridge, and what a device needs to be a function on bus 0
//! (PCI Local Bus Specification 3.0; PCI Firmware Specification 3.0 for the memory-mapped configuration space).
//!
//! A device has a [`Config`], its configuration space, and implements [`Function`]. [`Host::plug`] connects it to its
//! interrupts. Its BARs answer on the machine's buses where the guest put them, while the command register enables it.

mod config;
mod host;
mod hotplug;
mod lpc;
mod msi;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use machine::EventFd;
use serde::{Deserialize, Serialize};

pub use config::{Bar, Config, ConfigState, Id};
pub use host::{Full, Host, HostState, Windows};
pub use hotplug::{HotPlug, HotPlugState};
pub use lpc::{Lpc, LpcState};

use crate::At;

/// Ports of the configuration mechanism #1. The reset control register is among them.
pub const CONFIG: At = At::new(0xcf8, 8);
/// The memory-mapped configuration space of 256 buses, unless firmware moves it.
pub const ECAM: At = At::new(0xb000_0000, 256 << 20);
/// Ports of the hot-plug registers.
pub const HOTPLUG: At = At::new(0xcc0, 0x10);
/// The general-purpose event that says that they have news.
pub const HOTPLUG_GPE: u8 = 1;
/// Where the LPC bridge is.
pub const LPC: Address = Address { device: 0x1f, function: 0 };
/// The first GSI of the eight PIRQ lines.
pub const PIRQ_GSI: u8 = 16;

/// Where a function is on bus 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Address {
    device: u8,
    function: u8,
}

impl Address {
    /// `device` below 32, `function` below 8.
    pub const fn new(device: u8, function: u8) -> Option<Self> {
        if device < 32 && function < 8 { Some(Self { device, function }) } else { None }
    }

    /// The device's number.
    pub const fn device(self) -> u8 {
        self.device
    }

    /// The function's number within the device.
    pub const fn function(self) -> u8 {
        self.function
    }

    /// Which PIRQ line (0 is A) INTA# to INTD# (`pin` 0 to 3) of this device is wired to: E to H in turns. The ACPI tables
    /// are to tell the same; the line's GSI is [`PIRQ_GSI`] more.
    pub const fn pirq(self, pin: u8) -> u8 {
        4 + (self.device + pin) % 4
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.{}", self.device, self.function)
    }
}

/// A device on the PCI bus. Called from any vCPU's thread.
pub trait Function: Send + Sync {
    /// Its configuration space.
    fn config(&self) -> &Config;

    /// Reads `size` bytes at `offset` of BAR `bar`, as [`machine::Registers::read`] does. Not called for MSI-X tables.
    fn read_bar(&self, _bar: usize, _offset: u64, _size: u8) -> u64 {
        0
    }

    /// Writes to BAR `bar`.
    fn write_bar(&self, _bar: usize, _offset: u64, _size: u8, _value: u64) {}

    /// The doorbells in BAR `bar`, as [`machine::Registers::doorbells`] tells them.
    fn doorbells(&self, _bar: usize) -> Vec<(u64, Arc<EventFd>)> {
        Vec::new()
    }

    /// The memory that a BAR is, if it is none of registers: the guest reaches it without the function. Where it cannot (other
    /// memory is in the way), [`Function::read_bar`] and [`Function::write_bar`] are called as for registers.
    fn bar_memory(&self, _bar: usize) -> Option<&memory::Window> {
        None
    }

    /// The guest is about to read configuration space at `offset`; the function may bring it up to date.
    fn config_read(&self, _offset: u8) {}

    /// The guest wrote to configuration space at `offset`.
    fn config_written(&self, _offset: u8) {}
}
