//! A guest that sends anything at all to the DHCP server: it is told its own address, or nothing. The input's rest is put behind a
//! message of its card's, for the fuzzer could hardly guess that.
#![no_main]

use std::net::Ipv4Addr;
use std::sync::OnceLock;

use lan::Leases;
use lan::dhcp::{Outcome, Server};
use libfuzzer_sys::fuzz_target;

const MAC: [u8; 6] = [0x52, 0x4c, 0, 0, 0, 1];
const MINE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

fn bed() -> &'static (Server, Leases, tempfile::TempDir) {
    static BED: OnceLock<(Server, Leases, tempfile::TempDir)> = OnceLock::new();
    BED.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        let pool = "10.0.0.1/24".parse().expect("a network");
        let leases = Leases::open(&dir.path().join("leases"), pool, Vec::new()).expect("there are none");
        let mac = netctl::Mac::new(MAC).expect("a card's");
        assert_eq!(leases.reserve(mac, "web", 0, None).expect("there is one"), MINE);
        (Server { pool, router: true, domain: "lodge.".parse().expect("a domain") }, leases, dir)
    })
}

fuzz_target!(|input: &[u8]| {
    let (server, leases, _) = bed();
    let mut ours = vec![0; 240];
    let (fixed, options) = input.split_at(input.len().min(28));
    ours[..fixed.len()].copy_from_slice(fixed);
    ours[..3].copy_from_slice(&[1, 1, 6]);
    ours[28..34].copy_from_slice(&MAC);
    ours[236..].copy_from_slice(&[99, 130, 83, 99]);
    ours.extend(options);
    for message in [input, &ours] {
        if let Outcome::Answer(answer, to) = server.serve(message, leases) {
            let yours = &answer[16..20];
            assert!(yours == MINE.octets() || yours == [0; 4], "{yours:?}");
            assert!(to == MINE || to == Ipv4Addr::BROADCAST, "{to}");
        }
    }
});
