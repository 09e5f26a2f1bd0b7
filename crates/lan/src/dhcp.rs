//! Addresses by DHCP (RFC 2131): bytes in, bytes out.

use std::net::Ipv4Addr;

use dhcproto::Encodable;
use dhcproto::v4::{DhcpOption, DhcpOptions, Message, MessageType, Opcode, OptionCode};
use hickory_proto::rr::Name;
use ipnet::Ipv4Net;
use netctl::Mac;

use crate::Leases;
use crate::names::label;

pub use ::dhcp::{CLIENT, SERVER};

/// Seconds that an address is a client's without asking again. Nobody else gets it afterwards.
const LEASE: u32 = 3600;
/// What is echoed of a client's identifier (RFC 6842).
const LONGEST_ID: usize = 255;
/// Some clients drop what is shorter, as BOOTP's messages never were (RFC 1542, 2.1).
const SHORTEST: usize = 300;

/// What a network's DHCP server tells.
#[derive(Debug)]
pub struct Server {
    /// The host's address, and the network's length.
    pub pool: Ipv4Net,
    /// The host is the way out.
    pub router: bool,
    /// The domain in which guests find each other.
    pub domain: Name,
}

/// What a message leads to.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// This is sent to this address, at [`CLIENT`].
    Answer(Vec<u8>, Ipv4Addr),
    /// Nothing is to be said.
    Nothing,
    /// Whoever has this address found it in use by another.
    Declined(Mac, Ipv4Addr),
    /// Nobody who was connected asks.
    Unknown,
    /// It makes no sense.
    Malformed,
}

impl Server {
    /// Answers a message.
    pub fn serve(&self, message: &[u8], leases: &Leases) -> Outcome {
        let Some(request) = ::dhcp::request(message) else { return Outcome::Malformed };
        let mac = <[u8; 6]>::try_from(request.chaddr()).ok().and_then(Mac::new);
        let (Some(mac), Some(kind)) = (mac, request.opts().msg_type()) else { return Outcome::Malformed };
        let relayed = !request.giaddr().is_unspecified();
        if relayed {
            return Outcome::Malformed;
        }
        // The helper connects cards; whoever else asks wants to take addresses away.
        let Some((address, vm)) = leases.connected(mac) else { return Outcome::Unknown };
        if kind == MessageType::Decline {
            return Outcome::Declined(mac, address);
        }
        let answer = match self.decide(&request, kind, address) {
            Ok(answer) => answer,
            Err(outcome) => return outcome,
        };
        if answer == MessageType::Ack {
            leases.seen(mac);
        }
        let mut reply = Message::default();
        let given = answer != MessageType::Nak && kind != MessageType::Inform;
        reply
            .set_opcode(Opcode::BootReply)
            .set_xid(request.xid())
            .set_flags(request.flags())
            .set_yiaddr(if given { address } else { Ipv4Addr::UNSPECIFIED })
            .set_chaddr(request.chaddr())
            .set_opts(self.options(&request, kind, answer, vm.as_deref()));
        if answer == MessageType::Ack {
            reply.set_ciaddr(request.ciaddr());
        }
        let Ok(mut reply) = reply.to_vec() else { return Outcome::Malformed };
        reply.resize(reply.len().max(SHORTEST), 0);
        // Who has an address of the network's hears it there; all others everywhere.
        let to = if answer == MessageType::Ack && request.ciaddr() == address {
            address
        } else {
            Ipv4Addr::BROADCAST
        };
        Outcome::Answer(reply, to)
    }

    /// How to answer the client whose address is `address` (RFC 2131, 4.3).
    fn decide(
        &self,
        request: &Message,
        kind: MessageType,
        address: Ipv4Addr,
    ) -> Result<MessageType, Outcome> {
        let wanted = match request.opts().get(OptionCode::RequestedIpAddress) {
            Some(DhcpOption::RequestedIpAddress(wanted)) => Some(*wanted),
            _ => None,
        };
        let server = match request.opts().get(OptionCode::ServerIdentifier) {
            Some(DhcpOption::ServerIdentifier(server)) => Some(*server),
            _ => None,
        };
        match kind {
            MessageType::Discover => Ok(MessageType::Offer),
            // It chose another server.
            MessageType::Request if server.is_some_and(|id| id != self.pool.addr()) => Err(Outcome::Nothing),
            MessageType::Request => {
                // Selecting and after a reboot it names the address; renewing and rebinding it has it.
                let has = Some(request.ciaddr()).filter(|ciaddr| !ciaddr.is_unspecified());
                let wanted = wanted.or(has).ok_or(Outcome::Malformed)?;
                Ok(if wanted == address { MessageType::Ack } else { MessageType::Nak })
            }
            // It has an address by other means, and may use no other one.
            MessageType::Inform if request.ciaddr() == address => Ok(MessageType::Ack),
            MessageType::Inform => Err(Outcome::Nothing),
            // The address remains its own.
            MessageType::Release => Err(Outcome::Nothing),
            _ => Err(Outcome::Malformed),
        }
    }

    fn options(
        &self,
        request: &Message,
        kind: MessageType,
        answer: MessageType,
        vm: Option<&str>,
    ) -> DhcpOptions {
        let mut options = DhcpOptions::new();
        options.insert(DhcpOption::MessageType(answer));
        options.insert(DhcpOption::ServerIdentifier(self.pool.addr()));
        if let Some(DhcpOption::ClientIdentifier(id)) = request.opts().get(OptionCode::ClientIdentifier)
            && id.len() <= LONGEST_ID
        {
            options.insert(DhcpOption::ClientIdentifier(id.clone()));
        }
        if answer == MessageType::Nak {
            return options;
        }
        if kind != MessageType::Inform {
            options.insert(DhcpOption::AddressLeaseTime(LEASE));
            options.insert(DhcpOption::Renewal(LEASE / 2));
            options.insert(DhcpOption::Rebinding(LEASE / 8 * 7));
        }
        options.insert(DhcpOption::SubnetMask(self.pool.netmask()));
        let asked = match request.opts().get(OptionCode::ParameterRequestList) {
            Some(DhcpOption::ParameterRequestList(codes)) => Some(codes),
            _ => None,
        };
        let mut tell = |option: DhcpOption| {
            if asked.is_none_or(|codes| codes.contains(&OptionCode::from(&option))) {
                options.insert(option);
            }
        };
        if self.router {
            tell(DhcpOption::Router(vec![self.pool.addr()]));
        }
        tell(DhcpOption::DomainNameServer(vec![self.pool.addr()]));
        if !self.domain.is_root() {
            tell(DhcpOption::DomainName(self.domain.to_ascii().trim_end_matches('.').into()));
            tell(DhcpOption::DomainSearch(vec![self.domain.clone()]));
        }
        if let Some(name) = vm.and_then(label) {
            tell(DhcpOption::Hostname(name));
        }
        tell(DhcpOption::BroadcastAddr(self.pool.broadcast()));
        options
    }
}
