//! Guests that ask for names.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::{Bed, host, mac, write};
use crate::names::{Outcome, Zone, label};
use crate::upstream::{Upstream, read};
use crate::{Counters, Leases, sockets};

fn question(name: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::new(77, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message.to_vec().unwrap()
}

fn zone(bed: &Bed) -> Zone {
    let ipv6 = Some("fd00::1/64".parse().unwrap());
    Zone { ipv4: bed.pool, ipv6, domain: "lodge.test".parse().unwrap(), router: true }
}

/// Guests `web` and `Db`, the latter stopped, and the declared card `printer`.
fn bed() -> (Bed, Leases) {
    let mut bed = Bed::new("10.0.0.1/24");
    bed.fixed = vec![host(9, "10.0.0.9", Some("printer"))];
    let leases = bed.open();
    leases.reserve(mac(1), "web", 0, None).unwrap();
    leases.reserve(mac(2), "Db", 0, None).unwrap();
    leases.release(mac(2));
    leases.reserve(mac(3), "no_label", 0, None).unwrap();
    (bed, leases)
}

#[track_caller]
fn answered(zone: &Zone, leases: &Leases, name: &str, kind: RecordType) -> (ResponseCode, Vec<RData>) {
    let Outcome::Answer(answer) = zone.serve(&question(name, kind), leases) else {
        panic!("{name}: not ours")
    };
    let answer = Message::from_vec(&answer).unwrap();
    assert!(answer.metadata.id == 77 && answer.metadata.message_type == MessageType::Response);
    (answer.metadata.response_code, answer.answers.iter().map(|record| record.data.clone()).collect())
}

#[test]
fn names_of_the_network() {
    let (bed, leases) = bed();
    let zone = zone(&bed);
    let ask = |name: &str, kind| answered(&zone, &leases, name, kind);
    let a = |last| (ResponseCode::NoError, vec![RData::A(A(Ipv4Addr::new(10, 0, 0, last)))]);
    let ptr = |name: &str| (ResponseCode::NoError, vec![RData::PTR(PTR(Name::from_ascii(name).unwrap()))]);
    for web in ["web.", "WEB.", "web.lodge.test.", "wEb.Lodge.TEST."] {
        assert_eq!(ask(web, RecordType::A), a(2), "{web}");
    }
    assert_eq!(ask("db.lodge.test.", RecordType::A), a(3), "it is stopped, and has its address yet");
    assert_eq!(ask("printer.", RecordType::A), a(9));
    assert_eq!(ask("_gateway.", RecordType::A), a(1));
    assert_eq!(ask("host.lodge.test.", RecordType::A), a(1));
    let gateway6 = RData::AAAA(AAAA("fd00::1".parse().unwrap()));
    assert_eq!(ask("host.lodge.test.", RecordType::AAAA), (ResponseCode::NoError, vec![gateway6]));
    assert_eq!(
        ask("web.", RecordType::AAAA),
        (ResponseCode::NoError, vec![]),
        "there is one of another type"
    );
    assert_eq!(ask("nobody.lodge.test.", RecordType::A), (ResponseCode::NXDomain, vec![]));
    assert_eq!(ask("a.web.lodge.test.", RecordType::A), (ResponseCode::NXDomain, vec![]));
    assert_eq!(ask("lodge.test.", RecordType::A), (ResponseCode::NoError, vec![]));

    assert_eq!(ask("2.0.0.10.in-addr.arpa.", RecordType::PTR), ptr("web.lodge.test."));
    assert_eq!(ask("9.0.0.10.in-addr.arpa.", RecordType::PTR), ptr("printer.lodge.test."));
    assert_eq!(ask("1.0.0.10.in-addr.arpa.", RecordType::PTR), ptr("host.lodge.test."));
    for nobody in ["4.0.0.10.in-addr.arpa.", "99.0.0.10.in-addr.arpa."] {
        assert_eq!(ask(nobody, RecordType::PTR), (ResponseCode::NXDomain, vec![]), "{nobody}");
    }
    let gateway6 = Name::from(Ipv6Addr::from_bits(0xfd00 << 112 | 1)).to_ascii();
    assert_eq!(ask(&gateway6, RecordType::PTR), ptr("host.lodge.test."));

    for elsewhere in ["example.org.", "host.", "nobody.", "1.0.0.11.in-addr.arpa.", "10.in-addr.arpa.", "."] {
        assert_eq!(zone.serve(&question(elsewhere, RecordType::A), &leases), Outcome::Forward, "{elsewhere}");
    }
    assert_eq!(ask("example.org.", RecordType::AXFR).0, ResponseCode::Refused);
    let isolated = Zone { router: false, ..zone };
    assert_eq!(answered(&isolated, &leases, "example.org.", RecordType::A).0, ResponseCode::Refused);
    assert_eq!(answered(&isolated, &leases, "web.", RecordType::A), a(2));
}

#[test]
fn only_guests_are_served() {
    let zone = zone(&bed().0);
    let serves = |address: &str| zone.serves(address.parse::<IpAddr>().unwrap());
    assert!(["10.0.0.2", "fd00::77", "fe80::1"].iter().all(|address| serves(address)));
    assert!(!["10.0.1.2", "10.0.0.1", "192.0.2.1", "fd00:0:0:1::7", "2001:db8::1"].iter().any(|a| serves(a)));
}

#[test]
fn what_a_label_is() {
    assert_eq!(label("Web-1"), Some("web-1".into()));
    for bad in ["", "-a", "a-", "a.b", "a_b", "ä", &"a".repeat(64)] {
        assert_eq!(label(bad), None, "{bad}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn hostile_questions(
        raw in prop::collection::vec(any::<u8>(), 0..200),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        which in 0..3usize,
    ) {
        thread_local!(static BED: (Bed, Leases) = bed());
        BED.with(|(bed, leases)| {
            let zone = zone(bed);
            zone.serve(&raw, leases);
            let name = ["web.lodge.test.", "2.0.0.10.in-addr.arpa.", "example.org."][which];
            let mut bytes = question(name, RecordType::A);
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Outcome::Answer(answer) = zone.serve(&bytes, leases) {
                // Never long: nobody is flooded by our answers.
                assert!(answer.len() <= 512 && answer[..2] == bytes[..2]);
            }
            let _ = Zone::failure(&bytes);
        });
    }
}

/// A name server that knows any name, but in a stream only if it is long.
async fn world(udp: UdpSocket, tcp: TcpListener) {
    let answer = |question: &[u8], short: bool| {
        let mut message = Message::from_vec(question).unwrap();
        message.metadata.message_type = MessageType::Response;
        let query = message.queries[0].clone();
        let long = query.name.to_ascii().starts_with("long");
        message.metadata.truncation = long && short;
        for n in 0..if !long {
            1
        } else if short {
            0
        } else {
            200
        } {
            let data = RData::A(A(Ipv4Addr::new(192, 0, 2, n)));
            message.add_answer(Record::from_rdata(query.name.clone(), 60, data));
        }
        message.to_vec().unwrap()
    };
    let mut bytes = [0; 2000];
    loop {
        tokio::select! {
            Ok((len, from)) = udp.recv_from(&mut bytes) => {
                udp.send_to(&answer(&bytes[..len], true), from).await.unwrap();
            }
            Ok((mut stream, _)) = tcp.accept() => {
                let question = read(&mut stream).await.unwrap();
                crate::upstream::write(&mut stream, &answer(&question, false)).await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn other_names_are_asked_of_the_host_s_servers() {
    let bed = Bed::new("127.0.0.2/8");
    let zone = Arc::new(zone(&bed));
    let leases = Arc::new(bed.open());
    let udp = UdpSocket::bind("127.0.0.3:0").await.unwrap();
    let port = udp.local_addr().unwrap().port();
    let tcp = TcpListener::bind(("127.0.0.3", port)).await.unwrap();
    tokio::spawn(world(udp, tcp));
    // The first does not answer.
    let silent = UdpSocket::bind(("127.0.0.4", port)).await.unwrap();
    let resolv = write(bed.dir.path(), "resolv.conf", "nameserver 127.0.0.4\nnameserver 127.0.0.3\n");
    let counters = Arc::new(Counters::default());
    let upstream = Arc::new(Upstream::new(resolv, Vec::new()).at(port));
    let names = Arc::new(sockets::Names { zone, upstream, leases, counters });
    let at = UdpSocket::bind("127.0.0.2:0").await.unwrap();
    let streams = TcpListener::bind("127.0.0.2:0").await.unwrap();
    let (to, to_stream) = (at.local_addr().unwrap(), streams.local_addr().unwrap());
    tokio::spawn(sockets::serve_udp(at, names.clone(), Arc::default()));
    tokio::spawn(sockets::serve_tcp(streams, names.clone(), Arc::default()));

    let guest = UdpSocket::bind("127.0.0.9:0").await.unwrap();
    let mut bytes = [0; 2000];
    let mut ask = async |name: &str| {
        guest.send_to(&question(name, RecordType::A), to).await.unwrap();
        let len =
            tokio::time::timeout(Duration::from_secs(20), guest.recv(&mut bytes)).await.unwrap().unwrap();
        Message::from_vec(&bytes[..len]).unwrap()
    };
    let answer = ask("example.org.").await;
    assert_eq!((answer.metadata.id, answer.answers.len()), (77, 1));
    assert_eq!(silent.try_recv(&mut [0; 512]).map(|len| len > 12).ok(), Some(true), "it was asked first");
    let answer = ask("long.example.org.").await;
    assert!(answer.metadata.truncation && answer.answers.is_empty());
    let mut stream = TcpStream::connect(to_stream).await.unwrap();
    for _ in 0..2 {
        let question = question("long.example.org.", RecordType::A);
        stream.write_u16(question.len() as u16).await.unwrap();
        stream.write_all(&question).await.unwrap();
        let len = stream.read_u16().await.unwrap();
        let mut answer = vec![0; len.into()];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(Message::from_vec(&answer).unwrap().answers.len(), 200);
        // Connections are for one question or for many; the world's servers here answer one each.
    }
    assert_eq!(names.counters.get().names_forwarded, 4);
}

#[tokio::test]
async fn nobody_answers() {
    let bed = Bed::new("127.0.0.2/8");
    let resolv = write(bed.dir.path(), "resolv.conf", "nameserver 127.0.0.2\n");
    // The only server is this one itself.
    let upstream = Upstream::new(resolv, vec!["127.0.0.2".parse().unwrap()]);
    let asked = question("example.org.", RecordType::A);
    assert_eq!(upstream.ask(&asked).await, None);
    let failure = Message::from_vec(&Zone::failure(&asked).unwrap()).unwrap();
    assert_eq!((failure.metadata.id, failure.metadata.response_code), (77, ResponseCode::ServFail));
}
