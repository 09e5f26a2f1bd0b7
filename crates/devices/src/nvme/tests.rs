//! A driver by hand, well-behaved and not.

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{Random, batter, through_json, until};

const MEMORY: u64 = 8 << 20;
const DISK: u64 = 2 << 20;
/// Of queue n: where its entries are.
const SUBMISSIONS: u64 = 0x1_0000;
const COMPLETIONS: u64 = 0x2_0000;
const LIST: u64 = 0x3_0000;
const DATA: u64 = 0x20_0000;
const ENTRIES: u32 = 8;

const ENABLE: u32 = 0x46_0001;
const FATAL: u32 = 2;

struct Driver {
    nvme: Arc<Nvme>,
    memory: Memory,
    /// By queue: tail, head, phase.
    tails: [u32; 3],
    heads: [u32; 3],
    phases: [bool; 3],
    _file: tempfile::NamedTempFile,
}

#[derive(Clone, Copy, Default)]
struct Ask {
    opcode: u8,
    namespace: u32,
    prp: [u64; 2],
    words: [u32; 6],
}

impl Ask {
    fn admin(opcode: u8, words: [u32; 2]) -> Self {
        Self { opcode, prp: [DATA, 0], words: [words[0], words[1], 0, 0, 0, 0], ..Self::default() }
    }

    /// So many sectors from `first` on, at [`DATA`].
    fn io(opcode: u8, first: u64, count: u32) -> Self {
        let words = [first as u32, (first >> 32) as u32, count.wrapping_sub(1), 0, 0, 0];
        Self { opcode, namespace: 1, prp: [DATA, DATA + 4096], words }
    }
}

