//! Who reaches whom beyond one network, as the one table `inet lodge` of `nft`'s: between networks, in and out, under whose address, and
//! ports that lead to guests.

use std::fmt::Write;
use std::net::Ipv4Addr;

use ipnet::{Ipv4Net, Ipv6Net};
use netctl::{Forward, Mode};

/// The table.
pub const TABLE: &str = "inet lodge";

/// What is to be known of a network.
#[derive(Clone, Debug)]
pub struct Net<'a> {
    /// Its bridge.
    pub device: &'a str,
    /// Its kind.
    pub mode: Mode,
    /// Its addresses.
    pub ipv4: Ipv4Net,
    /// Its addresses, if it has some.
    pub ipv6: Option<Ipv6Net>,
}

/// The script that makes the table anew, or removes it where nothing is to be in it.
pub fn script(nets: &[Net<'_>], forwards: &[(Ipv4Addr, Forward)]) -> String {
    let mut text = format!("table {TABLE}\ndelete table {TABLE}\n");
    if !nets.is_empty() {
        // Writing to a string does not fail.
        let _ = write(&mut text, nets, forwards);
    }
    text
}

fn write(text: &mut String, nets: &[Net<'_>], forwards: &[(Ipv4Addr, Forward)]) -> std::fmt::Result {
    writeln!(text, "table {TABLE} {{\nchain forward {{")?;
    text.push_str("type filter hook forward priority filter; policy accept;\n");
    let devices: Vec<_> = nets.iter().map(|net| format!("\"{}\"", net.device)).collect();
    // Frames that stay on their bridge come by here too where br_netfilter is loaded.
    for device in &devices {
        writeln!(text, "iifname {device} oifname {device} accept")?;
    }
    let devices = devices.join(", ");
    writeln!(text, "iifname {{ {devices} }} oifname {{ {devices} }} reject with icmpx admin-prohibited")?;
    nets.iter().try_for_each(|net| write_forward(text, net))?;
    text.push_str("}\nchain source {\ntype nat hook postrouting priority srcnat; policy accept;\n");
    nets.iter().filter(|net| net.mode != Mode::Isolated).try_for_each(|net| write_source(text, net))?;
    text.push_str("}\n");
    for (name, hook, priority) in [("arriving", "prerouting", "dstnat"), ("leaving", "output", "-100")] {
        writeln!(text, "chain {name} {{\ntype nat hook {hook} priority {priority}; policy accept;")?;
        forwards.iter().try_for_each(|(guest, forward)| write_port(text, *guest, forward))?;
        text.push_str("}\n");
    }
    text.push_str("}\n");
    Ok(())
}

fn write_forward(text: &mut String, net: &Net<'_>) -> std::fmt::Result {
    let device = net.device;
    let refuse = "reject with icmpx admin-prohibited";
    match net.mode {
        Mode::Nat => {
            writeln!(text, "iifname \"{device}\" ip saddr {} accept", net.ipv4.trunc())?;
            if let Some(ipv6) = net.ipv6 {
                writeln!(text, "iifname \"{device}\" ip6 saddr {} accept", ipv6.trunc())?;
            }
            writeln!(text, "iifname \"{device}\" {refuse}")?;
            writeln!(text, "oifname \"{device}\" ct state established,related accept")?;
            writeln!(text, "oifname \"{device}\" ct status dnat accept\noifname \"{device}\" {refuse}")
        }
        Mode::Routed => writeln!(text, "iifname \"{device}\" accept\noifname \"{device}\" accept"),
        Mode::Isolated => writeln!(text, "iifname \"{device}\" {refuse}\noifname \"{device}\" {refuse}"),
    }
}

/// What leaves the network does so under the host's address; groups and broadcasts never leave it.
fn write_source(text: &mut String, net: &Net<'_>) -> std::fmt::Result {
    let ipv4 = net.ipv4.trunc();
    // Who uses the host's port to reach a neighbour must get the answers from the host.
    writeln!(text, "ip saddr {ipv4} ip daddr {ipv4} ct status dnat masquerade")?;
    if net.mode != Mode::Nat {
        return Ok(());
    }
    let elsewhere = format!("oifname != \"{}\"", net.device);
    writeln!(
        text,
        "{elsewhere} ip saddr {ipv4} ip daddr != {{ {ipv4}, 224.0.0.0/4, 255.255.255.255 }} masquerade"
    )?;
    if let Some(ipv6) = net.ipv6.map(|net| net.trunc()) {
        writeln!(text, "{elsewhere} ip6 saddr {ipv6} ip6 daddr != {{ {ipv6}, ff00::/8 }} masquerade")?;
    }
    Ok(())
}

fn write_port(text: &mut String, guest: Ipv4Addr, forward: &Forward) -> std::fmt::Result {
    let listen = forward.listen.ip();
    // What is for others only passes by. And not what is for the host's loopback: the kernel takes no answers for it from outside.
    text.push_str("fib daddr type local ");
    if listen.is_unspecified() {
        text.push_str("ip daddr != 127.0.0.0/8 ");
    } else {
        write!(text, "ip daddr {listen} ")?;
    }
    writeln!(text, "{} dport {} dnat ip to {guest}:{}", forward.protocol, forward.listen.port(), forward.port)
}
