//! A flash chip beside the firmware's ROM, in which UEFI keeps its variables: NOR flash of one byte's width with Intel's
//! command set (JESD68.01, Common Flash Interface; command set 1 as in Intel's 28F640 data sheet, chapter 4).
//!
//! While reads give the contents, the guest sees them as ROM, without us; its writes are commands, after which reads may come
//! here, until a command ends that.
//!
//! Erasing sets all bits of a block, programming clears bits. Both end at once. There are no buffered writes.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use machine::{Gpa, Registers};
use memory::{Kind, Window};
use serde::{Deserialize, Serialize};

use crate::{Saved, lock, read_bytes};

#[cfg(test)]
mod tests;

/// Bytes that are erased together. Firmware made for QEMU knows them.
pub const BLOCK: u64 = 4096;
/// A chip's size at most.
pub const LARGEST: u64 = 16 << 20;

mod command {
    pub const ERASE: u8 = 0x20;
    pub const ERASE_CONFIRM: u8 = 0xd0;
    pub const PROGRAM: [u8; 2] = [0x10, 0x40];
    pub const CLEAR_STATUS: u8 = 0x50;
    pub const READ_STATUS: u8 = 0x70;
    pub const READ_ID: u8 = 0x90;
    pub const QUERY: u8 = 0x98;
}
mod status {
    pub const READY: u8 = 0x80;
    pub const ERASE_FAILED: u8 = 0x20;
    pub const PROGRAM_FAILED: u8 = 0x10;
    /// Both of the above: commands in an order that makes no sense.
    pub const SEQUENCE: u8 = 0x30;
}
/// Intel, 28F640.
const ID: [u8; 2] = [0x89, 0x17];

/// What a chip holds. It outlives the machine's resets, and with a file also its power-off.
pub struct Contents {
    bytes: Mutex<Vec<u8>>,
    file: Option<File>,
}

impl fmt::Debug for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Contents").field("file", &self.file).finish_non_exhaustive()
    }
}

impl Contents {
    /// Contents that are gone with the process: as many whole blocks as `bytes` has, [`LARGEST`] at most.
    pub fn in_memory(mut bytes: Vec<u8>) -> Arc<Self> {
        bytes.truncate(bytes.len().min(LARGEST as usize) & !(BLOCK as usize - 1));
        Arc::new(Self { bytes: Mutex::new(bytes), file: None })
    }

    /// Contents that are kept in `file`, open for reading and writing.
    ///
    /// # Errors
    /// It cannot be read, or is not of whole blocks.
    pub fn in_file(file: File) -> io::Result<Arc<Self>> {
        let mut bytes = Vec::new();
        (&file).take(LARGEST + 1).read_to_end(&mut bytes)?;
        let len = bytes.len() as u64;
        if len == 0 || len > LARGEST || !len.is_multiple_of(BLOCK) {
            return Err(io::Error::other("its size is none that a flash chip has"));
        }
        Ok(Arc::new(Self { bytes: Mutex::new(bytes), file: Some(file) }))
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        lock(&self.bytes).len() as u64
    }

    /// Waits until all is on the host's disk.
    ///
    /// # Errors
    /// The host's.
    pub fn flush(&self) -> io::Result<()> {
        self.file.as_ref().map_or(Ok(()), File::sync_data)
    }

    /// Changes the bytes from `offset` on: first in the file, so that the guest never sees what would not be kept.
    fn change(&self, offset: u64, new: &[u8]) -> io::Result<()> {
        let mut bytes = lock(&self.bytes);
        let old = usize::try_from(offset).ok().and_then(|from| bytes.get_mut(from..)?.get_mut(..new.len()));
        let Some(old) = old.filter(|old| *old != new) else { return Ok(()) };
        if let Some(file) = &self.file {
            file.write_all_at(new, offset)?;
        }
        old.copy_from_slice(new);
        Ok(())
    }

    fn get(&self, offset: u64, size: u8) -> u64 {
        let bytes = lock(&self.bytes);
        read_bytes(offset, size, |at| bytes.get(at as usize).copied().unwrap_or(0xff))
    }
}

/// What reads give.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reads {
    /// The contents.
    #[default]
    Array,
    /// The status register.
    Status,
    /// Manufacturer and device.
    Id,
    /// What the Common Flash Interface says of the chip.
    Query,
}

/// The chip's registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// What reads give.
    pub reads: Reads,
    /// The status register.
    pub status: u8,
    /// The command whose second byte comes next, or 0.
    pub command: u8,
}

