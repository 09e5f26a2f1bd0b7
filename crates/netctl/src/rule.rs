//! What a guest may reach and be reached by, in words: `deny out tcp 25`, `allow in tcp 22 from 192.0.2.0/24`, `deny in`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// A rule is about who begins: answers to what was let through always pass.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rule {
    /// What happens.
    pub action: Action,
    /// Which way.
    pub direction: Direction,
    /// Of which kind, or of all.
    pub protocol: Option<Protocol>,
    /// To which ports: the guest's own if it comes in, the other's if it goes out. Only TCP and UDP have some.
    pub ports: Option<Ports>,
    /// The other side: where it goes to, or comes from.
    pub peer: Option<IpNet>,
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Let it pass.
    Allow,
    /// Drop it.
    Deny,
}

/// Which way a rule is about, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the guest.
    In,
    /// From the guest.
    Out,
}

/// What is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Protocol {
    Tcp,
    Udp,
    /// Pings and the like; what IPv6 needs to work at all passes always.
    Icmp,
}

/// From one port to another, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// The lowest.
    pub first: u16,
    /// The highest.
    pub last: u16,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        })
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.first, self.last) {
            (first, last) if first == last => write!(f, "{first}"),
            (first, last) => write!(f, "{first}-{last}"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let action = if self.action == Action::Allow { "allow" } else { "deny" };
        let (direction, side) = if self.direction == Direction::In { ("in", "from") } else { ("out", "to") };
        write!(f, "{action} {direction}")?;
        self.protocol.iter().try_for_each(|protocol| write!(f, " {protocol}"))?;
        self.ports.iter().try_for_each(|ports| write!(f, " {ports}"))?;
        self.peer.iter().try_for_each(|peer| write!(f, " {side} {peer}"))
    }
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse(text).ok_or_else(|| {
            format!("\"{text}\" is no rule; write such as \"deny out tcp 25\", \"allow in udp 5000-5010\" or \"deny out to 10.0.0.0/8\"")
        })
    }
}

impl Rule {
    /// Whether these rules let something begin: of which kind, from or to whom, and to which port if it has one.
    pub fn allow(
        rules: &[Self],
        direction: Direction,
        protocol: Protocol,
        peer: IpAddr,
        port: Option<u16>,
    ) -> bool {
        let applies = |rule: &&Self| {
            let ports = |ports: Ports| port.is_some_and(|port| (ports.first..=ports.last).contains(&port));
            rule.direction == direction
                && rule.protocol.is_none_or(|only| only == protocol)
                && rule.ports.is_none_or(ports)
                && rule.peer.is_none_or(|net| net.contains(&peer))
        };
        rules.iter().find(applies).is_none_or(|rule| rule.action == Action::Allow)
    }
}

fn parse(text: &str) -> Option<Rule> {
    let mut words = text.split_ascii_whitespace().peekable();
    let action = match words.next()? {
        "allow" => Action::Allow,
        "deny" => Action::Deny,
        _ => return None,
    };
    let (direction, side) = match words.next()? {
        "in" => (Direction::In, "from"),
        "out" => (Direction::Out, "to"),
        _ => return None,
    };
    let protocol = words.next_if(|word| *word != side);
    let protocol = match protocol {
        None => None,
        Some("tcp") => Some(Protocol::Tcp),
        Some("udp") => Some(Protocol::Udp),
        Some("icmp") => Some(Protocol::Icmp),
        Some(_) => return None,
    };
    let has_ports = matches!(protocol, Some(Protocol::Tcp | Protocol::Udp));
    let ports = match words.next_if(|word| has_ports && *word != side) {
        Some(word) => Some(parse_ports(word)?),
        None => None,
    };
    let peer = match words.next() {
        None => None,
        Some(word) if word == side => Some(parse_net(words.next()?)?),
        Some(_) => return None,
    };
    words.next().is_none().then_some(Rule { action, direction, protocol, ports, peer })
}

fn parse_ports(text: &str) -> Option<Ports> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (0 < first && first <= last).then_some(Ports { first, last })
}

fn parse_net(text: &str) -> Option<IpNet> {
    let net: Option<IpNet> = text.parse().ok();
    net.or_else(|| Some(text.parse::<IpAddr>().ok()?.into())).map(|net| net.trunc())
}

impl TryFrom<String> for Rule {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Rule> for String {
    fn from(rule: Rule) -> Self {
        rule.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_applies_counts() {
        let rules = ["allow out tcp 80-443 to 192.0.2.0/24", "deny out tcp", "deny in"];
        let rules = rules.map(|rule| rule.parse::<Rule>().unwrap());
        let out = |protocol, peer: &str, port| {
            Rule::allow(&rules, Direction::Out, protocol, peer.parse().unwrap(), port)
        };
        assert!(out(Protocol::Tcp, "192.0.2.1", Some(80)) && out(Protocol::Tcp, "192.0.2.1", Some(443)));
        assert!(!out(Protocol::Tcp, "192.0.2.1", Some(25)) && !out(Protocol::Tcp, "2001:db8::1", Some(80)));
        assert!(out(Protocol::Udp, "192.0.2.1", Some(25)) && out(Protocol::Icmp, "192.0.2.1", None));
        assert!(!Rule::allow(&rules, Direction::In, Protocol::Icmp, "192.0.2.1".parse().unwrap(), None));
    }

    #[test]
    fn rules_read_as_they_are_written() {
        for text in [
            "deny out tcp 25",
            "allow in tcp 22 from 192.0.2.0/24",
            "allow in udp 5000-5010",
            "deny in",
            "deny out icmp to 2001:db8::/32",
            "deny out to 10.0.0.0/8",
        ] {
            assert_eq!(text.parse::<Rule>().map(|rule| rule.to_string()), Ok(text.into()));
        }
        let rule: Rule = "deny out to 192.0.2.1".parse().unwrap();
        assert_eq!(rule.to_string(), "deny out to 192.0.2.1/32");
        for bad in [
            "",
            "deny",
            "deny tcp",
            "reject in",
            "deny in tcp 0",
            "deny in tcp 9-8",
            "deny in 22",
            "deny in icmp 8",
            "deny in to 10.0.0.0/8",
            "deny out tcp 25 to",
            "deny out tcp 25 to 10.0.0.0/8 more",
        ] {
            assert!(bad.parse::<Rule>().is_err(), "{bad}");
        }
    }
}
