//! Ports of the host's that lead to a guest which the host reaches by a link of its own, for addresses that the kernel forwards nothing
//! from: loopback's, and IPv6 ones, for a guest's IPv6 address is its own business. The guest sees the host's address on its network.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::net;
use tokio::runtime;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::user::{Error, Forward, Protocol};

/// Connections, or others that datagrams come from, at once by one port.
const MOST: usize = 1024;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// How long a guest has to accept a connection.
const PATIENCE: Duration = Duration::from_secs(10);
/// Who sends no datagrams for so long, and gets none, is forgotten (RFC 4787, REQ-5).
const QUIET: Duration = Duration::from_secs(300);
/// How long to wait when the host is out of descriptors.
const AGAIN: Duration = Duration::from_millis(100);
/// Datagrams on their way to the guest, for one who sends them.
const WAITING: usize = 64;
/// The longest datagram.
const LONGEST: usize = 65535;

/// Ports that lead to a guest, until this value ends.
pub struct Forwards {
    guest: watch::Sender<Ipv4Addr>,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What is listened at.
enum Listener {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

impl Forwards {
    /// Listens at these ports, which lead to a guest of this address.
    ///
    /// # Errors
    /// A port is taken, or not for this user; or the host gives no thread.
    pub fn new(guest: Ipv4Addr, forwards: &[Forward]) -> Result<Self, Error> {
        let listen = |forward: &Forward| match Listener::new(forward) {
            Ok(listener) => Ok((listener, forward.port)),
            Err(source) => Err(Error::Listen { forward: *forward, source }),
        };
        let listeners = forwards.iter().map(listen).collect::<Result<Vec<_>, _>>()?;
        let (guest, address) = watch::channel(guest);
        let (end, ended) = oneshot::channel();
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let serve = async move {
            let mut tasks = JoinSet::new();
            for (listener, port) in listeners {
                let guest = Guest { address: address.clone(), port };
                match listener {
                    Listener::Tcp(listener) => tasks.spawn(connections(listener, guest)),
                    Listener::Udp(socket) => tasks.spawn(datagrams(socket, guest)),
                };
            }
            // An error says that nobody can tell it any more: that is the end, too.
            let _ = ended.await;
        };
        let thread =
            std::thread::Builder::new().name("forwards".into()).spawn(move || runtime.block_on(serve))?;
        Ok(Self { guest, end: Some(end), thread: Some(thread) })
    }

    /// The guest has this address now.
    pub fn lead_to(&self, guest: Ipv4Addr) {
        self.guest.send_replace(guest);
    }
}

impl Drop for Forwards {
    fn drop(&mut self) {
        self.end.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Forwards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Forwards").field("guest", &*self.guest.borrow()).finish_non_exhaustive()
    }
}

/// Where a port leads.
#[derive(Clone)]
struct Guest {
    address: watch::Receiver<Ipv4Addr>,
    port: u16,
}

impl Guest {
    fn address(&self) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(*self.address.borrow()), self.port)
    }
}

