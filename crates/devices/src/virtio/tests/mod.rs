//! A driver by hand, well-behaved and not.

mod gpu;
mod hostile;
mod input;
mod packed;

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use machine::Memory;
use vm_memory::{Bytes, GuestAddress};

use super::blk::Blk;
use super::{Broken, Device, In, Out, Pci, Wires};
use crate::pci::Function;
use crate::testing::until;

const DESCRIPTORS: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x1_1000;
const USED: u64 = 0x1_2000;
const DATA: u64 = 0x2_0000;
const WRITE: u16 = 2;
const NEXT: u16 = 1;
const NEEDS_RESET: u64 = 0x40;

/// Parts of the BAR.
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;

struct Driver {
    pci: Arc<Pci>,
    memory: Memory,
    requests: u16,
    _file: Option<tempfile::NamedTempFile>,
}

impl Driver {
    /// A driver for a disk of 1 MiB, up to the point where queues are set up.
    fn new() -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let options = disks::Options { format: Some(disks::Format::Raw), ..Default::default() };
        let disk = Arc::new(disks::Disk::open(file.path(), &options).unwrap());
        let memory = Memory::new(4 << 20, 0).unwrap();
        Self::of(Arc::new(Blk::new(disk, "test", 2)), memory, Some(file))
    }

    fn of(device: Arc<dyn Device>, memory: Memory, file: Option<tempfile::NamedTempFile>) -> Self {
        let pci = Pci::new(device, memory.clone()).unwrap();
        // Memory and bus master.
        pci.config().set(4, &[6]);
        let this = Self { pci, memory, requests: 0, _file: file };
        this.features();
        this
    }

    fn features(&self) {
        self.status(0);
        self.status(3);
        self.write(8, 4, 1);
        self.write(0xc, 4, 1);
        self.status(11);
        assert_eq!(self.read(0x14, 1), 11, "features are accepted");
    }

    fn ready() -> Self {
        let this = Self::new();
        this.enable(256);
        this.status(15);
        this
    }

    fn read(&self, at: u64, size: u8) -> u64 {
        self.pci.read_bar(0, COMMON + at, size)
    }

    fn write(&self, at: u64, size: u8, value: u64) {
        self.pci.write_bar(0, COMMON + at, size, value);
    }

    fn status(&self, value: u64) {
        self.write(0x14, 1, value);
    }

    fn enable(&self, size: u64) {
        self.write(0x16, 2, 0);
        self.write(0x18, 2, size);
        for (at, address) in [(0x20, DESCRIPTORS), (0x28, AVAILABLE), (0x30, USED)] {
            self.write(at, 4, address);
            self.write(at + 4, 4, 0);
        }
        self.write(0x1c, 2, 1);
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.guest().write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.guest().read_obj(GuestAddress(at)).unwrap()
    }

    fn descriptor(&self, n: u64, address: u64, len: u32, flags: u16, next: u16) {
        let at = DESCRIPTORS + 16 * n;
        self.put(at, address);
        self.put(at + 8, len);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    /// Offers the chain that begins at descriptor 0, and waits until the device is done with it or has given up.
    fn offer(&mut self) -> bool {
        self.put(AVAILABLE + 4 + 2 * u64::from(self.requests % 256), 0u16);
        self.requests += 1;
        self.announce(self.requests);
        let patience = Instant::now() + Duration::from_secs(20);
        loop {
            if self.read(0x14, 1) & NEEDS_RESET != 0 {
                return false;
            }
            if self.get::<u16>(USED + 2) == self.requests {
                return true;
            }
            assert!(Instant::now() < patience, "the device neither serves the request nor gives up");
            std::thread::yield_now();
        }
    }

    fn announce(&self, index: u16) {
        self.put(AVAILABLE + 2, index);
        self.pci.write_bar(0, NOTIFY, 2, 0);
    }

    /// A request with one piece of data; gives the status, or `None` if the device gave up.
    fn request(&mut self, kind: u32, sector: u64, len: u32, to_device: bool) -> Option<u8> {
        self.put(DATA, kind);
        self.put(DATA + 4, 0u32);
        self.put(DATA + 8, sector);
        self.put(DATA + 0xff0, 0xffu8);
        self.descriptor(0, DATA, 16, NEXT, 1);
        self.descriptor(1, DATA + 0x1000, len, NEXT | if to_device { 0 } else { WRITE }, 2);
        self.descriptor(2, DATA + 0xff0, 1, WRITE, 0);
        self.offer().then(|| self.get(DATA + 0xff0))
    }

    /// The device works after a reset, whatever was before.
    fn recovers(mut self) {
        self.features();
        self.put(AVAILABLE, [0u8; 6]);
        self.put(USED, [0u8; 8]);
        self.requests = 0;
        self.enable(256);
        self.status(15);
        assert_eq!(self.request(0, 0, 512, false), Some(0));
    }
}

