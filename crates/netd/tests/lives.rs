//! What stays and what goes: when a VM ends, when the helper is killed, when somebody clears the firewall, when a step fails; and who may.

mod world;

use std::fs;

use netctl::{Answer, Attach, Client, Direct, Error, Forward, Network, Protocol, Request, Target};
use world::{Vm, World, card, network};

#[test]
fn vm() {
    world::vm();
}

const LINK: &str = "ip link add e0 type veth peer name e1; ip link set e0 up; ip link set e1 up";

fn direct() -> Target {
    Target::Direct { link: "e0".into(), mode: Direct::Bridge, host_access: false }
}

fn port(listen: &str, port: u16) -> Forward {
    Forward { protocol: Protocol::Tcp, listen: listen.parse().unwrap(), port }
}

fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result {
        Err(Error::Refused { why, help }) => format!("{why}\n{}", help.unwrap_or_default()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_lives_is_adopted_and_what_does_not_is_removed() {
    let Some(mut world) = World::new(LINK) else { return };
    world.host.run("nft add table inet other; nft add chain inet other kept");
    let Ok(Answer::Done(_)) = world.ask(&Request::Create(Box::new(Network::new("default")))) else {
        panic!()
    };
    let nothing = world.traces();

    let forwards = vec![port("0.0.0.0:8080", 80)];
    let stays = Vm::start(&world, &Attach { forwards, ..card(1, network("default")) }, 0);
    let goes = Vm::start(&world, &card(2, direct()), 0);
    let goes_too = Vm::start(&world, &card(3, network("default")), 0);
    assert!(world.traces().contains("dnat") && world.traces().contains(&goes.attached().interface));
    world.kill();
    drop((goes, goes_too));
    // Nothing of what runs was harmed.
    assert!(world.traces().contains(&stays.attached().interface));
    world.start();

    let Ok(Answer::Networks(networks)) = world.ask(&Request::List) else { panic!() };
    let cards: Vec<_> = networks.iter().flat_map(|network| &network.cards).collect();
    assert_eq!(cards.len(), 1);
    assert_eq!((&cards[0].vm, &cards[0].interface), (&"vm1".into(), &stays.attached().interface));
    let traces = world.traces();
    assert!(
        !traces.contains("lmvt") && !traces.contains("ltap1") && traces.contains("lodge-ltap0"),
        "{traces}"
    );
    assert!(traces.contains("dnat") && traces.contains("chain kept"));
    // It still is known to be who it was: its port is taken, and its address.
    let forwards = vec![port("0.0.0.0:8080", 81)];
    let asked =
        world.client().ask(&Request::Attach(Box::new(Attach { forwards, ..card(4, network("default")) })));
    assert!(refused(asked).contains("leads to the VM vm1"));
    let (next, _descriptor) = world.attach(card(4, network("default")));
    assert_ne!(next.address, stays.attached().address);
    world.ask(&Request::Detach { interface: next.interface }).unwrap();

    drop(stays);
    // The lock is all that is left.
    let left = || fs::read_dir(world.path("run")).unwrap().count();
    world.until("all of the VM is gone", || world.traces() == nothing && left() == 1);
    // The same card gets the same address again.
    let (again, _descriptor) = world.attach(card(1, network("default")));
    assert_eq!(again.address.unwrap().to_string(), "192.168.122.2");
    // Told to end, it leaves what runs alone, too.
    let before = world.traces();
    world.terminate();
    assert_eq!(world.traces(), before);
    world.start();
    assert_eq!(world.traces(), before);
    // There is one helper.
    assert!(!world.helper().output().unwrap().status.success());
}

#[test]
fn rules_that_somebody_removes_come_back() {
    let Some(world) = World::new("nft add table ip other") else { return };
    let (one, _descriptor) = world.attach(card(1, network("default")));
    let rules = || world.rules();
    let before = rules();
    world.host.run("nft flush ruleset");
    let own = before.replace("table ip other {\n}\n", "");
    world.until("they come back", || rules() == own);
    // A firewall that starts anew sets its own, and clears ours.
    world.host.run("nft 'flush ruleset; table ip other { chain new { counter packets 5 bytes 5; }; }'");
    world
        .until("they come back again", || rules().contains("masquerade") && rules().contains(&one.interface));
    world.host.run(&format!("nft flush chain netdev lodge-{} own-arp", one.interface));
    world.until("one chain comes back", || world.text("nft list ruleset").contains("arp saddr ip !="));
    assert!(world.text("nft list table ip other").contains("packets 5 bytes 5"));
}

#[test]
fn a_step_that_fails_leaves_nothing() {
    let Some(world) = World::new(&format!("{LINK}; ip link add br7 type bridge")) else { return };
    let nothing = world.traces();
    let ask = |attach: Attach| refused(world.client().ask(&Request::Attach(Box::new(attach))));
    // Without its entry in /sys the device of a MacVTap is not found, when all else has been done.
    world.host.run("mount -t tmpfs none /sys");
    let why = ask(card(1, direct()));
    assert!(why.contains("/sys"), "{why}");
    world.host.run("umount /sys");
    assert_eq!(world.traces(), nothing);
    // Somebody else serves names on all addresses.
    let _names = world.host.inside(|| std::net::TcpListener::bind("[::]:53").unwrap());
    let why = ask(card(1, network("default")));
    assert!(why.contains("DHCP and names"), "{why}");
    assert_eq!(world.traces(), nothing);
    assert_eq!(fs::read_dir(world.path("state")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(world.path("run")).unwrap().count(), 1);
    // What cannot be is refused before anything is done.
    let bridge = |name: &str| Target::Bridge(name.into());
    assert!(ask(card(1, bridge("e0"))).contains("no bridge"));
    assert!(ask(card(1, network("lab"))).contains("lodge net create lab"));
    assert!(ask(Attach { vm: "a b".into(), ..card(1, bridge("br7")) }).contains("no name"));
    assert!(
        ask(Attach { forwards: vec![port("0.0.0.0:8080", 1)], ..card(1, bridge("br7")) })
            .contains("of its own")
    );
    assert!(ask(Attach { queues: 9, ..card(1, bridge("br7")) }).contains("queues"));
    let others = port("203.0.113.9:8443", 80);
    assert!(
        ask(Attach { forwards: vec![others], ..card(1, network("default")) }).contains("no address of this")
    );
    assert_eq!(world.traces(), nothing);
}

#[test]
fn a_card_that_takes_another_s_address_is_disconnected() {
    let Some(world) = World::new(LINK) else { return };
    for to in [network("default"), direct()] {
        let (attached, _descriptor) = world.attach(card(1, to));
        // Who has the descriptor needs no right for that (SIOCSIFHWADDR).
        world.host.run(&format!("ip link set {} address 52:4c:00:00:00:02", attached.interface));
        world.until("the link is gone", || !world.traces().contains(&attached.interface));
    }
}

#[test]
fn who_may_and_who_may_not() {
    let Some(world) = World::new("ip link add br7 type bridge") else { return };
    let nobody = 65534;
    let try_it = |attach: &Attach| Vm::start(&world, attach, nobody).1.clone();
    let why = try_it(&card(1, network("default"))).unwrap_err();
    assert!(why.contains("may not") && why.contains("usermod -aG lodge nobody"), "{why}");
    assert!(!world.traces().contains("virbr0"));

    // Being in the group is enough; the system's file of groups is that of this host only.
    fs::write(world.path("group"), "lodge:x:4711:nobody\n").unwrap();
    world.host.run(&format!("mount --bind {} /etc/group", world.path("group").display()));
    let attached = try_it(&card(1, network("default"))).unwrap();
    assert_eq!(attached.address.unwrap().to_string(), "192.168.122.2");
    assert!(
        try_it(&Attach { spoofing: true, ..card(1, network("default")) })
            .unwrap_err()
            .contains("spoofing = true")
    );
    let low = Attach { forwards: vec![port("0.0.0.0:80", 80)], ..card(1, network("default")) };
    assert!(try_it(&low).unwrap_err().contains("root's"));

    fs::write(
        world.path("netd.toml"),
        "[[allow]]\nuser = \"nobody\"\nattach = [\"bridge:*\"]\nspoofing = true\n",
    )
    .unwrap();
    assert!(try_it(&Attach { spoofing: true, ..card(1, Target::Bridge("br7".into())) }).is_ok());
    assert!(try_it(&card(1, network("default"))).unwrap_err().contains("netd.toml"));

    // Names and cards are those of who had them first, even while they are off. Root may all.
    let allow = |user| format!("[[allow]]\nuser = \"{user}\"\nattach = [\"*\"]\n");
    fs::write(world.path("netd.toml"), allow("nobody") + &allow("4712")).unwrap();
    let other = |attach: &Attach| Vm::start(&world, attach, 4712).1.clone();
    let why = other(&card(1, network("default"))).unwrap_err();
    assert!(why.contains("another user's VM, vm1") && why.contains("mac="), "{why}");
    let namesake = other(&Attach { vm: "vm1".into(), ..card(7, network("default")) }).unwrap();
    assert!(namesake.notes[0].contains("a VM called vm1") && namesake.notes[0].contains("--name"));
    assert!(try_it(&card(1, network("default"))).is_ok());
    let Ok(Answer::Leases(leases)) = world.ask(&Request::Leases { network: "default".into() }) else {
        panic!()
    };
    assert_eq!(leases.iter().map(|lease| lease.owner).collect::<Vec<_>>(), [Some(nobody), Some(4712)]);

    // Others' cards are not theirs to disconnect.
    let (mine, _descriptor) = world.attach(card(2, network("default")));
    let other = Vm::start(&world, &card(3, Target::Bridge("br7".into())), nobody);
    assert!(world.ask(&Request::Detach { interface: other.attached().interface.clone() }).is_ok());
    assert!(world.traces().contains(&mine.interface));
    assert!(Client::connect(&world.path("nowhere")).is_err());
}
