//! A stream as the host's program has it.

use std::io::{self, ErrorKind, Read, Write};
use std::sync::{Arc, Condvar, MutexGuard};
use std::time::{Duration, Instant};

use super::connection::{Connection, Phase, TO_GUEST};
use super::hub::{Hub, Key, State};

/// A stream to a program of the guest's. Like a socket it is read and written by reference, on threads of their own; dropped, it is
/// closed, once what was written has been sent.
#[derive(Debug)]
pub struct Stream {
    hub: Arc<Hub>,
    key: Key,
    changed: Arc<Condvar>,
}

impl Stream {
    pub(super) fn new(hub: Arc<Hub>, key: Key, changed: Arc<Condvar>) -> Self {
        Self { hub, key, changed }
    }

    /// Waits until the stream is open.
    ///
    /// # Errors
    /// The guest refuses it, or does not answer in time: it has no driver, or its system hangs.
    pub fn wait(&self, patience: Duration) -> io::Result<()> {
        self.until(Some(patience), |connection| match connection.phase {
            Phase::New | Phase::Asked => None,
            Phase::Open | Phase::Ended => Some(Ok(())),
            Phase::Failed(error) => Some(Err(error.into())),
        })
    }

    /// Reads what there is, or waits so long for something; without a limit if none is given. 0 is the end.
    ///
    /// # Errors
    /// The stream was reset, or nothing came in time.
    pub fn read_within(&self, bytes: &mut [u8], patience: Option<Duration>) -> io::Result<usize> {
        let n = self.until(patience, |connection| {
            if !connection.to_host.is_empty() {
                let n = connection.to_host.read(bytes);
                connection.was_read(*n.as_ref().unwrap_or(&0));
                return Some(n);
            }
            match connection.phase {
                Phase::Failed(error) => Some(Err(error.into())),
                Phase::Ended => Some(Ok(0)),
                Phase::Open if !connection.guest_writes => Some(Ok(0)),
                _ => None,
            }
        })?;
        self.hub.lock().queue(self.key);
        Ok(n)
    }

    /// Writes what there is room for, or waits so long for room.
    ///
    /// # Errors
    /// The stream was reset, the guest reads no more, or there was no room in time.
    pub fn write_within(&self, bytes: &[u8], patience: Option<Duration>) -> io::Result<usize> {
        let n = self.until(patience, |connection| match connection.phase {
            Phase::Failed(error) => Some(Err(error.into())),
            _ if connection.is_over() || !connection.guest_reads || !connection.host_writes => {
                Some(Err(ErrorKind::BrokenPipe.into()))
            }
            _ => match (TO_GUEST - connection.to_guest.len()).min(bytes.len()) {
                0 if !bytes.is_empty() => None,
                n => {
                    connection.to_guest.extend(&bytes[..n]);
                    Some(Ok(n))
                }
            },
        })?;
        self.hub.lock().queue(self.key);
        Ok(n)
    }

    /// Tells the guest that no more will be written.
    pub fn end_writing(&self) {
        let mut state = self.hub.lock();
        if let Some(connection) = state.connections.get_mut(&self.key) {
            connection.host_writes = false;
        }
        state.queue(self.key);
    }

    /// Whether nothing more goes over it in either direction.
    pub fn is_over(&self) -> bool {
        self.hub.lock().connections.get(&self.key).is_none_or(Connection::is_over)
    }

    /// What `f` gives as soon as it gives something.
    fn until<T>(
        &self,
        patience: Option<Duration>,
        mut f: impl FnMut(&mut Connection) -> Option<io::Result<T>>,
    ) -> io::Result<T> {
        let end = patience.map(|patience| Instant::now() + patience);
        let mut state = self.hub.lock();
        loop {
            // It is there as long as we are.
            let connection = state.connections.get_mut(&self.key).ok_or(ErrorKind::NotConnected)?;
            if let Some(result) = f(connection) {
                return result;
            }
            state = self.sleep(state, end)?;
        }
    }

    fn sleep<'a>(
        &self,
        state: MutexGuard<'a, State>,
        end: Option<Instant>,
    ) -> io::Result<MutexGuard<'a, State>> {
        let Some(end) = end else {
            return Ok(self.changed.wait(state).unwrap_or_else(|e| e.into_inner()));
        };
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        Ok(self.changed.wait_timeout(state, left).unwrap_or_else(|e| e.into_inner()).0)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.hub.lock().leave(self.key);
    }
}

impl Read for &Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.read_within(bytes, None)
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_within(bytes, None)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
