//! Who reaches whom, with namespaces as guests: their own TCP/IP stacks speak through taps.

mod world;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};

use netctl::{Answer, Attach, Direct, Forward, Mode, Network, Protocol, Request, Target};
use world::{Guest, Host, World, asks, card, network, reaches, serve};

#[test]
fn vm() {
    world::vm();
}

/// A guest that has given itself the addresses that it is to have.
struct Configured {
    guest: Guest,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    gateway6: Ipv6Addr,
}

fn configured(world: &World, attach: Attach) -> Configured {
    let guest = Guest::new(world, attach.clone());
    let v4 = guest.attached.address.unwrap();
    let Ok(Answer::Networks(networks)) = world.ask(&Request::List) else { panic!() };
    let network = networks.into_iter().filter_map(|status| status.network);
    let network = network.into_iter().find(|network| attach.to == world::network(&network.name)).unwrap();
    let gateway6 = network.ipv6.unwrap().addr();
    let v6 = Ipv6Addr::from_bits(gateway6.to_bits() | u128::from(v4.octets()[3]) << 8);
    let gateway = network.ipv4.unwrap();
    guest.host.run(&format!(
        "ip addr add {v4}/{} dev eth0; ip route add default via {}; ip addr add {v6}/64 dev eth0 nodad; \
         ip route add default via {gateway6}",
        gateway.prefix_len(),
        gateway.addr()
    ));
    guest.serve(80);
    Configured { guest, v4, v6, gateway6 }
}

#[test]
fn networks_are_what_they_say() {
    let Some(outside) = Host::new() else { return };
    let Some(world) = World::new(&format!(
        "ip link add out type veth peer name in netns {}; ip addr add 198.51.100.2/24 dev out; \
         echo 1 > /proc/sys/net/ipv6/conf/out/accept_ra; ip link set out up; ip addr add 2001:db8::2/64 dev out nodad",
        outside.pid()
    )) else {
        return;
    };
    outside.run(
        "ip addr add 198.51.100.1/24 dev in; ip link set in up; ip addr add 2001:db8::1/64 dev in nodad",
    );
    serve(&outside, 8000);
    serve(&world.host, 8001);
    for (name, mode) in [("lab", Mode::Isolated), ("open", Mode::Routed)] {
        let made = world.ask(&Request::Create(Box::new(Network { mode, ..Network::new(name) })));
        assert!(matches!(made, Ok(Answer::Done(_))), "{made:?}");
    }
    let forwards =
        vec![Forward { protocol: Protocol::Tcp, listen: "0.0.0.0:8080".parse().unwrap(), port: 80 }];
    let nat = configured(&world, Attach { forwards, ..card(1, network("default")) });
    let twin = configured(&world, card(2, network("default")));
    let alone = configured(&world, card(3, network("lab")));
    let open = configured(&world, card(4, network("open")));
    let all = [&nat, &twin, &alone, &open];
    for to in all {
        outside
            .run(&format!("ip route add {} via 198.51.100.2; ip route add {} via 2001:db8::2", to.v4, to.v6));
    }

    let sees = |what: &str, seen: Result<IpAddr, std::io::ErrorKind>, expected: Option<IpAddr>| match expected
    {
        Some(address) => assert_eq!(seen, Ok(address), "{what}"),
        None => assert!(seen.is_err(), "{what}: {seen:?}"),
    };
    let (host4, host6): (IpAddr, IpAddr) = ("198.51.100.2".parse().unwrap(), "2001:db8::2".parse().unwrap());
    for (what, from, seen4, seen6) in [
        ("nat", &nat, Some(host4), Some(host6)),
        ("isolated", &alone, None, None),
        ("routed", &open, Some(open.v4.into()), Some(open.v6.into())),
    ] {
        sees(&format!("{what} to outside"), from.guest.asks("198.51.100.1:8000"), seen4);
        sees(&format!("{what} to outside, IPv6"), from.guest.asks("[2001:db8::1]:8000"), seen6);
        let back = (seen4 == Some(from.v4.into())).then_some("198.51.100.1".parse().unwrap());
        sees(&format!("outside to {what}"), asks(&outside, &format!("{}:80", from.v4)), back);
        let back = back.map(|_| "2001:db8::1".parse().unwrap());
        sees(&format!("outside to {what}, IPv6"), asks(&outside, &format!("[{}]:80", from.v6)), back);
        // The host and its guests always reach each other.
        let own = from.guest.asks(&format!("[{}]:8001", from.gateway6));
        sees(&format!("{what} to the host"), own, Some(from.v6.into()));
        sees(
            &format!("the host to {what}"),
            asks(&world.host, &format!("[{}]:80", from.v6)),
            Some(from.gateway6.into()),
        );
        assert!(asks(&world.host, &format!("{}:80", from.v4)).is_ok());
    }
    sees("neighbours", twin.guest.asks(&format!("{}:80", nat.v4)), Some(twin.v4.into()));
    sees("neighbours, IPv6", twin.guest.asks(&format!("[{}]:80", nat.v6)), Some(twin.v6.into()));
    for (from, to) in
        [(&nat, &alone), (&nat, &open), (&open, &nat), (&open, &alone), (&alone, &open), (&alone, &nat)]
    {
        sees("another network", from.guest.asks(&format!("{}:80", to.v4)), None);
        sees("another network, IPv6", from.guest.asks(&format!("[{}]:80", to.v6)), None);
    }
    // The forwarded port: from outside, from the host itself, and from a neighbour, who is seen as the host.
    sees("the port", asks(&outside, "198.51.100.2:8080"), Some("198.51.100.1".parse().unwrap()));
    sees("the host's own port", asks(&world.host, "198.51.100.2:8080"), Some(host4));
    assert!(twin.guest.asks("198.51.100.2:8080").is_ok());
    sees("the port from an isolated network", alone.guest.asks("198.51.100.2:8080"), None);
    // The host still hears routers.
    assert_eq!(world.text("cat /proc/sys/net/ipv6/conf/out/accept_ra").trim(), "2");

    world.ask(&Request::Detach { interface: nat.guest.attached.interface.clone() }).unwrap();
    sees("a port that leads nowhere", asks(&outside, "198.51.100.2:8080"), None);
}

