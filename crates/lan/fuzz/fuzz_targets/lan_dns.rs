//! A guest that asks the name server anything at all: answers are short, and have the question's number.
#![no_main]

use std::sync::OnceLock;

use lan::Leases;
use lan::names::{Outcome, Zone};
use libfuzzer_sys::fuzz_target;

fn bed() -> &'static (Zone, Leases, tempfile::TempDir) {
    static BED: OnceLock<(Zone, Leases, tempfile::TempDir)> = OnceLock::new();
    BED.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        let ipv4 = "10.0.0.1/24".parse().expect("a network");
        let leases = Leases::open(&dir.path().join("leases"), ipv4, Vec::new()).expect("there are none");
        let mac = netctl::Mac::new([0x52, 0x4c, 0, 0, 0, 1]).expect("a card's");
        leases.reserve(mac, "web", 0, None).expect("there is one");
        let ipv6 = "fd00::1/64".parse().ok();
        (Zone { ipv4, ipv6, domain: "lodge.".parse().expect("a domain"), router: true }, leases, dir)
    })
}

fuzz_target!(|input: &[u8]| {
    let (zone, leases, _) = bed();
    // A question with the usual header, besides.
    let asked = [b"\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00", input].concat();
    for message in [input, &asked] {
        if let Outcome::Answer(answer) = zone.serve(message, leases) {
            assert!(answer.len() <= 1232 && answer[..2] == message[..2], "{answer:?}");
        }
        let _ = Zone::failure(message);
    }
});
