//! The parsers that are nobody's outside of this crate, for the targets in `fuzz`.

use std::cmp::Ordering;

use crate::apt::{self, AptConf};
use crate::openpgp::Keyring;
use crate::packages;
use crate::release::Release;

/// A `Release` file, and an index of packages.
pub fn index(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Some(release) = Release::parse(&text) {
        let _ = (release.dates(), release.version(), release.codename(), release.by_hash());
        let _ = (release.is_of_suite("stable"), release.has_component("main"), release.file("main/Packages"));
    }
    let found = packages::read(data, 0, |_| true).unwrap_or_default();
    for pair in found.windows(2) {
        let _ = packages::leads_to(&pair[0].depends, "linux-image-");
        let order = packages::compare_versions(&pair[0].version, &pair[1].version);
        assert_eq!(packages::compare_versions(&pair[1].version, &pair[0].version), order.reverse());
        assert_eq!(packages::compare_versions(&pair[0].version, &pair[0].version), Ordering::Equal);
        let _ = packages::newest(&found, &pair[0].name, None);
    }
}

/// A keyring, signatures apart from what they sign, and a text with its signature inside.
pub fn signature(data: &[u8]) {
    const NOW: u64 = 1 << 31;
    let mut keyring = Keyring::default();
    keyring.add(data);
    let _ = keyring.verify_detached(b"signed", data, NOW);
    let _ = keyring.verify_cleartext(&String::from_utf8_lossy(data), NOW);
    keyring.retain(&["0123456789ABCDEF".to_owned()]);
}

/// Settings, and both forms of lists of archives.
pub fn apt(text: &str) {
    let mut conf = AptConf::default();
    conf.parse(text);
    let _ = (conf.get("Acquire::http::Proxy"), conf.flag("Acquire::Check-Valid-Until"));
    apt::parse_sources(text);
}
