//! The host's links, addresses and routes, over netlink.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use netctl::Mac;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
pub use rtnetlink::packet_route::link::InfoKind as Kind;
use rtnetlink::packet_route::link::{
    BridgeStpState, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, MacVlanMode, MacVtapMode,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourState,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope};
use rtnetlink::{Handle, LinkBridge, LinkMacVlan, LinkMacVtap, LinkUnspec, RouteMessageBuilder};
use rustix::io::Errno;

use crate::{Context, Result};

/// A link of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is, if the kernel made it.
    pub kind: Option<Kind>,
    /// What somebody has noted about it.
    pub alias: Option<String>,
    /// Its Ethernet address.
    pub mac: Option<Mac>,
    /// It is switched on.
    pub up: bool,
    /// The longest packet, in bytes.
    pub mtu: u32,
    /// The bridge that it is a port of.
    pub master: Option<u32>,
    /// The link that it sits on.
    pub parent: Option<u32>,
}

/// An address of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Of which link.
    pub index: u32,
    /// The address, and the length of its network.
    pub net: IpNet,
}

/// A route of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where to; nothing is the whole world.
    pub destination: IpNet,
    /// By which link.
    pub index: Option<u32>,
    /// By whom.
    pub gateway: Option<IpAddr>,
}

/// What changes them.
#[derive(Clone, Debug)]
pub struct Links(Handle);

/// The kernel does not know that kind of links.
fn is_unknown(error: &rtnetlink::Error) -> bool {
    let unknown = -Errno::OPNOTSUPP.raw_os_error();
    matches!(error, rtnetlink::Error::NetlinkError(message) if message.raw_code() == unknown)
}

fn no_such_kind(kind: &str) -> crate::Error {
    crate::Error::new(format!("this host's kernel makes no {kind} links: its module {kind} is missing")).help(format!(
        "modprobe {kind}, as root; where there is no such module, a kernel that has it is needed (Debian: linux-image-amd64)"
    ))
}

impl Links {
    /// Opens netlink; its runtime is the current one.
    ///
    /// # Errors
    /// The host gives no netlink.
    pub fn open() -> Result<Self> {
        let (connection, handle, _) =
            rtnetlink::new_connection().context(|| "netlink cannot be used".into())?;
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    /// The bare connection.
    pub fn handle(&self) -> &Handle {
        &self.0
    }

    /// All links.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub async fn all(&self) -> Result<Vec<Link>> {
        let links = self.0.link().get().execute().map_ok(read_link);
        links.try_collect().await.context(|| "the host's links cannot be listed".into())
    }

