//! Networks that need rights: who reaches whom, cell by cell, with stock kernels as guests, and network namespaces as hosts and machines
//! beside them.

use std::net::IpAddr;

use images::Options;
use lodge_tests::default_guest;
use lodge_tests::world::{Capture, Guest, World, get, serve_names, serve_pages, wait};

fn world(name: &str) -> Option<World> {
    default_guest(&Options::default())?;
    let world = World::with_helper(name)?;
    world.outside.inside(|| {
        serve_pages("[::]:8000");
        serve_names("198.51.100.1:53");
    });
    world.host.inside(|| serve_pages("[::]:8001"));
    Some(world)
}

fn addresses<const N: usize>(all: [&str; N]) -> [IpAddr; N] {
    all.map(|address| address.parse().unwrap())
}

/// A guest's addresses, as in a URL.
fn both(guest: &Guest<'_>) -> [String; 2] {
    [guest.address().to_string(), format!("[{}]", guest.address6())]
}

#[test]
fn guests_of_a_network_reach_each_other_and_as_the_host_the_world() {
    let Some(world) = world("nat") else { return };
    world.run(&["net", "create", "lab", "--isolated"]).expect(0);
    let capture = Capture::start(&world.outside);
    let forwards = ["198.51.100.2:8080:80", "[2001:db8::2]:8080:80", "8081:80"];
    let forwards = forwards.iter().flat_map(|forward| ["--forward", forward]);
    let one = world.start("one", &["--network", "default"].into_iter().chain(forwards).collect::<Vec<_>>());
    let two = world.start("two", &["--network", "default"]);
    let three = world.start("three", &["--network", "lab"]);
    let guests = [&one, &two, &three];
    guests.iter().for_each(|guest| guest.is_connected());
    guests.iter().for_each(|guest| guest.serve("from a guest"));
    assert!(one.address().to_string().starts_with("192.168.122."), "{}", one.address());

    // Guest to the outside: as the host, in both kinds of addresses, and by name.
    assert_eq!(one.page("198.51.100.1:8000"), "198.51.100.2");
    assert_eq!(one.page("[2001:db8::1]:8000"), "2001:db8::2");
    assert_eq!(two.page("outside.test:8000"), "198.51.100.2");
    one.run("ping -c 1 -W 20 198.51.100.1").expect(0);
    assert!(!three.reaches("198.51.100.1:8000") && !three.reaches("[2001:db8::1]:8000"));
    // Outside to guest: at forwarded ports, and nowhere else even for who knows a route.
    world
        .outside
        .run("ip route add 192.168.122.0/24 via 198.51.100.2; ip -6 route add fd00::/8 via 2001:db8::2");
    for at in ["198.51.100.2:8080", "[2001:db8::2]:8080"] {
        let page = world.outside.inside(|| get(at));
        assert!(page.as_ref().is_ok_and(|page| page.ends_with("from a guest\n")), "{at}: {page:?}");
        assert!(world.outside.inside(|| get(&at.replace("8080", "8081"))).is_err());
    }
    let page = world.host.inside(|| get("127.0.0.1:8081"));
    assert!(page.as_ref().is_ok_and(|page| page.ends_with("from a guest\n")), "{page:?}");
    for address in both(&one) {
        let page = world.outside.inside(|| get(&format!("{address}:80")));
        assert!(page.is_err(), "{page:?}");
    }
    let taken = ["run", "--network", "default", "--forward", "0.0.0.0:8001:80"];
    let done = world.run(&taken).expect(2);
    assert!(done.err.contains("a program of this host's"), "{}", done.err);
    // Guest to host and back, on every network.
    let gateway =
        |guest: &Guest<'_>| guest.address().to_string().rsplit_once('.').unwrap().0.to_owned() + ".1";
    for guest in guests {
        assert_eq!(guest.page(&format!("{}:8001", gateway(guest))), guest.address().to_string());
        for address in both(guest) {
            let page = world.host.inside(|| get(&format!("{address}:80")));
            assert!(page.as_ref().is_ok_and(|page| page.ends_with("from a guest\n")), "{address}: {page:?}");
        }
    }
    // Guest to guest: by name and address on the same network, not at all on another.
    assert_eq!(one.page("two/page"), "from a guest");
    assert_eq!(two.page("one/page"), "from a guest");
    for address in both(&one) {
        assert_eq!(two.page(&format!("{address}/page")), "from a guest");
        assert!(!three.reaches(&format!("{address}/page")), "{address}");
    }
    assert!(both(&three).iter().all(|address| !one.reaches(&format!("{address}/page"))));
    // The world has seen the host, and nobody else.
    let all = ["198.51.100.1", "198.51.100.2", "2001:db8::1", "2001:db8::2"];
    assert_eq!(capture.seen(), addresses(all));

    let leases = world.run(&["net", "leases", "default"]).expect(0).out;
    assert!(leases.contains("one") && leases.contains(&two.address().to_string()), "{leases}");
    world.run(&["net", "check"]).expect(0);
    let before = one.address();
    [one, two, three].into_iter().for_each(|guest| drop(guest.stop()));
    // It is the same one again.
    let one = world.start("one", &["--network", "default"]);
    one.is_connected();
    assert_eq!(one.address(), before);
    one.stop();
}

