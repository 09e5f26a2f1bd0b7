//! What keeps networks from working: each is made, found, and mended by the command that the helper names.

mod world;

use std::net::{TcpStream, UdpSocket};
use std::process::Stdio;
use std::time::Duration;

use netctl::{Answer, Bridge, Network, Problem, Request};
use world::{Guest, Host, World, card, network, serve};

/// A host with a machine outside that serves, and a network with a guest.
struct Bed {
    world: World,
    guest: Guest,
    _outside: Host,
}

impl Bed {
    fn new() -> Option<Self> {
        let outside = Host::new()?;
        let world = World::new(&format!(
            "ip link add out type veth peer name in netns {}; ip addr add 198.51.100.2/24 dev out; ip link set out up
             ip route add default via 198.51.100.1
             mount -t tmpfs none /mnt; echo nameserver 198.51.100.1 > /mnt/resolv; touch /mnt/empty
             mount --bind /mnt/resolv /etc/resolv.conf",
            outside.pid()
        ))?;
        outside.run("ip addr add 198.51.100.1/24 dev in; ip link set in up");
        serve(&outside, 8000);
        let guest = Guest::new(&world, card(1, network("default")));
        let address = guest.attached.address.unwrap();
        guest.host.run(&format!("ip addr add {address}/24 dev eth0; ip route add default via 192.168.122.1"));
        let bed = Self { world, guest, _outside: outside };
        assert_eq!(bed.problems(), Vec::<Problem>::new());
        assert!(bed.reaches_outside() && bed.finds_names());
        Some(bed)
    }

    fn problems(&self) -> Vec<Problem> {
        match self.world.ask(&Request::Check { network: None }) {
            Ok(Answer::Problems(problems)) => problems,
            other => panic!("{other:?}"),
        }
    }

    fn reaches_outside(&self) -> bool {
        let address = "198.51.100.1:8000".parse().unwrap();
        self.guest.host.inside(|| TcpStream::connect_timeout(&address, Duration::from_secs(2)).is_ok())
    }

    /// Asks the network's name server for the guest itself.
    fn finds_names(&self) -> bool {
        self.guest.host.inside(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            let question = b"\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03vm1\x00\x00\x01\x00\x01";
            let mut bytes = [0; 512];
            (0..3).any(|_| {
                socket.send_to(question, "192.168.122.1:53").is_ok() && socket.recv(&mut bytes).is_ok()
            })
        })
    }

    /// The problems all are that one, and the commands are run.
    #[track_caller]
    fn mend(&self, what: &str) {
        let problems = self.problems();
        assert!(!problems.is_empty(), "{what} is not found");
        for problem in problems {
            assert!(problem.what.contains(what), "{problem:?}, not {what:?}");
            let command = problem.command.unwrap_or_else(|| panic!("no command: {}", problem.what));
            for command in command.split(" && ") {
                let words: Vec<&str> = command.split(' ').collect();
                let request = match words[..] {
                    ["lodge", "net", "start", name] => Request::Start { network: name.into() },
                    ["lodge", "net", "rm", name] => Request::Remove { network: name.into(), force: false },
                    ["lodge", "net", "create", name] => Request::Create(Box::new(Network::new(name))),
                    _ => {
                        self.world.host.run(command);
                        continue;
                    }
                };
                self.world.ask(&request).unwrap();
            }
        }
        assert_eq!(self.problems(), Vec::<Problem>::new(), "{what} is mended");
    }
}

#[test]
fn vm() {
    world::vm();
}

