//! Commands of administration (NVMe 1.4, chapter 5).

use super::command::{Command, PAGE, Status};
use super::identify;
use super::registers::{Completion, EVENT_REQUESTS, MOST_ENTRIES, Registers, Submission, is_aligned};
use super::{Inner, Result};
use crate::lock;

/// Operation codes.
mod op {
    pub const DELETE_SUBMISSION: u8 = 0;
    pub const CREATE_SUBMISSION: u8 = 1;
    pub const GET_LOG_PAGE: u8 = 2;
    pub const DELETE_COMPLETION: u8 = 4;
    pub const CREATE_COMPLETION: u8 = 5;
    pub const IDENTIFY: u8 = 6;
    pub const ABORT: u8 = 8;
    pub const SET_FEATURES: u8 = 9;
    pub const GET_FEATURES: u8 = 0xa;
    pub const EVENT_REQUEST: u8 = 0xc;
}

/// Identifiers of features.
pub mod feature {
    pub const POWER: usize = 2;
    pub const WRITE_CACHE: usize = 6;
    pub const QUEUES: usize = 7;
    pub const ALL: std::ops::RangeInclusive<usize> = 1..=11;
    /// Ranges of LBAs: not offered.
    pub const RANGES: usize = 3;
}

/// What features are after a reset: the write cache is on, and it is warm from 70 °C on.
pub const FEATURES: [u32; 12] = [0, 0, 0, 0, 343, 0, 1, 0, 0, 0, 0, 0];

impl Inner {
    /// Does a command of queue 0. `None` is for one that is not answered now.
    pub(super) fn administrate(&self, command: &Command) -> Result<Option<u32>> {
        command.check()?;
        match command.opcode {
            op::DELETE_SUBMISSION => self.delete_submission(command),
            op::CREATE_SUBMISSION => create_submission(&mut lock(&self.registers), command),
            op::DELETE_COMPLETION => delete_completion(&mut lock(&self.registers), command),
            op::CREATE_COMPLETION => create_completion(&mut lock(&self.registers), command),
            op::IDENTIFY => self.identify(command),
            op::GET_LOG_PAGE => self.log_page(command),
            op::SET_FEATURES => self.set_feature(command),
            op::GET_FEATURES => self.feature(command),
            // It was too late: commands are done in order.
            op::ABORT => Ok(Some(1)),
            op::EVENT_REQUEST => {
                // Nothing ever happens that the host would have to be told.
                let mut registers = lock(&self.registers);
                if registers.events.len() == EVENT_REQUESTS {
                    return Err(Status::TOO_MANY_EVENT_REQUESTS);
                }
                registers.events.push(command.id);
                Ok(None)
            }
            _ => Err(Status::BAD_OPCODE),
        }
    }

    fn delete_submission(&self, command: &Command) -> Result<Option<u32>> {
        let n = (command.words[0] & 0xffff) as usize;
        let mut registers = lock(&self.registers);
        if n == 0 || registers.submissions.get_mut(n).and_then(Option::take).is_none() {
            return Err(Status::BAD_QUEUE);
        }
        // A command at hand ends, and is not told any more.
        while registers.busy[n] {
            registers = self.idle.wait(registers).unwrap_or_else(|e| e.into_inner());
        }
        Ok(Some(0))
    }

    fn identify(&self, command: &Command) -> Result<Option<u32>> {
        let bytes = match command.words[0] & 0xff {
            0 if command.namespace == 1 => identify::namespace(&self.disk, &self.serial),
            0 => return Err(Status::BAD_NAMESPACE),
            1 => identify::controller(&self.serial),
            2 if command.namespace < 0xffff_fffe => identify::namespaces(command.namespace),
            3 if command.namespace == 1 => identify::descriptors(&self.serial),
            2 | 3 => return Err(Status::BAD_NAMESPACE),
            _ => return Err(Status::BAD_FIELD),
        };
        command.data(&self.memory, PAGE)?.put(&self.memory, &bytes)?;
        Ok(Some(0))
    }

    fn log_page(&self, command: &Command) -> Result<Option<u32>> {
        let [which, more, low, high, ..] = command.words;
        let page = identify::log_page(which as u8).ok_or(Status::BAD_LOG_PAGE)?;
        let len = 4 * (u64::from(more & 0xffff) << 16 | u64::from(which >> 16)) + 4;
        let skip = u64::from(high) << 32 | u64::from(low);
        if skip & 3 != 0 || skip > page.len() as u64 {
            return Err(Status::BAD_FIELD);
        }
        let pieces = command.data(&self.memory, len)?;
        let mut bytes = page[skip as usize..].to_vec();
        bytes.resize(len as usize, 0);
        pieces.put(&self.memory, &bytes)?;
        Ok(Some(0))
    }

