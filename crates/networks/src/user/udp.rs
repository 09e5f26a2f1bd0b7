//! Datagrams between the guest and the world: each of the guest's sockets has one of the host's, by which everybody may answer.

use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use netctl::{Direction, Protocol, Rule};
use nix::libc::{SO_EE_ORIGIN_LOCAL, sock_extended_err, sockaddr_in6};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};
use rustix::io::Errno;
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover,
};
use slab::Slab;

use super::host::{Host, Token};
use super::icmp::{self, Unreachable};
use super::outlet::{IPV4, IPV6, Outlet};

/// Sockets at once.
pub(super) const MOST: usize = 1024;
/// After so long without a datagram a socket goes: after a question, and after one that was answered.
const IDLE: Duration = Duration::from_secs(60);
const IDLE_ANSWERED: Duration = Duration::from_secs(180);
/// Peers of a socket that the guest knows by other addresses, at most.
const MOST_NAMES: usize = 64;
/// Datagrams of a socket that are taken at once.
const MOST_AT_ONCE: usize = 64;
/// Bytes of a datagram that got nowhere, of which the guest is told.
const TOLD: usize = 1232;
/// Bytes of the longest datagram.
const LONGEST: usize = 65_507;

/// What a guest sends.
#[derive(Debug, Clone, Copy)]
pub struct Datagram<'a> {
    pub guest: SocketAddr,
    /// To whom in the host's network.
    pub to: SocketAddr,
    /// As whom the guest knows that one.
    pub name: SocketAddr,
    pub data: &'a [u8],
    /// Routers may not cut it in pieces.
    pub whole: bool,
}

/// One of the guest's sockets.
#[derive(Debug)]
struct Socket {
    guest: SocketAddr,
    host: UdpSocket,
    /// As whom the guest knows a peer of the host's socket, where that differs.
    names: HashMap<SocketAddr, SocketAddr>,
    answered: bool,
    last: Instant,
    /// The host may not cut what it sends in pieces.
    whole: bool,
    /// It is a forwarded port of the host's, and never goes.
    forward: bool,
}

/// All sockets.
#[derive(Debug, Default)]
pub struct Datagrams {
    all: Slab<Socket>,
    /// By the guest's address, and whether the host's socket is of IPv6.
    by_guest: HashMap<(SocketAddr, bool), usize>,
    /// When idle ones were looked for.
    swept: Option<Instant>,
}

impl Socket {
    fn know(&mut self, peer: SocketAddr, name: SocketAddr) {
        if self.names.len() >= MOST_NAMES {
            self.names.clear();
        }
        self.names.insert(peer, name);
    }

    /// Whether the host may cut in pieces what is sent next.
    fn set_whole(&mut self, whole: bool, ipv6: bool) {
        if self.whole == whole {
            return;
        }
        self.whole = whole;
        // Without it the guest learns later, or not at all, how long its datagrams may be.
        let _ = match (ipv6, whole) {
            (false, true) => set_ip_mtu_discover(&self.host, Ipv4PathMtuDiscovery::DO),
            (false, false) => set_ip_mtu_discover(&self.host, Ipv4PathMtuDiscovery::WANT),
            (true, true) => set_ipv6_mtu_discover(&self.host, Ipv6PathMtuDiscovery::DO),
            (true, false) => set_ipv6_mtu_discover(&self.host, Ipv6PathMtuDiscovery::WANT),
        };
    }

    /// Tells the guest of its datagrams that got nowhere, as the host has learnt meanwhile (ip(7), IP_RECVERR). Of what the host itself
    /// did not send, for it was too long, the length is returned that a packet may have: whoever sends knows the rest.
    fn tell_errors(&self, outlet: &mut Outlet) -> Option<u32> {
        let mut longest = None;
        let mut bytes = vec![0; TOLD];
        let mut control = nix::cmsg_space!(sock_extended_err, sockaddr_in6);
        for _ in 0..MOST_AT_ONCE {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
            let Ok(message) =
                recvmsg::<SockaddrStorage>(self.host.as_raw_fd(), &mut parts, Some(&mut control), flags)
            else {
                break;
            };
            let error = message.cmsgs().into_iter().flatten().find_map(|one| match one {
                ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _) => {
                    Some(error)
                }
                _ => None,
            });
            let (Some(error), to, len) = (error, message.address.and_then(socket_address), message.bytes)
            else {
                continue;
            };
            if error.ee_origin == SO_EE_ORIGIN_LOCAL {
                longest = Some(error.ee_info);
                continue;
            }
            let Some(to) = to else { continue };
            let known = self.names.get(&to).copied();
            let Some(name) = known.or((!to.ip().is_loopback()).then_some(to)) else { continue };
            if name.is_ipv4() == self.guest.is_ipv4() {
                let errno = Errno::from_raw_os_error(error.ee_errno as i32);
                let why = Unreachable::of(errno, between(to, name, error.ee_info));
                icmp::lost(self.guest, name, &bytes[..len], why, outlet);
            }
        }
        longest
    }

    fn is_idle(&self, now: Instant) -> bool {
        let idle = if self.answered { IDLE_ANSWERED } else { IDLE };
        !self.forward && now > self.last + idle
    }
}

