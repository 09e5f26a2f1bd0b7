//! Other people's firewall rules: what becomes of a packet in them, as far as that can be known from `nft -j list ruleset`
//! (libnftables-json(5)).

use std::collections::HashMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use crate::firewall;

/// The first packet of a connection, or one that answers it.
#[derive(Clone, Debug)]
pub struct Packet<'a> {
    /// Where rules look at it: `forward` or `input`.
    pub hook: &'a str,
    /// The link that it came in by, if it is known.
    pub iif: Option<&'a str>,
    /// The link that it goes out by, if it is known.
    pub oif: Option<&'a str>,
    /// From whom.
    pub from: IpAddr,
    /// To whom.
    pub to: IpAddr,
    /// `tcp` or `udp`.
    pub protocol: &'a str,
    /// The port that the first of them goes to.
    pub port: u16,
    /// It is an answer.
    pub answers: bool,
}

impl Packet<'_> {
    /// Whom it is for, in the kernel's words for routes.
    fn kind(&self) -> &'static str {
        match self.to {
            IpAddr::V4(to) if to.is_broadcast() => "broadcast",
            to if to.is_multicast() => "multicast",
            _ if self.hook == "input" => "local",
            _ => "unicast",
        }
    }
}

/// A chain of somebody's that drops a packet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Dropper {
    /// The table's family.
    pub family: String,
    /// The table.
    pub table: String,
    /// The chain that is called for each packet.
    pub chain: String,
    /// Chains that it calls itself.
    pub calls: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Truth {
    Yes,
    No,
    Unknown,
}

use Truth::{No, Unknown, Yes};

impl From<bool> for Truth {
    fn from(is: bool) -> Self {
        if is { Yes } else { No }
    }
}

/// How a chain may end: more than one if it asks for what is not known here.
#[derive(Clone, Copy, Default)]
struct Ends {
    accept: bool,
    drop: bool,
    /// The caller goes on.
    returns: bool,
}

impl Ends {
    const ACCEPT: Self = Self { accept: true, drop: false, returns: false };
    const DROP: Self = Self { accept: false, drop: true, returns: false };
    const RETURN: Self = Self { accept: false, drop: false, returns: true };

    fn or(self, other: Self) -> Self {
        Self {
            accept: self.accept || other.accept,
            drop: self.drop || other.drop,
            returns: self.returns || other.returns,
        }
    }
}

/// What is known of all tables.
#[derive(Debug)]
pub struct Rules<'a> {
    chains: Vec<&'a Value>,
    /// By family, table and chain.
    rules: HashMap<[&'a str; 3], Vec<&'a Value>>,
}

impl<'a> Rules<'a> {
    /// From what `nft -j list ruleset` says.
    pub fn new(ruleset: &'a Value) -> Self {
        let items = || ruleset["nftables"].as_array().into_iter().flatten();
        let mut rules: HashMap<_, Vec<_>> = HashMap::new();
        for rule in items().filter_map(|item| item.get("rule")) {
            rules.entry(["family", "table", "chain"].map(|key| text(&rule[key]))).or_default().push(rule);
        }
        Self { chains: items().filter_map(|item| item.get("chain")).collect(), rules }
    }

    /// Who drops a packet for sure. Rules that ask for what is not known here may let it pass, so that those are not blamed.
    pub fn droppers(&self, packet: &Packet<'_>) -> Vec<Dropper> {
        let ip = if packet.from.is_ipv4() { "ip" } else { "ip6" };
        let mut droppers = Vec::new();
        for chain in &self.chains {
            let [family, table, name] = ["family", "table", "name"].map(|key| text(&chain[key]));
            let is_asked = text(&chain["hook"]) == packet.hook
                && text(&chain["type"]) == "filter"
                && [ip, "inet"].contains(&family)
                && format!("{family} {table}") != firewall::TABLE;
            if !is_asked {
                continue;
            }
            let ends = Walk { rules: self, packet, family, table, known: HashMap::new() }.chain(name);
            let passes = ends.accept || (ends.returns && text(&chain["policy"]) != "drop");
            if !passes {
                let [family, table, chain] = [family, table, name].map(str::to_owned);
                let calls =
                    self.of([&family, &table, &chain]).filter_map(called).map(str::to_owned).collect();
                droppers.push(Dropper { family, table, chain, calls });
            }
        }
        droppers
    }

