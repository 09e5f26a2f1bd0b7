//! A TCP connection: the guest's half of it ends in a TCP of our own, the other half is a socket of the host's.
//!
//! Each has an interface of smoltcp's of its own, which has the address of the guest's peer: which connection a packet belongs to is
//! looked up once, however many there are.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroUsize;
use std::time::Duration;

use devices::net::{ETHERNET, Header, Offloads, Segments};
use rustix::net::sockopt;
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetProtocol, HardwareAddress, IpAddress, IpCidr, IpProtocol, IpVersion, Ipv4Packet, Ipv6Packet,
    TcpPacket, checksum,
};

use super::outlet::{MTU, Outlet};

/// How long a guest has to open a connection, or to answer one to it.
const PATIENCE: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(60);
/// Bytes of the longest packet that the guest takes to pieces itself.
const LONGEST: NonZeroUsize = NonZeroUsize::new(65_535).unwrap();
/// How soon a connection is looked at again, at the earliest.
const SOON: Duration = Duration::from_millis(1);
/// Where a TCP header has its checksum.
const CHECKSUM: u16 = 16;

/// When something has to be done: none means only when something happens.
pub type Due = Option<std::time::Instant>;

/// A connection.
pub struct Flow {
    host: TcpStream,
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    kind: EthernetProtocol,
    offloads: Offloads,
    /// The host's socket may have something, or take something.
    readable: bool,
    writable: bool,
    /// The guest has ended its direction.
    ended: bool,
    /// And the host's socket knows.
    shut: bool,
    /// The guest has answered.
    established: bool,
}

/// Packets in and out, as smoltcp wants them.
struct Pipe<'a> {
    packet: Option<&'a [u8]>,
    outlet: &'a mut Outlet,
    offloads: Offloads,
    kind: EthernetProtocol,
}

fn capabilities(offloads: Offloads) -> DeviceCapabilities {
    let mut capabilities = DeviceCapabilities::default();
    capabilities.medium = Medium::Ip;
    capabilities.max_transmission_unit = MTU;
    // Looked at before, and filled in behind.
    capabilities.checksum.tcp = Checksum::None;
    capabilities.checksum.ipv4 = Checksum::Tx;
    capabilities.segmentation.tcpv4 = offloads.tso4.then_some(LONGEST);
    capabilities.segmentation.tcpv6 = offloads.tso6.then_some(LONGEST);
    capabilities
}

impl Device for Pipe<'_> {
    type RxToken<'a>
        = Packet<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Room<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: Instant) -> Option<(Packet<'_>, Room<'_>)> {
        let packet = self.packet.take()?;
        Some((Packet(packet), Room { outlet: self.outlet, kind: self.kind, size: None }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Room<'_>> {
        (!self.outlet.is_full()).then_some(Room { outlet: self.outlet, kind: self.kind, size: None })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities(self.offloads)
    }
}

struct Packet<'a>(&'a [u8]);

impl RxToken for Packet<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

struct Room<'a> {
    outlet: &'a mut Outlet,
    kind: EthernetProtocol,
    /// Bytes of data in each piece, if it is to be cut.
    size: Option<u16>,
}

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.outlet.frame(self.kind, len, |packet| {
            let result = f(packet);
            (left_to_do(packet, self.size), result)
        })
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.size = meta.segmentation_offload_size.map(Into::into);
    }
}

/// Says what the guest has to do with a TCP packet that it gets: the checksum holds the sum of what is not in the segment.
fn left_to_do(packet: &mut [u8], size: Option<u16>) -> Header {
    let (header, from, to): (_, IpAddress, IpAddress) = match IpVersion::of_packet(packet) {
        Ok(IpVersion::Ipv4) => {
            let packet = Ipv4Packet::new_unchecked(&*packet);
            (packet.header_len().into(), packet.src_addr().into(), packet.dst_addr().into())
        }
        _ => {
            let packet = Ipv6Packet::new_unchecked(&*packet);
            (packet.header_len(), packet.src_addr().into(), packet.dst_addr().into())
        }
    };
    let segment = &mut packet[header..];
    let sum = checksum::pseudo_header(&from, &to, IpProtocol::Tcp, segment.len() as u32);
    let mut tcp = TcpPacket::new_unchecked(segment);
    tcp.set_checksum(sum);
    let before = (ETHERNET + header) as u16;
    let headers = before + u16::from(tcp.header_len());
    let ipv6 = matches!(from, IpAddress::Ipv6(_));
    Header {
        checksum: Some((before, CHECKSUM)),
        valid: false,
        segments: size.map(|size| Segments { ipv6, ecn: false, size, header: headers }),
    }
}

impl Flow {
    /// A connection that the guest opens to `peer`, to which `host` is connected. Its first packet is to follow.
    pub fn opened_by_guest(host: TcpStream, peer: SocketAddr, size: usize, outlet: &mut Outlet) -> Self {
        let mut flow = Self::new(host, peer, size, outlet);
        // The address is not unspecified, and the socket is new: it can listen.
        let _ = flow.socket().listen(peer);
        flow
    }

