//! The controller's registers and queues (NVMe 1.4, sections 3.1 and 4.1), without anything that takes time.

use memory::Memory;
use serde::{Deserialize, Serialize};

use super::command::{COMMAND, Command, PAGE, Status};
use crate::dma::{fetch, publish, store};

/// Entries of a queue at most.
pub const MOST_ENTRIES: u32 = 1024;
/// Asynchronous event requests that wait at most.
pub const EVENT_REQUESTS: usize = 4;
const COMPLETION: u64 = 16;

/// Offsets.
pub mod reg {
    pub const CAP: u64 = 0;
    pub const VS: u64 = 8;
    pub const INTMS: u64 = 0xc;
    pub const INTMC: u64 = 0x10;
    pub const CC: u64 = 0x14;
    pub const CSTS: u64 = 0x1c;
    pub const AQA: u64 = 0x24;
    pub const ASQ: u64 = 0x28;
    pub const ACQ: u64 = 0x30;
    pub const DOORBELLS: u64 = 0x1000;
}

pub const VERSION: u32 = 0x1_0400;
/// CAP: contiguous queues of so many entries, 10 s to get ready, the NVM command set, pages of 4 KiB.
const CAPABILITIES: u64 = 1 << 37 | 20 << 24 | 1 << 16 | (MOST_ENTRIES as u64 - 1);

/// Bits of CC.
mod cc {
    pub const ENABLE: u32 = 1;
    pub const SHUTDOWN: u32 = 3 << 14;
    /// Command set, page size and arbitration, of which only 0 is offered.
    pub const MODES: u32 = 0x3ff0;
    pub const WRITABLE: u32 = 0xff_fff1;
}

/// Bits of CSTS.
mod csts {
    pub const READY: u32 = 1;
    pub const FATAL: u32 = 2;
    pub const SHUTDOWN: u32 = 3 << 2;
    pub const SHUTTING_DOWN: u32 = 1 << 2;
    pub const SHUT_DOWN: u32 = 2 << 2;
}

/// A submission queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Submission {
    pub base: u64,
    pub size: u32,
    pub head: u32,
    pub tail: u32,
    /// The number of its completion queue.
    pub completion: u16,
}

/// A completion queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completion {
    pub base: u64,
    pub size: u32,
    pub head: u32,
    pub tail: u32,
    pub phase: bool,
    /// Its MSI-X vector, if it interrupts.
    pub vector: Option<u16>,
}

impl Completion {
    pub fn new(base: u64, size: u32, vector: Option<u16>) -> Self {
        Self { base, size, head: 0, tail: 0, phase: true, vector }
    }

    /// Entries that can be written now.
    fn free(&self) -> u32 {
        (self.head + self.size - self.tail - 1) % self.size
    }
}

/// All registers and queues, and what features were set to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    mask: u32,
    cc: u32,
    csts: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    /// By number; the first is that of administration.
    pub submissions: Vec<Option<Submission>>,
    pub completions: Vec<Option<Completion>>,
    /// Values of features, by their identifiers.
    pub features: [u32; 12],
    /// Identifiers of asynchronous event requests.
    pub events: Vec<u16>,
    /// Commands at hand are of no interest any more if this changes.
    #[serde(skip)]
    pub era: u64,
    /// By submission queue: a command of it is being done.
    #[serde(skip)]
    pub busy: Vec<bool>,
}

/// A command that was taken from a queue.
pub struct Taken {
    pub command: Command,
    pub era: u64,
}

impl Registers {
    /// As after power-on, with so many queues.
    pub fn new(queues: usize) -> Self {
        Self {
            mask: 0,
            cc: 0,
            csts: 0,
            aqa: 0,
            asq: 0,
            acq: 0,
            submissions: vec![None; queues],
            completions: vec![None; queues],
            features: super::admin::FEATURES,
            events: vec![],
            era: 0,
            busy: vec![false; queues],
        }
    }

