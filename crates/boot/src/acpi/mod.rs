//! The ACPI tables (ACPI 6.5, chapter 5): how a guest's kernel finds processors, interrupt controllers, timers and PCI.
//!
//! [`build`] makes tables that do not know where they will lie; [`Tables::place`] puts them into low memory for a guest that
//! starts without firmware. Firmware is handed the same tables with a list of what to patch: [`Tables::for_firmware`].

mod dsdt;
mod hotplug;
mod loader;
mod tables;

use std::ops::Range;

pub use hotplug::HotPlug;
pub use loader::{ForFirmware, LOADER, RSDP, TABLES};
use memory::Memory;

pub use crate::map::{MCFG, MCFG_SIZE};
use crate::{Error, at, place};

/// What the tables describe.
#[derive(Clone, Debug)]
pub struct Config {
    /// Number of processors; their APIC ids are 0, 1, ….
    pub cpus: u32,
    /// Whether there are a VGA, a keyboard and a mouse.
    pub screen: bool,
    /// I/O ports of the PM block: PM1a event, PM1a control, PM timer (24 bits), GPE0.
    pub pm: Pm,
    /// GSI of system control interrupts.
    pub sci: u8,
    /// The windows below 4 GiB for PCI devices.
    pub pci_windows32: Vec<Range<u64>>,
    /// The 64-bit window for PCI devices: first address and size.
    pub pci_window64: (u64, u64),
    /// Where the PCI configuration space is in memory: [`MCFG`] unless firmware has moved it.
    pub mcfg: u64,
    /// The slots of bus 0.
    pub hotplug: HotPlug,
    /// Where there may come to be memory, if there may.
    pub pluggable: Option<PluggableMemory>,
}

/// Memory that comes and goes.
#[derive(Clone, Debug)]
pub struct PluggableMemory {
    /// RAM that is always there.
    pub fixed: Vec<Range<u64>>,
    /// Where more may come.
    pub room: Range<u64>,
}

/// The PM block's ports.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Pm {
    pub event: u16,
    pub control: u16,
    pub timer: u16,
    pub gpe0: u16,
    pub gpe0_len: u8,
    /// What is to be written as SLP_TYP for S5.
    pub s5: u8,
}

/// The 32-bit window for PCI devices.
pub const PCI_WINDOW: Range<u64> = 0xc000_0000..0xfec0_0000;

/// A table: bytes, with offsets in it where other tables' addresses go.
#[derive(Clone, Debug)]
pub(crate) struct Blob {
    bytes: Vec<u8>,
    /// Offset in `bytes`, width in bytes, and the table that is pointed to.
    links: Vec<(usize, usize, &'static str)>,
    name: &'static str,
    align: u64,
}

/// All tables.
#[derive(Clone, Debug)]
pub struct Tables(Vec<Blob>);

/// Makes the tables of `config`.
pub fn build(config: &Config) -> Tables {
    Tables(tables::all(config))
}

impl Tables {
    /// The tables by their signatures, as they are before addresses are put in.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &[u8])> {
        self.0.iter().map(|blob| (blob.name, blob.bytes.as_slice()))
    }

    /// Puts the tables where firmware would, below 1 MiB; the address of the root pointer (RSDP).
    ///
    /// # Errors
    /// They do not fit.
    pub fn place(mut self, memory: &Memory) -> Result<u64, Error> {
        let mut next = at::ACPI;
        let mut addresses = Vec::new();
        for blob in &self.0 {
            let address = next.next_multiple_of(blob.align);
            addresses.push((blob.name, address));
            next = address + blob.bytes.len() as u64;
        }
        if next > at::SMBIOS {
            return Err(Error::NoMemory(next));
        }
        let find = |name| addresses.iter().find(|(n, _)| *n == name).map_or(0, |(_, a)| *a);
        for blob in &mut self.0 {
            for &(offset, width, to) in &blob.links {
                blob.bytes[offset..offset + width].copy_from_slice(&find(to).to_le_bytes()[..width]);
            }
            tables::fix_checksums(blob);
            place::bytes(memory, find(blob.name), &blob.bytes)?;
        }
        Ok(find("RSDP"))
    }
}

/// The GSI that pin `pin` (0 is INTA) of device `slot` on bus 0 is wired to: 20 to 23 in turns, by the lines PIRQE to PIRQH
/// of the LPC bridge, as the devices are.
pub const fn intx_gsi(slot: u32, pin: u32) -> u32 {
    20 + (slot + pin) % 4
}
