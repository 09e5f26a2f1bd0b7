//! Other people's firewall rules: what becomes of a packet in them, as far as that can be known from `nft -j list ruleset`
//! (libnftables-json(5)).

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use crate::firewall;

/// Chains that call each other are followed so deep, as the kernel does (NFT_JUMP_STACK_SIZE).
const DEEPEST: usize = 16;

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

/// A chain of somebody's that drops a packet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Dropper {
    /// The table's family.
    pub family: String,
    /// The table.
    pub table: String,
    /// The chain that is called for each packet.
    pub chain: String,
    /// Chains of the table.
    pub chains: Vec<String>,
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

/// How a chain ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Accept,
    Drop,
    /// The caller goes on.
    Return,
}

/// What is known of all tables.
#[derive(Debug)]
pub struct Rules<'a>(Vec<&'a Value>);

impl<'a> Rules<'a> {
    /// From what `nft -j list ruleset` says.
    pub fn new(ruleset: &'a Value) -> Self {
        Self(ruleset["nftables"].as_array().into_iter().flatten().collect())
    }

    /// Who drops a packet for sure. Rules that ask for what is not known here may let it pass, so that those are not blamed.
    pub fn droppers(&self, packet: &Packet<'_>) -> Vec<Dropper> {
        let family = if packet.from.is_ipv4() { "ip" } else { "ip6" };
        let chains = self.0.iter().filter_map(|item| item.get("chain"));
        let ours = |chain: &Value| {
            format!("{} {}", text(&chain["family"]), text(&chain["table"])) == firewall::TABLE
        };
        let bases = chains.filter(|chain| {
            text(&chain["hook"]) == packet.hook
                && text(&chain["type"]) == "filter"
                && [family, "inet"].contains(&text(&chain["family"]))
                && !ours(chain)
        });
        let drops = bases.filter(|chain| {
            let mut walk = Walk { rules: self, packet, may_pass: false };
            let end = walk.chain(text(&chain["family"]), text(&chain["table"]), text(&chain["name"]), 0);
            let dropped = match end {
                End::Accept => false,
                End::Drop => true,
                End::Return => text(&chain["policy"]) == "drop",
            };
            dropped && !walk.may_pass
        });
        let dropper = |chain: &Value| Dropper {
            family: text(&chain["family"]).into(),
            table: text(&chain["table"]).into(),
            chain: text(&chain["name"]).into(),
            chains: self.chains(text(&chain["family"]), text(&chain["table"])),
        };
        drops.map(dropper).collect()
    }

    fn chains(&self, family: &str, table: &str) -> Vec<String> {
        let chains = self.0.iter().filter_map(|item| item.get("chain"));
        let chains =
            chains.filter(|chain| text(&chain["family"]) == family && text(&chain["table"]) == table);
        chains.map(|chain| text(&chain["name"]).to_owned()).collect()
    }
}

struct Walk<'a> {
    rules: &'a Rules<'a>,
    packet: &'a Packet<'a>,
    /// A rule was passed by that may have accepted it.
    may_pass: bool,
}

impl Walk<'_> {
    fn chain(&mut self, family: &str, table: &str, name: &str, depth: usize) -> End {
        if depth > DEEPEST {
            return End::Return;
        }
        let rules = self.rules.0.iter().filter_map(|item| item.get("rule"));
        let rules = rules.filter(|rule| {
            text(&rule["family"]) == family && text(&rule["table"]) == table && text(&rule["chain"]) == name
        });
        for rule in rules {
            let mut sure = true;
            for statement in rule["expr"].as_array().into_iter().flatten() {
                let Some((kind, value)) = statement.as_object().and_then(|object| object.iter().next())
                else {
                    // A bare word, such as "notrack".
                    continue;
                };
                match self.statement(kind, value) {
                    Yes => {}
                    No => break,
                    Unknown => sure = false,
                }
                let verdict = match kind.as_str() {
                    "vmap" => {
                        // The verdict that the packet's own value leads to.
                        match self.mapped(value) {
                            (Some(verdict), certain) => {
                                sure &= certain;
                                verdict.as_object().and_then(|object| object.iter().next())
                            }
                            (None, certain) => {
                                self.may_pass |= !certain;
                                None
                            }
                        }
                    }
                    _ => Some((kind, value)),
                };
                let Some((kind, value)) = verdict else { continue };
                let (end, leaves) = match kind.as_str() {
                    "accept" => (End::Accept, true),
                    "drop" | "reject" => (End::Drop, true),
                    "return" => (End::Return, true),
                    "jump" => (self.chain(family, table, text(&value["target"]), depth + 1), false),
                    "goto" => (self.chain(family, table, text(&value["target"]), depth + 1), true),
                    "xt" if text(&value["name"]) == "REJECT" => (End::Drop, true),
                    _ => continue,
                };
                if !sure {
                    self.may_pass |= end == End::Accept;
                    break;
                }
                if leaves || end != End::Return {
                    return end;
                }
            }
        }
        End::Return
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
        let (what, key) = match left.as_object().and_then(|object| object.iter().next()) {
            Some((what, of)) if what == "payload" => (text(&of["protocol"]), text(&of["field"])),
            Some((what, of)) => (what.as_str(), text(&of["key"])),
            None => return Unknown,
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
mod tests {
    use serde_json::json;

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
        let ruleset = json!({ "nftables": all });
        let rules = Rules::new(&ruleset);
        (!rules.droppers(&packet(false)).is_empty(), !rules.droppers(&packet(true)).is_empty())
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
