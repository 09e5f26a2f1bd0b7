//! The helper's state, what it is at the start, and who gets to change it.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use netctl::{Answer, Request, Status};
use tokio::sync::Mutex;

use crate::access::Access;
use crate::bridges::Record;
use crate::links::Links;
use crate::networks::Net;
use crate::policy::Rights;
use crate::process::Process;
use crate::store::Card;
use crate::{Error, Result, Store, addresses, filter, firewall, nft, savi};

/// Who asks, as the kernel tells.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// The process, unless it has ended and somebody else has the connection.
    pub process: Option<Arc<Process>>,
}

/// All that the helper knows.
#[derive(Debug)]
pub struct Helper {
    /// Itself, for those who wait for processes.
    pub(crate) me: Weak<Mutex<Helper>>,
    pub(crate) links: Links,
    pub(crate) store: Store,
    pub(crate) networks: BTreeMap<String, Net>,
    /// Those that it has made over links of the host's.
    pub(crate) bridges: BTreeMap<String, Record>,
    /// By their links' names.
    pub(crate) cards: BTreeMap<String, Card>,
    /// Links by which the host reaches cards, by the links that those are on.
    pub(crate) access: BTreeMap<String, Access>,
    /// Tables of `nft`'s as they were after they were set last.
    tables: BTreeMap<String, String>,
}

impl Helper {
    /// Adopts what lives, removes what does not, and starts networks that start by themselves.
    ///
    /// # Errors
    /// The rights are missing, or `nft`.
    pub async fn start(store: Store) -> Result<Arc<Mutex<Self>>> {
        let links = Links::open()?;
        // Tells at once whether there is an `nft` that may do something.
        let tables = nft::tables("netdev").await?;
        let helper = Self {
            me: Weak::new(),
            links,
            store,
            networks: BTreeMap::new(),
            bridges: BTreeMap::new(),
            cards: BTreeMap::new(),
            access: BTreeMap::new(),
            tables: BTreeMap::new(),
        };
        let helper = Arc::new(Mutex::new(helper));
        let mut this = helper.lock().await;
        this.me = Arc::downgrade(&helper);
        // First, for what was interrupted may be the host's way out.
        this.adopt_bridges().await?;
        this.adopt_networks().await?;
        this.adopt_cards(tables).await?;
        this.start_networks().await?;
        this.adopt_access().await;
        drop(this);
        Ok(helper)
    }

    async fn adopt_cards(&mut self, tables: Vec<String>) -> Result<()> {
        let links = self.links.all().await?;
        let mut dead = Vec::new();
        for card in self.store.cards()? {
            let link =
                links.iter().find(|link| link.name == card.interface && Some(link.index) == card.index);
            let process = Process::open(card.pid);
            match process {
                Ok(process) if link.is_some() && process.started == card.started => {
                    let interface = card.interface.clone();
                    self.watch(&card, Arc::new(process));
                    if let Some(net) = card.network().and_then(|name| self.networks.get(name))
                        && let Err(error) = net.reserve(&card)
                    {
                        eprintln!("warning: {error}");
                    }
                    let net = card.network().and_then(|name| self.networks.get(name));
                    let as_set = card.filter_hash == Some(hash(&card.filter(net).script()));
                    self.cards.insert(interface.clone(), card);
                    let table = filter::table(&interface);
                    // What it remembers of connections is kept, unless another version of the helper made it.
                    match nft::table(&table).await?.filter(|_| as_set) {
                        Some(text) => _ = self.tables.insert(table, text),
                        None => self.set_filter(&interface).await?,
                    }
                }
                _ => dead.push(card),
            }
        }
        // What the living share with one is not to go with it.
        for card in dead {
            self.unplug(&card).await;
        }
        let devices = self.cards.values().filter_map(|card| self.savi_device(card));
        let devices: BTreeSet<_> = devices.map(str::to_owned).collect();
        for device in &devices {
            // Another version of the helper may have made sets of another kind.
            if self.set_savi(device, "").await.is_err() {
                self.set_savi(device, &savi::without(device)).await?;
            }
        }
        for table in tables {
            if let Some(interface) = table.strip_prefix("lodge-")
                && !self.cards.contains_key(interface)
            {
                nft::apply(&filter::without(interface)).await?;
            }
            if let Some(device) = table.strip_prefix("lodge6-")
                && !devices.contains(device)
            {
                nft::apply(&savi::without(device)).await?;
            }
        }
        Ok(())
    }

    /// Removes a card when its process ends.
    pub(crate) fn watch(&self, card: &Card, process: Arc<Process>) {
        let (me, interface, index) = (self.me.clone(), card.interface.clone(), card.index);
        tokio::spawn(async move {
            process.ended().await;
            let Some(helper) = me.upgrade() else { return };
            let mut helper = helper.lock().await;
            // Another one may have its name by now.
            if helper.cards.get(&interface).is_some_and(|card| card.index == index)
                && let Some(card) = helper.cards.remove(&interface)
            {
                helper.unplug(&card).await;
            }
        });
    }

