//! A guest that sends anything at all to a user-mode network, while the world answers or does not. Nothing leaves this host: see
//! `networks::user::fuzzing`.
#![no_main]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use devices::net::{Guest, Header, Offloads, Receiver};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use networks::user::Options;
use networks::user::fuzzing::Bed;

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const GATEWAY: [u8; 6] = [0x52, 0x55, 0x0a, 0, 2, 2];

#[derive(Arbitrary, Debug)]
enum Step {
    /// Bytes behind Ethernet's addresses; the checksums are trusted, or not.
    Frame(bool, Vec<u8>),
    /// An IP packet of IPv6 or IPv4: protocol, addresses by number, what IPv4 says of fragments, contents.
    Packet(bool, u8, u8, u8, u16, Vec<u8>),
    /// A TCP segment: of which connection, flags, sequence numbers relative to what is right, window, options, bytes of data.
    Segment {
        ipv6: bool,
        port: u8,
        flags: u8,
        seq: i8,
        ack: i8,
        window: u16,
        options: Vec<u8>,
        len: u16,
    },
    Datagram(bool, u8, u8, u8, Vec<u8>),
    Dhcp(u8, u8, Vec<u8>),
    /// The world does something, and the network sees it.
    World(u8, u8, u16),
    Turn,
    /// The guest takes so many frames, and says so.
    Take(u8),
}

#[derive(Arbitrary, Debug)]
struct Input {
    room: u8,
    offloads: u8,
    steps: Vec<Step>,
}

/// The card, with what the guest knows of its connections by the last two bits of its port: next to send, next to get.
struct Card {
    room: usize,
    offloads: Offloads,
    frames: Mutex<VecDeque<Vec<u8>>>,
    known: Mutex<[(u32, u32); 4]>,
}

impl Receiver for Card {
    fn deliver(&self, _: Header, frame: &[u8]) -> bool {
        let mut frames = self.frames.lock().expect("nobody panicked");
        if frames.len() >= self.room {
            return false;
        }
        frames.push_back(frame.to_vec());
        let (protocol, at) = if frame[12] == 0x86 { (20, 54) } else { (23, 34) };
        if frame.get(protocol) == Some(&6) && frame.len() >= at + 20 {
            let word = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().expect("four"));
            let known = &mut self.known.lock().expect("nobody panicked")[usize::from(frame[at + 3] & 3)];
            let control = frame[at + 13];
            let len = (frame.len() - at - usize::from(frame[at + 12] >> 4) * 4) as u32;
            known.1 = word(at + 4).wrapping_add(len + u32::from(control & 3 != 0));
            if control & 16 != 0 {
                known.0 = word(at + 8);
            }
        }
        true
    }

    fn set_up(&self, _: bool) {}

    fn offloads(&self) -> Offloads {
        self.offloads
    }
}

/// Some addresses that there are in the guest's network, and others.
fn address4(n: u8) -> [u8; 4] {
    match n % 8 {
        0..3 => [10, 0, 2, 15],
        3 => [10, 0, 2, 2],
        4 => [10, 0, 2, 3],
        5 => [255; 4],
        6 => [192, 0, 2, n],
        _ => [0; 4],
    }
}

fn address6(n: u8) -> [u8; 16] {
    let last = u128::from(n);
    let address: u128 = match n % 8 {
        0 | 1 => 0xfd6c_6f64_6765_0000_0000_0000_0000_0015,
        2 => 0xfe80 << 112 | 0x15,
        3 => 0xfd6c_6f64_6765_0000_0000_0000_0000_0002,
        4 => 0xfd6c_6f64_6765_0000_0000_0000_0000_0003,
        5 => 0xff02 << 112 | last,
        6 => 0x2001_0db8 << 96 | last,
        _ => 0,
    };
    address.to_be_bytes()
}

