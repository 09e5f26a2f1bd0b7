//! A guest made of smoltcp's stack, at the cable of a network, with peers on the host's loopback.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use devices::net::{Guest, Header, Link, Mac, Offloads, Receiver};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, tcp, udp};
use smoltcp::wire::{EthernetAddress, IpCidr};

use super::*;

#[path = "hostile.rs"]
mod hostile;
#[path = "../../../../tests/src/namespaces.rs"]
mod namespaces;

const MAC: Mac = [0x52, 0x54, 0, 1, 2, 3];
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const PATIENCE: Duration = Duration::from_secs(120);

/// The card: frames that came, as many as there is room for.
#[derive(Default)]
struct Card {
    frames: Mutex<VecDeque<Vec<u8>>>,
    room: usize,
    refused: AtomicBool,
}

impl Receiver for Card {
    fn deliver(&self, mut header: Header, frame: &[u8]) -> bool {
        let mut frames = self.frames.lock().unwrap();
        if frames.len() >= self.room {
            self.refused.store(true, Ordering::Relaxed);
            return false;
        }
        assert!(header.segments.is_none() && frame.len() <= 1514, "the guest cannot take this: {header:?}");
        let mut frame = frame.to_vec();
        header.finish_checksum(&mut frame);
        frames.push_back(frame);
        true
    }

    fn set_up(&self, _: bool) {}

    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, ..Offloads::default() }
    }
}

/// The guest.
struct Bed {
    link: User,
    card: Arc<Card>,
    interface: Interface,
    sockets: SocketSet<'static>,
}

struct Cable<'a>(&'a User, &'a Card);
struct Came(Vec<u8>);
struct Goes<'a>(&'a User);

impl RxToken for Came {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Goes<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.send(&Header::default(), &frame);
        result
    }
}

