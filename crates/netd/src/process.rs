//! The processes of VMs.

use std::fs;
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
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
pub struct Process(AsyncFd<OwnedFd>);

impl Process {
    /// The process of a number.
    ///
    /// # Errors
    /// There is none.
    pub fn open(pid: u32) -> Result<Self> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or_else(|| Error::new("the client's process is not known here"))?;
        let process = pidfd_open(number, PidfdFlags::NONBLOCK).map_err(std::io::Error::from);
        let process = process.and_then(readable);
        process.map(Self).context(|| format!("the process {pid} cannot be watched"))
    }

    /// Waits for its end.
    pub async fn ended(&self) {
        // It becomes readable then, and stays so (pidfd_open(2)). Should the watch fail, it counts as ended: nothing stays for nobody.
        let _ = self.0.readable().await;
    }
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
    #[test]
    fn processes_have_a_time() {
        assert!(super::started(std::process::id()).is_some_and(|ticks| ticks > 0));
        assert_eq!(super::started(u32::MAX), None);
    }
}
