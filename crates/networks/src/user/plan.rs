//! Who is who in the guest's network, and where that is on the host.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use devices::net::Mac;

/// The address of everything but the guest.
pub const GATEWAY_MAC: Mac = [0x52, 0x55, 0x0a, 0, 0x02, 0x02];
/// Bits of the network, in IPv4 and IPv6.
pub const PREFIX: u8 = 24;
pub const PREFIX6: u8 = 64;
/// The gateway's address on the link.
pub const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
/// A unique local prefix (RFC 4193). It is never seen outside, so all can have the same.
const NETWORK6: Ipv6Addr = Ipv6Addr::new(0xfd6c, 0x6f64, 0x6765, 0, 0, 0, 0, 0);

/// The addresses of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// 24 bits of it are the network.
    network: Ipv4Addr,
}

/// Where a packet of the guest's goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    /// To this address, as the host sees it.
    Host(SocketAddr),
    /// To the name servers that the host uses.
    Names,
    /// There is nothing behind it.
    Refused,
    /// It is not for us, or must not be.
    Nowhere,
}

impl Plan {
    /// The network with these first three bytes.
    pub fn new(network: Ipv4Addr) -> Self {
        Self { network }
    }

    fn at(&self, last: u8) -> Ipv4Addr {
        let [a, b, c, _] = self.network.octets();
        Ipv4Addr::new(a, b, c, last)
    }

    fn at6(last: u16) -> Ipv6Addr {
        let mut words = NETWORK6.segments();
        words[7] = last;
        words.into()
    }

    /// The IPv6 network itself.
    pub fn network6(&self) -> Ipv6Addr {
        Self::at6(0)
    }

    /// The router, behind which is the host.
    pub fn gateway(&self) -> Ipv4Addr {
        self.at(2)
    }

    /// The name server.
    pub fn names(&self) -> Ipv4Addr {
        self.at(3)
    }

    /// What the guest gets by DHCP.
    pub fn guest(&self) -> Ipv4Addr {
        self.at(15)
    }

    pub fn gateway6(&self) -> Ipv6Addr {
        Self::at6(2)
    }

    pub fn names6(&self) -> Ipv6Addr {
        Self::at6(3)
    }

    /// The gateway, in the family of `like`.
    pub fn gateway_like(&self, like: IpAddr) -> IpAddr {
        match like {
            IpAddr::V4(_) => self.gateway().into(),
            IpAddr::V6(_) => self.gateway6().into(),
        }
    }

    /// Whether an address is one of ours, for which somebody has to answer.
    pub fn is_ours(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => a == self.gateway() || a == self.names(),
            IpAddr::V6(a) => a == self.gateway6() || a == self.names6() || a == LINK_LOCAL,
        }
    }

    /// Whether it belongs to the guest's network.
    fn is_inside(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => a.octets()[..3] == self.network.octets()[..3],
            IpAddr::V6(a) => a.segments()[..4] == NETWORK6.segments()[..4],
        }
    }

    /// Whether the guest may send from this address.
    pub fn may_send(&self, from: IpAddr) -> bool {
        let own = match from {
            IpAddr::V4(a) => !matches!(a.octets()[3], 0 | 255),
            IpAddr::V6(a) => a.segments()[4..] != [0; 4],
        };
        let local = matches!(from, IpAddr::V6(a) if a.is_unicast_link_local());
        own && (self.is_inside(from) || local) && !self.is_ours(from)
    }

    /// Where this is. `loopback`: the gateway stands for the host's own loopback.
    pub fn find(&self, to: SocketAddr, loopback: bool) -> Where {
        if self.is_ours(to.ip()) {
            let names = [IpAddr::from(self.names()), self.names6().into()];
            return match to.port() {
                53 if names.contains(&to.ip()) => Where::Names,
                port if loopback && !names.contains(&to.ip()) => {
                    let own =
                        if to.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
                    Where::Host(SocketAddr::new(own, port))
                }
                _ => Where::Refused,
            };
        }
        let reachable = match to.ip() {
            IpAddr::V4(a) => is_reachable(a),
            // An IPv4 address in another form is not a way around the rules.
            IpAddr::V6(a) => {
                let local =
                    a.is_loopback() || a.is_unspecified() || a.is_multicast() || a.is_unicast_link_local();
                !local && a.to_ipv4().is_none()
            }
        };
        if reachable && !self.is_inside(to.ip()) { Where::Host(to) } else { Where::Nowhere }
    }
}

/// Whether routers forward packets to this address. To link-local ones they must not (RFC 3927, 2.7): at 169.254.169.254 the host of
/// a cloud gets its credentials.
fn is_reachable(to: Ipv4Addr) -> bool {
    let [first, ..] = to.octets();
    !(first == 0 || first >= 224 || to.is_loopback() || to.is_link_local())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: Plan = Plan { network: Ipv4Addr::new(10, 0, 2, 0) };

    fn find(to: &str, loopback: bool) -> Where {
        PLAN.find(to.parse().unwrap(), loopback)
    }

    #[test]
    fn the_host_s_own_loopback_is_reached_only_on_request() {
        assert_eq!(find("10.0.2.2:80", false), Where::Refused);
        assert_eq!(find("10.0.2.2:80", true), Where::Host("127.0.0.1:80".parse().unwrap()));
        assert_eq!(find("[fd6c:6f64:6765::2]:80", true), Where::Host("[::1]:80".parse().unwrap()));
        for to in
            ["127.0.0.1:80", "0.0.0.0:80", "[::1]:80", "[::]:80", "[::ffff:127.0.0.1]:80", "[::127.0.0.1]:80"]
        {
            assert_eq!(find(to, true), Where::Nowhere, "{to}");
        }
    }

    #[test]
    fn what_routers_do_not_forward_goes_nowhere() {
        let link =
            ["169.254.169.254:80", "[fe80::1]:80", "224.0.0.1:80", "[ff02::1]:80", "255.255.255.255:80"];
        for to in link.into_iter().chain(["10.0.2.77:80", "[fd6c:6f64:6765::77]:80"]) {
            assert_eq!(find(to, true), Where::Nowhere, "{to}");
        }
        for to in ["192.0.2.1:80", "10.0.3.1:80", "[2001:db8::1]:80"] {
            assert_eq!(find(to, false), Where::Host(to.parse().unwrap()));
        }
    }

    #[test]
    fn names_are_asked_for_at_their_own_address() {
        assert_eq!(find("10.0.2.3:53", false), Where::Names);
        assert_eq!(find("[fd6c:6f64:6765::3]:53", false), Where::Names);
        assert_eq!(find("10.0.2.3:80", true), Where::Refused);
    }

    #[test]
    fn a_guest_sends_from_addresses_of_its_own() {
        let may = |from: &str| PLAN.may_send(from.parse().unwrap());
        for from in ["10.0.2.15", "10.0.2.200", "fd6c:6f64:6765::15", "fe80::5054"] {
            assert!(may(from), "{from}");
        }
        for from in ["10.0.2.2", "10.0.2.3", "10.0.2.255", "192.0.2.1", "2001:db8::1", "fe80::2", "127.0.0.1"]
        {
            assert!(!may(from), "{from}");
        }
    }
}