    fn of<'s>(&'s self, chain: [&'s str; 3]) -> impl Iterator<Item = &'a Value> + use<'s, 'a> {
        self.rules.get(&chain).into_iter().flatten().copied()
    }
}

/// The chain that a rule calls.
fn called(rule: &Value) -> Option<&str> {
    let mut statements = rule["expr"].as_array()?.iter();
    statements.find_map(|statement| statement["jump"]["target"].as_str())
}

/// One packet's way through a table.
struct Walk<'a> {
    rules: &'a Rules<'a>,
    packet: &'a Packet<'a>,
    family: &'a str,
    table: &'a str,
    /// How chains end that it came by. The kernel lets none call itself.
    known: HashMap<&'a str, Ends>,
}

impl<'a> Walk<'a> {
    fn chain(&mut self, name: &'a str) -> Ends {
        if let Some(ends) = self.known.get(name) {
            return *ends;
        }
        self.known.insert(name, Ends::RETURN);
        let mut ends = Ends::default();
        let mut goes_on = true;
        let rules = self.rules;
        let mut rules = rules.of([self.family, self.table, name]);
        while let (true, Some(rule)) = (goes_on, rules.next()) {
            let leaves;
            (leaves, goes_on) = self.rule(rule);
            ends = ends.or(leaves);
        }
        ends.returns |= goes_on;
        self.known.insert(name, ends);
        ends
    }

    /// How the chain may end by a rule, and whether it may go on behind it.
    fn rule(&mut self, rule: &'a Value) -> (Ends, bool) {
        let (mut ends, mut sure) = (Ends::default(), true);
        for statement in rule["expr"].as_array().into_iter().flatten() {
            let Some((kind, value)) = statement.as_object().and_then(|object| object.iter().next()) else {
                // A bare word, such as "notrack".
                continue;
            };
            match self.statement(kind, value) {
                Yes => {}
                No => return (ends, true),
                Unknown => sure = false,
            }
            let (mut kind, mut value) = (kind, value);
            if kind == "vmap" {
                // The verdict that the packet's own value leads to; if that is not known, maybe another one.
                let (verdict, certain) = self.mapped(value);
                ends.accept |= !certain;
                sure &= certain;
                match verdict.and_then(|verdict| verdict.as_object()?.iter().next()) {
                    Some(verdict) => (kind, value) = verdict,
                    None => continue,
                }
            }
            let (leaves, goes_on) = match kind.as_str() {
                "accept" => (Ends::ACCEPT, false),
                "drop" | "reject" => (Ends::DROP, false),
                "xt" if text(&value["name"]) == "REJECT" => (Ends::DROP, false),
                "return" => (Ends::RETURN, false),
                "jump" => {
                    let called = self.chain(text(&value["target"]));
                    (Ends { returns: false, ..called }, called.returns)
                }
                "goto" => (self.chain(text(&value["target"])), false),
                // What a program decides.
                "queue" => (Ends::ACCEPT.or(Ends::DROP), false),
                _ => continue,
            };
            return (ends.or(leaves), goes_on || !sure);
        }
        (ends, true)
    }

    /// Whether the rule goes on behind this.
    fn statement(&self, kind: &str, value: &Value) -> Truth {
        match kind {
            "match" => {
                let is = self.compare(&value["left"], &value["right"]);
                match (text(&value["op"]), is) {
                    ("==" | "in", is) => is,
                    ("!=", Yes) => No,
                    ("!=", No) => Yes,
                    _ => Unknown,
                }
            }
            // iptables' own matches are shown without what they say. This one lets answers pass, as good as always.
            "xt" if text(&value["type"]) == "match" && text(&value["name"]) == "conntrack" => {
                self.packet.answers.into()
            }
            "xt" if text(&value["type"]) == "match" => Unknown,
            "limit" | "quota" | "ct count" => Unknown,
            _ => Yes,
        }
    }