    fn set_feature(&self, command: &Command) -> Result<Option<u32>> {
        let [which, value, ..] = command.words;
        let id = (which & 0xff) as usize;
        if which >> 31 != 0 {
            return Err(Status::NOT_SAVEABLE);
        }
        match id {
            feature::QUEUES if value & 0xffff == 0xffff || value >> 16 == 0xffff => Err(Status::BAD_FIELD),
            feature::QUEUES => Ok(Some(self.queue_counts())),
            feature::POWER if value & 0x1f != 0 => Err(Status::BAD_FIELD),
            feature::RANGES => Err(Status::BAD_FIELD),
            _ if feature::ALL.contains(&id) => {
                lock(&self.registers).features[id] = value;
                if id == feature::WRITE_CACHE && value & 1 == 0 {
                    self.disk.flush().map_err(|_| Status::WRITE_FAULT)?;
                }
                Ok(Some(0))
            }
            _ => Err(Status::BAD_FIELD),
        }
    }

    fn feature(&self, command: &Command) -> Result<Option<u32>> {
        const CHANGEABLE: u32 = 4;
        let id = (command.words[0] & 0xff) as usize;
        if !feature::ALL.contains(&id) || id == feature::RANGES {
            return Err(Status::BAD_FIELD);
        }
        match command.words[0] >> 8 & 7 {
            0..=2 if id == feature::QUEUES => Ok(Some(self.queue_counts())),
            0 => Ok(Some(lock(&self.registers).features[id])),
            1 | 2 => Ok(Some(FEATURES[id])),
            3 => Ok(Some(CHANGEABLE)),
            _ => Err(Status::BAD_FIELD),
        }
    }

    /// I/O queues of both kinds, less one.
    fn queue_counts(&self) -> u32 {
        let most = self.turns.len() as u32 - 2;
        most << 16 | most
    }
}

/// Number and entries of a queue that is to be made, and its address, which has to be whole.
fn new_queue<T>(queues: &[Option<T>], command: &Command) -> Result<(usize, u32, u64)> {
    let (n, size) = ((command.words[0] & 0xffff) as usize, (command.words[0] >> 16) + 1);
    if n == 0 || !matches!(queues.get(n), Some(None)) {
        return Err(Status::BAD_QUEUE);
    }
    if !(2..=MOST_ENTRIES).contains(&size) {
        return Err(Status::BAD_QUEUE_SIZE);
    }
    if command.words[1] & 1 == 0 {
        return Err(Status::BAD_FIELD);
    }
    if !is_aligned(command.address()) {
        return Err(Status::BAD_OFFSET);
    }
    Ok((n, size, command.address()))
}

fn create_submission(registers: &mut Registers, command: &Command) -> Result<Option<u32>> {
    let completion = (command.words[1] >> 16) as u16;
    let (n, size, base) = new_queue(&registers.submissions, command)?;
    if completion == 0 || !matches!(registers.completions.get(usize::from(completion)), Some(Some(_))) {
        return Err(Status::BAD_COMPLETION_QUEUE);
    }
    registers.submissions[n] = Some(Submission { base, size, head: 0, tail: 0, completion });
    Ok(Some(0))
}

fn create_completion(registers: &mut Registers, command: &Command) -> Result<Option<u32>> {
    let (n, size, base) = new_queue(&registers.completions, command)?;
    let vector = (command.words[1] >> 16) as u16;
    if usize::from(vector) >= registers.completions.len() {
        return Err(Status::BAD_VECTOR);
    }
    let vector = (command.words[1] & 2 != 0).then_some(vector);
    registers.completions[n] = Some(Completion::new(base, size, vector));
    Ok(Some(0))
}

fn delete_completion(registers: &mut Registers, command: &Command) -> Result<Option<u32>> {
    let n = (command.words[0] & 0xffff) as usize;
    if n == 0 || !matches!(registers.completions.get(n), Some(Some(_))) {
        return Err(Status::BAD_QUEUE);
    }
    if registers.submissions.iter().flatten().any(|q| usize::from(q.completion) == n) {
        return Err(Status::BAD_QUEUE_DELETION);
    }
    registers.completions[n] = None;
    Ok(Some(0))
}
