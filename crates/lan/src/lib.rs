//! The servers of a virtual network: DHCP, DNS and IPv6 router advertisements for the guests on one bridge, and for nobody else.
//!
//! What to answer is decided by functions from bytes to bytes ([`dhcp`], [`names`], [`adverts`]); the sockets around them are bound to the
//! bridge, so that neither another network's nor the host's own servers meet ours. Only cards that somebody reserved an address for
//! ([`Leases::reserve`]) get one: a guest that makes cards up gets nothing.
#![forbid(unsafe_code)]

pub mod adverts;
pub mod dhcp;
mod leases;
pub mod names;
mod sockets;
mod turns;
mod upstream;

#[cfg(test)]
#[path = "../../../tests/src/namespaces.rs"]
mod namespaces;
#[cfg(test)]
mod tests;

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hickory_proto::rr::Name;
use ipnet::{Ipv4Net, Ipv6Net};
use tokio::task::AbortHandle;

use adverts::Advert;
use names::Zone;
use sockets::Routers;
use upstream::Upstream;

pub use leases::{Error, Leases};

/// Whom to serve, and what they are told.
#[derive(Clone, Debug)]
pub struct Options {
    /// The bridge.
    pub device: String,
    /// The host's address on it, and the network's length.
    pub ipv4: Ipv4Net,
    /// The same for IPv6, of 64 bits.
    pub ipv6: Option<Ipv6Net>,
    /// The host is the way out. If not, guests learn of no router, and only names of the network.
    pub router: bool,
    /// The domain in which guests find each other. May be empty.
    pub domain: String,
    /// Where the host's name servers are named: `/etc/resolv.conf`.
    pub resolv_conf: PathBuf,
}

/// What was done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// DHCP messages that were answered.
    pub dhcp_answered: u64,
    /// DHCP messages from cards that are not connected.
    pub dhcp_unknown: u64,
    /// Addresses that a guest found in use by another.
    pub dhcp_declined: u64,
    /// Names that were answered by us.
    pub names_answered: u64,
    /// Names that the host's name servers were asked for.
    pub names_forwarded: u64,
    /// Questions from elsewhere than the network, and of guests that ask too much at once.
    pub names_refused: u64,
    /// Router advertisements.
    pub adverts: u64,
    /// Messages that make no sense.
    pub malformed: u64,
}

macro_rules! counters {
    ($($name:ident),*) => {
        #[derive(Debug, Default)]
        struct Counters { $($name: AtomicU64),* }

        impl Counters {
            fn get(&self) -> Counts {
                Counts { $($name: self.$name.load(Ordering::Relaxed)),* }
            }
        }
    };
}

counters!(
    dhcp_answered,
    dhcp_unknown,
    dhcp_declined,
    names_answered,
    names_forwarded,
    names_refused,
    adverts,
    malformed
);

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// The servers of a network, which end with it.
#[derive(Debug)]
pub struct Lan {
    tasks: Vec<AbortHandle>,
    counters: Arc<Counters>,
    routers: Option<Arc<Routers>>,
}

impl Lan {
    /// Starts them, within a runtime of tokio's with time and I/O. The device and its addresses are there already.
    ///
    /// # Errors
    /// There is no such device, another server has a port there, or the rights are missing (`CAP_NET_RAW`, `CAP_NET_BIND_SERVICE`).
    pub fn start(options: Options, leases: Arc<Leases>) -> io::Result<Self> {
        let Options { device, ipv4, ipv6, router, domain, resolv_conf } = options;
        let domain = parse_domain(&domain)?;
        let counters = Arc::new(Counters::default());
        let zone = Arc::new(Zone { ipv4, ipv6, domain: domain.clone(), router });
        let own: Vec<IpAddr> =
            [Some(ipv4.addr().into()), ipv6.map(|net| net.addr().into())].into_iter().flatten().collect();
        let upstream = Arc::new(Upstream::new(resolv_conf, own.clone()));
        let names = sockets::Names { zone, upstream, leases: leases.clone(), counters: counters.clone() };
        let names = Arc::new(names);
        // All sockets before any task: all or nothing.
        let dhcp = sockets::dhcp(&device)?;
        let mut at = Vec::new();
        for address in own {
            at.push((sockets::names_udp(&device, address)?, sockets::names_tcp(&device, address)?));
        }
        let advert = ipv6.map(|ipv6| Advert { ipv6, router, domain: domain.clone() });
        let routers = advert.map(|advert| Routers::new(&device, advert).map(Arc::new)).transpose()?;

        let mut tasks = Vec::new();
        let mut spawn = |task: tokio::task::JoinHandle<()>| tasks.push(task.abort_handle());
        let server = dhcp::Server { pool: ipv4, router, domain };
        spawn(tokio::spawn(sockets::serve_dhcp(dhcp, server, leases, counters.clone())));
        let turns = Arc::default();
        for (udp, tcp) in at {
            spawn(tokio::spawn(sockets::serve_udp(udp, names.clone(), Arc::clone(&turns))));
            spawn(tokio::spawn(sockets::serve_tcp(tcp, names.clone(), Arc::clone(&turns))));
        }
        if let Some(routers) = &routers {
            spawn(tokio::spawn(routers.clone().serve(counters.clone())));
        }
        Ok(Self { tasks, counters, routers })
    }

    /// What they did so far.
    pub fn counts(&self) -> Counts {
        self.counters.get()
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
        if let Some(routers) = &self.routers {
            routers.leave();
        }
    }
}

fn parse_domain(domain: &str) -> io::Result<Name> {
    let labels = domain.split('.').filter(|label| !label.is_empty());
    let labels: Option<Vec<String>> = labels.map(names::label).collect();
    let name = labels.and_then(|labels| Name::from_labels(labels.iter().map(|label| label.as_bytes())).ok());
    name.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("\"{domain}\" is no domain")))
}
