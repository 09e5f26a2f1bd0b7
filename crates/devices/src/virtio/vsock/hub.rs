//! The host's side: all streams, and the packets between them and the device.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard};

use super::connection::{Connection, Next, Phase, TO_HOST};
use super::packet::{HEADER, Header, STREAM, op};
use super::stream::Stream;
use super::{Broken, GUEST, HOST, Wires};

/// Streams at a time.
const MOST_STREAMS: usize = 512;
/// Of these, such as the host's programs have left and the guest has not ended.
const MOST_LEFT: usize = 64;
/// Refusals that wait for the guest to take them. As long as there are more, no packet of its is taken.
const MOST_REFUSALS: usize = 256;
/// Ports of the host's programs are from here on.
const FIRST_PORT: u32 = 1 << 16;

/// The host's port and the guest's.
pub type Key = (u32, u32);

/// A VM's sockets, as the host's programs use them.
#[derive(Debug, Default)]
pub struct Hub(Mutex<State>);

#[derive(Debug, Default)]
pub struct State {
    wires: Wires,
    pub connections: HashMap<Key, Connection>,
    /// Those that have something to send, in turn.
    turns: VecDeque<Key>,
    refusals: VecDeque<Key>,
    /// Those that the host's programs have left.
    left: VecDeque<Key>,
    last_port: u32,
}

impl Hub {
    /// Begins a stream to `port` of the guest. It is not open yet: see [`Stream::wait`].
    ///
    /// # Errors
    /// There are too many.
    pub fn begin(self: &Arc<Self>, port: u32) -> io::Result<Stream> {
        let mut state = self.lock();
        if state.connections.len() >= MOST_STREAMS {
            return Err(ErrorKind::QuotaExceeded.into());
        }
        let key = loop {
            state.last_port = state.last_port.wrapping_add(1).max(FIRST_PORT);
            let key = (state.last_port, port);
            if !state.connections.contains_key(&key) {
                break key;
            }
        };
        let connection = Connection::new();
        let changed = connection.changed.clone();
        state.connections.insert(key, connection);
        state.queue(key);
        Ok(Stream::new(self.clone(), key, changed))
    }

    pub(super) fn attach(&self, wires: Wires) {
        self.lock().wires = wires;
    }

    /// Ends all streams of which the guest knows: it knows nothing any more.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        state.refusals.clear();
        for connection in state.connections.values_mut().filter(|c| c.phase != Phase::New && !c.is_over()) {
            connection.end(Phase::Failed(ErrorKind::ConnectionReset));
        }
        state.sweep();
    }

    /// Whether there is a packet for the guest.
    pub(super) fn has_packets(&self) -> bool {
        let state = self.lock();
        !state.refusals.is_empty() || !state.turns.is_empty()
    }

    /// Whether a packet of the guest's can be taken: there is room for what may have to be answered.
    pub(super) fn takes_packets(&self) -> bool {
        self.lock().refusals.len() < MOST_REFUSALS
    }

    /// Writes the next packet for the guest, of at most `room` bytes. Gives its size, which is 0 if there is none.
    ///
    /// # Errors
    /// There is no room for a header.
    pub fn give_packet(&self, mut to: impl Write, room: usize) -> Result<usize, Broken> {
        let room = room.checked_sub(HEADER).ok_or(Broken)?;
        let mut state = self.lock();
        let (header, data) = if let Some(key) = state.refusals.pop_front() {
            // The guest may have waited for this.
            state.wires.kick(super::TO_HOST);
            (header(key, Next { op: op::RST, flags: 0, len: 0 }, (0, 0)), Vec::new())
        } else {
            let Some(packet) = state.next_packet(room) else { return Ok(0) };
            packet
        };
        drop(state);
        to.write_all(&header.to_bytes()).map_err(|_| Broken)?;
        to.write_all(&data).map_err(|_| Broken)?;
        Ok(HEADER + data.len())
    }

    /// Takes a packet of `len` bytes from the guest.
    ///
    /// # Errors
    /// It is shorter than it says.
    pub fn take_packet(&self, mut from: impl Read, len: usize) -> Result<(), Broken> {
        let mut bytes = [0; HEADER];
        from.read_exact(&mut bytes).map_err(|_| Broken)?;
        let header = Header::from_bytes(&bytes);
        // Nobody else is in reach.
        if header.from_cid != GUEST || header.to_cid != HOST {
            return Ok(());
        }
        let data_len = if header.op == op::RW { header.len as usize } else { 0 };
        if data_len > len - HEADER {
            return Err(Broken);
        }
        let key = (header.to_port, header.from_port);
        let mut data = Vec::new();
        let fits = data_len <= TO_HOST;
        if fits {
            data.resize(data_len, 0);
            from.read_exact(&mut data).map_err(|_| Broken)?;
        }
        self.lock().take(key, &header, if fits { Some(&data) } else { None });
        Ok(())
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        crate::lock(&self.0)
    }
}