    /// Takes another's values, which may be made up. No command is at hand.
    pub fn set(&mut self, from: &Self) {
        let queues = self.busy.len();
        let mut new = Self { era: self.era + 1, busy: self.busy.clone(), ..from.clone() };
        new.submissions.resize(queues, None);
        new.completions.resize(queues, None);
        new.events.truncate(EVENT_REQUESTS);
        let sound = |size: u32, head: u32, tail: u32| {
            (2..=MOST_ENTRIES).contains(&size) && head < size && tail < size
        };
        let all = new.completions.iter().flatten().all(|q| sound(q.size, q.head, q.tail))
            && new.submissions.iter().flatten().all(|q| {
                sound(q.size, q.head, q.tail)
                    && matches!(new.completions.get(usize::from(q.completion)), Some(Some(_)))
            });
        if !all {
            new.submissions.fill(None);
            new.completions.fill(None);
            new.csts |= csts::FATAL;
        }
        *self = new;
    }

    pub fn read(&self, at: u64) -> u32 {
        let high = |value: u64| (value >> 32) as u32;
        match at {
            reg::CAP => CAPABILITIES as u32,
            4 => high(CAPABILITIES),
            reg::VS => VERSION,
            reg::INTMS | reg::INTMC => self.mask,
            reg::CC => self.cc,
            reg::CSTS => self.csts,
            reg::AQA => self.aqa,
            reg::ASQ => self.asq as u32,
            0x2c => high(self.asq),
            reg::ACQ => self.acq as u32,
            0x34 => high(self.acq),
            _ => 0,
        }
    }

    pub fn write(&mut self, at: u64, value: u32) {
        let low = |old: u64| old & !0xffff_ffff | u64::from(value & !0xfff);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match at {
            reg::INTMS => self.mask |= value,
            reg::INTMC => self.mask &= !value,
            reg::CC => self.write_cc(value & cc::WRITABLE),
            reg::AQA => self.aqa = value & 0xfff_0fff,
            reg::ASQ => self.asq = low(self.asq),
            0x2c => self.asq = high(self.asq),
            reg::ACQ => self.acq = low(self.acq),
            0x34 => self.acq = high(self.acq),
            reg::DOORBELLS.. if self.is_running() => self.ring((at - reg::DOORBELLS) / 4, value),
            _ => {}
        }
    }

    fn write_cc(&mut self, value: u32) {
        let before = std::mem::replace(&mut self.cc, value);
        if value & !before & cc::ENABLE != 0 {
            // A shutdown that was asked for while it was disabled is over.
            self.csts &= csts::READY;
        }
        if value & !before & cc::SHUTDOWN != 0 {
            self.csts = self.csts & !csts::SHUTDOWN | csts::SHUTTING_DOWN;
        }
        if before & !value & cc::ENABLE != 0 {
            self.era += 1;
            self.submissions.fill(None);
            self.completions.fill(None);
            self.features = super::admin::FEATURES;
            self.events.clear();
            self.mask = 0;
            // Until commands at hand have ended it still counts as ready.
            self.csts &= csts::READY;
            self.check_reset();
        } else if value & !before & cc::ENABLE != 0 {
            self.check_reset();
        }
    }

    /// Ends a reset when no command is at hand any more, and starts if that is asked for.
    fn check_reset(&mut self) {
        if self.busy.iter().any(|&busy| busy) || self.completions.iter().any(Option::is_some) {
            return;
        }
        self.csts &= !csts::READY;
        if self.cc & cc::ENABLE == 0 {
            return;
        }
        let (sq, cq) = ((self.aqa & 0xfff) + 1, (self.aqa >> 16) + 1);
        let sizes = 2..=MOST_ENTRIES;
        if self.cc & cc::MODES != 0 || !sizes.contains(&sq) || !sizes.contains(&cq) {
            self.fail();
            return;
        }
        self.submissions[0] = Some(Submission { base: self.asq, size: sq, head: 0, tail: 0, completion: 0 });
        self.completions[0] = Some(Completion::new(self.acq, cq, Some(0)));
        self.csts |= csts::READY;
    }

    /// A fatal error: nothing goes on until a reset.
    pub fn fail(&mut self) {
        self.csts |= csts::FATAL;
    }

    /// A doorbell (section 3.1.24): tails of submission and heads of completion queues, by turns.
    fn ring(&mut self, n: u64, value: u32) {
        let queue = (n / 2) as usize;
        let fits = if n.is_multiple_of(2) {
            let queue = self.submissions.get_mut(queue).and_then(Option::as_mut);
            queue.is_none_or(|q| {
                value < q.size && {
                    q.tail = value;
                    true
                }
            })
        } else {
            let queue = self.completions.get_mut(queue).and_then(Option::as_mut);
            queue.is_none_or(|q| {
                value < q.size && {
                    q.head = value;
                    true
                }
            })
        };
        if !fits {
            self.fail();
        }
    }