#[test]
fn bytes_go_there_and_back() {
    let mut d = Driver::ready();
    assert_eq!(d.pci.read_bar(0, CONFIG, 8), 2048, "sectors");
    d.memory.guest().write_slice(&[0x5a; 1024], GuestAddress(DATA + 0x1000)).unwrap();
    assert_eq!(d.request(1, 3, 1024, true), Some(0));
    d.memory.guest().write_slice(&[0; 1024], GuestAddress(DATA + 0x1000)).unwrap();
    assert_eq!(d.request(0, 4, 512, false), Some(0));
    assert_eq!(d.get::<u64>(DATA + 0x1000), 0x5a5a_5a5a_5a5a_5a5a);
    assert_eq!(d.get::<u32>(USED + 4 + 8 + 4), 513, "bytes written: data and status");
}

#[test]
fn what_is_not_on_the_disk_is_an_error_and_what_is_not_known_unsupported() {
    let mut d = Driver::ready();
    for (kind, sector, len) in [(0, 2047, 1024), (0, u64::MAX, 512), (0, 0, 511), (11, 0, 17), (11, 0, 4096)]
    {
        let to_device = kind == 11;
        assert_ne!(d.request(kind, sector, len, to_device), Some(0), "{kind} {sector} {len}");
        if d.read(0x14, 1) & NEEDS_RESET != 0 {
            d = Driver::ready();
        }
    }
    assert_eq!(d.request(77, 0, 512, false), Some(2));
    assert_eq!(d.request(0, 0, 512, false), Some(0), "and it goes on");
}

#[test]
fn broken_chains_need_a_reset_and_nothing_else() {
    type Break = fn(&mut Driver);
    let breaks: [(&str, Break); 7] = [
        ("a loop", |d| d.descriptor(0, DATA, 16, NEXT, 0)),
        ("no header", |d| d.descriptor(0, DATA, 8, 0, 0)),
        ("nowhere to write", |d| d.descriptor(0, DATA, 16, 0, 0)),
        ("beyond memory", |d| {
            d.descriptor(0, DATA, 16, NEXT, 1);
            d.descriptor(1, u64::MAX - 100, 512, NEXT | WRITE, 2);
            d.descriptor(2, DATA, 1, WRITE, 0);
        }),
        ("more than memory", |d| {
            d.descriptor(0, DATA, 16, NEXT, 1);
            d.descriptor(1, DATA, u32::MAX, NEXT | WRITE, 2);
            d.descriptor(2, DATA, 1, WRITE, 0);
        }),
        ("a next that is none", |d| {
            d.descriptor(0, DATA, 16, NEXT, 0xfff0);
        }),
        ("a table of descriptors in nowhere", |d| d.descriptor(0, 0xffff_ffff_0000, 64, 4, 0)),
    ];
    for (what, spoil) in breaks {
        let mut d = Driver::ready();
        spoil(&mut d);
        assert!(!d.offer(), "{what}");
        d.recovers();
    }
}

#[test]
fn an_index_that_runs_away_needs_a_reset() {
    let d = Driver::ready();
    d.announce(40000);
    until("the device says that it needs a reset", || d.read(0x14, 1) & NEEDS_RESET != 0);
    d.recovers();
}

#[test]
fn queues_that_cannot_be_are_not_enabled() {
    for size in [0, 3, 512, 32768] {
        let d = Driver::new();
        d.enable(size);
        // A size beyond what can be leaves the one that was; split rings have powers of two.
        let kept = if size == 3 { 3 } else { 256 };
        assert_eq!((d.read(0x18, 2), d.read(0x1c, 2)), (kept, u64::from(size != 3)), "{size}");
    }
    let d = Driver::new();
    for (at, address) in [(0x20, 0x1000_0000), (0x28, AVAILABLE), (0x30, USED)] {
        d.write(at, 8, address);
    }
    d.write(0x1c, 2, 1);
    assert_eq!(d.read(0x1c, 2), 0, "rings beside memory");
}