impl Device for Cable<'_> {
    type RxToken<'a>
        = Came
    where
        Self: 'a;
    type TxToken<'a>
        = Goes<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Came, Goes<'_>)> {
        let frame = self.1.frames.lock().unwrap().pop_front()?;
        if self.1.refused.swap(false, Ordering::Relaxed) {
            self.0.room();
        }
        Some((Came(frame), Goes(self.0)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Goes<'_>> {
        Some(Goes(self.0))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

impl Bed {
    fn new(change: impl FnOnce(&mut Options)) -> Self {
        let mut options = Options { loopback: true, ..Options::new(MAC) };
        change(&mut options);
        let link = User::new(&options).unwrap();
        let card = Arc::new(Card { room: 64, ..Card::default() });
        let receiver: std::sync::Weak<dyn Receiver> = Arc::<Card>::downgrade(&card);
        link.connect(Guest::new(receiver));
        let config = Config::new(EthernetAddress(MAC).into());
        let now = smoltcp::time::Instant::now();
        let mut interface = Interface::new(config, &mut Cable(&link, &card), now);
        interface.update_ip_addrs(|all| all.push(IpCidr::new(GUEST.into(), 24)).unwrap());
        let guest6 = "fd6c:6f64:6765::15".parse().unwrap();
        interface.update_ip_addrs(|all| all.push(IpCidr::new(guest6, 64)).unwrap());
        interface.routes_mut().add_default_ipv4_route(GATEWAY).unwrap();
        Self { link, card, interface, sockets: SocketSet::new(Vec::new()) }
    }

    fn poll(&mut self) {
        let now = smoltcp::time::Instant::now();
        self.interface.poll(now, &mut Cable(&self.link, &self.card), &mut self.sockets);
    }

    /// Lets the guest run until this is so.
    fn until(&mut self, what: &str, mut so: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        loop {
            self.poll();
            if so(self) {
                return;
            }
            assert!(Instant::now() < end, "not in time: {what}; {:?}", self.link.counts());
            std::thread::yield_now();
        }
    }

    fn socket(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 256 << 10]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn connect(&mut self, to: SocketAddr, from: u16) -> SocketHandle {
        let handle = self.socket();
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        socket.connect(self.interface.context(), to, from).unwrap();
        handle
    }
}

fn gateway(port: u16) -> SocketAddr {
    SocketAddr::new(GATEWAY.into(), port)
}

/// Bytes that tell where they belong.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n ^ n >> 8 ^ n >> 16) as u8).collect()
}

#[test]
fn the_guest_gets_its_address_and_is_told_of_names() {
    let mut bed = Bed::new(|_| {});
    bed.interface.update_ip_addrs(|all| all.clear());
    let handle = bed.sockets.add(dhcpv4::Socket::new());
    let mut got = None;
    bed.until("an address", |bed| {
        if let Some(dhcpv4::Event::Configured(config)) =
            bed.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll()
        {
            got = Some((config.address.address(), config.router, config.dns_servers.to_vec()));
        }
        got.is_some()
    });
    assert_eq!(got, Some((GUEST, Some(GATEWAY), vec![Ipv4Addr::new(10, 0, 2, 3)])));
}

#[test]
fn bytes_go_both_ways_and_ends_are_ends() {
    both_ways("127.0.0.1:0", GATEWAY.into());
    match TcpListener::bind("[::1]:0") {
        Ok(_) => both_ways("[::1]:0", "fd6c:6f64:6765::2".parse().unwrap()),
        Err(error) => println!("skipped: no IPv6 here ({error})"),
    }
}

fn both_ways(at: &str, gateway: std::net::IpAddr) {
    let mut bed = Bed::new(|_| {});
    let listener = TcpListener::bind(at).unwrap();
    let port = listener.local_addr().unwrap().port();
    let sent = pattern(3 << 20);
    let expected = sent.clone();
    let peer = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut out = stream.try_clone().unwrap();
        let writer = std::thread::spawn(move || out.write_all(&expected));
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        writer.join().unwrap().unwrap();
        got
    });
    let handle = bed.connect(SocketAddr::new(gateway, port), 40_000);
    let (mut done, mut got) = (0, Vec::new());
    bed.until("all bytes", |bed| {
        let sent = &sent;
        let socket = bed.tcp(handle);
        while socket.can_send() && done < sent.len() {
            done += socket.send_slice(&sent[done..]).unwrap();
        }
        if done == sent.len() {
            socket.close();
        }
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), got.extend_from_slice(bytes))).unwrap();
        }
        done == sent.len() && !socket.may_recv() && got.len() == sent.len()
    });
    assert!(got == sent);
    assert!(peer.join().unwrap() == sent);
    bed.until("no connection is left", |bed| bed.link.counts().connections == 0);
    assert_eq!(bed.link.counts().dropped, 0);
}

#[test]
fn a_refused_connection_is_reset() {
    let mut bed = Bed::new(|_| {});
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let handle = bed.connect(gateway(free), 40_000);
    bed.until("the reset", |bed| bed.tcp(handle).state() == tcp::State::Closed);
    assert_eq!(bed.link.counts().connections, 0);
}

#[test]
fn the_host_s_loopback_is_closed_unless_it_is_opened() {
    let mut bed = Bed::new(|options| options.loopback = false);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let handle = bed.connect(gateway(listener.local_addr().unwrap().port()), 40_000);
    bed.until("the reset", |bed| bed.tcp(handle).state() == tcp::State::Closed);
    assert!(listener.accept().is_err());
}

#[test]
fn a_reset_from_either_side_is_one_for_the_other() {
    let mut bed = Bed::new(|_| {});
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = gateway(listener.local_addr().unwrap().port());
    let handle = bed.connect(to, 40_000);
    bed.until("the connection", |bed| bed.tcp(handle).may_send());
    let (mut peer, _) = listener.accept().unwrap();
    bed.tcp(handle).abort();
    bed.until("the end", |bed| bed.link.counts().connections == 0);
    assert_eq!(peer.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);

    let handle = bed.connect(to, 40_001);
    bed.until("the connection", |bed| bed.tcp(handle).may_send());
    let (peer, _) = listener.accept().unwrap();
    rustix::net::sockopt::set_socket_linger(&peer, Some(Duration::ZERO)).unwrap();
    drop(peer);
    bed.until("the reset", |bed| bed.tcp(handle).state() == tcp::State::Closed);
}

