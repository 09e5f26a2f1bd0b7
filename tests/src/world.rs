//! A host on which Lodge runs, and a machine on the same link, both in namespaces: what guests reach there, and who reaches them.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketType, eth, socket};

use crate::namespaces::Host;
use crate::{Done, Running, Scratch, lodge, start_typing, start_with};

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The host on which Lodge runs, 198.51.100.2 and 2001:db8::2, and a machine on the same link, 198.51.100.1 and 2001:db8::1, which knows
/// nothing of guests.
pub struct World {
    /// The host, whose link is called `out`.
    pub host: Host,
    /// The other machine, whose link is called `in`.
    pub outside: Host,
    /// Files of theirs.
    pub scratch: Scratch,
    helper: Mutex<Option<Child>>,
}

impl World {
    /// Makes it, or says why not.
    pub fn new(name: &str) -> Option<Self> {
        let (host, outside) = (Host::new()?, Host::new()?);
        let scratch = Scratch::new(name);
        let names = scratch.file("resolv.conf", b"nameserver 198.51.100.1\n");
        host.run(&format!(
            "ip link add out type veth peer name in netns {}; ip link set out up; ip addr add 198.51.100.2/24 dev out; \
             ip addr add 2001:db8::2/64 dev out nodad; mount --bind {} /etc/resolv.conf; mount -t sysfs sys /sys",
            outside.pid(),
            names.display()
        ));
        outside.run(
            "ip link set in up; ip addr add 198.51.100.1/24 dev in; ip addr add 2001:db8::1/64 dev in nodad",
        );
        Some(Self { host, outside, scratch, helper: Mutex::default() })
    }

    /// Makes it, with the network helper on the host; or says why not.
    pub fn with_helper(name: &str) -> Option<Self> {
        if Command::new("nft").arg("--version").output().is_err() {
            println!("skipped: `nft` is missing (the package nftables)");
            return None;
        }
        let world = Self::new(name)?;
        world.start_helper();
        Some(world)
    }

    /// Starts the network helper, and waits until it listens.
    pub fn start_helper(&self) {
        let socket = self.scratch.path().join("netd.sock");
        let mut command = self.host.command(lodge().with_file_name("lodge-netd"));
        command.arg("--socket").arg(&socket);
        for (option, name) in [("--state", "networks"), ("--runtime", "netd"), ("--config", "netd.toml")] {
            command.arg(option).arg(self.scratch.path().join(name));
        }
        let helper = command.stdin(Stdio::null()).spawn().expect("nsenter");
        *self.helper.lock().expect("nobody panics") = Some(helper);
        wait("the network helper", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    }

    /// Ends the network helper with no time to clean up.
    pub fn kill_helper(&self) {
        if let Some(mut helper) = self.helper.lock().expect("nobody panics").take() {
            let _ = helper.kill();
            let _ = helper.wait();
        }
    }

    /// The command, on the host.
    pub fn lodge(&self) -> Command {
        let mut command = self.host.command(lodge());
        command.env("LODGE_RUNTIME_DIR", self.scratch.path());
        command.env("LODGE_NETD_SOCKET", self.scratch.path().join("netd.sock"));
        command
    }

    /// Runs the command to its end.
    pub fn run(&self, args: &[&str]) -> Done {
        start_with(self.lodge().args(args), "").wait(PATIENCE)
    }

    /// Starts a guest of this name, with these flags.
    pub fn start(&self, name: &str, flags: &[&str]) -> Guest<'_> {
        let mut command = self.lodge();
        command.args(["run", "--engine", "translate", "--name", name]).args(flags);
        let (mut running, keyboard) = start_typing(&mut command);
        let socket = self.scratch.path().join(format!("{name}.sock"));
        wait("the machine", || socket.exists() || running.child.try_wait().is_ok_and(|end| end.is_some()));
        if !socket.exists() {
            panic!("it has ended: {:?}", running.wait(PATIENCE));
        }
        Guest { world: self, name: name.into(), running, _keyboard: keyboard }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.kill_helper();
    }
}

/// A guest that runs.
pub struct Guest<'a> {
    world: &'a World,
    name: String,
    running: Running,
    _keyboard: ChildStdin,
}