#[test]
fn what_is_found_is_mended() {
    let Some(bed) = Bed::new() else { return };
    let host = &bed.world.host;
    println!("forwarding");
    host.run("echo 0 > /proc/sys/net/ipv4/ip_forward");
    assert!(!bed.reaches_outside());
    bed.mend("forwards no packets of IPv4");
    assert!(bed.reaches_outside());
    host.run("echo 0 > /proc/sys/net/ipv6/conf/all/forwarding");
    bed.mend("forwards no packets of IPv6");

    println!("Docker's policy");
    host.run(
        "nft 'table ip filter { chain DOCKER-USER { return; }; chain FORWARD { type filter hook forward priority 0; policy drop;
           jump DOCKER-USER; oifname docker0 ct state established,related accept; iifname docker0 accept; }; }'",
    );
    assert!(!bed.reaches_outside());
    bed.mend("Docker's FORWARD policy");
    assert!(bed.reaches_outside());
    host.run("nft delete table ip filter");

    if std::fs::read_to_string("/proc/sys/net/bridge/bridge-nf-call-iptables").is_ok_and(|text| text == "1\n")
    {
        println!("frames that stay on a bridge, and are forwarded packets to the firewall");
        host.run(
            "ip link add b1 type veth peer name b2 && ip link set b1 up && ip addr add 192.0.2.1/24 dev b1",
        );
        let bridge = Bridge { name: "br9".into(), ports: vec!["b1".into()] };
        bed.world.ask(&Request::CreateBridge { bridge, force: false }).unwrap();
        host.run(
            "nft 'table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; iifname virbr0 accept; oifname virbr0 accept; }; }'",
        );
        bed.mend("drops what guests send over the bridge br9");
        host.run("nft delete table ip filter");
        bed.world.ask(&Request::RemoveBridge { name: "br9".into(), force: false }).unwrap();
        host.run("ip link del b1");
    }

    println!("an administrator's own");
    host.run(
        "nft 'table inet filter { set lan { type ipv4_addr; elements = { 10.0.0.1 }; }
           chain forward { type filter hook forward priority 0; ct state vmap { established : accept, related : accept, invalid : drop };
             iifname { \"eth*\", \"lan0\" } accept; ip saddr 10.0.0.0/8 tcp dport 22 accept; reject with icmpx admin-prohibited; }
           chain input { type filter hook input priority 0; policy drop; ct state { established, related } accept
             iif lo accept; tcp dport { 22, 80-90 } accept; udp dport 67 ip saddr 10.0.0.0/8 accept; }; }'",
    );
    assert!(!bed.reaches_outside() && !bed.finds_names());
    bed.mend("of the table inet filter drops what guests");
    assert!(bed.reaches_outside() && bed.finds_names());
    host.run("nft delete table inet filter");

    println!("the bridge");
    host.run("ip link set virbr0 down");
    bed.mend("switched off");
    host.run("ip link del virbr0");
    bed.mend("is gone");

    println!("name servers, devices");
    host.run("mount --bind /mnt/empty /etc/resolv.conf");
    bed.mend("names no name server");
    host.run("mount -t tmpfs none /dev/net");
    let problems = bed.problems();
    assert!(matches!(&problems[..], [one] if one.command.as_deref() == Some("modprobe tun")), "{problems:?}");
    host.run("umount /dev/net");
    assert_eq!(bed.problems(), Vec::<Problem>::new());
}

/// What dockerd sets for one container with a port, up to version 27.
const DOCKER: &str = "*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
";

/// The same since version 28.
const DOCKER28: &str = "*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-BRIDGE - [0:0]
:DOCKER-CT - [0:0]
:DOCKER-FORWARD - [0:0]
:DOCKER-INTERNAL - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A DOCKER ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER ! -i docker0 -o docker0 -j DROP
-A DOCKER-BRIDGE -o docker0 -j DOCKER
-A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-FORWARD -j DOCKER-CT
-A DOCKER-FORWARD -j DOCKER-INTERNAL
-A DOCKER-FORWARD -j DOCKER-BRIDGE
-A DOCKER-FORWARD -i docker0 -j ACCEPT
COMMIT
";

