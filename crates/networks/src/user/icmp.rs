//! ICMP: pings, and what is said of packets that got nowhere.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recvfrom, sendto, socket_with,
};
use slab::Slab;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv4Packet, Icmpv6Packet, IpProtocol, IpRepr, UdpPacket};

use super::host::{Host, Token};
use super::outlet::{HOPS, IPV4, IPV6, Outlet};

/// Programs in the guest that ping at once, at most.
const MOST: usize = 64;
/// After so long without a ping its socket goes.
const IDLE: Duration = Duration::from_secs(30);
/// Of a packet that got nowhere so much is told (RFC 792; RFC 4443, 2.4).
const TOLD4: usize = 28;
const TOLD6: usize = 1232;
/// Bytes of a header, and where in it is who asks.
const HEADER: usize = 8;
const IDENT: usize = 4;

/// Errors that a guest is told of in a second, at most (RFC 1812, 4.3.2.8; RFC 4443, 2.4).
const MOST_ERRORS: u32 = 200;

/// Why a packet got nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreachable {
    Net,
    Host,
    Port,
    /// Nobody may get there.
    Forbidden,
    /// Packets may have so many bytes on the way there.
    TooBig(u32),
}

impl Unreachable {
    /// What the host's kernel means by an error of a socket for datagrams (ip(7), IP_RECVERR). `mtu` counts if one was too big.
    pub fn of(error: Errno, mtu: u32) -> Self {
        match error {
            Errno::NETUNREACH => Self::Net,
            Errno::CONNREFUSED => Self::Port,
            Errno::ACCESS | Errno::PERM => Self::Forbidden,
            Errno::MSGSIZE => Self::TooBig(mtu),
            _ => Self::Host,
        }
    }
}

/// How many errors the guest was told of in this second.
#[derive(Debug, Default)]
pub struct Told(Option<Instant>, u32);

impl Told {
    /// Whether one more may be told of.
    pub fn another(&mut self) -> bool {
        if self.0.is_none_or(|since| since.elapsed() >= Duration::from_secs(1)) {
            *self = Self(Some(Instant::now()), 0);
        }
        self.1 += 1;
        self.1 <= MOST_ERRORS
    }
}

/// Tells the guest that its packet got nowhere.
pub fn unreachable(packet: &[u8], why: Unreachable, outlet: &mut Outlet) {
    let Some((from, to)) = ends(packet) else { return };
    if !outlet.told.another() {
        return;
    }
    let (protocol, told, (kind, code)) = match from {
        IpAddr::V4(_) => (
            IpProtocol::Icmp,
            TOLD4,
            match why {
                Unreachable::Net => (3, 0),
                Unreachable::Host => (3, 1),
                Unreachable::Port => (3, 3),
                Unreachable::TooBig(_) => (3, 4),
                Unreachable::Forbidden => (3, 13),
            },
        ),
        IpAddr::V6(_) => (
            IpProtocol::Icmpv6,
            TOLD6,
            match why {
                Unreachable::Net => (1, 0),
                Unreachable::Forbidden => (1, 1),
                Unreachable::Host => (1, 3),
                Unreachable::Port => (1, 4),
                Unreachable::TooBig(_) => (2, 0),
            },
        ),
    };
    // In IPv4 only the lower half counts (RFC 1191, 4).
    let [a, b, c, d] = if let Unreachable::TooBig(mtu) = why { mtu.to_be_bytes() } else { [0; 4] };
    let told = &packet[..packet.len().min(told)];
    let mut message = [&[kind, code, 0, 0, a, b, c, d], told].concat();
    fill_checksum(&mut message, to, from);
    // As if the one that was not reached said so: all others are behind the same door.
    outlet.packet(to, from, protocol, &message);
}

/// Tells the guest that a datagram got nowhere, of which this much is known. Both addresses are of one family.
pub fn lost(from: SocketAddr, to: SocketAddr, data: &[u8], why: Unreachable, outlet: &mut Outlet) {
    let data = &data[..data.len().min(TOLD6)];
    let mut udp = [&[0; HEADER], data].concat();
    let mut packet = UdpPacket::new_unchecked(&mut udp[..]);
    packet.set_src_port(from.port());
    packet.set_dst_port(to.port());
    packet.set_len((HEADER + data.len()) as u16);
    packet.fill_checksum(&from.ip().into(), &to.ip().into());
    let header = IpRepr::new(from.ip().into(), to.ip().into(), IpProtocol::Udp, udp.len(), HOPS);
    let mut whole = vec![0; header.header_len()];
    header.emit(&mut whole[..], &ChecksumCapabilities::default());
    whole.extend(udp);
    unreachable(&whole, why, outlet);
}

/// Both addresses of an IP packet.
fn ends(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    fn address<const N: usize>(packet: &[u8], at: usize) -> Option<[u8; N]> {
        packet.get(at..at + N)?.try_into().ok()
    }
    Some(if packet.first()? >> 4 == 4 {
        (address::<4>(packet, IPV4 - 8)?.into(), address::<4>(packet, IPV4 - 4)?.into())
    } else {
        (address::<16>(packet, IPV6 - 32)?.into(), address::<16>(packet, IPV6 - 16)?.into())
    })
}

fn fill_checksum(message: &mut [u8], from: IpAddr, to: IpAddr) {
    match (from, to) {
        (IpAddr::V6(from), IpAddr::V6(to)) => Icmpv6Packet::new_unchecked(message).fill_checksum(&from, &to),
        _ => Icmpv4Packet::new_unchecked(message).fill_checksum(),
    }
}

