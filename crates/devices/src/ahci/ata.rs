//! A SATA disk (ATA8-ACS; Serial ATA 2.6 for queued commands).

use std::sync::Arc;

use disks::Disk;
use serde::{Deserialize, Serialize};

use super::fis::{Done, Kind, Taskfile, error, status};
use super::{Io, identify};
use crate::dma::{Fault, le16, le64};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Blocks of ranges in a TRIM command at most.
pub const TRIM_BLOCKS: u16 = 8;
/// Sectors of a block of READ MULTIPLE at most.
pub const MULTIPLE: u8 = 16;

/// Command codes.
mod command {
    pub const DATA_SET_MANAGEMENT: u8 = 0x06;
    pub const READ_SECTORS: u8 = 0x20;
    pub const READ_SECTORS_OLD: u8 = 0x21;
    pub const READ_SECTORS_EXT: u8 = 0x24;
    pub const READ_DMA_EXT: u8 = 0x25;
    pub const READ_MULTIPLE_EXT: u8 = 0x29;
    pub const READ_LOG_EXT: u8 = 0x2f;
    pub const WRITE_SECTORS: u8 = 0x30;
    pub const WRITE_SECTORS_OLD: u8 = 0x31;
    pub const WRITE_SECTORS_EXT: u8 = 0x34;
    pub const WRITE_DMA_EXT: u8 = 0x35;
    pub const WRITE_MULTIPLE_EXT: u8 = 0x39;
    pub const WRITE_DMA_FUA_EXT: u8 = 0x3d;
    pub const VERIFY: u8 = 0x40;
    pub const VERIFY_OLD: u8 = 0x41;
    pub const VERIFY_EXT: u8 = 0x42;
    pub const READ_LOG_DMA_EXT: u8 = 0x47;
    pub const READ_QUEUED: u8 = 0x60;
    pub const WRITE_QUEUED: u8 = 0x61;
    pub const SEEK: u8 = 0x70;
    pub const DIAGNOSTIC: u8 = 0x90;
    pub const SET_GEOMETRY: u8 = 0x91;
    pub const SMART: u8 = 0xb0;
    pub const READ_MULTIPLE: u8 = 0xc4;
    pub const WRITE_MULTIPLE: u8 = 0xc5;
    pub const SET_MULTIPLE: u8 = 0xc6;
    pub const READ_DMA: u8 = 0xc8;
    pub const READ_DMA_OLD: u8 = 0xc9;
    pub const WRITE_DMA: u8 = 0xca;
    pub const WRITE_DMA_OLD: u8 = 0xcb;
    pub const WRITE_MULTIPLE_FUA_EXT: u8 = 0xce;
    pub const STANDBY_NOW: u8 = 0xe0;
    pub const IDLE: u8 = 0xe3;
    pub const CHECK_POWER: u8 = 0xe5;
    pub const SLEEP: u8 = 0xe6;
    pub const FLUSH: u8 = 0xe7;
    pub const FLUSH_EXT: u8 = 0xea;
    pub const IDENTIFY: u8 = 0xec;
    pub const SET_FEATURES: u8 = 0xef;
}

/// What the host set, and the last error of a queued command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtaState {
    /// Sectors of a block of READ MULTIPLE; 0 while it is off.
    pub multiple: u8,
    /// Writes need not be durable until they are flushed.
    pub write_cache: bool,
    /// Reading ahead, which we leave to the host's system.
    pub look_ahead: bool,
    /// SMART is on.
    pub smart: bool,
    /// The transfer mode, as SET FEATURES has it.
    pub mode: u8,
    /// What the log of queued commands' errors tells: the first 14 bytes.
    pub queue_error: Option<[u8; 14]>,
}

impl Default for AtaState {
    fn default() -> Self {
        Self {
            multiple: MULTIPLE,
            write_cache: true,
            look_ahead: true,
            smart: true,
            mode: 0x45,
            queue_error: None,
        }
    }
}

/// The disk.
#[derive(Debug)]
pub struct Ata {
    disk: Arc<Disk>,
    serial: String,
    pub state: AtaState,
}

/// Why a command did not succeed.
enum Trouble {
    /// It is not known, or makes no sense.
    Aborted,
    /// Sectors that are not there.
    NotFound,
    /// The host could not read.
    Unreadable,
    /// It is the controller's matter.
    Bus(Fault),
}

/// A part of the disk, in bytes.
struct Extent {
    start: u64,
    len: u64,
}

