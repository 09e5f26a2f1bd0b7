//! Cards that want addresses.

use std::collections::HashSet;
use std::net::Ipv4Addr;

use dhcproto::v4::{DhcpOption, DhcpOptions, Flags, Message, MessageType, Opcode, OptionCode};
use dhcproto::{Decodable, Encodable};
use netctl::Mac;
use proptest::prelude::*;

use super::{Bed, host, mac, write};
use crate::dhcp::{Outcome, Server};
use crate::{Error, Leases};

fn server(bed: &Bed) -> Server {
    Server { pool: bed.pool, router: true, domain: "lodge".parse().unwrap() }
}

fn message(mac: Mac, ciaddr: Ipv4Addr, kind: MessageType, options: Vec<DhcpOption>) -> Vec<u8> {
    let mut all = DhcpOptions::new();
    all.insert(DhcpOption::MessageType(kind));
    options.into_iter().for_each(|option| drop(all.insert(option)));
    let mut message = Message::default();
    message
        .set_opcode(Opcode::BootRequest)
        .set_xid(7)
        .set_ciaddr(ciaddr)
        .set_chaddr(&mac.bytes())
        .set_opts(all);
    message.set_flags(Flags::default());
    message.to_vec().unwrap()
}

const NONE: Ipv4Addr = Ipv4Addr::UNSPECIFIED;

#[track_caller]
fn answer(outcome: Outcome) -> (MessageType, Message, Ipv4Addr) {
    let Outcome::Answer(bytes, to) = outcome else { panic!("{outcome:?}") };
    let message = Message::from_bytes(&bytes).unwrap();
    assert_eq!((message.opcode(), message.xid()), (Opcode::BootReply, 7));
    (message.opts().msg_type().unwrap(), message, to)
}

/// Discovers and requests.
fn lease(server: &Server, leases: &Leases, mac: Mac) -> Ipv4Addr {
    let ask = |kind, options| answer(server.serve(&message(mac, NONE, kind, options), leases));
    let (kind, offer, to) = ask(MessageType::Discover, vec![]);
    assert_eq!((kind, to), (MessageType::Offer, Ipv4Addr::BROADCAST));
    let chosen = vec![
        DhcpOption::RequestedIpAddress(offer.yiaddr()),
        DhcpOption::ServerIdentifier(server.pool.addr()),
    ];
    let (kind, ack, _) = ask(MessageType::Request, chosen);
    assert_eq!((kind, ack.yiaddr()), (MessageType::Ack, offer.yiaddr()));
    ack.yiaddr()
}

#[test]
fn two_hundred_cards_keep_their_addresses() {
    let bed = Bed::new("192.168.122.1/24");
    let server = server(&bed);
    let all = |leases: &Leases| -> Vec<Ipv4Addr> {
        let reserve = |n| {
            let reserved = leases.reserve(mac(n), &format!("vm-{n}"), 0, None).unwrap();
            assert_eq!(lease(&server, leases, mac(n)), reserved);
            reserved
        };
        // In another order after the restart.
        let mut given: Vec<(u16, Ipv4Addr)> = (1..=100).chain(101..=200).map(|n| (n, reserve(n))).collect();
        given.sort();
        given.into_iter().map(|(_, address)| address).collect()
    };
    let leases = bed.open();
    let given = all(&leases);
    assert_eq!(given.iter().collect::<HashSet<_>>().len(), 200);
    assert!(given.iter().all(|address| bed.pool.contains(address) && *address != bed.pool.addr()));
    let listed = leases.list();
    assert!(listed.len() == 200 && listed.iter().all(|lease| lease.seen.is_some() && !lease.fixed));
    drop(leases);
    let leases = bed.open();
    assert!(leases.connected(mac(1)).is_none(), "nothing is connected yet");
    for n in (1..=200).rev() {
        leases.reserve(mac(n), "again", 0, None).unwrap();
    }
    assert_eq!(all(&leases), given);
}