    /// A connection that somebody opened to the host, which is to go on to the guest's `to`, and there seems to come from `peer`.
    pub fn opened_by_host(
        host: TcpStream,
        peer: SocketAddr,
        to: SocketAddr,
        size: usize,
        outlet: &mut Outlet,
    ) -> Self {
        let mut flow = Self::new(host, peer, size, outlet);
        let socket = flow.sockets.get_mut::<Socket<'_>>(flow.handle);
        let _ = socket.connect(flow.interface.context(), to, peer);
        flow
    }

    fn new(host: TcpStream, peer: SocketAddr, size: usize, outlet: &mut Outlet) -> Self {
        let kind = if peer.is_ipv4() { EthernetProtocol::Ipv4 } else { EthernetProtocol::Ipv6 };
        let offloads = outlet.guest().offloads();
        let mut pipe = Pipe { packet: None, outlet, offloads, kind };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = super::random();
        let mut interface = Interface::new(config, &mut pipe, Instant::now());
        // Everybody is its neighbour.
        interface.update_ip_addrs(|addresses| {
            // There is room for one.
            let _ = addresses.push(IpCidr::new(peer.ip().into(), 0));
        });
        let buffer = || SocketBuffer::new(vec![0; size]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_timeout(Some(PATIENCE));
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Self {
            host,
            interface,
            sockets,
            handle,
            kind,
            offloads,
            readable: true,
            writable: true,
            ended: false,
            shut: false,
            established: false,
        }
    }

    fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    /// The host's socket may have something to read, or take something.
    pub fn is_ready(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// Moves on what can be moved, after a packet of the guest's, or because the host's socket is ready or time has passed. When
    /// to do that at the latest; none if the connection has ended.
    pub fn go_on(&mut self, packet: Option<&[u8]>, outlet: &mut Outlet) -> Option<Due> {
        let now = Instant::now();
        if self.is_rest() {
            self.move_bytes();
            return self.is_rest().then_some(None);
        }
        let mut pipe = Pipe { packet, outlet, offloads: self.offloads, kind: self.kind };
        if packet.is_some() {
            self.interface.poll_ingress_single(now, &mut pipe, &mut self.sockets);
        }
        loop {
            let moved = self.move_bytes();
            let sent = self.interface.poll_egress(now, &mut pipe, &mut self.sockets);
            if !moved && sent == PollResult::None {
                break;
            }
        }
        match self.socket().state() {
            _ if self.is_rest() => Some(None),
            // What the guest might still ask, a reset answers as well. One that listens has been reset before it was open.
            State::Closed | State::TimeWait | State::Listen => {
                if !self.shut {
                    // Not an end, but a reset: the host's peer is to know.
                    let _ = sockopt::set_socket_linger(&self.host, Some(Duration::ZERO));
                }
                None
            }
            // Until there is room, time changes nothing.
            _ if outlet.is_full() => Some(None),
            _ => Some(self.interface.poll_at(now, &self.sockets).map(|at| {
                let left = at.total_micros().saturating_sub(now.total_micros());
                std::time::Instant::now() + Duration::from_micros(left.max(0) as u64).max(SOON)
            })),
        }
    }

    /// Whether both ends have ended it, but the host's socket has not taken all: the guest has nothing more to do with it.
    fn is_rest(&mut self) -> bool {
        let ended = self.ended && !self.shut;
        ended && matches!(self.socket().state(), State::Closed | State::TimeWait) && self.socket().can_recv()
    }

    /// The host's socket has failed, and with it all that was to go there.
    fn fail(&mut self) {
        self.ended = false;
        self.socket().abort();
    }

    /// Moves bytes between both halves. Whether something has changed.
    fn move_bytes(&mut self) -> bool {
        let mut changed = false;
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        if !self.established {
            if !socket.may_send() {
                return false;
            }
            self.established = true;
            socket.set_timeout(None);
        }
        self.ended |=
            matches!(socket.state(), State::CloseWait | State::LastAck | State::Closing | State::TimeWait);
        // One that was given up has nothing to say, though it may have bytes left.
        if socket.state() == State::Closed && !self.ended {
            return false;
        }
        while self.writable && socket.can_recv() {
            let host = &mut self.host;
            let written = socket.recv(|bytes| match host.write(bytes) {
                Ok(n) => (n, Ok(n)),
                Err(error) => (0, Err(error)),
            });
            match written {
                Ok(Ok(_)) => changed = true,
                Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => {
                    self.fail();
                    return true;
                }
            }
        }
        if self.ended && !self.shut && !socket.can_recv() {
            self.shut = true;
            let _ = self.host.shutdown(std::net::Shutdown::Write);
        }
        while self.readable && socket.can_send() {
            let host = &mut self.host;
            let read = socket.send(|room| match host.read(room) {
                Ok(n) => (n, Ok(n)),
                Err(error) => (0, Err(error)),
            });
            match read {
                Ok(Ok(0)) => {
                    self.readable = false;
                    socket.close();
                    changed = true;
                }
                Ok(Ok(_)) => changed = true,
                Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => {
                    self.fail();
                    return true;
                }
            }
        }
        changed
    }
}
