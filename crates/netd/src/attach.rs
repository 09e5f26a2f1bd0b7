//! Cards: connected to networks, bridges and links, and removed with their VM's process.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;

use netctl::{Attach, Attached, Direct, Forward, MOST_QUEUES, Mac, Protocol, Target};
use rustix::io::Errno;

use crate::access::is_link_local;
use crate::addresses::{check_device, check_vm, link_local};
use crate::filter::Filter;
use crate::helper::{Helper, Peer};
use crate::links::{Kind, Link};
use crate::networks::Net;
use crate::process::Process;
use crate::store::Card;
use crate::{Error, Result, direct, savi, settings};

/// Cards of all users.
const MOST_CARDS: usize = 1024;
/// Cards of one user other than root.
const MOST_CARDS_EACH: usize = 64;
/// Rules of one card.
const MOST_RULES: usize = 256;
/// Ports that lead to one card.
const MOST_FORWARDS: usize = 64;
/// The kernel puts a number for `%d`.
const TAPS: &str = "ltap%d";

impl Card {
    /// The network that it is connected to.
    pub(crate) fn network(&self) -> Option<&String> {
        match &self.to {
            Target::Network(name) => Some(name),
            _ => None,
        }
    }

    /// The host's own link or bridge that it is connected to.
    pub(crate) fn link(&self) -> Option<&String> {
        match &self.to {
            Target::Network(_) => None,
            Target::Bridge(name) | Target::Direct { link: name, .. } => Some(name),
        }
    }

    /// It is a MacVTap.
    fn is_direct(&self) -> bool {
        matches!(self.to, Target::Direct { .. })
    }

    /// What it may send and be sent. `net`: its network.
    pub(crate) fn filter<'a>(&'a self, net: Option<&Net>) -> Filter<'a> {
        Filter {
            interface: &self.interface,
            reversed: self.is_direct(),
            mac: self.mac,
            address: self.address,
            ipv6: net.map(|net| (net.ipv6, [net.ipv6.addr(), link_local(net.mac())])),
            spoofing: self.spoofing,
            rules: &self.rules,
        }
    }

    /// Whose IPv6 addresses it has.
    pub(crate) fn source(&self) -> savi::Source<'_> {
        savi::Source { interface: &self.interface, reversed: self.is_direct(), uid: self.uid }
    }
}

impl Helper {
    /// Connects a card: all of it is done, or nothing.
    pub(crate) async fn attach(&mut self, peer: &Peer, attach: Attach) -> Result<(Attached, Vec<OwnedFd>)> {
        let Some(process) = peer.process.clone() else {
            return Err(Error::new(
                "who has connected to the helper has ended, and cards are for those who live",
            ));
        };
        self.forget_lost(peer.uid, &process, &attach).await;
        self.check(peer.uid, &attach)?;
        let mut card = Card {
            vm: attach.vm,
            pid: process.pid,
            started: process.started,
            uid: peer.uid,
            mac: attach.mac,
            to: attach.to,
            interface: String::new(),
            index: None,
            address: attach.address,
            spoofing: attach.spoofing,
            rules: attach.rules,
            forwards: attach.forwards,
            learned: Vec::new(),
            filter_hash: None,
        };
        let (notes, descriptors) = match card.to.clone() {
            Target::Network(name) => {
                let mut notes = if attach.again { self.runs(&name)? } else { self.ensure(&name).await? };
                let net = self.known(&name)?;
                let device = net.device.clone();
                net.leases.check_owner(card.mac, card.uid).map_err(|error| {
                    Error::new(error.to_string())
                        .help("give this card another one with mac=, or none: then one is chosen")
                })?;
                if !net.leases.may_be_called(&card.vm, card.uid) {
                    notes.push(format!(
                        "another user has a VM called {} on the network {name}: guests there find this one by its address only (--name gives it another name)",
                        card.vm
                    ));
                }
                card.address = Some(net.reserve(&card)?);
                (notes, self.plug_tap(&mut card, &device, attach.queues).await?)
            }
            Target::Bridge(name) => (Vec::new(), self.plug_tap(&mut card, &name, attach.queues).await?),
            Target::Direct { link, mode, host_access } => {
                let notes = if host_access {
                    if mode != Direct::Bridge {
                        return Err(Error::new("the host has access to cards of the mode bridge only")
                            .help("leave out --host-access, or the mode"));
                    }
                    Vec::new()
                } else {
                    vec![format!(
                        "this guest and this host cannot reach each other over {link} (that is how MacVTap works); --host-access lets them"
                    )]
                };
                (notes, self.plug_macvtap(&mut card, &link, mode, attach.queues).await?)
            }
        };
        self.watch(&card, process);
        let attached = Attached { interface: card.interface, address: card.address, notes };
        Ok((attached, descriptors))
    }

