//! What Lodge and its privileged network helper (`lodge-netd`) say to each other.
//!
//! The helper listens at a Unix socket ([`socket`]). A client sends one line of JSON, a [`Request`], and is answered with one line, an
//! [`Answer`]; it may ask again then. The descriptors of what [`Request::Attach`] made come with the answer's first byte (`SCM_RIGHTS`).
//! Who asks the kernel tells the helper (`SO_PEERCRED`).
#![forbid(unsafe_code)]

mod client;
mod mac;
mod network;
mod rule;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use client::{Client, Error};
pub use mac::Mac;
pub use network::{Bridge, Declared, Host, Mode, Network};
pub use rule::{Action, Direction, Ports, Protocol, Rule};

/// A request at most, in bytes.
pub const LONGEST_REQUEST: usize = 1 << 20;
/// An answer at most, in bytes: 64 networks of 4096 declared hosts each are some 34 MB, and 65536 leases of one 12 MB.
pub const LONGEST_ANSWER: usize = 64 << 20;
/// Descriptors that come with an answer at most: one for each pair of a card's queues.
pub const MOST_QUEUES: usize = 8;

/// Where the helper listens: `LODGE_NETD_SOCKET`, or `/run/lodge/netd.sock`.
pub fn socket() -> PathBuf {
    std::env::var_os("LODGE_NETD_SOCKET").map_or_else(|| "/run/lodge/netd.sock".into(), PathBuf::from)
}

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// A card is to be connected: [`Answer::Attached`]. What is made for it ends with the client's process.
    Attach(Box<Attach>),
    /// A card that was connected is no more; so need not say who ends.
    Detach {
        /// [`Attached::interface`].
        interface: String,
    },
    /// All networks, bridges and what is connected: [`Answer::Networks`].
    List,
    /// A network is to be: [`Answer::Done`]. It starts at once.
    Create(Box<Network>),
    /// A network is to be as declared: made, changed or left alone. [`Answer::Done`].
    Apply(Box<Declared>),
    /// A network is to run.
    Start {
        /// Its name.
        network: String,
    },
    /// A network is to run no more, until it is started or used again.
    Stop {
        /// Its name.
        network: String,
        /// Even if cards are connected: their links go down.
        force: bool,
    },
    /// A network is to be no more, its leases neither.
    Remove {
        /// Its name.
        network: String,
        /// Even if cards are connected.
        force: bool,
    },
    /// Which addresses a network has given: [`Answer::Leases`].
    Leases {
        /// Its name.
        network: String,
    },
    /// What keeps networks from working: [`Answer::Problems`].
    Check {
        /// The network, or all.
        network: Option<String>,
    },
    /// A bridge over these ports is to be; the host's addresses and routes move to it.
    CreateBridge {
        /// The bridge, and its ports.
        bridge: Bridge,
        /// Even if that may cut off whoever asks.
        force: bool,
    },
    /// A bridge that was so made is to be no more; addresses and routes move back.
    RemoveBridge {
        /// Its name.
        name: String,
        /// Even if cards are connected.
        force: bool,
    },
}

/// What it is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It was done; what the user should know of it, a sentence each.
    Done(Vec<String>),
    /// The card is connected; descriptors come along.
    Attached(Attached),
    /// What there is.
    Networks(Vec<Status>),
    /// Addresses that were given.
    Leases(Vec<Lease>),
    /// What was found; nothing, if all is well.
    Problems(Vec<Problem>),
    /// It was not done.
    Refused {
        /// Why, in one sentence.
        why: String,
        /// What to do about it.
        help: Option<String>,
    },
}

/// What a card is to be connected to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// One of the helper's networks.
    Network(String),
    /// A bridge of the host's.
    Bridge(String),
    /// A link of the host's, by MacVTap.
    Direct {
        /// The link.
        link: String,
        /// How those on the same link reach each other.
        mode: Direct,
        /// The host gets a macvlan of its own there, by which it and the guest reach each other.
        host_access: bool,
    },
}

/// The modes of MacVTap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direct {
    /// Those on the same link reach each other directly.
    #[default]
    Bridge,
    /// By the switch at the link's other end.
    Vepa,
    /// Not at all.
    Private,
    /// There is no other one, and the link is the guest's alone.
    Passthru,
}

/// A card that is to be connected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// The VM's name, by which other guests find it.
    pub vm: String,
    /// The card's address, the only one that it may send from.
    pub mac: Mac,
    /// What to.
    pub to: Target,
    /// It was connected before, and lost that: nothing is made or started for it.
    pub again: bool,
    /// Descriptors, 1 to [`MOST_QUEUES`].
    pub queues: usize,
    /// The address that it is to have, and the only one that it may send from. On a network without, the helper chooses.
    pub address: Option<Ipv4Addr>,
    /// It may send from any address, answer for others, and serve them as router or DHCP server.
    pub spoofing: bool,
    /// What it may reach and be reached by; the first that applies counts, and what none applies to is allowed.
    pub rules: Vec<Rule>,
    /// Ports of the host's that lead to it. Those that the kernel does not forward its VM's process does, if the helper agrees.
    pub forwards: Vec<Forward>,
}

/// A port of the host's that leads to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// What it carries: TCP or UDP.
    pub protocol: Protocol,
    /// The host's address (unspecified: all of the address's kind) and port.
    pub listen: SocketAddr,
    /// The guest's port.
    pub port: u16,
}

impl Forward {
    /// Whether the kernel forwards it: it keeps loopback addresses to itself, and a guest's IPv6 address is not known.
    pub fn by_kernel(&self) -> bool {
        self.listen.is_ipv4() && !self.listen.ip().is_loopback()
    }
}

/// A card that is connected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The host's link for it.
    pub interface: String,
    /// The address that it gets, if the helper knows.
    pub address: Option<Ipv4Addr>,
    /// What the user should know, a sentence each.
    pub notes: Vec<String>,
}

/// A network or bridge, and what is connected to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What it is to be. None for bridges and links that are not the helper's networks.
    pub network: Option<Network>,
    /// Its link on the host.
    pub device: String,
    /// It runs.
    pub active: bool,
    /// What is connected.
    pub cards: Vec<Card>,
}

/// A card that is connected to something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// The VM's name.
    pub vm: String,
    /// Its process.
    pub pid: u32,
    /// Its address.
    pub mac: Mac,
    /// Its IPv4 address, if the helper knows it.
    pub address: Option<Ipv4Addr>,
    /// The host's link for it.
    pub interface: String,
    /// Frames of the guest's that were dropped because they pretended to be somebody else's.
    #[serde(default)]
    pub spoofed: u64,
    /// Frames either way that its rules denied.
    #[serde(default)]
    pub denied: u64,
}

/// An address that was given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// To which card.
    pub mac: Mac,
    /// The address.
    pub address: IpAddr,
    /// The name of the VM or host.
    pub name: Option<String>,
    /// The user whose VM it is: no other but root gets the card's address or the name. None, if it is nobody's any more, or only declared.
    #[serde(default)]
    pub owner: Option<u32>,
    /// It was asked for last, in seconds since 1970. None: it was kept for the card, and never asked for.
    pub seen: Option<u64>,
    /// It is declared, and nobody else gets it.
    pub fixed: bool,
}

/// What keeps a network from working.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The network, or none for the whole host.
    pub network: Option<String>,
    /// What it is, in one sentence.
    pub what: String,
    /// The command that mends it.
    pub command: Option<String>,
}
