//! Which frames of a guest's get through, and which get to it.

mod world;

use std::net::{Ipv4Addr, Ipv6Addr};

use netctl::{Answer, Direct, Mac, Request, Target};
use world::{World, card, mac, network, receive_until, send};

const ALL: [u8; 6] = [0xff; 6];
const TCP: u8 = 6;
const UDP: u8 = 17;

#[test]
fn vm() {
    world::vm();
}

fn frame(to: [u8; 6], from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from.bytes(), &kind.to_be_bytes(), payload].concat()
}

fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let len = (20 + payload.len()) as u16;
    let [a, b] = len.to_be_bytes();
    let head = [0x45, 0, a, b, 0, 0, 0, 0, 64, protocol, 0, 0];
    let mut packet = [&head[..], &from.octets(), &to.octets()].concat();
    let sum = sum(&packet).to_be_bytes();
    packet[10..12].copy_from_slice(&sum);
    [&packet, payload].concat()
}

fn ipv6(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let [a, b] = (payload.len() as u16).to_be_bytes();
    [&[0x60, 0, 0, 0, a, b, protocol, 255][..], &from.octets(), &to.octets(), payload].concat()
}

fn ports(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let [len, more] = (8 + payload.len() as u16).to_be_bytes();
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &[len, more, 0, 0], payload].concat()
}

fn tcp(from: u16, to: u16, flags: u8) -> Vec<u8> {
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0; 8], &[0x50, flags, 0xff, 0xff, 0, 0, 0, 0]].concat()
}

fn arp(mac: Mac, from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    [&[0, 1, 8, 0, 6, 4, 0, 1][..], &mac.bytes(), &from.octets(), &[0; 6], &to.octets()].concat()
}

/// A DHCP client's message (RFC 2131, 2), as far as its hardware address.
fn dhcp(mac: Mac) -> Vec<u8> {
    let message = [&[1, 1, 6, 0][..], &[0; 24], &mac.bytes(), &[0; 206]].concat();
    ports(68, 67, &message)
}

/// Frames that the card 1 with this address may send, and those that it may not.
fn good_and_bad(own: Ipv4Addr, host: Option<Ipv6Addr>) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let (me, other) = (mac(1), mac(9));
    let foreign = Ipv4Addr::new(192, 168, 122, 77);
    let anywhere = Ipv4Addr::new(198, 51, 100, 7);
    let link_local: Ipv6Addr = "fe80::1234".parse().unwrap();
    let all: Ipv6Addr = "ff02::1".parse().unwrap();
    let from_me = |kind, payload: &[u8]| frame(ALL, me, kind, payload);
    let good = vec![
        from_me(0x0806, &arp(me, own, foreign)),
        from_me(0x0806, &arp(me, Ipv4Addr::UNSPECIFIED, foreign)),
        from_me(0x0800, &ipv4(own, anywhere, UDP, &ports(1000, 2000, b"good"))),
        from_me(0x0800, &ipv4(own, anywhere, 47, b"tunnel")),
        from_me(0x0800, &ipv4(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, UDP, &dhcp(me))),
        from_me(0x86dd, &ipv6(link_local, all, UDP, &ports(1000, 2000, b"good"))),
    ];
    let vlan = |kind: u16, payload: &[u8]| [&[0, 5][..], &kind.to_be_bytes(), payload].concat();
    let mut bad = vec![
        frame(ALL, other, 0x0806, &arp(other, own, foreign)),
        frame(ALL, other, 0x0800, &ipv4(own, anywhere, UDP, &ports(1000, 2000, b"their card"))),
        from_me(0x0806, &arp(other, own, foreign)),
        from_me(0x0806, &arp(me, foreign, own)),
        from_me(0x0800, &ipv4(foreign, anywhere, UDP, &ports(1000, 2000, b"their address"))),
        from_me(0x0800, &ipv4(Ipv4Addr::UNSPECIFIED, anywhere, UDP, &ports(1000, 2000, b"none"))),
        from_me(0x0800, &ipv4(own, Ipv4Addr::BROADCAST, UDP, &ports(67, 68, b"a DHCP server"))),
        from_me(0x0800, &ipv4(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, UDP, &dhcp(other))),
        from_me(0x0800, &ipv4(own, anywhere, 1, &[5, 1, 0, 0, 1, 2, 3, 4])),
        from_me(0x86dd, &ipv6(link_local, all, UDP, &ports(547, 546, b"a DHCP server"))),
        from_me(0x86dd, &ipv6(link_local, all, 58, &[134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0])),
        from_me(0x86dd, &ipv6(link_local, all, 58, &[[137, 0, 0, 0].as_slice(), &[0; 36]].concat())),
        // The same as a good one, with a tag, and with two.
        from_me(0x8100, &vlan(0x0800, &ipv4(own, anywhere, UDP, &ports(1000, 2000, b"tagged")))),
        from_me(0x88a8, &vlan(0x8100, &vlan(0x0800, &ipv4(own, anywhere, UDP, &ports(1, 2, b"tagged"))))),
        from_me(0x88cc, b"LLDP and the like"),
    ];
    if let Some(host) = host {
        let advert = [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &host.octets(), &[2, 1], &me.bytes()].concat();
        bad.push(from_me(0x86dd, &ipv6(link_local, all, 58, &advert)));
        bad.push(from_me(0x86dd, &ipv6(host, all, UDP, &ports(1000, 2000, b"the host's"))));
        bad.push(from_me(
            0x86dd,
            &ipv6("2001:db8::1".parse().unwrap(), all, UDP, &ports(1000, 2000, b"elsewhere")),
        ));
    }
    (good, bad)
}