impl State {
    /// Puts a stream among those that have something to send, if it has.
    pub fn queue(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if !connection.queued && connection.next().is_some() {
            connection.queued = true;
            self.turns.push_back(key);
            self.wires.kick(super::TO_GUEST);
        }
    }

    fn refuse(&mut self, key: Key) {
        self.refusals.push_back(key);
        self.wires.kick(super::TO_GUEST);
    }

    fn next_packet(&mut self, room: usize) -> Option<(Header, Vec<u8>)> {
        while let Some(key) = self.turns.pop_front() {
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            connection.queued = false;
            let Some(mut next) = connection.next() else { continue };
            if next.op == op::RW {
                next.len = next.len.min(room);
                // Without room for data there is none for anything to come of it.
                if next.len == 0 {
                    continue;
                }
            }
            let data: Vec<u8> = connection.to_guest.drain(..next.len).collect();
            let credit = connection.send(next);
            if !data.is_empty() {
                connection.changed.notify_all();
            }
            self.queue(key);
            return Some((header(key, next, credit), data));
        }
        None
    }

    /// Takes a packet; without its data it is one that nobody had asked for.
    fn take(&mut self, key: Key, header: &Header, data: Option<&[u8]>) {
        let known = self.connections.get_mut(&key).filter(|connection| !connection.is_over());
        let Some(connection) = known.filter(|connection| connection.phase != Phase::New) else {
            // What is refused in answer to a refusal would never end.
            if header.op != op::RST {
                self.refuse(key);
            }
            return;
        };
        if header.op == op::RST {
            let error = match connection.phase {
                Phase::Asked => ErrorKind::ConnectionRefused,
                _ => ErrorKind::ConnectionReset,
            };
            // Its answer to our end of the stream.
            let ended = connection.host_gone || !connection.guest_writes && !connection.host_writes;
            connection.end(if ended { Phase::Ended } else { Phase::Failed(error) });
            return self.sweep();
        }
        let right = header.kind == STREAM && data.is_some_and(|data| connection.take(header, data));
        if !right {
            connection.end(Phase::Failed(ErrorKind::ConnectionReset));
            self.refuse(key);
            return self.sweep();
        }
        if !connection.guest_reads && !connection.guest_writes {
            // It waits for our word that we know.
            connection.end(Phase::Ended);
            self.refuse(key);
            return self.sweep();
        }
        self.queue(key);
    }

    /// The host's program has left a stream.
    pub fn leave(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        connection.host_gone = true;
        connection.host_writes = false;
        connection.was_read(connection.to_host.len());
        connection.to_host = VecDeque::new();
        if connection.phase == Phase::New {
            connection.end(Phase::Ended);
        }
        self.left.push_back(key);
        self.queue(key);
        self.sweep();
    }

    /// Removes streams that neither side knows any more, and the first of too many that only the guest knows.
    fn sweep(&mut self) {
        let Self { connections, left, .. } = self;
        left.retain(|key| connections.get(key).is_some_and(|connection| !connection.is_over()));
        while left.len() > MOST_LEFT
            && let Some(key) = left.pop_front()
            && let Some(connection) = connections.get_mut(&key)
        {
            connection.end(Phase::Ended);
            // One that comes of this is beyond the bound only as far as the host's programs drive it.
            self.refusals.push_back(key);
            self.wires.kick(super::TO_GUEST);
        }
        connections.retain(|_, connection| !connection.host_gone || !connection.is_over());
    }
}

fn header((host, guest): Key, next: Next, (room, read): (u32, u32)) -> Header {
    Header {
        from_cid: HOST,
        to_cid: GUEST,
        from_port: host,
        to_port: guest,
        len: next.len as u32,
        kind: STREAM,
        op: next.op,
        flags: next.flags,
        room,
        read,
    }
}