    /// A process that connects a card again has lost the one before.
    async fn forget_lost(&mut self, uid: u32, process: &Process, attach: &Attach) {
        let is_it = |card: &&Card| {
            (card.uid, card.pid, card.started, card.mac) == (uid, process.pid, process.started, attach.mac)
                && attach.again
        };
        if let Some(card) = self.cards.values().find(is_it).cloned() {
            self.cards.remove(&card.interface);
            self.unplug(&card).await;
        }
    }

    fn check(&self, uid: u32, attach: &Attach) -> Result<()> {
        check_vm(&attach.vm)?;
        match &attach.to {
            Target::Network(name) => crate::addresses::check_name(name)?,
            Target::Bridge(name) | Target::Direct { link: name, .. } => check_device(name)?,
        }
        if !(1..=MOST_QUEUES).contains(&attach.queues) {
            return Err(Error::new(format!("a card has 1 to {MOST_QUEUES} queues")));
        }
        if attach.rules.len() > MOST_RULES || attach.forwards.len() > MOST_FORWARDS {
            return Err(Error::new(format!(
                "a card has {MOST_RULES} rules and {MOST_FORWARDS} forwarded ports at most"
            )));
        }
        let own = self.cards.values().filter(|card| card.uid == uid).count();
        if self.cards.len() >= MOST_CARDS || (uid != 0 && own >= MOST_CARDS_EACH) {
            return Err(Error::new(format!(
                "too many cards are connected: {MOST_CARDS_EACH} for each user, {MOST_CARDS} for all"
            )));
        }
        if let Some(card) = self.cards.values().find(|card| card.mac == attach.mac && card.to == attach.to) {
            return Err(Error::new(format!(
                "{} is the address of a card of the VM {} already",
                attach.mac, card.vm
            ))
            .help("give this card another one with mac=, or none: then one is chosen"));
        }
        self.check_forwards(attach)
    }

    fn check_forwards(&self, attach: &Attach) -> Result<()> {
        let Some(first) = attach.forwards.first() else { return Ok(()) };
        let Target::Network(name) = &attach.to else {
            return Err(Error::new("ports cannot be forwarded to a guest on a bridge or link of the host's")
                .help("the guest has an address of its own there: connect to that"));
        };
        if self.networks.get(name).is_some_and(|net| net.declared.mode == netctl::Mode::Isolated) {
            return Err(Error::new(format!(
                "port {} cannot be forwarded: the network {name} is isolated",
                first.listen.port()
            ))
            .help("connect the guest to a network of mode nat or routed"));
        }
        let others: Vec<_> = self
            .cards
            .values()
            .flat_map(|card| card.forwards.iter().map(move |forward| (forward, &card.vm)))
            .filter(|(forward, _)| forward.by_kernel())
            .collect();
        for (number, forward) in attach.forwards.iter().enumerate() {
            let port = forward.listen.port();
            if forward.protocol == Protocol::Icmp || port == 0 || forward.port == 0 {
                return Err(Error::new("only ports of TCP and UDP can be forwarded, 1 to 65535"));
            }
            // Who listens itself hears whether somebody else does.
            if !forward.by_kernel() {
                continue;
            }
            // One that was there before goes on: its address may come back.
            if !attach.again {
                is_free(forward)?;
            }
            if attach.forwards[..number].iter().any(|other| same_port(other, forward)) {
                return Err(Error::new(format!("port {port}/{} is forwarded twice", forward.protocol)));
            }
            if let Some((_, vm)) = others.iter().find(|(other, _)| same_port(other, forward)) {
                return Err(Error::new(format!(
                    "port {port}/{} leads to the VM {vm} already",
                    forward.protocol
                ))
                .help("take another port of the host's"));
            }
        }
        Ok(())
    }

