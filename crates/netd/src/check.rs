//! Why networks do not work, and the command that mends it, to be run as root.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use ipnet::IpNet;
use netctl::{Mode, Problem};

use crate::foreign::{Dropper, Packet, Rules};
use crate::helper::Helper;
use crate::links::{Kind, Link};
use crate::networks::Net;
use crate::{Result, iptables, nft, settings};

/// Somebody outside (RFC 5737, 3849).
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0xffff, 0, 0, 0, 1);
const HTTPS: u16 = 443;
const DNS: u16 = 53;
const DHCP: u16 = 67;

impl Helper {
    /// What keeps a network from working, or all networks that run or start by themselves.
    pub(crate) async fn diagnose(&mut self, name: Option<&str>) -> Result<Vec<Problem>> {
        if let Some(name) = name {
            self.known(name)?;
        }
        let mut problems = Vec::new();
        let asked = |net: &&Net| match name {
            Some(name) => net.declared.name == name,
            None => net.active || net.declared.autostart,
        };
        let names: Vec<String> =
            self.networks.values().filter(asked).map(|net| net.declared.name.clone()).collect();
        self.check_host(&names, name.is_none(), &mut problems).await;
        let links = self.links.all().await?;
        let mut ruleset = match nft::ruleset().await {
            Ok(ruleset) => ruleset,
            Err(error) => {
                problems.push(Problem { network: None, what: error.why, command: error.help });
                serde_json::Value::Null
            }
        };
        for family in iptables::complete(&mut ruleset).await {
            let version = if family == "ip" { "IPv4" } else { "IPv6" };
            let what = format!(
                "there are rules of the old iptables for {version}, which may drop guests' packets: iptables-legacy is missing, to read them by"
            );
            problems.push(Problem { network: None, what, command: Some("apt install iptables".into()) });
        }
        // Ours first: what somebody took away is back before others are blamed.
        if let Err(error) = self.repair().await {
            problems.push(Problem { network: None, what: error.why, command: error.help });
        }
        let outside = self.way_out(&links).await?;
        if name.is_none() && across_the_firewall() {
            self.check_bridges(&Rules::new(&ruleset), &mut problems);
        }
        for name in names {
            let net = self.known(&name)?;
            let found = if net.active { running(net, &links) } else { self.check_stopped(net)? };
            let mut found: Vec<_> = found.into_iter().collect();
            let clash = self.taken(Some(&name)).await?;
            for range in [IpNet::from(net.ipv4), net.ipv6.into()] {
                if let Err(error) = clash.check(range) {
                    let mode = match net.declared.mode {
                        Mode::Nat => "",
                        Mode::Routed => " --routed",
                        Mode::Isolated => " --isolated",
                    };
                    let command = format!("lodge net rm {name} && lodge net create {name}{mode}");
                    found.push((error.why, Some(command)));
                }
            }
            if net.active && net.declared.mode != Mode::Isolated {
                found.extend(forwarding());
            }
            if net.active {
                found.extend(firewalls(net, &Rules::new(&ruleset), outside.as_deref()));
            }
            let problem = |(what, command)| Problem { network: Some(name.clone()), what, command };
            problems.extend(found.into_iter().map(problem));
        }
        Ok(problems)
    }

    /// Modules and name servers. `all`: of all that guests may be connected to.
    async fn check_host(&self, names: &[String], all: bool, problems: &mut Vec<Problem>) {
        let mut add = |what: &str, command: &str| {
            problems.push(Problem { network: None, what: what.into(), command: Some(command.into()) });
        };
        // Its node may be there without its module.
        if let Err(error) = File::options().read(true).write(true).open(taps::TUN) {
            add(
                &format!("{}, by which cards are connected, cannot be opened: {error}", taps::TUN),
                "modprobe tun",
            );
        }
        if all && !self.links.knows(Kind::MacVtap).await {
            add(
                "the kernel makes no MacVTaps, by which guests sit on a link of this host's (--network direct=LINK)",
                "modprobe macvtap",
            );
        }
        let nets = || names.iter().filter_map(|name| self.networks.get(name));
        // A network that runs shows that the kernel can.
        if !self.networks.values().any(|net| net.active) {
            const TRIAL: &str = "lodge-trial";
            // One that was left by a check that was killed.
            if let Ok(Some(link)) = self.links.find(TRIAL).await {
                let _ = self.links.delete(&link).await;
            }
            match self.links.add_bridge(TRIAL, None).await {
                Ok(link) => _ = self.links.delete(&link).await,
                Err(_) => add("the kernel makes no bridges", "modprobe bridge"),
            }
            let nat = "table inet lodge-trial { chain source { type nat hook postrouting priority 100; masquerade; }; }";
            if nft::try_out(nat).await.is_err() {
                add(
                    "the kernel's firewall changes no addresses (NAT)",
                    "modprobe -a nf_nat nft_chain_nat nft_masq",
                );
            }
        }
        let names = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        if nets().any(|net| net.declared.mode != Mode::Isolated)
            && !names.lines().any(|line| line.starts_with("nameserver"))
        {
            add(
                "/etc/resolv.conf names no name server, so guests find no names but each other's",
                "echo nameserver 9.9.9.9 >> /etc/resolv.conf",
            );
        }
    }

