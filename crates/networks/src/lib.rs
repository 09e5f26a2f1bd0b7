//! What the guests' network cards are connected to.
//!
//! [`user`] needs nothing of the host: the guest's packets end in this process, and sockets of its own carry their contents on.

#![forbid(unsafe_code)]

pub mod user;

/// An Ethernet address.
pub use devices::net::Mac;