#[test]
fn bridged_guests_are_on_the_lan_of_their_hosts() {
    let (Some(here), Some(there)) = (world("bridge"), World::with_helper("bridge-there")) else { return };
    // The other host's link goes to the same switch, which the outside is.
    there.host.run("ip link set out down; ip addr flush dev out");
    here.outside.run(&format!(
        "ip link add lan type bridge; ip link set in master lan; ip addr flush dev in; \
         ip link add port type veth peer name uplink netns {}; ip link set port master lan up; \
         ip link set lan up; ip addr add 198.51.100.1/24 dev lan; ip addr add 2001:db8::1/64 dev lan nodad",
        there.host.pid()
    ));
    there.host.run("ip link set uplink up; ip addr add 198.51.100.3/24 dev uplink; ip addr add 2001:db8::3/64 dev uplink nodad");
    here.run(&["net", "bridge", "create", "br0", "--port", "out"]).expect(0);
    there.run(&["net", "bridge", "create", "br0", "--port", "uplink"]).expect(0);
    let capture = Capture::start(&here.outside);
    let one = here.start("one", &["--network", "bridge=br0"]);
    let two = there.start("two", &["--network", "bridge=br0"]);
    for (guest, last) in [(&one, 11), (&two, 12)] {
        guest.run(&format!(
            "ip addr add 198.51.100.{last}/24 dev eth0; ip addr add 2001:db8::{last}/64 dev eth0; ip link set eth0 up"
        ))
        .expect(0);
        guest.serve("from a guest");
    }
    // The world sees the guest itself, and reaches it; so do its host and the other's guest.
    assert_eq!(one.page("198.51.100.1:8000"), "198.51.100.11");
    assert_eq!(one.page("[2001:db8::1]:8000"), "2001:db8::11");
    assert_eq!(one.page("198.51.100.2:8001"), "198.51.100.11");
    for address in ["198.51.100.11:80", "[2001:db8::11]:80", "198.51.100.12:80", "[2001:db8::12]:80"] {
        for host in [&here.outside, &here.host, &there.host] {
            let page = host.inside(|| get(address));
            assert!(page.as_ref().is_ok_and(|page| page.ends_with("from a guest\n")), "{address}: {page:?}");
        }
    }
    for (guest, other) in [(&one, "198.51.100.12"), (&two, "198.51.100.11"), (&one, "[2001:db8::12]")] {
        assert_eq!(guest.page(&format!("{other}/page")), "from a guest");
    }
    assert!(capture.seen().contains(&addresses(["198.51.100.12"])[0]));
    // What a guest says in another's name goes nowhere.
    one.run("ip link set eth0 down; ip link set eth0 address 52:4c:00:00:00:77; ip link set eth0 up")
        .expect(0);
    assert!(!one.reaches("198.51.100.1:8000"));
    one.stop();
    two.stop();
    here.run(&["net", "bridge", "rm", "br0"]).expect(0);
    here.host.run("ip addr show dev out | grep -q 198.51.100.2/24");
}