impl Driver {
    /// A controller that is ready, with two I/O queues.
    fn new() -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..DISK).map(|n| (n / 512) as u8).collect();
        std::fs::write(file.path(), bytes).unwrap();
        let options = disks::Options { format: Some(disks::Format::Raw), ..Default::default() };
        let disk = Arc::new(disks::Disk::open(file.path(), &options).unwrap());
        let memory = Memory::new(MEMORY, 0).unwrap();
        let nvme = Nvme::new(disk, "serial-1", 2, memory.clone()).unwrap();
        nvme.config().set(4, &[6]);
        nvme.config_written(4);
        let mut this = Self { nvme, memory, tails: [0; 3], heads: [0; 3], phases: [true; 3], _file: file };
        this.begin();
        this
    }

    /// Resets the controller and makes the queues.
    fn begin(&mut self) {
        self.reset();
        for n in 1..=2 {
            let queue = (ENTRIES - 1) << 16 | n;
            let at = 0x1000 * u64::from(n);
            self.good(0, Ask { prp: [COMPLETIONS + at, 0], ..Ask::admin(5, [queue, n << 16 | 3]) });
            self.good(0, Ask { prp: [SUBMISSIONS + at, 0], ..Ask::admin(1, [queue, n << 16 | 1]) });
        }
    }

    fn reset(&mut self) {
        self.write(reg::CC, 0);
        self.until("it stops", |d| d.read(reg::CSTS) & 1 == 0);
        (self.tails, self.heads, self.phases) = ([0; 3], [0; 3], [true; 3]);
        self.put(COMPLETIONS, &[0; 0x3000]);
        self.write(reg::AQA, (ENTRIES - 1) << 16 | (ENTRIES - 1));
        self.nvme.write_bar(0, reg::ASQ, 8, SUBMISSIONS);
        self.nvme.write_bar(0, reg::ACQ, 8, COMPLETIONS);
        self.write(reg::CC, ENABLE);
        self.until("it is ready", |d| d.read(reg::CSTS) == 1);
    }

    fn read(&self, at: u64) -> u32 {
        self.nvme.read_bar(0, at, 4) as u32
    }

    fn write(&self, at: u64, value: u32) {
        self.nvme.write_bar(0, at, 4, value.into());
    }

    fn doorbell(&self, n: usize, of_completions: bool, value: u32) {
        self.write(reg::DOORBELLS + 8 * n as u64 + if of_completions { 4 } else { 0 }, value);
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.guest().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.guest().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    #[track_caller]
    fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        until(what, || done(self));
    }

    /// Puts a command into queue `n`, of which the device learns later.
    fn place(&mut self, n: usize, ask: &Ask) {
        let mut entry = [0; 64];
        entry[0] = ask.opcode;
        entry[2..4].copy_from_slice(&(self.tails[n] as u16).to_le_bytes());
        entry[4..8].copy_from_slice(&ask.namespace.to_le_bytes());
        entry[24..32].copy_from_slice(&ask.prp[0].to_le_bytes());
        entry[32..40].copy_from_slice(&ask.prp[1].to_le_bytes());
        for (at, word) in (40..).step_by(4).zip(ask.words) {
            entry[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        self.put(SUBMISSIONS + 0x1000 * n as u64 + 64 * u64::from(self.tails[n]), &entry);
        self.tails[n] = (self.tails[n] + 1) % ENTRIES;
    }

    /// Waits for the next completion of queue `n`: gives identifier, status and result.
    #[track_caller]
    fn completion(&mut self, n: usize) -> (u16, u16, u32) {
        let at = COMPLETIONS + 0x1000 * n as u64 + 16 * u64::from(self.heads[n]);
        let phase = self.phases[n];
        self.until("the command ends", |d| d.get(at + 14, 1)[0] & 1 == u8::from(phase));
        let entry = self.get(at, 16);
        self.heads[n] = (self.heads[n] + 1) % ENTRIES;
        self.phases[n] ^= self.heads[n] == 0;
        self.doorbell(n, true, self.heads[n]);
        let word = |at| u16::from_le_bytes([entry[at], entry[at + 1]]);
        (word(12), word(14) >> 1, u32::from_le_bytes(entry[..4].try_into().unwrap()))
    }

    /// Issues a command and gives status, without "do not retry", and result.
    #[track_caller]
    fn issue(&mut self, n: usize, ask: Ask) -> (u16, u32) {
        self.place(n, &ask);
        self.doorbell(n, false, self.tails[n]);
        let (_, status, result) = self.completion(n);
        (status & 0x7ff, result)
    }

    #[track_caller]
    fn good(&mut self, n: usize, ask: Ask) -> u32 {
        let (status, result) = self.issue(n, ask);
        assert_eq!(status, 0, "command {:#x} {:x?}", ask.opcode, ask.words);
        result
    }

    /// It works after a reset, whatever was before.
    fn works(&mut self) {
        self.begin();
        self.good(1, Ask::io(2, 7, 1));
        assert_eq!(self.get(DATA, 2), [7, 7]);
    }
}

#[test]
fn it_says_what_it_is() {
    let mut d = Driver::new();
    assert_eq!(d.nvme.read_bar(0, reg::CAP, 8) >> 37 & 1, 1, "the NVM command set");
    d.good(0, Ask::admin(6, [1, 0]));
    let id = d.get(DATA, 4096);
    assert_eq!((&id[4..12], id[512], id[513], id[516]), (&b"serial-1"[..], 0x66, 0x44, 1));
    d.good(0, Ask { namespace: 1, ..Ask::admin(6, [0, 0]) });
    assert_eq!(d.get(DATA, 2), [0, 0x10], "4096 sectors");
    assert_eq!(d.get(DATA + 128, 4), [0, 0, 9, 0]);
    d.good(0, Ask::admin(6, [2, 0]));
    assert_eq!(d.get(DATA, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
    d.good(0, Ask { namespace: 1, ..Ask::admin(6, [3, 0]) });
    assert_eq!(d.good(0, Ask::admin(9, [7, 0xff_00ff])), 0x1_0001, "two queues of each kind");
    d.good(0, Ask::admin(2, [127 << 16 | 2, 0]));
    assert_eq!(d.get(DATA + 3, 1), [100], "all spare blocks are left");
    d.good(0, Ask::admin(9, [4, 400]));
    assert_eq!(d.good(0, Ask::admin(10, [4, 0])), 400);
    assert_eq!(d.good(0, Ask::admin(10, [0x104, 0])), 343, "the default");
}

#[test]
fn bytes_go_there_and_back() {
    let mut d = Driver::new();
    for (n, count) in [(1, 1), (2, 8), (1, 16)] {
        let len = 512 * count as usize;
        d.put(DATA, &vec![0x40 + count as u8; len]);
        d.good(n, Ask::io(1, 100, count));
        d.good(n, Ask::io(0, 0, 1));
        d.put(DATA, &vec![0; len]);
        d.good(n, Ask::io(2, 100, count));
        assert!(d.get(DATA, len).iter().all(|&b| b == 0x40 + count as u8), "{count}");
    }
    // Through a list that goes on in another page, to pages in disorder, from an odd place on.
    let pages = 64u64;
    let entries = 3;
    for n in 0..pages {
        let at = if n < entries {
            LIST + 4096 - 8 * (entries + 1) + 8 * n
        } else {
            LIST + 4096 + 8 * (n - entries)
        };
        d.put(at, &(DATA + 4096 * (pages - n)).to_le_bytes());
    }
    d.put(LIST + 4096 - 8, &(LIST + 4096).to_le_bytes());
    let list = LIST + 4096 - 8 * (entries + 1);
    d.good(1, Ask { prp: [DATA + 512, list], ..Ask::io(2, 1000, 8 * pages as u32 + 7) });
    assert_eq!(d.get(DATA + 512, 1)[0], 1000u64 as u8);
    for n in 0..pages {
        assert_eq!(d.get(DATA + 4096 * (pages - n), 1)[0], (1000 + 7 + 8 * n) as u8, "page {n}");
    }
}

#[test]
fn sectors_are_zeroed_and_deallocated() {
    let mut d = Driver::new();
    d.good(1, Ask::io(8, 3, 2));
    let mut range = [0; 32];
    range[4..8].copy_from_slice(&8u32.to_le_bytes());
    range[8..16].copy_from_slice(&8u64.to_le_bytes());
    range[20..24].copy_from_slice(&1u32.to_le_bytes());
    range[24..32].copy_from_slice(&30u64.to_le_bytes());
    d.put(DATA, &range);
    d.good(1, Ask { namespace: 1, ..Ask::admin(9, [1, 4]) });
    d.good(1, Ask { prp: [DATA, LIST], ..Ask::io(2, 0, 8) });
    let first: Vec<u8> = d.get(DATA, 4096).chunks(512).map(|sector| sector[0]).collect();
    assert_eq!(first, [0, 1, 2, 0, 0, 5, 6, 7]);
    d.good(1, Ask { prp: [DATA, DATA + 4096], ..Ask::io(2, 8, 9) });
    assert_eq!((d.get(DATA + 7 * 512, 1)[0], d.get(DATA + 8 * 512, 1)[0]), (0, 16));
    // Beyond the end.
    range[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    d.put(DATA, &range);
    assert_eq!(d.issue(1, Ask { namespace: 1, ..Ask::admin(9, [1, 4]) }).0, 0x80);
}

#[test]
fn commands_that_make_no_sense_have_an_error_status() {
    let mut d = Driver::new();
    let io = Ask::io;
    let asks: [(&str, u16, Ask); 15] = [
        ("an unknown command", 1, io(0x7f, 0, 1)),
        ("no namespace", 0xb, Ask { namespace: 0, ..io(2, 0, 1) }),
        ("another namespace", 0xb, Ask { namespace: 2, ..io(2, 0, 1) }),
        ("all namespaces", 0xb, Ask { namespace: u32::MAX, ..io(2, 0, 1) }),
        ("a sector beyond the end", 0x80, io(2, 4096, 1)),
        ("sectors over the end", 0x80, io(1, 4095, 2)),
        ("sectors that wrap around", 0x80, io(2, u64::MAX, 2)),
        ("zeroes beyond the end", 0x80, io(8, 0, 0)),
        ("an odd address", 0x13, Ask { prp: [DATA + 1, 0], ..io(2, 0, 1) }),
        ("an odd second address", 0x13, Ask { prp: [DATA, DATA + 8], ..io(2, 0, 16) }),
        ("an odd list", 0x13, Ask { prp: [DATA, LIST + 4], ..io(2, 0, 32) }),
        ("data beside memory", 4, Ask { prp: [MEMORY, 0], ..io(2, 0, 1) }),
        ("data at the end of everything", 4, Ask { prp: [u64::MAX - 3, 0], ..io(2, 0, 1) }),
        ("a list beside memory", 4, Ask { prp: [DATA, u64::MAX - 7], ..io(2, 0, 32) }),
        ("more than was agreed", 2, io(2, 0, 2049)),
    ];
    for (what, status, ask) in asks {
        assert_eq!(d.issue(1, ask).0, status, "{what}");
    }
    // A list that leads to itself is a list all the same.
    (0..512).for_each(|n| d.put(LIST + 8 * n, &LIST.to_le_bytes()));
    d.good(1, Ask { prp: [DATA, LIST + 0xff8], ..io(2, 0, 2048) });
    let admin: [(&str, u16, Ask); 16] = [
        ("an unknown command", 1, Ask::admin(0x77, [0, 0])),
        ("an unknown page", 2, Ask::admin(6, [0x1c, 0])),
        ("no such namespace", 0xb, Ask { namespace: 5, ..Ask::admin(6, [0, 0]) }),
        ("an unknown log", 0x109, Ask::admin(2, [0x70, 0])),
        ("a log of 16 GiB", 2, Ask::admin(2, [0xffff_0002, 0xffff])),
        ("an unknown feature", 2, Ask::admin(10, [0xff, 0])),
        ("a feature to keep", 0x10d, Ask::admin(9, [1 << 31 | 4, 0])),
        ("a queue 0", 0x101, Ask::admin(5, [7 << 16, 3])),
        ("a queue that there is", 0x101, Ask::admin(5, [7 << 16 | 1, 3])),
        ("a queue too many", 0x101, Ask::admin(1, [7 << 16 | 9, 3])),
        ("a queue that is in use", 0x10c, Ask::admin(4, [1, 0])),
        ("a queue that is not there", 0x101, Ask::admin(0, [7, 0])),
        ("its own queue", 0x101, Ask::admin(0, [0, 0])),
        ("a transfer beside memory", 4, Ask { prp: [MEMORY, 0], ..Ask::admin(6, [1, 0]) }),
        ("a fused command", 1, Ask::admin(0x18, [0, 0])),
        ("no power state", 2, Ask::admin(9, [2, 3])),
    ];
    for (what, status, ask) in admin {
        assert_eq!(d.issue(0, ask).0, status, "{what}");
    }
    for n in 1..=2 {
        d.good(0, Ask::admin(0, [n, 0]));
        d.good(0, Ask::admin(4, [n, 0]));
    }
    for (what, status, ask) in [
        ("no entries", 0x102, Ask::admin(5, [1, 3])),
        ("too many entries", 0x102, Ask::admin(5, [0xffff << 16 | 1, 3])),
        ("a queue in pieces", 2, Ask::admin(5, [7 << 16 | 1, 2])),
        ("a vector too many", 0x108, Ask::admin(5, [7 << 16 | 1, 3 << 16 | 3])),
        ("an odd queue", 0x13, Ask { prp: [DATA + 64, 0], ..Ask::admin(5, [7 << 16 | 1, 3]) }),
        ("no completion queue", 0x100, Ask::admin(1, [7 << 16 | 1, 1 << 16 | 1])),
        ("that of administration", 0x100, Ask::admin(1, [7 << 16 | 1, 1])),
    ] {
        assert_eq!(d.issue(0, ask).0, status, "{what}");
    }
    d.works();
}

#[test]
fn what_cannot_be_told_otherwise_is_fatal_until_a_reset() {
    type Break = fn(&mut Driver);
    let breaks: [(&str, Break); 7] = [
        ("a tail beyond the end", |d| d.doorbell(1, false, ENTRIES)),
        ("a head beyond the end", |d| d.doorbell(2, true, u32::MAX)),
        ("a submission queue beside memory", |d| {
            d.good(0, Ask::admin(0, [1, 0]));
            d.good(0, Ask { prp: [MEMORY, 0], ..Ask::admin(1, [7 << 16 | 1, 1 << 16 | 1]) });
            d.doorbell(1, false, 1);
        }),
        ("a completion queue beside memory", |d| {
            d.good(0, Ask::admin(0, [1, 0]));
            d.good(0, Ask::admin(4, [1, 0]));
            d.good(0, Ask { prp: [!0xfff, 0], ..Ask::admin(5, [7 << 16 | 1, 3]) });
            d.good(0, Ask { prp: [SUBMISSIONS, 0], ..Ask::admin(1, [7 << 16 | 1, 1 << 16 | 1]) });
            d.doorbell(1, false, 1);
        }),
        ("a queue of administration of one entry", |d| {
            d.write(reg::CC, 0);
            d.write(reg::AQA, 7 << 16);
            d.write(reg::CC, ENABLE);
        }),
        ("pages of another size", |d| {
            d.write(reg::CC, 0);
            d.write(reg::CC, ENABLE | 1 << 7);
        }),
        ("administration beside memory", |d| {
            d.write(reg::CC, 0);
            d.write(reg::ASQ + 4, 1);
            d.write(reg::CC, ENABLE);
            d.doorbell(0, false, 1);
        }),
    ];
    let mut d = Driver::new();
    for (what, spoil) in breaks {
        spoil(&mut d);
        d.until(what, |d| d.read(reg::CSTS) & FATAL != 0);
        d.works();
    }
    // Doorbells of no queue are nothing.
    (3..64).for_each(|n| d.doorbell(n, false, 1));
    assert_eq!(d.read(reg::CSTS), 1);
    d.good(1, Ask::io(2, 0, 1));
}

#[test]
fn a_full_completion_queue_makes_commands_wait() {
    let mut d = Driver::new();
    // Two submission queues to one completion queue.
    d.good(0, Ask::admin(0, [2, 0]));
    d.good(0, Ask { prp: [SUBMISSIONS + 0x2000, 0], ..Ask::admin(1, [7 << 16 | 2, 1 << 16 | 1]) });
    d.tails[2] = 0;
    for n in [1, 2] {
        (0..7).for_each(|k| d.place(n, &Ask::io(2, k, 1)));
        d.doorbell(n, false, d.tails[n]);
    }
    let mut seen = [0; 3];
    for _ in 0..14 {
        let at = COMPLETIONS + 0x1000 + 16 * u64::from(d.heads[1]);
        let (_, status, _) = d.completion(1);
        assert_eq!(status, 0);
        seen[usize::from(d.get(at + 10, 1)[0])] += 1;
    }
    assert_eq!(seen, [0, 7, 7]);
}

#[test]
fn event_requests_wait_and_too_many_are_refused() {
    let mut d = Driver::new();
    for _ in 0..4 {
        d.place(0, &Ask::admin(0xc, [0, 0]));
    }
    d.doorbell(0, false, d.tails[0]);
    assert_eq!(d.issue(0, Ask::admin(0xc, [0, 0])).0, 0x105);
    assert_eq!(d.good(0, Ask::admin(8, [0, 0])), 1, "it is too late for an abort");
}

#[test]
fn a_shutdown_flushes_and_a_pin_follows_the_queues() {
    let (line, probe) = crate::testing::probe();
    let mut d = Driver::new();
    d.nvme.config().connect(line, Arc::new(|| Box::new(|_| {})));
    d.place(1, &Ask::io(0, 0, 1));
    d.doorbell(1, false, d.tails[1]);
    d.until("the pin rises", |_| probe.level());
    d.write(reg::INTMS, 2);
    assert!(!probe.level(), "masked");
    d.write(reg::INTMC, 2);
    assert!(probe.level());
    d.completion(1);
    assert!(!probe.level(), "all is read");
    d.write(reg::CC, ENABLE | 1 << 14);
    d.until("it is shut down", |d| d.read(reg::CSTS) >> 2 & 3 == 2);
    d.works();
}

#[test]
fn resets_and_deletions_in_the_middle_of_commands_leave_it_working() {
    let mut d = Driver::new();
    let mut random = Random::new();
    (0..512).for_each(|n| d.put(LIST + 8 * n, &(DATA + 4096 * (n % 256)).to_le_bytes()));
    for n in 0..200 {
        for queue in [1, 2] {
            (0..4).for_each(|_| d.place(queue, &Ask { prp: [DATA, LIST], ..Ask::io(2, 0, 2048) }));
            d.doorbell(queue, false, d.tails[queue]);
        }
        (0..random.below(3000)).for_each(|_| std::hint::spin_loop());
        if n % 2 == 0 {
            d.good(0, Ask::admin(0, [1, 0]));
            d.good(0, Ask::admin(4, [1, 0]));
        }
        d.begin();
    }
    d.works();
}

#[test]
fn its_state_goes_from_one_to_another() {
    let mut one = Driver::new();
    one.good(1, Ask::io(2, 7, 1));
    one.nvme.config().set(4, &[2]);
    one.place(2, &Ask::io(2, 9, 1));
    one.doorbell(2, false, one.tails[2]);
    let state = through_json(&one.nvme.state());
    let mut other = Driver::new();
    for at in [SUBMISSIONS, COMPLETIONS] {
        other.put(at, &one.get(at, 0x3000));
    }
    (other.tails, other.heads, other.phases) = (one.tails, one.heads, one.phases);
    other.nvme.set_state(&state);
    assert_eq!(other.completion(2).1, 0, "what waited is done");
    assert_eq!(other.get(DATA, 1), [9]);
    other.good(1, Ask::io(2, 8, 1));
    // What cannot be is fatal, and no more than that.
    let mut json = serde_json::to_value(&state).unwrap();
    json["state"]["registers"]["submissions"][1]["tail"] = 100_000.into();
    other.nvme.set_state(&serde_json::from_value(json).unwrap());
    assert_ne!(other.read(reg::CSTS) & FATAL, 0);
    other.works();
}

#[test]
fn a_shutdown_of_what_is_disabled_is_over_when_it_is_enabled() {
    let mut d = Driver::new();
    d.write(reg::CC, 0);
    d.write(reg::CC, 1 << 14);
    d.until("it has shut down", |d| d.read(reg::CSTS) == 2 << 2);
    d.works();
}

#[test]
fn registers_survive_everything() {
    struct Registers(Arc<Nvme>);
    impl machine::Registers for Registers {
        fn read(&self, offset: u64, size: u8) -> u64 {
            self.0.read_bar(0, offset, size)
        }
        fn write(&self, offset: u64, size: u8, value: u64) {
            self.0.write_bar(0, offset, size, value);
        }
    }
    let mut d = Driver::new();
    let registers = Registers(d.nvme.clone());
    for _ in 0..20 {
        batter(&registers, 0x1100, 5_000, None);
        d.begin();
    }
    d.works();
}
