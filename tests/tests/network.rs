//! Who reaches whom, with stock kernels as guests and network namespaces as the host and a machine beside it.

use std::net::TcpListener;

use images::Options;
use lodge_tests::world::{Capture, PATIENCE, World, get, serve_names, serve_pages};
use lodge_tests::{Scratch, default_guest, start};

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
    let capture = Capture::start(&world.outside);
    let guest = world.start("one", &["--forward", "0.0.0.0:8080:80", "--forward", "8081:80"]);
    guest.run("until ip route | grep -q default && [ -s /etc/resolv.conf ]; do sleep 0.1; done").expect(0);

    // The world sees the host, by addresses of both kinds, and by a name.
    assert_eq!(guest.page("198.51.100.1:8000"), "198.51.100.2");
    guest.run("until ip -6 route | grep -q ^default; do sleep 0.1; done").expect(0);
    assert_eq!(guest.page("[2001:db8::1]:8000"), "2001:db8::2");
    assert_eq!(guest.page("outside.test:8000"), "198.51.100.2");
    guest.run("ping -c 1 -W 20 198.51.100.1 && ping -c 1 -W 20 10.0.2.2").expect(0);
    // The host is reached as from any machine beside it, but not what it keeps to itself.
    assert_eq!(guest.page("198.51.100.2:8001"), "198.51.100.2");
    for closed in ["10.0.2.2:8002", "198.51.100.2:8002", "198.51.100.1:9"] {
        let done = guest.run(&format!("wget -qO- http://{closed}/")).expect(1);
        assert!(done.err.contains("refused"), "{closed}: {}", done.err);
    }

    guest.serve("from the guest");
    let outside = world.outside.inside(|| ["198.51.100.2:8080", "198.51.100.2:8081"].map(get));
    assert!(outside[0].as_ref().is_ok_and(|page| page.ends_with("from the guest\n")), "{outside:?}");
    assert!(outside[1].is_err(), "{outside:?}");
    let inside = world.host.inside(|| get("127.0.0.1:8081"));
    assert!(inside.as_ref().is_ok_and(|page| page.ends_with("from the guest\n")), "{inside:?}");
    // Nobody else was ever seen there than the host and the machine itself.
    let all = ["198.51.100.1", "198.51.100.2", "2001:db8::1", "2001:db8::2"];
    assert_eq!(capture.seen(), all.map(|address: &str| address.parse::<std::net::IpAddr>().unwrap()));
    guest.stop();
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
