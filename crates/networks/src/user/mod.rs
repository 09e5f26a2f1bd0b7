//! A network that needs no rights: the guest's packets end here, and sockets of this process carry their contents on.
//!
//! To the guest it is a network with a router, which gives it an address by DHCP and by router advertisements, answers for all the
//! world, and knows its names. To the world the guest's connections are this process's. What the guest sends is handled at once, on the
//! thread that brings it; what the world sends, on a thread of the network's own.

mod dhcp;
mod flow;
mod fragments;
#[cfg(fuzzing)]
pub mod fuzzing;
mod host;
mod icmp;
mod neighbours;
mod outlet;
mod plan;
mod resolvers;
mod stack;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Instant;

use devices::net::{Guest, Header, Link, Mac};
use netctl::Rule;
use thiserror::Error;

use host::Host;
pub use stack::Counts;
use stack::Stack;

/// The network if nothing is said: its first three bytes count.
pub const NETWORK: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 0);

/// A network that the host knows no route to: the host may be somebody's guest itself. `skip` such are passed over.
pub fn free_network(skip: usize) -> Ipv4Addr {
    let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    let taken: Vec<(u32, u32)> = routes.lines().skip(1).filter_map(route).collect();
    let mut all = (2..=u8::MAX).map(|n| Ipv4Addr::new(10, 0, n, 0)).filter(|network| {
        // Either may be part of the other. The default route is no network.
        !taken.iter().any(|(to, mask)| *mask != 0 && (network.to_bits() ^ to) & mask & 0xffff_ff00 == 0)
    });
    all.nth(skip).unwrap_or(NETWORK)
}

/// A line of `/proc/net/route`: destination and mask.
fn route(line: &str) -> Option<(u32, u32)> {
    let field = |n| u32::from_str_radix(line.split_ascii_whitespace().nth(n)?, 16).ok();
    // As they are in memory.
    Some((u32::from_be(field(1)?), u32::from_be(field(7)?)))
}

/// What a network is to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// The address of the guest's card.
    pub mac: Mac,
    /// Its network, of 24 bits.
    pub network: Ipv4Addr,
    /// The gateway's address leads to the host's own loopback.
    pub loopback: bool,
    /// Ports of the host that lead to the guest.
    pub forwards: Vec<Forward>,
    /// What the guest may reach, and be reached by at forwarded ports.
    pub rules: Vec<Rule>,
    /// The file that names the host's name servers.
    pub resolv_conf: PathBuf,
}

impl Options {
    /// For a card with this address.
    pub fn new(mac: Mac) -> Self {
        let resolv_conf = "/etc/resolv.conf".into();
        let (forwards, rules) = (Vec::new(), Vec::new());
        Self { mac, network: NETWORK, loopback: false, forwards, rules, resolv_conf }
    }
}

/// What a forwarded port carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// A port of the host's that leads to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Forward {
    /// What it carries.
    pub protocol: Protocol,
    /// Where the host listens.
    pub listen: SocketAddr,
    /// The guest's port.
    pub port: u16,
}

/// Why there is no network.
#[derive(Debug, Error)]
pub enum Error {
    /// A forwarded port is taken, or not for us.
    #[error("cannot listen at {}: {source}", .forward.listen)]
    Listen {
        /// Which.
        forward: Forward,
        /// Why.
        source: io::Error,
    },
    /// The host gives no descriptors or threads.
    #[error("cannot make a user-mode network: {0}")]
    Host(#[from] io::Error),
}

/// A network for one card. It ends with its value.
pub struct User {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    stack: Mutex<Stack>,
    host: Host,
    over: AtomicBool,
}

impl Shared {
    fn stack(&self) -> MutexGuard<'_, Stack> {
        self.stack.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Does what the world sends, and what time demands.
    fn run(&self) {
        let mut ready = Vec::new();
        while !self.over.load(Ordering::Relaxed) {
            let until = self.stack().sleep();
            if self.host.wait(until, &mut ready).is_err() {
                return;
            }
            let mut stack = self.stack();
            ready.iter().for_each(|ready| stack.is_ready(*ready, &self.host));
            stack.expire(Instant::now());
        }
    }

    /// Has the thread look at the time again if something is due before it would wake.
    fn settle(&self, mut stack: MutexGuard<'_, Stack>) {
        if stack.is_earlier() {
            drop(stack);
            self.host.wake();
        }
    }
}

impl User {
    /// Listens at forwarded ports, and begins.
    ///
    /// # Errors
    /// [`Error`].
    pub fn new(options: &Options) -> Result<Self, Error> {
        let host = Host::new()?;
        let mut stack = Stack::new(options);
        for &forward in &options.forwards {
            let at = forward.listen;
            let done = match forward.protocol {
                Protocol::Tcp => {
                    TcpListener::bind(at).and_then(|l| stack.forward_tcp(l, forward.port, &host))
                }
                Protocol::Udp => UdpSocket::bind(at).and_then(|s| stack.forward_udp(s, forward.port, &host)),
            };
            done.map_err(|source| Error::Listen { forward, source })?;
        }
        let shared = Arc::new(Shared { stack: Mutex::new(stack), host, over: AtomicBool::new(false) });
        let its = shared.clone();
        let thread = std::thread::Builder::new().name("network".into()).spawn(move || its.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// What has been carried, and what has been dropped.
    pub fn counts(&self) -> Counts {
        self.shared.stack().counts()
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        self.shared.host.wake();
        if let Some(thread) = self.thread.take()
            // The last device may end there.
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("User").field("host", &self.shared.host).finish_non_exhaustive()
    }
}

impl Link for User {
    fn offloads(&self) -> bool {
        true
    }

    fn connect(&self, guest: Guest) {
        self.shared.stack().connect(guest);
    }

    fn send(&self, header: &Header, frame: &[u8]) {
        let mut stack = self.shared.stack();
        stack.frame(header, frame, &self.shared.host);
        self.shared.settle(stack);
    }

    fn room(&self) {
        let mut stack = self.shared.stack();
        stack.room();
        self.shared.settle(stack);
    }
}

/// A number that a guest cannot guess.
fn random() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(())
}