/// Sends all, and looks what arrives at the other's; what is dropped is counted.
fn try_frames(
    world: &World,
    link: &str,
    tap: &std::os::fd::OwnedFd,
    other: &std::os::fd::OwnedFd,
    own: Ipv4Addr,
    host: Option<Ipv6Addr>,
) {
    let (good, bad) = good_and_bad(own, host);
    let marker =
        frame(ALL, mac(1), 0x0800, &ipv4(own, Ipv4Addr::new(198, 51, 100, 9), UDP, &ports(9, 9, b"end")));
    good.iter().chain(&bad).chain([&marker]).for_each(|frame| send(tap, frame));
    let arrived = receive_until(other, &marker);
    for frame in &good {
        assert!(arrived.contains(frame), "a good one is lost: {frame:02x?}");
    }
    for frame in &bad {
        assert!(!arrived.contains(frame), "a bad one gets through: {frame:02x?}");
        let inside = &frame[18..];
        assert!(
            !arrived.iter().any(|arrived| arrived.ends_with(inside)),
            "its tag is lost, no more: {frame:02x?}"
        );
    }
    let Ok(Answer::Networks(networks)) = world.ask(&Request::List) else { panic!() };
    let counted = networks.iter().flat_map(|network| &network.cards).find(|card| card.interface == link);
    assert_eq!(counted.map(|card| (card.spoofed, card.denied)), Some((bad.len() as u64, 0)));
}

#[test]
fn a_guest_sends_under_its_own_addresses_only() {
    let Some(world) =
        World::new("ip link add e0 type veth peer name e1; ip link set e0 up; ip link set e1 up")
    else {
        return;
    };
    let (one, tap) = world.attach(card(1, network("default")));
    let (_, other) = world.attach(card(2, network("default")));
    let Ok(Answer::Networks(networks)) = world.ask(&Request::List) else { panic!() };
    let host = networks[0].network.as_ref().unwrap().ipv6.unwrap().addr();
    try_frames(&world, &one.interface, &tap, &other, one.address.unwrap(), Some(host));

    let direct = || Target::Direct { link: "e0".into(), mode: Direct::Bridge, host_access: false };
    let own = Ipv4Addr::new(192, 168, 50, 5);
    let (one, tap) = world.attach(netctl::Attach { address: Some(own), ..card(1, direct()) });
    let (_, other) = world.attach(card(2, direct()));
    try_frames(&world, &one.interface, &tap, &other, own, None);

    // Who may pretend may do all of this.
    let (_, tap) = world.attach(netctl::Attach { spoofing: true, ..card(3, network("default")) });
    let (_, other) = world.attach(card(4, network("default")));
    let bad = frame(ALL, mac(9), 0x0800, &ipv4(own, Ipv4Addr::BROADCAST, UDP, &ports(67, 68, b"a server")));
    send(&tap, &bad);
    receive_until(&other, &bad);
}

