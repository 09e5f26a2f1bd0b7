use std::time::Duration;

use super::*;
use crate::testing::until;
use crate::virtio::testing::Driver;

const SOON: Duration = Duration::from_secs(20);

fn message(port: u32, event: u16, value: u16) -> Vec<u8> {
    [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// Offers buffers for the messages of the device, and gives the next one.
fn hear(d: &mut Driver) -> Vec<u8> {
    d.call(CONTROL_RECEIVE, &[], 64)
}

fn say(d: &mut Driver, port: u32, event: u16, value: u16) {
    d.call(CONTROL_TRANSMIT, &message(port, event, value), 0);
}

#[test]
fn a_driver_of_one_port_has_a_console() {
    let port = Port::new("console");
    port.resize(80, 25);
    let mut d = Driver::new(Arc::new(Console::new(std::slice::from_ref(&port))), F_SIZE);
    assert_eq!((d.config(0, 2), d.config(2, 2), d.config(4, 4)), (80, 25, 1));
    assert!(port.is_open(), "it cannot say so");
    d.call(1, b"from the guest", 0);
    let (machine, mut bytes) = (port.machine(), Vec::new());
    assert!(port.read(machine, &mut bytes));
    assert_eq!(bytes, b"from the guest");
    assert_eq!(port.write(b"to the guest", SOON), 12);
    assert_eq!(d.call(0, &[], 5), b"to th");
    assert_eq!(d.call(0, &[], 50), b"e guest");
    port.resize(132, 50);
    assert_eq!(d.config(0, 4), 50 << 16 | 132);
    assert_eq!(d.read(0x1000, 1) & 2, 2, "the configuration's interrupt");
    // Its reader hears of its end, after what was said before.
    d.call(1, b"last words", 0);
    drop(d);
    assert!(port.read(machine, &mut bytes));
    assert_eq!(bytes, b"last words");
    assert!(!port.read(machine, &mut bytes) && !port.is_open());
}

#[test]
fn ports_have_names_and_open_and_close() {
    let ports = [Port::new("console"), Port::new("org.lodge.agent")];
    let device = Console::new(&ports);
    assert_eq!(device.queues().len(), 6);
    let mut d = Driver::new(Arc::new(device), F_SIZE | F_MULTIPORT);
    assert!(!ports[0].is_open());
    say(&mut d, 0, event::DEVICE_READY, 1);
    assert_eq!([hear(&mut d), hear(&mut d)], [0, 1].map(|n| message(n, event::DEVICE_ADD, 1)));
    say(&mut d, 0, event::PORT_READY, 1);
    assert_eq!(hear(&mut d), message(0, event::CONSOLE_PORT, 1));
    assert_eq!(hear(&mut d), [message(0, event::RESIZE, 0), vec![0; 4]].concat());
    assert_eq!(hear(&mut d), message(0, event::PORT_OPEN, 1));
    say(&mut d, 1, event::PORT_READY, 1);
    let name = [message(1, event::PORT_NAME, 1), b"org.lodge.agent".to_vec()].concat();
    assert_eq!(hear(&mut d), name);

    // What comes before the guest has opened it waits for that.
    assert_eq!(ports[1].write(b"hello", SOON), 5);
    ports[1].set_open(true);
    assert_eq!(hear(&mut d), message(1, event::PORT_OPEN, 1));
    d.offer(4, &[], 64);
    assert_eq!(d.collect(4), None);
    say(&mut d, 1, event::PORT_OPEN, 1);
    assert_eq!(d.wait(4), b"hello");
    assert!(ports[1].is_open() && !ports[0].is_open());
    d.call(5, b"and back", 0);
    let mut bytes = Vec::new();
    assert!(ports[1].read(ports[1].machine(), &mut bytes));
    assert_eq!(bytes, b"and back");
    ports[0].resize(0x1234, 2);
    assert_eq!(hear(&mut d), [message(0, event::RESIZE, 0), vec![0x34, 0x12, 2, 0]].concat());
    // A port that there is not, and an event that there is not.
    say(&mut d, 77, event::PORT_READY, 1);
    say(&mut d, 1, 99, 1);
    d.start(F_MULTIPORT);
    assert!(!ports[1].is_open(), "closed by the reset");
}

#[test]
fn a_slow_reader_holds_the_guest_and_loses_nothing() {
    let port = Port::new("console");
    let mut d = Driver::new(Arc::new(Console::new(std::slice::from_ref(&port))), 0);
    let (mut sent, mut came) = (0u32, Vec::new());
    let chunk = |n: u32| vec![n as u8; 0x1000];
    while sent < 16 {
        d.call(1, &chunk(sent), 0);
        sent += 1;
    }
    d.offer(1, &chunk(sent), 0);
    assert_eq!(d.collect(1), None, "as much waits as may");
    let mut bytes = Vec::new();
    while came.len() < 17 * 0x1000 {
        assert!(port.read(port.machine(), &mut bytes));
        came.extend_from_slice(&bytes);
    }
    assert!(came.chunks(0x1000).zip(0..17).all(|(piece, n)| piece == chunk(n)));
    d.wait(1);
}

#[test]
fn who_asks_and_does_not_listen_is_broken() {
    let ports: Vec<_> = (0..MOST_PORTS).map(|n| Port::new(&n.to_string())).collect();
    let mut d = Driver::new(Arc::new(Console::new(&ports)), F_MULTIPORT);
    for _ in 0..MOST_MESSAGES / MOST_PORTS {
        say(&mut d, 0, event::DEVICE_READY, 1);
    }
    d.offer(CONTROL_TRANSMIT, &message(0, event::DEVICE_READY, 1), 0);
    until("the device says that it needs a reset", || d.needs_reset());
    d.start(F_MULTIPORT);
    d.offer(CONTROL_TRANSMIT, &[0; 7], 0);
    until("half a message needs a reset", || d.needs_reset());
}

#[test]
fn a_machine_may_go_while_its_owner_types() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let port = Port::new("console");
    let done = Arc::new(AtomicBool::new(false));
    let (typed, end) = (port.clone(), done.clone());
    let typing = std::thread::spawn(move || {
        while !end.load(Ordering::SeqCst) {
            typed.write(b"a", Duration::ZERO);
            typed.resize(80, 25);
        }
    });
    for _ in 0..100 {
        drop(Driver::new(Arc::new(Console::new(std::slice::from_ref(&port))), F_MULTIPORT));
    }
    done.store(true, Ordering::SeqCst);
    typing.join().unwrap();
}
