//! Addresses and routes that move from one link to another, as the kernel tells of them.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_core::{
    Emitable, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload, Parseable,
};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteType};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::links::{Link, Links};
use crate::{Context, Error, Result};

/// The kernel's own flags of an address are its own business; these are the administrator's (linux/if_addr.h).
const KEPT: AddressFlags = AddressFlags::Nodad
    .union(AddressFlags::Homeaddress)
    .union(AddressFlags::Managetempaddr)
    .union(AddressFlags::Noprefixroute)
    .union(AddressFlags::Mcautojoin);
/// Addresses of a link that checks for doubles become usable within a second or two; ours do not check.
const USABLE: Duration = Duration::from_secs(3);
const STEP: Duration = Duration::from_millis(2);
/// The time unit of routes' lifetimes, in 1/s (USER_HZ).
const TICKS: u32 = 100;

/// What moves, in the order in which it was made. Each is the body of a netlink message (rtnetlink(7)), in hexadecimal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// The number of the link that had it.
    index: u32,
    addresses: Vec<String>,
    routes: Vec<String>,
}

impl Moved {
    /// There is nothing to move.
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty() && self.routes.is_empty()
    }

    /// What a link has: its addresses but for those that it gave itself, and the routes that somebody made.
    ///
    /// # Errors
    /// The kernel does not tell, or a route cannot be moved.
    pub async fn of(links: &Links, link: &Link) -> Result<Self> {
        let mut moved = Self { index: link.index, ..Self::default() };
        let addresses = links.handle().address().get().set_link_index_filter(link.index).execute();
        let addresses: Vec<_> = addresses
            .try_collect()
            .await
            .context(|| format!("{}'s addresses cannot be listed", link.name))?;
        let (ipv4, mut ipv6): (Vec<_>, Vec<_>) =
            addresses.into_iter().partition(|message| message.header.family == AddressFamily::Inet);
        // The kernel lists them the other way around.
        ipv6.reverse();
        ipv6.retain(|message| !is_own(message));
        moved.addresses = ipv4.iter().chain(&ipv6).map(hex).collect();
        for request in [
            RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
            RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ] {
            let routes = links.handle().route().get(request).execute();
            let routes: Vec<_> =
                routes.try_collect().await.context(|| "the host's routes cannot be listed".into())?;
            for route in routes.into_iter().filter(|route| goes_by(route, link.index) && is_made(route)) {
                if route.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::NhId(_))) {
                    return Err(Error::new(format!(
                        "a route over {} uses a next hop object, which cannot be moved",
                        link.name
                    ))
                    .help("ip route show; make the route without nhid first"));
                }
                moved.routes.push(hex(&route));
            }
        }
        Ok(moved)
    }

    /// The addresses in it.
    pub fn ips(&self) -> Vec<IpAddr> {
        self.addresses().iter().filter_map(ip).collect()
    }

    /// Some addresses of IPv4 are lent: a DHCP client renews them.
    pub fn is_lent(&self) -> bool {
        self.addresses().iter().any(|message| {
            let finite = |attribute: &AddressAttribute| {
                matches!(attribute, AddressAttribute::CacheInfo(info) if info.ifa_valid != u32::MAX)
            };
            message.header.family == AddressFamily::Inet && message.attributes.iter().any(finite)
        })
    }

    fn addresses(&self) -> Vec<AddressMessage> {
        self.addresses.iter().filter_map(|hex| AddressMessage::parse(&bytes(hex)?).ok()).collect()
    }

    fn routes(&self) -> Vec<RouteMessage> {
        self.routes.iter().filter_map(|hex| RouteMessage::parse(&bytes(hex)?).ok()).collect()
    }

    /// Puts all of it on `to`, and takes it from `from`. What is there already stays, so that a second try finishes the first.
    ///
    /// # Errors
    /// Something cannot be put there.
    pub async fn put(&self, links: &Links, from: Option<&Link>, to: &Link) -> Result<()> {
        if let Some(from) = from {
            // What is gone need not be removed.
            for message in self.routes() {
                let _ = links.handle().route().del(route_on(message, self.index, from.index)).execute().await;
            }
            for message in self.addresses() {
                let _ = links.handle().address().del(address_on(message, from)).execute().await;
            }
        }
        for message in self.addresses() {
            let what = ip(&message).map(|ip| ip.to_string()).unwrap_or_default();
            let message = RouteNetlinkMessage::NewAddress(address_on(message, to));
            let put = request(links, message, NLM_F_CREATE | NLM_F_REPLACE).await;
            put.context(|| format!("{} cannot get the address {what}", to.name))?;
        }
        self.usable(links, to).await?;
        // Those without a gateway first: by them gateways are reached.
        let (far, near): (Vec<_>, Vec<_>) = self.routes().into_iter().partition(|route| {
            let has = |attribute: &RouteAttribute| {
                matches!(
                    attribute,
                    RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_)
                )
            };
            route.attributes.iter().any(has)
        });
        for message in near.into_iter().chain(far) {
            let message = RouteNetlinkMessage::NewRoute(route_on(message, self.index, to.index));
            let put = request(links, message, NLM_F_CREATE | NLM_F_APPEND).await;
            put.context(|| format!("{} cannot get all routes", to.name))?;
        }
        Ok(())
    }

    /// Waits until the addresses can be used.
    async fn usable(&self, links: &Links, link: &Link) -> Result<()> {
        let end = tokio::time::Instant::now() + USABLE;
        loop {
            let now = links.handle().address().get().set_link_index_filter(link.index).execute();
            let now: Vec<_> =
                now.try_collect().await.context(|| format!("{}'s addresses cannot be listed", link.name))?;
            let waits = now.iter().any(|message| flags(message).contains(AddressFlags::Tentative));
            if !waits || tokio::time::Instant::now() > end {
                return Ok(());
            }
            tokio::time::sleep(STEP).await;
        }
    }
}