    /// Does what somebody asks for.
    ///
    /// # Errors
    /// It may not be, or cannot.
    pub async fn serve(
        &mut self,
        rights: &Rights,
        peer: &Peer,
        request: Request,
    ) -> Result<(Answer, Vec<OwnedFd>)> {
        let answer = match request {
            Request::Attach(attach) => {
                rights.attach(&attach.to)?;
                if attach.spoofing {
                    rights.spoof()?;
                }
                attach.forwards.iter().try_for_each(|forward| rights.listen(forward.listen.port()))?;
                let (attached, descriptors) = self.attach(peer, *attach).await?;
                return Ok((Answer::Attached(attached), descriptors));
            }
            Request::Create(ref network) if peer.uid != 0 => {
                rights.manage()?;
                addresses::check_private(network)?;
                Answer::Done(self.manage(request).await?)
            }
            Request::Apply(ref declared) if peer.uid != 0 => {
                rights.manage()?;
                declared.networks.iter().try_for_each(addresses::check_private)?;
                Answer::Done(self.manage(request).await?)
            }
            Request::Detach { interface } => {
                self.detach(peer, &interface).await?;
                Answer::Done(Vec::new())
            }
            Request::List => {
                rights.see()?;
                Answer::Networks(self.list().await?)
            }
            Request::Leases { network } => {
                rights.see()?;
                Answer::Leases(self.known(&network)?.leases.list())
            }
            Request::Check { network } => {
                rights.see()?;
                Answer::Problems(self.diagnose(network.as_deref()).await?)
            }
            request => {
                rights.manage()?;
                Answer::Done(self.manage(request).await?)
            }
        };
        Ok((answer, Vec::new()))
    }

    async fn manage(&mut self, request: Request) -> Result<Vec<String>> {
        match request {
            Request::Create(network) => self.create(*network).await,
            Request::Apply(declared) => self.apply(*declared).await,
            Request::Start { network } => self.start_network(&network).await.map(|()| Vec::new()),
            Request::Stop { network, force } => self.stop(&network, force).await.map(|()| Vec::new()),
            Request::Remove { network, force } => self.remove(&network, force).await.map(|()| Vec::new()),
            Request::CreateBridge { bridge, force } => self.make_bridge(bridge, force).await,
            Request::RemoveBridge { name, force } => self.remove_bridge(&name, force).await,
            _ => Err(Error::new("this needs no rights to change networks")),
        }
    }

    async fn list(&self) -> Result<Vec<Status>> {
        let counters = nft::counters().await?;
        let count = |table: String, name: &str| counters.get(&(table, name.to_owned())).copied().unwrap_or(0);
        let spoofed = |card: &Card| {
            let device = self.savi_device(card).unwrap_or_default();
            count(format!("lodge-{}", card.interface), "spoofed")
                + count(format!("lodge6-{device}"), &card.interface)
        };
        let cards = |belongs: &dyn Fn(&Card) -> bool| {
            let cards = self.cards.values().filter(|card| belongs(card)).map(|card| netctl::Card {
                vm: card.vm.clone(),
                pid: card.pid,
                mac: card.mac,
                address: card.address,
                interface: card.interface.clone(),
                spoofed: spoofed(card),
                denied: count(format!("lodge-{}", card.interface), "denied"),
            });
            cards.collect()
        };
        let status = |net: &Net| Status {
            network: Some(net.declared.clone()),
            device: net.device.clone(),
            active: net.active,
            cards: cards(&|card| card.network() == Some(&net.declared.name)),
        };
        let mut list: Vec<_> = self.networks.values().map(status).collect();
        let mut others: Vec<_> = self.cards.values().filter_map(Card::link).collect();
        others.extend(self.bridges.keys());
        others.sort_unstable();
        others.dedup();
        let others = others.into_iter().map(|device| Status {
            network: None,
            device: device.clone(),
            active: true,
            cards: cards(&|card| card.link() == Some(device)),
        });
        list.extend(others);
        Ok(list)
    }

    /// Sets the rules between networks as they are to be now.
    pub(crate) async fn set_firewall(&mut self) -> Result<()> {
        let active = self.networks.values().filter(|net| net.active);
        let nets: Vec<_> = active.map(Net::firewall).collect();
        let ports = self.cards.values().filter_map(|card| Some((card.address?, &card.forwards)));
        let ports: Vec<_> = ports
            .flat_map(|(address, forwards)| forwards.iter().map(move |forward| (address, *forward)))
            .filter(|(_, forward)| forward.by_kernel())
            .collect();
        let script = firewall::script(&nets, &ports);
        self.set_table(firewall::TABLE, &script).await
    }