/// What asks for an echo, and what answers: type, in IPv4 and IPv6.
const ECHO: [u8; 2] = [8, 128];
const REPLY: [u8; 2] = [0, 129];

/// The types of an echo's request and reply between addresses like this one.
fn types(address: IpAddr) -> (u8, u8) {
    let family = usize::from(address.is_ipv6());
    (ECHO[family], REPLY[family])
}

/// Answers an echo request to one of our own addresses.
pub fn echo(message: &[u8], from: IpAddr, to: IpAddr, protocol: IpProtocol, outlet: &mut Outlet) {
    let mut reply = message.to_vec();
    reply[0] = types(from).1;
    fill_checksum(&mut reply, to, from);
    outlet.packet(to, from, protocol, &reply);
}

/// Whether this is an echo request.
pub fn is_echo(message: &[u8], from: IpAddr) -> bool {
    message.len() >= HEADER && message[0] == types(from).0 && message[1] == 0
}

/// One of the guest's programs that ping.
#[derive(Debug)]
struct Pinger {
    guest: IpAddr,
    ident: [u8; 2],
    socket: OwnedFd,
    /// It gets everybody's answers: ours have this.
    raw: Option<[u8; 2]>,
    last: Instant,
}

/// All that ping.
#[derive(Debug, Default)]
pub struct Pings {
    all: Slab<Pinger>,
    /// The host does not let us ping (`net.ipv4.ping_group_range`).
    pub forbidden: bool,
}

impl Pings {
    /// When to look for idle ones.
    pub fn next_due(&self) -> Option<Instant> {
        self.all.iter().map(|(_, pinger)| pinger.last + IDLE).min()
    }

    /// Forgets those that have ended.
    pub fn expire(&mut self, now: Instant) {
        self.all.retain(|_, pinger| now < pinger.last + IDLE);
    }

    pub fn clear(&mut self) {
        self.all.clear();
    }

    /// Sends an echo request on. False if that cannot be.
    pub fn send(&mut self, message: &[u8], from: IpAddr, to: IpAddr, host: &Host, now: Instant) -> bool {
        let ident = [message[IDENT], message[IDENT + 1]];
        let known = self.all.iter().find(|(_, pinger)| pinger.guest == from && pinger.ident == ident);
        let index = match known.map(|(index, _)| index) {
            Some(index) => index,
            None if self.all.len() >= MOST => return false,
            None => {
                let Ok((socket, raw)) = open(from) else {
                    self.forbidden = true;
                    return false;
                };
                let entry = self.all.vacant_entry();
                if host.watch(&socket, Token::Ping(entry.key())).is_err() {
                    return false;
                }
                let index = entry.key();
                entry.insert(Pinger { guest: from, ident, socket, raw, last: now });
                index
            }
        };
        let pinger = &mut self.all[index];
        pinger.last = now;
        let mut message = message.to_vec();
        if let Some(own) = pinger.raw {
            message[IDENT..IDENT + 2].copy_from_slice(&own);
            // In IPv6 the kernel fills it in, for it knows from where it sends.
            fill_checksum(&mut message, from, to);
        }
        sendto(&pinger.socket, &message, SendFlags::NOSIGNAL, &SocketAddr::new(to, 0)).is_ok()
    }

    /// Hands the guest what has come.
    pub fn receive(&mut self, index: usize, outlet: &mut Outlet) {
        let Some(pinger) = self.all.get(index) else { return };
        let mut bytes = vec![0; usize::from(u16::MAX)];
        for _ in 0..MOST {
            let Ok((len, _, Some(from))) = recvfrom(&pinger.socket, &mut bytes[..], RecvFlags::empty())
            else {
                return;
            };
            let Ok(from) = SocketAddr::try_from(from) else { continue };
            // Raw sockets of IPv4 give its header, too.
            let before =
                if pinger.raw.is_some() && from.is_ipv4() { usize::from(bytes[0] & 15) * 4 } else { 0 };
            let Some(message) = bytes[..len].get_mut(before..).filter(|message| message.len() >= HEADER)
            else {
                continue;
            };
            let others = pinger.raw.is_some_and(|own| message[IDENT..IDENT + 2] != own);
            if others || message[0] != types(pinger.guest).1 || from.is_ipv4() != pinger.guest.is_ipv4() {
                continue;
            }
            message[IDENT..IDENT + 2].copy_from_slice(&pinger.ident);
            fill_checksum(message, from.ip(), pinger.guest);
            let protocol = if from.is_ipv4() { IpProtocol::Icmp } else { IpProtocol::Icmpv6 };
            outlet.packet(from.ip(), pinger.guest, protocol, message);
        }
    }
}

/// A socket that may ping: one that needs no rights, where the host allows that to this user's group, else a raw one, with the number
/// that our pings have on it.
fn open(like: IpAddr) -> io::Result<(OwnedFd, Option<[u8; 2]>)> {
    if cfg!(fuzzing) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let (family, protocol) = match like {
        IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP),
        IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6),
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    if let Ok(socket) = socket_with(family, SocketType::DGRAM, flags, Some(protocol)) {
        return Ok((socket, None));
    }
    let socket = socket_with(family, SocketType::RAW, flags, Some(protocol))?;
    let [a, b, ..] = super::random().to_ne_bytes();
    Ok((socket, Some([a, b])))
}

/// Whether the host lets us ping.
#[cfg(test)]
pub fn may_ping() -> bool {
    open(std::net::Ipv4Addr::LOCALHOST.into()).is_ok()
}