fn ip(ipv6: bool, protocol: u8, from: u8, to: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let payload = &payload[..payload.len().min(60_000)];
    if ipv6 {
        let [a, b] = (payload.len() as u16).to_be_bytes();
        let head = [0x60, 0, 0, 0, a, b, protocol, 255];
        return [&[0x86, 0xdd], &head[..], &address6(from), &address6(to), payload].concat();
    }
    let [a, b] = (20 + payload.len() as u16).to_be_bytes();
    let [c, d] = fragment.to_be_bytes();
    let mut head =
        [&[0x45, 0, a, b, 0, 1, c, d, 64, protocol, 0, 0][..], &address4(from), &address4(to)].concat();
    let mut sum: u32 = head.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    head[10..12].copy_from_slice(&(!sum as u16).to_be_bytes());
    [&[8, 0], &head[..], payload].concat()
}

fn send(bed: &mut Bed, valid: bool, rest: &[u8]) {
    let frame = [&GATEWAY[..], &MAC, rest].concat();
    bed.frame(&Header { valid, ..Header::default() }, &frame);
}

fn step(bed: &mut Bed, card: &Card, step: Step) {
    match step {
        Step::Frame(valid, bytes) => send(bed, valid, &bytes),
        Step::Packet(ipv6, protocol, from, to, fragment, bytes) => {
            send(bed, true, &ip(ipv6, protocol, from, to, fragment, &bytes));
        }
        Step::Segment { ipv6, port, flags, seq, ack, window, options, len } => {
            let (next, got) = card.known.lock().expect("nobody panicked")[usize::from(port & 3)];
            let seq = next.wrapping_add_signed(seq.into()).to_be_bytes();
            let ack = if flags & 16 != 0 { got.wrapping_add_signed(ack.into()) } else { 0 }.to_be_bytes();
            let options = &options[..options.len().min(40) / 4 * 4];
            let ports = [100, port & 3, 0, 80 + (port >> 7)];
            let [a, b] = window.to_be_bytes();
            let rest = [(5 + options.len() as u8 / 4) << 4, flags & 0x3f, a, b, 0, 0, 0, 0];
            let data = vec![7; usize::from(len % 4000)];
            let tcp = [&ports[..], &seq, &ack, &rest, options, &data].concat();
            send(bed, true, &ip(ipv6, 6, 0, 6, 0, &tcp));
        }
        Step::Datagram(ipv6, from, to, port, bytes) => {
            let bytes = &bytes[..bytes.len().min(50_000)];
            let [a, b] = (8 + bytes.len() as u16).to_be_bytes();
            let udp = [&[0, 99, 0, port, a, b, 0, 0], bytes].concat();
            send(bed, true, &ip(ipv6, 17, from, to, 0, &udp));
        }
        Step::Dhcp(kind, len, options) => {
            let mut message = vec![0; 240];
            message[..3].copy_from_slice(&[1, 1, len]);
            message[28..34].copy_from_slice(&MAC);
            message[236..].copy_from_slice(&[99, 130, 83, 99]);
            message.extend([53, 1, kind]);
            message.extend(&options[..options.len().min(2000)]);
            message.push(255);
            let [a, b] = (8 + message.len() as u16).to_be_bytes();
            let udp = [&[0, 68, 0, 67, a, b, 0, 0], &message[..]].concat();
            send(bed, true, &ip(false, 17, 7, 5, 0, &udp));
        }
        Step::World(who, what, len) => bed.act(who, what, len),
        Step::Turn => bed.turn(),
        Step::Take(frames) => {
            let mut waiting = card.frames.lock().expect("nobody panicked");
            let frames = waiting.len().min(frames.into());
            waiting.drain(..frames);
            drop(waiting);
            bed.room();
        }
    }
}

fuzz_target!(|input: Input| {
    let bit = |n: u8| input.offloads >> n & 1 == 1;
    let card = Arc::new(Card {
        room: 1 + usize::from(input.room),
        offloads: Offloads { checksum: bit(0), tso4: bit(1), tso6: bit(2) },
        frames: Mutex::default(),
        known: Mutex::default(),
    });
    let receiver: std::sync::Weak<dyn Receiver> = Arc::<Card>::downgrade(&card);
    let options = Options { loopback: bit(3), resolv_conf: "/nonexistent".into(), ..Options::new(MAC) };
    let mut bed = Bed::new(&options, Guest::new(receiver));
    for one in input.steps.into_iter().take(64) {
        step(&mut bed, &card, one);
        bed.check();
    }
    bed.turn();
});