impl Listener {
    fn new(forward: &Forward) -> io::Result<Self> {
        let family = if forward.listen.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
        let kind = match forward.protocol {
            Protocol::Tcp => SocketType::STREAM,
            Protocol::Udp => SocketType::DGRAM,
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(family, kind, flags, None)?;
        if family == AddressFamily::INET6 {
            // The kernel forwards the same port of all IPv4 addresses.
            sockopt::set_ipv6_v6only(&socket, true)?;
        }
        if kind == SocketType::STREAM {
            // Connections of the last run may still be about to end.
            sockopt::set_socket_reuseaddr(&socket, true)?;
        }
        rustix::net::bind(&socket, &forward.listen)?;
        if kind == SocketType::DGRAM {
            return Ok(Self::Udp(socket.into()));
        }
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(Self::Tcp(socket.into()))
    }
}

/// Connects all who come with the guest.
async fn connections(listener: TcpListener, guest: Guest) {
    // The runtime has room for what the kernel gave.
    let Ok(listener) = net::TcpListener::from_std(listener) else { return };
    let room = Arc::new(Semaphore::new(MOST));
    let mut tasks = JoinSet::new();
    loop {
        while tasks.try_join_next().is_some() {}
        let Ok(place) = room.clone().acquire_owned().await else { return };
        let Ok((mut client, _)) = listener.accept().await else {
            sleep(AGAIN).await;
            continue;
        };
        let guest = guest.address();
        tasks.spawn(async move {
            // Who cannot be connected finds the connection closed.
            if let Ok(Ok(mut server)) = timeout(PATIENCE, net::TcpStream::connect(guest)).await {
                // Neither waits for more to send at once: whoever writes has done so already.
                let _ = client.set_nodelay(true).and(server.set_nodelay(true));
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            }
            drop(place);
        });
    }
}

/// Passes on what comes, each sender's from a socket of its own.
async fn datagrams(socket: UdpSocket, guest: Guest) {
    let Ok(socket) = net::UdpSocket::from_std(socket) else { return };
    let socket = Arc::new(socket);
    let mut senders: HashMap<SocketAddr, mpsc::Sender<Vec<u8>>> = HashMap::new();
    let mut flows = JoinSet::new();
    let mut buffer = vec![0; LONGEST];
    loop {
        let (len, sender) = tokio::select! {
            Some(ended) = flows.join_next() => {
                if let Ok(sender) = ended {
                    senders.remove(&sender);
                }
                continue;
            }
            received = socket.recv_from(&mut buffer) => match received {
                Ok(received) => received,
                // What is told of a datagram before, or no memory.
                Err(_) => {
                    sleep(AGAIN).await;
                    continue;
                }
            },
        };
        let many = senders.len() >= MOST;
        let flow = match senders.entry(sender) {
            Entry::Occupied(flow) => flow.into_mut(),
            Entry::Vacant(_) if many => continue,
            Entry::Vacant(place) => {
                let (flow, from_sender) = mpsc::channel(WAITING);
                flows.spawn(ends_with(sender, carry(socket.clone(), sender, from_sender, guest.address())));
                place.insert(flow)
            }
        };
        // What comes faster than it goes is lost, as datagrams are.
        let _ = flow.try_send(buffer[..len].to_vec());
    }
}

/// The sender, once this is done.
async fn ends_with(sender: SocketAddr, flow: impl Future<Output = io::Result<()>>) -> SocketAddr {
    let _ = flow.await;
    sender
}

/// Carries one sender's datagrams to the guest, and the guest's to the sender, until there are none for a while.
async fn carry(
    host: Arc<net::UdpSocket>,
    sender: SocketAddr,
    mut from_sender: mpsc::Receiver<Vec<u8>>,
    guest: SocketAddr,
) -> io::Result<()> {
    let socket = net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket.connect(guest).await?;
    let mut buffer = vec![0; LONGEST];
    loop {
        let step = async {
            tokio::select! {
                Some(datagram) = from_sender.recv() => socket.send(&datagram).await,
                received = socket.recv(&mut buffer) => host.send_to(&buffer[..received?], sender).await,
            }
        };
        match timeout(QUIET, step).await {
            // Nothing listens there yet, or what is too long: neither ends what others say.
            Ok(Err(error)) if error.kind() != io::ErrorKind::ConnectionRefused => return Err(error),
            Ok(_) => {}
            Err(_) => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpStream};

    use super::*;

    const GUEST: Ipv4Addr = Ipv4Addr::LOCALHOST;

    /// Where the host listens: not every host that tests run on has IPv6.
    const HOST: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);

    /// A port of the host's that leads to the same one of the guest's.
    fn forward(protocol: Protocol, port: u16) -> Forward {
        Forward { protocol, listen: SocketAddr::new(HOST.into(), port), port }
    }

    fn read_all(mut stream: &TcpStream) -> Vec<u8> {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    }

    #[test]
    fn connections_carry_both_ways_until_both_ends_are_done() {
        let server = TcpListener::bind((GUEST, 0)).unwrap();
        let forward = forward(Protocol::Tcp, server.local_addr().unwrap().port());
        let forwards = Forwards::new(GUEST, &[forward]).unwrap();
        let much: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
        let clients: Vec<_> = (0..100).map(|_| TcpStream::connect(forward.listen).unwrap()).collect();
        let servers: Vec<_> = clients.iter().map(|_| server.accept().unwrap().0).collect();
        std::thread::scope(|scope| {
            for (number, mut server) in servers.iter().enumerate() {
                let much = &much;
                scope.spawn(move || {
                    // It answers when all is said.
                    let heard = read_all(server);
                    server.write_all(if number == 0 { much } else { &heard }).unwrap();
                    server.shutdown(Shutdown::Write).unwrap();
                });
            }
            for (number, mut client) in clients.iter().enumerate() {
                client.write_all(&number.to_le_bytes()).unwrap();
                client.shutdown(Shutdown::Write).unwrap();
            }
        });
        // Which of them the guest has accepted first is for nobody to say.
        let heard: Vec<_> = clients.iter().map(read_all).collect();
        let (long, short): (Vec<_>, Vec<_>) = heard.iter().partition(|heard| heard.len() > 8);
        assert_eq!((long.len(), short.len()), (1, 99));
        assert!(*long[0] == much);

        // It ends with its value, and so do they.
        let client = TcpStream::connect(forward.listen).unwrap();
        let (server, _) = server.accept().unwrap();
        drop(forwards);
        assert_eq!((read_all(&client), read_all(&server)), (vec![], vec![]));
        assert!(TcpStream::connect(forward.listen).is_err());
    }

    #[test]
    fn who_sends_datagrams_gets_the_answers() {
        let server = UdpSocket::bind((GUEST, 0)).unwrap();
        let forward = forward(Protocol::Udp, server.local_addr().unwrap().port());
        let _forwards = Forwards::new(GUEST, &[forward]).unwrap();
        let clients: Vec<_> = (0..20).map(|_| UdpSocket::bind((HOST, 0)).unwrap()).collect();
        let mut buffer = vec![0; LONGEST];
        for length in [0, 1, 9000, 60000] {
            for (number, client) in clients.iter().enumerate() {
                client.send_to(&vec![number as u8; length], forward.listen).unwrap();
                let (got, sender) = server.recv_from(&mut buffer).unwrap();
                assert_eq!(buffer[..got], vec![number as u8; length]);
                server.send_to(&buffer[..got], sender).unwrap();
            }
            for (number, client) in clients.iter().enumerate() {
                let (got, sender) = client.recv_from(&mut buffer).unwrap();
                assert_eq!((sender, &buffer[..got]), (forward.listen, &vec![number as u8; length][..]));
            }
        }
    }

    #[test]
    fn a_guest_that_moves_is_followed() {
        let elsewhere = Ipv4Addr::new(127, 0, 0, 2);
        let server = TcpListener::bind((elsewhere, 0)).unwrap();
        let forward = forward(Protocol::Tcp, server.local_addr().unwrap().port());
        let forwards = Forwards::new(GUEST, &[forward]).unwrap();
        // Nothing listens there.
        let client = TcpStream::connect(forward.listen).unwrap();
        assert_eq!((&client).read(&mut [0]).unwrap_or(0), 0);
        forwards.lead_to(elsewhere);
        let mut client = TcpStream::connect(forward.listen).unwrap();
        client.write_all(b"here").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_all(&server.accept().unwrap().0), b"here");
    }

    #[test]
    fn a_port_that_is_taken_is_named() {
        let other = TcpListener::bind((HOST, 0)).unwrap();
        let forward = forward(Protocol::Tcp, other.local_addr().unwrap().port());
        let Err(Error::Listen { forward: refused, .. }) = Forwards::new(GUEST, &[forward]) else {
            panic!("two listen at {}", forward.listen)
        };
        assert_eq!(refused, forward);
    }
}
