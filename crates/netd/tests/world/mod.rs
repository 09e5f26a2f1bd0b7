//! A host with a helper, in namespaces of its own; clients, frames, and guests that are namespaces too.
#![allow(dead_code)]

#[path = "../../../../tests/src/namespaces.rs"]
mod namespaces;

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use netctl::{Answer, Attach, Attached, Client, Error, Request, Target};
use rustix::event::{PollFd, PollFlags, poll};

pub use namespaces::Host;

pub const PATIENCE: Duration = Duration::from_secs(20);

/// A host with a helper.
pub struct World {
    pub host: Host,
    pub directory: tempfile::TempDir,
    helper: Option<Child>,
}

impl World {
    /// Makes one and runs a script on it before the helper starts, or says why not.
    pub fn new(script: &str) -> Option<Self> {
        if !Path::new("/usr/sbin/nft").exists() || !Path::new(taps::TUN).exists() {
            println!("skipped: nftables or /dev/net/tun is missing");
            return None;
        }
        let host = Host::new()?;
        let directory = tempfile::tempdir().unwrap();
        // Others than root ask, too.
        Command::new("chmod").arg("711").arg(directory.path()).status().unwrap();
        host.run("mount -t sysfs sysfs /sys");
        host.run(script);
        let mut world = Self { host, directory, helper: None };
        world.start();
        Some(world)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn helper(&self) -> Command {
        let mut command = self.host.command(env!("CARGO_BIN_EXE_lodge-netd"));
        for (flag, name) in
            [("--socket", "socket"), ("--state", "state"), ("--runtime", "run"), ("--config", "netd.toml")]
        {
            command.arg(flag).arg(self.path(name));
        }
        command
    }

    pub fn start(&mut self) {
        self.helper = Some(self.helper().spawn().unwrap());
        self.until("the helper listens", || Client::connect(&self.path("socket")).is_ok());
    }

    /// Ends it as the kernel would.
    pub fn kill(&mut self) {
        let mut child = self.helper.take().expect("it runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Ends it as a service manager would.
    pub fn terminate(&mut self) {
        let mut child = self.helper.take().expect("it runs");
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(child.wait().unwrap().success());
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.path("socket")).unwrap()
    }

    pub fn ask(&self, request: &Request) -> Result<Answer, Error> {
        self.client().ask(request).map(|(answer, _)| answer)
    }

    pub fn attach(&self, attach: Attach) -> (Attached, OwnedFd) {
        match self.client().ask(&Request::Attach(Box::new(attach))) {
            Ok((Answer::Attached(attached), mut descriptors)) => (attached, descriptors.pop().unwrap()),
            other => panic!("{other:?}"),
        }
    }

    /// What a command prints on the host.
    #[track_caller]
    pub fn text(&self, script: &str) -> String {
        let output = self.host.command("sh").args(["-ec", script]).output().unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Tables of rules, sorted: setting one anew puts it last.
    pub fn rules(&self) -> String {
        let text = self.text("nft -s list ruleset");
        let mut tables: Vec<_> = text.split_inclusive("\n}\n").collect();
        tables.sort_unstable();
        tables.concat()
    }

    /// Links, addresses and rules of the host.
    pub fn traces(&self) -> String {
        let addresses =
            "ip -o addr show scope global | while read -r _ link _ address _; do echo $link $address; done";
        self.text(&format!("ls /sys/class/net; {addresses}")) + &self.rules()
    }

    #[track_caller]
    pub fn until(&self, what: &str, is_so: impl Fn() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !is_so() {
            assert!(Instant::now() < end, "not in time: {what}\n{}", self.text("ip link; nft list ruleset"));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if self.helper.is_some() {
            self.kill();
        }
    }
}

/// A card with nothing special.
pub fn card(number: u8, to: Target) -> Attach {
    Attach {
        vm: format!("vm{number}"),
        mac: mac(number),
        to,
        again: false,
        queues: 1,
        address: None,
        spoofing: false,
        rules: Vec::new(),
        forwards: Vec::new(),
    }
}

pub fn mac(number: u8) -> netctl::Mac {
    netctl::Mac::new([0x52, 0x4c, 0, 0, 0, number]).unwrap()
}

pub fn network(name: &str) -> Target {
    Target::Network(name.into())
}

/// A process that connects a card, if it is allowed to, and lives until its input ends. What it was told comes first.
pub struct Vm(pub Child, pub Result<Attached, String>);

impl Vm {
    /// `user`: who it is; root if 0.
    pub fn start(world: &World, attach: &Attach, user: u32) -> Self {
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={user}"), &format!("--regid={user}"), "--clear-groups", "--"]);
        command.arg(std::env::current_exe().unwrap()).args(["--exact", "vm", "--nocapture"]);
        command.env("NETD_TEST_SOCKET", world.path("socket"));
        command.env("NETD_TEST_ATTACH", serde_json::to_string(attach).unwrap());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let line =
            output.lines().map_while(Result::ok).find_map(|line| line.strip_prefix("VM ").map(str::to_owned));
        let told = serde_json::from_str(&line.expect("it tells")).unwrap();
        Self(child, told)
    }

    pub fn attached(&self) -> &Attached {
        self.1.as_ref().unwrap()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What such a process does: a test of this name calls it, which is nothing when run by itself.
pub fn vm() {
    let (Ok(socket), Ok(attach)) = (std::env::var("NETD_TEST_SOCKET"), std::env::var("NETD_TEST_ATTACH"))
    else {
        return;
    };
    let request = Request::Attach(Box::new(serde_json::from_str(&attach).unwrap()));
    let asked = Client::connect(socket.as_ref()).unwrap().ask(&request);
    let (told, _descriptors) = match asked {
        Ok((Answer::Attached(attached), descriptors)) => (Ok(attached), descriptors),
        Err(Error::Refused { why, help }) => {
            (Err(format!("{why}\n{}", help.unwrap_or_default())), Vec::new())
        }
        other => panic!("{other:?}"),
    };
    println!("\nVM {}", serde_json::to_string(&told).unwrap());
    let _ = std::io::stdin().read_line(&mut String::new());
}

/// A guest: a namespace with a TAP of its own, between which and the helper's frames are carried. It ends with the test.
pub struct Guest {
    pub host: Host,
    pub attached: Attached,
}

impl Guest {
    pub fn new(world: &World, attach: Attach) -> Self {
        let mac = attach.mac;
        let (attached, outer) = world.attach(attach);
        let host = Host::new().expect("there is one already");
        let inner = host.inside(|| taps::create("eth0", 1).unwrap().1.pop().unwrap());
        // Who is not there is known sooner.
        host.run(&format!(
            "echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_ra; ip link set eth0 address {mac} up; \
             for ip in ipv4 ipv6; do echo 100 > /proc/sys/net/$ip/neigh/eth0/retrans_time_ms; done"
        ));
        std::thread::spawn(move || carry(&outer, &inner));
        Self { host, attached }
    }

    /// Serves one page after another, all of which say who asks.
    pub fn serve(&self, port: u16) {
        serve(&self.host, port);
    }

    pub fn asks(&self, address: &str) -> Result<IpAddr, std::io::ErrorKind> {
        asks(&self.host, address)
    }
}

fn carry(one: &OwnedFd, other: &OwnedFd) {
    let mut bytes = vec![0; 70000];
    loop {
        let mut ready = [PollFd::new(one, PollFlags::IN), PollFd::new(other, PollFlags::IN)];
        poll(&mut ready, None).unwrap();
        for (from, to) in [(one, other), (other, one)] {
            while let Ok(len) = rustix::io::read(from, &mut bytes[..]) {
                // A link that is down takes none, as a cable would.
                let _ = rustix::io::write(to, &bytes[..len]);
                if len == 0 {
                    return;
                }
            }
        }
        // A device that is gone is always ready.
        if ready.iter().any(|fd| fd.revents().contains(PollFlags::ERR)) {
            return;
        }
    }
}

/// Answers each connection with its peer's address.
pub fn serve(host: &Host, port: u16) {
    let listener = host.inside(|| TcpListener::bind(("::", port)).unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let peer = stream.peer_addr().unwrap().ip().to_canonical();
            let _ = std::io::Write::write_all(&mut stream, peer.to_string().as_bytes());
        }
    });
}

/// Which address somebody is seen under, if it gets through in time.
pub fn asks(host: &Host, address: &str) -> Result<IpAddr, std::io::ErrorKind> {
    ask_for(host, address, Duration::from_secs(15))
}

/// Whether somebody gets through, for which no busy machine is waited long.
pub fn reaches(host: &Host, address: &str) -> bool {
    ask_for(host, address, Duration::from_secs(2)).is_ok()
}

fn ask_for(host: &Host, address: &str, patience: Duration) -> Result<IpAddr, std::io::ErrorKind> {
    let address: SocketAddr = address.parse().unwrap();
    host.inside(|| {
        let mut stream = TcpStream::connect_timeout(&address, patience).map_err(|error| error.kind())?;
        stream.set_read_timeout(Some(patience)).unwrap();
        let mut text = String::new();
        std::io::Read::read_to_string(&mut stream, &mut text).map_err(|error| error.kind())?;
        Ok(text.parse().unwrap())
    })
}

/// Bytes before each frame, all zero: nothing is left to be done to it.
const HEADER: usize = 10;

/// Sends a frame as the guest would.
pub fn send(tap: impl AsFd, frame: &[u8]) {
    let bytes = [&[0; HEADER], frame].concat();
    assert_eq!(rustix::io::write(tap, &bytes), Ok(bytes.len()));
}

/// All frames that come in until the marker does, without it.
#[track_caller]
pub fn receive_until(tap: impl AsFd, marker: &[u8]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let end = Instant::now() + PATIENCE;
    loop {
        let mut bytes = [0; 4096];
        match rustix::io::read(&tap, &mut bytes) {
            Ok(len) if &bytes[HEADER..len] == marker => return frames,
            Ok(len) => frames.push(bytes[HEADER..len].to_vec()),
            Err(rustix::io::Errno::AGAIN) => {
                assert!(Instant::now() < end, "the marker does not come; these did: {frames:02x?}");
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("{error}"),
        }
    }
}
