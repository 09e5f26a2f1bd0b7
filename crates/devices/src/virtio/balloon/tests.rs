use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::until;
use crate::virtio::testing::Driver;

const ALL: u64 = F_STATS | F_DEFLATE_ON_OOM | F_REPORTING;
const RAM: u64 = 32 << 20;
/// Memory that the test fills and the guest gives back.
const SPARE: u64 = 16 << 20;
const SPARES: u64 = 8 << 20;

fn start(features: u64) -> (Driver, Arc<Target>) {
    let (memory, target) = (Memory::new(RAM, 0).unwrap(), Arc::new(Target::default()));
    memory.guest().write_slice(&vec![1; SPARES as usize], GuestAddress(SPARE)).unwrap();
    let d = Driver::with(Arc::new(Balloon::new(memory.clone(), target.clone())), features, memory);
    (d, target)
}

#[test]
fn pages_in_the_balloon_are_the_hosts() {
    let (mut d, target) = start(ALL);
    assert_eq!(d.config(0, 8), 0);
    target.set(Some(RAM - SPARES));
    assert_eq!((d.config(0, 4), d.read(0x1000, 1) & 2), (SPARES >> 12, 2), "and an interrupt");
    let before = target.held();
    let (memory, pages) = (d.memory.clone(), SPARE..SPARE + SPARES);
    let gone = || {
        let first = |page: u64| memory.guest().read_obj::<u8>(GuestAddress(page)).unwrap();
        pages.clone().step_by(4096).filter(|&page| first(page) == 0).count()
    };
    let first = (SPARE >> 12) as u32;
    // Upwards, downwards, and every other.
    let pages = (0..256).chain((256..512).rev()).chain((512..1024).step_by(2)).map(|n| first + n);
    let pages: Vec<u8> = pages.flat_map(u32::to_le_bytes).collect();
    d.call(0, &pages[..2048], 0);
    d.call(0, &pages[2048..], 0);
    assert!(before - target.held() > 760 << 12, "but for what the driver has touched");
    assert_eq!(gone(), 768);
    d.set_config(4, 4, 768);
    assert_eq!((target.ballooned(), d.config(4, 4)), (768 << 12, 768));
    // Taken out, they are the guest's again.
    d.call(1, &pages[..2048], 0);
    d.memory.guest().write_slice(&[1; 4096], GuestAddress(SPARE)).unwrap();
    assert_eq!(gone(), 767);
    // Pages that there are not, and half a number.
    d.call(0, &u32::MAX.to_le_bytes(), 0);
    d.offer(0, &[0; 6], 0);
    until("the device says that it needs a reset", || d.needs_reset());
    d.start(ALL);
    assert_eq!(target.ballooned(), 0, "the driver has forgotten them");
}

#[test]
fn reported_pages_are_the_hosts() {
    // A driver without statistics has the reports in the queue before.
    for (features, queue) in [(ALL, 3), (F_REPORTING, 2)] {
        let (mut d, target) = start(features);
        let before = target.held();
        let pieces = vec![(SPARE, 2 << 20, 2), (SPARE + (4 << 20), 1 << 20, 2)];
        d.offer_pieces(queue, pieces);
        assert!(d.wait(queue).is_empty());
        assert!(before - target.held() > (3 << 20) - (8 << 12), "but for what the driver has touched");
    }
}

#[test]
fn the_guest_tells_of_its_memory() {
    let (mut d, target) = start(ALL);
    let stats = |free: u64| {
        let all = [(4u16, free), (5, 5000), (0, 77), (6, 4000), (999, 1)];
        all.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect()
    };
    let old: Vec<u8> = stats(1);
    d.offer(2, &old, 0);
    assert_eq!(d.collect(2), None, "nobody has asked");
    let asked = target.clone();
    let asking = std::thread::spawn(move || asked.stats(Duration::from_secs(20)));
    d.wait(2);
    let new: Vec<u8> = stats(1234);
    d.call(2, &new, 0);
    let expected = Stats { free: Some(1234), total: Some(5000), available: Some(4000), caches: None };
    assert_eq!(asking.join().unwrap(), Some(expected));
    assert!(target.has_driver());
    // A driver that says nothing, and none.
    assert_eq!(target.stats(Duration::from_millis(1)), None);
    drop(d);
    assert_eq!((target.stats(Duration::from_secs(20)), target.has_driver(), target.held()), (None, false, 0));
}