/// The longest packet to one of these, of which the host knows how long it may be to the other: their headers may be different.
fn between(to: SocketAddr, name: SocketAddr, longest: u32) -> u32 {
    let header = |to: SocketAddr| (if to.is_ipv4() { IPV4 } else { IPV6 }) as u32;
    longest.saturating_add(header(name)).saturating_sub(header(to))
}

fn socket_address(address: SockaddrStorage) -> Option<SocketAddr> {
    match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
        (Some(ipv4), _) => Some(SocketAddr::new(ipv4.ip().into(), ipv4.port())),
        (_, Some(ipv6)) => Some(SocketAddr::new(ipv6.ip().into(), ipv6.port())),
        _ => None,
    }
}

impl Datagrams {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// When to look for idle ones.
    pub fn next_due(&self) -> Option<Instant> {
        let has = self.all.iter().any(|(_, socket)| !socket.forward);
        has.then(|| self.swept.map_or_else(Instant::now, |swept| swept + IDLE))
    }

    /// Closes those that are idle.
    pub fn expire(&mut self, now: Instant) {
        if self.swept.is_some_and(|swept| now < swept + IDLE) {
            return;
        }
        self.swept = Some(now);
        let idle: Vec<usize> = self.all.iter().filter(|(_, s)| s.is_idle(now)).map(|(n, _)| n).collect();
        idle.into_iter().for_each(|index| self.remove(index));
    }

    /// Closes all but forwarded ports.
    pub fn clear(&mut self) {
        let all: Vec<usize> = self.all.iter().filter(|(_, s)| !s.forward).map(|(n, _)| n).collect();
        all.into_iter().for_each(|index| self.remove(index));
    }

    fn remove(&mut self, index: usize) {
        if let Some(socket) = self.all.try_remove(index) {
            self.by_guest.retain(|_, n| *n != index);
            drop(socket);
        }
    }

    /// A port of the host's leads to the guest's `to`.
    pub fn forward(&mut self, host_socket: UdpSocket, to: SocketAddr, host: &Host) -> io::Result<()> {
        let ipv6 = host_socket.local_addr()?.is_ipv6();
        self.insert(host_socket, to, ipv6, true, host).map(|_| ())
    }

    fn insert(
        &mut self,
        socket: UdpSocket,
        guest: SocketAddr,
        ipv6: bool,
        forward: bool,
        host: &Host,
    ) -> io::Result<usize> {
        socket.set_nonblocking(true)?;
        // Else only those sockets learn of errors that have one peer. What cannot be told is lost, as anything may be.
        let _ = match ipv6 {
            false => setsockopt(&socket, sockopt::Ipv4RecvErr, &true),
            true => setsockopt(&socket, sockopt::Ipv6RecvErr, &true),
        };
        let entry = self.all.vacant_entry();
        let index = entry.key();
        host.watch(&socket, Token::Udp(index))?;
        let last = Instant::now();
        let (names, answered, whole) = (HashMap::new(), false, false);
        entry.insert(Socket { guest, host: socket, names, answered, last, whole, forward });
        self.by_guest.insert((guest, ipv6), index);
        Ok(index)
    }

