//! Networks: declared, changed, stopped and removed; and what is not the helper's is left alone.

mod world;

use std::fs;

use netctl::{Answer, Attach, Declared, Direct, Error, Host, Mode, Network, Request, Status, Target};
use world::{Vm, World, card, mac, network};

#[test]
fn vm() {
    world::vm();
}

fn done(world: &World, request: Request) -> Vec<String> {
    match world.ask(&request) {
        Ok(Answer::Done(notes)) => notes,
        other => panic!("{other:?}"),
    }
}

fn refused(world: &World, request: Request) -> String {
    match world.ask(&request) {
        Err(Error::Refused { why, help }) => format!("{why}\n{}", help.unwrap_or_default()),
        other => panic!("{other:?}"),
    }
}

fn status(world: &World) -> Vec<Status> {
    match world.ask(&Request::List) {
        Ok(Answer::Networks(networks)) => networks,
        other => panic!("{other:?}"),
    }
}

fn apply(network: &Network) -> Request {
    Request::Apply(Box::new(Declared { networks: vec![network.clone()], bridges: Vec::new() }))
}

#[test]
fn networks_come_change_and_go() {
    let Some(mut world) = World::new(
        "ip link add virbr0 type bridge; ip link add e0 type veth peer name e1; ip link set e0 up; \
         ip addr add 192.168.122.7/24 dev e0",
    ) else {
        return;
    };
    let nothing = world.traces();
    // Its range and its link's name are somebody else's: it takes the next, and says so.
    let (one, descriptor) = world.attach(card(1, network("default")));
    assert!(one.notes[0].contains("e0") && one.notes[0].contains("192.168.123.0/24"), "{:?}", one.notes);
    assert_eq!(status(&world)[0].device, "virbr1");
    let create = |network: Network| Request::Create(Box::new(network));
    let taken = Network { ipv4: "192.168.123.0/25".parse().ok(), ..Network::new("lab") };
    assert!(refused(&world, create(taken)).contains("the network default"));
    let taken = Network { device: Some("virbr0".into()), ..Network::new("lab") };
    assert!(refused(&world, create(taken)).contains("virbr0"));
    assert!(refused(&world, create(Network::new("default"))).contains("already"));

    // What is declared twice changes nothing; what is left open stays as it is.
    let host = Host { mac: mac(2), address: "10.77.0.9".parse().unwrap(), name: Some("printer".into()) };
    let mut lab = Network { ipv4: "10.77.0.0/24".parse().ok(), hosts: vec![host], ..Network::new("lab") };
    done(&world, apply(&lab));
    let before = world.traces();
    done(&world, apply(&lab));
    assert_eq!(world.traces(), before);
    let (two, _two) = world.attach(card(2, network("lab")));
    assert_eq!(two.address.unwrap().to_string(), "10.77.0.9");
    // Its kind changes under its cards, but not its range.
    assert!(before.contains("ip saddr 10.77.0.0/24"));
    lab.mode = Mode::Isolated;
    done(&world, apply(&lab));
    assert!(!world.traces().contains("ip saddr 10.77.0.0/24") && world.traces().contains(&two.interface));
    let moved = Network { ipv4: "10.78.0.0/24".parse().ok(), hosts: Vec::new(), ..lab.clone() };
    assert!(refused(&world, apply(&moved)).contains("vm2"));

    // Stopping needs force where somebody is connected, and what is stopped stays so until it is used.
    let stop = |force| Request::Stop { network: "lab".into(), force };
    assert!(refused(&world, stop(false)).contains("vm2"));
    done(&world, stop(true));
    assert!(!world.traces().contains(&two.interface) && !world.traces().contains("10.77.0.1"));
    let again = Attach { again: true, ..card(2, network("lab")) };
    assert!(refused(&world, Request::Attach(Box::new(again))).contains("lodge net start lab"));
    done(&world, apply(&moved));
    assert!(!world.traces().contains("10.78.0.1"));
    done(&world, Request::Start { network: "lab".into() });
    assert!(world.traces().contains("10.78.0.1/24"));

    // All of it is found again, and goes without a trace.
    let all = (world.traces(), status(&world));
    world.kill();
    world.start();
    assert_eq!((world.traces(), status(&world)), all);
    drop(descriptor);
    for name in ["default", "lab"] {
        done(&world, Request::Remove { network: name.into(), force: true });
    }
    assert_eq!(world.traces(), nothing);
    assert_eq!(fs::read_dir(world.path("state")).unwrap().count(), 0);
    assert!(refused(&world, Request::Leases { network: "lab".into() }).contains("no network lab"));
}

#[test]
fn a_card_ends_with_its_process_even_if_somebody_holds_its_descriptor() {
    let Some(world) = World::new("ip link add e0 type veth peer name e1; ip link set e0 up") else { return };
    let nothing = world.traces();
    let direct = |mode| Target::Direct { link: "e0".into(), mode, host_access: false };
    let address = world.text("cat /sys/class/net/e0/address");
    for mode in [Direct::Vepa, Direct::Private, Direct::Passthru] {
        let attach = Attach { queues: 4, ..card(1, direct(mode)) };
        let vm = Vm::start(&world, &attach, 0);
        let taken = world.ask(&Request::Attach(Box::new(card(2, direct(Direct::Passthru)))));
        assert!(taken.is_err(), "a link is shared, or one's alone");
        let held = hold(&vm);
        drop(vm);
        world.until("all is gone", || world.traces() == nothing);
        drop(held);
    }
    // Without a node for it in /dev one is made for a moment.
    world.host.run("mount -t tmpfs none /dev");
    let vm = Vm::start(&world, &card(1, direct(Direct::Bridge)), 0);
    assert_eq!(vm.attached().interface, "lmvt0");
    assert_eq!(
        fs::read_dir(world.path("run")).unwrap().count(),
        2,
        "the lock, and what is known of the card"
    );
    drop(vm);
    world.host.run("umount /dev");
    world.until("all is gone", || world.traces() == nothing);
    // It was the guest's for a while.
    assert_eq!(world.text("cat /sys/class/net/e0/address"), address);

    done(&world, Request::Create(Box::new(Network::new("default"))));
    let nothing = world.traces();
    let vm = Vm::start(&world, &card(1, network("default")), 0);
    let held = hold(&vm);
    drop(vm);
    world.until("the tap is gone", || world.traces() == nothing);
    drop(held);
}

/// Takes a copy of each descriptor of a VM's that is a device's.
fn hold(vm: &Vm) -> Vec<std::os::fd::OwnedFd> {
    use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
    let process = pidfd_open(Pid::from_child(&vm.0), PidfdFlags::empty()).unwrap();
    let numbers = fs::read_dir(format!("/proc/{}/fd", vm.0.id())).unwrap().flatten();
    let devices = numbers.filter(|entry| {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        target.starts_with("/dev/net") || target.to_string_lossy().starts_with("/dev/tap")
    });
    let held: Vec<_> = devices
        .map(|entry| {
            let number = entry.file_name().to_str().unwrap().parse().unwrap();
            pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).unwrap()
        })
        .collect();
    assert!(!held.is_empty());
    held
}