    fn mapped<'v>(&self, map: &'v Value) -> (Option<&'v Value>, bool) {
        let mut certain = true;
        for pair in map["data"]["set"].as_array().into_iter().flatten() {
            match self.compare(&map["key"], &pair[0]) {
                Yes => return (Some(&pair[1]), certain),
                No => {}
                Unknown => certain = false,
            }
        }
        // A map with a name is elsewhere.
        (None, certain && map["data"]["set"].is_array())
    }

    fn compare(&self, left: &Value, right: &Value) -> Truth {
        let packet = self.packet;
        let Some((what, of)) = left.as_object().and_then(|object| object.iter().next()) else {
            return Unknown;
        };
        let (what, key) = match what.as_str() {
            "payload" => (text(&of["protocol"]), text(&of["field"])),
            what => (what, text(&of["key"])),
        };
        let family = if packet.from.is_ipv4() { "ipv4" } else { "ipv6" };
        let (ip, other_ip) = if packet.from.is_ipv4() { ("ip", "ip6") } else { ("ip6", "ip") };
        let word = |word: &str| {
            any(right, &|value| Truth::from(value.as_str().is_some_and(|text| matches(text, word))))
        };
        let link = |link: Option<&str>| link.map_or(Unknown, word);
        match (what, key) {
            ("meta", "iifname" | "iif") => link(packet.iif),
            // What is for the host goes out by none.
            ("meta", "oifname" | "oif") if packet.hook == "input" => No,
            ("meta", "oifname" | "oif") => link(packet.oif),
            ("meta", "nfproto") => word(family),
            ("meta", "l4proto") => word(packet.protocol),
            ("ct", "state") => word(if packet.answers { "established" } else { "new" }),
            ("ct", "status") if !packet.answers => word("none"),
            ("fib", _) if text(&of["result"]) == "type" && of["flags"] == json!(["daddr"]) => {
                word(packet.kind())
            }
            ("ip", "protocol") | ("ip6", "nexthdr") if what == ip => word(packet.protocol),
            (proto, "saddr") if proto == ip => within(right, packet.from),
            (proto, "daddr") if proto == ip => within(right, packet.to),
            (proto, _) if proto == other_ip => No,
            (proto, "dport") if proto == packet.protocol || proto == "th" => match packet.answers {
                false => number(right, packet.port),
                true => Unknown,
            },
            (proto, "sport") if proto == packet.protocol || proto == "th" => match packet.answers {
                true => number(right, packet.port),
                false => Unknown,
            },
            ("tcp" | "udp" | "icmp" | "icmpv6" | "sctp" | "dccp", _) if what != packet.protocol => No,
            _ => Unknown,
        }
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// `word`, or all that begins so.
fn matches(pattern: &str, word: &str) -> bool {
    pattern == word || pattern.strip_suffix('*').is_some_and(|begin| word.starts_with(begin))
}

/// One of several, if there are several.
fn any(right: &Value, is: &dyn Fn(&Value) -> Truth) -> Truth {
    let values = right.get("set").unwrap_or(right);
    if values.as_str().is_some_and(|name| name.starts_with('@')) {
        return Unknown;
    }
    let Some(values) = values.as_array() else { return is(values) };
    let all = values.iter().map(|value| is(value.get("elem").map_or(value, |elem| &elem["val"])));
    all.fold(No, |sum, is| match (sum, is) {
        (Yes, _) | (_, Yes) => Yes,
        (Unknown, _) | (_, Unknown) => Unknown,
        _ => No,
    })
}

fn within(right: &Value, address: IpAddr) -> Truth {
    any(right, &|value| {
        let net = match value.get("prefix") {
            Some(prefix) => format!("{}/{}", text(&prefix["addr"]), prefix["len"]).parse().ok(),
            None => text(value).parse().ok().map(|one: IpAddr| IpNet::from(one)),
        };
        net.map_or(Unknown, |net: IpNet| net.contains(&address).into())
    })
}

fn number(right: &Value, number: u16) -> Truth {
    any(right, &|value| {
        let one = |value: &Value| value.as_u64();
        match value.get("range") {
            Some(range) => match (one(&range[0]), one(&range[1])) {
                (Some(first), Some(last)) => (first..=last).contains(&number.into()).into(),
                _ => Unknown,
            },
            None => one(value).map_or(Unknown, |value| (value == u64::from(number)).into()),
        }
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn packet(answers: bool) -> Packet<'static> {
        let [guest, world] = ["192.168.122.9", "203.0.113.1"].map(|address| address.parse().unwrap());
        let (iif, oif) = if answers { ("eth0", "virbr0") } else { ("virbr0", "eth0") };
        let (from, to) = if answers { (world, guest) } else { (guest, world) };
        Packet {
            hook: "forward",
            iif: Some(iif),
            oif: Some(oif),
            from,
            to,
            protocol: "tcp",
            port: 443,
            answers,
        }
    }

    /// Whether what a guest sends is dropped, and its answer.
    pub(crate) fn drops_either(ruleset: &Value) -> (bool, bool) {
        let rules = Rules::new(ruleset);
        (!rules.droppers(&packet(false)).is_empty(), !rules.droppers(&packet(true)).is_empty())
    }

    /// Whether a chain with these rules drops the first packet, and an answer.
    fn drops(policy: &str, rules: &[Value]) -> (bool, bool) {
        let mut all = vec![
            json!({ "chain": { "family": "ip", "table": "filter", "name": "FORWARD", "type": "filter", "hook": "forward", "policy": policy } }),
            json!({ "chain": { "family": "ip", "table": "filter", "name": "other" } }),
            json!({ "rule": { "family": "ip", "table": "filter", "chain": "other", "expr": [link("iifname", "virbr*"), { "accept": null }] } }),
        ];
        all.extend(rules.iter().map(
            |expr| json!({ "rule": { "family": "ip", "table": "filter", "chain": "FORWARD", "expr": expr } }),
        ));
        drops_either(&json!({ "nftables": all }))
    }

    fn link(key: &str, name: &str) -> Value {
        json!({ "match": { "op": "==", "left": { "meta": { "key": key } }, "right": name } })
    }

    #[test]
    fn who_drops_for_sure() {
        let conntrack = json!([{ "xt": { "type": "match", "name": "conntrack" } }, { "counter": {} }, { "accept": null }]);
        let unknown = json!([{ "xt": { "type": "match", "name": "comment" } }, { "accept": null }]);
        assert_eq!(drops("accept", &[]), (false, false));
        assert_eq!(drops("drop", &[]), (true, true));
        assert_eq!(drops("drop", &[json!([link("iifname", "docker0"), { "accept": null }])]), (true, true));
        assert_eq!(drops("drop", &[conntrack]), (true, false));
        assert_eq!(drops("drop", &[unknown]), (false, false), "nobody is blamed without evidence");
        assert_eq!(drops("drop", &[json!([{ "jump": { "target": "other" } }])]), (false, true));
        assert_eq!(
            drops("accept", &[json!([{ "goto": { "target": "FORWARD" } }])]),
            (false, false),
            "a loop"
        );
        assert_eq!(drops("accept", &[json!([link("oifname", "virbr0"), { "drop": null }])]), (false, true));
        let state = json!({ "match": { "op": "in", "left": { "ct": { "key": "state" } }, "right": ["established", "related"] } });
        assert_eq!(
            drops("accept", &[json!([state, { "accept": null }]), json!([{ "reject": null }])]),
            (true, false)
        );
        let net = json!({ "match": { "op": "!=", "left": { "payload": { "protocol": "ip", "field": "saddr" } },
            "right": { "set": [{ "prefix": { "addr": "192.168.122.0", "len": 24 } }, "10.0.0.1"] } } });
        assert_eq!(drops("accept", &[json!([net, { "drop": null }])]), (false, true));
        let ports = json!({ "match": { "op": "==", "left": { "payload": { "protocol": "tcp", "field": "dport" } },
            "right": { "set": [22, { "range": [400, 500] }] } } });
        assert!(!drops("drop", &[json!([ports, { "accept": null }])]).0);
        let words = json!([null, 7, "x", {}, { "match": 7 }, { "vmap": [] }, { "jump": null }]);
        assert_eq!(drops("drop", &[words]), (false, false), "nor by nonsense");
    }
}
