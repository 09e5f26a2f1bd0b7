//! A network's servers without a network; with one in [`bridge`].

mod bridge;
mod clients;
mod questions;

use std::path::{Path, PathBuf};

use ipnet::Ipv4Net;
use netctl::{Host, Mac};

use crate::Leases;

/// A directory with the leases of one network.
struct Bed {
    dir: tempfile::TempDir,
    pool: Ipv4Net,
    fixed: Vec<Host>,
}

impl Bed {
    fn new(pool: &str) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), pool: pool.parse().unwrap(), fixed: Vec::new() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("default.json")
    }

    /// As after a start of the helper.
    fn open(&self) -> Leases {
        Leases::open(&self.path(), self.pool, self.fixed.clone()).unwrap()
    }
}

fn mac(n: u16) -> Mac {
    let [a, b] = n.to_be_bytes();
    Mac::new([0x52, 0x4c, 0, 0, a, b]).unwrap()
}

fn host(n: u16, address: &str, name: Option<&str>) -> Host {
    Host { mac: mac(n), address: address.parse().unwrap(), name: name.map(Into::into) }
}

/// A file of this text.
fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}
