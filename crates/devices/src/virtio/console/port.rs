//! The host's end of a port. It outlives the device: after a reset of the machine the next one connects to it.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::{Shared, event, receive_queue, transmit_queue};
use crate::lock;
use crate::virtio::{Broken, In, Out};
use std::io::{Read, Write};

/// Bytes that wait in either direction, at most.
const FULL: usize = 64 << 10;

/// A port of a console device, as the host has it.
#[derive(Default)]
pub struct Port {
    name: String,
    state: Mutex<State>,
    /// Bytes came or went, or the other end did.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    link: Option<Link>,
    /// Devices that this port has been connected to.
    machines: u64,
    /// To the guest, and from it.
    input: VecDeque<u8>,
    output: VecDeque<u8>,
    /// What was read last is not through yet.
    carrying: bool,
    /// Whether either side is there.
    guest: bool,
    host: bool,
    /// Columns and rows, if the port is a terminal.
    size: (u16, u16),
}

/// The device's end.
struct Link {
    shared: Arc<Shared>,
    index: usize,
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Port {
    /// A port, which the guest finds by this name (of at most 255 bytes). The first port of a device is its console.
    pub fn new(name: &str) -> Arc<Self> {
        let name = name.chars().take(63).collect();
        Arc::new(Self { name, ..Self::default() })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the guest has opened it.
    pub fn is_open(&self) -> bool {
        lock(&self.state).guest
    }

    /// Tells the guest whether somebody is at this end.
    pub fn set_open(&self, open: bool) {
        let mut state = lock(&self.state);
        state.host = open;
        if let Some(link) = &state.link {
            link.shared.tell(link.index, event::PORT_OPEN, open.into(), &[]);
        }
    }

    /// Sends bytes to the guest, and waits until there is room for all or the time is up. Returns how many were taken.
    pub fn write(&self, bytes: &[u8], patience: Duration) -> usize {
        let end = Instant::now() + patience;
        let mut taken = 0;
        let mut state = lock(&self.state);
        loop {
            let n = (bytes.len() - taken).min(FULL - state.input.len());
            state.input.extend(&bytes[taken..taken + n]);
            taken += n;
            if let Some(link) = &state.link {
                link.shared.kick(receive_queue(link.index));
            }
            let left = end.saturating_duration_since(Instant::now());
            if taken == bytes.len() || left.is_zero() {
                return taken;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    /// The number of the device that it is connected to, for [`Port::read`].
    pub fn machine(&self) -> u64 {
        lock(&self.state).machines
    }

    /// Waits for bytes of the guest's, which replace those in `to`. False once there are none and the device, number `machine`, is
    /// gone. The bytes are on their way until the next call.
    pub fn read(&self, machine: u64, to: &mut Vec<u8>) -> bool {
        to.clear();
        let mut state = lock(&self.state);
        state.carrying = false;
        self.changed.notify_all();
        while state.output.is_empty() {
            if state.link.is_none() || state.machines != machine {
                return false;
            }
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        to.extend(state.output.drain(..));
        state.carrying = true;
        if let Some(link) = &state.link {
            link.shared.kick(transmit_queue(link.index));
        }
        true
    }

    /// Waits until whoever reads has read all, at most so long.
    pub fn drain(&self, patience: Duration) {
        let is_full = |state: &mut State| state.carrying || !state.output.is_empty();
        let state = lock(&self.state);
        // What is left then is lost.
        drop(self.changed.wait_timeout_while(state, patience, is_full));
    }

    /// Tells the guest how many columns and rows the terminal at this end has.
    pub fn resize(&self, columns: u16, rows: u16) {
        let mut state = lock(&self.state);
        state.size = (columns, rows);
        if let Some(link) = &state.link {
            link.shared.resized(link.index, (columns, rows));
        }
    }

    /// Columns and rows.
    pub(super) fn size(&self) -> (u16, u16) {
        lock(&self.state).size
    }

    pub(super) fn connect(&self, shared: &Arc<Shared>, index: usize) {
        let mut state = lock(&self.state);
        state.link = Some(Link { shared: shared.clone(), index });
        state.machines += 1;
        state.guest = false;
        self.changed.notify_all();
    }

    pub(super) fn disconnect(&self, shared: &Arc<Shared>) {
        let mut state = lock(&self.state);
        if state.link.as_ref().is_some_and(|link| Arc::ptr_eq(&link.shared, shared)) {
            state.link = None;
            state.guest = false;
            self.changed.notify_all();
        }
    }

    /// The guest has opened or closed it.
    pub(super) fn opened(&self, open: bool) {
        let mut state = lock(&self.state);
        state.guest = open;
        if let Some(link) = &state.link {
            link.shared.kick(receive_queue(link.index));
        }
        self.changed.notify_all();
    }

    /// Whether somebody is at this end.
    pub(super) fn has_host(&self) -> bool {
        lock(&self.state).host
    }

    pub(super) fn can_receive(&self) -> bool {
        let state = lock(&self.state);
        state.guest && !state.input.is_empty()
    }

    pub(super) fn can_transmit(&self) -> bool {
        lock(&self.state).output.len() < FULL
    }

    /// Fills a buffer of the guest's.
    pub(super) fn receive(&self, answer: &mut Out<'_>) -> Result<usize, Broken> {
        let mut state = lock(&self.state);
        let n = answer.available_bytes().min(state.input.len());
        let bytes: Vec<u8> = state.input.drain(..n).collect();
        answer.write_all(&bytes).map_err(|_| Broken)?;
        self.changed.notify_all();
        Ok(n)
    }

    /// Takes what the guest sends. A request may be longer than what may wait, but not by more than memory has.
    pub(super) fn transmit(&self, request: &mut In<'_>) -> Result<(), Broken> {
        let mut buffer = [0; 4096];
        while request.available_bytes() > 0 {
            let n = request.read(&mut buffer).map_err(|_| Broken)?;
            let mut state = lock(&self.state);
            // A driver that sends more at once than may wait loses the rest.
            if state.output.len() < 4 * FULL {
                state.output.extend(&buffer[..n]);
            }
            self.changed.notify_all();
        }
        Ok(())
    }
}
