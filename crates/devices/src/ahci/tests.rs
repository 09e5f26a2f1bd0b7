//! A driver by hand, well-behaved and not.

use std::sync::Arc;

use machine::Memory;
use vm_memory::{Bytes, GuestAddress};

use super::registers::{host, is, port};
use super::*;
use crate::testing::{Random, through_json, until};

const LIST: u64 = 0x1_0000;
const RECEIVED: u64 = 0x1_1000;
const TABLES: u64 = 0x2_0000;
const DATA: u64 = 0x10_0000;
const DISK: u64 = 1 << 20;
const MEMORY: u64 = 8 << 20;

const START: u32 = 1;
const RECEIVE: u32 = 0x10;
const RUNNING: u32 = 1 << 15;
const WRITE: u16 = 0x40;

struct Driver {
    ahci: Arc<Ahci>,
    memory: Memory,
    _files: [tempfile::NamedTempFile; 2],
}

/// What a command is made of.
#[derive(Clone, Copy, Default)]
struct Ask<'a> {
    command: u8,
    features: u16,
    lba: u64,
    count: u16,
    packet: &'a [u8],
}

impl Driver {
    /// A disk of 1 MiB at port 0, a CD of 10 blocks and a half at port 1, both started.
    fn new() -> Self {
        let file = |len, read_only| {
            let file = tempfile::NamedTempFile::new().unwrap();
            let bytes: Vec<u8> = (0..len).map(|n| (n / 512) as u8).collect();
            std::fs::write(file.path(), bytes).unwrap();
            let options =
                disks::Options { format: Some(disks::Format::Raw), read_only, ..Default::default() };
            let disk = Arc::new(disks::Disk::open(file.path(), &options).unwrap());
            (file, disk)
        };
        let ((one, disk), (two, cd)) = (file(DISK, false), file(21 * 1024, true));
        let memory = Memory::new(MEMORY, 0).unwrap();
        let devices = [Attached::Disk(disk, "serial-1".into()), Attached::Cd(cd, "cd".into())];
        let ahci = Ahci::new(&devices, memory.clone()).unwrap();
        ahci.config().set(4, &[6]);
        ahci.config_written(4);
        let this = Self { ahci, memory, _files: [one, two] };
        this.begin();
        this
    }

    /// Resets the controller and starts both ports.
    fn begin(&self) {
        self.write(host::GHC, 1);
        until("the controller comes back", || self.read(host::GHC) & 1 == 0);
        self.write(host::GHC, 2);
        for n in 0..2 {
            self.start(n);
        }
    }

    fn start(&self, n: u64) {
        self.port_write(n, port::CLB, (LIST + n * 0x800) as u32);
        self.port_write(n, port::FB, (RECEIVED + n * 0x100) as u32);
        self.port_write(n, port::SERR, u32::MAX);
        self.port_write(n, port::IS, u32::MAX);
        self.port_write(n, port::IE, u32::MAX);
        self.port_write(n, port::CMD, START | RECEIVE);
    }

    /// As drivers do after an error.
    fn restart(&self, n: u64) {
        self.port_write(n, port::CMD, RECEIVE);
        until("the port stops", || self.port(n, port::CMD) & RUNNING == 0);
        self.start(n);
    }

    fn read(&self, at: u64) -> u32 {
        self.ahci.read_bar(ABAR, at, 4) as u32
    }

    fn write(&self, at: u64, value: u32) {
        self.ahci.write_bar(ABAR, at, 4, value.into());
    }

    fn port(&self, n: u64, at: u64) -> u32 {
        self.read(PORT_BASE + n * PORT_SIZE + at)
    }

