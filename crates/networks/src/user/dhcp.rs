//! The guest's address by DHCP (RFC 2131): there is one to give.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use dhcproto::Encodable;
use dhcproto::v4::{DhcpOption, DhcpOptions, Message, MessageType, Opcode, OptionCode};

use super::outlet::{MTU, Outlet};
use super::plan::{PREFIX, Plan};

pub use ::dhcp::SERVER;
/// Seconds that an address is the guest's. Nobody else ever gets it.
const LEASE: u32 = 86_400;

/// Answers a message. False if it makes no sense.
pub fn serve(message: &[u8], plan: &Plan, search: &[String], outlet: &mut Outlet) -> bool {
    let Some(request) = ::dhcp::request(message) else { return false };
    let Some(kind) = request.opts().msg_type() else { return false };
    if request.chaddr() != outlet.mac() {
        return false;
    }
    let wanted = match request.opts().get(OptionCode::RequestedIpAddress) {
        Some(DhcpOption::RequestedIpAddress(wanted)) => *wanted,
        _ => request.ciaddr(),
    };
    // Whoever chose another server does not mean us.
    let other =
        |option: &DhcpOption| matches!(option, DhcpOption::ServerIdentifier(id) if *id != plan.gateway());
    let answer = match kind {
        MessageType::Discover => MessageType::Offer,
        MessageType::Request if request.opts().get(OptionCode::ServerIdentifier).is_some_and(other) => {
            return true;
        }
        MessageType::Request if wanted == plan.guest() => MessageType::Ack,
        MessageType::Request => MessageType::Nak,
        MessageType::Inform => MessageType::Ack,
        // It says that it does without.
        MessageType::Decline | MessageType::Release => return true,
        _ => return false,
    };
    let mut options = DhcpOptions::new();
    options.insert(DhcpOption::MessageType(answer));
    options.insert(DhcpOption::ServerIdentifier(plan.gateway()));
    if answer != MessageType::Nak {
        let mask = Ipv4Addr::from_bits(u32::MAX << (32 - PREFIX));
        options.insert(DhcpOption::SubnetMask(mask));
        options.insert(DhcpOption::Router(vec![plan.gateway()]));
        options.insert(DhcpOption::DomainNameServer(vec![plan.names()]));
        options.insert(DhcpOption::InterfaceMtu(MTU as u16));
        let domains: Vec<_> = search.iter().filter_map(|name| name.parse().ok()).collect();
        if !domains.is_empty() {
            options.insert(DhcpOption::DomainSearch(domains));
        }
        if kind != MessageType::Inform {
            options.insert(DhcpOption::AddressLeaseTime(LEASE));
        }
    }
    let leased = answer != MessageType::Nak && kind != MessageType::Inform;
    let mut reply = Message::default();
    reply
        .set_opcode(Opcode::BootReply)
        .set_xid(request.xid())
        .set_flags(request.flags())
        .set_ciaddr(request.ciaddr())
        .set_yiaddr(if leased { plan.guest() } else { Ipv4Addr::UNSPECIFIED })
        .set_giaddr(request.giaddr())
        .set_chaddr(request.chaddr())
        .set_opts(options);
    let Ok(reply) = reply.to_vec() else { return false };
    let to = match () {
        () if !request.ciaddr().is_unspecified() && answer != MessageType::Nak => request.ciaddr(),
        () if leased && !request.flags().broadcast() => plan.guest(),
        () => Ipv4Addr::BROADCAST,
    };
    let from = SocketAddr::new(IpAddr::V4(plan.gateway()), SERVER);
    outlet.datagram(from, SocketAddr::new(to.into(), ::dhcp::CLIENT), &reply);
    true
}