/// How a command tells its sectors.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Lba28,
    Lba48,
    Queued,
}

/// What a command that succeeded gives beside its end.
#[derive(Default)]
struct Success {
    bytes: u64,
    /// Bytes of the last block that went by PIO.
    pio: Option<u16>,
    /// Registers that tell something.
    registers: Option<(u64, u16)>,
}

impl Success {
    fn moved(bytes: u64) -> Self {
        Self { bytes, ..Self::default() }
    }
}

impl Ata {
    pub fn new(disk: Arc<Disk>, serial: &str) -> Self {
        Self { disk, serial: serial.into(), state: AtaState::default() }
    }

    /// Takes over a state, which may be made up.
    pub fn set_state(&mut self, from: &AtaState) {
        let multiple = if from.multiple.is_power_of_two() { from.multiple.min(MULTIPLE) } else { 0 };
        self.state = AtaState { multiple, ..from.clone() };
    }

    /// Its signature in the registers after a reset.
    pub fn signature() -> Done {
        Done {
            status: status::READY | status::SEEK_DONE,
            error: 1,
            lba: 1,
            device: 0,
            count: 1,
            kind: Kind::Plain,
            bytes: 0,
        }
    }

    /// Does a command.
    ///
    /// # Errors
    /// Guest memory is not where it should be.
    pub fn command(&mut self, t: &Taskfile, io: &Io<'_>) -> Result<Done, Fault> {
        if t.command == command::DIAGNOSTIC {
            return Ok(Self::signature());
        }
        let queued = matches!(t.command, command::READ_QUEUED | command::WRITE_QUEUED);
        let kind = if queued { Kind::Queued(t.count.to_le_bytes()[0] >> 3) } else { Kind::Plain };
        let ready = status::READY | status::SEEK_DONE;
        let done =
            Done { status: ready, error: 0, lba: t.lba, device: t.device, count: t.count, kind, bytes: 0 };
        let error = match self.execute(t, io) {
            Ok(Success { bytes, pio, registers }) => {
                let kind = pio.map_or(kind, Kind::PioIn);
                let (lba, count) = registers.unwrap_or((t.lba, t.count));
                return Ok(Done { kind, bytes, lba, count, ..done });
            }
            Err(Trouble::Bus(fault)) => return Err(fault),
            Err(Trouble::Aborted) => error::ABORTED,
            Err(Trouble::NotFound) => error::NOT_FOUND,
            Err(Trouble::Unreadable) => error::UNCORRECTABLE,
        };
        let done = Done { status: status::READY | status::ERROR, error, ..done };
        if let Kind::Queued(tag) = kind {
            let registers = done.registers(false);
            let mut log = [0; 14];
            log[2..].copy_from_slice(&registers[2..14]);
            log[0] = tag;
            self.state.queue_error = Some(log);
        }
        Ok(done)
    }

    fn execute(&mut self, t: &Taskfile, io: &Io<'_>) -> Result<Success, Trouble> {
        use command as c;
        match t.command {
            c::READ_DMA | c::READ_DMA_OLD => self.read(t, Form::Lba28, io),
            c::READ_DMA_EXT => self.read(t, Form::Lba48, io),
            c::READ_QUEUED => self.read(t, Form::Queued, io),
            c::READ_SECTORS | c::READ_SECTORS_OLD => self.read_pio(t, Form::Lba28, 1, io),
            c::READ_SECTORS_EXT => self.read_pio(t, Form::Lba48, 1, io),
            c::READ_MULTIPLE => self.read_pio(t, Form::Lba28, self.state.multiple, io),
            c::READ_MULTIPLE_EXT => self.read_pio(t, Form::Lba48, self.state.multiple, io),
            c::WRITE_DMA | c::WRITE_DMA_OLD | c::WRITE_SECTORS | c::WRITE_SECTORS_OLD => {
                self.write(t, Form::Lba28, false, io)
            }
            c::WRITE_MULTIPLE if self.state.multiple > 0 => self.write(t, Form::Lba28, false, io),
            c::WRITE_DMA_EXT | c::WRITE_SECTORS_EXT => self.write(t, Form::Lba48, false, io),
            c::WRITE_MULTIPLE_EXT if self.state.multiple > 0 => self.write(t, Form::Lba48, false, io),
            c::WRITE_DMA_FUA_EXT => self.write(t, Form::Lba48, true, io),
            c::WRITE_MULTIPLE_FUA_EXT if self.state.multiple > 0 => self.write(t, Form::Lba48, true, io),
            // In the device register FUA is bit 7.
            c::WRITE_QUEUED => self.write(t, Form::Queued, t.device & 0x80 != 0, io),
            c::VERIFY | c::VERIFY_OLD => self.extent(t, Form::Lba28).map(|_| Success::default()),
            c::VERIFY_EXT => self.extent(t, Form::Lba48).map(|_| Success::default()),
            c::FLUSH | c::FLUSH_EXT => self.flush(),
            c::DATA_SET_MANAGEMENT if t.features & 0xff == 1 => self.trim(t, io),
            c::IDENTIFY => io.pio(&identify::disk(self.disk.size() / SECTOR, &self.serial, &self.state)),
            c::SET_FEATURES => self.set_features(t),
            c::SET_MULTIPLE => self.set_multiple(t.count & 0xff),
            c::READ_LOG_EXT => self.read_log(t, true, io),
            c::READ_LOG_DMA_EXT => self.read_log(t, false, io),
            c::SMART => self.smart(t, io),
            // The device never sleeps: "active or idle".
            c::CHECK_POWER => Ok(Success { registers: Some((t.lba, 0xff)), ..Success::default() }),
            c::SEEK | c::SET_GEOMETRY | 0x10..=0x1f | c::STANDBY_NOW..=c::IDLE | c::SLEEP => {
                Ok(Success::default())
            }
            _ => Err(Trouble::Aborted),
        }
    }

