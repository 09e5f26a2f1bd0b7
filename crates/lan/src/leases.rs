//! Which card has which address.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use ipnet::Ipv4Net;
use netctl::{Host, Lease, Mac};
use serde::{Deserialize, Serialize};

use crate::names::label;

/// Cards that are remembered at most, however large the network.
const MOST: usize = 1 << 16;
/// A lease in the file is so many bytes at most.
const LONGEST: u64 = 512;
/// A user's name or card that was not connected for so long is anybody's, in seconds.
const HOLD: u64 = 30 * 24 * 3600;
/// When a card has asked is written down so often, in seconds.
const FRESH: u64 = 60;

/// Why a card has no address, or cannot be remembered.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    /// All are given to cards that are connected, or declared.
    #[error(
        "all {count} addresses of {net} are given to connected or declared cards; `lodge net leases` shows to whom: stop a VM that \
         need not run, or make a larger network"
    )]
    Full { count: usize, net: Ipv4Net },
    /// The address wished for is another's.
    #[error("{address} belongs to {owner}; choose another address, or none")]
    Taken { address: Ipv4Addr, owner: String },
    /// The address wished for is no guest's of this network.
    #[error("{address} is no address for a guest in {net}, where the host is {host}")]
    Outside { address: Ipv4Addr, net: Ipv4Net, host: Ipv4Addr },
    /// The address wished for is not the one that the network declares.
    #[error("{mac} is declared to have {declared} in this network, not {address}")]
    Declared { mac: Mac, declared: Ipv4Addr, address: Ipv4Addr },
    /// The card is another user's.
    #[error("{mac} is the address of another user's VM, {vm}")]
    ForeignCard { mac: Mac, vm: String },
    /// Two cards with one address, or one card with two.
    #[error("{0} is declared twice")]
    Twice(String),
    /// The file cannot be used.
    #[error("the leases in {} cannot be kept: {error}", path.display())]
    File { path: PathBuf, error: io::Error },
}

/// What is remembered of a card.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    mac: Mac,
    address: Ipv4Addr,
    /// The name of the VM whose card it was last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vm: Option<String>,
    /// The user whose VM that was first. Nobody's, if it was connected by a version that did not ask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    owner: Option<u32>,
    /// When it was connected last or went, in seconds since 1970.
    used: u64,
    /// When it asked last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    seen: Option<u64>,
}

/// The addresses of one network, and whose they are. Kept in a file.
#[derive(Debug)]
pub struct Leases {
    path: PathBuf,
    pool: Ipv4Net,
    fixed: HashMap<Mac, Host>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By address; each card once. Those of declared cards are the declared ones.
    entries: BTreeMap<Ipv4Addr, Entry>,
    cards: HashMap<Mac, Ipv4Addr>,
    connected: HashSet<Mac>,
}

impl State {
    fn add(&mut self, entry: Entry) {
        if let Some(before) = self.cards.insert(entry.mac, entry.address) {
            self.entries.remove(&before);
        }
        if let Some(other) = self.entries.insert(entry.address, entry.clone())
            && other.mac != entry.mac
        {
            self.cards.remove(&other.mac);
        }
    }

    fn card(&mut self, mac: Mac) -> Option<&mut Entry> {
        self.entries.get_mut(self.cards.get(&mac)?)
    }

    /// Whose it is, if it is somebody's still.
    fn owner(&self, entry: &Entry) -> Option<u32> {
        let used = entry.used.max(entry.seen.unwrap_or(0));
        let held = self.connected.contains(&entry.mac) || now().saturating_sub(used) < HOLD;
        entry.owner.filter(|_| held)
    }

    fn may_be_called(&self, vm: &str, uid: u32) -> bool {
        let (Some(name), false) = (label(vm), uid == 0) else { return true };
        let called =
            self.entries.values().filter(|entry| entry.vm.as_deref().and_then(label).as_ref() == Some(&name));
        let owners: HashSet<u32> = called.filter_map(|entry| self.owner(entry)).collect();
        // Who has it already keeps it, whatever root has done since.
        owners.is_empty() || owners.contains(&uid)
    }
}

