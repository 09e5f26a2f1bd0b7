//! A network without a thread and without a world, for the fuzzer: all that its guest reaches are sockets of the fuzzer's own, whatever
//! it asks for. There is none of this in the product.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use devices::net::{Guest, Header};
use rustix::net::sockopt::set_socket_linger;

use super::host::Host;
use super::stack::{Counts, Stack};
use super::{Options, tcp, udp};

/// What stands for the world.
struct World {
    tcp: TcpListener,
    udp: UdpSocket,
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let tcp = TcpListener::bind("127.0.0.1:0").expect("there is a loopback");
        let udp = UdpSocket::bind("127.0.0.1:0").expect("there is a loopback");
        tcp.set_nonblocking(true).and_then(|()| udp.set_nonblocking(true)).expect("they can");
        World { tcp, udp }
    })
}

/// Where a connection to `to` goes instead. At odd ports nobody listens.
pub(super) fn tcp_instead_of(to: SocketAddr) -> SocketAddr {
    let mut at = world().tcp.local_addr().expect("it is bound");
    if to.port() % 2 == 1 {
        at.set_port(1);
    }
    at
}

/// Where a datagram goes instead.
pub(super) fn udp_instead_of(_: SocketAddr) -> SocketAddr {
    world().udp.local_addr().expect("it is bound")
}

/// A network, its one guest's frames going to nobody's card or to that of the fuzzer.
#[derive(Debug)]
pub struct Bed {
    // Closed first, and by a reset: the host remembers nothing of them.
    peers: Vec<Peer>,
    network: Network,
}

#[derive(Debug)]
struct Peer(TcpStream);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = set_socket_linger(&self.0, Some(Duration::ZERO));
    }
}

struct Network {
    stack: Stack,
    host: Host,
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Network")
    }
}

impl Bed {
    /// For a guest with this card.
    pub fn new(options: &Options, guest: Guest) -> Self {
        let mut stack = Stack::new(options);
        stack.connect(guest);
        let host = Host::new().expect("there are descriptors");
        Self { peers: Vec::new(), network: Network { stack, host } }
    }

    /// A frame of the guest's.
    pub fn frame(&mut self, header: &Header, frame: &[u8]) {
        self.network.stack.frame(header, frame, &self.network.host);
    }

    /// The guest has room again.
    pub fn room(&mut self) {
        self.network.stack.room();
    }

    /// What the network's thread does when it wakes.
    pub fn turn(&mut self) {
        let mut ready = Vec::new();
        let Network { stack, host } = &mut self.network;
        stack.sleep();
        host.wait(Some(Instant::now()), &mut ready).expect("it can wait");
        ready.iter().for_each(|ready| stack.is_ready(*ready, host));
        stack.expire(Instant::now());
        while let Ok((stream, _)) = world().tcp.accept() {
            let _ = stream.set_nonblocking(true);
            self.peers.push(Peer(stream));
        }
    }

    /// What somebody in the world does: says so much, hears, answers all datagrams, ends its direction, ends all, or by a reset.
    pub fn act(&mut self, who: u8, what: u8, len: u16) {
        let mut bytes = vec![what; len.into()];
        if what % 8 == 7 {
            while let Ok((_, from)) = world().udp.recv_from(&mut bytes) {
                let _ = world().udp.send_to(&bytes, from);
            }
            return;
        }
        let Some(index) = usize::from(who).checked_rem(self.peers.len()) else { return };
        let mut stream = &self.peers[index].0;
        match what % 8 {
            0..3 => drop(stream.write(&bytes)),
            3 | 4 => drop(stream.read(&mut bytes)),
            5 => drop(stream.shutdown(std::net::Shutdown::Write)),
            _ => drop(self.peers.swap_remove(index)),
        }
    }

    /// What the network has counted.
    pub fn counts(&self) -> Counts {
        self.network.stack.counts()
    }

    /// What must be so at any time.
    pub fn check(&self) {
        let counts = self.counts();
        assert!(counts.malformed + counts.forged + counts.unreachable <= counts.frames, "{counts:?}");
        assert!(counts.connections <= tcp::MOST && counts.datagrams <= udp::MOST, "{counts:?}");
    }
}
