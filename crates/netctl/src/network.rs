use std::net::Ipv4Addr;

use ipnet::{Ipv4Net, Ipv6Net};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Mac;

/// What a file declares: networks and bridges that are to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Declared {
    /// Networks.
    #[serde(default, rename = "network", skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<Network>,
    /// Bridges over the host's links.
    #[serde(default, rename = "bridge", skip_serializing_if = "Vec::is_empty")]
    pub bridges: Vec<Bridge>,
}

/// How guests of a network and the world outside reach each other. The guests and the host always do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Guests reach the world, to which they are the host. The world reaches forwarded ports.
    #[default]
    Nat,
    /// Both reach each other; the world must know a route to the guests.
    Routed,
    /// Not at all.
    Isolated,
}

/// A virtual network: a bridge of its own on the host, with a DHCP and a name server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Its name: 1 to 32 of the letters `a` to `z`, digits and `-`, a letter first.
    pub name: String,
    /// How its guests and the world reach each other.
    #[serde(default)]
    pub mode: Mode,
    /// The bridge on the host; `virbr` and a number if none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The host's address in it, and its length, such as `192.168.122.1/24` (8 to 29 bits); of the network's own address
    /// (`192.168.122.0/24`) the host takes the next. A free one if none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub ipv4: Option<Ipv4Net>,
    /// The same for IPv6, always of 64 bits. One made by chance (RFC 4193) if none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub ipv6: Option<Ipv6Net>,
    /// It starts with the helper.
    #[serde(default = "yes")]
    pub autostart: bool,
    /// Cards that always get the same address.
    #[serde(default, rename = "host", skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<Host>,
}

fn yes() -> bool {
    true
}

impl Network {
    /// Whether one may be called so.
    pub fn is_name(name: &str) -> bool {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        name.len() <= 32
            && name.starts_with(|first: char| first.is_ascii_lowercase())
            && name.bytes().all(plain)
    }

    /// One of which all is as usual.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            mode: Mode::Nat,
            device: None,
            ipv4: None,
            ipv6: None,
            autostart: true,
            hosts: Vec::new(),
        }
    }
}

/// A card that always gets the same address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// The card.
    pub mac: Mac,
    /// Its address, one of the network's.
    pub address: Ipv4Addr,
    /// By which others find it, beside the VM's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A bridge of the host's with links of the host's as its ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Bridge {
    /// Its name, of at most 15 characters.
    pub name: String,
    /// Links that are its ports; the bridge takes over the addresses and routes of the first that has some.
    #[serde(default)]
    pub ports: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_networks() {
        assert!(["default", "lab-2", "a"].into_iter().all(Network::is_name));
        let long = "a".repeat(33);
        assert!(!["", "2nd", "Lab", "a/b", "..", "-", &long].into_iter().any(Network::is_name));
    }
}
