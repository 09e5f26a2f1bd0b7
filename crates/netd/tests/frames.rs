//! Which frames of a guest's get through, and which get to it.

mod world;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};

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
    tap: &OwnedFd,
    other: &OwnedFd,
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

/// A question for an address, or the answer that it is here (RFC 4861, 4.3 and 4.4).
fn discovery(number: u8, from: Ipv6Addr, kind: u8, target: Ipv6Addr) -> Vec<u8> {
    let message =
        [&[kind, 0, 0, 0, 0x20, 0, 0, 0][..], &target.octets(), &[2, 1], &mac(number).bytes()].concat();
    frame(ALL, mac(number), 0x86dd, &ipv6(from, "ff02::1".parse().unwrap(), 58, &message))
}

fn says(number: u8, from: Ipv6Addr) -> Vec<u8> {
    frame(ALL, mac(number), 0x86dd, &ipv6(from, "ff02::1".parse().unwrap(), UDP, &ports(1, 2, b"hello")))
}

fn spoofed(world: &World, link: &str) -> u64 {
    let Ok(Answer::Networks(networks)) = world.ask(&Request::List) else { panic!() };
    let cards = networks.iter().flat_map(|network| &network.cards);
    cards.filter(|card| card.interface == link).map(|card| card.spoofed).sum()
}

/// Whether a frame of the card of this number gets from one TAP to another.
fn passes(number: u8, from: &OwnedFd, to: &OwnedFd, bytes: &[u8]) -> bool {
    static MARKERS: AtomicU32 = AtomicU32::new(1);
    let asked = Ipv4Addr::from_bits(MARKERS.fetch_add(1, Ordering::Relaxed));
    let marker = frame(ALL, mac(number), 0x0806, &arp(mac(number), Ipv4Addr::UNSPECIFIED, asked));
    send(from, bytes);
    send(from, &marker);
    receive_until(to, &marker).iter().any(|arrived| arrived == bytes)
}

#[test]
fn an_ipv6_address_is_that_of_who_comes_first() {
    let links = "ip link add e0 type veth peer name e1; ip link set e0 up; ip link set e1 up; \
                 ip link add br7 type bridge; ip link set br7 up";
    let Some(mut world) = World::new(links) else { return };
    let direct = Target::Direct { link: "e0".into(), mode: Direct::Bridge, host_access: false };
    for to in [network("default"), Target::Bridge("br7".into()), direct] {
        let (one, first) = world.attach(card(1, to.clone()));
        let (two, second) = world.attach(card(2, to.clone()));
        let Ok(Answer::Networks(networks)) = world.ask(&Request::List) else { panic!() };
        let prefix = networks[0].network.as_ref().unwrap().ipv6.unwrap().trunc().addr().to_bits();
        let nobody = Ipv6Addr::UNSPECIFIED;
        let global = |number: u128| Ipv6Addr::from_bits(prefix | number);
        let local = |number: u128| Ipv6Addr::from_bits(0xfe80 << 112 | number);
        let (question, advert) = (135, 136);
        let steps = [
            ("a first address", true, says(1, global(10))),
            ("a second", true, says(1, global(11))),
            ("one of the link", true, says(1, local(1))),
            ("a neighbour's", false, says(2, global(10))),
            ("a neighbour's of the link", false, says(2, local(1))),
            ("its own", true, says(2, local(2))),
            ("that it has the neighbour's", false, discovery(2, local(2), advert, global(10))),
            ("that somebody has it", false, discovery(2, nobody, advert, global(10))),
            ("that it has its own", true, discovery(2, global(20), advert, global(20))),
            ("which is its own by that", false, says(1, global(20))),
            // Who looks whether an address is free has it, if it is.
            ("whether one is free", true, discovery(1, nobody, question, global(12))),
            ("that it is not", false, discovery(2, local(2), advert, global(12))),
            ("whether a neighbour's is free", true, discovery(2, nobody, question, global(10))),
            ("that it is not, by the neighbour", true, discovery(1, global(10), advert, global(10))),
            ("using it all the same", false, says(2, global(10))),
            ("whose the own is, by who is nobody", true, discovery(2, nobody, question, local(2))),
        ];
        for (what, good, bytes) in &steps {
            let is_one = bytes[6..12] == mac(1).bytes();
            let (number, from, to) = if is_one { (1, &first, &second) } else { (2, &second, &first) };
            assert_eq!(passes(number, from, to, bytes), *good, "{what}");
        }
        let count = |number: u8| {
            let bad = steps.iter().filter(|(_, good, bytes)| !good && bytes[6..12] == mac(number).bytes());
            bad.count() as u64
        };
        let counted = |world: &World| [&one, &two].map(|card| spoofed(world, &card.interface));
        assert_eq!(counted(&world), [count(1), count(2)]);

        // Another helper knows as much.
        let rules = world.rules();
        world.kill();
        world.start();
        assert_eq!((world.rules(), counted(&world)), (rules, [count(1), count(2)]));
        assert!(!passes(2, &second, &first, &says(2, global(10))), "after a start");
        // The card has its addresses when it comes back; and somebody who cleared all has made room.
        world.ask(&Request::Detach { interface: one.interface }).unwrap();
        let (one, first) = world.attach(card(1, to.clone()));
        assert!(!passes(2, &second, &first, &says(2, global(10))), "while it was away");
        assert!(passes(1, &first, &second, &says(1, global(10))), "when it is back");
        world.host.run("nft flush ruleset");
        world.until("it is repaired", || world.rules().matches("priority filter + 10").count() == 2);
        assert!(passes(2, &second, &first, &says(2, global(10))), "who is first now");

        // One guest cannot have all addresses. Those that it has go on.
        let gets = (100..200).filter(|number| passes(2, &second, &first, &says(2, global(*number)))).count();
        assert!((28..34).contains(&gets), "{gets}");
        assert!(passes(2, &second, &first, &says(2, global(10))));
        // Who may pretend may do so here, too.
        let (three, third) = world.attach(netctl::Attach { spoofing: true, ..card(3, to.clone()) });
        assert!(passes(3, &third, &first, &says(3, global(10))), "who may pretend");
        for card in [one, two, three] {
            world.ask(&Request::Detach { interface: card.interface }).unwrap();
        }
        assert!(!world.rules().contains("lodge6"), "{}", world.rules());
    }
}