#[test]
fn resets_in_the_middle_of_requests_leave_it_working() {
    let mut d = Driver::ready();
    for _ in 0..200 {
        d.put(DATA, 0u32);
        d.descriptor(0, DATA, 16, NEXT, 1);
        d.descriptor(1, DATA + 0x1000, 1 << 20, NEXT | WRITE, 2);
        d.descriptor(2, DATA + 0xff0, 1, WRITE, 0);
        d.announce(1);
        d.status(0);
        let after: u16 = d.get(USED + 2);
        assert_eq!(d.read(0x14, 1), 0);
        d.features();
        d.put(USED, [0u8; 8]);
        d.put(AVAILABLE, [0u8; 6]);
        d.enable(256);
        d.status(15);
        assert!(after <= 1);
    }
    d.requests = 0;
    assert_eq!(d.request(0, 0, 512, false), Some(0));
}

#[test]
fn its_state_goes_from_one_to_another() {
    let mut one = Driver::ready();
    assert_eq!(one.request(0, 0, 512, false), Some(0));
    let state = serde_json::to_string(&one.pci.state()).unwrap();
    let mut other = Driver::new();
    other.memory.guest().write_slice(&[0; 0x1000], GuestAddress(AVAILABLE)).unwrap();
    other.put(AVAILABLE + 2, 1u16);
    other.put(USED + 2, 1u16);
    other.requests = 1;
    other.pci.set_state(&serde_json::from_str(&state).unwrap());
    assert_eq!(other.request(0, 0, 512, false), Some(0));
}

#[test]
fn a_disk_has_queues_that_work_each_by_itself() {
    let mut d = Driver::ready();
    assert_eq!((d.read(0x12, 2), d.pci.read_bar(0, CONFIG + 34, 2)), (2, 2));
    assert_eq!(d.request(0, 0, 512, false), Some(0));
    // The second one, with its rings elsewhere, and the same request.
    let place = 0x4_0000;
    d.write(0x16, 2, 1);
    for (at, address) in [(0x20, DESCRIPTORS), (0x28, place), (0x30, place + 0x1000)] {
        d.write(at, 8, address);
    }
    d.write(0x1c, 2, 1);
    d.put(place + 2, 1u16);
    d.pci.write_bar(0, NOTIFY + 4, 2, 1);
    until("the second queue is served", || d.get::<u16>(place + 0x1002) == 1);
}

/// A device whose first request takes a while, and whose others wait for each other.
struct Pairs {
    first: AtomicBool,
    meet: (Mutex<u32>, Condvar),
}

impl Device for Pairs {
    fn kind(&self) -> u16 {
        2
    }
    fn class(&self) -> u32 {
        0x01_8000
    }
    fn features(&self) -> u64 {
        0
    }
    fn queues(&self) -> &[u16] {
        &[256]
    }
    fn threads(&self) -> usize {
        2
    }
    fn config(&self) -> Vec<u8> {
        vec![]
    }
    fn serve(&self, _: usize, _: In<'_>, _: Out<'_>) -> Result<usize, Broken> {
        if self.first.swap(false, Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
            return Ok(0);
        }
        let mut here = self.meet.0.lock().unwrap();
        *here += 1;
        self.meet.1.notify_all();
        let patience = Duration::from_secs(20);
        let (here, _) = self.meet.1.wait_timeout_while(here, patience, |here| *here < 2).unwrap();
        if *here < 2 { Err(Broken) } else { Ok(0) }
    }
}

#[test]
fn slow_requests_are_served_side_by_side() {
    let device = Pairs { first: AtomicBool::new(true), meet: Default::default() };
    let mut d = Driver::of(Arc::new(device), Memory::new(4 << 20, 0).unwrap(), None);
    d.enable(256);
    d.status(15);
    d.descriptor(0, DATA, 16, 0, 0);
    assert!(d.offer());
    for n in [1, 2] {
        d.put(AVAILABLE + 4 + 2 * n, 0u16);
    }
    d.requests = 2;
    assert!(d.offer(), "neither waits for the other in vain");
}

