//! Datagrams between the guest and the world: each of the guest's sockets has one of the host's, by which everybody may answer.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use netctl::{Direction, Protocol, Rule};
use slab::Slab;

use super::host::{Host, Token};
use super::outlet::Outlet;

/// Sockets at once.
pub(super) const MOST: usize = 1024;
/// After so long without a datagram a socket goes: after a question, and after one that was answered.
const IDLE: Duration = Duration::from_secs(60);
const IDLE_ANSWERED: Duration = Duration::from_secs(180);
/// Peers of a socket that the guest knows by other addresses, at most.
const MOST_NAMES: usize = 64;
/// Datagrams of a socket that are taken at once.
const MOST_AT_ONCE: usize = 64;
/// Bytes of the longest datagram.
const LONGEST: usize = 65_507;

/// One of the guest's sockets.
#[derive(Debug)]
struct Socket {
    guest: SocketAddr,
    host: UdpSocket,
    /// As whom the guest knows a peer of the host's socket, where that differs.
    names: HashMap<SocketAddr, SocketAddr>,
    answered: bool,
    last: Instant,
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

    fn is_idle(&self, now: Instant) -> bool {
        let idle = if self.answered { IDLE_ANSWERED } else { IDLE };
        !self.forward && now > self.last + idle
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
        let entry = self.all.vacant_entry();
        let index = entry.key();
        host.watch(&socket, Token::Udp(index))?;
        let last = Instant::now();
        entry.insert(Socket { guest, host: socket, names: HashMap::new(), answered: false, last, forward });
        self.by_guest.insert((guest, ipv6), index);
        Ok(index)
    }

    /// Sends a datagram of the guest's to `to`, which the guest knows as `name`.
    ///
    /// # Errors
    /// It cannot be sent.
    pub fn send(
        &mut self,
        guest: SocketAddr,
        to: SocketAddr,
        name: SocketAddr,
        data: &[u8],
        host: &Host,
        now: Instant,
    ) -> io::Result<()> {
        #[cfg(fuzzing)]
        let to = super::fuzzing::udp_instead_of(to);
        let key = (guest, to.is_ipv6());
        let index = match self.by_guest.get(&key) {
            Some(&index) => index,
            None => {
                if self.all.len() >= MOST {
                    let oldest = self.all.iter().filter(|(_, s)| !s.forward).min_by_key(|(_, s)| s.last);
                    let oldest = oldest.map(|(index, _)| index).ok_or(io::ErrorKind::QuotaExceeded)?;
                    self.remove(oldest);
                }
                let any: IpAddr =
                    if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
                let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
                self.insert(socket, guest, to.is_ipv6(), false, host)?
            }
        };
        let socket = &mut self.all[index];
        socket.last = now;
        if to != name {
            socket.know(to, name);
        }
        match socket.host.send_to(data, to) {
            // As on any network, what there is no room for is lost.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other.map(|_| ()),
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
                // What is told concerns datagrams that were sent before.
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