#[test]
fn rules_hold_for_what_is_tagged() {
    let Some(world) = World::new("true") else { return };
    let rules = ["deny out tcp 25", "deny in tcp 25"];
    let rules = rules.map(|rule| rule.parse().unwrap()).to_vec();
    let tagged = |tags: &[u16], packet: &[u8]| {
        let tags: Vec<u8> = tags.iter().flat_map(|tag| [&tag.to_be_bytes()[..], &[0, 5]].concat()).collect();
        [&tags[..], &0x0800u16.to_be_bytes(), packet].concat()
    };
    let free = Ipv4Addr::new(192, 168, 122, 77);
    for spoofing in [false, true] {
        let attach = netctl::Attach { spoofing, rules: rules.clone(), ..card(1, network("default")) };
        let (one, tap) = world.attach(attach);
        let (two, other) = world.attach(netctl::Attach { spoofing: true, ..card(2, network("default")) });
        let mut dropped = 0;
        for (number, from, to) in [(1, &tap, &other), (2, &other, &tap)] {
            let own = if number == 1 { one.address.unwrap() } else { free };
            let packet = ipv4(own, Ipv4Addr::BROADCAST, UDP, &ports(7, 53, b"question"));
            for (tags, good) in [(&[][..], true), (&[0x8100], false), (&[0x88a8, 0x8100], false)] {
                let bytes = [&ALL[..], &mac(number).bytes(), &tagged(tags, &packet)].concat();
                assert_eq!(passes(number, from, to, &bytes), good, "{number} {tags:x?} {spoofing}");
                dropped += u64::from(!good);
            }
        }
        let Ok(Answer::Networks(networks)) = world.ask(&Request::List) else { panic!() };
        let cards = networks.iter().flat_map(|network| &network.cards);
        let counted: u64 = cards.map(|card| card.spoofed + card.denied).sum();
        assert_eq!(counted, dropped);
        for card in [one, two] {
            world.ask(&Request::Detach { interface: card.interface }).unwrap();
        }
    }
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
