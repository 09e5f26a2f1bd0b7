//! Guests' names by DNS (RFC 1035): bytes in, bytes out.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::Leases;

/// The port of name servers.
pub const PORT: u16 = 53;
/// The header's length.
const HEADER: usize = 12;
/// How long an answer of ours is good, in seconds: VMs come and go.
const TTL: u32 = 5;
/// By which guests find the host, besides its name in the domain.
const GATEWAY: &str = "_gateway";
/// The host's name in the domain.
const HOST: &str = "host";
/// What a datagram of ours is at most, and takes (the usual limit that avoids fragments).
const DATAGRAM: u16 = 1232;

/// `name` as a host name of one label, in lower case, if it is one (RFC 1123, 2.1).
pub fn label(name: &str) -> Option<String> {
    let name = name.to_ascii_lowercase();
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    let good = (1..=63).contains(&name.len()) && name.bytes().all(inner);
    (good && !name.starts_with('-') && !name.ends_with('-')).then_some(name)
}

/// What a network's name server knows, and whom it serves.
#[derive(Debug)]
pub struct Zone {
    /// The host's address, and the network's length.
    pub ipv4: Ipv4Net,
    /// The same for IPv6.
    pub ipv6: Option<Ipv6Net>,
    /// The domain in which guests find each other; the root if there is none.
    pub domain: Name,
    /// There is a way out: other names are asked of the host's name servers.
    pub router: bool,
}

/// What a message leads to.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// This is answered.
    Answer(Vec<u8>),
    /// The host's name servers are asked.
    Forward,
    /// It makes no sense.
    Malformed,
}

/// What is known of a name.
enum Known {
    /// It is not ours to tell.
    Nothing,
    /// There is no such name.
    Absent,
    /// There is, with these records of the type asked for.
    Records(Vec<RData>),
}

