//! Networks: made, started, stopped and removed.

use std::mem;
use std::net::Ipv4Addr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lan::{Lan, Leases};
use netctl::{Declared, Mac, Mode, Network};

use crate::addresses::{self, DEFAULT, Taken, alias, bridge_mac, is_bridge_of};
use crate::helper::Helper;
use crate::links::Link;
use crate::store::Card;
use crate::{Context, Error, Result, firewall, settings};

/// Networks that there may be.
const MOST_NETWORKS: usize = 64;
/// Declared addresses in one.
const MOST_HOSTS: usize = 4096;

/// A network.
#[derive(Debug)]
pub(crate) struct Net {
    /// Nothing in it is left open.
    pub declared: Network,
    /// Its bridge.
    pub device: String,
    /// The host's address, and the length.
    pub ipv4: Ipv4Net,
    /// The same.
    pub ipv6: Ipv6Net,
    /// It runs.
    pub active: bool,
    /// Who has which address.
    pub leases: Arc<Leases>,
    /// Who tells them, while it runs.
    lan: Option<Lan>,
}

impl Net {
    pub fn firewall(&self) -> firewall::Net<'_> {
        firewall::Net {
            device: &self.device,
            mode: self.declared.mode,
            ipv4: self.ipv4,
            ipv6: Some(self.ipv6),
        }
    }

    /// Its bridge's address.
    pub fn mac(&self) -> Mac {
        bridge_mac(self.ipv4)
    }

    /// The address that a card has from now on.
    pub fn reserve(&self, card: &Card) -> Result<Ipv4Addr> {
        let given = self.leases.reserve(card.mac, &card.vm, card.uid, card.address);
        given.context(|| format!("the network {} has no address for {}", self.declared.name, card.vm))
    }

    /// Starts its servers.
    fn serve(&mut self) -> Result<()> {
        let options = lan::Options {
            device: self.device.clone(),
            ipv4: self.ipv4,
            ipv6: settings::has_ipv6().then_some(self.ipv6),
            router: self.declared.mode != Mode::Isolated,
            // Nobody else has names below `internal` for good (ICANN's resolution of 2024-07-29).
            domain: format!("{}.lodge.internal", self.declared.name),
            resolv_conf: "/etc/resolv.conf".into(),
        };
        self.lan = None;
        let lan = Lan::start(options, self.leases.clone());
        self.lan = Some(lan.context(|| format!("DHCP and names cannot be served on {}", self.device))?);
        Ok(())
    }

    fn is_its(&self, link: &Link) -> bool {
        link.name == self.device && is_bridge_of(link, &self.declared.name, self.mac())
    }
}

impl Helper {
    /// The networks that are declared. Those whose bridge is there run: the rules that come next are to be about all of them.
    pub(crate) async fn adopt_networks(&mut self) -> Result<()> {
        let links = self.links.all().await?;
        for network in self.store.networks()? {
            let name = network.name.clone();
            if let Err(error) = self.know(network) {
                eprintln!("warning: the network {name} is not known: {error}");
                continue;
            }
            if let Some(net) = self.networks.get_mut(&name) {
                net.active = links.iter().any(|link| net.is_its(link));
            }
        }
        // One that cannot be known has no rules, so nothing may go over it.
        for link in links {
            let is_ours = link.alias.as_ref().is_some_and(|alias| alias.starts_with(&addresses::alias("")));
            if is_ours && link.up && !self.networks.values().any(|net| net.is_its(&link)) {
                eprintln!("warning: {} is no network's any more, and is switched off", link.name);
                self.links.set_up(&link, false).await?;
            }
        }
        Ok(())
    }

    /// Sets the rules between networks, and starts those that ran before and those that start by themselves.
    ///
    /// # Errors
    /// The rules cannot be set.
    pub(crate) async fn start_networks(&mut self) -> Result<()> {
        let nets = self.networks.values_mut().filter(|net| net.active || net.declared.autostart);
        // Rules once for all, before any of them is there.
        let ran = nets.map(|net| (net.declared.name.clone(), mem::replace(&mut net.active, true)));
        let nets: Vec<_> = ran.collect();
        self.set_firewall().await?;
        let mut failed = false;
        for (name, ran) in nets {
            // Its servers are this process's.
            let link = self.links.find(&self.networks[&name].device).await;
            let started = match link {
                Ok(Some(link)) if ran => self.bring_up(&name, &link).await,
                _ => self.start_network(&name).await,
            };
            if let Err(error) = started {
                eprintln!("warning: the network {name} is not started: {error}");
                // One that is there has its rules, whatever else it lacks.
                if let Some(net) = self.networks.get_mut(&name) {
                    net.active = ran;
                }
                failed = true;
            }
        }
        if failed { self.set_firewall().await } else { Ok(()) }
    }