    /// Bridges over the host's links.
    fn check_bridges(&self, rules: &Rules<'_>, problems: &mut Vec<Problem>) {
        for (bridge, record) in &self.bridges {
            let Some(own) = record.ips().into_iter().find(IpAddr::is_ipv4) else { continue };
            for dropper in rules.droppers(&across(bridge, own)) {
                let what = format!("{} drops what guests send over the bridge {bridge}", dropper.name());
                let command = Some(dropper.let_through(bridge));
                problems.push(Problem { network: None, what, command });
            }
        }
    }

    /// The link that leads to the world.
    async fn way_out(&self, links: &[Link]) -> Result<Option<String>> {
        let routes = self.links.routes().await?;
        let route = routes.iter().find(|route| route.destination.prefix_len() == 0);
        let index = route.and_then(|route| route.index);
        Ok(links.iter().find(|link| Some(link.index) == index).map(|link| link.name.clone()))
    }

    fn check_stopped(&self, net: &Net) -> Result<Option<(String, Option<String>)>> {
        let name = &net.declared.name;
        for (table, what) in [("udp", DHCP), ("udp", DNS), ("tcp", DNS)] {
            if listens(table, what, net) {
                let what = format!(
                    "the network {name} does not run, and another program has port {what}/{table} on all of this host's addresses: \
                     stop it, or tell it which links are its own (dnsmasq: bind-dynamic)"
                );
                return Ok(Some((what, Some(format!("ss -lnp 'sport = :{DNS} or sport = :{DHCP}'")))));
            }
        }
        Ok(Some((format!("the network {name} does not run"), Some(format!("lodge net start {name}")))))
    }
}

type Found = (String, Option<String>);

fn running(net: &Net, links: &[Link]) -> Option<Found> {
    let (name, device) = (&net.declared.name, &net.device);
    let start = Some(format!("lodge net start {name}"));
    match links.iter().find(|link| link.name == *device) {
        None => Some((format!("the bridge {device} of the network {name} is gone"), start)),
        Some(link) if !link.up => Some((format!("the bridge {device} is switched off"), start)),
        Some(_) => None,
    }
}

fn forwarding() -> Vec<Found> {
    let mut found = Vec::new();
    for (setting, key) in [
        ("ipv4/ip_forward", "net.ipv4.ip_forward"),
        ("ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"),
    ] {
        if settings::get(setting).as_deref() == Some("0") {
            let family = if setting.starts_with("ipv4") { "IPv4" } else { "IPv6" };
            let what = format!("this host forwards no packets of {family} ({key} is 0)");
            found.push((what, Some(format!("sysctl -w {key}=1"))));
        }
    }
    found
}

/// Frames that stay on a bridge are shown to the rules for packets that are forwarded (br_netfilter).
fn across_the_firewall() -> bool {
    settings::get("bridge/bridge-nf-call-iptables").as_deref() == Some("1")
}

/// What somebody with this address, or one like it, sends to another on the same bridge.
fn across(device: &str, from: IpAddr) -> Packet<'_> {
    let (iif, oif) = (Some(device), Some(device));
    Packet { hook: "forward", iif, oif, from, to: from, protocol: "tcp", port: HTTPS, answers: false }
}

/// Others' rules that drop what the network lives on.
fn firewalls(net: &Net, rules: &Rules<'_>, outside: Option<&str>) -> Vec<Found> {
    let device = Some(net.device.as_str());
    let mut found = Vec::new();
    let guests: [(IpAddr, IpAddr, IpAddr); 2] = [
        (
            IpAddr::from(net.ipv4.broadcast().to_bits().wrapping_sub(1).to_be_bytes()),
            OUTSIDE.into(),
            net.ipv4.addr().into(),
        ),
        (
            Ipv6Addr::from_bits(net.ipv6.addr().to_bits() | 0xffff).into(),
            OUTSIDE6.into(),
            net.ipv6.addr().into(),
        ),
    ];
    let mut forward: Vec<Dropper> = Vec::new();
    let mut input: Vec<Dropper> = Vec::new();
    for (guest, world, host) in guests {
        let out = Packet {
            hook: "forward",
            iif: device,
            oif: outside,
            from: guest,
            to: world,
            protocol: "tcp",
            port: HTTPS,
            answers: false,
        };
        let back = Packet { iif: outside, oif: device, from: world, to: guest, answers: true, ..out.clone() };
        if net.declared.mode != Mode::Isolated {
            forward.extend([out, back.clone()].iter().flat_map(|packet| rules.droppers(packet)));
        }
        let name = Packet {
            hook: "input",
            oif: None,
            to: host,
            iif: device,
            from: guest,
            protocol: "udp",
            port: DNS,
            answers: false,
        };
        input.extend(rules.droppers(&name));
        if host.is_ipv4() {
            let (from, to) = (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::BROADCAST.into());
            input.extend(rules.droppers(&Packet { from, to, port: DHCP, ..name }));
        }
    }
    if across_the_firewall() {
        let guest = IpAddr::from(net.ipv4.addr());
        forward.extend(rules.droppers(&across(&net.device, guest)));
    }
    for droppers in [&mut forward, &mut input] {
        droppers.sort();
        droppers.dedup();
    }
    for dropper in &forward {
        let what = format!("{} drops what guests send, or the answers", dropper.name());
        found.push((what, Some(dropper.let_through(&net.device))));
    }
    for dropper in &input {
        let what = format!("{} drops what guests ask the network's DHCP and name servers", dropper.name());
        let command = Some(dropper.let_in(&net.device));
        // One command may mend both.
        if found.iter().all(|(_, other)| *other != command) {
            found.push((what, command));
        }
    }
    found
}