/// What an administrator's script might set.
const SCRIPT: &str = "*filter
:INPUT DROP [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:ours - [0:0]
-A INPUT -i lo -j ACCEPT
-A INPUT -m state --state RELATED,ESTABLISHED -m comment --comment \"the \\\"answers\\\" -j ACCEPT\" -j ACCEPT
-A INPUT -m addrtype --dst-type MULTICAST -j RETURN
-A INPUT -p tcp -m multiport --dports 22,80:90 -j ACCEPT
-A INPUT -m limit --limit 3/min -j LOG --log-prefix \"dropped: \"
-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -g ours
-A ours -i out -p tcp -m tcp --dport 443 -j RETURN
-A ours ! -i out -m comment --comment inside -j REJECT
COMMIT
";

/// Whether all of these programs are there, and start on the host.
fn have(host: &Host, programs: &[&str]) -> bool {
    let missing = programs.iter().find(|program| {
        let mut command = host.command("sh");
        !command.args(["-c", &format!("{program} >&2")]).stderr(Stdio::null()).status().unwrap().success()
    });
    missing.inspect(|program| println!("skipped: no {program}")).is_none()
}

#[test]
fn what_iptables_sets() {
    let Some(bed) = Bed::new() else { return };
    let host = &bed.world.host;
    for kind in ["nft", "legacy"] {
        let all = ["iptables", "ip6tables"].map(|program| format!("{program}-{kind}"));
        if !have(host, &all.each_ref().map(|program| format!("{program} -S")).each_ref().map(String::as_str))
        {
            continue;
        }
        let set = |rules: &str| {
            std::fs::write(bed.world.path("rules"), rules).unwrap();
            for program in &all {
                host.run(&format!("{program}-restore {}", bed.world.path("rules").display()));
            }
        };
        for rules in [DOCKER, DOCKER28] {
            set(rules);
            assert!(!bed.reaches_outside());
            bed.mend("Docker's FORWARD policy");
            assert!(bed.reaches_outside() && bed.finds_names());
        }
        set(SCRIPT);
        assert!(!bed.reaches_outside() && !bed.finds_names());
        bed.mend(if kind == "nft" { "of the table ip" } else { "filter (iptables-legacy) drops what" });
        assert!(bed.reaches_outside() && bed.finds_names());
        set("*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n");
        assert_eq!(bed.problems(), Vec::<Problem>::new());
    }
    if have(host, &["iptables-legacy -S"]) {
        println!("rules that cannot be read");
        host.run("mkdir /mnt/bin; cp -a /usr/sbin/nft /mnt/bin; mount --bind /mnt/bin /usr/sbin");
        let problems = bed.problems();
        assert!(problems.iter().all(|one| one.what.contains("iptables-legacy is missing")), "{problems:?}");
        assert!(!problems.is_empty());
        host.run("umount /usr/sbin");
    }
}

#[test]
fn what_ufw_sets() {
    let Some(bed) = Bed::new() else { return };
    let host = &bed.world.host;
    if !have(host, &["ufw version"]) {
        return;
    }
    // It writes there.
    host.run(
        "mount -t tmpfs none /run; cp -a /etc/ufw /run/etc; cp -a /etc/default /run/default
         mount --bind /run/etc /etc/ufw; mount --bind /run/default /etc/default",
    );
    host.run("ufw --force enable && ufw default deny routed");
    assert!(!bed.reaches_outside() && !bed.finds_names());
    bed.mend("ufw");
    assert!(bed.reaches_outside() && bed.finds_names());
    host.run("ufw disable");
    assert_eq!(bed.problems(), Vec::<Problem>::new());
}

#[test]
fn what_firewalld_sets() {
    let Some(bed) = Bed::new() else { return };
    let host = &bed.world.host;
    if !have(host, &["dbus-daemon --version", "firewall-cmd --help"]) {
        return;
    }
    host.run("mount -t tmpfs none /run; mkdir /run/dbus; dbus-daemon --system --fork");
    host.run("mount -t tmpfs none /etc/firewalld");
    let mut daemon = host.command("firewalld").arg("--nofork").arg("--nopid").spawn().unwrap();
    bed.world.until("firewalld runs", || {
        let mut state = host.command("firewall-cmd");
        state.arg("--state").stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
    });
    assert!(!bed.reaches_outside() && !bed.finds_names());
    bed.mend("firewalld drops");
    assert!(bed.reaches_outside() && bed.finds_names());
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[test]
fn ranges_and_ports_of_others() {
    let Some(Bed { mut world, guest, _outside }) = Bed::new() else { return };
    world.ask(&Request::Detach { interface: guest.attached.interface.clone() }).unwrap();
    // The name server of somebody who takes all addresses, at the host's start.
    world.kill();
    world.host.run("ip link del virbr0");
    let other = world.host.inside(|| UdpSocket::bind("0.0.0.0:53").unwrap());
    world.start();
    let bed = Bed { world, guest, _outside };
    let problems = bed.problems();
    assert!(
        matches!(&problems[..], [one] if one.what.contains("another program has port 53/udp")),
        "{problems:?}"
    );
    drop(other);
    bed.mend("the network default does not run");

    bed.world.host.run("ip addr add 192.168.122.77/25 dev out");
    bed.mend("192.168.122.0/24 is in use already: 192.168.122.0/25 by out");
    let unknown = bed.world.ask(&Request::Check { network: Some("nothing".into()) });
    assert!(unknown.is_err());
}
