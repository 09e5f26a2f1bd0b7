//! One stream: what is under way in both directions, and how much more may be (5.10.6.3).

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::sync::{Arc, Condvar};

use super::packet::{Header, NO_READING, NO_WRITING, op};

/// Bytes from the guest that wait for the host's program. The guest is told, and ends its stream by sending more.
pub const TO_HOST: usize = 128 << 10;
/// Bytes from the host that wait for the guest.
pub const TO_GUEST: usize = 64 << 10;

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The guest is to be asked.
    New,
    /// It was asked.
    Asked,
    Open,
    /// It was ended by both sides.
    Ended,
    /// It was ended otherwise.
    Failed(ErrorKind),
}

#[derive(Debug)]
pub struct Connection {
    pub phase: Phase,
    pub to_guest: VecDeque<u8>,
    pub to_host: VecDeque<u8>,
    /// What the guest is known to take: its buffer's size, how much it has read, and how much was sent. All counts are modulo 2³².
    guest_room: u32,
    guest_read: u32,
    sent: u32,
    /// What the host has read, and what of that the guest was told.
    read: u32,
    told: u32,
    /// The guest wants to be told now, or ought to be.
    tell: bool,
    /// The guest was asked how much more it takes.
    asked: bool,
    pub guest_reads: bool,
    pub guest_writes: bool,
    /// The host's program has written all, or has gone altogether.
    pub host_writes: bool,
    pub host_gone: bool,
    /// Flags of the shutdown that the guest was told.
    shut: u32,
    /// It is among those that have something to send.
    pub queued: bool,
    /// Something has changed for the host's program.
    pub changed: Arc<Condvar>,
}

/// What a stream sends next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Next {
    pub op: u16,
    pub flags: u32,
    /// Bytes of [`Connection::to_guest`].
    pub len: usize,
}

impl Connection {
    pub fn new() -> Self {
        Self {
            phase: Phase::New,
            to_guest: VecDeque::new(),
            to_host: VecDeque::new(),
            guest_room: 0,
            guest_read: 0,
            sent: 0,
            read: 0,
            told: 0,
            tell: false,
            asked: false,
            guest_reads: true,
            guest_writes: true,
            host_writes: true,
            host_gone: false,
            shut: 0,
            queued: false,
            changed: Arc::default(),
        }
    }

    /// Whether nothing more goes over it.
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Ended | Phase::Failed(_))
    }

    pub fn end(&mut self, phase: Phase) {
        self.phase = phase;
        self.to_guest = VecDeque::new();
        if self.host_gone {
            self.to_host = VecDeque::new();
        }
        self.changed.notify_all();
    }

    /// Bytes that the guest takes now. It may have said anything.
    fn credit(&self) -> usize {
        self.guest_room.saturating_sub(self.sent.wrapping_sub(self.guest_read)) as usize
    }

    /// What is to be sent, if something is.
    pub fn next(&self) -> Option<Next> {
        let plain = |op| Some(Next { op, flags: 0, len: 0 });
        match self.phase {
            Phase::New => return plain(op::REQUEST),
            Phase::Open => {}
            _ => return None,
        }
        if !self.to_guest.is_empty() && self.guest_reads {
            match self.credit().min(self.to_guest.len()) {
                0 if !self.asked => return plain(op::CREDIT_REQUEST),
                0 => {}
                len => return Some(Next { op: op::RW, flags: 0, len }),
            }
        } else {
            let flags = match () {
                () if self.host_gone => NO_READING | NO_WRITING,
                () if !self.host_writes => NO_WRITING,
                () => 0,
            };
            if flags & !self.shut != 0 {
                return Some(Next { op: op::SHUTDOWN, flags, len: 0 });
            }
        }
        if self.tell { plain(op::CREDIT_UPDATE) } else { None }
    }

    /// Notes that `next` is sent; gives the fields by which the guest learns what the host takes.
    pub fn send(&mut self, next: Next) -> (u32, u32) {
        match next.op {
            op::REQUEST => self.phase = Phase::Asked,
            op::RW => self.sent = self.sent.wrapping_add(next.len as u32),
            op::CREDIT_REQUEST => self.asked = true,
            op::SHUTDOWN => self.shut |= next.flags,
            _ => {}
        }
        // Every packet says it.
        self.tell = false;
        self.told = self.read;
        (TO_HOST as u32, self.read)
    }

    /// Notes that the host's program has read `n` bytes.
    pub fn was_read(&mut self, n: usize) {
        self.read = self.read.wrapping_add(n as u32);
        if self.read.wrapping_sub(self.told) >= TO_HOST as u32 / 2 {
            self.tell = true;
        }
    }

    /// Takes a packet of the guest's. False if it is against the rules.
    pub fn take(&mut self, header: &Header, data: &[u8]) -> bool {
        (self.guest_room, self.guest_read) = (header.room, header.read);
        self.asked &= self.credit() == 0;
        match (self.phase, header.op) {
            (Phase::Asked, op::RESPONSE) => self.phase = Phase::Open,
            (Phase::Open, op::CREDIT_UPDATE) => {}
            (Phase::Open, op::CREDIT_REQUEST) => self.tell = true,
            (Phase::Open, op::RW) if self.guest_writes && data.len() <= TO_HOST - self.to_host.len() => {
                if self.host_gone {
                    self.was_read(data.len());
                } else {
                    self.to_host.extend(data);
                }
            }
            (Phase::Open, op::SHUTDOWN) => {
                self.guest_reads &= header.flags & NO_READING == 0;
                self.guest_writes &= header.flags & NO_WRITING == 0;
                if !self.guest_reads {
                    self.to_guest = VecDeque::new();
                }
            }
            _ => return false,
        }
        self.changed.notify_all();
        true
    }
}