    fn port_write(&self, n: u64, at: u64, value: u32) {
        self.write(PORT_BASE + n * PORT_SIZE + at, value);
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.guest().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.guest().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Puts a command in a slot of port `n`, with its data in the given pieces.
    fn place(&self, n: u64, slot: u64, ask: &Ask<'_>, pieces: &[(u64, u32)]) {
        let table = TABLES + slot * 0x1000;
        let mut header = [0; 32];
        let flags = 5 | u16::from(!ask.packet.is_empty()) << 5 | WRITE;
        header[..2].copy_from_slice(&flags.to_le_bytes());
        header[2..4].copy_from_slice(&(pieces.len() as u16).to_le_bytes());
        header[8..16].copy_from_slice(&table.to_le_bytes());
        self.put(LIST + n * 0x800 + slot * 32, &header);
        let lba = ask.lba.to_le_bytes();
        let mut fis = [0; 20];
        fis[..4].copy_from_slice(&[0x27, 0x80, ask.command, ask.features as u8]);
        fis[4..7].copy_from_slice(&lba[..3]);
        fis[7] = 0x40;
        fis[8..11].copy_from_slice(&lba[3..6]);
        fis[11] = (ask.features >> 8) as u8;
        fis[12..14].copy_from_slice(&ask.count.to_le_bytes());
        self.put(table, &fis);
        let mut packet = [0; 16];
        packet[..ask.packet.len()].copy_from_slice(ask.packet);
        self.put(table + 0x40, &packet);
        for (at, (address, flags)) in (table + 0x80..).step_by(16).zip(pieces) {
            self.put(at, &address.to_le_bytes());
            self.put(at + 12, &flags.to_le_bytes());
        }
    }

    /// Issues slot 0 and waits for its end. Gives status and error, or the interrupt status of an error of the controller's.
    fn issue(&self, n: u64) -> Result<(u8, u8), u32> {
        self.port_write(n, port::IS, u32::MAX);
        self.port_write(n, port::CI, 1);
        until("the command ends", || {
            self.port(n, port::CI) == 0 || self.port(n, port::IS) & 0x7900_0000 != 0
        });
        let (task, why) = (self.port(n, port::TFD), self.port(n, port::IS));
        if why & (is::TASK_FILE | is::REGISTERS | is::PIO) == 0 {
            return Err(why);
        }
        assert_ne!(self.read(host::IS) & 1 << n, 0, "an interrupt tells of it");
        if task & 1 != 0 {
            self.restart(n);
        }
        Ok((task as u8, (task >> 8) as u8))
    }

    /// A command with `len` bytes at [`DATA`], which works.
    fn good(&self, n: u64, ask: &Ask<'_>, len: u32) -> Vec<u8> {
        let pieces: &[_] = if len == 0 { &[] } else { &[(DATA, len - 1)] };
        self.place(n, 0, ask, pieces);
        let (status, error) = self.issue(n).unwrap();
        assert_eq!((status & 1, error), (0, 0), "command {:#x} {:x?}", ask.command, ask.packet);
        self.get(DATA, len as usize)
    }

    /// A packet that fails: gives sense key and additional code.
    fn sense(&self, packet: &[u8]) -> (u8, u8) {
        let ask = Ask { command: 0xa0, features: 1, packet, ..Ask::default() };
        self.place(1, 0, &ask, &[(DATA, 4095)]);
        let (status, error) = self.issue(1).unwrap();
        assert_ne!(status & 1, 0, "{packet:x?} fails");
        let sense = self.packet(&[3, 0, 0, 0, 18, 0], 18);
        assert_eq!(sense[2], error >> 4);
        (sense[2], sense[12])
    }

    fn packet(&self, packet: &[u8], len: u32) -> Vec<u8> {
        self.good(1, &Ask { command: 0xa0, features: 1, packet, ..Ask::default() }, len)
    }

    fn count(&self, n: u64) -> u32 {
        u32::from_le_bytes(self.get(LIST + n * 0x800 + 4, 4).try_into().unwrap())
    }

    /// It works, whatever was before.
    fn works(&self) {
        self.restart(0);
        let sectors = self.good(0, &Ask { command: 0x25, lba: 7, count: 1, ..Ask::default() }, 512);
        assert_eq!(sectors[..2], [7, 7]);
    }
}

fn word(bytes: &[u8], word: usize) -> u16 {
    u16::from_le_bytes([bytes[2 * word], bytes[2 * word + 1]])
}

#[test]
fn devices_say_what_they_are() {
    let d = Driver::new();
    assert_eq!(d.read(host::PI), 3);
    assert_eq!((d.port(0, port::SIG), d.port(1, port::SIG)), (0x101, 0xeb14_0101));
    assert_eq!((d.port(0, port::TFD) & 0x89, d.port(0, port::SSTS) & 0xf), (0, 3));
    let id = d.good(0, &Ask { command: 0xec, ..Ask::default() }, 512);
    assert_eq!(&id[20..28], b"esirla1-", "the serial number, letters swapped");
    assert_eq!((word(&id, 60), word(&id, 100), word(&id, 75)), (2048, 2048, 31));
    assert_eq!(id.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
    assert_eq!(d.count(0), 512);
    assert_eq!(d.get(RECEIVED + 0x20, 1), [0x5f], "told by a PIO setup FIS");
    let id = d.good(1, &Ask { command: 0xa1, ..Ask::default() }, 512);
    assert_eq!(word(&id, 0), 0x85c0);
    // A disk's question to a drive shows what it is.
    d.place(1, 0, &Ask { command: 0xec, ..Ask::default() }, &[(DATA, 511)]);
    assert_eq!(d.issue(1), Ok((0x41, 4)));
    assert_eq!(d.get(RECEIVED + 0x145, 2), [0x14, 0xeb]);
}

#[test]
fn bytes_go_there_and_back_by_every_command() {
    let d = Driver::new();
    let forms =
        [(0x20, 0x30), (0x24, 0x34), (0x29, 0x39), (0xc4, 0xc5), (0xc8, 0xca), (0x25, 0x35), (0x25, 0x3d)];
    for (n, (read, write)) in forms.into_iter().enumerate() {
        let lba = 100 + 8 * n as u64;
        d.put(DATA, &[0x50 + n as u8; 1024]);
        d.good(0, &Ask { command: write, lba, count: 2, ..Ask::default() }, 1024);
        d.put(DATA, &[0; 1024]);
        let back = d.good(0, &Ask { command: read, lba, count: 2, ..Ask::default() }, 1024);
        assert!(back.iter().all(|&b| b == 0x50 + n as u8), "{read:#x}");
        assert_eq!(d.count(0), 1024);
    }
    d.good(0, &Ask { command: 0xea, ..Ask::default() }, 0);
    // Pieces of odd places and sizes.
    d.place(
        0,
        0,
        &Ask { command: 0x25, lba: 3, count: 2, ..Ask::default() },
        &[(DATA + 6, 1), (DATA + 100, 509), (DATA + 1000, 0x1ff)],
    );
    d.issue(0).unwrap();
    assert_eq!(
        (d.get(DATA + 6, 2), d.get(DATA + 100, 1), d.get(DATA + 1000, 1)),
        (vec![3, 3], vec![3], vec![4])
    );
}

#[test]
fn queued_commands_end_each_by_itself() {
    let d = Driver::new();
    for slot in 0..32 {
        let ask =
            Ask { command: 0x60, features: 8, lba: 8 * slot, count: (slot as u16) << 3, ..Ask::default() };
        d.place(0, slot, &ask, &[(DATA + 4096 * slot, 4095)]);
    }
    d.port_write(0, port::SACT, u32::MAX);
    d.port_write(0, port::CI, u32::MAX);
    until("all end", || d.port(0, port::SACT) == 0);
    assert_eq!((d.port(0, port::CI), d.port(0, port::IS) & is::DEVICE_BITS), (0, is::DEVICE_BITS));
    for slot in 0..32 {
        assert_eq!(d.get(DATA + 4096 * slot, 1), [8 * slot as u8]);
    }
    // One that fails stops the queue, and the log tells which it was.
    d.place(
        0,
        5,
        &Ask { command: 0x60, features: 8, lba: 5000, count: 5 << 3, ..Ask::default() },
        &[(DATA, 4095)],
    );
    d.port_write(0, port::SACT, 1 << 5);
    d.port_write(0, port::CI, 1 << 5);
    until("it fails", || d.port(0, port::IS) & is::TASK_FILE != 0);
    assert_eq!(d.port(0, port::SACT), 1 << 5);
    d.restart(0);
    let log = d.good(0, &Ask { command: 0x2f, lba: 0x10, count: 1, ..Ask::default() }, 512);
    assert_eq!((log[0], log[2], log[3]), (5, 0x41, 0x10));
    assert_eq!(u16::from_le_bytes([log[4], log[5]]), 5000);
    d.works();
}

#[test]
fn trimmed_sectors_are_zero() {
    let d = Driver::new();
    let mut ranges = [0; 512];
    ranges[..8].copy_from_slice(&(16u64 << 48 | 8).to_le_bytes());
    d.put(DATA, &ranges);
    d.good(0, &Ask { command: 6, features: 1, count: 1, ..Ask::default() }, 512);
    let after = d.good(0, &Ask { command: 0x25, lba: 7, count: 18, ..Ask::default() }, 18 * 512);
    assert_eq!((after[0], after[512], after[16 * 512], after[17 * 512]), (7, 0, 0, 24));
    // Beyond the end, and more than was agreed.
    ranges[..8].copy_from_slice(&(0xffffu64 << 48 | 0xffff_ffff_ffff).to_le_bytes());
    d.put(DATA, &ranges);
    for count in [1, 0, 9] {
        d.place(0, 0, &Ask { command: 6, features: 1, count, ..Ask::default() }, &[(DATA, 8191)]);
        assert_eq!(d.issue(0).unwrap().0 & 1, 1, "{count}");
    }
}

#[test]
fn what_is_not_on_the_disk_or_not_known_is_an_error() {
    let d = Driver::new();
    for (command, lba, count, error) in [
        (0x25, 2048, 1, 0x10),
        (0x25, 2047, 2, 0x10),
        (0x25, 0xffff_ffff_ffff, 0, 0x10),
        (0x35, 0, 0, 0x10),
        (0xf7, 0, 0, 4),
        (0xa0, 0, 0, 4),
    ] {
        d.place(0, 0, &Ask { command, lba, count, ..Ask::default() }, &[(DATA, 0x3f_ffff)]);
        assert_eq!(d.issue(0), Ok((0x41, error)), "{command:#x} {lba:#x} {count}");
    }
    d.works();
}

#[test]
fn settings_are_kept_and_told() {
    let d = Driver::new();
    d.good(0, &Ask { command: 0xef, features: 0x82, ..Ask::default() }, 0);
    d.good(0, &Ask { command: 0xc6, count: 8, ..Ask::default() }, 0);
    let id = d.good(0, &Ask { command: 0xec, ..Ask::default() }, 512);
    assert_eq!((word(&id, 85) & 0x20, word(&id, 59)), (0, 0x108));
    d.good(0, &Ask { command: 0xb0, features: 0xda, lba: 0xc2_4f00, ..Ask::default() }, 0);
    let smart = d.good(0, &Ask { command: 0xb0, features: 0xd0, lba: 0xc2_4f00, ..Ask::default() }, 512);
    assert_eq!(smart.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
    assert_eq!(word(&d.good(0, &Ask { command: 0x2f, lba: 0, count: 1, ..Ask::default() }, 512), 0x10), 1);
}

#[test]
fn a_cd_is_read() {
    let d = Driver::new();
    d.packet(&[0], 0);
    assert_eq!(d.packet(&[0x25], 8), [0, 0, 0, 10, 0, 0, 8, 0], "11 blocks of 2048");
    assert_eq!(d.packet(&[0x28, 0, 0, 0, 0, 2, 0, 0, 3], 6144)[2048], 12);
    let last = d.packet(&[0xa8, 0, 0, 0, 0, 10, 0, 0, 0, 1], 2048);
    assert_eq!((last[1023], last[1024], last[2047]), (41, 0, 0), "what the file lacks is zero");
    assert_eq!(d.sense(&[0x28, 0, 0, 0, 0, 11, 0, 0, 1]), (5, 0x21));
    assert_eq!(d.sense(&[0xa8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), (5, 0x21));
    assert_eq!(d.sense(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1]), (5, 0x20), "no writing");
    // By PIO, a block at a time.
    let packet: &[u8] = &[0x28, 0, 0, 0, 0, 0, 0, 0, 2];
    let bytes = d.good(1, &Ask { command: 0xa0, lba: 2048 << 8, packet, ..Ask::default() }, 4096);
    assert_eq!((bytes[0], bytes[4095], d.count(1)), (0, 7, 4096));
    assert_eq!(d.get(RECEIVED + 0x100 + 0x20, 1), [0x5f]);
    let toc = d.packet(&[0x43, 0, 0, 0, 0, 0, 0, 0, 20], 20);
    assert_eq!((toc[1], toc[6], toc[14], toc[19]), (18, 1, 0xaa, 11));
    assert_eq!(&d.packet(&[0x12, 0, 0, 0, 36], 36)[8..13], b"Lodge");
    let configuration = d.packet(&[0x46, 0, 0, 0, 0, 0, 0, 0, 255], 255);
    assert_eq!((configuration[7], d.count(1)), (8, 8 + 12 + 12 + 8 + 12 + 4 + 8 + 8), "a CD");
    assert_eq!(d.packet(&[0x5a, 0, 0x2a, 0, 0, 0, 0, 0, 64], 64)[8], 0x2a);
    assert_eq!(d.packet(&[0x1a, 0, 0x2a, 0, 32], 32)[4], 0x2a);
    assert_eq!(d.packet(&[0x51, 0, 0, 0, 0, 0, 0, 0, 34], 34)[2], 0xe);
    assert_eq!(d.sense(&[0x5a, 0, 0x17, 0, 0, 0, 0, 0, 64]), (5, 0x24));
}

#[test]
fn a_medium_that_is_locked_stays_in() {
    let d = Driver::new();
    d.packet(&[0x1e, 0, 0, 0, 1], 0);
    assert_eq!(d.sense(&[0x1b, 0, 0, 0, 2]), (5, 0x53));
    d.packet(&[0x1e, 0, 0, 0, 0], 0);
    d.packet(&[0x1b, 0, 0, 0, 2], 0);
    assert_eq!(d.packet(&[0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8], 8)[4..6], [3, 1], "it went out");
    assert_eq!(d.sense(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1]), (2, 0x3a));
    d.packet(&[0x1b, 0, 0, 0, 3], 0);
    assert_eq!(d.sense(&[0]), (6, 0x28), "it may be another");
    d.packet(&[0], 0);
}

#[test]
fn a_software_reset_shows_the_signature() {
    let d = Driver::new();
    for control in [4u8, 0] {
        d.place(1, 0, &Ask::default(), &[]);
        d.put(TABLES + 1, &[0]);
        d.put(TABLES + 15, &[control]);
        d.port_write(1, port::CI, 1);
        until("it is taken", || d.port(1, port::CI) == 0);
    }
    assert_eq!((d.port(1, port::SIG), d.port(1, port::TFD)), (0xeb14_0101, 0x100));
    assert_eq!(d.get(RECEIVED + 0x140, 1), [0x34]);
}

#[test]
fn addresses_beside_memory_stop_the_port_and_nothing_else() {
    type Break = fn(&Driver);
    let breaks: [(&str, u32, Break); 9] = [
        ("a list beside memory", is::BUS, |d| {
            d.port_write(0, port::CLBU, 0xffff_ffff);
        }),
        ("a list at the end of memory", is::BUS, |d| {
            d.port_write(0, port::CLBU, 0);
            d.port_write(0, port::CLB, MEMORY as u32);
        }),
        ("received FISes beside memory", is::BUS, |d| d.port_write(0, port::FBU, 77)),
        ("a table beside memory", is::BUS, |d| d.put(LIST + 8, &u64::MAX.to_le_bytes())),
        ("a table over the end", is::BUS, |d| {
            d.put(LIST + 2, &u16::MAX.to_le_bytes());
            d.put(LIST + 8, &(MEMORY - 0x1000).to_le_bytes());
            d.put(MEMORY - 0x1000, &d.get(TABLES, 0x200));
        }),
        ("data beside memory", is::BUS_DATA, |d| d.put(TABLES + 0x80, &u64::MAX.to_le_bytes())),
        ("data over the end", is::BUS_DATA, |d| d.put(TABLES + 0x80, &(MEMORY - 256).to_le_bytes())),
        ("no data", is::OVERFLOW, |d| d.put(LIST + 2, &[0, 0])),
        ("no FIS", is::PROTOCOL, |d| d.put(TABLES, &[0x34])),
    ];
    let d = Driver::new();
    for (what, why, spoil) in breaks {
        d.place(0, 0, &Ask { command: 0x25, lba: 7, count: 1, ..Ask::default() }, &[(DATA, 511)]);
        spoil(&d);
        d.port_write(0, port::CI, 1);
        until(what, || d.port(0, port::IS) & why != 0);
        assert_eq!(d.port(0, port::CI), 1, "{what}");
        d.port_write(0, port::CLBU, 0);
        d.port_write(0, port::FBU, 0);
        d.works();
    }
}

#[test]
fn pieces_of_every_size_and_number_are_read() {
    let d = Driver::new();
    // A list of pieces whose pieces are its own list, and as many as there can be.
    d.place(0, 0, &Ask { command: 0x25, lba: 0, count: 2048, ..Ask::default() }, &[(DATA, 0x3f_ffff)]);
    d.put(LIST + 2, &u16::MAX.to_le_bytes());
    d.put(LIST + 8, &(2u64 << 20).to_le_bytes());
    d.put(2 << 20, &d.get(TABLES, 0x80));
    for n in 0..0x1_0000u64 {
        d.put((2 << 20) + 0x80 + 16 * n, &(2u64 << 20 | 0x80).to_le_bytes());
        d.put((2 << 20) + 0x8c + 16 * n, &[31]);
    }
    d.issue(0).unwrap();
    assert_eq!(d.count(0), 1 << 20);
    d.works();
}

#[test]
fn resets_in_the_middle_of_commands_leave_it_working() {
    let d = Driver::new();
    let mut random = Random::new();
    for n in 0..200 {
        d.place(0, 0, &Ask { command: 0x25, count: 2048, ..Ask::default() }, &[(DATA, 0xf_ffff)]);
        d.port_write(0, port::CI, 1);
        (0..random.below(2000)).for_each(|_| std::hint::spin_loop());
        match n % 3 {
            0 => d.begin(),
            1 => d.restart(0),
            _ => {
                d.port_write(0, port::SCTL, 1);
                d.port_write(0, port::SCTL, 0);
                until("the device comes back", || d.port(0, port::TFD) & 0x80 == 0);
                assert_eq!(d.port(0, port::IS) & is::CONNECTED, is::CONNECTED);
                d.restart(0);
            }
        }
        assert_eq!(d.port(0, port::CI), 0);
    }
    d.works();
}

#[test]
fn a_function_that_is_not_bus_master_waits() {
    let d = Driver::new();
    d.ahci.config().set(4, &[2]);
    d.place(0, 0, &Ask { command: 0xec, ..Ask::default() }, &[(DATA, 511)]);
    d.port_write(0, port::CI, 1);
    let state = d.ahci.state();
    assert_eq!(d.port(0, port::CI), 1);
    // Its state has the command in it, and whoever goes on from there does it.
    let other = Driver::new();
    other.put(LIST, &d.get(LIST, 32));
    other.put(TABLES, &d.get(TABLES, 0x90));
    other.ahci.set_state(&through_json(&state));
    until("the other does it", || other.port(0, port::CI) == 0);
    assert_eq!(word(&other.get(DATA, 512), 60), 2048);
    d.ahci.config().set(4, &[6]);
    d.ahci.config_written(4);
    until("it goes on", || d.port(0, port::CI) == 0);
}

#[test]
fn interrupts_stay_until_they_are_cleared() {
    let (line, probe) = crate::testing::probe();
    let d = Driver::new();
    d.ahci.config().connect(line, Arc::new(|| Box::new(|_| {})));
    d.good(0, &Ask { command: 0xea, ..Ask::default() }, 0);
    assert!(probe.level());
    d.write(host::IS, 1);
    assert!(probe.level(), "the port still asks");
    d.port_write(0, port::IS, u32::MAX);
    d.write(host::IS, 1);
    assert!(!probe.level());
}

#[test]
fn registers_survive_everything() {
    struct Bar(Arc<Ahci>);
    impl machine::Registers for Bar {
        fn read(&self, offset: u64, size: u8) -> u64 {
            self.0.read_bar(ABAR, offset, size)
        }
        fn write(&self, offset: u64, size: u8, value: u64) {
            self.0.write_bar(ABAR, offset, size, value);
        }
    }
    let d = Driver::new();
    crate::testing::batter(&Bar(d.ahci.clone()), 0x1000, 100_000, None);
    d.ahci.set_state(&through_json(&d.ahci.state()));
    d.begin();
    d.works();
}