#[test]
fn a_peer_that_resets_while_the_guest_sends_ends_the_connection() {
    let mut bed = Bed::new(|_| {});
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let handle = bed.connect(gateway(listener.local_addr().unwrap().port()), 40_000);
    bed.until("the connection", |bed| bed.tcp(handle).may_send());
    let (peer, _) = listener.accept().unwrap();
    // Until the host's socket takes no more.
    let mut last = Instant::now();
    bed.until("no more goes", |bed| {
        let socket = bed.tcp(handle);
        if socket.can_send() {
            socket.send_slice(&[0; 1 << 14]).unwrap();
            last = Instant::now();
        }
        last.elapsed() > Duration::from_millis(300)
    });
    drop(peer);
    bed.until("the reset", |bed| bed.tcp(handle).state() == tcp::State::Closed);
    assert_eq!(bed.link.counts().connections, 0);
}

#[test]
fn what_a_slow_peer_has_not_taken_yet_outlives_the_guest_s_end() {
    let mut bed = Bed::new(|_| {});
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let handle = bed.connect(gateway(listener.local_addr().unwrap().port()), 40_000);
    bed.until("the connection", |bed| bed.tcp(handle).may_send());
    let (mut peer, _) = listener.accept().unwrap();
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    // More than the host's socket takes, and less than it and we do.
    let (mut sent, mut last) = (0, Instant::now());
    bed.until("no more goes", |bed| {
        let socket = bed.tcp(handle);
        if socket.can_send() {
            sent += socket.send_slice(&[0; 1 << 14]).unwrap();
            last = Instant::now();
        }
        last.elapsed() > Duration::from_millis(300)
    });
    // The window opens by a part, of which the guest takes half.
    let mut part = vec![0; 256 << 10];
    peer.read_exact(&mut part).unwrap();
    bed.tcp(handle).close();
    bed.until("the guest's end", |bed| {
        bed.link.room();
        let state = bed.tcp(handle).state();
        if !matches!(state, tcp::State::Closed | tcp::State::TimeWait) {
            let _ = peer.set_nonblocking(true);
            part.extend_from_slice(&{
                let mut some = vec![0; 64 << 10];
                let len =
                    if bed.tcp(handle).send_queue() > 0 { peer.read(&mut some).unwrap_or(0) } else { 0 };
                some.truncate(len);
                some
            });
        }
        matches!(bed.tcp(handle).state(), tcp::State::Closed | tcp::State::TimeWait)
    });
    peer.set_nonblocking(false).unwrap();
    peer.read_to_end(&mut part).unwrap();
    assert_eq!(part.len(), sent);
    bed.until("no connection is left", |bed| bed.link.counts().connections == 0);
}

