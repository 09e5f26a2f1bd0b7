//! What the guests' network cards are connected to.
//!
//! [`user`] needs nothing of the host: the guest's packets end in this process, and sockets of its own carry their contents on. [`tap`] is a
//! link of the host's, which somebody with rights has made; [`forwards`] leads there from addresses that the kernel forwards nothing from.

#![forbid(unsafe_code)]

pub mod forwards;
pub mod tap;
pub mod user;

/// An Ethernet address.
pub use devices::net::Mac;