/// A guest on the host's link, which has taken these addresses.
fn on_the_link(world: &World, number: u8, host_access: bool) -> Guest {
    let to = Target::Direct { link: "e0".into(), mode: Direct::Bridge, host_access };
    let guest = Guest::new(world, card(number, to));
    // IPv6 asks whether anybody has the address; until then it has none.
    guest.host.run(&format!(
        "ip addr add 198.51.100.{number}/24 dev eth0; ip addr add 2001:db8::{number}/64 dev eth0; \
         while ip addr show dev eth0 | grep -q tentative; do sleep 0.05; done"
    ));
    guest.serve(80);
    guest
}

#[test]
fn the_host_reaches_guests_on_its_link_if_it_is_to() {
    let Some(outside) = Host::new() else { return };
    let script = "ip link add e0 type veth peer name in netns OUTSIDE; ip addr add 198.51.100.2/24 dev e0; \
                  ip link set e0 up; ip addr add 2001:db8::2/64 dev e0 nodad; \
                  for ip in ipv4 ipv6; do echo 100 > /proc/sys/net/$ip/neigh/e0/retrans_time_ms; done; \
                  echo 1 > /proc/sys/net/ipv4/conf/all/rp_filter; echo 1 > /proc/sys/net/ipv4/conf/e0/rp_filter";
    let Some(mut world) = World::new(&script.replace("OUTSIDE", &outside.pid().to_string())) else { return };
    outside.run(
        "ip addr add 198.51.100.1/24 dev in; ip link set in up; ip addr add 2001:db8::1/64 dev in nodad",
    );
    [&outside, &world.host].into_iter().for_each(|host| serve(host, 80));
    // Its own addresses of IPv6 appear when they like.
    let routes =
        |world: &World| world.text("{ ip route show table all; ip -6 route show table all; } | grep -v fe80");
    let nothing = (world.traces(), routes(&world));
    // A connection of before, which goes on.
    let listener = outside.inside(|| TcpListener::bind("198.51.100.1:9").unwrap());
    let mut before = world.host.inside(|| TcpStream::connect("198.51.100.1:9").unwrap());
    let mut other_end = listener.accept().unwrap().0;

    let alone = on_the_link(&world, 40, false);
    let note = &alone.attached.notes[0];
    assert!(note.contains("cannot reach each other over e0") && note.contains("--host-access"), "{note}");
    assert!(alone.asks("198.51.100.1:80").is_ok() && alone.asks("[2001:db8::1]:80").is_ok());
    let friend = on_the_link(&world, 50, true);
    assert!(friend.attached.notes.is_empty());
    assert!(friend.asks("198.51.100.1:80").is_ok(), "and all know its address by now");
    let check = |world: &World| {
        let v4 = |number: u8| Ok(IpAddr::from([198, 51, 100, number]));
        let v6 = |number: u16| Ok(IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, number]));
        world.until("the host knows where it is", || {
            let routes = world.text("ip route show; ip -6 route show");
            routes.contains("198.51.100.50 dev lmv") && routes.contains("2001:db8::50 dev lmv")
        });
        assert_eq!(asks(&world.host, "198.51.100.50:80"), v4(2));
        assert_eq!(asks(&world.host, "[2001:db8::50]:80"), v6(2));
        assert_eq!(friend.asks("198.51.100.2:80"), v4(50));
        assert_eq!(friend.asks("[2001:db8::2]:80"), v6(0x50));
        // As before: those who did not ask for it, and the wire.
        assert!(!reaches(&world.host, "198.51.100.40:80") && !reaches(&world.host, "[2001:db8::40]:80"));
        assert!(!reaches(&alone.host, "198.51.100.2:80") && !reaches(&alone.host, "[2001:db8::2]:80"));
        assert_eq!(friend.asks("198.51.100.40:80"), v4(50));
        assert_eq!(asks(&outside, "198.51.100.50:80"), v4(1));
        assert_eq!(asks(&outside, "[2001:db8::2]:80"), v6(1));
        assert_eq!(asks(&world.host, "198.51.100.1:80"), v4(2));
    };
    check(&world);
    world.kill();
    world.start();
    check(&world);
    // The wire never sees the host under another card's address.
    let host = world.text("cat /sys/class/net/e0/address");
    assert!(outside_text(&outside, "ip neigh show 198.51.100.2").contains(host.trim()));
    other_end.write_all(b"still").unwrap();
    let mut bytes = [0; 5];
    before.read_exact(&mut bytes).unwrap();

    // Who says to be somebody that is there is not believed.
    friend.host.run("ip addr add 198.51.100.1/32 dev eth0; ip addr add 198.51.100.77/24 dev eth0");
    friend.host.inside(|| {
        for from in ["198.51.100.1:0", "198.51.100.77:0"] {
            let socket = UdpSocket::bind(from).unwrap();
            socket.send_to(b"hello", "198.51.100.99:9").unwrap();
        }
    });
    world.until("another address is known", || world.text("ip route show").contains("198.51.100.77 dev lmv"));
    assert!(!world.text("ip route show").contains("198.51.100.1 dev lmv"));

    // Nor is who says to be somebody that the host has not met yet.
    outside.run("ip addr add 198.51.100.88/24 dev in");
    friend.host.run("ip addr add 198.51.100.88/24 dev eth0");
    friend
        .host
        .inside(|| UdpSocket::bind("198.51.100.88:0").unwrap().send_to(b"hello", "198.51.100.98:9").unwrap());
    world.until("the other one is asked and believed", || {
        world.text("ip neigh show 198.51.100.88 dev e0").contains("REACHABLE")
            && !world.text("ip route show").contains("198.51.100.88 dev lmv")
    });
    assert_eq!(asks(&world.host, "198.51.100.88:80"), Ok(IpAddr::from([198, 51, 100, 2])));

    for guest in [&friend, &alone] {
        world.ask(&Request::Detach { interface: guest.attached.interface.clone() }).unwrap();
    }
    assert_eq!((world.traces(), routes(&world)), nothing);
}

fn outside_text(host: &Host, script: &str) -> String {
    String::from_utf8(host.command("sh").args(["-ec", script]).output().unwrap().stdout).unwrap()
}
