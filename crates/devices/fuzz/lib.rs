//! What the fuzz targets share: a guest that does anything at all to a device.

pub mod virtio;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use devices::pci::Function;
use disks::{Disk, Format, Options};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use memory::Memory;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

/// Bytes of guest memory, and of the disk.
pub const MEMORY: u64 = 2 << 20;
pub const DISK: u64 = 1 << 17;

/// One thing that the guest does; `C` is a command of the device's.
#[derive(Arbitrary, Debug)]
pub enum Step<C> {
    /// A read or write of a register, of 1, 2, 4 or 8 bytes.
    Read(u16, u8),
    Write(u16, u8, u64),
    /// A write of a small number, which is more often one that makes sense.
    Small(u16, u8),
    /// Bytes in memory.
    Memory(u32, [u8; 16]),
    /// Whether the function is bus master.
    Master(bool),
    Command(C),
    /// The device is saved and restored.
    Save,
}

/// A device under test.
pub trait Target {
    type Command;
    const BAR: usize;
    fn function(&self) -> &dyn Function;
    /// Puts a command into memory and tells the device.
    fn command(&mut self, command: Self::Command);
    /// Waits until the device has nothing to do.
    fn drain(&self);
    fn save(&self);
}

/// Does the steps, at most 64.
pub fn run<T: Target>(target: &mut T, memory: &Memory, steps: Vec<Step<T::Command>>) {
    for step in steps.into_iter().take(64) {
        match step {
            Step::Read(at, size) => {
                target.function().read_bar(T::BAR, at.into(), 1 << (size & 3));
            }
            Step::Write(at, size, value) => {
                let size = 1 << (size & 3);
                let value = value & u64::MAX >> (64 - 8 * u32::from(size));
                target.function().write_bar(T::BAR, at.into(), size, value);
            }
            Step::Small(at, value) => target.function().write_bar(T::BAR, (at & !3).into(), 4, value.into()),
            Step::Memory(at, bytes) => put(memory, u64::from(at) % MEMORY, &bytes),
            Step::Master(on) => {
                target.function().config().set(4, &[if on { 6 } else { 2 }]);
                target.function().config_written(4);
            }
            Step::Command(command) => target.command(command),
            Step::Save => target.save(),
        }
        target.drain();
    }
}

/// A disk of [`DISK`] bytes in the host's memory.
pub fn disk() -> Arc<Disk> {
    static DISK_FILE: OnceLock<(File, Arc<Disk>)> = OnceLock::new();
    let make = || {
        let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("a memfd"));
        file.set_len(DISK).expect("room in the memfd");
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let options = Options { format: Some(Format::Raw), ..Default::default() };
        let disk = Disk::open(&path, &options).expect("a disk");
        (file, Arc::new(disk))
    };
    DISK_FILE.get_or_init(make).1.clone()
}

/// Memory for one guest.
pub fn memory() -> Memory {
    Memory::new(MEMORY, 0).expect("2 MiB")
}

/// Puts bytes into memory, as far as they fit.
pub fn put(memory: &Memory, at: u64, bytes: &[u8]) {
    // Only where there is some.
    let _ = memory.guest().write(bytes, GuestAddress(at));
}