impl Dropper {
    fn calls(&self, prefix: &str) -> bool {
        self.calls.iter().any(|chain| chain.starts_with(prefix))
    }

    fn is_firewalld(&self) -> bool {
        self.table == "firewalld"
    }

    /// Whose chain it is, in words.
    fn name(&self) -> String {
        let chain = format!("the chain {} of the table {} {}", self.chain, self.family, self.table);
        match () {
            () if self.is_firewalld() => "firewalld".into(),
            () if self.calls("ufw") => format!("ufw ({chain})"),
            () if self.calls("DOCKER") => format!("Docker's FORWARD policy ({chain})"),
            () => chain,
        }
    }

    /// The program of iptables' that changes it, if it is there and made it.
    fn iptables(&self) -> Option<String> {
        let is_theirs = self.chain.chars().all(|letter| letter.is_ascii_uppercase());
        is_theirs.then(|| iptables::program(&self.family, &self.table, ""))?
    }

    /// What lets a network's packets through.
    fn let_through(&self, device: &str) -> String {
        if self.is_firewalld() {
            return format!("firewall-cmd --zone=trusted --add-interface={device}");
        }
        if self.calls("ufw") {
            return format!("ufw route allow in on {device} && ufw route allow out on {device}");
        }
        let chain = if self.calls("DOCKER-USER") { "DOCKER-USER" } else { self.chain.as_str() };
        match self.iptables() {
            Some(iptables) => format!(
                "{iptables} -I {chain} -i {device} -j ACCEPT && {iptables} -I {chain} -o {device} -j ACCEPT"
            ),
            None => {
                let insert = format!("nft insert rule {} {} {chain}", self.family, self.table);
                format!("{insert} iifname {device} accept && {insert} oifname {device} accept")
            }
        }
    }

    /// What lets guests ask the host's servers.
    fn let_in(&self, device: &str) -> String {
        if self.is_firewalld() {
            return format!("firewall-cmd --zone=trusted --add-interface={device}");
        }
        if self.calls("ufw") {
            return format!(
                "ufw allow in on {device} to any port 53 && ufw allow in on {device} to any port 67 proto udp"
            );
        }
        match self.iptables() {
            Some(iptables) => {
                let allow = |protocol: &str, port: u16| {
                    format!("{iptables} -I {} -i {device} -p {protocol} --dport {port} -j ACCEPT", self.chain)
                };
                [allow("udp", DHCP), allow("udp", DNS), allow("tcp", DNS)].join(" && ")
            }
            None => format!(
                "nft 'insert rule {} {} {} iifname {device} meta l4proto {{ tcp, udp }} th dport {{ {DNS}, {DHCP} }} accept'",
                self.family, self.table, self.chain
            ),
        }
    }
}

/// Whether a program has a port on all addresses, or on the network's own (`/proc/net`; ports and addresses are hexadecimal).
fn listens(table: &str, port: u16, net: &Net) -> bool {
    let all = [
        format!("{:08X}", 0),
        format!("{:08X}", u32::from_ne_bytes(net.ipv4.addr().octets())),
        "0".repeat(32),
    ];
    let six = format!("{table}6");
    [table, &six].iter().any(|table| {
        let text = std::fs::read_to_string(Path::new("/proc/net").join(table)).unwrap_or_default();
        text.lines().skip(1).any(|line| {
            let mut words = line.split_ascii_whitespace().skip(1);
            let (Some(local), _, Some(state)) = (words.next(), words.next(), words.next()) else {
                return false;
            };
            // Listening, or the like for datagrams (linux/tcp_states.h).
            let waits = ["0A", "07"].contains(&state);
            waits && all.iter().any(|address| *local == format!("{address}:{port:04X}"))
        })
    })
}
