//! The processes of VMs.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt::PeerPidfd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::param::clock_ticks_per_second;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::time::{ClockId, clock_gettime};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::{Context, Error, Result};

/// When a process started, in ticks since the host did (proc_pid_stat(5), starttime); none if it is no more.
pub fn started(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before may hold anything, brackets too.
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    if state == "Z" || state == "X" {
        return None;
    }
    // It is the field of number 22, and the state is of number 3.
    fields.nth(18)?.parse().ok()
}

/// A process to be waited for.
#[derive(Debug)]
pub struct Process {
    descriptor: AsyncFd<OwnedFd>,
    /// Its number.
    pub pid: u32,
    /// When it started, as [`started`] tells.
    pub started: u64,
}

impl Process {
    /// The process of a number.
    ///
    /// # Errors
    /// There is none.
    pub fn open(pid: u32) -> Result<Self> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or_else(|| Error::new("the client's process is not known here"))?;
        let descriptor = pidfd_open(number, PidfdFlags::NONBLOCK);
        Self::of(descriptor.context(|| format!("the process {pid} cannot be watched"))?, pid)
    }

    /// The process that has just connected, by this number.
    ///
    /// # Errors
    /// It has ended.
    pub fn of_peer(stream: &impl AsFd, pid: u32) -> Result<Self> {
        match getsockopt(stream, PeerPidfd) {
            Ok(descriptor) => Self::of(descriptor, pid),
            // Before Linux 6.5 there is the number only, which may be another process's by now. That has started since, unless all of it
            // happened between connecting and here, in the same tick; then the card would be that one's, and end with it.
            Err(Errno::ENOPROTOOPT) => {
                let now = ticks();
                Self::open(pid)
                    .and_then(|process| if process.started <= now { Ok(process) } else { Err(ended()) })
            }
            Err(_) => Err(ended()),
        }
    }

    fn of(descriptor: OwnedFd, pid: u32) -> Result<Self> {
        let started = started(pid).ok_or_else(ended)?;
        // The number is nobody else's while the process lives, so the time was its own.
        let mut ready = [PollFd::new(&descriptor, PollFlags::IN)];
        if poll(&mut ready, Some(&Timespec::default())) != Ok(0) {
            return Err(ended());
        }
        let descriptor = readable(descriptor).context(|| format!("the process {pid} cannot be watched"))?;
        Ok(Self { descriptor, pid, started })
    }

    /// Waits for its end.
    pub async fn ended(&self) {
        // It becomes readable then, and stays so (pidfd_open(2)). Should the watch fail, it counts as ended: nothing stays for nobody.
        let _ = self.descriptor.readable().await;
    }
}

fn ended() -> Error {
    Error::new("the client's process has ended")
}

/// Now, as [`started`] tells it.
fn ticks() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let (seconds, nanoseconds) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    let each = clock_ticks_per_second();
    seconds * each + nanoseconds * each / 1_000_000_000
}

/// A descriptor whose input is waited for.
///
/// The safe way of making one is deprecated because of types that close their descriptor behind the runtime's back; an `OwnedFd` is none.
#[allow(deprecated)]
pub(crate) fn readable(descriptor: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(descriptor, Interest::READABLE)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn processes_have_a_time() {
        let own = std::process::id();
        let since = started(own).unwrap();
        assert!(0 < since && since <= ticks());
        assert_eq!(started(u32::MAX), None);
        let (one, _other) = UnixStream::pair().unwrap();
        for process in [Process::open(own), Process::of_peer(&one, own)] {
            assert_eq!(process.map(|process| (process.pid, process.started)), Ok((own, since)));
        }
        // One that is no more, but whose number is nobody else's yet.
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let before = Process::open(child.id());
        rustix::process::waitid(
            rustix::process::WaitId::Pid(Pid::from_child(&child)),
            rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT,
        )
        .unwrap();
        assert!(Process::open(child.id()).is_err());
        if let Ok(process) = before {
            process.ended().await;
        }
        child.wait().unwrap();
    }
}