impl Leases {
    /// Those in the file at `path`, or none yet, for a network in which the host has the address `pool`, and `fixed` are declared.
    /// A file that makes no sense is set aside.
    ///
    /// # Errors
    /// The file cannot be read, or what is declared cannot be.
    pub fn open(path: &Path, pool: Ipv4Net, fixed: Vec<Host>) -> Result<Self, Error> {
        let failed = |error| Error::File { path: path.into(), error };
        let mut leases =
            Self { path: path.into(), pool, fixed: HashMap::new(), state: Mutex::new(State::default()) };
        let mut addresses = HashSet::new();
        for host in fixed {
            leases.inside(host.address)?;
            if !addresses.insert(host.address) {
                return Err(Error::Twice(host.address.to_string()));
            }
            if let Some(before) = leases.fixed.insert(host.mac, host) {
                return Err(Error::Twice(before.mac.to_string()));
            }
        }
        let entries = match leases.read() {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                let aside = PathBuf::from([path.as_os_str(), ".damaged".as_ref()].join("".as_ref()));
                fs::rename(path, &aside).map_err(failed)?;
                eprintln!(
                    "{} is damaged ({error}) and was set aside as {}; guests get new addresses",
                    path.display(),
                    aside.display()
                );
                Vec::new()
            }
            Err(error) => return Err(failed(error)),
        };
        let state = leases.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        for mut entry in entries {
            // What is declared may have changed since.
            match leases.fixed.get(&entry.mac) {
                Some(host) => entry.address = host.address,
                None if addresses.contains(&entry.address) => continue,
                None => {}
            }
            let known = state.entries.contains_key(&entry.address) || state.cards.contains_key(&entry.mac);
            if is_inside(pool, entry.address) && !known && state.entries.len() < MOST {
                state.add(entry);
            }
        }
        Ok(leases)
    }

    /// Whether a user may connect this card: it is not another user's. Root may all.
    ///
    /// # Errors
    /// It is.
    pub fn check_owner(&self, mac: Mac, uid: u32) -> Result<(), Error> {
        let mut state = self.lock();
        let Some(entry) = state.card(mac).map(|entry| entry.clone()) else { return Ok(()) };
        match state.owner(&entry) {
            Some(owner) if uid != 0 && owner != uid => {
                Err(Error::ForeignCard { mac, vm: entry.vm.unwrap_or_default() })
            }
            _ => Ok(()),
        }
    }

    /// Whether a user's VM is found by this name: it is not that of another user's.
    pub fn may_be_called(&self, vm: &str, uid: u32) -> bool {
        self.lock().may_be_called(vm, uid)
    }

    /// The address that this card always gets: the declared one, else `wanted`, else that of before, else a free one; and if none is
    /// free, that of the card that was connected the longest time ago, of the user with most such. The card is `vm`'s, which is the user
    /// `uid`'s, and connected from now on; it is found by that name if it may be.
    ///
    /// # Errors
    /// There is no such address, or it cannot be written down.
    pub fn reserve(&self, mac: Mac, vm: &str, uid: u32, wanted: Option<Ipv4Addr>) -> Result<Ipv4Addr, Error> {
        let mut state = self.lock();
        let before = state.card(mac).map(|entry| (entry.address, entry.seen));
        // What root does with a user's card takes it from nobody.
        let owner = state.card(mac).and_then(|entry| entry.owner).filter(|_| uid == 0).unwrap_or(uid);
        let address = match (self.fixed.get(&mac), wanted) {
            (Some(host), Some(address)) if host.address != address => {
                return Err(Error::Declared { mac, declared: host.address, address });
            }
            (Some(host), _) => host.address,
            (None, Some(address)) => self.free(&state, mac, address)?,
            (None, None) => match before {
                Some((address, _)) => address,
                None => self.choose(&mut state)?,
            },
        };
        let seen = before.and_then(|(before, seen)| seen.filter(|_| before == address));
        let vm = state.may_be_called(vm, uid).then(|| vm.to_owned());
        state.add(Entry { mac, address, vm, owner: Some(owner), used: now(), seen });
        // Who would lose an address that is not written down has none.
        self.write(&state)?;
        state.connected.insert(mac);
        Ok(address)
    }

    /// The card is no longer connected. Its address remains its own.
    pub fn release(&self, mac: Mac) {
        let mut state = self.lock();
        if !state.connected.remove(&mac) {
            return;
        }
        if let Some(entry) = state.card(mac) {
            entry.used = now();
        }
        self.write_or_tell(&state);
    }

    /// All, by address.
    pub fn list(&self) -> Vec<Lease> {
        let state = self.lock();
        let mut all: BTreeMap<Ipv4Addr, Lease> = BTreeMap::new();
        for host in self.fixed.values() {
            let (mac, address, name) = (host.mac, host.address, host.name.clone());
            all.insert(
                address,
                Lease { mac, address: address.into(), name, owner: None, seen: None, fixed: true },
            );
        }
        for entry in state.entries.values() {
            let Entry { mac, address, vm, seen, .. } = entry;
            let owner = state.owner(entry);
            let declared = self.fixed.get(mac);
            let name = declared.and_then(|host| host.name.clone()).or_else(|| vm.clone());
            let fixed = declared.is_some();
            all.insert(
                *address,
                Lease { mac: *mac, address: (*address).into(), name, owner, seen: *seen, fixed },
            );
        }
        all.into_values().collect()
    }

    /// The address of a card that is connected, and the VM's name.
    pub(crate) fn connected(&self, mac: Mac) -> Option<(Ipv4Addr, Option<String>)> {
        let mut state = self.lock();
        let connected = state.connected.contains(&mac);
        let entry = state.card(mac).filter(|_| connected)?;
        Some((entry.address, entry.vm.clone()))
    }

    /// The card has asked for its address.
    pub(crate) fn seen(&self, mac: Mac) {
        let mut state = self.lock();
        let now = now();
        let Some(entry) = state.card(mac) else { return };
        if entry.seen.is_none_or(|seen| now.abs_diff(seen) >= FRESH) {
            entry.seen = Some(now);
            self.write_or_tell(&state);
        }
    }

    /// The addresses of those who are called so, in lower case: what is declared, else VMs that are connected, else those that were.
    pub(crate) fn called(&self, name: &str) -> Vec<Ipv4Addr> {
        let is = |other: &Option<String>| other.as_deref().and_then(label).is_some_and(|other| other == name);
        if let Some(host) = self.fixed.values().find(|host| is(&host.name)) {
            return vec![host.address];
        }
        let state = self.lock();
        let all: Vec<&Entry> = state.entries.values().filter(|entry| is(&entry.vm)).collect();
        let connected = all.iter().filter(|entry| state.connected.contains(&entry.mac));
        let connected: Vec<Ipv4Addr> = connected.map(|entry| entry.address).collect();
        let before = || all.iter().max_by_key(|entry| entry.used).map(|entry| entry.address);
        if connected.is_empty() { before().into_iter().collect() } else { connected }
    }

    /// The name of whoever has this address, in lower case.
    pub(crate) fn name(&self, address: Ipv4Addr) -> Option<String> {
        let declared = self.fixed.values().find(|host| host.address == address);
        if let Some(name) = declared.and_then(|host| label(host.name.as_deref()?)) {
            return Some(name);
        }
        label(self.lock().entries.get(&address)?.vm.as_deref()?)
    }

    /// Addresses that guests can have.
    fn size(&self) -> usize {
        let len = u32::from(self.pool.prefix_len());
        // Neither the network's own, nor the broadcast one, nor the host's.
        usize::try_from(1u64.checked_shl(32 - len).unwrap_or(0).saturating_sub(3)).unwrap_or(usize::MAX)
    }

    fn inside(&self, address: Ipv4Addr) -> Result<(), Error> {
        let (net, host) = (self.pool.trunc(), self.pool.addr());
        if is_inside(self.pool, address) { Ok(()) } else { Err(Error::Outside { address, net, host }) }
    }

    /// `address`, if the card can have it.
    fn free(&self, state: &State, mac: Mac, address: Ipv4Addr) -> Result<Ipv4Addr, Error> {
        self.inside(address)?;
        let named = |name: &Option<String>, mac: Mac| match name {
            Some(name) => format!("{name} ({mac})"),
            None => mac.to_string(),
        };
        let declared = self.fixed.values().find(|host| host.address == address);
        let owner = match state.entries.get(&address) {
            _ if let Some(host) = declared => Some(named(&host.name, host.mac)),
            Some(entry) if entry.mac != mac => Some(named(&entry.vm, entry.mac)),
            _ => None,
        };
        owner.map_or(Ok(address), |owner| Err(Error::Taken { address, owner }))
    }

    /// One for a card that never had any.
    fn choose(&self, state: &mut State) -> Result<Ipv4Addr, Error> {
        let declared: HashSet<Ipv4Addr> = self.fixed.values().map(|host| host.address).collect();
        let taken = |address: &Ipv4Addr| state.entries.contains_key(address) || declared.contains(address);
        let most = self.size().min(MOST);
        if state.entries.len() < most
            && let Some(free) = self
                .pool
                .hosts()
                .filter(|address| *address != self.pool.addr())
                .find(|address| !taken(address))
        {
            return Ok(free);
        }
        let gone = state.entries.values().filter(|entry| !state.connected.contains(&entry.mac));
        let gone: Vec<&Entry> = gone.filter(|entry| !self.fixed.contains_key(&entry.mac)).collect();
        // Who connects one card after another drives out nobody's but their own.
        let mut counts = HashMap::<Option<u32>, usize>::new();
        gone.iter().for_each(|entry| *counts.entry(entry.owner).or_default() += 1);
        let used = |entry: &&&Entry| entry.used.max(entry.seen.unwrap_or(0));
        let oldest = gone.iter().min_by_key(|entry| (Reverse(counts[&entry.owner]), used(entry)));
        let oldest = oldest.map(|entry| (entry.mac, entry.address));
        let (mac, address) = oldest.ok_or(Error::Full { count: most, net: self.pool.trunc() })?;
        state.entries.remove(&address);
        state.cards.remove(&mac);
        Ok(address)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> io::Result<Vec<Entry>> {
        let mut text = Vec::new();
        let most = (self.size().min(MOST) as u64 + 1) * LONGEST;
        File::open(&self.path)?.take(most).read_to_end(&mut text)?;
        Ok(serde_json::from_slice(&text)?)
    }

    fn write(&self, state: &State) -> Result<(), Error> {
        let write = || {
            let entries: Vec<&Entry> = state.entries.values().collect();
            let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let mut file = tempfile::NamedTempFile::new_in(dir)?;
            file.write_all(&serde_json::to_vec(&entries)?)?;
            file.as_file().sync_all()?;
            file.persist(&self.path)?;
            File::open(dir)?.sync_all()
        };
        write().map_err(|error| Error::File { path: self.path.clone(), error })
    }

    fn write_or_tell(&self, state: &State) {
        if let Err(error) = self.write(state) {
            eprintln!("{error}");
        }
    }
}

/// A guest may have it.
fn is_inside(pool: Ipv4Net, address: Ipv4Addr) -> bool {
    pool.contains(&address) && ![pool.network(), pool.broadcast(), pool.addr()].contains(&address)
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