    /// The part of the disk that a command is about.
    fn extent(&self, t: &Taskfile, form: Form) -> Result<Extent, Trouble> {
        let whole = |count: u16, all: u64| if count == 0 { all } else { u64::from(count) };
        // Cylinders, heads and sectors are not offered.
        if t.device & 0x40 == 0 {
            return Err(Trouble::Aborted);
        }
        let (lba, count) = match form {
            Form::Lba28 => {
                (u64::from(t.device & 0xf) << 24 | t.lba & 0xff_ffff, whole(t.count & 0xff, 0x100))
            }
            Form::Lba48 => (t.lba, whole(t.count, 0x1_0000)),
            Form::Queued => (t.lba, whole(t.features, 0x1_0000)),
        };
        // 48 and 17 bits, times 512: less than 64 bits.
        let (start, len) = (lba * SECTOR, count * SECTOR);
        if start + len > self.disk.size() / SECTOR * SECTOR {
            return Err(Trouble::NotFound);
        }
        Ok(Extent { start, len })
    }

    fn read(&self, t: &Taskfile, form: Form, io: &Io<'_>) -> Result<Success, Trouble> {
        let Extent { start, len } = self.extent(t, form)?;
        io.pieces.read(io.memory, &self.disk, start, len).map_err(|fault| match fault {
            Fault::Disk => Trouble::Unreadable,
            fault => Trouble::Bus(fault),
        })?;
        Ok(Success::moved(len))
    }

    /// Reads in blocks of so many sectors; 0 is for none.
    fn read_pio(&self, t: &Taskfile, form: Form, block: u8, io: &Io<'_>) -> Result<Success, Trouble> {
        let block = u64::from(block) * SECTOR;
        let done = self.read(t, form, io).and_then(|done| {
            let rest = done.bytes.checked_rem(block).ok_or(Trouble::Aborted)?;
            Ok(Success { pio: Some(if rest == 0 { block } else { rest } as u16), ..done })
        })?;
        Ok(done)
    }

    fn write(&self, t: &Taskfile, form: Form, through: bool, io: &Io<'_>) -> Result<Success, Trouble> {
        let Extent { start, len } = self.extent(t, form)?;
        if self.disk.is_read_only() {
            return Err(Trouble::Aborted);
        }
        io.pieces.write(io.memory, &self.disk, start, len).map_err(Trouble::of_writing)?;
        if through || !self.state.write_cache {
            self.flush()?;
        }
        Ok(Success::moved(len))
    }

    fn flush(&self) -> Result<Success, Trouble> {
        self.disk.flush().map_err(|_| Trouble::Aborted)?;
        Ok(Success::default())
    }

