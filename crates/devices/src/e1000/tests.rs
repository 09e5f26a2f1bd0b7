use std::sync::OnceLock;

use machine::Memory;
use vm_memory::{Bytes, GuestAddress};

use super::registers::{cause, reg};
use super::*;
use crate::testing::{Random, batter, probe, through_json, time, until};

const MAC: Mac = [2, 0, 0, 0, 0, 7];
const RX: u64 = 0x1_0000;
const TX: u64 = 0x1_1000;
const BUFFERS: u64 = 0x2_0000;
const DATA: u64 = 0x8_0000;

#[derive(Default)]
struct Cable {
    guest: OnceLock<Guest>,
    sent: Mutex<Vec<Vec<u8>>>,
    room: Mutex<u32>,
}

impl Link for Cable {
    fn connect(&self, guest: Guest) {
        self.guest.set(guest).unwrap();
    }
    fn send(&self, header: &Header, frame: &[u8]) {
        assert_eq!(*header, Header::default(), "nothing is left to do");
        lock(&self.sent).push(frame.to_vec());
    }
    fn room(&self) {
        *lock(&self.room) += 1;
    }
}

struct Bed {
    nic: Arc<E1000>,
    cable: Arc<Cable>,
    memory: Memory,
    pin: Arc<crate::testing::Probe>,
    timers: Timers,
    tail: u32,
}

/// A controller as a driver leaves it: rings of 8 descriptors, receive buffers of 2 KiB.
fn bed() -> Bed {
    let (clock, timers) = time();
    let memory = Memory::new(2 << 20, 0).unwrap();
    let cable = Arc::new(Cable::default());
    let nic = E1000::new(MAC, cable.clone(), memory.clone(), clock, &timers).unwrap();
    let (line, pin) = probe();
    nic.config().connect(line, Arc::new(|| -> Box<dyn machine::irq::Route> { Box::new(|_| ()) }));
    nic.config().set(4, &[7]);
    let bed = Bed { nic, cable, memory, pin, timers, tail: 0 };
    for n in 0..8 {
        bed.put(RX + 16 * n, &(BUFFERS + 0x800 * n).to_le_bytes());
    }
    for (at, value) in [
        (reg::RDBAL, RX as u32),
        (reg::RDLEN, 128),
        (reg::RDT, 7),
        (reg::TDBAL, TX as u32),
        (reg::TDLEN, 128),
        (reg::TCTL, 0x0100_000a),
        // On, broadcasts.
        (reg::RCTL, 1 << 15 | 2),
        (reg::IMS, 0x9d),
    ] {
        bed.write(at, value);
    }
    bed
}

impl Bed {
    fn read(&self, at: u32) -> u32 {
        self.nic.read_bar(0, at.into(), 4) as u32
    }
    fn write(&self, at: u32, value: u32) {
        self.nic.write_bar(0, at.into(), 4, value.into());
    }
    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.guest().write_slice(bytes, GuestAddress(at)).unwrap();
    }
    fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        crate::dma::fetch(&self.memory, at).unwrap()
    }
    /// Gives the controller descriptors of two words, and waits until it has done them.
    fn transmit(&mut self, descriptors: &[[u64; 2]]) {
        for [low, high] in descriptors {
            let at = TX + 16 * u64::from(self.tail);
            self.put(at, &[low.to_le_bytes(), high.to_le_bytes()].concat());
            self.tail = (self.tail + 1) % 8;
        }
        self.write(reg::TDT, self.tail);
        until("sent", || self.read(reg::TDH) == self.tail);
        // What is sent goes after the lock is free.
        drop(self.nic.state());
    }
    fn sent(&self, n: usize) -> Vec<Vec<u8>> {
        until("frames at the link", || lock(&self.cable.sent).len() >= n);
        std::mem::take(&mut lock(&self.cable.sent))
    }
    fn deliver(&self, frame: &[u8]) -> bool {
        self.cable.guest.get().unwrap().deliver(&Header::default(), frame)
    }
    /// The status of receive descriptor `n`, when it is done.
    fn received(&self, n: u64) -> [u8; 8] {
        until("received", || self.get::<16>(RX + 16 * n)[12] & 1 == 1);
        self.get(RX + 16 * n + 8)
    }
    fn phy(&self, n: u32) -> u32 {
        self.write(reg::MDIC, 2 << 26 | 1 << 21 | n << 16);
        let mdic = self.read(reg::MDIC);
        assert_eq!(mdic >> 28 & 5, 1, "ready, no error");
        mdic & 0xffff
    }
}