#[test]
fn a_connection_that_the_guest_resets_before_it_is_open_is_none() {
    let bed = Bed::new(|_| {});
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().port();
    let send = |flags, seq| bed.link.send(&trusted(), &hostile::segment(to, flags, seq));
    send(2, 1);
    let mut peer = listener.accept().unwrap().0;
    let end = Instant::now() + PATIENCE;
    while bed.card.frames.lock().unwrap().is_empty() {
        assert!(Instant::now() < end, "no answer");
        std::thread::yield_now();
    }
    send(4, 2);
    assert_eq!(bed.link.counts().connections, 0);
    assert_eq!(peer.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

fn trusted() -> Header {
    Header { valid: true, ..Header::default() }
}

#[test]
fn a_thousand_connections_at_once() {
    const MANY: usize = 1000;
    let mut bed = Bed::new(|_| {});
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = gateway(listener.local_addr().unwrap().port());
    let (send, all) = mpsc::channel();
    std::thread::spawn(move || {
        let streams: Vec<TcpStream> = listener.incoming().take(MANY).map(Result::unwrap).collect();
        for mut stream in &streams {
            let mut number = [0; 2];
            stream.read_exact(&mut number).unwrap();
            stream.write_all(&number).unwrap();
        }
        send.send(streams).unwrap();
    });
    let handles: Vec<SocketHandle> = (0..MANY)
        .map(|n| {
            let buffer = || tcp::SocketBuffer::new(vec![0; 64]);
            let handle = bed.sockets.add(tcp::Socket::new(buffer(), buffer()));
            let socket = bed.sockets.get_mut::<tcp::Socket<'_>>(handle);
            socket.connect(bed.interface.context(), to, 20_000 + n as u16).unwrap();
            bed.poll();
            handle
        })
        .collect();
    let (mut asked, mut answered) = (vec![false; MANY], vec![false; MANY]);
    bed.until("all answers", |bed| {
        for (n, handle) in handles.iter().enumerate() {
            let socket = bed.tcp(*handle);
            if !asked[n] && socket.can_send() {
                asked[n] = socket.send_slice(&(n as u16).to_be_bytes()).unwrap() == 2;
            }
            if !answered[n] && socket.recv_queue() == 2 {
                let mut number = [0; 2];
                socket.recv_slice(&mut number).unwrap();
                assert_eq!(number, (n as u16).to_be_bytes());
                answered[n] = true;
            }
        }
        answered.iter().all(|yes| *yes)
    });
    assert_eq!(bed.link.counts().connections, MANY);
    drop(all.recv().unwrap());
}

#[test]
fn a_forwarded_port_leads_to_the_guest() {
    let at = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let forward = Forward { protocol: Protocol::Tcp, listen: at, port: 80 };
    let mut bed = Bed::new(|options| options.forwards.push(forward));
    let handle = bed.socket();
    bed.tcp(handle).listen(80).unwrap();
    let peer = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(at).unwrap();
        stream.write_all(b"question").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    bed.until("the question", |bed| bed.tcp(handle).recv_queue() == 8);
    assert_eq!(bed.tcp(handle).remote_endpoint().unwrap().addr, GATEWAY.into());
    bed.tcp(handle).send_slice(b"answer").unwrap();
    bed.until("its end", |bed| {
        let socket = bed.tcp(handle);
        let _ = socket.recv(|bytes| (bytes.len(), ()));
        !socket.may_recv()
    });
    bed.tcp(handle).close();
    bed.until("the end", |_| peer.is_finished());
    assert_eq!(peer.join().unwrap(), "answer");
    let taken = User::new(&Options { forwards: vec![forward], ..Options::new(MAC) });
    assert!(taken.is_err_and(|error| error.to_string().starts_with(&format!("cannot listen at {at}: "))));
}

#[test]
fn rules_say_what_the_guest_reaches_and_who_reaches_it() {
    let listeners = [0, 1].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    let [denied, allowed] = [0, 1].map(|n| listeners[n].local_addr().unwrap().port());
    let at = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let rules = [format!("deny out tcp {denied}"), "deny out udp".into(), "deny in tcp 80".into()];
    let mut bed = Bed::new(|options| {
        options.rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        options.forwards.push(Forward { protocol: Protocol::Tcp, listen: at, port: 80 });
    });
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    peer.set_nonblocking(true).unwrap();
    let handle = udp_socket(&mut bed, 4000);
    let to = gateway(peer.local_addr().unwrap().port());
    bed.sockets.get_mut::<udp::Socket<'_>>(handle).send_slice(b"question", to).unwrap();
    bed.connect(gateway(denied), 40_000);
    // What is sent is handled at once, so this one comes after those.
    let handle = bed.connect(gateway(allowed), 40_001);
    bed.until("the connection", |bed| bed.tcp(handle).state() == tcp::State::Established);
    listeners[0].set_nonblocking(true).unwrap();
    assert!(listeners[0].accept().is_err() && peer.recv(&mut [0; 100]).is_err());
    assert_eq!(bed.link.counts().unreachable, 2);
    // Whoever comes in by the forwarded port is shown out.
    let handle = bed.socket();
    bed.tcp(handle).listen(80).unwrap();
    let mut stream = TcpStream::connect(at).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(!matches!(stream.read(&mut [0; 100]), Ok(1..)));
    bed.poll();
    assert_eq!(bed.tcp(handle).state(), tcp::State::Listen);
}

fn udp_socket(bed: &mut Bed, port: u16) -> SocketHandle {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 4], vec![0; 16 << 10]);
    let handle = bed.sockets.add(udp::Socket::new(buffer(), buffer()));
    bed.sockets.get_mut::<udp::Socket<'_>>(handle).bind(port).unwrap();
    handle
}

