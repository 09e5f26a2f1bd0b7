//! What outlives the helper: definitions of networks, and which cards are connected. Files are written whole or not at all.

use std::fs::{self, File};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use netctl::{Forward, Mac, Network, Rule, Target};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::{Context, Error, Result};

/// A card that is connected, as the next start of the helper finds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// The VM's name.
    pub vm: String,
    /// Its process.
    pub pid: u32,
    /// When that started, in ticks since the host did: a number is used again some day.
    pub started: u64,
    /// Whose it is.
    pub uid: u32,
    /// The card's address.
    pub mac: Mac,
    /// What it is connected to.
    pub to: Target,
    /// The host's link for it.
    pub interface: String,
    /// Its number; none before it was made.
    pub index: Option<u32>,
    /// The card's address, if it is known.
    pub address: Option<Ipv4Addr>,
    /// It may pretend to be others.
    pub spoofing: bool,
    /// What it may reach and be reached by.
    pub rules: Vec<Rule>,
    /// Ports that lead to it.
    pub forwards: Vec<Forward>,
    /// Addresses by which the host reaches it on one of its links.
    #[serde(default)]
    pub learned: Vec<IpAddr>,
    /// By which its rules, as they were set last, are known again.
    #[serde(default)]
    pub filter_hash: Option<u64>,
}

/// Where it is.
#[derive(Debug)]
pub struct Store {
    state: PathBuf,
    runtime: PathBuf,
    /// Held as long as the helper lives.
    _lock: File,
}

impl Store {
    /// Opens it; nobody else may have it open.
    ///
    /// # Errors
    /// Somebody has, or the directories cannot be made.
    pub fn open(state: &Path, runtime: &Path) -> Result<Self> {
        for directory in [state, runtime] {
            fs::create_dir_all(directory).context(|| format!("{} cannot be made", directory.display()))?;
        }
        let path = runtime.join("lock");
        let lock = File::create(&path).context(|| format!("{} cannot be made", path.display()))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            Error::new("another lodge-netd runs already")
                .help("one is enough for all; systemctl status lodge-netd")
        })?;
        Ok(Self { state: state.into(), runtime: runtime.into(), _lock: lock })
    }

    /// Where a file may be for a moment.
    pub fn runtime(&self) -> &Path {
        &self.runtime
    }

    /// Where definitions are.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Where a network's leases are.
    pub fn leases(&self, network: &str) -> PathBuf {
        self.state.join(format!("{network}.leases.json"))
    }

    fn definition(&self, network: &str) -> PathBuf {
        self.state.join(format!("{network}.toml"))
    }

    fn card(&self, interface: &str) -> PathBuf {
        self.runtime.join(format!("{interface}.json"))
    }

    /// All definitions; those that cannot be read are told of and left alone.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn networks(&self) -> Result<Vec<Network>> {
        let mut networks = Vec::new();
        for path in files(&self.state, "toml")? {
            let network = fs::read_to_string(&path).map_err(|error| error.to_string());
            let network = network.and_then(|text| toml::from_str(&text).map_err(|error| error.to_string()));
            match network {
                Ok::<Network, _>(network) if path == self.definition(&network.name) => networks.push(network),
                Ok(_) => eprintln!("warning: {} has another network's name", path.display()),
                Err(error) => eprintln!("warning: {} cannot be read: {error}", path.display()),
            }
        }
        Ok(networks)
    }

    /// Keeps a definition.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn keep(&self, network: &Network) -> Result<()> {
        let text = toml::to_string_pretty(network).context(|| "the network cannot be written down".into())?;
        write(&self.definition(&network.name), text.as_bytes())
    }

    /// Forgets a definition, and the leases.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn forget(&self, network: &str) -> Result<()> {
        remove(&self.leases(network))?;
        remove(&self.definition(network))
    }

    /// All cards that were connected; files that cannot be read are removed.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn cards(&self) -> Result<Vec<Card>> {
        let mut cards = Vec::new();
        for path in files(&self.runtime, "json")? {
            match fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Card>(&bytes).ok()) {
                Some(card) if path == self.card(&card.interface) => cards.push(card),
                _ => remove(&path)?,
            }
        }
        Ok(cards)
    }

    /// Keeps a card.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn keep_card(&self, card: &Card) -> Result<()> {
        let bytes = serde_json::to_vec(card).context(|| "the card cannot be written down".into())?;
        write(&self.card(&card.interface), &bytes)
    }

    /// Forgets a card.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn forget_card(&self, interface: &str) -> Result<()> {
        remove(&self.card(interface))
    }
}

pub(crate) fn files(directory: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).context(|| format!("{} cannot be read", directory.display()))?;
    let paths = entries.flatten().map(|entry| entry.path());
    let mut paths: Vec<_> =
        paths.filter(|path| path.extension().is_some_and(|end| end == extension)).collect();
    // Leases are the business of those who give them.
    paths.retain(|path| !path.to_string_lossy().ends_with(".leases.json"));
    paths.sort();
    Ok(paths)
}

/// Writes something down.
pub(crate) fn write_json(path: &Path, what: &impl Serialize) -> Result<()> {
    let bytes = serde_json::to_vec(what).context(|| format!("{} cannot be written", path.display()))?;
    write(path, &bytes)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let written = || -> std::io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        File::open(directory)?.sync_all()
    };
    written().context(|| format!("{} cannot be written", path.display()))
}

pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context(|| format!("{} cannot be removed", path.display()))
        }
        _ => Ok(()),
    }
}