#[test]
fn a_direct_guest_is_beside_its_host() {
    let Some(world) = world("direct") else { return };
    let address = |guest: &Guest<'_>, last: u8| {
        guest.run(&format!(
            "ip addr add 198.51.100.{last}/24 dev eth0; ip addr add 2001:db8::{last}/64 dev eth0; ip link set eth0 up"
        ))
        .expect(0);
        guest.serve("from a guest");
    };
    let one = world.start("one", &["--network", "direct=out"]);
    let two = world.start("two", &["--network", "direct=out"]);
    address(&one, 11);
    address(&two, 12);
    assert_eq!(one.page("198.51.100.1:8000"), "198.51.100.11");
    assert_eq!(one.page("[2001:db8::1]:8000"), "2001:db8::11");
    let page = world.outside.inside(|| get("[2001:db8::12]:80"));
    assert!(page.is_ok_and(|page| page.ends_with("from a guest\n")));
    assert_eq!(one.page("198.51.100.12/page"), "from a guest");
    assert_eq!(one.page("[2001:db8::12]/page"), "from a guest");
    let done = world.run(&["run", "--network", "direct=out,mode=passthru"]).expect(2);
    assert!(done.err.contains("would take out away"), "{}", done.err);
    // The host and its guests are nothing to each other.
    assert!(!one.reaches("198.51.100.2:8001") && !one.reaches("[2001:db8::2]:8001"));
    let page = world.host.inside(|| get("198.51.100.11:80"));
    assert!(page.is_err(), "{page:?}");
    let said = one.stop().err;
    assert!(said.contains("--host-access"), "{said}");

    let one = world.start("one", &["--network", "direct=out", "--host-access"]);
    address(&one, 11);
    assert_eq!(one.page("198.51.100.1:8000"), "198.51.100.11");
    assert_eq!(one.page("198.51.100.2:8001"), "198.51.100.11");
    assert_eq!(one.page("[2001:db8::2]:8001"), "2001:db8::11");
    for address in ["198.51.100.11:80", "[2001:db8::11]:80"] {
        let page = world.host.inside(|| get(address));
        assert!(page.as_ref().is_ok_and(|page| page.ends_with("from a guest\n")), "{address}: {page:?}");
    }
    one.stop();
    two.stop();
    // Nothing of it is left, and the host is as before.
    wait("the end of its links", || {
        world
            .host
            .command("sh")
            .args(["-c", "ip -br link | grep -q lmv"])
            .status()
            .is_ok_and(|status| !status.success())
    });
    let pages = world.host.inside(|| ["198.51.100.1:8000", "[2001:db8::1]:8000"].map(get));
    assert!(pages.iter().all(Result::is_ok), "{pages:?}");
}

#[test]
fn a_guest_whose_network_goes_lives_on() {
    let Some(world) = world("gone") else { return };
    let one = world.start("one", &["--network", "default", "--rule", "deny out tcp 8001"]);
    one.is_connected();
    assert_eq!(one.page("198.51.100.1:8000"), "198.51.100.2");
    assert!(!one.reaches("192.168.122.1:8001"));
    let carrier = |one: &Guest<'_>, value: u8| {
        one.run(&format!("until [ $(cat /sys/class/net/eth0/carrier) = {value} ]; do sleep 0.1; done"))
            .expect(0);
    };
    // Somebody takes its link away: it gets another.
    world.host.run("ip link del $(ip -br link show master virbr0 | cut -d' ' -f1)");
    wait("the link", || one.run("ping -c 1 -W 1 192.168.122.1").code() == 0);
    // Somebody stops the network: the cable is out until it runs again.
    world.run(&["net", "stop", "default"]).expect(2);
    world.run(&["net", "stop", "default", "--force"]).expect(0);
    carrier(&one, 0);
    world.run(&["net", "start", "default"]).expect(0);
    carrier(&one, 1);
    wait("the network", || one.reaches("198.51.100.1:8000"));
    // Cards come and go, and of those that went nothing is left.
    for _ in 0..2 {
        world.run(&["nic", "attach", "one", "direct=out,rate=10M"]).expect(0);
        one.run("until [ -e /sys/class/net/eth1 ]; do sleep 0.1; done").expect(0);
        world.run(&["nic", "down", "one", "2"]).expect(0);
        let nics = world.run(&["nic", "ls", "one"]).expect(0).out;
        assert!(nics.contains("direct=out   down") && nics.contains("10 Mbit/s"), "{nics}");
        world.run(&["nic", "detach", "one", "2"]).expect(0);
        world.host.run("! ip -br link | grep lmv");
    }
    // The helper is killed, and the next one goes on with what there is.
    world.kill_helper();
    world.start_helper();
    let networks = world.run(&["net", "ls"]).expect(0).out;
    assert!(networks.contains("one"), "{networks}");
    assert!(one.reaches("198.51.100.1:8000") && !one.reaches("192.168.122.1:8001"));
    one.stop();
    wait("its link's end", || !world.run(&["net", "ls"]).expect(0).out.contains("one"));
}
