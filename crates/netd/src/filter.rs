//! What a card's guest may send and be sent, as a table of `nft`'s for each card, named after its link.
//!
//! A table of its own for each card, because such a table also remembers who has begun to talk to whom: changing one card forgets nothing
//! of another's. The netdev family is used, for it sees all frames of both TAPs and MacVTaps, and the bridge family has no connection
//! tracking on all kernels.

use std::fmt::Write;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};
use netctl::{Action, Direction, Mac, Protocol, Rule};

/// Answers of TCP pass for so long after the last segment; its keep-alives come every two hours.
const TCP_PATIENCE: &str = "3h";
/// The same for everything else.
const PATIENCE: &str = "3m";
/// Who talks to whom is remembered for so many at once.
const MOST_FLOWS: usize = 65536;

/// What is to be known of a card.
#[derive(Clone, Debug)]
pub struct Filter<'a> {
    /// Its link.
    pub interface: &'a str,
    /// Frames from the guest leave the host's side of the link (MacVTap), and do not enter it (TAP).
    pub reversed: bool,
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its only address, if it is known.
    pub address: Option<Ipv4Addr>,
    /// Its IPv6 network, if it is known, and the host's addresses in it, which nobody else may have.
    pub ipv6: Option<(Ipv6Net, [Ipv6Addr; 2])>,
    /// It may pretend to be others.
    pub spoofing: bool,
    /// What it may reach and be reached by.
    pub rules: &'a [Rule],
}

/// The name of a link's table.
pub fn table(interface: &str) -> String {
    format!("netdev lodge-{interface}")
}

/// The script that forgets a link's table, if there is one.
pub fn without(interface: &str) -> String {
    let table = table(interface);
    format!("table {table}\ndelete table {table}\n")
}