    /// The link of a name.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub async fn find(&self, name: &str) -> Result<Option<Link>> {
        Ok(self.all().await?.into_iter().find(|link| link.name == name))
    }

    /// Makes a bridge: without spanning trees, switched off, its ports ready at once.
    ///
    /// # Errors
    /// The name is taken, or the host makes no bridges.
    pub async fn add_bridge(&self, name: &str, mac: Option<Mac>) -> Result<Link> {
        let mut bridge = LinkBridge::new(name).down().stp_state(BridgeStpState::Disabled).forward_delay(0);
        if let Some(mac) = mac {
            bridge = bridge.address(mac.bytes().into());
        }
        self.add(name, "bridge", bridge.build()).await
    }

    /// Makes a MacVTap over a link.
    ///
    /// # Errors
    /// The name is taken, the link takes none, or the host makes none.
    pub async fn add_macvtap(&self, name: &str, parent: u32, mode: MacVtapMode, mac: Mac) -> Result<Link> {
        let message = LinkMacVtap::new(name, parent, mode).address(mac.bytes().into()).build();
        self.add(name, "macvtap", message).await
    }

    /// Makes a macvlan over a link, for what is on the link to reach each other.
    ///
    /// # Errors
    /// The name is taken, the link takes none, or the host makes none.
    pub async fn add_macvlan(&self, name: &str, parent: u32) -> Result<Link> {
        self.add(name, "macvlan", LinkMacVlan::new(name, parent, MacVlanMode::Bridge).build()).await
    }

    async fn add(&self, name: &str, kind: &str, message: LinkMessage) -> Result<Link> {
        match self.0.link().add(message).execute().await {
            Err(error) if is_unknown(&error) => Err(no_such_kind(kind)),
            made => made.context(|| format!("{name} cannot be made")),
        }?;
        self.find(name).await?.ok_or_else(|| crate::Error::new(format!("{name} was made and is gone")))
    }

    /// Whether the kernel makes links of a kind that sits on another link, its module loaded if need be. Nothing is made: one without
    /// that other link is refused, but as something that is known.
    pub async fn knows(&self, kind: Kind) -> bool {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName("lodge-trial".into()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]),
        ];
        !matches!(self.0.link().add(message).execute().await, Err(error) if is_unknown(&error))
    }

    /// Notes something about a link.
    ///
    /// # Errors
    /// There is no such link.
    pub async fn set_alias(&self, link: &Link, alias: &str) -> Result<()> {
        let message = LinkUnspec::new_with_index(link.index).alias(alias).build();
        self.set(message).await.context(|| format!("{} cannot be named", link.name))
    }

    /// Switches a link on or off.
    ///
    /// # Errors
    /// It cannot be.
    pub async fn set_up(&self, link: &Link, up: bool) -> Result<()> {
        let message = LinkUnspec::new_with_index(link.index);
        let message = if up { message.up() } else { message.down() };
        let word = if up { "on" } else { "off" };
        self.set(message.build()).await.context(|| format!("{} cannot be switched {word}", link.name))
    }

    /// Has a link take the frames of all groups, not only of those that the host itself is in.
    ///
    /// # Errors
    /// It cannot.
    pub async fn take_groups(&self, link: &Link) -> Result<()> {
        let mut message = LinkUnspec::new_with_index(link.index).build();
        message.header.flags |= LinkFlags::Allmulti;
        message.header.change_mask |= LinkFlags::Allmulti;
        self.set(message).await.context(|| format!("{} cannot take the frames of all groups", link.name))
    }

    /// Makes a link a port of a bridge, or of none.
    ///
    /// # Errors
    /// It cannot be.
    pub async fn set_master(&self, link: &Link, bridge: Option<u32>) -> Result<()> {
        let message = LinkUnspec::new_with_index(link.index).controller(bridge.unwrap_or(0)).build();
        self.set(message).await.context(|| format!("{} cannot be connected to the bridge", link.name))
    }

    /// Sets its Ethernet address.
    ///
    /// # Errors
    /// It cannot have it.
    pub async fn set_mac(&self, link: &Link, mac: Mac) -> Result<()> {
        let message = LinkUnspec::new_with_index(link.index).address(mac.bytes().into()).build();
        self.set(message).await.context(|| format!("{} cannot have the address {mac}", link.name))
    }

    /// Sets the longest packet.
    ///
    /// # Errors
    /// It cannot be so long.
    pub async fn set_mtu(&self, link: &Link, mtu: u32) -> Result<()> {
        let message = LinkUnspec::new_with_index(link.index).mtu(mtu).build();
        self.set(message).await.context(|| format!("{} cannot have packets of {mtu} bytes", link.name))
    }

    async fn set(&self, message: LinkMessage) -> Result<(), rtnetlink::Error> {
        self.0.link().set(message).execute().await
    }

    /// Removes a link.
    ///
    /// # Errors
    /// It cannot be, or is none.
    pub async fn delete(&self, link: &Link) -> Result<()> {
        let gone = self.0.link().del(link.index).execute().await;
        gone.context(|| format!("{} cannot be removed", link.name))
    }

    /// All addresses of the host's.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub async fn addresses(&self) -> Result<Vec<Address>> {
        let addresses = self.0.address().get().execute().map_ok(|message| read_address(&message));
        let addresses: Vec<_> =
            addresses.try_collect().await.context(|| "the host's addresses cannot be listed".into())?;
        Ok(addresses.into_iter().flatten().collect())
    }

    /// Gives a link an address, for which nobody else is asked. `route`: what is in its network is reached by the link.
    ///
    /// # Errors
    /// It cannot be, or has it.
    pub async fn add_address(&self, link: &Link, net: IpNet, route: bool) -> Result<()> {
        let mut request = self.0.address().add(link.index, net.addr(), net.prefix_len());
        let message = request.message_mut();
        let mut flags = AddressFlags::empty();
        flags.set(AddressFlags::Nodad, net.addr().is_ipv6());
        flags.set(AddressFlags::Noprefixroute, !route);
        message.header.flags = AddressHeaderFlags::from_bits_truncate(flags.bits() as u8);
        message.attributes.push(AddressAttribute::Flags(flags));
        request.execute().await.context(|| format!("{} cannot get the address {net}", link.name))
    }

    /// Takes an address from a link.
    ///
    /// # Errors
    /// It cannot be taken.
    pub async fn remove_address(&self, link: &Link, net: IpNet) -> Result<()> {
        let mut request = self.0.address().add(link.index, net.addr(), net.prefix_len());
        let message = request.message_mut().clone();
        let gone = self.0.address().del(message).execute().await;
        gone.context(|| format!("the address {net} cannot be taken from {}", link.name))
    }

    /// What has this address is reached by this link, and the host is `source` to it.
    ///
    /// # Errors
    /// It cannot be.
    pub async fn add_route(&self, link: &Link, address: IpAddr, source: IpAddr) -> Result<()> {
        let message = host_route(link, address, Some(source))?;
        let added = self.0.route().add(message).replace().execute().await;
        added.context(|| format!("no route to {address} by {} can be made", link.name))
    }

    /// The end of that.
    ///
    /// # Errors
    /// There is none.
    pub async fn remove_route(&self, link: &Link, address: IpAddr) -> Result<()> {
        let removed = self.0.route().del(host_route(link, address, None)?).execute().await;
        removed.context(|| format!("the route to {address} by {} cannot be removed", link.name))
    }

    /// Asks on a link who has this address; [`Self::neighbour`] knows soon.
    ///
    /// # Errors
    /// It cannot be asked.
    pub async fn ask_for(&self, index: u32, address: IpAddr) -> Result<()> {
        let request =
            self.0.neighbours().add(index, address).state(NeighbourState::None).flags(NeighbourFlags::Use);
        let asked = request.replace().execute().await;
        asked.context(|| format!("nobody can be asked for {address}"))
    }

    /// Who was seen lately to have an address on a link.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub async fn neighbour(&self, index: u32, address: IpAddr) -> Result<Option<Mac>> {
        let wanted = match address {
            IpAddr::V4(address) => NeighbourAddress::Inet(address),
            IpAddr::V6(address) => NeighbourAddress::Inet6(address),
        };
        let all: Vec<_> = self
            .0
            .neighbours()
            .get()
            .execute()
            .try_collect()
            .await
            .context(|| "neighbours cannot be listed".into())?;
        let there = [
            NeighbourState::Reachable,
            NeighbourState::Delay,
            NeighbourState::Probe,
            NeighbourState::Permanent,
        ];
        let found = all.into_iter().find(|message| {
            message.header.ifindex == index
                && there.contains(&message.header.state)
                && message.attributes.contains(&NeighbourAttribute::Destination(wanted.clone()))
        });
        let attributes = found.map(|message| message.attributes).unwrap_or_default();
        Ok(attributes.into_iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => Mac::new(bytes.try_into().ok()?),
            _ => None,
        }))
    }

    /// All routes of the host's, of all tables.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub async fn routes(&self) -> Result<Vec<Route>> {
        let mut routes = Vec::new();
        for request in
            [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()]
        {
            let found = self.0.route().get(request).execute().map_ok(|message| read_route(&message));
            let found: Vec<_> =
                found.try_collect().await.context(|| "the host's routes cannot be listed".into())?;
            routes.extend(found.into_iter().flatten());
        }
        Ok(routes)
    }
}