impl Guest<'_> {
    /// Runs shell commands in it.
    pub fn run(&self, script: &str) -> Done {
        self.world.run(&["exec", &self.name, "--", "sh", "-c", script])
    }

    /// What a page of the web says to it.
    #[track_caller]
    pub fn page(&self, address: &str) -> String {
        self.run(&format!("wget -qO- http://{address}")).expect(0).out.trim().to_owned()
    }

    /// Whether it reaches a page: who does not answer has a few seconds to do so.
    pub fn reaches(&self, address: &str) -> bool {
        self.run(&format!("timeout 4 wget -qO- http://{address}")).code() == 0
    }

    /// Waits until it has addresses and routes, of IPv4, and of IPv6 where the network has that.
    pub fn is_connected(&self) {
        self.run(
            "until ip route | grep -q /24 && ip -6 route | grep -v fe80 | grep -q /64; do sleep 0.1; done",
        )
        .expect(0);
    }

    /// Its own address of IPv4.
    pub fn address(&self) -> Ipv4Addr {
        let script = "ip -4 -o addr show eth0 | sed 's/.*inet \\([0-9.]*\\).*/\\1/'";
        self.run(script).expect(0).out.trim().parse().expect("an address")
    }

    /// Its own global address of IPv6.
    pub fn address6(&self) -> Ipv6Addr {
        let script =
            "ip -6 -o addr show eth0 | grep -i 'scope global' | sed 's/.*inet6 \\([0-9a-f:]*\\).*/\\1/'";
        self.run(script).expect(0).out.trim().parse().expect("an address")
    }

    /// Starts a web server in it, whose only page says this.
    pub fn serve(&self, page: &str) {
        self.run(&format!("mkdir -p /tmp/www && echo {page} >/tmp/www/page && httpd -p 80 -h /tmp/www"))
            .expect(0);
    }

    /// Ends it, and gives what it said.
    #[track_caller]
    pub fn stop(self) -> Done {
        self.world.run(&["stop", &self.name, "--force"]).expect(0);
        self.running.wait(PATIENCE).expect(130)
    }
}

/// Waits until something is so.
#[track_caller]
pub fn wait(what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < end, "{what} does not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A web server, all of whose pages say who asks.
pub fn serve_pages(at: &str) {
    let listener = TcpListener::bind(at).expect("the address is free");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let peer = stream.peer_addr().map(|peer| peer.ip().to_canonical());
            let _ = stream.read(&mut [0; 4096]);
            let _ = peer.and_then(|peer| write!(stream, "HTTP/1.0 200 OK\r\n\r\n{peer}\n"));
        }
    });
}

/// A name server that knows one machine: outside.test.
pub fn serve_names(at: &str) {
    let socket = UdpSocket::bind(at).expect("the address is free");
    std::thread::spawn(move || {
        let mut bytes = [0; 512];
        while let Ok((len, peer)) = socket.recv_from(&mut bytes) {
            let question = &bytes[12..len];
            let Some(end) = question.iter().position(|b| *b == 0).map(|end| end + 5) else { continue };
            // Its address in IPv4, and nothing else (RFC 1035, 4.1).
            let found = question.starts_with(b"\x07outside\x04test\0\0\x01");
            let counts = [0x81, 0x80, 0, 1, 0, u8::from(found), 0, 0, 0, 0];
            let mut answer = [&bytes[..2], &counts, &question[..end]].concat();
            if found {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 198, 51, 100, 1]);
            }
            let _ = socket.send_to(&answer, peer);
        }
    });
}

/// Gets a page of a web server.
pub fn get(at: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&at.parse().expect("an address"), Duration::from_secs(20))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /page HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// Everybody whose packets a host has seen on its links.
#[derive(Clone, Default)]
pub struct Capture(Arc<Mutex<Vec<IpAddr>>>);

impl Capture {
    /// Begins on `host`, and goes on to the test's end.
    pub fn start(host: &Host) -> Self {
        let capture = Self::default();
        let seen = capture.0.clone();
        let socket = host.inside(|| socket(AddressFamily::PACKET, SocketType::RAW, Some(eth::ALL)));
        let socket = socket.expect("rights");
        std::thread::spawn(move || {
            let mut frame = [0; 2048];
            while let Ok(len) = rustix::io::read(&socket, &mut frame) {
                let from = match frame[..len].get(12..) {
                    Some([8, 0, packet @ ..]) => packet
                        .get(12..16)
                        .and_then(<[u8]>::first_chunk)
                        .map(|from: &[u8; 4]| IpAddr::from(*from)),
                    Some([0x86, 0xdd, packet @ ..]) => packet
                        .get(8..24)
                        .and_then(<[u8]>::first_chunk)
                        .map(|from: &[u8; 16]| IpAddr::from(*from)),
                    _ => None,
                };
                let mut seen = seen.lock().expect("nobody panics");
                if let Some(from) = from.filter(|from| !seen.contains(from)) {
                    seen.push(from);
                }
            }
        });
        capture
    }

    /// Who that was so far, but for addresses of a link alone, and none at all.
    pub fn seen(&self) -> Vec<IpAddr> {
        let mut seen = self.0.lock().expect("nobody panics").clone();
        seen.retain(|from| match from {
            IpAddr::V4(from) => !from.is_unspecified(),
            IpAddr::V6(from) => !from.is_unspecified() && !from.is_unicast_link_local(),
        });
        seen.sort();
        seen
    }
}
