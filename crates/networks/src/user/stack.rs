//! What comes from the guest is looked at here, and handed to whom it is for.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use devices::net::{ETHERNET, Guest, Header};
use netctl::{Direction, Protocol, Rule};
use slab::Slab;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, Icmpv4Packet, Icmpv6Packet, Icmpv6Repr, IpAddress, IpProtocol,
    Ipv4Packet, Ipv6FragmentHeader, Ipv6Packet, UdpPacket,
};

use super::Options;
use super::fragments::{Fragments, Key, Piece};
use super::host::{Host, Ready, Token};
use super::icmp::{self, Pings, Unreachable};
use super::outlet::Outlet;
use super::plan::{Plan, Where};
use super::resolvers::Resolvers;
use super::tcp::{Connections, Segment};
use super::udp::{Datagram, Datagrams};
use super::{dhcp, neighbours};

/// How often the router makes itself known.
const ADVERTISE: Duration = Duration::from_secs(600);
/// Bytes of the header of an IPv6 fragment, behind its next header.
const FRAGMENT: usize = 8;

/// What has been carried, and what has been dropped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames of the guest's.
    pub frames: u64,
    /// Of these, frames that make no sense, or have wrong checksums.
    pub malformed: u64,
    /// Of these, frames from addresses that are not the guest's, and such as only a router sends.
    pub forged: u64,
    /// Of these, packets that are for nobody.
    pub unreachable: u64,
    /// Frames to the guest that it had no room for.
    pub dropped: u64,
    /// Connections that there are.
    pub connections: usize,
    /// Sockets for datagrams that there are.
    pub datagrams: usize,
}

/// Why a frame is dropped.
#[derive(Debug, Clone, Copy)]
enum Drop {
    Malformed,
    Forged,
    Unreachable,
}

/// What a parser of smoltcp's does not understand.
impl From<smoltcp::wire::Error> for Drop {
    fn from(_: smoltcp::wire::Error) -> Self {
        Drop::Malformed
    }
}

/// A packet, its headers taken off.
struct Packet<'a> {
    from: IpAddr,
    to: IpAddr,
    protocol: IpProtocol,
    /// With its headers, if it came in one piece.
    whole: &'a [u8],
    payload: &'a [u8],
    /// Its checksum is the sender's to compute, or was never wrong.
    trusted: bool,
}

impl Packet<'_> {
    /// Routers may not cut it in pieces.
    fn stays_whole(&self) -> bool {
        match self.from {
            IpAddr::V4(_) => Ipv4Packet::new_unchecked(self.whole).dont_frag(),
            IpAddr::V6(_) => Ipv6Packet::new_unchecked(self.whole).next_header() == self.protocol,
        }
    }
}

/// The network's state.
pub struct Stack {
    plan: Plan,
    loopback: bool,
    rules: Vec<Rule>,
    outlet: Outlet,
    resolvers: Resolvers,
    fragments: Fragments,
    connections: Connections,
    datagrams: Datagrams,
    pings: Pings,
    listeners: Slab<(TcpListener, u16)>,
    counts: Counts,
    /// When the router makes itself known next; none before the guest has said something in IPv6.
    advertise: Option<Instant>,
    /// When the thread wakes.
    wakes: Option<Instant>,
}

impl Stack {
    pub fn new(options: &Options) -> Self {
        Self {
            plan: Plan::new(options.network),
            loopback: options.loopback,
            rules: options.rules.clone(),
            outlet: Outlet::new(options.mac),
            resolvers: Resolvers::new(options.resolv_conf.clone()),
            fragments: Fragments::default(),
            connections: Connections::default(),
            datagrams: Datagrams::default(),
            pings: Pings::default(),
            listeners: Slab::new(),
            counts: Counts::default(),
            advertise: None,
            wakes: None,
        }
    }

