//! Which addresses and names a new network gets.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netctl::{Mac, Network};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::links::Link;
use crate::{Context, Error, Result};

/// The first network that is tried for one of which nothing is said: 192.168.122.0/24.
const FIRST: u8 = 122;
/// The network that is made on first use.
pub const DEFAULT: &str = "default";

/// What is taken already.
#[derive(Clone, Debug, Default)]
pub struct Taken {
    /// Networks, and who has them.
    pub nets: Vec<(IpNet, String)>,
    /// Names of links.
    pub devices: Vec<String>,
}

impl Taken {
    fn by(&self, net: IpNet) -> Option<&(IpNet, String)> {
        self.nets.iter().find(|(other, _)| other.contains(&net) || net.contains(other))
    }

    /// An error if somebody else has it.
    ///
    /// # Errors
    /// See there.
    pub fn check(&self, net: IpNet) -> Result<()> {
        self.by(net.trunc()).map_or(Ok(()), |(other, who)| {
            let why = format!("{} is in use already: {other} by {who}", net.trunc());
            Err(Error::new(why).help("choose another range with --ipv4 or --ipv6"))
        })
    }
}

/// A network with nothing left open, and what the user should know of what was chosen.
///
/// # Errors
/// What is declared cannot be, or nothing is free.
pub fn complete(mut network: Network, taken: &Taken) -> Result<(Network, Vec<String>)> {
    check_name(&network.name)?;
    let mut notes = Vec::new();
    let ipv4 = match network.ipv4 {
        Some(net) => {
            let net = host_of(net)?;
            taken.check(net.into())?;
            net
        }
        None => free(&network.name, taken, &mut notes)?,
    };
    let ipv6 = match network.ipv6 {
        Some(net) => {
            let net = host6_of(net)?;
            taken.check(net.into())?;
            net
        }
        None => unique_local()?,
    };
    let device = match network.device.take() {
        Some(device) => {
            check_device(&device)?;
            if taken.devices.contains(&device) {
                return Err(Error::new(format!("a link is called {device} already"))
                    .help("choose another name with --device"));
            }
            device
        }
        // The first is the default network's, whenever that is made.
        None => (u32::from(network.name != DEFAULT)..)
            .map(|number| format!("virbr{number}"))
            .find(|name| !taken.devices.contains(name))
            .unwrap_or_default(),
    };
    check_hosts(&network, ipv4)?;
    (network.ipv4, network.ipv6, network.device) = (Some(ipv4), Some(ipv6), Some(device));
    Ok((network, notes))
}

/// The name of a network, which is also one of files.
///
/// # Errors
/// It is none.
pub fn check_name(name: &str) -> Result<()> {
    Network::is_name(name).then_some(()).ok_or_else(|| {
        Error::new(format!("{name:?} is no name of a network"))
            .help("take 1 to 32 of the letters a to z, digits and \"-\", a letter first")
    })
}

/// The name of a link, in words that everybody understands, `nft` and files among them.
///
/// # Errors
/// It is none.
pub fn check_device(name: &str) -> Result<()> {
    let good = (1..=15).contains(&name.len())
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        && !["all", "default", "lo"].contains(&name);
    good.then_some(()).ok_or_else(|| {
        Error::new(format!("{name:?} is no name of a link"))
            .help("take 1 to 15 letters, digits, \"-\", \"_\" and \".\"")
    })
}

fn check_hosts(network: &Network, ipv4: Ipv4Net) -> Result<()> {
    for (number, host) in network.hosts.iter().enumerate() {
        let refuse = |why: &str| {
            Err(Error::new(format!("{} cannot be the address of {}: {why}", host.address, host.mac)))
        };
        if !ipv4.contains(&host.address) || host.address == ipv4.network() || host.address == ipv4.broadcast()
        {
            return refuse(&format!("it is none of {}'s", ipv4.trunc()));
        }
        if host.address == ipv4.addr() {
            return refuse("it is the host's");
        }
        if network.hosts[..number].iter().any(|other| other.mac == host.mac || other.address == host.address)
        {
            return refuse("one of them is declared twice");
        }
        if host.name.as_ref().is_some_and(|name| check_vm(name).is_err()) {
            return refuse("its name is none of a host");
        }
    }
    Ok(())
}

