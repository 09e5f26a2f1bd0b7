//! Router advertisements (RFC 4861, 8106): what is in them, and when they go out.

use std::net::Ipv6Addr;
use std::time::Duration;

use hickory_proto::rr::Name;
use ipnet::Ipv6Net;

/// All nodes on the link.
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// All routers on the link.
pub const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
/// The type of a solicitation.
pub const SOLICIT: u8 = 133;
const ADVERT: u8 = 134;
/// Seconds that guests use a router and name server that they hear nothing of: many times between two.
const LIFETIME: u16 = 1800;
/// Seconds that addresses with the prefix are good, and that new connections use them.
const VALID: u32 = 86_400;
const PREFERRED: u32 = 14_400;
/// On link, and guests make their addresses with it (RFC 4861, 4.6.2: L and A).
const ON_LINK_AUTONOMOUS: u8 = 0xc0;
/// Those at the start follow each other faster (RFC 4861, 10), so that guests which were there before know us again.
const INITIAL: u32 = 3;
const INITIAL_PAUSE: Duration = Duration::from_secs(8);
const PAUSE: Duration = Duration::from_secs(150);
const JITTER: Duration = Duration::from_secs(50);

/// What is advertised.
#[derive(Clone, Debug)]
pub struct Advert {
    /// The host's address, and the prefix.
    pub ipv6: Ipv6Net,
    /// The host is the way out.
    pub router: bool,
    /// The domain in which guests look for names.
    pub domain: Name,
}

impl Advert {
    /// The message, but for its checksum. The `last` one takes the router and its name server back.
    pub fn message(&self, last: bool) -> Vec<u8> {
        let lifetime = if last { 0 } else { LIFETIME };
        let router = if self.router { lifetime } else { 0 };
        let [high, low] = router.to_be_bytes();
        let mut message = vec![ADVERT, 0, 0, 0, 64, 0, high, low, 0, 0, 0, 0, 0, 0, 0, 0];
        message.extend([3, 4, self.ipv6.prefix_len(), ON_LINK_AUTONOMOUS]);
        message.extend([VALID, PREFERRED, 0].map(u32::to_be_bytes).as_flattened());
        message.extend(self.ipv6.network().octets());
        let lifetime = u32::from(lifetime).to_be_bytes();
        message.extend([25, 3, 0, 0]);
        message.extend(lifetime);
        message.extend(self.ipv6.addr().octets());
        if !self.domain.is_root() {
            let mut name: Vec<u8> =
                self.domain.iter().flat_map(|label| [&[label.len() as u8], label].concat()).collect();
            name.push(0);
            name.resize(name.len().next_multiple_of(8), 0);
            message.extend([31, (1 + name.len() / 8) as u8, 0, 0]);
            message.extend(lifetime);
            message.extend(name);
        }
        message
    }
}

/// Whether this is a solicitation that may be answered (RFC 4861, 6.1.1). The socket's filter has looked at the hop limit, and the
/// kernel at the checksum.
pub fn is_solicitation(message: &[u8], from: Ipv6Addr) -> bool {
    let [SOLICIT, 0, _, _, _, _, _, _, options @ ..] = message else { return false };
    let mut options = options;
    while let [kind, length, ..] = *options {
        // Who has no address yet has no address on the link to tell.
        if length == 0 || kind == 1 && from.is_unspecified() {
            return false;
        }
        let Some(rest) = options.get(usize::from(length) * 8..) else { return false };
        options = rest;
    }
    options.is_empty() && (from.is_unspecified() || from.is_unicast_link_local())
}

/// How long until the next, when so many went out.
pub fn pause(sent: u32) -> Duration {
    if sent < INITIAL {
        return INITIAL_PAUSE;
    }
    let mut random = [0; 2];
    // Without chance all go out at the same pace, which does little harm.
    let _ = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::NONBLOCK);
    PAUSE + JITTER * u32::from(u16::from_ne_bytes(random)) / 65_536
}
