//! What goes to the guest.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

use devices::net::{ETHERNET, Guest, Header, Mac};
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6Packet, UdpPacket,
};

use super::icmp::Told;
use super::plan::GATEWAY_MAC;

/// Bytes of the longest IP packet on the cable.
pub const MTU: usize = 1500;
/// Frames that wait until the guest has room, at most.
const MOST_WAITING: usize = 256;
/// Bytes of the headers: IPv4's, IPv6's, the one of an IPv6 fragment, UDP's.
pub const IPV4: usize = 20;
pub const IPV6: usize = 40;
const FRAGMENT: usize = 8;
const UDP: usize = 8;
/// The hop limit of what we send.
pub const HOPS: u8 = 64;

/// The way to the guest.
#[derive(Debug)]
pub struct Outlet {
    guest: Guest,
    mac: Mac,
    /// There was no room for them.
    waiting: VecDeque<(Header, Vec<u8>)>,
    /// The frame that is being made.
    frame: Vec<u8>,
    /// The last identification of an IPv4 packet or fragment.
    ident: u16,
    /// Frames that were dropped.
    pub dropped: u64,
    /// Errors that the guest was told of.
    pub told: Told,
}

impl Outlet {
    /// To the card with this address; whoever is connected gets the frames.
    pub fn new(mac: Mac) -> Self {
        let guest = Guest::default();
        let (waiting, frame, told) = (VecDeque::new(), Vec::new(), Told::default());
        Self { guest, mac, waiting, frame, ident: 0, dropped: 0, told }
    }

    /// A new machine is at the cable.
    pub fn connect(&mut self, guest: Guest) {
        self.guest = guest;
        self.waiting.clear();
    }

    /// The guest's end of the cable.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// The card's address.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// The guest has no room: what can wait should.
    pub fn is_full(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// There is room again.
    pub fn flush(&mut self) {
        while let Some((header, frame)) = self.waiting.pop_front() {
            if !self.guest.deliver(&header, &frame) {
                self.waiting.push_front((header, frame));
                return;
            }
        }
    }

    /// Sends a frame whose payload has `len` bytes, which `fill` writes; it tells what is left to do on it.
    pub fn frame<R>(
        &mut self,
        kind: EthernetProtocol,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> (Header, R),
    ) -> R {
        let whole = ETHERNET + len;
        if self.frame.len() < whole {
            self.frame.resize(whole, 0);
        }
        let frame = &mut self.frame[..whole];
        let mut ethernet = EthernetFrame::new_unchecked(&mut *frame);
        ethernet.set_src_addr(EthernetAddress(GATEWAY_MAC));
        ethernet.set_dst_addr(EthernetAddress(self.mac));
        ethernet.set_ethertype(kind);
        let (header, result) = fill(&mut frame[ETHERNET..]);
        if self.waiting.is_empty() && self.guest.deliver(&header, frame) {
            return result;
        }
        if self.waiting.len() < MOST_WAITING {
            self.waiting.push_back((header, frame.to_vec()));
        } else {
            self.dropped += 1;
        }
        result
    }

    /// Sends what is in an IP packet, checksums and all, in fragments if it is too long. Both addresses are of one family.
    pub fn packet(&mut self, from: IpAddr, to: IpAddr, protocol: IpProtocol, payload: &[u8]) {
        self.ident = self.ident.wrapping_add(1);
        let ident = self.ident;
        let header = if from.is_ipv4() { IPV4 } else { IPV6 };
        let whole = header + payload.len() <= MTU;
        let step = if whole { payload.len().max(1) } else { (MTU - IPV6 - FRAGMENT) / 8 * 8 };
        let mut offset = 0;
        loop {
            let piece = &payload[offset..payload.len().min(offset + step)];
            let more = offset + piece.len() < payload.len();
            match (from, to) {
                (IpAddr::V4(from), IpAddr::V4(to)) => {
                    let len = IPV4 + piece.len();
                    self.frame(EthernetProtocol::Ipv4, len, |bytes| {
                        bytes[..IPV4].fill(0);
                        let mut packet = Ipv4Packet::new_unchecked(&mut *bytes);
                        packet.set_version(4);
                        packet.set_header_len(IPV4 as u8);
                        packet.set_total_len(len as u16);
                        packet.set_ident(ident);
                        packet.set_dont_frag(whole);
                        packet.set_more_frags(more);
                        packet.set_frag_offset(offset as u16);
                        packet.set_hop_limit(HOPS);
                        packet.set_next_header(protocol);
                        packet.set_src_addr(from);
                        packet.set_dst_addr(to);
                        packet.fill_checksum();
                        bytes[IPV4..].copy_from_slice(piece);
                        (Header::default(), ())
                    });
                }
                (IpAddr::V6(from), IpAddr::V6(to)) => {
                    let fragment = if whole { 0 } else { FRAGMENT };
                    self.frame(EthernetProtocol::Ipv6, IPV6 + fragment + piece.len(), |bytes| {
                        bytes[..IPV6].fill(0);
                        let mut packet = Ipv6Packet::new_unchecked(&mut *bytes);
                        packet.set_version(6);
                        packet.set_payload_len((fragment + piece.len()) as u16);
                        packet.set_hop_limit(if protocol == IpProtocol::Icmpv6 { 255 } else { HOPS });
                        packet.set_next_header(if whole { protocol } else { IpProtocol::Ipv6Frag });
                        packet.set_src_addr(from);
                        packet.set_dst_addr(to);
                        if !whole {
                            // RFC 8200, 4.5.
                            let place = (offset as u16) | u16::from(more);
                            let [a, b] = place.to_be_bytes();
                            let [c, d] = ident.to_be_bytes();
                            let head = [u8::from(protocol), 0, a, b, 0, 0, c, d];
                            bytes[IPV6..][..FRAGMENT].copy_from_slice(&head);
                        }
                        bytes[IPV6 + fragment..].copy_from_slice(piece);
                        (Header::default(), ())
                    });
                }
                _ => return,
            }
            offset += piece.len();
            if !more {
                return;
            }
        }
    }

    /// Sends a datagram. Both addresses are of one family.
    pub fn datagram(&mut self, from: SocketAddr, to: SocketAddr, data: &[u8]) {
        if UDP + data.len() > usize::from(u16::MAX) {
            return;
        }
        let mut bytes = vec![0; UDP + data.len()];
        let mut packet = UdpPacket::new_unchecked(&mut bytes[..]);
        packet.set_src_port(from.port());
        packet.set_dst_port(to.port());
        packet.set_len((UDP + data.len()) as u16);
        packet.payload_mut().copy_from_slice(data);
        packet.fill_checksum(&from.ip().into(), &to.ip().into());
        self.packet(from.ip(), to.ip(), IpProtocol::Udp, &bytes);
    }
}