    /// Adds a network of which nothing is open.
    fn know(&mut self, declared: Network) -> Result<()> {
        let nothing_open = (declared.device.clone(), declared.ipv4, declared.ipv6);
        let (Some(device), Some(ipv4), Some(ipv6)) = nothing_open else {
            return Err(Error::new("its definition lacks the device or the addresses"));
        };
        addresses::check_device(&device)?;
        let name = declared.name.clone();
        let leases = Leases::open(&self.store.leases(&name), ipv4, declared.hosts.clone());
        let leases = Arc::new(leases.context(|| format!("the network {name} cannot give addresses"))?);
        let net = Net { declared, device, ipv4, ipv6, active: false, leases, lan: None };
        for card in self.cards.values().filter(|card| card.network() == Some(&name)) {
            net.reserve(card)?;
        }
        self.networks.insert(name, net);
        Ok(())
    }

    /// The network of a name.
    pub(crate) fn known(&self, name: &str) -> Result<&Net> {
        self.networks.get(name).ok_or_else(|| {
            let all: Vec<_> = self.networks.keys().map(String::as_str).collect();
            let all = if all.is_empty() {
                "there are none yet".into()
            } else {
                format!("there are: {}", all.join(", "))
            };
            Error::new(format!("there is no network {name}")).help(format!("lodge net create {name}; {all}"))
        })
    }

    /// What the host and other networks have; `but` is one that does not count.
    pub(crate) async fn taken(&self, but: Option<&str>) -> Result<Taken> {
        let links = self.links.all().await?;
        let own = |index: u32| {
            let link = links.iter().find(|link| link.index == index);
            link.is_some_and(|link| self.networks.values().any(|net| net.is_its(link)))
        };
        let name = |index: u32| {
            let link = links.iter().find(|link| link.index == index);
            link.map_or_else(|| "the host".to_owned(), |link| link.name.clone())
        };
        let mut taken =
            Taken { devices: links.iter().map(|link| link.name.clone()).collect(), ..Taken::default() };
        for address in self.links.addresses().await? {
            if !own(address.index) {
                taken.nets.push((address.net.trunc(), name(address.index)));
            }
        }
        for route in self.links.routes().await? {
            // Short ones are ways to the whole world, in one or two halves.
            let specific = route.destination.prefix_len() >= 8 && !route.destination.addr().is_multicast();
            if specific && !route.index.is_some_and(own) {
                taken.nets.push((route.destination.trunc(), route.index.map_or("a route".into(), name)));
            }
        }
        let link_local = |net: &IpNet| matches!(net.addr(), std::net::IpAddr::V6(address) if address.is_unicast_link_local());
        taken.nets.retain(|(net, _)| !link_local(net));
        for net in self.networks.values().filter(|net| but != Some(&net.declared.name)) {
            let who = format!("the network {}", net.declared.name);
            taken.nets.extend([(IpNet::from(net.ipv4.trunc()), who.clone()), (net.ipv6.trunc().into(), who)]);
            taken.devices.push(net.device.clone());
        }
        Ok(taken)
    }

    /// Makes a network and starts it.
    pub(crate) async fn create(&mut self, network: Network) -> Result<Vec<String>> {
        if self.networks.contains_key(&network.name) {
            return Err(Error::new(format!("there is a network {} already", network.name))
                .help(format!("lodge net inspect {}", network.name)));
        }
        if self.networks.len() >= MOST_NETWORKS || network.hosts.len() > MOST_HOSTS {
            return Err(Error::new(format!(
                "there can be {MOST_NETWORKS} networks with {MOST_HOSTS} hosts each"
            )));
        }
        let (network, notes) = addresses::complete(network, &self.taken(None).await?)?;
        let name = network.name.clone();
        self.store.keep(&network)?;
        let made = match self.know(network) {
            Ok(()) => self.start_network(&name).await,
            Err(error) => Err(error),
        };
        if let Err(error) = made {
            self.networks.remove(&name);
            self.store.forget(&name)?;
            return Err(error);
        }
        Ok(notes)
    }

    /// The network that a card is to be connected to runs afterwards; `default` is made if there is none.
    pub(crate) async fn ensure(&mut self, name: &str) -> Result<Vec<String>> {
        if name == DEFAULT && !self.networks.contains_key(name) {
            return self.create(Network::new(name)).await;
        }
        self.start_network(name).await.map(|()| Vec::new())
    }

    /// The network that a card is connected to again runs: it is not for the card to start it.
    pub(crate) fn runs(&self, name: &str) -> Result<Vec<String>> {
        if self.known(name)?.active {
            return Ok(Vec::new());
        }
        Err(Error::new(format!("the network {name} does not run")).help(format!("lodge net start {name}")))
    }

    /// A network runs afterwards, or nothing of it is there.
    pub(crate) async fn start_network(&mut self, name: &str) -> Result<()> {
        let net = self.known(name)?;
        let (device, mac) = (net.device.clone(), net.mac());
        let found = self.links.find(&device).await?;
        if let Some(link) = &found {
            if !net.is_its(link) {
                return Err(Error::new(format!(
                    "there is a link {device} already, which is not the network {name}'s"
                ))
                .help(format!("remove it (ip link del {device}), or give the network another device")));
            }
            if net.active && link.up {
                return Ok(());
            }
        } else {
            let taken = self.taken(Some(name)).await?;
            taken.check(net.ipv4.into())?;
            taken.check(net.ipv6.into())?;
        }
        let (link, is_new) = match found {
            Some(link) => (link, false),
            None => (self.links.add_bridge(&device, Some(mac)).await?, true),
        };
        let started = self.bring_up(name, &link).await;
        if started.is_err() && is_new {
            if let Some(net) = self.networks.get_mut(name) {
                (net.active, net.lan) = (false, None);
            }
            // The first error counts.
            let _ = self.links.delete(&link).await;
            let _ = self.set_firewall().await;
        }
        started
    }

