//! Bridges over the host's links, with real links, addresses and routes in network namespaces.

mod world;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use netctl::{Answer, Bridge, Error, Request};
use world::{Host, PATIENCE, World};

/// A host with addresses and routes of all kinds, permanent, on its link `eth0`, and a machine beside it on the same link.
fn hosts() -> Option<(World, Host)> {
    let beside = Host::new()?;
    let world = World::new(&format!(
        "mount -t tmpfs none /run
         mount -t tmpfs none /mnt; echo nameserver 198.51.100.1 > /mnt/resolv; mount --bind /mnt/resolv /etc/resolv.conf
         ip link add eth0 type veth peer name peer netns {}
         ip link set eth0 up
         ip address add 198.51.100.2/24 brd + dev eth0
         ip address add 198.51.100.3/24 dev eth0 label eth0:1
         ip address add 2001:db8::2/64 dev eth0
         ip address add 2001:db8::3/64 dev eth0 valid_lft 5000 preferred_lft 4000
         ip route add default via 198.51.100.1 metric 100
         ip route add 203.0.113.0/24 via 198.51.100.9 src 198.51.100.3 proto static
         ip route add 192.0.2.0/24 dev eth0 scope link table 77
         ip -6 route add default via 2001:db8::1 metric 50",
        beside.pid()
    ))?;
    beside.run(
        "ip link set peer up
         ip address add 198.51.100.1/24 dev peer && ip address add 2001:db8::1/64 dev peer nodad",
    );
    world.until("usable addresses", || world.text("ip -6 address show tentative").is_empty());
    world.host.run("ip -6 route add 2001:db8:7::/48 via fe80::99 dev eth0 src 2001:db8::2");
    Some((world, beside))
}

fn bridge(ports: &[&str]) -> Bridge {
    Bridge { name: "br0".into(), ports: ports.iter().map(|port| (*port).into()).collect() }
}

fn create(force: bool) -> Request {
    Request::CreateBridge { bridge: bridge(&["eth0"]), force }
}

fn remove() -> Request {
    Request::RemoveBridge { name: "br0".into(), force: false }
}

/// All addresses and routes of a link, but for what is numbered by chance.
fn state(world: &World, link: &str) -> Vec<String> {
    let script = format!(
        "ip -o address show dev {link} | sed 's/^[0-9]*: *//; s/[0-9]*sec/Nsec/g'
         ip -4 -d route show table all dev {link}; ip -6 -d route show table all dev {link} | grep -v 'local\\|multicast\\|anycast' || true"
    );
    let mut lines: Vec<String> = world.text(&script).lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

fn renamed(lines: &[String], from: &str, to: &str) -> Vec<String> {
    let mut lines: Vec<String> = lines.iter().map(|line| line.replace(from, to)).collect();
    lines.sort();
    lines
}

/// A connection from the host to the machine beside it.
fn connection(world: &World, beside: &Host, address: &str) -> (TcpStream, TcpStream) {
    let listener = beside.inside(|| TcpListener::bind((address, 7000)).unwrap());
    let stream = world.host.inside(|| TcpStream::connect((address, 7000)).unwrap());
    let accepted = listener.accept().unwrap().0;
    for stream in [&stream, &accepted] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
    }
    (stream, accepted)
}

/// Stops them, even if a test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends to and fro until it is told to stop, and tells how long it took at most.
fn exchange((mut here, mut there): (TcpStream, TcpStream), stop: &AtomicBool) -> Duration {
    let mut longest = Duration::ZERO;
    let mut number = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let begin = Instant::now();
        let mut bytes = [0; 8];
        here.write_all(&number.to_be_bytes()).unwrap();
        there.read_exact(&mut bytes).unwrap();
        there.write_all(&bytes).unwrap();
        here.read_exact(&mut bytes).unwrap();
        assert_eq!(u64::from_be_bytes(bytes), number);
        longest = longest.max(begin.elapsed());
        number += 1;
    }
    assert!(number > 100, "it was not idle");
    longest
}