/// A device that speaks first: what is said goes into the driver's buffers, and is counted in its configuration.
#[derive(Default)]
struct Speaker {
    wires: Mutex<Wires>,
    words: Mutex<Vec<u8>>,
    said: Mutex<u8>,
    asked: AtomicUsize,
    /// Features, and bytes that the driver wrote into the configuration.
    told: Mutex<(u64, Vec<u64>)>,
}

impl Speaker {
    fn say(&self, word: u8) {
        self.words.lock().unwrap().push(word);
        self.wires.lock().unwrap().kick(0);
    }
}

impl Device for Speaker {
    fn kind(&self) -> u16 {
        3
    }
    fn class(&self) -> u32 {
        0x07_8000
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn queues(&self) -> &[u16] {
        &[256]
    }
    fn config(&self) -> Vec<u8> {
        vec![*self.said.lock().unwrap()]
    }
    fn write_config(&self, offset: u64, size: u8, value: u64) {
        self.told.lock().unwrap().1.extend([offset, size.into(), value]);
    }
    fn connect(&self, wires: Wires) {
        *self.wires.lock().unwrap() = wires;
    }
    fn set_features(&self, features: u64) {
        self.told.lock().unwrap().0 = features;
    }
    fn reset(&self) {
        *self.said.lock().unwrap() = 0;
        *self.told.lock().unwrap() = Default::default();
    }
    fn ready(&self, _: usize) -> bool {
        self.asked.fetch_add(1, Ordering::SeqCst);
        !self.words.lock().unwrap().is_empty()
    }
    fn serve(&self, _: usize, _: In<'_>, mut answer: Out<'_>) -> Result<usize, Broken> {
        let word = self.words.lock().unwrap().remove(0);
        answer.write_all(&[word]).map_err(|_| Broken)?;
        *self.said.lock().unwrap() += 1;
        self.wires.lock().unwrap().config_changed();
        Ok(1)
    }
}

#[test]
fn a_device_speaks_when_it_has_something_to_say() {
    let device = Arc::new(Speaker::default());
    let d = Driver::of(device.clone(), Memory::new(4 << 20, 0).unwrap(), None);
    assert_eq!(*device.told.lock().unwrap(), (1 << 32, vec![]), "no more than the driver accepted");
    d.enable(256);
    d.status(15);
    d.descriptor(0, DATA, 16, WRITE, 0);
    d.put(AVAILABLE + 4, [0u16; 2]);
    // The thread is at its queue, and leaves the buffers alone.
    let asked = || device.asked.load(Ordering::SeqCst);
    let before = asked();
    d.announce(2);
    until("the queue's thread has looked", || asked() > before);
    assert_eq!((d.get::<u16>(USED + 2), d.read(0x15, 1)), (0, 0));
    device.say(b'a');
    until("it speaks", || d.get::<u16>(USED + 2) == 1 && d.read(0x15, 1) == 1);
    assert_eq!(d.get::<u8>(DATA), b'a');
    assert_eq!(d.pci.read_bar(0, ISR, 1) & 2, 2, "the configuration's interrupt");
    assert_eq!(d.pci.read_bar(0, CONFIG, 1), 1);
    device.say(b'b');
    until("it speaks again", || d.get::<u16>(USED + 2) == 2);
    // What is said without a buffer waits for one.
    device.say(b'c');
    d.put(AVAILABLE + 8, 0u16);
    d.announce(3);
    until("it says the rest", || d.get::<u16>(USED + 2) == 3);
    assert_eq!(d.get::<u8>(DATA), b'c');
}

#[test]
fn a_device_hears_of_features_writes_and_resets() {
    let device = Arc::new(Speaker::default());
    let d = Driver::of(device.clone(), Memory::new(4 << 20, 0).unwrap(), None);
    d.status(0);
    d.status(3);
    d.write(0xc, 4, 1 << 5);
    d.write(8, 4, 1);
    d.write(0xc, 4, 1);
    assert_eq!(device.told.lock().unwrap().0, 0, "before they are final");
    d.status(11);
    d.pci.write_bar(0, CONFIG + 4, 4, 77);
    assert_eq!(*device.told.lock().unwrap(), (1 << 32 | 1 << 5, vec![4, 4, 77]));
    d.status(0);
    assert_eq!(*device.told.lock().unwrap(), (0, vec![]));
    // Whoever has the wires still, and no device at their end, says it to nobody.
    let wires = device.wires.lock().unwrap().clone();
    wires.config_changed();
    drop(d);
    wires.kick(0);
    wires.config_changed();
}