#[test]
fn a_full_network_takes_from_those_who_left_first() {
    // Five addresses: .2 to .6; one is declared.
    let mut bed = Bed::new("10.0.0.1/29");
    bed.fixed = vec![host(100, "10.0.0.3", Some("db"))];
    let leases = bed.open();
    let given: Vec<Ipv4Addr> = (1..=4).map(|n| leases.reserve(mac(n), "vm", 0, None).unwrap()).collect();
    assert_eq!(given, [2, 4, 5, 6].map(|n| Ipv4Addr::new(10, 0, 0, n)));
    let error = leases.reserve(mac(5), "late", 0, None).unwrap_err();
    assert!(error.to_string().starts_with("all 5 addresses of 10.0.0.0/29 are given"), "{error}");
    leases.release(mac(3));
    assert_eq!(leases.reserve(mac(5), "late", 0, None).unwrap(), given[2]);
    assert!(matches!(leases.reserve(mac(3), "back", 0, None), Err(Error::Full { .. })));
    assert_eq!(leases.reserve(mac(100), "db", 0, None).unwrap(), Ipv4Addr::new(10, 0, 0, 3));
    assert_eq!(leases.list().len(), 5);
}

#[test]
fn names_and_cards_are_their_owners() {
    let bed = Bed::new("10.0.0.1/28");
    // One that was not used for years, and one of a version that knew no owners.
    let file = r#"[{"mac":"52:4c:00:00:00:08","address":"10.0.0.8","vm":"old","owner":8,"used":1000},
                   {"mac":"52:4c:00:00:00:09","address":"10.0.0.9","vm":"older","used":4000000000}]"#;
    write(bed.dir.path(), "default.json", file);
    let leases = bed.open();
    let take =
        |n, vm, uid| leases.check_owner(mac(n), uid).and_then(|()| leases.reserve(mac(n), vm, uid, None));
    let lease = |n| leases.list().into_iter().find(|lease| lease.mac == mac(n)).unwrap();
    let owner = |n| lease(n).owner;
    assert_eq!((owner(8), owner(9)), (None, None));
    assert_eq!(take(8, "old", 1).unwrap(), Ipv4Addr::new(10, 0, 0, 8));
    assert_eq!(take(9, "older", 1).unwrap(), Ipv4Addr::new(10, 0, 0, 9));
    assert_eq!((owner(8), owner(9)), (Some(1), Some(1)));

    let web = take(1, "web", 1).unwrap();
    leases.release(mac(1));
    assert!(matches!(take(1, "mine", 2), Err(Error::ForeignCard { .. })));
    // A VM whose name is another user's has an address, and is not found by the name.
    assert!(!leases.may_be_called("Web", 2) && take(2, "Web", 2).is_ok());
    assert_eq!((lease(1).name.as_deref(), lease(2).name), (Some("web"), None));
    // Its owner has another card of the name; root may all, and takes nothing from anybody by that.
    assert_ne!(take(3, "web", 1).unwrap(), web);
    assert_eq!(take(1, "web", 0).unwrap(), web);
    take(4, "web", 0).unwrap();
    drop(leases);
    let leases = bed.open();
    assert!(leases.check_owner(mac(1), 2).is_err() && leases.check_owner(mac(1), 1).is_ok());
    assert!(leases.may_be_called("web", 1) && !leases.may_be_called("web", 2));
}

#[test]
fn who_connects_one_card_after_another_drives_out_their_own() {
    let bed = Bed::new("10.0.0.1/28");
    let leases = bed.open();
    let come_and_go = |n, uid| {
        let address = leases.reserve(mac(n), "vm", uid, None).unwrap();
        leases.release(mac(n));
        address
    };
    let first = come_and_go(1, 1);
    (100..200).for_each(|n| assert_ne!(come_and_go(n, 2), first));
    assert_eq!(come_and_go(1, 1), first);
}

#[test]
fn wishes_are_granted_if_they_can_be() {
    let mut bed = Bed::new("10.0.0.1/24");
    bed.fixed = vec![host(9, "10.0.0.9", None)];
    let leases = bed.open();
    let wish = |n, last| leases.reserve(mac(n), "vm", 0, Some(Ipv4Addr::new(10, 0, 0, last)));
    assert_eq!(wish(1, 50).unwrap(), Ipv4Addr::new(10, 0, 0, 50));
    assert_eq!(leases.reserve(mac(1), "vm", 0, None).unwrap(), Ipv4Addr::new(10, 0, 0, 50));
    assert!(matches!(wish(2, 50), Err(Error::Taken { .. })));
    assert!(matches!(wish(2, 9), Err(Error::Taken { .. })));
    assert!(matches!(wish(9, 8), Err(Error::Declared { .. })));
    for outside in [0, 1, 255] {
        assert!(matches!(wish(2, outside), Err(Error::Outside { .. })));
    }
    assert_eq!(wish(1, 51).unwrap(), Ipv4Addr::new(10, 0, 0, 51));
    assert_eq!(wish(2, 50).unwrap(), Ipv4Addr::new(10, 0, 0, 50));
    let twice = vec![host(1, "10.0.0.9", None), host(2, "10.0.0.9", None)];
    assert!(matches!(Leases::open(&bed.path(), bed.pool, twice), Err(Error::Twice(_))));
}