/// The name of a VM, by which others find it.
///
/// # Errors
/// It is none.
pub fn check_vm(name: &str) -> Result<()> {
    let good = (1..=63).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    good.then_some(()).ok_or_else(|| Error::new(format!("{name:?} is no name of a VM")))
}

/// Only root has the host find public addresses on a network of its own: others could be whom the host, and all guests, mean by them.
///
/// # Errors
/// They are public.
pub fn check_private(network: &Network) -> Result<()> {
    const PRIVATE: [&str; 5] =
        ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "198.18.0.0/15"];
    let is_private = |net: &Ipv4Net| {
        PRIVATE.iter().filter_map(|range| range.parse::<Ipv4Net>().ok()).any(|range| range.contains(net))
    };
    let public4 = network.ipv4.filter(|net| !is_private(net)).map(IpNet::from);
    let public6 = network.ipv6.filter(|net| !net.addr().is_unique_local()).map(IpNet::from);
    match public4.or(public6) {
        Some(net) => {
            Err(Error::new(format!("{net} is not a private range, and only root gives such to a network"))
                .help("take one such as 192.168.200.0/24 or fd12:3456:789a::/64, or ask as root"))
        }
        None => Ok(()),
    }
}

fn host_of(net: Ipv4Net) -> Result<Ipv4Net> {
    let refuse = |why| {
        Error::new(format!("{net} cannot be a network's: {why}")).help("give one such as 192.168.200.0/24")
    };
    if !(8..=29).contains(&net.prefix_len()) {
        return Err(refuse("its length must be 8 to 29"));
    }
    let address =
        if net.addr() == net.network() { Ipv4Addr::from_bits(net.addr().to_bits() + 1) } else { net.addr() };
    if address == net.broadcast() {
        return Err(refuse("the host cannot have the address of all"));
    }
    if address.is_loopback()
        || address.is_multicast()
        || address.is_link_local()
        || address.octets()[0] == 0
        || address.octets()[0] >= 240
    {
        return Err(refuse("such addresses are for something else"));
    }
    Ipv4Net::new(address, net.prefix_len()).context(|| "no network".into())
}

fn host6_of(net: Ipv6Net) -> Result<Ipv6Net> {
    let refuse = |why| {
        Error::new(format!("{net} cannot be a network's: {why}")).help("give one such as fd12:3456:789a::/64")
    };
    if net.prefix_len() != 64 {
        return Err(refuse("its length must be 64"));
    }
    let address =
        if net.addr() == net.network() { Ipv6Addr::from_bits(net.addr().to_bits() | 1) } else { net.addr() };
    if address.is_loopback()
        || address.is_multicast()
        || address.is_unicast_link_local()
        || address.segments()[0] == 0
    {
        return Err(refuse("such addresses are for something else"));
    }
    Ipv6Net::new(address, 64).context(|| "no network".into())
}

fn free(name: &str, taken: &Taken, notes: &mut Vec<String>) -> Result<Ipv4Net> {
    // The first is the default network's, whenever that is made; of others nobody expects one.
    let nets = (FIRST + u8::from(name != DEFAULT)..=254)
        .filter_map(|number| Ipv4Net::new(Ipv4Addr::new(192, 168, number, 1), 24).ok());
    let mut why: Option<&(IpNet, String)> = None;
    for net in nets {
        match taken.by(net.trunc().into()) {
            None => {
                if let Some((other, who)) = why.filter(|_| name == DEFAULT) {
                    notes.push(format!(
                        "192.168.{FIRST}.0/24 is in use already ({other} by {who}); the network is {}",
                        net.trunc()
                    ));
                }
                return Ok(net);
            }
            Some(other) => why = why.or(Some(other)),
        }
    }
    Err(Error::new("none of the ranges 192.168.122.0/24 to 192.168.254.0/24 is free")
        .help("choose one with --ipv4"))
}

/// A network that nobody else has, most probably (RFC 4193, 3.2).
fn unique_local() -> Result<Ipv6Net> {
    let mut bytes = [0; 5];
    getrandom(&mut bytes, GetRandomFlags::empty()).context(|| "no random numbers".into())?;
    let [a, b, c, d, e] = bytes.map(u16::from);
    let address = Ipv6Addr::new(0xfd00 | a, b << 8 | c, d << 8 | e, 0, 0, 0, 0, 1);
    Ipv6Net::new(address, 64).context(|| "no network".into())
}