/// A link gave it itself.
fn is_own(message: &AddressMessage) -> bool {
    matches!(ip(message), Some(IpAddr::V6(address)) if address.is_unicast_link_local())
}

fn ip(message: &AddressMessage) -> Option<IpAddr> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

fn flags(message: &AddressMessage) -> AddressFlags {
    let flags = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    flags.unwrap_or(AddressFlags::from_bits_retain(message.header.flags.bits().into()))
}

/// The same address, on a link.
fn address_on(mut message: AddressMessage, link: &Link) -> AddressMessage {
    let kept = flags(&message) & KEPT;
    message.header.index = link.index;
    message.header.flags = AddressHeaderFlags::from_bits_retain(kept.bits() as u8);
    let mut attributes = std::mem::take(&mut message.attributes);
    attributes.retain(|attribute| !matches!(attribute, AddressAttribute::Flags(_)));
    for attribute in &mut attributes {
        // "eth0", or "eth0:1": an alias as it used to be.
        if let AddressAttribute::Label(label) = attribute {
            let rest = label.find(':').map(|at| label.split_off(at)).unwrap_or_default();
            // As long as a link's name can be.
            *label = format!("{}{rest}", link.name).chars().take(15).collect();
        }
    }
    attributes.push(AddressAttribute::Flags(kept));
    message.attributes = attributes;
    message
}

fn goes_by(route: &RouteMessage, index: u32) -> bool {
    route.attributes.iter().any(|attribute| match attribute {
        RouteAttribute::Oif(link) => *link == index,
        RouteAttribute::MultiPath(hops) => hops.iter().any(|hop| hop.interface_index == index),
        _ => false,
    })
}

/// The kernel did not make it by itself with an address.
fn is_made(route: &RouteMessage) -> bool {
    route.header.protocol != RouteProtocol::Kernel
        && !matches!(
            route.header.kind,
            RouteType::Local | RouteType::Broadcast | RouteType::Anycast | RouteType::Multicast
        )
        && !route.header.flags.contains(RouteFlags::Cloned)
}

/// The same route, by the link `to` where it went by the link `from`.
fn route_on(mut route: RouteMessage, from: u32, to: u32) -> RouteMessage {
    route.header.flags &= RouteFlags::Onlink;
    let mut expires = None;
    for attribute in &mut route.attributes {
        match attribute {
            RouteAttribute::Oif(link) if *link == from => *link = to,
            RouteAttribute::CacheInfo(info) => expires = Some(info.expires / TICKS).filter(|left| *left > 0),
            RouteAttribute::MultiPath(hops) => {
                for hop in hops.iter_mut().filter(|hop| hop.interface_index == from) {
                    hop.interface_index = to;
                }
            }
            _ => {}
        }
    }
    route.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
    if route.header.address_family == AddressFamily::Inet6 {
        route.attributes.extend(expires.map(RouteAttribute::Expires));
    }
    route
}

async fn request(links: &Links, message: RouteNetlinkMessage, how: u16) -> Result<(), std::io::Error> {
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | how;
    let mut answers = links.handle().clone().request(request).map_err(std::io::Error::other)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
        {
            let error = error.to_io();
            // It is there already.
            if error.raw_os_error() != Some(Errno::EXIST.raw_os_error()) {
                return Err(error);
            }
        }
    }
    Ok(())
}

fn hex(message: &impl Emitable) -> String {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(hex: &str) -> Option<Vec<u8>> {
    let pairs = hex.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}
