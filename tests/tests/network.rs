//! Who reaches whom, with stock kernels as guests and network namespaces as the host and a machine beside it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use images::Options;
use lodge_tests::namespaces::Host;
use lodge_tests::{Done, Running, Scratch, default_guest, lodge, start, start_typing, start_with};

const PATIENCE: Duration = Duration::from_secs(120);

/// The host on which Lodge runs, and a machine on the same link, which knows nothing of guests.
struct World {
    host: Host,
    outside: Host,
    scratch: Scratch,
}

impl World {
    fn new(name: &str) -> Option<Self> {
        let (host, outside) = (Host::new()?, Host::new()?);
        let scratch = Scratch::new(name);
        let names = scratch.file("resolv.conf", b"nameserver 198.51.100.1\n");
        host.run(&format!(
            "ip link add out type veth peer name in netns {}; ip link set out up; ip addr add 198.51.100.2/24 dev out; \
             ip addr add 2001:db8::2/64 dev out nodad; mount --bind {} /etc/resolv.conf",
            outside.pid(),
            names.display()
        ));
        outside.run(
            "ip link set in up; ip addr add 198.51.100.1/24 dev in; ip addr add 2001:db8::1/64 dev in nodad",
        );
        Some(Self { host, outside, scratch })
    }

    fn lodge(&self) -> std::process::Command {
        let mut command = self.host.command(lodge());
        command.env("LODGE_RUNTIME_DIR", self.scratch.path());
        command
    }

    /// Starts a guest called `one`, with these flags.
    fn start(&self, flags: &[&str]) -> (Running, std::process::ChildStdin) {
        let mut command = self.lodge();
        command.args(["run", "--engine", "translate", "--name", "one"]).args(flags);
        let started = start_typing(&mut command);
        let end = Instant::now() + PATIENCE;
        while !self.scratch.path().join("one.sock").exists() {
            assert!(Instant::now() < end, "the machine does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        started
    }

    /// Runs shell commands in the guest.
    fn guest(&self, script: &str) -> Done {
        let mut command = self.lodge();
        start_with(command.args(["exec", "one", "--", "sh", "-c", script]), "").wait(PATIENCE)
    }

    /// What a page of the web says to the guest.
    #[track_caller]
    fn page(&self, address: &str) -> String {
        self.guest(&format!("wget -qO- http://{address}/")).expect(0).out.trim().to_owned()
    }
}

/// A web server, all of whose pages say who asks.
fn serve_pages(at: &str) {
    let listener = TcpListener::bind(at).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let peer = stream.peer_addr().unwrap().ip().to_canonical();
            let _ = stream.read(&mut [0; 4096]);
            let _ = write!(stream, "HTTP/1.0 200 OK\r\n\r\n{peer}\n");
        }
    });
}

/// A name server that knows one machine.
fn serve_names(at: &str) {
    let socket = UdpSocket::bind(at).unwrap();
    std::thread::spawn(move || {
        let mut bytes = [0; 512];
        while let Ok((len, peer)) = socket.recv_from(&mut bytes) {
            let question = &bytes[12..len];
            let end = question.iter().position(|b| *b == 0).unwrap() + 5;
            // Its address in IPv4, and nothing else (RFC 1035, 4.1).
            let found = question.starts_with(b"\x07outside\x04test\0\0\x01");
            let counts = [0x81, 0x80, 0, 1, 0, u8::from(found), 0, 0, 0, 0];
            let mut answer = [&bytes[..2], &counts, &question[..end]].concat();
            if found {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 198, 51, 100, 1]);
            }
            socket.send_to(&answer, peer).unwrap();
        }
    });
}

fn get(at: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&at.parse().unwrap(), Duration::from_secs(20))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /page HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

