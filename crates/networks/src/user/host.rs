//! The host's sockets, and what is said when they are ready.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;

/// Events at once.
const EVENTS: usize = 64;

/// Whose socket is ready, and its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    Wake,
    Tcp(usize),
    Udp(usize),
    Ping(usize),
    Forward(usize),
}

/// A socket is ready.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    pub token: Token,
    pub readable: bool,
    pub writable: bool,
    /// There is an error to be told, or its end has come.
    pub failed: bool,
}

impl Token {
    fn data(self) -> EventData {
        let (kind, index) = match self {
            Token::Wake => (0, 0),
            Token::Tcp(index) => (1, index),
            Token::Udp(index) => (2, index),
            Token::Ping(index) => (3, index),
            Token::Forward(index) => (4, index),
        };
        EventData::new_u64(kind << 32 | index as u64)
    }

    fn of(data: u64) -> Self {
        let index = data as u32 as usize;
        match data >> 32 {
            1 => Token::Tcp(index),
            2 => Token::Udp(index),
            3 => Token::Ping(index),
            4 => Token::Forward(index),
            _ => Token::Wake,
        }
    }
}

/// The host's sockets.
#[derive(Debug)]
pub struct Host {
    epoll: OwnedFd,
    wake: OwnedFd,
}

impl Host {
    pub fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let host = Self { epoll: epoll::create(CreateFlags::CLOEXEC)?, wake };
        host.watch(&host.wake, Token::Wake)?;
        Ok(host)
    }

    /// Watches a socket until it is closed. Of those for connections it is told when something changes; who does not read all
    /// has to remember that.
    pub fn watch(&self, socket: impl AsFd, token: Token) -> io::Result<()> {
        let flags = match token {
            // Of these a few datagrams are taken each time: whoever sends many shall not keep all others waiting.
            Token::Udp(_) | Token::Ping(_) => EventFlags::IN,
            _ => EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET,
        };
        Ok(epoll::add(&self.epoll, socket, token.data(), flags)?)
    }

    /// Ends the wait.
    pub fn wake(&self) {
        // A full counter wakes as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Waits until something is ready, or until then.
    pub fn wait(&self, until: Option<Instant>, ready: &mut Vec<Ready>) -> io::Result<()> {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let timeout = left.map(|left: Duration| Timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        let mut events = Vec::with_capacity(EVENTS);
        match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        ready.clear();
        ready.extend(events.iter().map(|event| {
            let flags = event.flags;
            let failed = flags.intersects(EventFlags::ERR | EventFlags::HUP);
            Ready {
                token: Token::of(event.data.u64()),
                readable: failed || flags.intersects(EventFlags::IN | EventFlags::RDHUP),
                writable: failed || flags.contains(EventFlags::OUT),
                failed,
            }
        }));
        if ready.iter().any(|ready| ready.token == Token::Wake) {
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        Ok(())
    }
}
