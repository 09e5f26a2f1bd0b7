//! `lodge net`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

pub(super) const NET_EXAMPLES: &str = "\
Examples:
  lodge run debian --network default        on a network that is made on first use
  lodge net create lab --isolated           one without a way out
  lodge net leases default
  lodge net bridge create br0 --port eth0   then: lodge run --network bridge=br0
  lodge net check                           why does it not work?

These need `lodge-netd`, Lodge's privileged helper, to run; root needs not start it.";

/// `lodge net`.
#[derive(Debug, Subcommand)]
pub enum Net {
    /// List networks, and what is connected to them
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a network, and start it
    Create(NetCreate),
    /// Print what a network is, as a file for `lodge net apply` has it, and what is connected
    Inspect {
        /// Its name
        name: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Start a network
    Start {
        /// Its name
        name: String,
    },
    /// Stop a network, until it is started or used again
    Stop {
        /// Its name
        name: String,
        /// Even if guests are connected: their cables are out then
        #[arg(long)]
        force: bool,
    },
    /// Remove a network
    Rm {
        /// Its name
        name: String,
        /// Even if guests are connected
        #[arg(long)]
        force: bool,
    },
    /// List the addresses that a network has given
    Leases {
        /// Its name
        name: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Find out why a network does not work. Exit status 1 if something is found
    Check {
        /// Its name [default: all]
        name: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make networks and bridges as a TOML file declares them; what is so already is left alone
    Apply {
        /// The file; `-` is standard input
        file: PathBuf,
    },
    /// Print the JSON schema of such files
    Schema,
    /// Make a bridge over links of this host, or remove it
    #[command(subcommand)]
    Bridge(NetBridge),
}

/// `lodge net create`.
#[derive(Debug, Args)]
pub struct NetCreate {
    /// Its name: letters, digits and `-`
    pub name: String,
    /// Its guests reach nobody but each other and this host
    #[arg(long, conflicts_with = "routed")]
    pub isolated: bool,
    /// The world reaches its guests, if it knows a route; nothing is translated
    #[arg(long)]
    pub routed: bool,
    /// Its addresses, such as 192.168.200.0/24 [default: free ones]
    #[arg(long, value_name = "ADDRESS/BITS")]
    pub ipv4: Option<ipnet::Ipv4Net>,
    /// The same for IPv6, 64 bits [default: made by chance]
    #[arg(long, value_name = "ADDRESS/64")]
    pub ipv6: Option<ipnet::Ipv6Net>,
    /// The bridge that it has on this host [default: virbr and a number]
    #[arg(long, value_name = "LINK")]
    pub device: Option<String>,
    /// Start it only when it is used
    #[arg(long)]
    pub no_autostart: bool,
}

/// `lodge net bridge`.
#[derive(Debug, Subcommand)]
pub enum NetBridge {
    /// Make a bridge whose port a link of this host becomes; the link's addresses and routes move to it
    Create {
        /// Its name
        name: String,
        /// A link of this host. May be given several times
        #[arg(long = "port", value_name = "LINK")]
        ports: Vec<String>,
        /// Even if it may cut you off
        #[arg(long)]
        force: bool,
    },
    /// Remove a bridge that was so made; addresses and routes move back
    Rm {
        /// Its name
        name: String,
        /// Even if guests are connected
        #[arg(long)]
        force: bool,
    },
}