fn frame(to: Mac, len: usize) -> Vec<u8> {
    let mut frame = [&to[..], &[2, 0, 0, 0, 0, 9, 8, 0]].concat();
    frame.resize(len, 0x5a);
    frame
}

const RS: u64 = 8 << 24;
const EOP: u64 = 1 << 24;
const DEXT: u64 = 0x20 << 24;

#[test]
fn the_eeprom_and_the_phy_are_what_drivers_look_for() {
    let bed = bed();
    let word = |n: u32| {
        bed.write(reg::EERD, n << 8 | 1);
        bed.read(reg::EERD) >> 16
    };
    assert_eq!([word(0), word(1), word(2)], [0x0002, 0, 0x0700]);
    assert_eq!((0..64).fold(0, |sum, n| (sum + word(n)) & 0xffff), 0xbaba);
    // Bit by bit, as Linux does for this chip.
    let microwire = |n: u32| {
        bed.write(reg::EECD, 0x40);
        assert_ne!(bed.read(reg::EECD) & 0x80, 0);
        let clock = |bit: u32| {
            bed.write(reg::EECD, 0x42 | bit << 2);
            bed.write(reg::EECD, 0x43 | bit << 2);
            let out = bed.read(reg::EECD) >> 3 & 1;
            bed.write(reg::EECD, 0x42 | bit << 2);
            out
        };
        for shift in (0..9).rev() {
            clock((6 << 6 | n) >> shift & 1);
        }
        let word = (0..16).fold(0, |word, _| word << 1 | clock(0));
        bed.write(reg::EECD, 0);
        word
    };
    (0..64).for_each(|n| assert_eq!(microwire(n), word(n), "{n}"));
    assert_eq!((bed.phy(2), bed.phy(3) & 0xfff0), (0x141, 0xc20));
    assert_eq!(bed.phy(1) & 0x24, 0x24, "a link");
    bed.write(reg::MDIC, 2 << 26 | 2 << 21);
    assert_ne!(bed.read(reg::MDIC) & 1 << 30, 0, "no other PHY");
    assert_eq!(bed.read(reg::RA + 4), 0x8000_0700);
}

#[test]
fn the_link_comes_and_goes() {
    let bed = bed();
    assert_eq!(bed.read(reg::STATUS) & 0xc3, 0x83);
    bed.cable.guest.get().unwrap().set_up(false);
    assert!(bed.pin.level());
    assert_eq!(bed.read(reg::ICR) & cause::LSC, cause::LSC);
    assert!(!bed.pin.level());
    assert_eq!((bed.read(reg::STATUS) & 2, bed.phy(1) & 4), (0, 0));
    bed.cable.guest.get().unwrap().set_up(true);
    assert_eq!(bed.read(reg::ICR) & cause::LSC, cause::LSC);
    // The PHY is turned off, and on by its reset.
    bed.write(reg::MDIC, 1 << 26 | 1 << 21 | 0x0800);
    assert_eq!(bed.read(reg::STATUS) & 2, 0);
    bed.write(reg::MDIC, 1 << 26 | 1 << 21 | 0x8000);
    assert_eq!(bed.read(reg::STATUS) & 2, 2);
}

