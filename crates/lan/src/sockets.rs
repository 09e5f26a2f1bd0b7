//! The sockets: each is bound to the bridge, and hears nobody else.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::adverts::{ALL_NODES, ALL_ROUTERS, Advert, SOLICIT, is_solicitation, pause};
use crate::names::{self, Zone};
use crate::turns::Turns;
use crate::upstream::{self, Upstream};
use crate::{Counters, Leases, count, dhcp};

/// A DHCP or DNS datagram is no longer.
const LONGEST: usize = 4096;
/// A pause after an error: the device may be down for long.
const HICCUP: Duration = Duration::from_millis(100);
/// A guest's connection may be silent for so long.
const IDLE: Duration = Duration::from_secs(10);
/// Between two advertisements to all (RFC 4861, 10: MIN_DELAY_BETWEEN_RAS), and two to one.
const BETWEEN: Duration = Duration::from_secs(3);
const BETWEEN_SINGLE: Duration = Duration::from_millis(50);
/// A device without a port has no address to send from yet.
const RETRY: Duration = Duration::from_secs(1);

fn made(what: &str, device: &str, make: impl FnOnce() -> io::Result<Socket>) -> io::Result<Socket> {
    let socket = make().map_err(|error| {
        io::Error::new(error.kind(), format!("the {what} server of {device} cannot start: {error}"))
    })?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// The DHCP server's.
pub fn dhcp(device: &str) -> io::Result<UdpSocket> {
    let socket = made("DHCP", device, || {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
        // Servers that listen on other devices have the same port.
        socket.set_reuse_address(true)?;
        socket.set_broadcast(true)?;
        socket.bind_device(Some(device.as_bytes()))?;
        socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, dhcp::SERVER)).into())?;
        Ok(socket)
    })?;
    UdpSocket::from_std(socket.into())
}

fn names(device: &str, address: IpAddr, kind: Type) -> io::Result<Socket> {
    made("name", device, || {
        let address = SocketAddr::new(address, names::PORT);
        let socket = Socket::new(Domain::for_address(address), kind, None)?;
        socket.set_reuse_address(true)?;
        // The runtime closes the sockets of servers that ended a moment later.
        socket.set_reuse_port(kind == Type::STREAM)?;
        // An IPv6 address is not usable before the first guest is there: until then nobody can say that it is its own.
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
            socket.set_freebind_v6(true)?;
        }
        socket.bind_device(Some(device.as_bytes()))?;
        socket.bind(&address.into())?;
        Ok(socket)
    })
}

/// The name server's, for datagrams.
pub fn names_udp(device: &str, address: IpAddr) -> io::Result<UdpSocket> {
    UdpSocket::from_std(names(device, address, Type::DGRAM)?.into())
}

/// The name server's, for connections.
pub fn names_tcp(device: &str, address: IpAddr) -> io::Result<TcpListener> {
    let socket = names(device, address, Type::STREAM)?;
    socket.listen(64)?;
    TcpListener::from_std(socket.into())
}

/// Serves DHCP.
pub async fn serve_dhcp(
    socket: UdpSocket,
    server: dhcp::Server,
    leases: Arc<Leases>,
    counters: Arc<Counters>,
) {
    let mut message = vec![0; LONGEST];
    // Once for each card: a guest shall not fill the log.
    let mut told = std::collections::HashSet::new();
    loop {
        let Ok((len, _)) = socket.recv_from(&mut message).await else {
            sleep(HICCUP).await;
            continue;
        };
        match server.serve(&message[..len], &leases) {
            dhcp::Outcome::Answer(answer, to) => {
                count(&counters.dhcp_answered);
                // Who did not hear asks again.
                let _ = socket.send_to(&answer, (to, dhcp::CLIENT)).await;
            }
            dhcp::Outcome::Declined(mac, address) => {
                count(&counters.dhcp_declined);
                if told.insert(mac) {
                    eprintln!(
                        "{mac} says that another has its address {address}; look for a fixed address in a guest"
                    );
                }
            }
            dhcp::Outcome::Unknown => count(&counters.dhcp_unknown),
            dhcp::Outcome::Malformed => count(&counters.malformed),
            dhcp::Outcome::Nothing => {}
        }
    }
}

/// What both kinds of name servers need.
#[derive(Debug)]
pub struct Names {
    pub zone: Arc<Zone>,
    pub upstream: Arc<Upstream>,
    pub leases: Arc<Leases>,
    pub counters: Arc<Counters>,
}

/// Serves names, to datagrams.
pub async fn serve_udp(socket: UdpSocket, names: Arc<Names>, turns: Arc<Turns>) {
    let socket = Arc::new(socket);
    let mut message = vec![0; LONGEST];
    // They end with this task.
    let mut asked = JoinSet::new();
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut message) => received,
            Some(_) = asked.join_next() => continue,
        };
        let Ok((len, from)) = received else {
            sleep(HICCUP).await;
            continue;
        };
        if !names.zone.serves(from.ip()) {
            count(&names.counters.names_refused);
            continue;
        }
        let message = &message[..len];
        match names.zone.serve(message, &names.leases) {
            names::Outcome::Answer(answer) => {
                count(&names.counters.names_answered);
                let _ = socket.send_to(&answer, from).await;
            }
            names::Outcome::Malformed => count(&names.counters.malformed),
            names::Outcome::Forward => {
                let Some(turn) = turns.take(from.ip()) else {
                    count(&names.counters.names_refused);
                    continue;
                };
                count(&names.counters.names_forwarded);
                let (socket, names, message) = (socket.clone(), names.clone(), message.to_vec());
                asked.spawn(async move {
                    let _turn = turn;
                    let answer = names.upstream.ask(&message).await;
                    if let Some(answer) = answer.or_else(|| Zone::failure(&message)) {
                        let _ = socket.send_to(&answer, from).await;
                    }
                });
            }
        }
    }
}

