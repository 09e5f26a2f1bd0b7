use memory::{Memory, PLUG_ALIGN};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::until;
use crate::virtio::testing::Driver;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
/// Where the configuration has them.
const PLUGGED_SIZE: u64 = 40;
const REQUESTED_SIZE: u64 = 48;

struct Bed {
    d: Driver,
    memory: Memory,
    target: Arc<Target>,
    at: u64,
}

impl Bed {
    fn new() -> Self {
        let (memory, []) = Memory::with_pluggable(32 * MIB, 0, [], 2 * PLUG_ALIGN).unwrap();
        let target = Arc::new(Target::new(2 * PLUG_ALIGN));
        let device = Arc::new(Mem::new(memory.pluggable().unwrap(), target.clone()));
        let d = Driver::with(device, F_UNPLUGGED_INACCESSIBLE, memory.clone());
        let at = d.config(16, 8);
        Self { d, memory, target, at }
    }

    /// The answer's type and state.
    fn ask(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        let request =
            [&kind.to_le_bytes()[..], &[0; 6], &address.to_le_bytes(), &count.to_le_bytes(), &[0; 6]];
        let answer = self.d.call(0, &request.concat(), 16);
        assert_eq!(answer.len(), ANSWER);
        (le16(&answer, 0), le16(&answer, 8))
    }

    fn write(&self, address: u64) -> bool {
        self.memory.guest().write_slice(&[1; 4096], GuestAddress(address)).is_ok()
    }
}

#[test]
fn blocks_come_and_go_as_the_host_wants() {
    let mut b = Bed::new();
    let at = b.at;
    assert_eq!(
        (b.d.config(0, 8), at, b.d.config(24, 8), b.d.config(32, 8)),
        (BLOCK, 4 << 30, 256 * MIB, 256 * MIB)
    );
    assert_eq!(b.ask(PLUG, at, 1), (NACK, 0), "nobody wants it");
    b.target.set(8 * MIB - 1);
    assert_eq!((b.d.config(REQUESTED_SIZE, 8), b.d.read(0x1000, 1) & 2), (8 * MIB, 2), "and an interrupt");
    assert_eq!(b.ask(PLUG, at, 5), (NACK, 0), "too many");
    assert_eq!((b.ask(STATE, at, 128), b.write(at)), ((ACK, UNPLUGGED), false));
    assert_eq!(b.ask(PLUG, at + BLOCK, 4), (ACK, 0));
    assert_eq!((b.d.config(PLUGGED_SIZE, 8), b.target.plugged()), (8 * MIB, 8 * MIB));
    assert_eq!((b.ask(STATE, at + BLOCK, 4), b.ask(STATE, at, 2)), ((ACK, PLUGGED), (ACK, MIXED)));
    let empty = b.memory.held();
    assert!((at + BLOCK..at + 5 * BLOCK).step_by(4096).all(|page| b.write(page)));
    let held = |b: &Bed| (b.memory.held() - empty) / MIB; // but for what the driver has touched
    assert_eq!(held(&b), 8);
    // It may also give back what it is to have.
    assert_eq!(b.ask(UNPLUG, at + 2 * BLOCK, 2), (ACK, 0));
    assert_eq!((held(&b), b.target.plugged()), (4, 4 * MIB));
    assert!(!b.write(at + 2 * BLOCK) && b.write(at + 4 * BLOCK));
    b.target.set(0);
    assert_eq!(b.ask(PLUG, at, 1), (NACK, 0));
    assert_eq!(b.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!((held(&b), b.target.plugged()), (0, 0));
    b.target.set(u64::MAX);
    assert_eq!(b.target.requested(), 256 * MIB);
    assert_eq!((b.ask(PLUG, at, 128), b.target.plugged()), ((ACK, 0), 256 * MIB));
}

#[test]
fn a_hostile_guest_gets_nothing() {
    let mut b = Bed::new();
    let (at, end) = (b.at, b.at + 256 * MIB);
    b.target.set(256 * MIB);
    assert_eq!(b.ask(PLUG, at + 2 * BLOCK, 2), (ACK, 0));
    let outside =
        [(at, 0), (at, 129), (at, u16::MAX), (at + 4096, 1), (at - BLOCK, 1), (at - BLOCK, 2), (end, 1)];
    let outside = outside.into_iter().chain([
        (end - BLOCK, 2),
        (0, 1),
        (u64::MAX, 1),
        (0u64.wrapping_sub(BLOCK), u16::MAX),
    ]);
    for (address, count) in outside {
        for kind in [PLUG, UNPLUG, STATE] {
            assert_eq!(b.ask(kind, address, count), (ERROR, 0), "{kind} {address:x} {count}");
        }
    }
    // What is already, or is not, in part or all; and requests that there are not.
    for (kind, block, count) in [
        (PLUG, 1, 2),
        (PLUG, 2, 2),
        (PLUG, 3, 2),
        (UNPLUG, 1, 2),
        (UNPLUG, 3, 2),
        (UNPLUG, 0, 1),
        (4, 2, 1),
        (u16::MAX, 2, 1),
    ] {
        assert_eq!(b.ask(kind, at + block * BLOCK, count), (ERROR, 0), "{kind} {block} {count}");
    }
    assert_eq!((b.target.plugged(), b.ask(STATE, at + 2 * BLOCK, 2)), (4 * MIB, (ACK, PLUGGED)));
    // Half a request, and no room for an answer.
    for (len, room) in [(23, 16), (24, 9), (24, 0), (0, 16)] {
        b.d.offer(0, &vec![0; len], room);
        until("the device says that it needs a reset", || b.d.needs_reset());
        b.d.start(F_UNPLUGGED_INACCESSIBLE);
    }
    assert_eq!(b.target.plugged(), 4 * MIB, "nothing was done");
}

#[test]
fn what_is_plugged_stays_through_a_reset_of_the_device() {
    let mut b = Bed::new();
    b.target.set(4 * MIB);
    assert!(b.target.has_driver());
    assert_eq!(b.ask(PLUG, b.at, 2), (ACK, 0));
    assert!(b.write(b.at));
    b.d.write(0x14, 1, 0);
    assert!(!b.target.has_driver());
    // Also to a driver that knows no features.
    b.d.start(0);
    assert_eq!(b.memory.guest().read_obj::<u8>(GuestAddress(b.at)).unwrap(), 1);
    assert_eq!((b.d.config(PLUGGED_SIZE, 8), b.ask(UNPLUG, b.at, 2)), (4 * MIB, (ACK, 0)));
    // The machine's next device has a memory of its own, and the same target.
    let (target, old) = (b.target.clone(), b);
    let (memory, []) = Memory::with_pluggable(32 * MIB, 0, [], 2 * PLUG_ALIGN).unwrap();
    let next = Mem::new(memory.pluggable().unwrap(), target.clone());
    drop(old);
    assert_eq!((target.requested(), target.plugged()), (4 * MIB, 0));
    drop(next);
    assert!(!target.has_driver());
}