#[test]
fn addresses_routes_and_connections_survive() {
    let Some((world, beside)) = hosts() else { return };
    let before = state(&world, "eth0");
    assert!(before.len() >= 12, "{before:#?}");
    let connections = ["198.51.100.1", "2001:db8::1"].map(|address| connection(&world, &beside, address));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let threads = connections.map(|connection| scope.spawn(|| exchange(connection, &stop)));
        let stopping = Stop(&stop);
        let calm = || std::thread::sleep(Duration::from_millis(300));
        for _ in 0..2 {
            calm();
            let Answer::Done(notes) = world.ask(&create(false)).unwrap() else { panic!() };
            assert_eq!(notes, ["the host's addresses and routes on eth0 are on br0 now"]);
            calm();
            assert_eq!(state(&world, "br0"), renamed(&before, "eth0", "br0"));
            assert_eq!(state(&world, "eth0"), Vec::<String>::new());
            // Twice is once.
            assert!(matches!(world.ask(&create(false)), Ok(Answer::Done(notes)) if notes.is_empty()));
            world.ask(&remove()).unwrap();
            calm();
            assert_eq!(state(&world, "eth0"), before);
            assert!(world.text("ip link show br0 2>/dev/null || true").is_empty());
        }
        drop(stopping);
        for thread in threads {
            let longest = thread.join().unwrap();
            println!("a connection waited for {longest:?} at most");
            assert!(longest < Duration::from_secs(5));
        }
    });
    assert_eq!(world.text("cat /proc/sys/net/ipv6/conf/eth0/accept_dad"), "1\n");
}

#[track_caller]
fn refused(world: &World, request: &Request, why: &str) {
    match world.ask(request) {
        Err(Error::Refused { why: said, help }) => {
            assert!(said.contains(why) && help.is_some(), "{said:?} {help:?}, not {why:?}");
        }
        other => panic!("{other:?}, not {why:?}"),
    }
}

#[test]
fn what_cannot_be_or_would_cut_off_is_refused() {
    let Some((world, beside)) = hosts() else { return };
    let before = state(&world, "eth0");
    let over = |ports: &[&str]| Request::CreateBridge { bridge: bridge(ports), force: true };
    refused(&world, &over(&["eth9"]), "there is no link eth9");
    refused(&world, &over(&["lo"]), "loopback");
    world.host.run(
        "ip link add other type bridge && ip link add a1 type veth peer name a2 && ip link set a1 master other
         ip link add ride link a2 type macvlan mode bridge
         ip link add b1 type veth peer name b2 && ip link set b1 up && ip address add 192.168.9.1/24 dev b1
         ip tuntap add tun7 mode tun",
    );
    refused(&world, &over(&["a1"]), "it belongs to other");
    refused(&world, &over(&["other"]), "bridge itself");
    refused(&world, &over(&["a2"]), "ride sits on it");
    refused(&world, &over(&["tun7"]), "no Ethernet");
    refused(&world, &over(&["eth0", "b1"]), "both eth0 and b1 have addresses");
    let named = Bridge { name: "other".into(), ports: vec!["eth0".into()] };
    refused(&world, &Request::CreateBridge { bridge: named, force: true }, "called other already");
    refused(&world, &remove(), "no bridge br0 was made");

    // What force overrules.
    let index = world.text("cat /proc/net/if_inet6 | awk '$6 == \"eth0\" {print $2}' | head -1");
    let index = u32::from_str_radix(index.trim(), 16).unwrap();
    let manage = |file: &str, text: &str| {
        world.host.run(&format!("mkdir -p $(dirname {file}{index}) && echo {text} > {file}{index}"));
        if text.contains("=unmanaged") || text.contains("=false") {
            return;
        }
        let who =
            if file.contains("systemd") { "systemd-networkd manages" } else { "NetworkManager manages" };
        refused(&world, &create(false), who);
    };
    for (file, yes, no) in [
        ("/run/NetworkManager/devices/", "managed=true", "managed=false"),
        ("/run/systemd/netif/links/", "ADMIN_STATE=configured", "ADMIN_STATE=unmanaged"),
    ] {
        manage(file, yes);
        manage(file, no);
    }
    world.host.run("ip address change 198.51.100.2/24 brd + dev eth0 valid_lft 600 preferred_lft 600");
    refused(&world, &create(false), "by DHCP");
    world
        .host
        .run("ip address change 198.51.100.2/24 brd + dev eth0 valid_lft forever preferred_lft forever");
    let ssh = world.host.inside(|| TcpListener::bind("198.51.100.2:22").unwrap());
    let session = beside.inside(|| TcpStream::connect("198.51.100.2:22").unwrap());
    let accepted = ssh.accept().unwrap().0;
    refused(&world, &create(false), "an SSH session goes over eth0");
    world.host.run("mount -t tmpfs none /sys/class/net && mkdir -p /sys/class/net/eth0/phy80211");
    refused(&world, &create(true), "wireless");
    world.host.run("umount /sys/class/net");
    assert_eq!(state(&world, "eth0"), before, "nothing has changed");

    // And it survives.
    world.ask(&create(true)).unwrap();
    let stop = AtomicBool::new(false);
    for stream in [&session, &accepted] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| exchange((session, accepted), &stop));
        std::thread::sleep(Duration::from_millis(300));
        stop.store(true, Ordering::Relaxed);
        thread.join().unwrap();
    });
}