impl Filter<'_> {
    /// Whether there is anything to filter.
    pub fn needed(&self) -> bool {
        !self.spoofing || !self.rules.is_empty()
    }

    /// The script that makes the table anew, and forgets what was.
    pub fn script(&self) -> String {
        let mut text = without(self.interface);
        if self.needed() {
            // Writing to a string does not fail.
            let _ = self.write(&mut text);
        }
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        let (from, to) = if self.reversed { ("egress", "ingress") } else { ("ingress", "egress") };
        let interface = self.interface;
        writeln!(text, "table {} {{", table(interface))?;
        text.push_str("counter spoofed { }\ncounter denied { }\n");
        text.push_str(
            "chain spoofed {\ncounter name spoofed drop\n}\nchain denied {\ncounter name denied drop\n}\n",
        );
        if !self.rules.is_empty() {
            self.write_rules(text)?;
        }
        if !self.spoofing {
            self.write_own(text)?;
        }
        let hook = |text: &mut String, name, hook| {
            writeln!(
                text,
                "chain {name} {{\ntype filter hook {hook} device \"{interface}\" priority 0; policy accept;"
            )
        };
        hook(text, "from", from)?;
        if !self.spoofing {
            writeln!(text, "ether saddr != {} goto spoofed", self.mac)?;
            text.push_str(
                "ether type arp goto own-arp\nether type ip goto own-ip4\nether type ip6 goto own-ip6\n",
            );
            text.push_str("goto spoofed\n}\n");
        } else {
            text.push_str("ether type arp accept\nether type { ip, ip6 } goto out\ngoto denied\n}\n");
        }
        if !self.rules.is_empty() {
            // Rules are about IP. What carries it in something else, such as a VLAN's tag, is nothing that they could allow.
            hook(text, "to", to)?;
            text.push_str("ether type arp accept\nether type { ip, ip6 } goto in\ngoto denied\n}\n");
        }
        text.push_str("}\n");
        Ok(())
    }

    /// Chains that end what does not come from the card's own addresses.
    fn write_own(&self, text: &mut String) -> std::fmt::Result {
        let next = if self.rules.is_empty() { "accept" } else { "goto out" };
        writeln!(text, "chain own-arp {{\narp saddr ether != {} goto spoofed", self.mac)?;
        if let Some(address) = self.address {
            // Who looks whether an address is free has none yet (RFC 5227).
            writeln!(text, "arp saddr ip != {{ 0.0.0.0, {address} }} goto spoofed")?;
        }
        text.push_str("accept\n}\nchain own-ip4 {\n");
        // A server's answers; and a client's hardware address, which is 28 bytes into the message (RFC 2131, 2): by others' one guest
        // could take all addresses.
        let [a, b, c, d, e, f] = self.mac.bytes();
        writeln!(text, "udp sport 67 goto spoofed\nicmp type redirect goto spoofed")?;
        if let Some(address) = self.address {
            writeln!(text, "ip saddr != {{ 0.0.0.0, {address} }} goto spoofed")?;
        }
        // What is too short for one has none.
        let own = format!("@th,288,48 0x{a:02x}{b:02x}{c:02x}{d:02x}{e:02x}{f:02x}");
        writeln!(text, "udp dport 67 {own} {next}\nudp dport 67 goto spoofed")?;
        if self.address.is_some() {
            writeln!(text, "ip saddr 0.0.0.0 goto spoofed")?;
        }
        writeln!(text, "{next}\n}}\nchain own-ip6 {{")?;
        text.push_str(
            "icmpv6 type { nd-router-advert, nd-redirect } goto spoofed\nudp sport 547 goto spoofed\n",
        );
        if let Some((net, hosts)) = self.ipv6 {
            writeln!(text, "ip6 saddr != {{ ::, fe80::/10, {} }} goto spoofed", net.trunc())?;
            for host in hosts {
                writeln!(text, "ip6 saddr {host} goto spoofed")?;
                // The target of an advertisement is 8 bytes into it (RFC 4861, 4.4).
                let bits = host.to_bits();
                writeln!(text, "icmpv6 type nd-neighbor-advert @th,64,128 {bits:#034x} goto spoofed")?;
            }
        }
        writeln!(text, "{next}\n}}")
    }

    /// The chains `in` and `out`: answers pass, then the first rule that applies counts.
    ///
    /// A flow is known by its protocol, the other side's address, the guest's port and the other side's.
    fn write_rules(&self, text: &mut String) -> std::fmt::Result {
        for direction in ["in", "out"] {
            for (version, kind) in [("4", "ipv4_addr"), ("6", "ipv6_addr")] {
                let end = format!("flags dynamic,timeout; timeout {PATIENCE}; size {MOST_FLOWS};\n}}");
                writeln!(
                    text,
                    "set {direction}{version} {{\ntype inet_proto . {kind} . inet_service . inet_service; {end}"
                )?;
                writeln!(text, "set {direction}-other{version} {{\ntype inet_proto . {kind}; {end}")?;
            }
        }
        self.write_direction(text, Direction::In)?;
        self.write_direction(text, Direction::Out)
    }

    fn write_direction(&self, text: &mut String, direction: Direction) -> std::fmt::Result {
        let is_in = direction == Direction::In;
        let (name, other) = if is_in { ("in", "out") } else { ("out", "in") };
        let (peer, ports) =
            if is_in { ("saddr", "th dport . th sport") } else { ("daddr", "th sport . th dport") };
        let keys = [("ip", "4"), ("ip6", "6")].map(|(ip, version)| {
            let flow = format!("meta l4proto . {ip} {peer} . {ports}");
            (version, flow, format!("meta l4proto . {ip} {peer}"))
        });
        // What it begins is remembered. Where no more fits, its answers are treated as beginnings.
        writeln!(text, "chain begin-{name} {{")?;
        for (version, flow, short) in &keys {
            writeln!(text, "meta l4proto tcp update @{name}{version} {{ {flow} timeout {TCP_PATIENCE} }}")?;
            writeln!(text, "meta l4proto udp update @{name}{version} {{ {flow} }}")?;
            writeln!(text, "meta l4proto != {{ tcp, udp }} update @{name}-other{version} {{ {short} }}")?;
        }
        writeln!(text, "accept\n}}\nchain {name} {{")?;
        // Without these IPv6 does not work at all, and no address is given: neighbours, routers, groups, DHCP.
        text.push_str(
            "icmpv6 type { nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert } accept\n\
             icmpv6 type { mld-listener-query, mld-listener-report, mld-listener-done, mld2-listener-report } accept\n",
        );
        if is_in {
            text.push_str("udp sport 67 udp dport 68 accept\nudp sport 547 udp dport 546 accept\n");
            // Errors are answers. Of a packet in pieces only the first is judged, without which the others are nothing.
            text.push_str(
                "icmp type { destination-unreachable, time-exceeded, parameter-problem } accept\n\
                 icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem } accept\n\
                 ip frag-off & 0x1fff != 0 accept\nfrag frag-off != 0 accept\n",
            );
        } else {
            // An address is renewed by a broadcast, too, where the server itself is not to be reached.
            text.push_str(
                "ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept\n\
                 ip6 daddr ff02::1:2 udp sport 546 udp dport 547 accept\n",
            );
        }
        for (version, flow, short) in &keys {
            let set = format!("@{other}{version}");
            writeln!(
                text,
                "meta l4proto tcp {flow} {set} update {set} {{ {flow} timeout {TCP_PATIENCE} }} accept\n\
                 meta l4proto udp {flow} {set} update {set} {{ {flow} }} accept"
            )?;
            let (icmp, others) =
                (if *version == "4" { "icmp" } else { "icmpv6" }, format!("@{other}-other{version}"));
            writeln!(
                text,
                "{icmp} type echo-reply {short} {others} accept\n\
                 meta l4proto != {{ tcp, udp, {icmp} }} {short} {others} accept"
            )?;
        }
        for rule in self.rules.iter().filter(|rule| rule.direction == direction) {
            let verdict =
                if rule.action == Action::Allow { format!("begin-{name}") } else { "denied".to_owned() };
            writeln!(text, "{}goto {verdict}", matches(rule, peer))?;
        }
        // IPv6 whose protocol is hidden behind too many headers has none.
        writeln!(text, "meta l4proto != 255 goto begin-{name}\ngoto denied\n}}")
    }
}

/// What a rule applies to; nothing for all.
fn matches(rule: &Rule, peer: &str) -> String {
    let mut text = String::new();
    match rule.peer {
        Some(IpNet::V4(net)) => text += &format!("ip {peer} {} ", net.trunc()),
        Some(IpNet::V6(net)) => text += &format!("ip6 {peer} {} ", net.trunc()),
        None => {}
    }
    match (rule.protocol, rule.ports) {
        (Some(protocol @ (Protocol::Tcp | Protocol::Udp)), Some(ports)) => {
            text += &format!("{protocol} dport {ports} ");
        }
        (Some(protocol @ (Protocol::Tcp | Protocol::Udp)), None) => {
            text += &format!("meta l4proto {protocol} ")
        }
        (Some(Protocol::Icmp), _) => text += "meta l4proto { icmp, icmpv6 } ",
        (None, _) => {}
    }
    text
}
