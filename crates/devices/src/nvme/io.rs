//! Commands of I/O queues (NVMe 1.4, chapter 6).

use super::admin::feature;
use super::command::{Command, Status};
use super::{Inner, Result, SECTOR};
use crate::dma::{Fault, le32, le64};
use crate::lock;

/// Operation codes.
mod op {
    pub const FLUSH: u8 = 0;
    pub const WRITE: u8 = 1;
    pub const READ: u8 = 2;
    pub const WRITE_ZEROES: u8 = 8;
    pub const DATA_SET_MANAGEMENT: u8 = 9;
}

const ALL_NAMESPACES: u32 = u32::MAX;
/// Bits of command double word 12.
const THROUGH: u32 = 1 << 30;
const DEALLOCATE: u32 = 1 << 25;
/// Bytes of a range of data set management.
const RANGE: usize = 16;
/// Bytes that are discarded at once, so that others' requests come in between.
const STEP: u64 = 1 << 30;

impl Inner {
    /// Does a command of an I/O queue.
    pub(super) fn perform(&self, command: &Command) -> Result<Option<u32>> {
        command.check()?;
        let all = command.opcode == op::FLUSH && command.namespace == ALL_NAMESPACES;
        if command.namespace != 1 && !all {
            return Err(Status::BAD_NAMESPACE);
        }
        let writes = matches!(command.opcode, op::WRITE | op::WRITE_ZEROES | op::DATA_SET_MANAGEMENT);
        if writes && self.disk.is_read_only() {
            return Err(Status::PROTECTED);
        }
        match command.opcode {
            op::FLUSH => self.flush()?,
            op::READ => {
                let (start, len) = self.extent(command)?;
                let pieces = command.data(&self.memory, len)?;
                pieces.read(&self.memory, &self.disk, start, len).map_err(|f| of(f, Status::UNREADABLE))?;
            }
            op::WRITE => {
                let (start, len) = self.extent(command)?;
                let pieces = command.data(&self.memory, len)?;
                pieces.write(&self.memory, &self.disk, start, len).map_err(|f| of(f, Status::WRITE_FAULT))?;
                self.settle_write(command.words[2] & THROUGH != 0)?;
            }
            op::WRITE_ZEROES => {
                let (start, len) = self.extent(command)?;
                let unmap = command.words[2] & DEALLOCATE != 0;
                self.disk.write_zeroes(start, len, unmap).map_err(|_| Status::WRITE_FAULT)?;
                self.settle_write(command.words[2] & THROUGH != 0)?;
            }
            op::DATA_SET_MANAGEMENT => self.manage(command)?,
            _ => return Err(Status::BAD_OPCODE),
        }
        Ok(Some(0))
    }

    /// The part of the disk that a command is about: start and length in bytes.
    fn extent(&self, command: &Command) -> Result<(u64, u64)> {
        let first = u64::from(command.words[1]) << 32 | u64::from(command.words[0]);
        self.place(first, u64::from(command.words[2] & 0xffff) + 1)
    }

    fn place(&self, first: u64, count: u64) -> Result<(u64, u64)> {
        let end = first.checked_add(count).filter(|&end| end <= self.disk.size() / SECTOR);
        end.map(|_| (first * SECTOR, count * SECTOR)).ok_or(Status::OUT_OF_RANGE)
    }

    /// After a write: it is durable now if it has to be.
    fn settle_write(&self, through: bool) -> Result<()> {
        let cached = lock(&self.registers).features[feature::WRITE_CACHE] & 1 != 0;
        if through || !cached { self.flush() } else { Ok(()) }
    }

    fn flush(&self) -> Result<()> {
        self.disk.flush().map_err(|_| Status::WRITE_FAULT)
    }

    /// Data set management: hints, but for deallocation.
    fn manage(&self, command: &Command) -> Result<()> {
        let mut ranges = vec![0; RANGE * ((command.words[0] & 0xff) as usize + 1)];
        command.data(&self.memory, ranges.len() as u64)?.get(&self.memory, &mut ranges)?;
        if command.words[1] & 4 == 0 {
            return Ok(());
        }
        for range in ranges.chunks_exact(RANGE) {
            let (start, len) = self.place(le64(range, 8), le32(range, 4).into())?;
            for done in (0..len).step_by(STEP as usize) {
                self.disk.discard(start + done, (len - done).min(STEP)).map_err(|_| Status::WRITE_FAULT)?;
            }
        }
        Ok(())
    }
}

/// The status for what kept data from moving, if the disk did: `disk`.
fn of(fault: Fault, disk: Status) -> Status {
    match fault {
        Fault::Disk => disk,
        Fault::Memory | Fault::Short => Status::TRANSFER,
    }
}