/// Serves names, to connections.
pub async fn serve_tcp(listener: TcpListener, names: Arc<Names>, turns: Arc<Turns>) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let Ok((stream, from)) = accepted else {
            sleep(HICCUP).await;
            continue;
        };
        match turns.take(from.ip()).filter(|_| names.zone.serves(from.ip())) {
            Some(turn) => {
                let names = names.clone();
                connections.spawn(async move {
                    let _turn = turn;
                    // However it ended, it ended.
                    let _ = converse(stream, &names).await;
                });
            }
            None => count(&names.counters.names_refused),
        }
    }
}

/// Answers all questions of a connection, one after the other.
async fn converse(mut stream: TcpStream, names: &Names) -> io::Result<()> {
    loop {
        let message = timeout(IDLE, upstream::read(&mut stream)).await??;
        let answer = match names.zone.serve(&message, &names.leases) {
            names::Outcome::Answer(answer) => {
                count(&names.counters.names_answered);
                Some(answer)
            }
            names::Outcome::Malformed => {
                count(&names.counters.malformed);
                return Err(ErrorKind::InvalidData.into());
            }
            names::Outcome::Forward => {
                count(&names.counters.names_forwarded);
                names.upstream.ask_long(&message).await.or_else(|| Zone::failure(&message))
            }
        };
        let answer = answer.ok_or(ErrorKind::InvalidData)?;
        timeout(IDLE, upstream::write(&mut stream, &answer)).await??;
    }
}

/// Tells guests of their router.
#[derive(Debug)]
pub struct Routers {
    /// A raw one: its datagrams are ICMPv6 messages.
    socket: UdpSocket,
    /// The device's number.
    scope: u32,
    advert: Advert,
}

/// What passes the socket: solicitations with a hop limit of 255, which nobody from elsewhere can send (RFC 4861, 6.1.1). Offsets from
/// `NETWORK` on are the IPv6 header's, those from 0 on the message's (BPF, SKF_NET_OFF).
const FILTER: [SockFilter; 6] = {
    const NETWORK: u32 = 0xfff0_0000;
    const LOAD_BYTE: u16 = 0x30;
    const IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    [
        SockFilter::new(LOAD_BYTE, 0, 0, NETWORK + 7),
        SockFilter::new(IF_EQUAL, 0, 3, 255),
        SockFilter::new(LOAD_BYTE, 0, 0, 0),
        SockFilter::new(IF_EQUAL, 0, 1, SOLICIT as u32),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
        SockFilter::new(RETURN, 0, 0, 0),
    ]
};

impl Routers {
    /// On this device.
    pub fn new(device: &str, advert: Advert) -> io::Result<Self> {
        let mut scope = 0;
        let socket = made("router advertisement", device, || {
            let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
            socket.attach_filter(&FILTER)?;
            socket.bind_device(Some(device.as_bytes()))?;
            scope = rustix::net::netdevice::name_to_index(&socket, device)?;
            socket.set_multicast_hops_v6(255)?;
            socket.set_unicast_hops_v6(255)?;
            socket.set_multicast_loop_v6(false)?;
            socket.join_multicast_v6(&ALL_ROUTERS, scope)?;
            Ok(socket)
        })?;
        Ok(Self { socket: UdpSocket::from_std(socket.into())?, scope, advert })
    }

    fn send(&self, to: Ipv6Addr, last: bool) -> io::Result<()> {
        // The kernel computes the checksum of ICMPv6, and sends from the link's own address.
        let to = SocketAddrV6::new(to, 0, 0, self.scope);
        self.socket.try_send_to(&self.advert.message(last), to.into()).map(drop)
    }

    /// Waits for a solicitation. None if it was something else.
    async fn solicitation(&self) -> io::Result<Option<Ipv6Addr>> {
        let mut message = [0; 1500];
        let (len, from) = self.socket.recv_from(&mut message).await?;
        let SocketAddr::V6(from) = from else { return Ok(None) };
        let message = &message[..len];
        Ok(Some(*from.ip()).filter(|from| is_solicitation(message, *from)))
    }

    /// Advertises now and then, and to whoever asks.
    pub async fn serve(self: Arc<Self>, counters: Arc<Counters>) {
        let mut sent = 0;
        let mut next = Instant::now();
        let (mut last, mut last_single) = (None, None);
        loop {
            tokio::select! {
                () = sleep_until(next) => {
                    let Ok(()) = self.send(ALL_NODES, false) else {
                        next = Instant::now() + RETRY;
                        continue;
                    };
                    count(&counters.adverts);
                    last = Some(Instant::now());
                    next = Instant::now() + pause(sent);
                    sent = sent.saturating_add(1);
                }
                asked = self.solicitation() => match asked {
                    Err(_) => sleep(HICCUP).await,
                    Ok(None) => count(&counters.malformed),
                    // Who has an address yet is answered there at once; who has none, with all others.
                    Ok(Some(from)) if !from.is_unspecified() => {
                        let now = Instant::now();
                        if last_single.is_none_or(|last| now >= last + BETWEEN_SINGLE) && self.send(from, false).is_ok() {
                            last_single = Some(now);
                            count(&counters.adverts);
                        }
                    }
                    Ok(Some(_)) => next = next.min(last.map_or(Instant::now(), |last: Instant| last + BETWEEN)),
                }
            }
        }
    }

    /// The last words.
    pub fn leave(&self) {
        // Nobody may be there to hear.
        let _ = self.send(ALL_NODES, true);
    }
}