#[test]
fn files_that_changed_or_make_no_sense() {
    let mut bed = Bed::new("10.0.0.1/24");
    write(bed.dir.path(), "default.json", "[{\"mac\": 7");
    let leases = bed.open();
    assert!(leases.list().is_empty() && bed.dir.path().join("default.json.damaged").exists());
    for (n, address) in [(1, 5), (2, 200)] {
        leases.reserve(mac(n), "vm", 0, Some(Ipv4Addr::new(10, 0, 0, address))).unwrap();
    }
    drop(leases);
    // The network has become smaller, and an address is now declared for another card.
    bed.pool = "10.0.0.1/28".parse().unwrap();
    bed.fixed = vec![host(3, "10.0.0.5", None)];
    let leases = bed.open();
    assert_eq!(leases.list().len(), 1);
    let again = leases.reserve(mac(1), "vm", 0, None).unwrap();
    assert_ne!(again, Ipv4Addr::new(10, 0, 0, 5));
}

#[test]
fn cards_that_are_made_up_get_nothing() {
    let bed = Bed::new("10.0.0.1/24");
    let (server, leases) = (server(&bed), bed.open());
    let mine = leases.reserve(mac(1), "vm", 0, None).unwrap();
    for n in 1000..3000 {
        let discover = message(mac(n), NONE, MessageType::Discover, vec![]);
        assert_eq!(server.serve(&discover, &leases), Outcome::Unknown);
    }
    assert_eq!(leases.list().len(), 1);
    assert_eq!(lease(&server, &leases, mac(1)), mine);
    leases.release(mac(1));
    assert_eq!(server.serve(&message(mac(1), mine, MessageType::Request, vec![]), &leases), Outcome::Unknown);
}

#[test]
fn every_phase_of_a_lease() {
    let bed = Bed::new("10.0.0.1/24");
    let (server, leases) = (server(&bed), bed.open());
    let mine = leases.reserve(mac(1), "web", 0, None).unwrap();
    let other = Ipv4Addr::new(10, 0, 0, 77);
    let serve = |ciaddr, kind, options| server.serve(&message(mac(1), ciaddr, kind, options), &leases);
    let wants = |address| vec![DhcpOption::RequestedIpAddress(address)];

    // Renewing and rebinding; after a reboot.
    let (kind, ack, to) = answer(serve(mine, MessageType::Request, vec![]));
    assert_eq!((kind, ack.yiaddr(), ack.ciaddr(), to), (MessageType::Ack, mine, mine, mine));
    let (kind, ack, to) = answer(serve(NONE, MessageType::Request, wants(mine)));
    assert_eq!((kind, ack.yiaddr(), to), (MessageType::Ack, mine, Ipv4Addr::BROADCAST));
    let get = |code| ack.opts().get(code).cloned();
    assert_eq!(get(OptionCode::AddressLeaseTime), Some(DhcpOption::AddressLeaseTime(3600)));
    assert_eq!(get(OptionCode::Renewal), Some(DhcpOption::Renewal(1800)));
    assert_eq!(get(OptionCode::Rebinding), Some(DhcpOption::Rebinding(3150)));
    assert_eq!(get(OptionCode::SubnetMask), Some(DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0))));
    assert_eq!(get(OptionCode::Router), Some(DhcpOption::Router(vec![bed.pool.addr()])));
    assert_eq!(get(OptionCode::DomainNameServer), Some(DhcpOption::DomainNameServer(vec![bed.pool.addr()])));
    assert_eq!(get(OptionCode::DomainName), Some(DhcpOption::DomainName("lodge".into())));
    assert_eq!(
        get(OptionCode::DomainSearch),
        Some(DhcpOption::DomainSearch(vec!["lodge.".parse().unwrap()]))
    );
    assert_eq!(get(OptionCode::Hostname), Some(DhcpOption::Hostname("web".into())));
    assert_eq!(get(OptionCode::BroadcastAddr), Some(DhcpOption::BroadcastAddr(Ipv4Addr::new(10, 0, 0, 255))));

    // Another's address is refused, and to all, for the client may not be where it believes to be.
    for refused in
        [serve(other, MessageType::Request, vec![]), serve(NONE, MessageType::Request, wants(other))]
    {
        let (kind, nak, to) = answer(refused);
        assert_eq!((kind, nak.yiaddr(), to), (MessageType::Nak, NONE, Ipv4Addr::BROADCAST));
        assert!(nak.opts().get(OptionCode::AddressLeaseTime).is_none());
    }
    // Another server was chosen.
    let elsewhere = vec![DhcpOption::ServerIdentifier(other), DhcpOption::RequestedIpAddress(other)];
    assert_eq!(serve(NONE, MessageType::Request, elsewhere), Outcome::Nothing);

    let (kind, ack, to) = answer(serve(mine, MessageType::Inform, vec![]));
    assert_eq!((kind, ack.yiaddr(), to), (MessageType::Ack, NONE, mine));
    assert!(ack.opts().get(OptionCode::AddressLeaseTime).is_none());
    assert_eq!(serve(other, MessageType::Inform, vec![]), Outcome::Nothing);

    // What was asked for, and what must be there; the client's name for itself comes back.
    let asked = vec![
        DhcpOption::ParameterRequestList(vec![OptionCode::Router]),
        DhcpOption::ClientIdentifier(vec![1, 2, 3]),
    ];
    let (_, offer, _) = answer(serve(NONE, MessageType::Discover, asked));
    assert!(
        offer.opts().get(OptionCode::Router).is_some() && offer.opts().get(OptionCode::Hostname).is_none()
    );
    let id = offer.opts().get(OptionCode::ClientIdentifier);
    assert_eq!(id, Some(&DhcpOption::ClientIdentifier(vec![1, 2, 3])));

    // Whatever it says of it, the address is its own.
    assert_eq!(serve(NONE, MessageType::Decline, wants(mine)), Outcome::Declined(mac(1), mine));
    assert_eq!(serve(mine, MessageType::Release, vec![]), Outcome::Nothing);
    assert_eq!(lease(&server, &leases, mac(1)), mine);

    let alone = Server { router: false, ..server };
    let (_, offer, _) = answer(alone.serve(&message(mac(1), NONE, MessageType::Discover, vec![]), &leases));
    assert!(offer.opts().get(OptionCode::Router).is_none(), "there is no way out");
}