#[test]
fn a_failure_in_the_middle_leaves_all_as_it_was() {
    let Some((world, _beside)) = hosts() else { return };
    world.host.run("ip link add wide type veth peer name wider && ip link set wide mtu 1200");
    let before = state(&world, "eth0");
    let bad = Bridge { name: "br0".into(), ports: vec!["eth0".into(), "wide".into()] };
    // IPv6 needs 1280 bytes, which the bridge does not have: it takes no IPv6 address.
    let failed = world.ask(&Request::CreateBridge { bridge: bad, force: true });
    assert!(failed.is_err(), "{failed:?}");
    assert_eq!(state(&world, "eth0"), before);
    assert!(world.text("ip link show br0 2>/dev/null || true").is_empty());
    assert!(!world.path("run").join("br0.moving").exists());
}

#[test]
fn the_helper_is_killed_in_the_middle() {
    let Some((mut world, _beside)) = hosts() else { return };
    let before = state(&world, "eth0");
    let bridged = renamed(&before, "eth0", "br0");
    let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().subsec_nanos();
    println!("seed {seed}");
    let mut random = seed | 1;
    let (mut middles, mut there) = (0, false);
    for round in 0..60 {
        let request = if there { remove() } else { create(true) };
        let mut client = world.client();
        let asked = std::thread::spawn(move || drop(client.ask(&request)));
        // From the moment when it has begun, somewhere in what takes some ten milliseconds.
        let note = world.path("run").join("br0.moving");
        let end = Instant::now() + Duration::from_secs(2);
        while !note.exists() && Instant::now() < end && !asked.is_finished() {
            std::hint::spin_loop();
        }
        random ^= random << 13;
        random ^= random >> 17;
        random ^= random << 5;
        std::thread::sleep(Duration::from_micros(u64::from(random % 12_000)));
        world.kill();
        asked.join().unwrap();
        middles += usize::from(note.exists());
        world.start();
        assert!(!note.exists());
        there = !world.text("ip link show br0 2>/dev/null || true").is_empty();
        let (with, without) = if there { ("br0", "eth0") } else { ("eth0", "br0") };
        assert_eq!(state(&world, with), *if there { &bridged } else { &before }, "round {round}");
        assert!(!there || state(&world, without).is_empty());
        if middles >= 8 {
            break;
        }
    }
    assert!(middles >= 3, "it was never in the middle");
    println!("killed in the middle {middles} times");

    // After the host has started anew, bridges that are declared are made again.
    if !there {
        world.ask(&create(true)).unwrap();
    }
    world.kill();
    world.host.run(
        "ip link set eth0 nomaster; ip link del br0; sysctl -qw net.ipv6.conf.eth0.disable_ipv6=0
        ip address add 198.51.100.2/24 brd + dev eth0 && ip route add default via 198.51.100.1",
    );
    world.start();
    assert!(world.text("ip -4 -o address show dev br0").contains("198.51.100.2/24"));
    assert!(world.text("ip route show default").contains("via 198.51.100.1 dev br0"));
}
