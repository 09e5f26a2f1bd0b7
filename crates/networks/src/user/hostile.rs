//! Guests that send what they should not: each frame is dropped and counted, and nothing else happens.

use devices::net::Header;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, Icmpv6Packet, Icmpv6Repr, IpProtocol, Ipv4Packet,
    Ipv6Packet, NdiscRepr, NdiscRouterFlags, TcpPacket, UdpPacket,
};

use super::*;

const ARP: [u8; 2] = [8, 6];
const IPV4: [u8; 2] = [8, 0];
pub const IPV6: [u8; 2] = [0x86, 0xdd];

pub fn frame(kind: [u8; 2], bytes: &[u8]) -> Vec<u8> {
    [&plan::GATEWAY_MAC[..], &MAC, &kind, bytes].concat()
}

fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: IpProtocol, offset: u16, more: bool, data: &[u8]) -> Vec<u8> {
    let mut bytes = [&[0; 20], data].concat();
    let mut packet = Ipv4Packet::new_unchecked(&mut bytes[..]);
    packet.set_version(4);
    packet.set_header_len(20);
    packet.set_total_len(20 + data.len() as u16);
    packet.set_frag_offset(offset);
    packet.set_more_frags(more);
    packet.set_hop_limit(64);
    packet.set_next_header(protocol);
    packet.set_src_addr(from);
    packet.set_dst_addr(to);
    packet.fill_checksum();
    frame(IPV4, &bytes)
}

pub fn datagram(from: Ipv4Addr, to: Ipv4Addr, ports: [u16; 2], data: &[u8]) -> Vec<u8> {
    let mut bytes = [&[0; 8], data].concat();
    let mut packet = UdpPacket::new_unchecked(&mut bytes[..]);
    packet.set_src_port(ports[0]);
    packet.set_dst_port(ports[1]);
    packet.set_len(8 + data.len() as u16);
    packet.fill_checksum(&from.into(), &to.into());
    ipv4(from, to, IpProtocol::Udp, 0, false, &bytes)
}

/// A TCP segment from port 40000 to the gateway.
pub fn segment(to: u16, flags: u8, seq: u32) -> Vec<u8> {
    let mut bytes = [0; 20];
    bytes[4..8].copy_from_slice(&seq.to_be_bytes());
    (bytes[12], bytes[13]) = (5 << 4, flags);
    let mut packet = TcpPacket::new_unchecked(&mut bytes[..]);
    packet.set_src_port(40_000);
    packet.set_dst_port(to);
    packet.set_window_len(1000);
    packet.fill_checksum(&GUEST.into(), &GATEWAY.into());
    ipv4(GUEST, GATEWAY, IpProtocol::Tcp, 0, false, &bytes)
}

fn arp(hardware: Mac, address: Ipv4Addr) -> Vec<u8> {
    let repr = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: EthernetAddress(hardware),
        source_protocol_addr: address,
        target_hardware_addr: EthernetAddress([0xff; 6]),
        target_protocol_addr: address,
    };
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(&mut ArpPacket::new_unchecked(&mut bytes[..]));
    frame(ARP, &bytes)
}

fn advertisement(hops: u8) -> Vec<u8> {
    let (from, to) = ("fe80::15".parse().unwrap(), "ff02::1".parse().unwrap());
    let repr = Icmpv6Repr::Ndisc(NdiscRepr::RouterAdvert {
        hop_limit: 64,
        flags: NdiscRouterFlags::empty(),
        router_lifetime: smoltcp::time::Duration::from_secs(1000),
        reachable_time: smoltcp::time::Duration::ZERO,
        retrans_time: smoltcp::time::Duration::ZERO,
        lladdr: Some(EthernetAddress(MAC).into()),
        mtu: None,
        prefix_info: None,
    });
    let len = repr.buffer_len();
    let mut bytes = vec![0; 40 + len];
    repr.emit(&from, &to, &mut Icmpv6Packet::new_unchecked(&mut bytes[40..]), &Default::default());
    let mut packet = Ipv6Packet::new_unchecked(&mut bytes[..]);
    packet.set_version(6);
    packet.set_payload_len(len as u16);
    packet.set_hop_limit(hops);
    packet.set_next_header(IpProtocol::Icmpv6);
    packet.set_src_addr(from);
    packet.set_dst_addr(to);
    frame(IPV6, &bytes)
}

/// A DHCP message of this kind, of a client whose address has `len` bytes, that asks for this address.
fn dhcp(kind: u8, len: u8, wanted: Ipv4Addr) -> Vec<u8> {
    let mut message = vec![0; 240];
    message[..3].copy_from_slice(&[1, 1, len]);
    message[28..34].copy_from_slice(&MAC);
    message[236..].copy_from_slice(&[99, 130, 83, 99]);
    message.extend([53, 1, kind, 50, 4]);
    message.extend(wanted.octets());
    message.push(255);
    datagram(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, [68, 67], &message)
}

fn spoil(mut frame: Vec<u8>, at: usize) -> Vec<u8> {
    frame[at] ^= 1;
    frame
}