    pub fn forward_tcp(&mut self, listener: TcpListener, port: u16, host: &Host) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        let index = self.listeners.insert((listener, port));
        host.watch(&self.listeners[index].0, Token::Forward(index))
    }

    pub fn forward_udp(&mut self, socket: UdpSocket, port: u16, host: &Host) -> io::Result<()> {
        let guest = SocketAddr::new(self.plan.guest().into(), port);
        self.datagrams.forward(socket, guest, host)
    }

    /// A new machine is at the cable: nothing of the one before goes on.
    pub fn connect(&mut self, guest: Guest) {
        self.outlet.connect(guest);
        self.connections.clear();
        self.datagrams.clear();
        self.pings.clear();
        self.fragments = Fragments::default();
        self.advertise = None;
    }

    pub fn counts(&self) -> Counts {
        Counts {
            dropped: self.outlet.dropped,
            connections: self.connections.len(),
            datagrams: self.datagrams.len(),
            ..self.counts
        }
    }

    fn next_due(&self) -> Option<Instant> {
        let due =
            [self.connections.next_due(), self.datagrams.next_due(), self.pings.next_due(), self.advertise];
        due.into_iter().flatten().min()
    }

    /// Until when the thread may sleep.
    pub fn sleep(&mut self) -> Option<Instant> {
        self.wakes = self.next_due();
        self.wakes
    }

    /// Whether something is due before the thread wakes. It is said once.
    pub fn is_earlier(&mut self) -> bool {
        let due = self.next_due();
        let earlier = due.is_some_and(|due| self.wakes.is_none_or(|wakes| due < wakes));
        if earlier {
            self.wakes = due;
        }
        earlier
    }

    /// Does what time demands.
    pub fn expire(&mut self, now: Instant) {
        self.connections.expire(now, &mut self.outlet);
        self.datagrams.expire(now);
        self.pings.expire(now);
        if self.advertise.is_some_and(|at| at <= now) {
            neighbours::advertise(&self.plan, &mut self.outlet);
            self.advertise = Some(now + ADVERTISE);
        }
    }

    /// The guest has room again.
    pub fn room(&mut self) {
        self.outlet.flush();
        self.connections.room(&mut self.outlet);
    }

    /// A socket of the host's is ready.
    pub fn is_ready(&mut self, ready: Ready, host: &Host) {
        let Ready { token, readable, writable, failed } = ready;
        match token {
            Token::Wake => {}
            Token::Tcp(index) => self.connections.is_ready(index, readable, writable, &mut self.outlet),
            Token::Ping(index) => self.pings.receive(index, &mut self.outlet),
            Token::Udp(index) if readable => {
                if failed {
                    self.datagrams.tell_errors(index, &mut self.outlet);
                }
                let gateway = |like| self.plan.gateway_like(like);
                if self.datagrams.receive(index, &self.rules, gateway, &mut self.outlet) {
                    self.resolvers.answered();
                }
            }
            Token::Udp(_) => {}
            Token::Forward(index) => self.accept(index, host),
        }
    }

    /// Takes connections to a forwarded port.
    fn accept(&mut self, index: usize, host: &Host) {
        let Some((listener, port)) = self.listeners.get(index) else { return };
        let to = SocketAddr::new(self.plan.guest().into(), *port);
        while let Ok((stream, peer)) = listener.accept() {
            // Dropped, it is closed.
            if !Rule::allow(&self.rules, Direction::In, Protocol::Tcp, peer.ip().to_canonical(), Some(*port))
            {
                continue;
            }
            // The guest has no way to answer those that only the host can reach, or to IPv6.
            let known = peer.is_ipv4() && matches!(self.plan.find(peer, false), Where::Host(_));
            let name = if known { peer } else { SocketAddr::new(self.plan.gateway().into(), peer.port()) };
            self.connections.forward(stream, name, to, host, &mut self.outlet);
        }
    }

    /// A frame of the guest's.
    pub fn frame(&mut self, header: &Header, frame: &[u8], host: &Host) {
        self.counts.frames += 1;
        let dropped = match self.look_at(header, frame, host) {
            Ok(()) => return,
            Err(dropped) => dropped,
        };
        *match dropped {
            Drop::Malformed => &mut self.counts.malformed,
            Drop::Forged => &mut self.counts.forged,
            Drop::Unreachable => &mut self.counts.unreachable,
        } += 1;
    }

    fn look_at(&mut self, header: &Header, frame: &[u8], host: &Host) -> Result<(), Drop> {
        let ethernet = EthernetFrame::new_checked(frame)?;
        if ethernet.src_addr().0 != self.outlet.mac() {
            return Err(Drop::Forged);
        }
        let bytes = &frame[ETHERNET..];
        let trusted = header.checksum.is_some() || header.valid;
        match ethernet.ethertype() {
            EthernetProtocol::Arp => {
                let done = neighbours::arp(bytes, &self.plan, &mut self.outlet);
                if done { Ok(()) } else { Err(Drop::Forged) }
            }
            EthernetProtocol::Ipv4 => self.ipv4(bytes, trusted, host),
            EthernetProtocol::Ipv6 => self.ipv6(bytes, trusted, host),
            EthernetProtocol::Unknown(_) => Err(Drop::Unreachable),
        }
    }

    fn ipv4(&mut self, bytes: &[u8], trusted: bool, host: &Host) -> Result<(), Drop> {
        let packet = Ipv4Packet::new_checked(bytes)?;
        if packet.version() != 4 || !packet.verify_checksum() {
            return Err(Drop::Malformed);
        }
        let (from, to, protocol) = (packet.src_addr(), packet.dst_addr(), packet.next_header());
        let whole = &bytes[..packet.total_len().into()];
        let payload = &whole[packet.header_len().into()..];
        if !packet.more_frags() && packet.frag_offset() == 0 {
            let packet = Packet { from: from.into(), to: to.into(), protocol, whole, payload, trusted };
            return self.packet(&packet, host);
        }
        let ident = packet.ident().into();
        let key = Key { from: from.into(), to: to.into(), protocol: protocol.into(), ident };
        // smoltcp gives bytes, as the standard does units of eight.
        let piece = Piece { offset: packet.frag_offset().into(), more: packet.more_frags(), data: payload };
        self.piece(key, piece, whole, host)
    }

    fn ipv6(&mut self, bytes: &[u8], trusted: bool, host: &Host) -> Result<(), Drop> {
        let packet = Ipv6Packet::new_checked(bytes)?;
        if packet.version() != 6 {
            return Err(Drop::Malformed);
        }
        let (from, to, protocol) = (packet.src_addr(), packet.dst_addr(), packet.next_header());
        let whole = &bytes[..packet.total_len()];
        let payload = packet.payload();
        if self.advertise.is_none() {
            self.advertise = Some(Instant::now());
        }
        match protocol {
            IpProtocol::Ipv6Frag => {
                let fragment = Ipv6FragmentHeader::new_checked(payload.get(2..).ok_or(Drop::Malformed)?)?;
                let data = payload.get(FRAGMENT..).ok_or(Drop::Malformed)?;
                let ident = fragment.ident();
                let key = Key { from: from.into(), to: to.into(), protocol: payload[0], ident };
                let offset = usize::from(fragment.frag_offset()) * 8;
                self.piece(key, Piece { offset, more: fragment.more_frags(), data }, whole, host)
            }
            // Only such as listen for multicasts come with options.
            IpProtocol::HopByHop => Ok(()),
            _ => {
                let packet = Packet { from: from.into(), to: to.into(), protocol, whole, payload, trusted };
                self.packet(&packet, host)
            }
        }
    }

    fn piece(&mut self, key: Key, piece: Piece<'_>, whole: &[u8], host: &Host) -> Result<(), Drop> {
        let Some(payload) = self.fragments.add(key, piece, Instant::now()).map_err(|()| Drop::Malformed)?
        else {
            return Ok(());
        };
        let protocol = key.protocol.into();
        // Connections cut their data themselves, and those that ping get answers to what arrives whole.
        if protocol == IpProtocol::Tcp {
            return Err(Drop::Malformed);
        }
        let packet =
            Packet { from: key.from, to: key.to, protocol, whole, payload: &payload, trusted: false };
        self.packet(&packet, host)
    }

    fn packet(&mut self, packet: &Packet<'_>, host: &Host) -> Result<(), Drop> {
        let Packet { from, to, protocol, payload, .. } = *packet;
        if protocol == IpProtocol::Udp
            && from.is_ipv4()
            && (from.is_unspecified() || self.plan.may_send(from))
        {
            let udp = UdpPacket::new_checked(payload)?;
            if udp.dst_port() == dhcp::SERVER && (to == self.plan.gateway() || is_broadcast(to)) {
                if !packet.trusted && !udp.verify_checksum(&from.into(), &to.into()) {
                    return Err(Drop::Malformed);
                }
                let search = self.resolvers.search(Instant::now());
                let done = dhcp::serve(udp.payload(), &self.plan, search, &mut self.outlet);
                return if done { Ok(()) } else { Err(Drop::Malformed) };
            }
        }
        if let (IpProtocol::Icmpv6, IpAddr::V6(from), IpAddr::V6(to)) = (protocol, from, to)
            && self.icmpv6(from, to, packet)?
        {
            return Ok(());
        }
        if !self.plan.may_send(from) {
            return Err(Drop::Forged);
        }
        let reached = match protocol {
            IpProtocol::Tcp => self.tcp(packet, host)?,
            IpProtocol::Udp => self.udp(packet, host)?,
            IpProtocol::Icmp if from.is_ipv6() => false,
            IpProtocol::Icmpv6 if from.is_ipv4() => false,
            IpProtocol::Icmp | IpProtocol::Icmpv6 if icmp::is_echo(payload, from) => {
                self.ping(packet, host)?
            }
            // What the guest says of packets that it got, nobody waits for.
            IpProtocol::Icmp | IpProtocol::Icmpv6 => true,
            _ => false,
        };
        if reached { Ok(()) } else { Err(Drop::Unreachable) }
    }

    /// Does what is about the link itself. False if it is something else.
    fn icmpv6(&mut self, from: Ipv6Addr, to: Ipv6Addr, packet: &Packet<'_>) -> Result<bool, Drop> {
        let message = Icmpv6Packet::new_checked(packet.payload)?;
        if !message.msg_type().is_ndisc() {
            // Reports of who listens for multicasts; we send none.
            return Ok(message.msg_type().is_mld());
        }
        // A packet that a router has passed on is no neighbour's (RFC 4861, 7.1).
        if packet.whole.get(7) != Some(&255) {
            return Err(Drop::Forged);
        }
        let repr = Icmpv6Repr::parse(&from, &to, &message, &ChecksumCapabilities::default())?;
        let Icmpv6Repr::Ndisc(message) = repr else { return Err(Drop::Malformed) };
        let allowed = (from.is_unspecified() || self.plan.may_send(from.into()))
            && neighbours::discovery(&message, from, &self.plan, &mut self.outlet);
        if allowed { Ok(true) } else { Err(Drop::Forged) }
    }

    fn may_reach(&self, protocol: Protocol, peer: IpAddr, port: Option<u16>) -> bool {
        Rule::allow(&self.rules, Direction::Out, protocol, peer, port)
    }

    fn tcp(&mut self, packet: &Packet<'_>, host: &Host) -> Result<bool, Drop> {
        let header = packet.whole.len() - packet.payload.len();
        let segment = Segment::new(packet.whole, packet.from, packet.to, header).ok_or(Drop::Malformed)?;
        let ends: (IpAddress, IpAddress) = (packet.from.into(), packet.to.into());
        if !packet.trusted && !segment.tcp.verify_checksum(&ends.0, &ends.1) {
            return Err(Drop::Malformed);
        }
        let target = match self.plan.find(segment.to, self.loopback) {
            Where::Names => Where::Host(self.resolvers.ask(Instant::now())),
            other => other,
        };
        // Of a connection that is there the first packet was let through.
        let begins = segment.tcp.syn() && !segment.tcp.ack();
        let target = if begins && !self.may_reach(Protocol::Tcp, segment.to.ip(), Some(segment.to.port())) {
            Where::Nowhere
        } else {
            target
        };
        if target == Where::Nowhere {
            icmp::unreachable(packet.whole, Unreachable::Forbidden, &mut self.outlet);
        }
        self.connections.receive(&segment, target, host, &mut self.outlet);
        Ok(target != Where::Nowhere)
    }

    fn udp(&mut self, packet: &Packet<'_>, host: &Host) -> Result<bool, Drop> {
        let udp = UdpPacket::new_checked(packet.payload)?;
        let ends: (IpAddress, IpAddress) = (packet.from.into(), packet.to.into());
        if !packet.trusted && !udp.verify_checksum(&ends.0, &ends.1)
            || udp.dst_port() == 0
            || udp.src_port() == 0
        {
            return Err(Drop::Malformed);
        }
        let guest = SocketAddr::new(packet.from, udp.src_port());
        let name = SocketAddr::new(packet.to, udp.dst_port());
        let now = Instant::now();
        if !self.datagrams.is_answer(guest, name)
            && !self.may_reach(Protocol::Udp, name.ip(), Some(name.port()))
        {
            icmp::unreachable(packet.whole, Unreachable::Forbidden, &mut self.outlet);
            return Ok(false);
        }
        let to = match self.plan.find(name, self.loopback) {
            Where::Host(to) => Some(to),
            Where::Names => Some(self.resolvers.ask(now)),
            Where::Refused => self.datagrams.peer_of(guest, name),
            Where::Nowhere => return Ok(false),
        };
        let why = match to {
            Some(to) => {
                let datagram = Datagram { guest, to, name, data: udp.payload(), whole: packet.stays_whole() };
                match self.datagrams.send(&datagram, host, now, &mut self.outlet) {
                    Ok(()) => return Ok(true),
                    Err(why) => why,
                }
            }
            None => Unreachable::Port,
        };
        icmp::lost(guest, name, udp.payload(), why, &mut self.outlet);
        Ok(false)
    }

    fn ping(&mut self, packet: &Packet<'_>, host: &Host) -> Result<bool, Drop> {
        let Packet { from, to, protocol, payload, .. } = *packet;
        let right = match (from, to) {
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                Icmpv6Packet::new_unchecked(payload).verify_checksum(&from, &to)
            }
            _ => Icmpv4Packet::new_unchecked(payload).verify_checksum(),
        };
        if !right {
            return Err(Drop::Malformed);
        }
        if !self.may_reach(Protocol::Icmp, to, None) {
            icmp::unreachable(packet.whole, Unreachable::Forbidden, &mut self.outlet);
            return Ok(false);
        }
        if self.plan.is_ours(to) {
            icmp::echo(payload, from, to, protocol, &mut self.outlet);
            return Ok(true);
        }
        let Where::Host(_) = self.plan.find(SocketAddr::new(to, 0), false) else { return Ok(false) };
        let sent = self.pings.send(payload, from, to, host, Instant::now());
        if !sent && self.pings.forbidden {
            icmp::unreachable(packet.whole, Unreachable::Forbidden, &mut self.outlet);
        }
        Ok(sent)
    }
}

fn is_broadcast(to: IpAddr) -> bool {
    matches!(to, IpAddr::V4(to) if to.is_broadcast())
}