    /// Makes a tap that is a port of this bridge.
    async fn plug_tap(&mut self, card: &mut Card, bridge: &str, queues: usize) -> Result<Vec<OwnedFd>> {
        let bridge = self.bridge(card, bridge).await?;
        let (interface, descriptors) = taps::create(TAPS, queues).map_err(|error| {
            // The node may be there without its module.
            let no_module = matches!(
                error.raw_os_error().map(Errno::from_raw_os_error),
                Some(Errno::NOENT | Errno::NODEV)
            );
            let error = Error::new(format!("no TAP device can be made: {error}"));
            if no_module { error.help("sudo modprobe tun") } else { error }
        })?;
        card.interface = interface;
        match self.connect(card, &bridge).await {
            Ok(()) => Ok(descriptors),
            Err(error) => {
                drop(descriptors);
                self.cards.remove(&card.interface);
                self.unplug(card).await;
                Err(error)
            }
        }
    }

    async fn bridge(&self, card: &Card, name: &str) -> Result<Link> {
        if card.network().is_none()
            && let Some(net) = self.networks.values().find(|net| net.device == name)
        {
            let network = &net.declared.name;
            return Err(
                Error::new(format!("{name} is the network {network}'s")).help(format!("--network {network}"))
            );
        }
        match self.links.find(name).await? {
            Some(link) if link.kind == Some(Kind::Bridge) => Ok(link),
            Some(_) => Err(Error::new(format!("{name} is no bridge")).help(format!(
                "make one over it: lodge net bridge create br0 --port {name}; or --network direct={name}"
            ))),
            None => Err(Error::new(format!("there is no bridge {name}")).help(format!(
                "ip link show type bridge lists them; lodge net bridge create {name} makes one"
            ))),
        }
    }

    /// The tap exists already, and ends with its descriptors.
    async fn connect(&mut self, card: &mut Card, bridge: &Link) -> Result<()> {
        let tap = self.made(&card.interface).await?;
        card.index = Some(tap.index);
        self.store.keep_card(card)?;
        self.cards.insert(card.interface.clone(), card.clone());
        settings::leave_alone(&tap.name);
        self.set_filter(&tap.name).await?;
        self.set_source(card).await?;
        self.links.set_alias(&tap, &format!("lodge {}", card.vm)).await?;
        // A bridge may take the lowest address of its ports for its own, and is not to change it because of this one.
        if let Some(mac) = tap_mac(card.mac) {
            self.links.set_mac(&tap, mac).await?;
        }
        // A bridge has the shortest packets of its ports.
        if tap.mtu != bridge.mtu {
            self.links.set_mtu(&tap, bridge.mtu).await?;
        }
        self.links.set_master(&tap, Some(bridge.index)).await?;
        if !card.forwards.is_empty() {
            self.set_firewall().await?;
        }
        self.links.set_up(&tap, true).await
    }

    async fn made(&self, interface: &str) -> Result<Link> {
        self.links
            .find(interface)
            .await?
            .ok_or_else(|| Error::new(format!("{interface} was made and is gone")))
    }

