//! Who has which address: ARP, and IPv6's neighbours and router (RFC 4861).

use std::net::{IpAddr, Ipv6Addr};

use devices::net::Header;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::time::Duration;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetProtocol, Icmpv6Packet, Icmpv6Repr,
    IpProtocol, NdiscNeighborFlags, NdiscPrefixInfoFlags, NdiscPrefixInformation, NdiscRepr,
    NdiscRouterFlags,
};

use super::outlet::{MTU, Outlet};
use super::plan::{GATEWAY_MAC, LINK_LOCAL, PREFIX6, Plan};

/// How long a guest uses a router that it hears nothing of, and addresses with its prefix.
const LIFETIME: Duration = Duration::from_secs(9000);
const PREFIX_LIFETIME: Duration = Duration::from_secs(86_400);
/// The option that names name servers (RFC 8106, 5.1), in 8 bytes, and how often it has to be renewed.
const RDNSS: [u8; 2] = [25, 3];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Answers an ARP request for one of our addresses. False if it makes no sense.
pub fn arp(packet: &[u8], plan: &Plan, outlet: &mut Outlet) -> bool {
    let request = ArpPacket::new_checked(packet).and_then(|packet| ArpRepr::parse(&packet));
    let Ok(ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr,
        source_protocol_addr,
        target_protocol_addr,
        ..
    }) = request
    else {
        return false;
    };
    // Nobody may say that our addresses are its own.
    if plan.is_ours(source_protocol_addr.into()) || source_hardware_addr != EthernetAddress(outlet.mac()) {
        return false;
    }
    if operation == ArpOperation::Request && plan.is_ours(target_protocol_addr.into()) {
        let answer = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: EthernetAddress(GATEWAY_MAC),
            source_protocol_addr: target_protocol_addr,
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        };
        outlet.frame(EthernetProtocol::Arp, answer.buffer_len(), |bytes| {
            answer.emit(&mut ArpPacket::new_unchecked(bytes));
            (Header::default(), ())
        });
    }
    true
}

/// Answers what an ICMPv6 message of neighbour discovery asks. False if it makes no sense.
pub fn discovery(message: &NdiscRepr<'_>, from: Ipv6Addr, plan: &Plan, outlet: &mut Outlet) -> bool {
    match message {
        NdiscRepr::RouterSolicit { .. } => advertise(plan, outlet),
        NdiscRepr::NeighborSolicit { target_addr, .. } => {
            let ours = plan.is_ours(IpAddr::from(*target_addr));
            // A guest that looks whether somebody has the address that it wants has none yet.
            if ours {
                let to = if from.is_unspecified() { ALL_NODES } else { from };
                let solicited = if from.is_unspecified() {
                    NdiscNeighborFlags::empty()
                } else {
                    NdiscNeighborFlags::SOLICITED
                };
                let answer = NdiscRepr::NeighborAdvert {
                    flags: NdiscNeighborFlags::ROUTER | NdiscNeighborFlags::OVERRIDE | solicited,
                    target_addr: *target_addr,
                    lladdr: Some(EthernetAddress(GATEWAY_MAC).into()),
                };
                send(answer, *target_addr, to, &[], outlet);
            }
        }
        // What it knows of others, itself among them, concerns nobody here.
        NdiscRepr::NeighborAdvert { .. } => {}
        // There is one router.
        NdiscRepr::RouterAdvert { .. } | NdiscRepr::Redirect { .. } => return false,
    }
    true
}

/// Tells the guest about its router and network.
pub fn advertise(plan: &Plan, outlet: &mut Outlet) {
    let advert = NdiscRepr::RouterAdvert {
        hop_limit: 64,
        flags: NdiscRouterFlags::empty(),
        router_lifetime: LIFETIME,
        reachable_time: Duration::ZERO,
        retrans_time: Duration::ZERO,
        lladdr: Some(EthernetAddress(GATEWAY_MAC).into()),
        mtu: Some(MTU as u32),
        prefix_info: Some(NdiscPrefixInformation {
            prefix_len: PREFIX6,
            flags: NdiscPrefixInfoFlags::ON_LINK | NdiscPrefixInfoFlags::ADDRCONF,
            valid_lifetime: PREFIX_LIFETIME,
            preferred_lifetime: PREFIX_LIFETIME,
            prefix: plan.network6(),
        }),
    };
    let lifetime = (LIFETIME.secs() as u32).to_be_bytes();
    let names = [&RDNSS[..], &[0, 0], &lifetime, &plan.names6().octets()].concat();
    send(advert, LINK_LOCAL, ALL_NODES, &names, outlet);
}

/// Sends a message with an option more.
fn send(message: NdiscRepr<'_>, from: Ipv6Addr, to: Ipv6Addr, option: &[u8], outlet: &mut Outlet) {
    let message = Icmpv6Repr::Ndisc(message);
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(
        &from,
        &to,
        &mut Icmpv6Packet::new_unchecked(&mut bytes[..]),
        &ChecksumCapabilities::ignored(),
    );
    bytes.extend(option);
    Icmpv6Packet::new_unchecked(&mut bytes[..]).fill_checksum(&from, &to);
    outlet.packet(from.into(), to.into(), IpProtocol::Icmpv6, &bytes);
}