impl Zone {
    /// Whether somebody at `address` is of this network. Nobody else is answered.
    pub fn serves(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.ipv4.contains(&address) && address != self.ipv4.addr(),
            IpAddr::V6(address) => {
                let here = self.ipv6.is_some_and(|net| net.contains(&address) && net.addr() != address);
                here || address.is_unicast_link_local()
            }
        }
    }

    /// Answers a question.
    pub fn serve(&self, message: &[u8], leases: &Leases) -> Outcome {
        // Answers are never answered (RFC 1035, 4.1.1: QR).
        if message.len() < HEADER || message[2] & 0x80 != 0 {
            return Outcome::Malformed;
        }
        let request = match Message::from_vec(message) {
            Ok(request) => request,
            Err(_) => {
                let id = u16::from_be_bytes([message[0], message[1]]);
                let error = Message::error_msg(id, OpCode::Query, ResponseCode::FormErr);
                return error.to_vec().map_or(Outcome::Malformed, Outcome::Answer);
            }
        };
        let [query] = &request.queries[..] else { return reply(&request, ResponseCode::FormErr, &[], None) };
        if request.metadata.op_code != OpCode::Query {
            return reply(&request, ResponseCode::NotImp, &[], None);
        }
        let transfer = matches!(query.query_type, RecordType::AXFR | RecordType::IXFR);
        if query.query_class != DNSClass::IN || transfer {
            return reply(&request, ResponseCode::Refused, &[], None);
        }
        match self.known(query, leases) {
            Known::Nothing if self.router => Outcome::Forward,
            Known::Nothing => reply(&request, ResponseCode::Refused, &[], None),
            Known::Absent => reply(&request, ResponseCode::NXDomain, &[], Some(self)),
            Known::Records(data) => reply(&request, ResponseCode::NoError, &data, Some(self)),
        }
    }

    /// What is answered when nobody else knows.
    pub fn failure(message: &[u8]) -> Option<Vec<u8>> {
        let request = Message::from_vec(message).ok()?;
        match reply(&request, ResponseCode::ServFail, &[], None) {
            Outcome::Answer(answer) => Some(answer),
            _ => None,
        }
    }

    fn known(&self, query: &Query, leases: &Leases) -> Known {
        let asked = |data: Vec<RData>| {
            let wanted = |data: &RData| [RecordType::ANY, data.record_type()].contains(&query.query_type);
            Known::Records(data.into_iter().filter(wanted).collect())
        };
        let labels: Vec<String> = query.name.iter().map(lower).collect();
        if let Some(known) = self.reverse(&query.name, leases) {
            return known.map_or(Known::Absent, |name| asked(vec![RData::PTR(PTR(name))]));
        }
        let domain: Vec<String> = self.domain.iter().map(lower).collect();
        let name = match &labels[..] {
            [name] if domain.is_empty() || labels != domain => Some(name),
            [name, rest @ ..] if !domain.is_empty() && rest == domain => Some(name),
            _ => None,
        };
        let below = !domain.is_empty() && labels.ends_with(&domain);
        match name.map(|name| self.addresses(name, labels.len() > 1, leases)) {
            Some(addresses) if !addresses.is_empty() => asked(addresses),
            _ if below && labels.len() == domain.len() => asked(vec![self.authority()]),
            _ if below => Known::Absent,
            _ => Known::Nothing,
        }
    }

    /// Who is called so: in our domain, or by a name that stands alone.
    fn addresses(&self, name: &str, in_domain: bool, leases: &Leases) -> Vec<RData> {
        let (gateway4, gateway6) = (self.ipv4.addr(), self.ipv6.map(|net| net.addr()));
        if name == GATEWAY || name == HOST && in_domain {
            let ipv6 = gateway6.map(|address| RData::AAAA(AAAA(address)));
            return std::iter::once(RData::A(A(gateway4))).chain(ipv6).collect();
        }
        leases.called(name).into_iter().map(|address| RData::A(A(address))).collect()
    }

    /// The name of an address of ours. None: it is no address of ours. Some of none: nobody has it.
    fn reverse(&self, name: &Name, leases: &Leases) -> Option<Option<Name>> {
        let ipv4 = |address: Ipv4Addr| match address == self.ipv4.addr() {
            true => Some(HOST.to_owned()),
            false => leases.name(address),
        };
        let ipv6 = |address: Ipv6Addr, net: Ipv6Net| (address == net.addr()).then(|| HOST.to_owned());
        let label = match name.parse_arpa_name().ok()? {
            IpNet::V4(net) if net.prefix_len() == 32 && self.ipv4.contains(&net.addr()) => ipv4(net.addr()),
            IpNet::V6(net) if net.prefix_len() == 128 && self.ipv6?.contains(&net.addr()) => {
                ipv6(net.addr(), self.ipv6?)
            }
            _ => return None,
        };
        Some(label.and_then(|label| self.domain.prepend_label(label.as_str()).ok()))
    }

    /// Who decides about the domain: by it others know how long a missing name is missing (RFC 2308).
    fn authority(&self) -> RData {
        let name = |label: &str| self.domain.prepend_label(label).unwrap_or_else(|_| self.domain.clone());
        RData::SOA(SOA::new(name(HOST), name("root"), 1, 3600, 600, 86_400, TTL))
    }
}

fn lower(label: &[u8]) -> String {
    String::from_utf8_lossy(label).to_ascii_lowercase()
}

/// An answer to `request`; `zone` if it is ours to know.
fn reply(request: &Message, code: ResponseCode, data: &[RData], zone: Option<&Zone>) -> Outcome {
    let mut reply = Message::response(request.metadata.id, request.metadata.op_code);
    reply.metadata.message_type = MessageType::Response;
    reply.metadata.recursion_desired = request.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    reply.metadata.authoritative = zone.is_some();
    reply.metadata.response_code = code;
    reply.queries = request.queries.iter().take(1).cloned().collect();
    for data in data {
        let Some(query) = request.queries.first() else { break };
        reply.add_answer(Record::from_rdata(query.name.clone(), TTL, data.clone()));
    }
    if let Some(zone) = zone.filter(|_| data.is_empty()) {
        reply.add_authority(Record::from_rdata(zone.domain.clone(), TTL, zone.authority()));
    }
    if request.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(DATAGRAM);
        reply.set_edns(edns);
    }
    reply.to_vec().map_or(Outcome::Malformed, Outcome::Answer)
}
