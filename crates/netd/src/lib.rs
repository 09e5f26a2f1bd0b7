//! Lodge's privileged network helper: the only part of Lodge that may change the host's networks (CAP_NET_ADMIN).
//!
//! It makes taps, bridges and rules for those who may have them, and passes the descriptors over a socket (`netctl` has the protocol). What
//! it has made outlives it: the next start adopts what is still used and removes the rest.
#![forbid(unsafe_code)]

mod access;
pub mod addresses;
mod attach;
mod bridges;
mod check;
mod direct;
mod error;
pub mod filter;
pub mod firewall;
pub mod foreign;
mod helper;
mod iptables;
pub mod links;
mod moving;
mod networks;
pub mod nft;
pub mod policy;
mod process;
mod savi;
pub mod server;
pub mod settings;
mod store;
mod watch;

pub use error::{Context, Error, Result};
pub use helper::Helper;
pub use store::Store;
pub use watch::Changes;