    /// Makes a MacVTap on this link.
    async fn plug_macvtap(
        &mut self,
        card: &mut Card,
        link: &str,
        mode: Direct,
        queues: usize,
    ) -> Result<Vec<OwnedFd>> {
        let links = self.links.all().await?;
        let Some(parent) = links.iter().find(|found| found.name == link) else {
            let names: Vec<_> =
                links.iter().filter(|link| link.kind.is_none()).map(|link| link.name.as_str()).collect();
            return Err(Error::new(format!("there is no link {link}"))
                .help(format!("there are: {}", names.join(", "))));
        };
        if let Some(bridge) = parent.master.and_then(|index| links.iter().find(|link| link.index == index)) {
            return Err(Error::new(format!("{link} is a port of the bridge {}", bridge.name))
                .help(format!("--network bridge={}", bridge.name)));
        }
        self.check_parent(parent, mode).await?;
        let free = (0..).map(|number| format!("lmvt{number}"));
        card.interface =
            free.clone().find(|name| links.iter().all(|link| link.name != *name)).unwrap_or_default();
        // What is written down first is never forgotten.
        self.store.keep_card(card)?;
        let plugged = self.connect_macvtap(card, parent, mode, queues).await;
        if plugged.is_err() {
            self.cards.remove(&card.interface);
            self.unplug(card).await;
        }
        plugged
    }

    /// What is another guest's, or a network's, is not to be tapped; and passthru takes a link away from the host.
    async fn check_parent(&self, parent: &Link, mode: Direct) -> Result<()> {
        let link = &parent.name;
        if let Some(net) = self.networks.values().find(|net| net.device == *link) {
            let network = &net.declared.name;
            return Err(
                Error::new(format!("{link} is the network {network}'s")).help(format!("--network {network}"))
            );
        }
        if self.cards.values().any(|card| card.interface == *link) {
            return Err(Error::new(format!("{link} is the link of a guest's card")));
        }
        let addresses = self.links.addresses().await?;
        let own = addresses
            .iter()
            .find(|address| address.index == parent.index && !is_link_local(address.net.addr()));
        match own {
            Some(address) if mode == Direct::Passthru => Err(Error::new(format!(
                "mode passthru would take {link} away from this host, whose address {} is there",
                address.net.addr()
            ))
            .help("use mode=bridge, or a link that the host has no use for")),
            _ => Ok(()),
        }
    }

    async fn connect_macvtap(
        &mut self,
        card: &mut Card,
        parent: &Link,
        mode: Direct,
        queues: usize,
    ) -> Result<Vec<OwnedFd>> {
        let made = self.links.add_macvtap(&card.interface, parent.index, direct::mode(mode), card.mac).await;
        let link = made.map_err(|error| match &error.why {
            why if why.contains("busy") => Error::new(format!("{} takes no more cards: {why}", parent.name))
                .help("one of mode passthru wants the link for itself, and so does a bridge"),
            _ => error,
        })?;
        card.index = Some(link.index);
        self.store.keep_card(card)?;
        self.cards.insert(card.interface.clone(), card.clone());
        settings::leave_alone(&link.name);
        self.set_filter(&link.name).await?;
        self.set_source(card).await?;
        self.links.set_alias(&link, &format!("lodge {}", card.vm)).await?;
        let descriptors = direct::open_queues(&link, queues, self.store.runtime())?;
        // The groups that the guest joins (IPv6 finds neighbours by them) the host does not know.
        self.links.take_groups(&link).await?;
        self.links.set_up(&link, true).await?;
        if let Target::Direct { link: parent, host_access: true, .. } = &card.to {
            self.give_access(parent).await?;
            if let Some(address) = card.address {
                self.learned(parent, card.mac, address.into()).await?;
            }
        }
        Ok(descriptors)
    }

