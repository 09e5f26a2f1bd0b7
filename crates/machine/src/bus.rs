//! The port bus and the memory bus: address ranges, and the registers behind them.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, OnceLock, RwLock};

use memory::Gpa;
use vmm_sys_util::eventfd::EventFd;

/// The registers of a device, as one range of addresses. Called from any vCPU's thread; a device locks what it must.
pub trait Registers: Send + Sync {
    /// Reads `size` (1, 2, 4 or 8) bytes at `offset` from the range's start, little-endian, in the low bytes.
    fn read(&self, offset: u64, size: u8) -> u64;

    /// Writes the low `size` (1, 2, 4 or 8) bytes of `value`; the rest are zero.
    fn write(&self, offset: u64, size: u8, value: u64);

    /// Registers of which all that matters is that they are written to, however wide and whatever: their offsets, and what a
    /// write signals.
    fn doorbells(&self) -> Vec<(u64, Arc<EventFd>)> {
        Vec::new()
    }
}

/// An engine that can signal an event when the guest writes to an address, without a way over the bus.
pub trait Doorbells: Send + Sync {
    /// Has every write to `address` signal `event`, until the result is dropped. `None` where that cannot be had: then writes
    /// go over the bus.
    fn watch(&self, address: Gpa, event: &Arc<EventFd>) -> Option<Watch>;
}

/// A doorbell that an engine looks after, for as long as this is there.
pub type Watch = Box<dyn Any + Send + Sync>;

/// The range is taken.
#[derive(Debug, thiserror::Error)]
#[error("{what} wants {start:#x}–{last:#x}, but {other} is there")]
pub struct Overlap {
    what: &'static str,
    start: u64,
    last: u64,
    other: &'static str,
}

struct Range {
    start: u64,
    last: u64,
    what: &'static str,
    to: Arc<dyn Registers>,
    /// Those of its doorbells that the engine looks after.
    _watches: Vec<Watch>,
}

/// An address space of device registers. Ranges come and go while the guest runs (PCI BARs move).
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<Vec<Range>>,
    engine: OnceLock<Arc<dyn Doorbells>>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut map = f.debug_map();
        for r in self.ranges.read().unwrap_or_else(|e| e.into_inner()).iter() {
            map.entry(&format_args!("{:#x}–{:#x}", r.start, r.last), &r.what);
        }
        map.finish()
    }
}

impl Bus {
    /// Lets `engine` look after the doorbells of what is put on the bus from now on.
    pub fn leave_doorbells_to(&self, engine: Arc<dyn Doorbells>) {
        // A second one has nothing left to do.
        let _ = self.engine.set(engine);
    }

    /// Puts registers at `start`, `len` bytes of them (not 0, and not past the end of the address space).
    ///
    /// # Errors
    /// Another range overlaps.
    pub fn insert(
        &self,
        start: u64,
        len: u64,
        what: &'static str,
        to: Arc<dyn Registers>,
    ) -> Result<(), Overlap> {
        let last = start.saturating_add(len - 1);
        let mut ranges = self.ranges.write().unwrap_or_else(|e| e.into_inner());
        let at = ranges.partition_point(|r| r.last < start);
        if let Some(r) = ranges.get(at).filter(|r| r.start <= last) {
            return Err(Overlap { what, start, last, other: r.what });
        }
        let watch = |(offset, event)| self.engine.get()?.watch(start.checked_add(offset)?, &event);
        let watches = to.doorbells().into_iter().filter_map(watch).collect();
        ranges.insert(at, Range { start, last, what, to, _watches: watches });
        Ok(())
    }

    /// Takes away the range that starts at `start`.
    pub fn remove(&self, start: u64) {
        self.ranges.write().unwrap_or_else(|e| e.into_inner()).retain(|r| r.start != start);
    }

    /// Who answers at `address`, and at which offset.
    fn find(&self, address: u64) -> Option<(Arc<dyn Registers>, u64, u64)> {
        let ranges = self.ranges.read().unwrap_or_else(|e| e.into_inner());
        let r = ranges.get(ranges.partition_point(|r| r.last < address))?;
        (r.start <= address).then(|| (r.to.clone(), address - r.start, r.last - address))
    }

    /// Reads `size` (1, 2, 4 or 8) bytes. All ones where nobody answers, as on a real bus. An access that runs over the
    /// end of a range is split into bytes.
    pub fn read(&self, address: u64, size: u8) -> u64 {
        match self.find(address) {
            Some((to, offset, room)) if room >= u64::from(size) - 1 => to.read(offset, size) & ones(size),
            None if size == 1 => 0xff,
            _ => (0..size).fold(0, |v, i| v | self.read(address.wrapping_add(i.into()), 1) << (8 * i)),
        }
    }

