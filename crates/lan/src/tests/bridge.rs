//! The servers on a real bridge, in a network namespace, and a guest's link in another one.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dhcproto::v4::{DhcpOption, Flags, Message, MessageType};
use dhcproto::{Decodable, Encodable};
use netctl::Mac;

use super::{Bed, write};
use crate::namespaces::Host;
use crate::{Lan, Options};

const PATIENCE: Duration = Duration::from_secs(20);

/// What a command says there.
fn output(host: &Host, script: &str) -> String {
    let output = host.command("sh").args(["-c", script]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "{what}: not after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_guest_on_a_bridge() {
    let (Some(host), Some(guest)) = (Host::new(), Host::new()) else { return };
    host.run(&format!(
        "ip link add br0 type bridge && ip address add 10.7.0.1/24 dev br0 && ip address add fd07::1/64 dev br0
         ip link add other type bridge && ip address add 10.8.0.1/24 dev other && ip link set other up
         ip link add tap0 type veth peer name eth0 && ip link set eth0 netns {}
         ip link set tap0 master br0 up && ip link set br0 up",
        guest.pid()
    ));
    guest.run("sysctl -qw net.ipv6.conf.eth0.accept_ra=1 && ip link set eth0 address 52:4c:00:00:00:01");
    let bed = Bed::new("10.7.0.1/24");
    let leases = Arc::new(bed.open());
    let mac: Mac = "52:4c:00:00:00:01".parse().unwrap();
    let mine = leases.reserve(mac, "web", 0, None).unwrap();
    let resolv_conf = write(bed.dir.path(), "resolv.conf", "nameserver 127.0.0.1\n");
    let options = Options {
        device: "br0".into(),
        ipv4: bed.pool,
        ipv6: Some("fd07::1/64".parse().unwrap()),
        router: true,
        domain: "lodge".into(),
        resolv_conf,
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let (ready, started) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let host = &host;
        scope.spawn(move || {
            host.inside(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    // Whoever starts them anew need not wait.
                    drop(Lan::start(options.clone(), leases.clone()).unwrap());
                    let lan = Lan::start(options.clone(), leases.clone()).unwrap();
                    // A second network beside it, with the same ports.
                    let ipv4 = "10.8.0.1/24".parse().unwrap();
                    let device = "other".into();
                    let other = Lan::start(Options { device, ipv4, ipv6: None, ..options }, leases.clone());
                    ready.send(()).unwrap();
                    let _ = stopped.await;
                    assert_eq!(other.unwrap().counts(), crate::Counts::default());
                    assert!(
                        lan.counts().dhcp_answered >= 2 && lan.counts().adverts >= 1,
                        "{:?}",
                        lan.counts()
                    );
                });
            });
        });
        // Ends the servers, however this ends.
        let stop = stop;
        started.recv_timeout(PATIENCE).unwrap();
        guest.run("ip link set eth0 up");
        guest.inside(|| by_dhcp(mac, mine));
        guest.run(&format!("ip address add {mine}/24 dev eth0"));
        guest.inside(|| names(mine));
        wait("an address by advertisement", || {
            output(&guest, "ip -6 address show dev eth0 scope global -tentative").contains("fd07::")
        });
        let routes = output(&guest, "ip -6 route show default");
        assert!(routes.contains("proto ra") && routes.contains("eth0"), "{routes}");
        guest.inside(names6);
        drop(stop);
        wait("the router's last words", || output(&guest, "ip -6 route show default").is_empty());
    });
}

/// A client without an address.
fn by_dhcp(mac: Mac, expected: Ipv4Addr) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).unwrap();
    socket.set_broadcast(true).unwrap();
    socket.bind_device(Some(b"eth0")).unwrap();
    socket.bind(&std::net::SocketAddr::from((Ipv4Addr::UNSPECIFIED, 68)).into()).unwrap();
    let socket = UdpSocket::from(socket);
    let ask = |kind, options: Vec<DhcpOption>| {
        let mut message = Message::default();
        message.set_chaddr(&mac.bytes()).set_flags(Flags::default().set_broadcast());
        message.opts_mut().insert(DhcpOption::MessageType(kind));
        options.into_iter().for_each(|option| drop(message.opts_mut().insert(option)));
        let mut bytes = [0; 1500];
        // Until the bridge forwards.
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        for _ in 0..20 {
            socket.send_to(&message.to_vec().unwrap(), (Ipv4Addr::BROADCAST, 67)).unwrap();
            if let Ok((len, from)) = socket.recv_from(&mut bytes) {
                assert_eq!(from, "10.7.0.1:67".parse().unwrap());
                return Message::from_bytes(&bytes[..len]).unwrap();
            }
        }
        panic!("no answer to {kind:?}");
    };
    let offer = ask(MessageType::Discover, vec![]);
    assert_eq!((offer.opts().msg_type(), offer.yiaddr()), (Some(MessageType::Offer), expected));
    let ack = ask(MessageType::Request, vec![DhcpOption::RequestedIpAddress(expected)]);
    assert_eq!((ack.opts().msg_type(), ack.yiaddr()), (Some(MessageType::Ack), expected));
}

const WEB: &[u8] = b"\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03web\x05lodge\x00\x00\x01\x00\x01";

fn names(mine: Ipv4Addr) {
    let socket = UdpSocket::bind((mine, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.send_to(WEB, "10.7.0.1:53").unwrap();
    let mut bytes = [0; 512];
    let len = socket.recv(&mut bytes).unwrap();
    assert!(bytes[..len].ends_with(&mine.octets()));
    std::net::TcpStream::connect("10.7.0.1:53").unwrap();
}

fn names6() {
    let socket = UdpSocket::bind("[::]:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let mut bytes = [0; 512];
    // The host's own address is checked for doubles for a second or two.
    let answered =
        (0..20).any(|_| socket.send_to(WEB, "[fd07::1]:53").is_ok() && socket.recv(&mut bytes).is_ok());
    assert!(answered, "no answer by IPv6");
}