fn came(bed: &mut Bed, handle: SocketHandle) -> (Vec<u8>, String) {
    let mut got = None;
    bed.until("a datagram", |bed| {
        let socket = bed.sockets.get_mut::<udp::Socket<'_>>(handle);
        got = socket.recv().ok().map(|(data, from)| (data.to_vec(), from.endpoint.to_string()));
        got.is_some()
    });
    got.unwrap()
}

#[test]
fn datagrams_come_back_from_where_they_were_sent() {
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = peer.local_addr().unwrap().port();
    let at = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let forward = Forward { protocol: Protocol::Udp, listen: at, port: 5000 };
    let mut bed = Bed::new(|options| options.forwards.push(forward));
    let handle = udp_socket(&mut bed, 4000);
    bed.sockets.get_mut::<udp::Socket<'_>>(handle).send_slice(b"question", gateway(port)).unwrap();
    bed.poll();
    let mut bytes = [0; 100];
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut ask = None;
    bed.until("the question", |_| {
        ask = peer.recv_from(&mut bytes).ok();
        ask.is_some()
    });
    let (len, from) = ask.unwrap();
    assert_eq!(&bytes[..len], b"question");
    // Longer than a frame.
    let long = pattern(4000);
    peer.send_to(b"answer", from).unwrap();
    assert_eq!(came(&mut bed, handle), (b"answer".to_vec(), gateway(port).to_string()));

    // By a forwarded port, and back by the same.
    let handle = udp_socket(&mut bed, 5000);
    peer.send_to(b"hello", at).unwrap();
    assert_eq!(came(&mut bed, handle), (b"hello".to_vec(), gateway(port).to_string()));
    bed.sockets.get_mut::<udp::Socket<'_>>(handle).send_slice(b"welcome", gateway(port)).unwrap();
    bed.poll();
    assert_eq!(peer.recv_from(&mut bytes).unwrap(), (7, at));
    drop(long);
}

/// A datagram of the guest's in IPv6 and IPv4, each with so many bytes of data.
fn datagrams(hosts: (&str, &str), port: u16, len: usize, whole: bool) -> [Vec<u8>; 2] {
    use smoltcp::wire::{IpProtocol, Ipv4Packet, Ipv6Packet, UdpPacket};
    let data = pattern(len);
    let mut ipv4 = hostile::datagram(GUEST, hosts.0.parse().unwrap(), [4000, port], &data);
    let mut packet = Ipv4Packet::new_unchecked(&mut ipv4[14..]);
    packet.set_dont_frag(whole);
    packet.fill_checksum();
    let (from, to) = ("fd6c:6f64:6765::15".parse().unwrap(), hosts.1.parse().unwrap());
    let mut bytes = [&[0; 48], &data[..]].concat();
    let mut packet = Ipv6Packet::new_unchecked(&mut bytes[..]);
    packet.set_version(6);
    packet.set_payload_len(8 + len as u16);
    packet.set_hop_limit(64);
    packet.set_next_header(IpProtocol::Udp);
    packet.set_src_addr(from);
    packet.set_dst_addr(to);
    let mut udp = UdpPacket::new_unchecked(&mut bytes[40..]);
    udp.set_src_port(4000);
    udp.set_dst_port(port);
    udp.set_len(8 + len as u16);
    udp.fill_checksum(&from.into(), &to.into());
    [hostile::frame(hostile::IPV6, &bytes), ipv4]
}

