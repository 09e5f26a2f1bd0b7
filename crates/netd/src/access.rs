//! The host's own access to guests that are on one of its links directly.
//!
//! What the host sends by the link goes to the wire, and never to a MacVTap on the same link. A macvlan of the host's on that link reaches
//! them. It gets the host's addresses of the link, hears only these guests (a table of `nft`'s), and each guest's address becomes a route
//! by it. So nothing changes for whatever else the host talks to. Which addresses guests have is learned from their first words, ARP
//! (RFC 826) and neighbour discovery (RFC 4861), which they send to all.

use std::collections::HashSet;
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Weak;
use std::time::Duration;

use ipnet::IpNet;
use netctl::{Mac, Target};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, eth, recv, socket_with};
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;
use tokio::task::AbortHandle;

use crate::helper::Helper;
use crate::links::{Kind, Link, Route};
use crate::process::readable;
use crate::store::Card;
use crate::{Context, Error, Result, filter, settings};

/// Addresses of one card that are learned.
const MOST_ADDRESSES: usize = 16;
/// Pause between two addresses that are learned: a guest that makes many up keeps nobody busy.
const PAUSE: Duration = Duration::from_millis(50);
/// Who has an address on the wire says so within this time.
const DOUBT: Duration = Duration::from_secs(1);
/// The link's addresses are looked at again so often.
const LOOK: Duration = Duration::from_secs(5);

/// A link by which the host reaches guests.
#[derive(Debug)]
pub(crate) struct Access {
    link: Link,
    listener: AbortHandle,
}

impl Drop for Access {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

impl Card {
    /// The link on which the host wants to reach it.
    fn accessed(&self) -> Option<&String> {
        match &self.to {
            Target::Direct { link, host_access: true, .. } => Some(link),
            _ => None,
        }
    }
}

/// The macvlan on a link is known by its name.
fn name(parent: &Link) -> String {
    format!("lmv{}", parent.index)
}

fn is_ours(link: &Link) -> bool {
    link.kind == Some(Kind::MacVlan) && link.parent.is_some_and(|parent| link.name == format!("lmv{parent}"))
}

impl Helper {
    /// The host and the cards on this link that ask for it reach each other afterwards.
    pub(crate) async fn give_access(&mut self, parent: &str) -> Result<()> {
        let links = self.links.all().await?;
        let parent = links.iter().find(|link| link.name == parent);
        let parent = parent.ok_or_else(|| Error::new("the link is gone"))?;
        if !self.access.contains_key(&parent.name) {
            let own = name(parent);
            let link = match links.iter().find(|link| link.name == own) {
                Some(link) if is_ours(link) => link.clone(),
                Some(_) => {
                    return Err(Error::new(format!("there is a link {own} already, which is not Lodge's")));
                }
                None => self.links.add_macvlan(&own, parent.index).await?,
            };
            settings::rule(&own);
            let listener = match listen(link.index) {
                Ok(sockets) => {
                    tokio::spawn(learn(self.me.clone(), parent.name.clone(), sockets)).abort_handle()
                }
                Err(error) => {
                    // The first error counts.
                    let _ = self.links.delete(&link).await;
                    return Err(error);
                }
            };
            self.access.insert(parent.name.clone(), Access { link, listener });
        }
        let given = self.set_access(&parent.name).await;
        if given.is_err() {
            self.end_access().await;
        }
        given
    }

    /// What lives goes on, and the rest is removed.
    pub(crate) async fn adopt_access(&mut self) {
        let parents: HashSet<_> = self.cards.values().filter_map(Card::accessed).cloned().collect();
        for parent in parents {
            if let Err(error) = self.give_access(&parent).await {
                eprintln!("warning: the host does not reach guests on {parent}: {error}");
            }
        }
        self.end_access().await;
    }

    async fn set_access(&mut self, parent: &str) -> Result<()> {
        let Some(access) = self.access.get(parent) else { return Ok(()) };
        let link = access.link.clone();
        // Rules come first.
        self.set_access_filter(parent).await?;
        self.links.set_alias(&link, &format!("lodge access {parent}")).await?;
        self.links.take_groups(&link).await?;
        self.links.set_up(&link, true).await?;
        self.follow(parent).await
    }