fn host_route(link: &Link, address: IpAddr, source: Option<IpAddr>) -> Result<RouteMessage> {
    let length = if address.is_ipv4() { 32 } else { 128 };
    let route = RouteMessageBuilder::<IpAddr>::new().output_interface(link.index);
    let mut route = route.destination_prefix(address, length).context(|| "no route".into())?;
    if let Some(source) = source {
        route = route.pref_source(source).context(|| "no route".into())?;
    }
    let scope = if address.is_ipv4() { RouteScope::Link } else { RouteScope::Universe };
    Ok(route.scope(scope).build())
}

fn read_link(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: None,
        alias: None,
        mac: None,
        up: message.header.flags.contains(LinkFlags::Up),
        mtu: 1500,
        master: None,
        parent: None,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
            LinkAttribute::Address(bytes) => {
                link.mac = <[u8; 6]>::try_from(bytes).ok().and_then(Mac::new);
            }
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Controller(index) => link.master = Some(index),
            LinkAttribute::Link(index) => link.parent = Some(index),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.into_iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    link
}

fn read_address(message: &AddressMessage) -> Option<Address> {
    // On links with two ends, Address is the other one's, and Local ours (rtnetlink(7)).
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    let net = IpNet::new(local.or(address)?, message.header.prefix_len).ok()?;
    Some(Address { index: message.header.index, net })
}

fn read_route(message: &RouteMessage) -> Option<Route> {
    let ip = |address: &RouteAddress| match address {
        RouteAddress::Inet(address) => Some(IpAddr::from(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::from(*address)),
        _ => None,
    };
    let (mut destination, mut index, mut gateway) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Oif(link) => index = Some(*link),
            _ => {}
        }
    }
    let anywhere: IpAddr = match message.header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let length = message.header.destination_prefix_length;
    let destination = IpNet::new(destination.unwrap_or(anywhere), length).ok()?;
    Some(Route { destination, index, gateway })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn kinds_that_the_kernel_does_not_know_are_told() {
        let rights = caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_NET_ADMIN);
        if !matches!(rights, Ok(true)) {
            println!("skipped: no CAP_NET_ADMIN");
            return;
        }
        let links = Links::open().unwrap();
        let nonesuch = || Kind::Other("lodge-nonesuch".into());
        assert!(!links.knows(nonesuch()).await);
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::LinkInfo(vec![LinkInfo::Kind(nonesuch())])];
        let error = links.add("lodge-trial", "nonesuch", message).await.unwrap_err();
        assert!(error.why.contains("module nonesuch is missing") && error.help.is_some(), "{error:?}");
        if std::path::Path::new("/sys/class/macvtap").exists() {
            assert!(links.knows(Kind::MacVtap).await);
        }
        assert_eq!(links.find("lodge-trial").await, Ok(None));
    }
}