/// Sends these, and says how many were malformed, forged, and unreachable. Nothing is answered, and nothing is left.
fn send(frames: &[Vec<u8>]) -> [u64; 3] {
    let bed = Bed::new(|_| {});
    frames.iter().for_each(|frame| bed.link.send(&Header::default(), frame));
    let counts = bed.link.counts();
    assert_eq!(counts.frames, frames.len() as u64);
    assert_eq!((counts.connections, counts.datagrams), (0, 0));
    let v6 = |frame: &Vec<u8>| frame[12..14] == IPV6;
    // The router makes itself known to whoever speaks IPv6.
    let answers = bed.card.frames.lock().unwrap().iter().filter(|frame| !v6(frame)).count();
    assert_eq!(answers, 0);
    [counts.malformed, counts.forged, counts.unreachable]
}

#[test]
fn runts_and_giants() {
    let whole = datagram(GUEST, GATEWAY, [4000, 4000], b"hello");
    let runts: Vec<_> = (0..whole.len()).map(|len| whole[..len].to_vec()).collect();
    assert_eq!(send(&runts), [runts.len() as u64, 0, 0]);
    let mut giant = whole.clone();
    giant[16..18].fill(0xff);
    assert_eq!(send(&[giant]), [1, 0, 0]);
    let mut short = segment(80, 2, 1);
    // Fewer bytes of a TCP header than any has, and more than there are.
    short[46] = 4 << 4;
    let mut long = short.clone();
    long[46] = 15 << 4;
    assert_eq!(send(&[short, long]), [2, 0, 0]);
}

#[test]
fn wrong_checksums() {
    let all = [
        spoil(datagram(GUEST, GATEWAY, [4000, 4000], b"hello"), 24),
        spoil(datagram(GUEST, GATEWAY, [4000, 4000], b"hello"), 44),
        spoil(segment(80, 2, 1), 50),
        spoil(echo_request(GATEWAY), 40),
        spoil(dhcp(1, 6, GUEST), 60),
        spoil(advertisement(255), 60),
    ];
    assert_eq!(send(&all), [6, 0, 0]);
}

#[test]
fn fragments_that_overlap() {
    let udp = |offset, more| ipv4(GUEST, GATEWAY, IpProtocol::Udp, offset, more, &[0; 16]);
    assert_eq!(send(&[udp(0, true), udp(8, false)]), [1, 0, 0]);
    let tcp = |offset, more| ipv4(GUEST, GATEWAY, IpProtocol::Tcp, offset, more, &[0; 16]);
    assert_eq!(send(&[tcp(0, true), tcp(16, false)]), [1, 0, 0]);
}

#[test]
fn who_says_to_be_the_router() {
    let other = [0x52, 0x54, 0, 9, 9, 9];
    let own = [arp(MAC, GATEWAY), arp(MAC, Ipv4Addr::new(10, 0, 2, 3)), arp(other, GUEST)];
    assert_eq!(send(&own), [0, 3, 0]);
    assert_eq!(send(&[advertisement(255), advertisement(64)]), [0, 2, 0]);
}

#[test]
fn addresses_of_others() {
    let mut other = datagram(GUEST, GATEWAY, [4000, 4000], b"hello");
    other[6..12].copy_from_slice(&[0x52, 0x54, 0, 9, 9, 9]);
    let from = |from| datagram(from, GATEWAY, [4000, 4000], b"hello");
    let all = [
        other,
        from(GATEWAY),
        from(Ipv4Addr::new(192, 0, 2, 1)),
        from(Ipv4Addr::LOCALHOST),
        from(Ipv4Addr::BROADCAST),
    ];
    assert_eq!(send(&all), [0, 5, 0]);
}

#[test]
fn packets_of_the_other_family_and_of_none() {
    let ping = &echo_request(GATEWAY)[34..];
    let all = [
        ipv4(GUEST, GATEWAY, IpProtocol::Icmpv6, 0, false, ping),
        ipv4(GUEST, GATEWAY, IpProtocol::Unknown(200), 0, false, ping),
        frame([0x81, 0], &[0; 100]),
    ];
    assert_eq!(send(&all), [0, 0, 3]);
}

#[test]
fn dhcp_gives_one_address_to_one_client() {
    // dhcproto 0.15 panics at clients' addresses of more than 16 bytes.
    assert_eq!(send(&[dhcp(1, 255, GUEST), dhcp(1, 17, GUEST), dhcp(1, 0, GUEST)]), [3, 0, 0]);
    let bed = Bed::new(|_| {});
    bed.link.send(&Header::default(), &dhcp(3, 6, Ipv4Addr::new(10, 0, 2, 77)));
    let frames = bed.card.frames.lock().unwrap();
    assert_eq!(frames.len(), 1);
    // Behind the magic number the first option is the message's type: a refusal.
    let kind = frames[0].windows(3).any(|option| option == [53, 1, 6]);
    assert!(kind, "{:?}", frames[0]);
    assert_eq!(frames[0][58..62], [0; 4]);
}