    /// It hears only those guests; to others on the wire the host is where it always was.
    pub(crate) async fn set_access_filter(&mut self, parent: &str) -> Result<()> {
        let Some(access) = self.access.get(parent) else { return Ok(()) };
        let link = access.link.name.clone();
        let macs = self.cards.values().filter(|card| card.accessed().is_some_and(|link| link == parent));
        let macs: Vec<_> = macs.map(|card| card.mac.to_string()).collect();
        let mut script = filter::without(&link);
        // Writing to a string does not fail.
        let _ = write!(
            script,
            "table {} {{\nchain from {{\ntype filter hook ingress device \"{link}\" priority 0; policy drop;\n",
            filter::table(&link)
        );
        if !macs.is_empty() {
            let _ = writeln!(script, "ether saddr {{ {} }} accept", macs.join(", "));
        }
        script.push_str("}\n}\n");
        self.set_table(&filter::table(&link), &script).await
    }

    /// The link that a table of rules is about.
    pub(crate) fn access_by(&self, interface: &str) -> Option<String> {
        self.access.iter().find(|(_, access)| access.link.name == interface).map(|(parent, _)| parent.clone())
    }

    /// It has the addresses that the link itself has, whenever those change.
    async fn follow(&self, parent: &str) -> Result<()> {
        let Some(access) = self.access.get(parent) else { return Ok(()) };
        let Some(found) = self.links.find(parent).await? else { return Ok(()) };
        let all = self.links.addresses().await?;
        let of = |index: u32| {
            let nets =
                all.iter().filter(move |address| address.index == index).map(|address| address.net.addr());
            nets.filter(|address| !is_link_local(*address)).collect::<Vec<_>>()
        };
        let (wanted, have) = (of(found.index), of(access.link.index));
        for address in wanted.iter().filter(|address| !have.contains(address)) {
            self.links.add_address(&access.link, IpNet::from(*address), false).await?;
        }
        for address in have.iter().filter(|address| !wanted.contains(address)) {
            self.links.remove_address(&access.link, IpNet::from(*address)).await?;
        }
        // Routes end when a link is switched off for a moment.
        let routes = self.links.routes().await?;
        let on_it = self.cards.values().filter(|card| card.accessed().is_some_and(|link| link == parent));
        for address in on_it.flat_map(|card| &card.learned) {
            let is_it = |route: &Route| {
                route.index == Some(access.link.index) && route.destination == IpNet::from(*address)
            };
            let own = all.iter().find(|own| own.index == found.index && own.net.contains(address));
            if let Some(own) = own.filter(|_| !routes.iter().any(is_it)) {
                self.links.add_route(&access.link, *address, own.net.addr()).await?;
            }
        }
        Ok(())
    }

    /// A card on the link has this address, as it says.
    pub(crate) async fn learned(&mut self, parent: &str, mac: Mac, address: IpAddr) -> Result<()> {
        self.follow(parent).await?;
        let is_it = |card: &&Card| card.mac == mac && card.accessed().is_some_and(|link| link == parent);
        let Some(card) = self.cards.values().find(is_it).cloned() else { return Ok(()) };
        let known = self.cards.values().any(|card| card.learned.contains(&address));
        if known || card.learned.len() >= MOST_ADDRESSES {
            return Ok(());
        }
        let Some(source) = self.may_be(parent, mac, address).await? else { return Ok(()) };
        let Some(access) = self.access.get(parent) else { return Ok(()) };
        self.links.add_route(&access.link, address, source).await?;
        if let Some(card) = self.cards.get_mut(&card.interface) {
            card.learned.push(address);
            self.store.keep_card(&card.clone())?;
        }
        self.doubt(parent, card.interface, mac, address).await
    }

    /// Asks on the wire, where the guest does not hear it: if somebody answers, the guest has lied, and the host's words are not for it.
    async fn doubt(&self, parent: &str, interface: String, mac: Mac, address: IpAddr) -> Result<()> {
        let Some(found) = self.links.find(parent).await? else { return Ok(()) };
        self.links.ask_for(found.index, address).await?;
        let (me, parent) = (self.me.clone(), parent.to_owned());
        tokio::spawn(async move {
            tokio::time::sleep(DOUBT).await;
            let Some(helper) = me.upgrade() else { return };
            let mut helper = helper.lock().await;
            let other = helper.links.neighbour(found.index, address).await;
            if let Ok(Some(other)) = other
                && other != mac
            {
                helper.unlearn(&parent, &interface, address).await;
                eprintln!(
                    "warning: {interface}'s guest says that it is {address}, which is {other}'s; it is not believed"
                );
            }
        });
        Ok(())
    }

    async fn unlearn(&mut self, parent: &str, interface: &str, address: IpAddr) {
        if let Some(access) = self.access.get(parent) {
            // It ends with the link at the latest.
            let _ = self.links.remove_route(&access.link, address).await;
        }
        if let Some(card) = self.cards.get_mut(interface) {
            card.learned.retain(|learned| *learned != address);
            let _ = self.store.keep_card(&card.clone());
        }
    }