/// Sends one, and waits until the guest is told by ICMP that it got nowhere: type, code, and the other four bytes.
#[track_caller]
fn told(bed: &Bed, sent: &[u8]) -> (u8, u8, u32) {
    use smoltcp::wire::{IpProtocol, Ipv4Packet, Ipv6Packet};
    let v6 = sent[12..14] == hostile::IPV6;
    let header = if v6 { 40 } else { 20 };
    bed.link.send(&Header::default(), sent);
    let end = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < end, "nothing is told");
        let Some(frame) = bed.card.frames.lock().unwrap().pop_front() else {
            std::thread::yield_now();
            continue;
        };
        let (packet, message) = (&frame[14..], &frame[14 + header..]);
        let is_it = if v6 {
            frame[12..14] == sent[12..14] && packet[6] == u8::from(IpProtocol::Icmpv6) && message[0] < 128
        } else {
            frame[12..14] == sent[12..14] && packet[9] == u8::from(IpProtocol::Icmp)
        };
        if !is_it {
            continue;
        }
        // From whom it was for, about this one: its addresses, and the header behind.
        let addresses = if v6 { 8..40 } else { 12..20 };
        assert_eq!(message[8..][addresses.clone()], sent[14..][addresses.clone()]);
        assert_eq!(message[8 + header..][..4], sent[14 + header..][..4], "ports");
        let told = &message[8 + header + 8..];
        assert_eq!(told, &sent[14 + header + 8..][..told.len()]);
        assert_ne!(told.is_empty(), v6);
        let half = addresses.len() / 2;
        assert_eq!(packet[addresses.start..][..half], sent[14 + addresses.start + half..][..half]);
        let right = if v6 {
            let ip = Ipv6Packet::new_checked(packet).unwrap();
            let message = smoltcp::wire::Icmpv6Packet::new_checked(ip.payload()).unwrap();
            message.verify_checksum(&ip.src_addr(), &ip.dst_addr())
        } else {
            let ip = Ipv4Packet::new_checked(packet).unwrap();
            let message = smoltcp::wire::Icmpv4Packet::new_checked(ip.payload()).unwrap();
            ip.verify_checksum() && message.verify_checksum()
        };
        assert!(right, "{frame:02x?}");
        return (message[0], message[1], u32::from_be_bytes(message[4..8].try_into().unwrap()));
    }
}

#[test]
fn who_sends_to_a_closed_port_is_told() {
    let bed = Bed::new(|_| {});
    for (address, is_v6) in [("127.0.0.1:0", false), ("[::1]:0", true)] {
        let Ok(peer) = UdpSocket::bind(address) else {
            println!("skipped: this host has no {address}");
            continue;
        };
        let port = peer.local_addr().unwrap().port();
        drop(peer);
        let [v6, v4] = datagrams(("10.0.2.2", "fd6c:6f64:6765::2"), port, 100, true);
        // By the first nothing but the error comes back; the next meets it, or another one.
        for _ in 0..3 {
            assert_eq!(told(&bed, if is_v6 { &v6 } else { &v4 }), if is_v6 { (1, 4, 0) } else { (3, 3, 0) });
        }
    }
    // What was told before keeps nothing from its way.
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    let port = peer.local_addr().unwrap().port();
    let [_, v4] = datagrams(("10.0.2.2", "fd6c:6f64:6765::2"), port, 100, true);
    bed.link.send(&Header::default(), &v4);
    assert_eq!(peer.recv(&mut [0; 200]).unwrap(), 100);
}

