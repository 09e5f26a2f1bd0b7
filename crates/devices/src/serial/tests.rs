use super::*;
use crate::testing::{batter, probe, through_json};
use std::sync::mpsc;

const SECOND: Duration = Duration::from_secs(10);

/// Collects output; blocks while the test holds the lock.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        lock(&self.0).extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn output_arrives_in_order() {
    let (irq, _) = probe();
    let sink = Sink::default();
    let serial = Serial::new(irq, Box::new(sink.clone()));
    let text: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
    for &byte in &text {
        assert_ne!(serial.read(5, 1) & 0x20 | 1, 0);
        serial.write(0, 1, byte.into());
    }
    assert!(serial.drain(SECOND));
    assert!(*lock(&sink.0) == text);
}

#[test]
fn a_slow_terminal_makes_the_transmitter_busy_and_then_interrupts() {
    let (irq, pin) = probe();
    let sink = Sink::default();
    let serial = Serial::new(irq, Box::new(sink.clone()));
    serial.write(4, 1, 8);
    serial.write(1, 1, 2);
    assert!(pin.level());
    let held = lock(&sink.0);
    // One batch is in the writer's hands, the next fills the queue.
    let mut sent = 0;
    while serial.read(5, 1) & 0x20 != 0 {
        serial.write(0, 1, 0x41);
        sent += 1;
    }
    assert!(sent >= FULL);
    serial.read(2, 1);
    assert!(!pin.level());
    drop(held);
    assert!(serial.drain(SECOND));
    assert_ne!(serial.read(5, 1) & 0x20, 0);
    assert!(pin.level(), "told that it can go on");
    assert_eq!(lock(&sink.0).len(), sent);
}

#[test]
fn input_waits_for_a_listener_and_survives_its_setting_up() {
    let (irq, pin) = probe();
    let serial = Serial::new(irq, Box::new(std::io::sink()));
    let text: Vec<u8> = (0..100).collect();
    assert_eq!(serial.push(&text), 100);
    // As Linux' 8250 driver starts a port.
    serial.write(2, 1, 1);
    serial.write(2, 1, 7);
    serial.write(2, 1, 0);
    for offset in [5, 0, 2, 6, 5, 5, 0, 2, 6] {
        serial.read(offset, 1);
    }
    serial.write(2, 1, 0x81);
    serial.write(4, 1, 0xb);
    serial.write(1, 1, 5);
    assert!(pin.level());
    assert_eq!(serial.read(2, 1), 0xc4, "data over the trigger level of 8");
    let mut got = vec![];
    while serial.read(5, 1) & 1 != 0 {
        got.push(serial.read(0, 1) as u8);
    }
    assert_eq!(got, text);
    assert!(!pin.level());
    serial.push(b"x");
    assert!(pin.level());
    assert_eq!(serial.read(2, 1), 0xcc, "few characters: time-out");
}

#[test]
fn input_reaches_a_polling_guest_and_pushers_wait_for_room() {
    let (irq, _) = probe();
    let serial = Serial::new(irq, Box::new(std::io::sink()));
    let text: Vec<u8> = (0..3 * FULL).map(|i| (i / 7) as u8).collect();
    let (tx, rx) = mpsc::channel();
    let (theirs, bytes) = (serial.clone(), text.clone());
    let pusher = std::thread::spawn(move || tx.send(theirs.push_all(&bytes, SECOND)).unwrap());
    let mut got = vec![];
    while got.len() < text.len() {
        if serial.read(5, 1) & 1 != 0 {
            got.push(serial.read(0, 1) as u8);
        }
        // A guest that reads on need not poll four times for each byte.
    }
    pusher.join().unwrap();
    assert_eq!(rx.recv().unwrap(), text.len());
    assert!(got == text);
    assert_eq!(serial.push_all(&vec![0; 2 * FULL], Duration::ZERO), FULL);
}

#[test]
fn interrupts_are_told_by_priority() {
    let (irq, pin) = probe();
    let serial = Serial::new(irq, Box::new(std::io::sink()));
    assert_eq!(serial.read(2, 1), 1);
    serial.write(4, 1, 8);
    serial.write(1, 1, 0xf);
    serial.push(b"ab");
    assert_eq!(serial.read(2, 1), 4);
    assert_eq!(serial.read(0, 1), u64::from(b'a'));
    assert_eq!(serial.read(0, 1), u64::from(b'b'));
    assert!(pin.level());
    assert_eq!(serial.read(2, 1), 2, "transmitter empty, as it was enabled");
    assert_eq!(serial.read(2, 1), 1, "which reading it acknowledged");
    assert!(!pin.level());
    serial.write(0, 1, 0x20);
    assert_eq!(serial.read(2, 1), 2);
}

#[test]
fn loopback_turns_the_port_on_itself() {
    let (irq, pin) = probe();
    let serial = Serial::new(irq, Box::new(std::io::sink()));
    serial.write(4, 1, 0x1a); // as Linux tells a UART from none
    assert_eq!(serial.read(6, 1) & 0xf0, 0x90);
    serial.write(4, 1, 0x1e);
    serial.write(1, 1, 5);
    serial.write(2, 1, 1);
    for byte in 0..17 {
        serial.write(0, 1, byte);
    }
    assert!(!pin.level(), "loopback turns OUT2 off");
    assert_eq!(serial.read(2, 1), 0xc6);
    assert_eq!(serial.read(5, 1) & 3, 3, "the 17th overran");
    assert_eq!(serial.read(5, 1) & 3, 1);
    assert_eq!((0..16).map(|_| serial.read(0, 1)).collect::<Vec<_>>(), (0..16).collect::<Vec<_>>());
    serial.write(3, 1, 0x80);
    serial.write(0, 2, 0x1234);
    assert_eq!(serial.read(0, 2), 0x1234, "divisor latch");
}

#[test]
fn state_moves_to_another_port() {
    let (irq, pin) = probe();
    let serial = Serial::new(irq, Box::new(std::io::sink()));
    serial.push(b"hello");
    serial.write(4, 1, 0xb);
    serial.write(7, 1, 0x5a);
    let state = through_json(&serial.state());
    let other = Serial::new(probe().0, Box::new(std::io::sink()));
    other.set_state(&state);
    assert_eq!(other.state(), serial.state());
    assert_eq!(other.read(7, 1), 0x5a);
    other.write(1, 1, 1);
    assert_eq!(other.read(0, 1), u64::from(b'h'));
    assert!(!pin.level());
}

#[test]
fn a_hostile_guest_is_bounded() {
    let (irq, _) = probe();
    let serial = Serial::new(irq, Box::new(std::io::sink()));
    serial.push(&[7; 100]);
    batter(&*serial, 8, 200_000, None);
    let Saved::V1(state) = serial.state();
    assert!(state.received.len() <= FIFO && state.input.len() <= FULL);
}

#[test]
fn output_goes_on_without_a_reader() {
    struct Broken;
    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let serial = Serial::new(probe().0, Box::new(Broken));
    for _ in 0..3 * FULL {
        serial.write(0, 1, 0x41);
    }
    // Closed or draining, never waiting for ever.
    serial.drain(SECOND);
    assert_eq!(serial.lost(), 0);
    assert_eq!(serial.read(5, 1) & 0x20, 0x20);
}