    /// Disconnects cards whose link is gone, or has another Ethernet address: who has a TAP's descriptor may change that without any right,
    /// and a bridge would bring it what is for whoever has the address.
    ///
    /// # Errors
    /// The kernel does not tell of its links.
    pub async fn look_after_cards(&mut self) -> Result<()> {
        if self.cards.is_empty() {
            return Ok(());
        }
        let links = self.links.all().await?;
        let found = |card: &Card| links.iter().find(|link| Some(link.index) == card.index);
        let cards: Vec<_> = self.cards.values().cloned().collect();
        for card in cards {
            let mac = match card.to {
                // The link below is its own, addresses and all.
                Target::Direct { mode: Direct::Passthru, .. } => found(&card).and_then(|link| link.mac),
                Target::Direct { .. } => Some(card.mac),
                _ => tap_mac(card.mac),
            };
            match found(&card) {
                Some(link) if link.mac == mac => continue,
                Some(_) => {
                    eprintln!(
                        "warning: {}'s card {} takes an address: it is disconnected",
                        card.vm, card.interface
                    );
                }
                None => {}
            }
            self.cards.remove(&card.interface);
            self.unplug(&card).await;
        }
        Ok(())
    }

    /// Disconnects a card of this user's.
    pub(crate) async fn detach(&mut self, peer: &Peer, interface: &str) -> Result<()> {
        let card = self.cards.get(interface);
        // Whether others' cards exist is nobody's business.
        let Some(card) = card.filter(|card| peer.uid == 0 || card.uid == peer.uid).cloned() else {
            return Err(Error::new(format!("no card of yours is connected by {interface}")));
        };
        self.cards.remove(interface);
        self.unplug(&card).await;
        Ok(())
    }

    /// Removes whatever there is of a card. Its link goes first: somebody else may hold the descriptor still, and without rules.
    pub(crate) async fn unplug(&mut self, card: &Card) {
        let warn = |error: &Error| {
            eprintln!("warning: not all of {}'s card {} is gone: {error}", card.vm, card.interface)
        };
        match self.links.find(&card.interface).await {
            // A MacVTap that was just being made has our name, and no number yet.
            Ok(Some(link)) if card.index.is_none_or(|index| index == link.index) => {
                if let Err(error) = self.links.delete(&link).await
                    && self.links.find(&card.interface).await != Ok(None)
                {
                    warn(&error);
                }
            }
            Ok(_) => {}
            Err(error) => warn(&error),
        }
        if let Some(net) = card.network().and_then(|name| self.networks.get(name)) {
            net.leases.release(card.mac);
        }
        let mut results = vec![self.drop_source(card).await, self.drop_filter(&card.interface).await];
        if !card.forwards.is_empty() {
            results.push(self.set_firewall().await);
        }
        results.push(self.end_access_of(card).await);
        results.push(self.store.forget_card(&card.interface));
        results.iter().filter_map(|result| result.as_ref().err()).for_each(warn);
    }
}

/// The address of a TAP on the host's side.
fn tap_mac(card: Mac) -> Option<Mac> {
    let [_, a, b, c, d, e] = card.bytes();
    Mac::new([0xfe, a, b, c, d, e])
}

/// Whoever listens there already would be heard no more, and what is not the host's is not forwarded.
fn is_free(forward: &Forward) -> Result<()> {
    let bound = match forward.protocol {
        Protocol::Tcp => TcpListener::bind(forward.listen).map(drop),
        _ => UdpSocket::bind(forward.listen).map(drop),
    };
    let (listen, protocol) = (forward.listen, forward.protocol);
    bound.map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => {
            let port = listen.port();
            Error::new(format!("port {port}/{protocol} is one that a program of this host's listens at"))
                .help("take another port of the host's")
        }
        ErrorKind::AddrNotAvailable => Error::new(format!("{} is no address of this host's", listen.ip()))
            .help("`ip addr` shows them; 0.0.0.0 stands for all"),
        _ => Error::new(format!("{listen}/{protocol} cannot be forwarded: {error}")),
    })
}

fn same_port(one: &Forward, other: &Forward) -> bool {
    let any = |forward: &Forward| forward.listen.ip() == Ipv4Addr::UNSPECIFIED;
    one.protocol == other.protocol
        && one.listen.port() == other.listen.port()
        && (one.listen.ip() == other.listen.ip() || any(one) || any(other))
}