    /// Sets the rules of a card that is connected.
    pub(crate) async fn set_filter(&mut self, interface: &str) -> Result<()> {
        let Some(card) = self.cards.get(interface) else { return Ok(()) };
        let net = card.network().and_then(|name| self.networks.get(name));
        let script = card.filter(net).script();
        self.set_table(&filter::table(interface), &script).await?;
        let Some(card) = self.cards.get_mut(interface) else { return Ok(()) };
        card.filter_hash = Some(hash(&script));
        self.store.keep_card(card)
    }

    /// The bridge or link on which a card keeps to its own IPv6 addresses, if it is to.
    fn savi_device<'a>(&'a self, card: &'a Card) -> Option<&'a str> {
        let network = card.network().and_then(|name| self.networks.get(name));
        let device = network.map(|net| &net.device);
        (!card.spoofing).then_some(device.or_else(|| card.link())?).map(String::as_str)
    }

    /// Has the cards on a bridge or link keep to their IPv6 addresses. `first`: a script that comes before.
    async fn set_savi(&mut self, device: &str, first: &str) -> Result<()> {
        let links = self.links.all().await?;
        // The end of one whose link is gone is about to be noticed.
        let is_there = |card: &&Card| links.iter().any(|link| Some(link.index) == card.index);
        let cards = self.cards.values().filter(|card| self.savi_device(card) == Some(device));
        let cards = cards.filter(is_there).map(Card::source);
        let script = first.to_owned() + &savi::script(device, cards);
        self.set_table(&savi::table(device), &script).await
    }

    /// Has a card that is connected keep to its IPv6 addresses.
    pub(crate) async fn set_source(&mut self, card: &Card) -> Result<()> {
        match self.savi_device(card).map(str::to_owned) {
            Some(device) => self.set_savi(&device, "").await,
            None => Ok(()),
        }
    }

    /// Forgets a card, and who had which address if there is nobody left to take it.
    pub(crate) async fn drop_source(&mut self, card: &Card) -> Result<()> {
        let Some(device) = self.savi_device(card).map(str::to_owned) else { return Ok(()) };
        let table = savi::table(&device);
        if self.cards.values().any(|card| self.savi_device(card) == Some(&device)) {
            return self.set_savi(&device, &savi::without_card(&device, &card.interface)).await;
        }
        self.tables.remove(&table);
        nft::apply(&savi::without(&device)).await
    }

    pub(crate) async fn set_table(&mut self, table: &str, script: &str) -> Result<()> {
        nft::apply(script).await?;
        match nft::table(table).await? {
            Some(text) => self.tables.insert(table.to_owned(), text),
            None => self.tables.remove(table),
        };
        Ok(())
    }

    /// Forgets the rules of a card.
    pub(crate) async fn drop_filter(&mut self, interface: &str) -> Result<()> {
        self.tables.remove(&filter::table(interface));
        nft::apply(&filter::without(interface)).await
    }

    /// Sets those tables again that somebody has changed or removed, and tells which.
    ///
    /// # Errors
    /// It is not known how they are, or they cannot be set.
    pub async fn repair(&mut self) -> Result<Vec<String>> {
        let names: Vec<_> = self.tables.keys().cloned().collect();
        let whole: String = self.tables.values().map(String::as_str).collect();
        if nft::listed(&names).await?.is_some_and(|now| now == whole) {
            return Ok(Vec::new());
        }
        let links = self.links.all().await?;
        let (mut repaired, mut failed) = (Vec::new(), None);
        for name in names {
            let (interface, device) =
                (name.strip_prefix("netdev lodge-"), name.strip_prefix("netdev lodge6-"));
            // A link that is gone takes its chains along, and its process's end is about to be noticed.
            let gone = |name: &str| links.iter().all(|link| link.name != name);
            let lost = |device| {
                self.cards
                    .values()
                    .any(|card| self.savi_device(card) == Some(device) && gone(&card.interface))
            };
            if interface.is_some_and(gone)
                || device.is_some_and(lost)
                || nft::table(&name).await?.as_ref() == self.tables.get(&name)
            {
                continue;
            }
            let set = match (interface, device) {
                (Some(interface), _) => match self.access_by(interface) {
                    Some(parent) => self.set_access_filter(&parent).await,
                    None => self.set_filter(interface).await,
                },
                (None, Some(device)) => self.set_savi(device, &savi::without(device)).await,
                (None, None) => self.set_firewall().await,
            };
            match set {
                Ok(()) => repaired.push(name),
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(repaired), Err)
    }
}

/// By which a script is known again.
fn hash(script: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    script.hash(&mut hasher);
    hasher.finish()
}