#[test]
fn with_nothing_said_the_guest_reaches_the_world_and_only_forwarded_ports_reach_it() {
    if default_guest(&Options::default()).is_none() {
        return;
    }
    let Some(world) = World::new("user-network") else { return };
    world.outside.inside(|| {
        serve_pages("[::]:8000");
        serve_names("198.51.100.1:53");
    });
    world.host.inside(|| {
        serve_pages("[::]:8001");
        serve_pages("127.0.0.1:8002");
    });
    let (vm, keyboard) = world.start(&["--forward", "0.0.0.0:8080:80", "--forward", "8081:80"]);
    world.guest("until ip route | grep -q default && [ -s /etc/resolv.conf ]; do sleep 0.1; done").expect(0);

    // The world sees the host, by addresses of both kinds, and by a name.
    assert_eq!(world.page("198.51.100.1:8000"), "198.51.100.2");
    world.guest("until ip -6 route | grep -q ^default; do sleep 0.1; done").expect(0);
    assert_eq!(world.page("[2001:db8::1]:8000"), "2001:db8::2");
    assert_eq!(world.page("outside.test:8000"), "198.51.100.2");
    world.guest("ping -c 1 -W 20 198.51.100.1 && ping -c 1 -W 20 10.0.2.2").expect(0);
    // The host is reached as from any machine beside it, but not what it keeps to itself.
    assert_eq!(world.page("198.51.100.2:8001"), "198.51.100.2");
    for closed in ["10.0.2.2:8002", "198.51.100.2:8002", "198.51.100.1:9"] {
        let done = world.guest(&format!("wget -qO- http://{closed}/")).expect(1);
        assert!(done.err.contains("refused"), "{closed}: {}", done.err);
    }

    world.guest("mkdir /tmp/www && echo from the guest >/tmp/www/page && httpd -p 80 -h /tmp/www").expect(0);
    let outside = world.outside.inside(|| ["198.51.100.2:8080", "198.51.100.2:8081"].map(get));
    assert!(outside[0].as_ref().is_ok_and(|page| page.ends_with("from the guest\n")), "{outside:?}");
    assert!(outside[1].is_err(), "{outside:?}");
    let inside = world.host.inside(|| get("127.0.0.1:8081"));
    assert!(inside.as_ref().is_ok_and(|page| page.ends_with("from the guest\n")), "{inside:?}");
    drop(keyboard);
    let mut command = world.lodge();
    start_with(command.args(["stop", "one", "--force"]), "").wait(PATIENCE).expect(0);
    vm.wait(PATIENCE).expect(130);
}

#[test]
fn the_host_s_loopback_is_the_gateway_for_those_who_may() {
    if default_guest(&Options::default()).is_none() {
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    serve_pages(&format!("127.0.0.1:{port}"));
    let script = format!(
        "lodge.exec=\"while ! ip route | grep -q default; do sleep 0.1; done; \
         wget -qO- http://10.0.9.2:{port}/; cat /sys/class/net/eth0/address\""
    );
    let network = "user,net=10.0.9.0/24,mac=52:4c:00:00:00:09";
    let args = ["run", "--engine", "translate", "--host-access", "--network", network, "--cmdline", &script];
    let done = start(&args, "").wait(PATIENCE).expect(0);
    assert!(done.text().contains("127.0.0.1\n52:4c:00:00:00:09\n"), "{}", done.text());

    let script = "lodge.exec=\"ls /sys/class/net\"";
    let args = ["run", "--engine", "translate", "--network", "none", "--cmdline", script];
    let done = start(&args, "").wait(PATIENCE).expect(0);
    assert!(!done.text().contains("eth0"), "{}", done.text());
}

#[test]
fn what_cannot_be_is_said_before_anything_starts() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let forward = format!("{}:80", taken.local_addr().unwrap().port());
    let cases: [(&[&str], i32, &str); 4] = [
        (&["--network", "none", "--forward", "8080:80"], 2, "leave --network none away"),
        (&["--network", "none", "--network", "user"], 2, "there is no other"),
        (&["--network", "user,model=ne2000"], 2, "virtio and e1000"),
        (&["--forward", &forward], 4, "choose another port"),
    ];
    for (flags, code, text) in cases {
        // A kernel that is none: it is not looked at before.
        let scratch = Scratch::new("network-errors");
        let kernel = scratch.file("kernel", &[0; 4096]);
        let args = [&["run", "--kernel", kernel.to_str().unwrap()], flags].concat();
        let done = start(&args, "").wait(PATIENCE).expect(code);
        assert!(done.err.contains(text), "{flags:?}: {}", done.err);
    }
}