/// The chip.
#[derive(Debug)]
pub struct Flash {
    state: Mutex<State>,
    contents: Arc<Contents>,
    /// The contents once more, for the guest, and where it sees them.
    rom: Window,
    at: Gpa,
}

impl Flash {
    /// A chip that holds `contents`, which is seen through `rom`, of the same size, at `at`. To be put on the bus there, too.
    pub fn new(contents: Arc<Contents>, rom: Window, at: Gpa) -> Arc<Self> {
        rom.write(0, &lock(&contents.bytes));
        let flash = Self { state: Mutex::default(), contents, rom, at };
        flash.show(&State::default());
        Arc::new(flash)
    }

    /// Lets the guest see the contents as ROM, or sends its reads here.
    fn show(&self, state: &State) {
        let array = state.reads == Reads::Array && self.rom.size() == self.contents.size();
        self.rom.show(array.then_some((self.at, Kind::Rom)));
    }

    /// Changes the contents, also as the guest sees them.
    fn change(&self, offset: u64, new: &[u8]) -> io::Result<()> {
        self.contents.change(offset, new)?;
        self.rom.write(offset, new);
        Ok(())
    }

    /// The registers; the contents are kept elsewhere.
    pub fn state(&self) -> Saved<State> {
        Saved::V1(*lock(&self.state))
    }

    /// Goes on from `state`.
    pub fn set_state(&self, state: &Saved<State>) {
        let Saved::V1(state) = state;
        let mut now = lock(&self.state);
        *now = *state;
        self.show(&now);
    }

    fn command(&self, state: &mut State, command: u8) {
        match command {
            command::ERASE => state.command = command,
            c if command::PROGRAM.contains(&c) => state.command = command,
            // Cleared means cleared: firmware for QEMU knows the chip by a status of 0 here.
            command::CLEAR_STATUS => *state = State::default(),
            command::READ_STATUS => state.reads = Reads::Status,
            command::READ_ID => state.reads = Reads::Id,
            command::QUERY => state.reads = Reads::Query,
            _ => state.reads = Reads::Array,
        }
    }

    /// The second byte of a command.
    fn finish(&self, state: &mut State, offset: u64, value: u8) {
        state.reads = Reads::Status;
        state.status |= status::READY;
        let failed = match std::mem::take(&mut state.command) {
            command::ERASE if value == command::ERASE_CONFIRM => {
                let erased = self.change(offset & !(BLOCK - 1), &[0xff; BLOCK as usize]);
                erased.is_err().then_some(status::ERASE_FAILED)
            }
            command::ERASE => Some(status::SEQUENCE),
            _ => {
                let byte = self.contents.get(offset, 1) as u8 & value;
                self.change(offset, &[byte]).is_err().then_some(status::PROGRAM_FAILED)
            }
        };
        state.status |= failed.unwrap_or(0);
    }

    /// The table of JESD68.01, 4.3.
    fn query(&self, offset: u64) -> u8 {
        let size = self.contents.size();
        let blocks = ((size / BLOCK).max(1) - 1).to_le_bytes();
        match offset {
            0x10 => b'Q',
            0x11 => b'R',
            0x12 => b'Y',
            // Command set 1, whose own table is at 0x31.
            0x13 => 1,
            0x15 => 0x31,
            0x1b => 0x45,
            0x1c => 0x55,
            // Microseconds and milliseconds as powers of two: to program a byte, to erase a block.
            0x1f => 7,
            0x21 => 10,
            0x23 | 0x25 => 4,
            0x27 => size.max(1).ilog2() as u8,
            // One region of blocks: their number less one, and their size in units of 256 bytes.
            0x2c => 1,
            0x2d => blocks[0],
            0x2e => blocks[1],
            0x2f => (BLOCK >> 8) as u8,
            0x30 => (BLOCK >> 16) as u8,
            0x31 => b'P',
            0x32 => b'R',
            0x33 => b'I',
            0x34 => b'1',
            0x35 => b'0',
            _ => 0,
        }
    }
}

impl Registers for Flash {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let state = lock(&self.state);
        match state.reads {
            Reads::Array => self.contents.get(offset, size),
            Reads::Status => read_bytes(offset, size, |_| state.status),
            Reads::Id => read_bytes(offset, size, |at| ID.get(at as usize & 0xff).copied().unwrap_or(0)),
            Reads::Query => read_bytes(offset, size, |at| self.query(at & 0xff)),
        }
    }

    fn write(&self, offset: u64, _: u8, value: u64) {
        let mut state = lock(&self.state);
        match state.command {
            0 => self.command(&mut state, value as u8),
            _ => self.finish(&mut state, offset, value as u8),
        }
        self.show(&state);
    }
}