    /// Writes `size` (1, 2, 4 or 8) bytes; nothing happens where nobody answers.
    pub fn write(&self, address: u64, size: u8, value: u64) {
        match self.find(address) {
            Some((to, offset, room)) if room >= u64::from(size) - 1 => {
                to.write(offset, size, value & ones(size))
            }
            None if size == 1 => {}
            _ => {
                (0..size).for_each(|i| self.write(address.wrapping_add(i.into()), 1, value >> (8 * i) & 0xff))
            }
        }
    }
}

fn ones(size: u8) -> u64 {
    u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    struct Scratch(Mutex<Vec<u8>>);

    impl Registers for Scratch {
        fn read(&self, offset: u64, size: u8) -> u64 {
            let bytes = self.0.lock().unwrap();
            (0..size as usize).rev().fold(0, |v, i| v << 8 | u64::from(bytes[offset as usize + i]))
        }

        fn write(&self, offset: u64, size: u8, value: u64) {
            let mut bytes = self.0.lock().unwrap();
            (0..size as usize).for_each(|i| bytes[offset as usize + i] = (value >> (8 * i)) as u8);
        }
    }

    fn scratch(len: usize) -> Arc<Scratch> {
        Arc::new(Scratch(Mutex::new(vec![0; len])))
    }

    #[test]
    fn accesses_over_an_edge_reach_both_sides() {
        let bus = Bus::default();
        bus.insert(0x60, 4, "a", scratch(4)).unwrap();
        bus.insert(0x64, 2, "b", scratch(2)).unwrap();
        bus.write(0x62, 4, 0x4433_2211);
        assert_eq!(bus.read(0x62, 2), 0x2211);
        assert_eq!(bus.read(0x64, 4), 0xffff_4433);
        assert_eq!(bus.read(0x70, 2), 0xffff);
        assert_eq!(bus.read(u64::MAX, 8) >> 56, 0xff);
    }

    /// A doorbell 4 bytes into its range.
    struct Bell(Arc<EventFd>);

    impl Registers for Bell {
        fn read(&self, _: u64, _: u8) -> u64 {
            0
        }

        fn write(&self, _: u64, _: u8, _: u64) {}

        fn doorbells(&self) -> Vec<(u64, Arc<EventFd>)> {
            vec![(4, self.0.clone())]
        }
    }

    /// Where doorbells are, as an engine is told.
    #[derive(Default)]
    struct Engine(Arc<Mutex<Vec<Gpa>>>);

    struct Watched(Arc<Mutex<Vec<Gpa>>>, Gpa);

    impl Drop for Watched {
        fn drop(&mut self) {
            self.0.lock().unwrap().retain(|at| *at != self.1);
        }
    }

    impl Doorbells for Engine {
        fn watch(&self, address: Gpa, _: &Arc<EventFd>) -> Option<Watch> {
            self.0.lock().unwrap().push(address);
            Some(Box::new(Watched(self.0.clone(), address)))
        }
    }

    #[test]
    fn doorbells_go_where_their_registers_go() {
        let (bus, engine) = (Bus::default(), Engine::default());
        let at = engine.0.clone();
        bus.leave_doorbells_to(Arc::new(engine));
        let bell = Arc::new(Bell(Arc::new(EventFd::new(0).unwrap())));
        bus.insert(0x1000, 0x10, "bell", bell.clone()).unwrap();
        bus.insert(0x1008, 0x10, "another", bell.clone()).unwrap_err();
        assert_eq!(*at.lock().unwrap(), [0x1004], "none of what is not on the bus");
        bus.remove(0x1000);
        bus.insert(0x5000, 0x10, "bell", bell).unwrap();
        assert_eq!(*at.lock().unwrap(), [0x5004]);
        drop(bus);
        assert!(at.lock().unwrap().is_empty());
    }

    #[test]
    fn ranges_do_not_overlap() {
        let bus = Bus::default();
        bus.insert(0x60, 4, "a", scratch(4)).unwrap();
        let error = bus.insert(0x63, 1, "b", scratch(4)).unwrap_err();
        assert_eq!(error.to_string(), "b wants 0x63–0x63, but a is there");
        bus.remove(0x60);
        bus.insert(0x63, 1, "b", scratch(4)).unwrap();
    }
}