    fn trim(&self, t: &Taskfile, io: &Io<'_>) -> Result<Success, Trouble> {
        if !(1..=TRIM_BLOCKS).contains(&t.count) || self.disk.is_read_only() {
            return Err(Trouble::Aborted);
        }
        let mut ranges = vec![0; usize::from(t.count) * SECTOR as usize];
        io.pieces.get(io.memory, &mut ranges).map_err(Trouble::Bus)?;
        for range in ranges.chunks_exact(8) {
            let (lba, count) = (le64(range, 0) & 0xffff_ffff_ffff, u64::from(le16(range, 6)));
            let (start, len) = (lba * SECTOR, count * SECTOR);
            if start + len > self.disk.size() {
                return Err(Trouble::NotFound);
            }
            self.disk.discard(start, len).map_err(|_| Trouble::Aborted)?;
        }
        Ok(Success::moved(ranges.len() as u64))
    }

    fn set_multiple(&mut self, sectors: u16) -> Result<Success, Trouble> {
        if sectors > u16::from(MULTIPLE) || !(sectors == 0 || sectors.is_power_of_two()) {
            return Err(Trouble::Aborted);
        }
        self.state.multiple = sectors as u8;
        Ok(Success::default())
    }

    fn set_features(&mut self, t: &Taskfile) -> Result<Success, Trouble> {
        match t.features & 0xff {
            0x02 => self.state.write_cache = true,
            0x82 => {
                self.state.write_cache = false;
                self.flush()?;
            }
            0x55 => self.state.look_ahead = false,
            0xaa => self.state.look_ahead = true,
            // PIO, multi-word and ultra DMA: nothing comes of it.
            0x03 if matches!(t.count >> 3, 0 | 1 | 4 | 8) => self.state.mode = t.count as u8,
            // Whether a reset restores settings: ours outlive it.
            0x66 | 0xcc => {}
            _ => return Err(Trouble::Aborted),
        }
        Ok(Success::default())
    }

    /// General-purpose logs: the directory, and the error of a queued command.
    fn read_log(&mut self, t: &Taskfile, pio: bool, io: &Io<'_>) -> Result<Success, Trouble> {
        let (log, page) = (t.lba & 0xff, t.lba >> 8 & 0xff);
        if t.count != 1 || page != 0 {
            return Err(Trouble::Aborted);
        }
        let mut bytes = [0; SECTOR as usize];
        match log {
            0 => {
                bytes[0] = 1;
                bytes[2 * 0x10] = 1;
            }
            0x10 => {
                // No queued command failed: the command in the log is none of the queue.
                bytes[0] = 0x80;
                if let Some(error) = self.state.queue_error.take() {
                    bytes[..error.len()].copy_from_slice(&error);
                }
                bytes[511] = checksum(&bytes[..511]);
            }
            _ => return Err(Trouble::Aborted),
        }
        if pio { io.pio(&bytes) } else { io.dma(&bytes) }
    }

    fn smart(&mut self, t: &Taskfile, io: &Io<'_>) -> Result<Success, Trouble> {
        const KEY: u64 = 0xc2_4f00;
        const ENABLE: u16 = 0xd8;
        let what = t.features & 0xff;
        if t.lba & 0xff_ff00 != KEY || !self.state.smart && what != ENABLE {
            return Err(Trouble::Aborted);
        }
        match what {
            // Attributes and their thresholds, of which we have none.
            0xd0 | 0xd1 => {
                let mut bytes = [0; SECTOR as usize];
                bytes[0] = 0x10;
                bytes[511] = checksum(&bytes[..511]);
                return io.pio(&bytes);
            }
            ENABLE => self.state.smart = true,
            0xd9 => self.state.smart = false,
            // Saving of attributes; the status, where the key as it was says that all is well.
            0xd2 | 0xda => {}
            _ => return Err(Trouble::Aborted),
        }
        Ok(Success::default())
    }
}

impl Trouble {
    fn of_writing(fault: Fault) -> Self {
        match fault {
            Fault::Disk => Self::Aborted,
            fault => Self::Bus(fault),
        }
    }
}

/// What makes the sum of all bytes zero.
pub fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, &b| sum.wrapping_sub(b))
}

impl Io<'_> {
    fn dma(&self, bytes: &[u8]) -> Result<Success, Trouble> {
        self.pieces.put(self.memory, bytes).map_err(Trouble::Bus)?;
        Ok(Success::moved(bytes.len() as u64))
    }

    /// A block of one sector for the host, by PIO.
    fn pio(&self, bytes: &[u8; SECTOR as usize]) -> Result<Success, Trouble> {
        Ok(Success { pio: Some(SECTOR as u16), ..self.dma(bytes)? })
    }
}