    /// The host's socket for one of the guest's.
    fn socket(&mut self, guest: SocketAddr, ipv6: bool, host: &Host) -> io::Result<usize> {
        if let Some(index) = self.by_guest.get(&(guest, ipv6)) {
            return Ok(*index);
        }
        if self.all.len() >= MOST {
            let oldest = self.all.iter().filter(|(_, s)| !s.forward).min_by_key(|(_, s)| s.last);
            let oldest = oldest.map(|(index, _)| index).ok_or(io::ErrorKind::QuotaExceeded)?;
            self.remove(oldest);
        }
        let any: IpAddr = if ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        self.insert(socket, guest, ipv6, false, host)
    }

    /// Sends a datagram of the guest's.
    ///
    /// # Errors
    /// Why it got nowhere.
    pub fn send(
        &mut self,
        datagram: &Datagram<'_>,
        host: &Host,
        now: Instant,
        outlet: &mut Outlet,
    ) -> Result<(), Unreachable> {
        let Datagram { guest, to, name, data, whole } = *datagram;
        #[cfg(fuzzing)]
        let to = super::fuzzing::udp_instead_of(to);
        let index = self.socket(guest, to.is_ipv6(), host).map_err(|_| Unreachable::Host)?;
        let socket = &mut self.all[index];
        socket.last = now;
        if to != name {
            socket.know(to, name);
        }
        socket.set_whole(whole, to.is_ipv6());
        let mut failed = None;
        // The first time the kernel may tell of a datagram that was sent before, and not have looked at this one.
        for _ in 0..2 {
            let Err(error) = socket.host.send_to(data, to) else { return Ok(()) };
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
            // As on any network, what there is no room for is lost.
            if errno == Errno::AGAIN {
                return Ok(());
            }
            let longest = socket.tell_errors(outlet);
            failed = Some(Unreachable::of(errno, longest.map_or(0, |longest| between(to, name, longest))));
            if longest.is_some() {
                break;
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Tells the guest of its datagrams by a socket that got nowhere.
    pub fn tell_errors(&self, index: usize, outlet: &mut Outlet) {
        if let Some(socket) = self.all.get(index) {
            socket.tell_errors(outlet);
        }
    }

    /// Hands the guest what has come for it. `gateway` is who hosts without an address of their own are to it. Whether a name
    /// server has answered.
    pub fn receive(
        &mut self,
        index: usize,
        rules: &[Rule],
        gateway: impl Fn(IpAddr) -> IpAddr,
        outlet: &mut Outlet,
    ) -> bool {
        let Some(socket) = self.all.get_mut(index) else { return false };
        let mut bytes = vec![0; LONGEST];
        let mut names = false;
        for _ in 0..MOST_AT_ONCE {
            let (len, from) = match socket.host.recv_from(&mut bytes) {
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // The guest is told by the socket's queue of errors.
                Err(_) => continue,
            };
            let (peer, port) = (from.ip().to_canonical(), socket.guest.port());
            if socket.forward && !Rule::allow(rules, Direction::In, Protocol::Udp, peer, Some(port)) {
                continue;
            }
            socket.last = Instant::now();
            socket.answered = true;
            let mut name = socket.names.get(&from).copied();
            if name.is_none() && from.ip().is_loopback() {
                // Who comes by a forwarded port is answered there.
                let seen = SocketAddr::new(gateway(socket.guest.ip()), from.port());
                socket.know(from, seen);
                name = Some(seen);
            }
            let name = name.unwrap_or(from);
            if socket.forward {
                socket.know(from, name);
            }
            names |= name.port() == 53;
            if name.is_ipv4() == socket.guest.is_ipv4() {
                outlet.datagram(name, socket.guest, &bytes[..len]);
            }
        }
        names
    }

    /// Whether this answers a datagram that came by a forwarded port.
    pub fn is_answer(&self, guest: SocketAddr, to: SocketAddr) -> bool {
        let index = self.by_guest.get(&(guest, to.is_ipv6()));
        let socket = index.and_then(|index| self.all.get(*index)).filter(|socket| socket.forward);
        socket.is_some_and(|socket| socket.names.values().any(|name| *name == to))
    }

    /// Who in the host's network the guest means by the gateway's port: whoever has sent it something by a forwarded port.
    pub fn peer_of(&self, guest: SocketAddr, to: SocketAddr) -> Option<SocketAddr> {
        let index = self.by_guest.get(&(guest, to.is_ipv6()))?;
        let socket = self.all.get(*index)?;
        socket.names.iter().find(|(_, name)| **name == to).map(|(peer, _)| *peer)
    }
}