/// The bridge's own address: the same each time, so that guests know the host again.
pub fn bridge_mac(ipv4: Ipv4Net) -> Mac {
    let [a, b, c, d] = ipv4.addr().octets();
    Mac::new([0x52, 0x4d, a, b, c, d]).expect("the first byte is even")
}

/// The address that a link gives itself from its Ethernet address (RFC 4291, appendix A).
pub fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.bytes().map(u16::from);
    Ipv6Addr::new(0xfe80, 0, 0, 0, (a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f)
}

/// What a link that is there says about itself: it is this network's.
pub fn alias(network: &str) -> String {
    format!("lodge network {network}")
}

/// Whether a link is a network's bridge. One that the helper could not name any more is known by its address.
pub fn is_bridge_of(link: &Link, network: &str, mac: Mac) -> bool {
    link.kind == Some(crate::links::Kind::Bridge)
        && link.alias.as_ref().map_or(link.mac == Some(mac), |found| *found == alias(network))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn public_ranges_are_root_s() {
        let network = |ipv4: &str, ipv6: &str| Network {
            ipv4: Some(ipv4.parse().unwrap()),
            ipv6: Some(ipv6.parse().unwrap()),
            ..Network::new("lab")
        };
        assert!(check_private(&Network::new("lab")).is_ok());
        assert!(check_private(&network("10.7.0.0/16", "fd00::/64")).is_ok());
        assert!(check_private(&network("8.8.8.0/29", "fd00::/64")).is_err());
        assert!(check_private(&network("10.0.0.0/7", "fd00::/64")).is_err());
        assert!(check_private(&network("10.7.0.0/16", "2001:db8::/64")).is_err());
    }

    #[test]
    fn the_next_free_range_is_taken_and_told_of() {
        let mut taken = Taken::default();
        let (first, notes) = complete(Network::new("default"), &taken).unwrap();
        assert_eq!((first.ipv4, first.device.as_deref()), ("192.168.122.1/24".parse().ok(), Some("virbr0")));
        assert!(notes.is_empty());
        let v6 = first.ipv6.unwrap();
        assert!(v6.addr().is_unique_local() && v6.addr().segments()[3..] == [0, 0, 0, 0, 1]);
        taken.nets.push((net("192.168.122.128/25"), "eth0".into()));
        taken.nets.push((net("192.168.123.0/24"), "the network lab".into()));
        taken.devices.push("virbr0".into());
        let (second, notes) = complete(Network::new("default"), &taken).unwrap();
        assert_eq!(
            (second.ipv4, second.device.as_deref()),
            ("192.168.124.1/24".parse().ok(), Some("virbr1"))
        );
        assert!(notes[0].contains("eth0") && notes[0].contains("192.168.124.0/24"), "{notes:?}");
        taken.nets.push((net("192.168.0.0/16"), "tun0".into()));
        assert!(complete(Network::new("default"), &taken).is_err());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let taken = Taken { nets: vec![(net("10.0.0.0/8"), "eth0".into())], devices: vec!["br0".into()] };
        let bad = |change: fn(&mut Network)| {
            let mut network = Network::new("lab");
            change(&mut network);
            complete(network, &taken).unwrap_err().why
        };
        assert!(bad(|network| network.name = "../x".into()).contains("no name"));
        assert!(bad(|network| network.ipv4 = "10.1.0.0/24".parse().ok()).contains("eth0"));
        assert!(bad(|network| network.ipv4 = "192.168.1.0/30".parse().ok()).contains("8 to 29"));
        assert!(bad(|network| network.ipv4 = "192.168.1.255/24".parse().ok()).contains("address of all"));
        assert!(bad(|network| network.ipv6 = "fd00::/63".parse().ok()).contains("64"));
        assert!(bad(|network| network.device = Some("br0".into())).contains("br0"));
        assert!(bad(|network| network.device = Some("a b".into())).contains("no name"));
        let host = |address: &str| {
            let mut network = Network::new("lab");
            network.ipv4 = "192.168.9.0/24".parse().ok();
            let mac = "52:4c:00:00:00:01".parse().unwrap();
            network.hosts.push(netctl::Host { mac, address: address.parse().unwrap(), name: None });
            complete(network, &taken)
        };
        assert!(
            host("192.168.9.1").is_err() && host("192.168.8.2").is_err() && host("192.168.9.255").is_err()
        );
        assert!(host("192.168.9.2").is_ok());
    }
}