#[test]
fn options_that_dhcproto_panics_at() {
    let bed = Bed::new("10.0.0.1/24");
    let (server, leases) = (server(&bed), bed.open());
    let mine = leases.reserve(mac(1), "web", 0, None).unwrap();
    let plain = message(mac(1), NONE, MessageType::Discover, vec![]);
    for option in [&[121, 1, 33][..], &[151, 0], &[152, 1, 0], &[94, 0]] {
        let mut bytes = plain.clone();
        let end = bytes.iter().rposition(|byte| *byte == 255).unwrap();
        bytes.splice(end..end, option.iter().copied());
        assert_eq!(answer(server.serve(&bytes, &leases)).1.yiaddr(), mine, "{option:?}");
    }
    let mut long = plain;
    long[2] = 17;
    assert_eq!(server.serve(&long, &leases), Outcome::Malformed);
}

fn changed(valid: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12);
    (changes, any::<prop::sample::Index>(), any::<bool>()).prop_map(move |(changes, cut, short)| {
        let mut bytes = valid.clone();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if short {
            bytes.truncate(cut.index(bytes.len() + 1));
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn hostile_messages_get_the_own_address_or_nothing(
        bytes in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..600),
            changed(message(mac(1), NONE, MessageType::Discover, vec![
                DhcpOption::ParameterRequestList(vec![OptionCode::Router, OptionCode::DomainSearch]),
                DhcpOption::DomainSearch(vec!["example.org".parse().unwrap()]),
            ])),
            changed(message(mac(1), NONE, MessageType::Request, vec![
                DhcpOption::RequestedIpAddress(Ipv4Addr::new(10, 0, 0, 2)),
                DhcpOption::ClientIdentifier(vec![1; 20]),
            ])),
        ],
    ) {
        thread_local! {
            static BED: (Bed, Leases) = {
                let bed = Bed::new("10.0.0.1/24");
                let leases = bed.open();
                leases.reserve(mac(1), "web", 0, None).unwrap();
                (bed, leases)
            };
        }
        BED.with(|(bed, leases)| {
            if let Outcome::Answer(bytes, to) = server(bed).serve(&bytes, leases) {
                let answer = Message::from_bytes(&bytes).unwrap();
                let mine = Ipv4Addr::new(10, 0, 0, 2);
                assert!([NONE, mine].contains(&answer.yiaddr()) && [Ipv4Addr::BROADCAST, mine].contains(&to));
            }
        });
    }
}
