//! A host with the helper, and a machine beside it on the same link, in network namespaces.
#![allow(dead_code, reason = "each test uses some of it")]

#[path = "../../../../tests/src/namespaces.rs"]
pub mod namespaces;

use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use namespaces::Host;
use netctl::{Answer, Client, Error, Request};

pub const PATIENCE: Duration = Duration::from_secs(30);

/// See above.
pub struct World {
    pub host: Host,
    pub beside: Host,
    pub dir: tempfile::TempDir,
    helper: Option<Child>,
}

impl World {
    /// Makes them; the host's link is `eth0`, and all that it has is there, permanent. The helper does not run yet.
    pub fn new() -> Option<Self> {
        let (host, beside) = (Host::new()?, Host::new()?);
        let dir = tempfile::tempdir().unwrap();
        let names = dir.path().join("resolv.conf");
        std::fs::write(&names, "nameserver 198.51.100.1\n").unwrap();
        host.run(&format!(
            "mount -t tmpfs none /run
             mount --bind {} /etc/resolv.conf
             ip link add eth0 type veth peer name peer netns {}
             ip link set eth0 up
             ip address add 198.51.100.2/24 brd + dev eth0
             ip address add 198.51.100.3/24 dev eth0 label eth0:1
             ip address add 2001:db8::2/64 dev eth0
             ip address add 2001:db8::3/64 dev eth0 valid_lft 5000 preferred_lft 4000
             ip route add default via 198.51.100.1 metric 100
             ip route add 203.0.113.0/24 via 198.51.100.9 src 198.51.100.3 proto static
             ip route add 192.0.2.0/24 dev eth0 scope link table 77
             ip -6 route add default via 2001:db8::1 metric 50",
            names.display(),
            beside.pid()
        ));
        beside.run(
            "ip link set peer up
             ip address add 198.51.100.1/24 dev peer && ip address add 2001:db8::1/64 dev peer nodad",
        );
        let world = Self { host, beside, dir, helper: None };
        world.wait("usable addresses", || world.output("ip -6 address show tentative").is_empty());
        world.host.run("ip -6 route add 2001:db8:7::/48 via fe80::99 dev eth0 src 2001:db8::2");
        Some(world)
    }

    /// What shell commands say on the host.
    pub fn output(&self, script: &str) -> String {
        let output = self.host.command("sh").args(["-c", script]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    pub fn wait(&self, what: &str, mut done: impl FnMut() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < end, "{what}: not after {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("netd.sock")
    }

    /// Where the helper notes what it is doing.
    pub fn runtime(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// Starts the helper; it is there afterwards.
    pub fn start(&mut self) {
        let _ = std::fs::remove_file(self.socket());
        let mut command: Command = self.host.command(env!("CARGO_BIN_EXE_lodge-netd"));
        command.arg("--socket").arg(self.socket());
        command.arg("--state").arg(self.dir.path().join("state"));
        command.arg("--runtime").arg(self.runtime());
        command.arg("--config").arg(self.dir.path().join("none.toml"));
        self.helper = Some(command.spawn().unwrap());
        self.wait("the helper", || Client::connect(&self.socket()).is_ok());
    }

    /// Kills the helper, as SIGKILL does.
    pub fn kill(&mut self) {
        if let Some(mut helper) = self.helper.take() {
            helper.kill().unwrap();
            helper.wait().unwrap();
        }
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.socket()).unwrap()
    }

    pub fn ask(&self, request: &Request) -> Result<Answer, Error> {
        self.client().ask(request).map(|(answer, _)| answer)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.kill();
    }
}