    /// The host's address for talking to it, if it can be a guest's: one of the link's networks, and of nobody who is there already.
    async fn may_be(&self, parent: &str, mac: Mac, address: IpAddr) -> Result<Option<IpAddr>> {
        let Some(parent) = self.links.find(parent).await? else { return Ok(None) };
        let addresses = self.links.addresses().await?;
        let routes = self.links.routes().await?;
        let taken = addresses.iter().any(|own| own.net.addr() == address)
            || routes.iter().any(|route| route.gateway == Some(address))
            || self.links.neighbour(parent.index, address).await?.is_some_and(|other| other != mac);
        let own = addresses.iter().find(|own| {
            own.index == parent.index
                && own.net.contains(&address)
                && own.net.prefix_len() < own.net.max_prefix_len()
        });
        let is_border = |net: &IpNet| match net {
            IpNet::V4(net) => address == net.network() || address == net.broadcast(),
            IpNet::V6(net) => address == net.network(),
        };
        Ok(own.filter(|own| !taken && !is_border(&own.net)).map(|own| own.net.addr()))
    }

    /// A card is gone: so are its routes, and the link if it was the last one.
    pub(crate) async fn end_access_of(&mut self, card: &Card) -> Result<()> {
        let Some(parent) = card.accessed() else { return Ok(()) };
        if let Some(access) = self.access.get(parent) {
            for address in &card.learned {
                // With the link they may be gone already.
                let _ = self.links.remove_route(&access.link, *address).await;
            }
        }
        self.end_access().await;
        self.set_access_filter(parent).await
    }

    /// Removes links that no card needs, those of before included.
    pub(crate) async fn end_access(&mut self) {
        let needed: HashSet<_> = self.cards.values().filter_map(Card::accessed).cloned().collect();
        self.access.retain(|parent, _| needed.contains(parent));
        let links = self.links.all().await.unwrap_or_default();
        let kept: HashSet<_> = self.access.values().map(|access| access.link.index).collect();
        for link in links.iter().filter(|link| is_ours(link) && !kept.contains(&link.index)) {
            let ended = self.links.delete(link).await.and(self.drop_filter(&link.name).await);
            if let Err(error) = ended {
                eprintln!("warning: not all of {} is gone: {error}", link.name);
            }
        }
    }
}

pub(crate) fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// Hears ARP and IPv6 on a link.
fn listen(index: u32) -> Result<[AsyncFd<OwnedFd>; 2]> {
    let open = |protocol| -> std::io::Result<_> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, Some(protocol))?;
        // A packet socket's address cannot be made up without unsafe code, but the link has one, which names no protocol: the socket's
        // own stays (packet(7)).
        let of_link = |address: &nix::ifaddrs::InterfaceAddress| {
            let link = *address.address.as_ref()?.as_link_addr()?;
            (link.ifindex() == index as usize).then_some(link)
        };
        let address = nix::ifaddrs::getifaddrs()?.find_map(|address| of_link(&address));
        nix::sys::socket::bind(socket.as_raw_fd(), &address.ok_or(std::io::ErrorKind::NotFound)?)?;
        readable(socket)
    };
    let sockets = open(eth::ARP).and_then(|arp| Ok([arp, open(eth::IPV6)?]));
    sockets.context(|| "the guests' addresses cannot be learned".into())
}

async fn learn(me: Weak<Mutex<Helper>>, parent: String, [arp, ipv6]: [AsyncFd<OwnedFd>; 2]) {
    // Those that were told of since the last look need not be told of again.
    let mut told = HashSet::new();
    let mut look = tokio::time::interval(LOOK);
    loop {
        let heard = tokio::select! {
            heard = hear(&arp) => heard,
            heard = hear(&ipv6) => heard,
            _ = look.tick() => {
                told.clear();
                let Some(helper) = me.upgrade() else { return };
                // The link may be away for a moment.
                let _ = helper.lock().await.follow(&parent).await;
                continue;
            }
        };
        let Ok(heard) = heard else { return };
        for (mac, address) in heard {
            if told.insert((mac, address)) {
                let Some(helper) = me.upgrade() else { return };
                if let Err(error) = helper.lock().await.learned(&parent, mac, address).await {
                    eprintln!("warning: the host does not reach {address} on {parent}: {error}");
                }
            }
        }
        // What comes in the meantime and is too much for the socket is said again.
        tokio::time::sleep(PAUSE).await;
    }
}