#[test]
fn who_sends_too_much_at_once_or_to_nobody_is_told() {
    let Some(host) = namespaces::Host::new() else { return };
    host.run(
        "ip link set lo mtu 1300
         for net in 192.0.2.0/24 2001:db8:2::/48; do ip route add unreachable $net; done
         for net in 198.51.100.0/24 2001:db8:3::/48; do ip route add prohibit $net; done",
    );
    host.inside(|| {
        let bed = Bed::new(|_| {});
        let told = |hosts, len| datagrams(hosts, 9, len, true).map(|frame| told(&bed, &frame));
        assert_eq!(told(("203.0.113.1", "2001:db8:1::1"), 10), [(1, 0, 0), (3, 0, 0)], "no route");
        assert_eq!(told(("192.0.2.1", "2001:db8:2::1"), 10), [(1, 3, 0), (3, 1, 0)], "no host");
        assert_eq!(told(("198.51.100.1", "2001:db8:3::1"), 10), [(1, 1, 0), (3, 13, 0)], "forbidden");
        let gateway = ("10.0.2.2", "fd6c:6f64:6765::2");
        assert_eq!(told(gateway, 1400), [(2, 0, 1300), (3, 4, 1300)], "too big");
        // What may be cut in pieces is.
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        let [_, v4] = datagrams(gateway, peer.local_addr().unwrap().port(), 1400, false);
        bed.link.send(&Header::default(), &v4);
        assert_eq!(peer.recv(&mut [0; 2000]).unwrap(), 1400);
    });
}

#[test]
fn no_guest_is_told_of_endless_errors() {
    let bed = Bed::new(|_| {});
    let [_, v4] = datagrams(("10.0.2.3", "fd6c:6f64:6765::3"), 9, 10, true);
    let begin = Instant::now();
    let mut told = 0;
    for _ in 0..2000 {
        bed.link.send(&Header::default(), &v4);
        told += std::mem::take(&mut *bed.card.frames.lock().unwrap()).len();
    }
    // Some in each second that it took.
    assert!((1..=200 * (2 + begin.elapsed().as_secs() as usize)).contains(&told), "{told}");
}

#[test]
fn names_are_asked_for_where_the_host_does() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    assert!(server.local_addr().is_ok());
    let mut bed = Bed::new(|options| options.resolv_conf = "/nonexistent".into());
    // Nobody may listen at port 53 here; the question gets lost, or is answered by the host's own server.
    let handle = udp_socket(&mut bed, 4000);
    let names = SocketAddr::new(Ipv4Addr::new(10, 0, 2, 3).into(), 53);
    bed.sockets.get_mut::<udp::Socket<'_>>(handle).send_slice(&[0; 12], names).unwrap();
    bed.until("the question is taken", |bed| bed.link.counts().datagrams == 1);
}

/// What a program of the guest's sends to ping somebody.
fn echo_request(to: Ipv4Addr) -> Vec<u8> {
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Packet, Ipv4Repr};
    let ping = Icmpv4Repr::EchoRequest { ident: 0x1234, seq_no: 1, data: b"are you there?" };
    let ip = Ipv4Repr {
        src_addr: GUEST,
        dst_addr: to,
        next_header: IpProtocol::Icmp,
        payload_len: ping.buffer_len(),
        hop_limit: 64,
    };
    let caps = ChecksumCapabilities::default();
    let mut bytes = vec![0; ip.buffer_len() + ping.buffer_len()];
    ip.emit(&mut Ipv4Packet::new_unchecked(&mut bytes[..]), &caps);
    ping.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes[ip.buffer_len()..]), &caps);
    [&plan::GATEWAY_MAC[..], &MAC, &[8, 0], &bytes].concat()
}

#[test]
fn pings_are_answered_by_who_is_asked() {
    let bed = Bed::new(|_| {});
    // The host has an address of its own on some link, or none that could be pinged.
    let own = UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect("192.0.2.1:9")?;
        socket.local_addr()
    });
    let mut all = vec![GATEWAY];
    match own.map(|own| own.ip()) {
        Ok(std::net::IpAddr::V4(own)) if icmp::may_ping() => all.push(own),
        _ => println!("skipped: this host does not let us ping, or has no network"),
    }
    for to in all {
        bed.link.send(&Header::default(), &echo_request(to));
        let end = Instant::now() + PATIENCE;
        let answer = loop {
            if let Some(frame) = bed.card.frames.lock().unwrap().pop_front() {
                break frame;
            }
            assert!(Instant::now() < end, "no answer from {to}");
            std::thread::yield_now();
        };
        assert_eq!((&answer[26..30], answer[34]), (&to.octets()[..], 0), "{to}");
        assert_eq!(answer[38..40], [0x12, 0x34]);
        assert!(answer.ends_with(b"are you there?"));
    }
}
