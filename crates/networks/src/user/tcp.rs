//! The TCP connections between the guest and the world.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
use slab::Slab;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{IpProtocol, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber};

use super::flow::{Due, Flow};
use super::host::{Host, Token};
use super::icmp::{self, Unreachable};
use super::outlet::{IPV6, Outlet};
use super::plan::Where;

/// Connections at once.
pub(super) const MOST: usize = 4096;

/// Both ends of a connection, as the guest sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Ends {
    guest: SocketAddr,
    peer: SocketAddr,
}

struct Connection {
    ends: Ends,
    /// The host's socket is not connected yet. The guest's first packet waits.
    connecting: Option<(TcpStream, Vec<u8>)>,
    /// It is.
    flow: Option<Box<Flow>>,
    due: Due,
}

/// A packet of the guest's with a TCP segment in it.
#[derive(Debug)]
pub struct Segment<'a> {
    pub from: SocketAddr,
    pub to: SocketAddr,
    /// The whole IP packet.
    pub packet: &'a [u8],
    pub tcp: TcpPacket<&'a [u8]>,
}

impl<'a> Segment<'a> {
    /// None if its header makes no sense.
    pub fn new(packet: &'a [u8], from: IpAddr, to: IpAddr, header: usize) -> Option<Self> {
        let tcp = TcpPacket::new_checked(packet.get(header..)?).ok()?;
        let (from, to) = (SocketAddr::new(from, tcp.src_port()), SocketAddr::new(to, tcp.dst_port()));
        (tcp.src_port() != 0 && tcp.dst_port() != 0).then_some(Self { from, to, packet, tcp })
    }
}

/// All connections.
#[derive(Default)]
pub struct Connections {
    all: Slab<Connection>,
    by_ends: HashMap<Ends, usize>,
    due: BTreeSet<(Instant, usize)>,
    /// Which one is the first to have room.
    turn: usize,
}

/// Bytes of a buffer, of which a connection has two: the first ones get more.
fn buffer(connections: usize) -> usize {
    match connections {
        ..64 => 512 << 10,
        64..512 => 128 << 10,
        _ => 32 << 10,
    }
}

impl Connections {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// When the next has to be looked at.
    pub fn next_due(&self) -> Due {
        self.due.first().map(|(due, _)| *due)
    }

    /// Ends all without a word to the guest, which is another one.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// A packet of the guest's. `target` says where it goes to.
    pub fn receive(&mut self, segment: &Segment<'_>, target: Where, host: &Host, outlet: &mut Outlet) {
        let ends = Ends { guest: segment.from, peer: segment.to };
        let first = segment.tcp.syn() && !segment.tcp.ack() && !segment.tcp.rst();
        if let Some(&index) = self.by_ends.get(&ends) {
            match self.all.get_mut(index).and_then(|connection| connection.connecting.as_mut()) {
                None => self.go_on(index, Some(segment.packet), outlet),
                // The guest does not want it any more, or begins anew.
                Some(_) if segment.tcp.rst() => self.remove(index),
                Some((_, packet)) if first => *packet = segment.packet.to_vec(),
                Some(_) => {}
            }
            return;
        }
        let connected = match target {
            Where::Nowhere => return,
            Where::Host(to) if first && self.all.len() < MOST => start(to),
            _ => Err(io::ErrorKind::ConnectionRefused.into()),
        };
        let stream = match connected {
            Ok(stream) => stream,
            Err(error) => return refuse(&error, segment, outlet),
        };
        let entry = self.all.vacant_entry();
        if host.watch(&stream, Token::Tcp(entry.key())).is_err() {
            return refuse(&io::ErrorKind::ConnectionRefused.into(), segment, outlet);
        }
        self.by_ends.insert(ends, entry.key());
        let connecting = Some((stream, segment.packet.to_vec()));
        entry.insert(Connection { ends, connecting, flow: None, due: None });
    }

    /// Somebody has connected to a forwarded port of the host's.
    pub fn forward(
        &mut self,
        stream: TcpStream,
        peer: SocketAddr,
        to: SocketAddr,
        host: &Host,
        outlet: &mut Outlet,
    ) {
        let ends = Ends { guest: to, peer };
        let entry = self.all.vacant_entry();
        let index = entry.key();
        let ready = stream.set_nonblocking(true).and_then(|()| host.watch(&stream, Token::Tcp(index)));
        if index >= MOST || self.by_ends.contains_key(&ends) || ready.is_err() {
            return;
        }
        let _ = stream.set_nodelay(true);
        let flow = Flow::opened_by_host(stream, peer, to, buffer(index), outlet);
        entry.insert(Connection { ends, connecting: None, flow: Some(Box::new(flow)), due: None });
        self.by_ends.insert(ends, index);
        self.go_on(index, None, outlet);
    }