#[test]
fn rules_are_about_who_begins() {
    let Some(world) = World::new("true") else { return };
    let rules = [
        "deny out tcp 25",
        "deny out udp to 203.0.113.0/24",
        "allow in tcp 22",
        "allow in udp 5000-5010",
        "deny in",
    ];
    let rules = rules.map(|rule| rule.parse().unwrap()).to_vec();
    let (one, tap) = world.attach(netctl::Attach { rules, ..card(1, network("default")) });
    let (two, other) = world.attach(netctl::Attach { spoofing: true, ..card(2, network("default")) });
    let (own, peer) = (one.address.unwrap(), two.address.unwrap());
    let far = Ipv4Addr::new(203, 0, 113, 5);
    let out = |to, protocol, payload: &[u8]| {
        (true, frame(mac(2).bytes(), mac(1), 0x0800, &ipv4(own, to, protocol, payload)))
    };
    let to_it = |from, protocol, payload: &[u8]| {
        (false, frame(mac(1).bytes(), mac(2), 0x0800, &ipv4(from, own, protocol, payload)))
    };
    let echo = |kind| [kind, 0, 0, 0, 0, 1, 0, 1];
    const SYN: u8 = 2;
    const ACK: u8 = 16;
    let steps = [
        ("a connection in", false, to_it(peer, TCP, &tcp(4000, 80, SYN))),
        ("half of one", false, to_it(peer, TCP, &tcp(4000, 80, ACK))),
        ("an answer to nothing", false, out(peer, TCP, &tcp(25, 25, ACK))),
        ("one that is allowed", true, to_it(peer, TCP, &tcp(25, 22, SYN))),
        ("its answer, to a port that would not be", true, out(peer, TCP, &tcp(22, 25, SYN | ACK))),
        ("the same port from another", false, out(peer, TCP, &tcp(23, 25, SYN))),
        ("a connection out", true, out(peer, TCP, &tcp(6000, 80, SYN))),
        ("its answer", true, to_it(peer, TCP, &tcp(80, 6000, SYN | ACK))),
        ("its answer from another", false, to_it(far, TCP, &tcp(80, 6000, SYN | ACK))),
        ("mail", false, out(peer, TCP, &tcp(6001, 25, SYN))),
        ("a range", true, to_it(peer, UDP, &ports(7, 5010, b"last"))),
        ("beyond it", false, to_it(peer, UDP, &ports(7, 5011, b"more"))),
        ("a far network", false, out(far, UDP, &ports(7, 7, b"far"))),
        ("a far network by TCP", true, out(far, TCP, &tcp(7, 7, SYN))),
        ("an answer of UDP", true, out(peer, UDP, &ports(5010, 7, b"answer"))),
        ("a ping in", false, to_it(peer, 1, &echo(8))),
        ("its answer, unasked for", false, to_it(peer, 1, &echo(0))),
        ("a ping out", true, out(peer, 1, &echo(8))),
        ("an answered ping", true, to_it(peer, 1, &echo(0))),
        ("which lets no ping in", false, to_it(peer, 1, &[8, 0, 0, 0, 0, 1, 0, 2])),
        ("that it is too long", true, to_it(far, 1, &[3, 4, 0, 0, 0, 0, 5, 0])),
        ("a neighbour's question", true, (false, frame(ALL, mac(2), 0x0806, &arp(mac(2), peer, own)))),
    ];
    for (number, (what, passes, (is_out, bytes))) in steps.iter().enumerate() {
        let marker = frame(
            ALL,
            if *is_out { mac(1) } else { mac(2) },
            0x0806,
            &arp(
                if *is_out { mac(1) } else { mac(2) },
                if *is_out { own } else { peer },
                Ipv4Addr::new(0, 0, 0, number as u8),
            ),
        );
        let (from, to) = if *is_out { (&tap, &other) } else { (&other, &tap) };
        send(from, bytes);
        send(from, &marker);
        let arrived = receive_until(to, &marker);
        assert_eq!(arrived.contains(bytes), *passes, "{what}");
    }
}