    pub fn is_running(&self) -> bool {
        self.cc & cc::ENABLE != 0 && self.csts & (csts::READY | csts::FATAL) == csts::READY
    }

    /// The host wants everything to be durable.
    pub fn wants_shutdown(&self) -> bool {
        self.csts & csts::SHUTDOWN == csts::SHUTTING_DOWN
    }

    pub fn end_shutdown(&mut self) {
        if self.wants_shutdown() {
            self.csts = self.csts & !csts::SHUTDOWN | csts::SHUT_DOWN;
        }
    }

    /// Whether a command of queue `n` can be taken: there is one, and room for its completion beside that of others at hand.
    pub fn has_command(&self, n: usize) -> bool {
        let Some(Some(queue)) = self.submissions.get(n) else { return false };
        let of_same = |other: &&Option<Submission>| {
            other.as_ref().is_some_and(|other| other.completion == queue.completion)
        };
        let at_hand =
            self.submissions.iter().zip(&self.busy).filter(|(other, busy)| **busy && of_same(other));
        let free = self.completions[usize::from(queue.completion)].as_ref().map_or(0, Completion::free);
        self.is_running() && queue.head != queue.tail && at_hand.count() < free as usize
    }

    /// Takes a command from queue `n`. A queue that is not in memory is fatal.
    pub fn take(&mut self, n: usize, memory: &Memory) -> Option<Taken> {
        if !self.has_command(n) {
            return None;
        }
        let queue = self.submissions[n].as_mut()?;
        let at = queue.base.checked_add(u64::from(queue.head) * COMMAND as u64);
        let Some(Ok(bytes)) = at.map(|at| fetch(memory, at)) else {
            self.fail();
            return None;
        };
        queue.head = (queue.head + 1) % queue.size;
        self.busy[n] = true;
        Some(Taken { command: Command::parse(&bytes), era: self.era })
    }

    /// The end of what was taken from queue `n`, told if `end` has a status and a result. Gives the vector to interrupt by.
    pub fn finish(
        &mut self,
        n: usize,
        taken: &Taken,
        end: Option<(Status, u32)>,
        memory: &Memory,
    ) -> Option<u16> {
        self.busy[n] = false;
        if taken.era != self.era {
            self.check_reset();
            return None;
        }
        // Its queue may have been deleted.
        let ((status, result), Some(_)) = (end?, &self.submissions[n]) else { return None };
        let told = self.complete(n, taken.command.id, status, result, memory);
        if told.is_none() {
            self.fail();
        }
        told.flatten()
    }

    /// Puts an entry into the completion queue of submission queue `n`.
    fn complete(
        &mut self,
        n: usize,
        id: u16,
        status: Status,
        result: u32,
        memory: &Memory,
    ) -> Option<Option<u16>> {
        let submission = self.submissions.get(n)?.as_ref()?;
        let queue = self.completions[usize::from(submission.completion)].as_mut()?;
        let at = queue.base.checked_add(u64::from(queue.tail) * COMPLETION)?;
        let mut entry = [0; 12];
        entry[..4].copy_from_slice(&result.to_le_bytes());
        entry[8..].copy_from_slice(&((n as u32) << 16 | submission.head).to_le_bytes());
        store(memory, at, &entry).ok()?;
        // The phase tells the host that the rest is there.
        let last = u32::from(status.0) << 17 | u32::from(queue.phase) << 16 | u32::from(id);
        publish(memory, at.checked_add(12)?, last).ok()?;
        queue.tail = (queue.tail + 1) % queue.size;
        queue.phase ^= queue.tail == 0;
        Some(queue.vector)
    }

    /// Whether the pin is to be up: there is something in a completion queue.
    pub fn asks(&self) -> bool {
        let unmasked = |vector: u16| vector >= 32 || self.mask & 1 << vector == 0;
        self.completions.iter().flatten().any(|q| q.head != q.tail && q.vector.is_some_and(unmasked))
    }
}

/// Whether a queue can be at this address.
pub fn is_aligned(base: u64) -> bool {
    base.is_multiple_of(PAGE)
}