    /// The host's socket of a connection is ready.
    pub fn is_ready(&mut self, index: usize, readable: bool, writable: bool, outlet: &mut Outlet) {
        let number = self.all.len();
        let Some(connection) = self.all.get_mut(index) else { return };
        if let Some(flow) = &mut connection.flow {
            flow.is_ready(readable, writable);
            return self.go_on(index, None, outlet);
        }
        let Ends { guest, peer } = connection.ends;
        let Some((stream, first)) = connection.connecting.take() else { return };
        match stream.take_error() {
            Ok(None) if stream.peer_addr().is_ok() => {
                let _ = stream.set_nodelay(true);
                connection.flow = Some(Box::new(Flow::opened_by_guest(stream, peer, buffer(number), outlet)));
                self.go_on(index, Some(&first), outlet);
            }
            // What is ready is the socket that had this number before.
            Ok(None) => connection.connecting = Some((stream, first)),
            Ok(Some(error)) | Err(error) => {
                self.remove(index);
                let header = if guest.is_ipv4() { usize::from(first[0] & 15) * 4 } else { IPV6 };
                if let Some(segment) = Segment::new(&first, guest.ip(), peer.ip(), header) {
                    refuse(&error, &segment, outlet);
                }
            }
        }
    }

    /// Does what time demands.
    pub fn expire(&mut self, now: Instant, outlet: &mut Outlet) {
        while let Some(&(due, index)) = self.due.first()
            && due <= now
        {
            self.due.remove(&(due, index));
            if let Some(connection) = self.all.get_mut(index) {
                connection.due = None;
            }
            self.go_on(index, None, outlet);
        }
    }

    /// The guest has room again.
    pub fn room(&mut self, outlet: &mut Outlet) {
        let all = self.all.capacity();
        for index in (self.turn..all).chain(0..self.turn.min(all)) {
            if outlet.is_full() {
                // It is this one's turn next time: the first ones shall not have all the room.
                self.turn = index;
                return;
            }
            self.go_on(index, None, outlet);
        }
    }

    fn go_on(&mut self, index: usize, packet: Option<&[u8]>, outlet: &mut Outlet) {
        let Some(connection) = self.all.get_mut(index) else { return };
        let Some(flow) = &mut connection.flow else { return };
        let Some(due) = flow.go_on(packet, outlet) else { return self.remove(index) };
        if due != connection.due {
            if let Some(old) = connection.due {
                self.due.remove(&(old, index));
            }
            connection.due = due;
            self.due.extend(due.map(|due| (due, index)));
        }
    }

    fn remove(&mut self, index: usize) {
        if let Some(connection) = self.all.try_remove(index) {
            self.by_ends.remove(&connection.ends);
            if let Some(due) = connection.due {
                self.due.remove(&(due, index));
            }
        }
    }
}

/// Begins to connect.
fn start(to: SocketAddr) -> io::Result<TcpStream> {
    #[cfg(fuzzing)]
    let to = super::fuzzing::tcp_instead_of(to);
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    match connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket.into()),
        Err(error) => Err(error.into()),
    }
}

/// Tells the guest why there is no such connection.
fn refuse(error: &io::Error, segment: &Segment<'_>, outlet: &mut Outlet) {
    use io::ErrorKind::{HostUnreachable, NetworkUnreachable, TimedOut};
    match error.kind() {
        // It will see that itself.
        TimedOut => {}
        HostUnreachable | NetworkUnreachable => icmp::unreachable(segment.packet, Unreachable::Host, outlet),
        _ => reset(segment, outlet),
    }
}

/// Answers with a reset (RFC 9293, 3.10.7.1).
fn reset(segment: &Segment<'_>, outlet: &mut Outlet) {
    let Segment { from, to, tcp, .. } = segment;
    if tcp.rst() {
        return;
    }
    let end = tcp.seq_number() + tcp.segment_len();
    let answer = TcpRepr {
        src_port: to.port(),
        dst_port: from.port(),
        control: TcpControl::Rst,
        seq_number: if tcp.ack() { tcp.ack_number() } else { TcpSeqNumber(0) },
        ack_number: (!tcp.ack()).then_some(end),
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let mut bytes = vec![0; answer.buffer_len()];
    let caps = ChecksumCapabilities::default();
    answer.emit(&mut TcpPacket::new_unchecked(&mut bytes[..]), &to.ip().into(), &from.ip().into(), &caps);
    outlet.packet(to.ip(), from.ip(), IpProtocol::Tcp, &bytes);
}