#[test]
fn frames_are_sent_with_their_checksums() {
    let mut bed = bed();
    // Legacy, in two pieces; the second says that a checksum from 14 on is to be put at 16.
    let bytes = frame([0xff; 6], 40);
    bed.put(DATA, &bytes);
    let ic = 4 << 24;
    bed.transmit(&[[DATA, 14], [DATA + 14, 26 | EOP | RS | ic | 16 << 16 | 14 << 40]]);
    let sent = bed.sent(1);
    assert_eq!((sent.len(), sent[0].len(), &sent[0][..16]), (1, 60, &bytes[..16]));
    assert_eq!(crate::net::sum(&sent[0][14..40]), !0x5a5a_u16.wrapping_add(0));
    assert_eq!(bed.get::<1>(TX + 16 + 12), [1], "done");
    assert_eq!(bed.get::<1>(TX + 12), [0], "no report was asked for");
    assert_eq!(bed.read(reg::ICR) & 3, 3);
    assert_eq!((bed.read(reg::BPTC), bed.read(reg::GPTC), bed.read(reg::GPTC)), (1, 1, 0));

    // By a context: IP at 14, TCP at 34; a VLAN tag.
    let mut bytes = frame(MAC, 100);
    bytes[14..34].copy_from_slice(&[0x45, 0, 0, 86, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes[50..52].copy_from_slice(&[0, 0]);
    bed.put(DATA, &bytes);
    bed.write(reg::CTRL, 0x4000_0241);
    let context = [14 | 24 << 8 | 33 << 16 | 34 << 32 | 50 << 40, DEXT | 3 << 24];
    let vle = 0x40 << 24;
    bed.transmit(&[context, [DATA, 100 | EOP | RS | DEXT | vle | 1 << 20 | 3 << 40 | 0x123 << 48]]);
    let sent = bed.sent(1);
    assert_eq!(sent[0][12..18], [0x81, 0, 1, 0x23, 8, 0]);
    let ip = &sent[0][18..];
    assert_eq!((crate::net::sum(&ip[..20]), crate::net::sum(&ip[20..])), (0xffff, 0xffff));
}

#[test]
fn long_segments_are_cut() {
    let mut bed = bed();
    let mut bytes = frame(MAC, 54 + 2500);
    bytes[14..34].copy_from_slice(&[0x45, 0, 0, 0, 0, 9, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes[34..54].copy_from_slice(&[0, 1, 0, 2, 0, 0, 1, 0, 0, 0, 0, 0, 0x50, 0x19, 1, 0, 0, 0, 0, 0]);
    // The pseudo header's sum, without a length.
    bytes[50..52].copy_from_slice(&(0x0a00u16 + 1 + 0x0a00 + 2 + 6).to_be_bytes());
    (54..bytes.len()).for_each(|n| bytes[n] = n as u8);
    bed.put(DATA, &bytes);
    let context =
        [14 | 24 << 8 | 33 << 16 | 34 << 32 | 50 << 40, 2500 | DEXT | 7 << 24 | 54 << 40 | 1000 << 48];
    let data = DEXT | 4 << 24 | 1 << 20;
    bed.transmit(&[context, [DATA, 54 | data | 3 << 40], [DATA + 54, 2500 | data | EOP | RS]]);
    let sent = bed.sent(3);
    assert_eq!(sent.iter().map(Vec::len).collect::<Vec<_>>(), [1054, 1054, 554]);
    let mut all: Vec<u8> = Vec::new();
    for (n, piece) in sent.iter().enumerate() {
        let ip = &piece[14..];
        assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), ip.len());
        assert_eq!(u16::from_be_bytes([ip[4], ip[5]]), 9 + n as u16);
        assert_eq!(u32::from_be_bytes([ip[24], ip[25], ip[26], ip[27]]), 256 + 1000 * n as u32);
        assert_eq!(ip[33], if n == 2 { 0x19 } else { 0x10 }, "FIN and PSH on the last one");
        let pseudo = [&ip[12..20], &[0, 6], &(ip.len() as u16 - 20).to_be_bytes()[..]].concat();
        let tcp = crate::net::sum(&[&pseudo[..], &ip[20..]].concat());
        assert_eq!((crate::net::sum(&ip[..20]), tcp), (0xffff, 0xffff));
        all.extend(&ip[40..]);
    }
    assert_eq!(all, bytes[54..]);
    assert_eq!(bed.read(reg::TSCTC), 1);
}

#[test]
fn wanted_frames_are_received() {
    let bed = bed();
    let group = [1, 0, 0x5e, 0, 0, 0xfb];
    // Two of these are wanted.
    for to in [MAC, [0xff; 6], [2, 0, 0, 0, 0, 8], group] {
        assert!(bed.deliver(&frame(to, 80)));
    }
    let hash = 0xfb00u32 >> 4 & 0xfff;
    bed.write(reg::MTA + (hash >> 5) * 4, 1 << (hash & 31));
    bed.deliver(&frame(group, 20));
    let first = bed.received(0);
    assert_eq!(first[..2], 84u16.to_le_bytes());
    assert_eq!((first[4], first[5]), (7, 0), "done, whole, not checked");
    let mut bytes = frame(MAC, 80);
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    assert_eq!(bed.get::<84>(BUFFERS)[..], bytes);
    assert_eq!(bed.get::<6>(BUFFERS + 0x800), [0xff; 6]);
    bed.received(2);
    assert_eq!(bed.get::<6>(BUFFERS + 0x1000), group);
    assert_eq!((bed.read(reg::RDH), bed.read(reg::ICR) & cause::RXT0), (3, cause::RXT0));
    assert_eq!((bed.read(reg::GPRC), bed.read(reg::MPRC), bed.read(reg::BPRC)), (3, 1, 1));

    // A tag is taken out, a checksum of the link's made good; all go to who wants all.
    bed.write(reg::CTRL, 0x4000_0241);
    bed.write(reg::RCTL, 1 << 26 | 1 << 3 | 2);
    let mut tagged = frame([6; 6], 90);
    tagged.splice(12..12, [0x81, 0, 0x20, 5]);
    let header = Header { checksum: Some((34, 16)), ..Header::default() };
    assert!(bed.cable.guest.get().unwrap().deliver(&header, &tagged));
    let got = bed.received(3);
    assert_eq!((got[0], got[4], u16::from_le_bytes([got[6], got[7]])), (90, 7 | 8, 0x2005));
    assert_eq!(bed.get::<14>(BUFFERS + 0x1800)[..], frame([6; 6], 14));
    assert_ne!(bed.get::<2>(BUFFERS + 0x1800 + 46), [0x5a; 2]);

    // Long frames take several buffers, where they are allowed.
    bed.deliver(&frame(MAC, 3000));
    bed.write(reg::RCTL, 1 << 26 | 1 << 5 | 2);
    bed.deliver(&frame(MAC, 3000));
    assert_eq!((bed.received(4)[4] & 3, bed.received(5)[4] & 3), (1, 3));
    assert_eq!(bed.received(5)[..2], 952u16.to_le_bytes());
}

#[test]
fn frames_wait_for_descriptors_and_the_link_for_room() {
    let bed = bed();
    while bed.deliver(&frame(MAC, 1500)) {}
    until("few are left", || bed.read(reg::RDH) == 7);
    assert_ne!(bed.read(reg::ICR) & cause::RXDMT0, 0);
    until("all are done", || {
        bed.write(reg::RDT, (bed.read(reg::RDH) + 7) % 8);
        *lock(&bed.cable.room) == 1
    });
    assert!(bed.deliver(&frame(MAC, 1500)));
    // A reset forgets what waits.
    bed.write(reg::CTRL, 1 << 26);
    assert_eq!((bed.read(reg::RDLEN), bed.read(reg::RA), bed.read(reg::IMS)), (0, 2, 0));
    assert!(lock(&bed.nic.inner.state).waiting.is_empty());
}

#[test]
fn interrupts_are_throttled() {
    let bed = bed();
    // 100 µs.
    bed.write(reg::ITR, 390);
    bed.write(reg::ICS, cause::LSC);
    assert!(bed.pin.level());
    bed.read(reg::ICR);
    bed.write(reg::ICS, cause::LSC);
    assert!(!bed.pin.level());
    bed.timers.advance(99_000);
    assert!(!bed.pin.level());
    bed.timers.advance(1_000);
    assert!(bed.pin.level());
    bed.write(reg::IMC, u32::MAX);
    assert!(!bed.pin.level());
}

#[test]
fn a_hostile_guest_is_bounded_and_its_state_moves() {
    struct Registers<'a>(&'a E1000, usize);
    impl machine::Registers for Registers<'_> {
        fn read(&self, offset: u64, size: u8) -> u64 {
            self.0.read_bar(self.1, offset, size)
        }
        fn write(&self, offset: u64, size: u8, value: u64) {
            self.0.write_bar(self.1, offset, size, value);
        }
    }
    let bed = bed();
    let mut random = Random::new();
    for round in 0..30 {
        for at in (0..0x4000).step_by(8) {
            // Descriptors of all kinds, whose data is mostly in memory.
            bed.put(RX + at, &[random.next() & 0x1f_ffff, random.next()].map(u64::to_le_bytes).concat());
        }
        for (base, len) in [(reg::RDBAL, 0x1000), (reg::TDBAL, 0x1000)] {
            bed.write(base, RX as u32);
            bed.write(base + 8, len);
            bed.write(base + 0x10, random.below(0x100) as u32);
            bed.write(base + 0x18, random.below(0x110) as u32);
        }
        bed.write(reg::TCTL, 2 | random.next() as u32);
        bed.write(reg::RCTL, 2 | random.next() as u32);
        for n in 0..20 {
            bed.deliver(&frame([random.next() as u8 & 0xfe; 6], 14 + n * 700));
        }
        batter(
            &Registers(&bed.nic, 0),
            if round % 2 == 0 { 0x6000 } else { 0x2_0000 },
            2000,
            Some(&bed.timers),
        );
        batter(&Registers(&bed.nic, 2), 0x40, 200, None);
    }
    let other = self::bed();
    other.nic.config().set(4, &[0]);
    bed.nic.config().set(4, &[0]);
    let state = through_json(&bed.nic.state());
    other.nic.set_state(&state);
    bed.write(reg::CTRL, 1 << 26);
    assert_eq!(bed.read(reg::CTRL), 0x201);
}