    async fn bring_up(&mut self, name: &str, link: &Link) -> Result<()> {
        let net = self.known(name)?;
        let (ipv4, ipv6, mode, active) = (net.ipv4, net.ipv6, net.declared.mode, net.active);
        settings::rule(&link.name);
        self.links.set_alias(link, &alias(name)).await?;
        // Rules come first, so that there is no moment without.
        if !active {
            if let Some(net) = self.networks.get_mut(name) {
                net.active = true;
            }
            self.set_firewall().await?;
        }
        if mode != Mode::Isolated {
            settings::forward()?;
        }
        self.links.set_up(link, true).await?;
        let has = self.links.addresses().await?;
        let mut nets = vec![IpNet::from(ipv4)];
        if settings::has_ipv6() {
            nets.push(ipv6.into());
        }
        for net in nets {
            if !has.iter().any(|address| address.index == link.index && address.net == net) {
                self.links.add_address(link, net, true).await?;
            }
        }
        self.networks.get_mut(name).map_or(Ok(()), Net::serve)
    }

    /// Stops a network. `force`: even if cards are connected.
    pub(crate) async fn stop(&mut self, name: &str, force: bool) -> Result<()> {
        let net = self.known(name)?;
        let device = net.device.clone();
        let cards: Vec<_> =
            self.cards.values().filter(|card| card.network() == Some(&net.declared.name)).cloned().collect();
        if !cards.is_empty() && !force {
            let vms: Vec<_> = cards.iter().map(|card| card.vm.as_str()).collect();
            return Err(Error::new(format!("VMs are connected to the network {name}: {}", vms.join(", ")))
                .help("stop them first, or use --force: their links go down"));
        }
        // All of them at first: nothing is then set for those that are left.
        cards.iter().for_each(|card| _ = self.cards.remove(&card.interface));
        for card in &cards {
            self.unplug(card).await;
        }
        if let Some(net) = self.networks.get_mut(name) {
            net.lan = None;
        }
        let net = self.known(name)?;
        if let Some(link) = self.links.find(&device).await?.filter(|link| net.is_its(link)) {
            self.links.delete(&link).await?;
        }
        if let Some(net) = self.networks.get_mut(name) {
            net.active = false;
        }
        self.set_firewall().await
    }

    /// Removes a network.
    pub(crate) async fn remove(&mut self, name: &str, force: bool) -> Result<()> {
        self.stop(name, force).await?;
        self.store.forget(name)?;
        self.networks.remove(name);
        Ok(())
    }

    /// Makes networks what they are declared to be; in turn, until one cannot be.
    pub(crate) async fn apply(&mut self, declared: Declared) -> Result<Vec<String>> {
        let mut notes = Vec::new();
        for bridge in declared.bridges {
            notes.extend(self.make_bridge(bridge, false).await?);
        }
        for network in declared.networks {
            let name = network.name.clone();
            notes.extend(match self.networks.get(&name) {
                None => self.create(network).await?,
                Some(net) => {
                    let changed = changed(&net.declared, &network);
                    if changed == net.declared { Vec::new() } else { self.change(changed).await? }
                }
            });
        }
        Ok(notes)
    }

    /// Makes a network another one of the same name.
    async fn change(&mut self, network: Network) -> Result<Vec<String>> {
        let name = network.name.clone();
        let net = self.known(&name)?;
        let (before, active) = (net.declared.clone(), net.active);
        let moves =
            (&before.device, before.ipv4, before.ipv6) != (&network.device, network.ipv4, network.ipv6);
        let mut taken = self.taken(Some(&name)).await?;
        taken.devices.retain(|device| before.device.as_ref() != Some(device));
        let (network, notes) = addresses::complete(network, &taken)?;
        if moves {
            self.stop(&name, false).await?;
        }
        self.know(network.clone())?;
        if let Err(error) = self.store.keep(&network) {
            self.know(before)?;
            return Err(error);
        }
        if active {
            self.start_network(&name).await?;
        }
        Ok(notes)
    }
}

/// What a network becomes: what is left open stays as it is.
fn changed(before: &Network, to: &Network) -> Network {
    let mut network = to.clone();
    network.device = network.device.or_else(|| before.device.clone());
    // The host's address may be left out, too.
    network.ipv4 = match (network.ipv4, before.ipv4) {
        (Some(net), Some(old)) if net.addr() == net.network() && net.trunc() == old.trunc() => Some(old),
        (net, old) => net.or(old),
    };
    network.ipv6 = match (network.ipv6, before.ipv6) {
        (Some(net), Some(old)) if net.addr() == net.network() && net.trunc() == old.trunc() => Some(old),
        (net, old) => net.or(old),
    };
    network
}