/// Some addresses, and who has them.
async fn hear(socket: &AsyncFd<OwnedFd>) -> std::io::Result<Vec<(Mac, IpAddr)>> {
    let mut ready = socket.readable().await?;
    let mut heard = HashSet::new();
    // As many as a burst has, and not for ever.
    for _ in 0..256 {
        let mut bytes = [0; 96];
        match recv(ready.get_inner(), &mut bytes[..], RecvFlags::DONTWAIT) {
            Ok((len, _)) => heard.extend(said(bytes.get(..len).unwrap_or_default())),
            Err(rustix::io::Errno::AGAIN) => {
                ready.clear_ready();
                break;
            }
            // The link goes up and down.
            Err(rustix::io::Errno::INTR | rustix::io::Errno::NETDOWN) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(heard.into_iter().take(MOST_ADDRESSES).collect())
}

/// The address that somebody says is theirs.
fn said(frame: &[u8]) -> Option<(Mac, IpAddr)> {
    let mac = Mac::new(frame.get(6..12)?.try_into().ok()?)?;
    let address: IpAddr = match frame.get(12..14)? {
        // ARP over Ethernet for IPv4; the sender's addresses.
        [8, 6] if frame.get(14..20)? == [0, 1, 8, 0, 6, 4] && frame.get(22..28)? == mac.bytes() => {
            Ipv4Addr::from(<[u8; 4]>::try_from(frame.get(28..32)?).ok()?).into()
        }
        [0x86, 0xdd] => {
            let source = Ipv6Addr::from(<[u8; 16]>::try_from(frame.get(22..38)?).ok()?);
            // Who asks whether an address is free is about to have it (RFC 4862, 5.4).
            let is_question = frame.get(20) == Some(&58) && frame.get(54) == Some(&135);
            match source.is_unspecified() {
                true if is_question => Ipv6Addr::from(<[u8; 16]>::try_from(frame.get(62..78)?).ok()?).into(),
                true => return None,
                false => source.into(),
            }
        }
        _ => return None,
    };
    let useful = !address.is_unspecified()
        && !address.is_multicast()
        && !address.is_loopback()
        && !is_link_local(address);
    useful.then_some((mac, address))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_are_heard_and_nonsense_is_not() {
        let mac = [0x52, 0x4c, 0, 0, 0, 1];
        let arp =
            [&[0xff; 6][..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac, &[192, 0, 2, 5], &[0; 10]].concat();
        let known = (Mac::new(mac).unwrap(), "192.0.2.5".parse().unwrap());
        assert_eq!(said(&arp), Some(known));
        let other =
            [&[0xff; 6][..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &[2; 6], &[192, 0, 2, 5], &[0; 10]]
                .concat();
        assert_eq!(said(&other), None);
        let target: Ipv6Addr = "2001:db8::5".parse().unwrap();
        let question = [
            &[0x33; 6][..],
            &mac,
            &[0x86, 0xdd, 0x60, 0, 0, 0, 0, 24, 58, 255],
            &[0; 16],
            &[0xff; 16],
            &[135, 0, 0, 0, 0, 0, 0, 0],
            &target.octets(),
        ]
        .concat();
        assert_eq!(said(&question), Some((known.0, target.into())));
        for len in 0..question.len() {
            assert_eq!(said(&question[..len]), None);
        }
        (0..32).for_each(|len| assert_eq!(said(&arp[..len]), None));
    }

    proptest! {
        /// Whatever is on the wire: what is heard is an address of one machine, and stands in the frame with who says so.
        #[test]
        fn nothing_is_heard_that_is_not_said(
            kind in prop_oneof![Just([8, 6]), Just([0x86, 0xdd]), any::<[u8; 2]>()],
            arp in any::<bool>(),
            question in any::<bool>(),
            mac in any::<[u8; 6]>(),
            mut bytes in vec(any::<u8>(), 0..96),
        ) {
            let mut write = |at: usize, what: &[u8]| {
                if let Some(place) = bytes.get_mut(at..at + what.len()) {
                    place.copy_from_slice(what);
                }
            };
            write(6, &mac);
            write(12, &kind);
            if arp {
                write(14, &[0, 1, 8, 0, 6, 4]);
                write(22, &mac);
            } else if question {
                write(20, &[58]);
                write(22, &[0; 16]);
                write(54, &[135]);
            }
            if let Some((who, address)) = said(&bytes) {
                prop_assert_eq!(who.bytes(), mac);
                prop_assert!(mac[0] & 1 == 0);
                prop_assert!(!address.is_unspecified() && !address.is_multicast() && !address.is_loopback());
                let (start, octets) = match address {
                    IpAddr::V4(address) => (28, address.octets().to_vec()),
                    IpAddr::V6(address) if arp || !question => (22, address.octets().to_vec()),
                    IpAddr::V6(address) => (62, address.octets().to_vec()),
                };
                prop_assert_eq!(bytes.get(start..start + octets.len()), Some(&octets[..]));
            }
        }
    }
}
