//! RAM that comes and goes while the guest runs: a range of guest-physical addresses above all other RAM, in blocks, each of
//! which is plugged or not.
//!
//! A block that is not plugged is nothing to the guest: neither its processors nor devices reach anything of its own there
//! (with KVM its processors reach a block that stands for all such: see [`crate::view`]), and it takes no host memory. It has
//! its place in the block of host memory, so whoever still uses what the map said before reaches bytes of the guest's own, as
//! with [windows](crate::windows).
//!
//! Such latecomers are a vCPU of a software engine, which is kicked and forgets before its next instruction but one, and a
//! device in the middle of a transfer. Nobody waits for them: a guest that unplugs what it uses has itself to blame, and a vCPU
//! may be waiting for the device's thread that unplugs. But what they write takes host memory that nobody would give back, so
//! that is done whenever something is plugged: a guest that hoards what it leaves behind gets no more by it than it may plug.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::view::View;
use crate::{Gpa, HOLE_END, Kind, Memory, Region, Slot};

/// What the range's size is a multiple of, and the largest block: systems add memory in such pieces (Linux' sections).
pub const PLUG_ALIGN: u64 = 128 << 20;
/// Bytes of pluggable memory at most: 512 GiB.
pub const PLUG_MOST: u64 = MOST * PLUG_ALIGN;
/// Where the range begins is a multiple of this, for systems whose pieces are larger where there is much memory.
const START_ALIGN: u64 = 1 << 30;
/// The smallest block: a large page.
const SMALLEST: u64 = 2 << 20;
/// Blocks at most: with KVM each may be a mapping of this process, which has 65530 by default.
const MOST: u64 = 4096;

/// Bytes of a block, where there are `size` bytes of pluggable memory: a power of two of at least 2 MiB.
pub fn block_size(size: u64) -> u64 {
    size.div_ceil(MOST).checked_next_power_of_two().unwrap_or(SMALLEST).max(SMALLEST)
}

/// The first address of pluggable memory of a guest with `ram` bytes of RAM.
pub fn plug_start(ram: u64) -> Gpa {
    let end = crate::layout(ram, 0).last().map_or(0, |region| region.gpa + region.size);
    end.max(HOLE_END).next_multiple_of(START_ALIGN)
}

/// The range, and which of its blocks are plugged.
pub(crate) struct Plugs {
    gpa: Gpa,
    offset: u64,
    block: u64,
    plugged: Box<[AtomicBool]>,
    /// For an engine that wants one.
    view: OnceLock<View>,
}

impl Plugs {
    /// `size` bytes from `gpa` on, which have their place in the block of host memory at `offset`; none is plugged.
    pub(crate) fn new(gpa: Gpa, size: u64, offset: u64) -> Self {
        let block = block_size(size);
        let plugged = (0..size / block).map(|_| AtomicBool::new(false)).collect();
        Self { gpa, offset, block, plugged, view: OnceLock::new() }
    }

    /// So many blocks from this one on.
    fn region(&self, blocks: &Range<usize>) -> Region {
        let at = blocks.start as u64 * self.block;
        let size = blocks.len() as u64 * self.block;
        Region { gpa: self.gpa + at, size, offset: self.offset + at, kind: Kind::Ram }
    }

    fn is_plugged(&self, index: usize) -> bool {
        self.plugged.get(index).is_some_and(|plugged| plugged.load(Ordering::SeqCst))
    }

    fn all(&self) -> Range<usize> {
        0..self.plugged.len()
    }

    /// Those of the blocks that are plugged, or are not: neighbours together.
    fn runs(&self, blocks: Range<usize>, plugged: bool) -> Vec<Range<usize>> {
        let end = blocks.end.min(self.plugged.len());
        let found: Vec<usize> =
            (blocks.start..end).filter(|&index| self.is_plugged(index) == plugged).collect();
        found.chunk_by(|a, b| a + 1 == *b).map(|run| run[0]..run[0] + run.len()).collect()
    }

    /// The range, if there is one, plugged or not.
    pub(crate) fn whole(&self) -> Option<Region> {
        (!self.plugged.is_empty()).then(|| self.region(&self.all()))
    }

    /// Each block, plugged or not.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = Region> + '_ {
        self.all().map(|index| self.region(&(index..index + 1)))
    }

    /// What is plugged.
    pub(crate) fn regions(&self) -> impl Iterator<Item = Region> + '_ {
        self.runs(self.all(), true).into_iter().map(|run| self.region(&run))
    }

    /// The plugged block that holds `gpa`.
    #[inline]
    pub(crate) fn find(&self, gpa: Gpa) -> Option<Region> {
        let index = usize::try_from(gpa.checked_sub(self.gpa)? / self.block).ok()?;
        self.is_plugged(index).then(|| self.region(&(index..index + 1)))
    }

    /// Whether `gpa` is no address of the range, or one in a plugged block.
    #[inline]
    pub(crate) fn lets(&self, gpa: Gpa) -> bool {
        self.whole().is_none_or(|r| gpa < r.gpa || gpa - r.gpa >= r.size) || self.find(gpa).is_some()
    }

    /// [`Memory::pluggable_slot`], of the memory in `file`. The caller sees to it that nothing is plugged or unplugged.
    pub(crate) fn slot(&self, file: &File) -> io::Result<Option<Slot>> {
        let Some(region) = self.whole() else { return Ok(None) };
        let view = match self.view.get() {
            Some(view) => view,
            None => {
                let view = View::new(file, self.offset, self.block, self.plugged.len())?;
                self.runs(self.all(), true).into_iter().try_for_each(|run| view.show(run))?;
                self.view.get_or_init(|| view)
            }
        };
        Ok(Some(Slot { region, host: view.host() }))
    }

    /// Has the view show these, or not, and says that they are plugged, or not: if the host lets us.
    fn set(&self, runs: &[Range<usize>], plugged: bool) -> bool {
        let show = |view: &View, plugged| {
            let mut runs = runs.iter().cloned();
            if plugged {
                runs.try_for_each(|run| view.show(run))
            } else {
                runs.try_for_each(|run| view.hide(run))
            }
        };
        if let Some(view) = self.view.get()
            && show(view, plugged).is_err()
        {
            // It was out of memory for mappings. Going back needs no more of them, and should it fail, the guest misses what it
            // has just said it does not use.
            let _ = show(view, !plugged);
            return false;
        }
        runs.iter().cloned().flatten().for_each(|index| self.plugged[index].store(plugged, Ordering::SeqCst));
        true
    }
}

/// Pluggable memory. Clones are the same.
#[derive(Clone, Debug)]
pub struct Pluggable(Memory);

impl Pluggable {
    pub(crate) fn new(memory: &Memory) -> Option<Self> {
        memory.plugs().whole().map(|_| Self(memory.clone()))
    }

    /// First guest-physical address, a multiple of 1 GiB.
    pub fn gpa(&self) -> Gpa {
        self.0.plugs().gpa
    }

    /// Bytes, plugged or not: a multiple of [`PLUG_ALIGN`].
    pub fn size(&self) -> u64 {
        self.0.plugs().block * self.0.plugs().plugged.len() as u64
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> u64 {
        self.0.plugs().block
    }

    /// Bytes that are plugged.
    pub fn plugged(&self) -> u64 {
        self.count(self.0.plugs().all()) as u64 * self.block_size()
    }

    /// The `count` blocks from `gpa` on, if that is a block's address, and there are so many, and at least one.
    pub fn blocks(&self, gpa: Gpa, count: u64) -> Option<Range<usize>> {
        let plugs = self.0.plugs();
        let at = gpa.checked_sub(plugs.gpa).filter(|at| at.is_multiple_of(plugs.block))?;
        let first = usize::try_from(at / plugs.block).ok()?;
        let end = first.checked_add(usize::try_from(count).ok()?)?;
        (first < end && end <= plugs.plugged.len()).then_some(first..end)
    }

    /// How many of these blocks are plugged.
    pub fn count(&self, blocks: Range<usize>) -> usize {
        blocks.filter(|&index| self.0.plugs().is_plugged(index)).count()
    }

    /// Plugs these blocks, which read as zeroes then. Blocks that there are not stay so. Tells whether it was done: the host
    /// may be out of memory for it.
    pub fn plug(&self, blocks: Range<usize>) -> bool {
        let (memory, plugs) = (&self.0, self.0.plugs());
        memory.windows().change(|| {
            for left in plugs.runs(plugs.all(), false).iter().map(|run| plugs.region(run)) {
                memory.give_back(left.offset, left.size);
            }
            let runs = plugs.runs(blocks, false);
            for new in runs.iter().map(|run| plugs.region(run)) {
                memory.clear(new.offset, new.size);
            }
            plugs.set(&runs, true)
        })
    }

    /// Unplugs these blocks: what was in them is lost, and the host has its memory back. Blocks that are not plugged stay so.
    /// Tells whether it was done, as [`Pluggable::plug`].
    pub fn unplug(&self, blocks: Range<usize>) -> bool {
        let (memory, plugs) = (&self.0, self.0.plugs());
        let runs = plugs.runs(blocks, true);
        if !memory.windows().take_away(|| plugs.set(&runs, false)) {
            return false;
        }
        for old in runs.iter().map(|run| plugs.region(run)) {
            memory.give_back(old.offset, old.size);
            memory.code().stored_range(old.offset, old.size);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

    const MIB: u64 = 1 << 20;

    #[test]
    fn blocks_are_few_and_where_nothing_else_is() {
        for (size, block) in [(128 * MIB, 2), (8 << 30, 2), (9 << 30, 4), (512 << 30, 128)] {
            assert_eq!(block_size(size), block * MIB);
        }
        assert_eq!(plug_start(512 * MIB), 4 << 30);
        assert_eq!(plug_start(2 << 30), 4 << 30);
        assert_eq!(plug_start((2 << 30) + MIB), 5 << 30);
    }

    #[test]
    fn what_is_not_plugged_is_not_there() {
        let (memory, []) = Memory::with_pluggable(4 * MIB, 0, [], PLUG_ALIGN).unwrap();
        let pluggable = memory.pluggable().unwrap();
        let at = pluggable.gpa();
        assert_eq!(
            (memory.ram_size(), memory.regions().len(), memory.slots().flatten().count()),
            (4 * MIB, 2, 2)
        );
        let reach =
            |gpa: u64, len| memory.guest().check_range(GuestAddress(gpa), len, Permissions::ReadWrite);
        assert!(memory.region(at).is_none() && !reach(at, 1));
        // Two neighbours, and an access that crosses from one to the other.
        assert!(pluggable.plug(1..3));
        assert_eq!(pluggable.plugged(), 4 * MIB);
        let middle = at + 4 * MIB;
        assert!(reach(middle - 8, 16) && !reach(at + 2 * MIB - 1, 2) && !reach(at + 6 * MIB - 8, 9));
        memory.guest().write_slice(&[7; 16], GuestAddress(middle - 8)).unwrap();
        let offset = memory.offset(middle - 8).unwrap();
        assert_eq!(memory.load::<u8>(offset), 7);
        let held = memory.held();
        // A processor that had it in its TLB, and code that was there.
        let (mut keeper, generation) = (memory.keeper(|| {}), memory.code().generation(offset));
        let _ = keeper.enter();
        memory.code().mark(offset, 8);
        assert!(pluggable.unplug(0..2));
        assert!(!keeper.is_current(), "forgets it");
        assert_ne!(memory.code().generation(offset), generation);
        assert_eq!((memory.offset(middle - 8), held - memory.held()), (None, 4096));
        assert!(!reach(middle - 8, 16) && reach(middle, 8));
        // What somebody has left there is not seen again, and is given back when something is plugged, whatever it is.
        memory.store(offset, 1u64);
        assert!(pluggable.plug(1..2));
        assert_eq!(memory.load::<u64>(offset), 0);
        assert!(pluggable.unplug(1..2));
        memory.store(offset, 1u64);
        let held = memory.held();
        assert!(pluggable.plug(7..8) && pluggable.plug(1..2));
        assert_eq!(held - memory.held(), 4096);
        // The guest may give back pages of it.
        memory.discard(middle - 4096, 8192);
        assert_eq!(memory.held(), 0);
    }

    #[test]
    fn only_whole_blocks_that_there_are() {
        let (memory, []) = Memory::with_pluggable(4 * MIB, 0, [], PLUG_ALIGN).unwrap();
        let pluggable = memory.pluggable().unwrap();
        let (at, last) = (pluggable.gpa(), pluggable.gpa() + 126 * MIB);
        assert_eq!((pluggable.blocks(at, 64), pluggable.blocks(last, 1)), (Some(0..64), Some(63..64)));
        for (gpa, count) in [
            (at, 0),
            (at, 65),
            (last, 2),
            (last + 2 * MIB, 1),
            (at + MIB, 1),
            (at - 2 * MIB, 1),
            (at, u64::MAX),
        ] {
            assert_eq!(pluggable.blocks(gpa, count), None, "{gpa:x} {count}");
        }
        assert!(pluggable.plug(60..usize::MAX));
        assert_eq!(pluggable.plugged(), 8 * MIB);
        assert!(Memory::new(4 * MIB, 0).unwrap().pluggable().is_none());
        for size in [MIB, PLUG_ALIGN + 4096, PLUG_MOST + PLUG_ALIGN] {
            assert!(Memory::with_pluggable(4 * MIB, 0, [], size).is_err(), "{size}");
        }
    }

    /// What KVM's guests reach: plugged blocks, and one block in place of all others.
    #[test]
    fn a_slot_shows_what_is_plugged() {
        let (memory, []) = Memory::with_pluggable(4 * MIB, 0, [], PLUG_ALIGN).unwrap();
        assert!(Memory::new(4 * MIB, 0).unwrap().pluggable_slot().unwrap().is_none());
        let pluggable = memory.pluggable().unwrap();
        assert!(pluggable.plug(2..4));
        let slot = memory.pluggable_slot().unwrap().unwrap();
        let block = |index: u64| {
            // SAFETY: inside the view, which has 64 blocks, and aligned.
            unsafe { slot.host.add((index * 2 * MIB) as usize).cast::<u64>() }
        };
        // SAFETY: as above; nothing else accesses it.
        let (get, put) = (
            |index| unsafe { block(index).read_volatile() },
            |index, value| unsafe {
                block(index).write_volatile(value);
            },
        );
        let at = |index: u64| memory.offset(pluggable.gpa() + index * 2 * MIB);
        assert_eq!(
            (slot.region.size, slot.region.gpa, at(1), at(4)),
            (PLUG_ALIGN, pluggable.gpa(), None, None)
        );
        put(2, 22);
        put(3, 33);
        assert_eq!((memory.load::<u64>(at(2).unwrap()), memory.load::<u64>(at(3).unwrap())), (22, 33));
        // All that is not plugged is the same, whoever writes there, and takes nothing of the guest's.
        let held = memory.held();
        (4..64).for_each(|index| put(index, index));
        assert_eq!((get(0), get(1), get(63), memory.held()), (63, 63, 63, held));
        assert!(pluggable.plug(0..2) && pluggable.unplug(2..3));
        assert_eq!(held - memory.held(), 4096);
        assert_eq!((get(0), get(1), get(2), get(3)), (0, 0, 63, 33));
        put(1, 11);
        assert_eq!((memory.load::<u64>(at(1).unwrap()), at(2)), (11, None));
        assert_eq!(memory.pluggable_slot().unwrap().unwrap().host, slot.host);
    }

    #[test]
    fn a_window_is_not_shown_where_memory_may_come() {
        let (memory, [window]) = Memory::with_pluggable(4 * MIB, 0, [MIB], PLUG_ALIGN).unwrap();
        let at = memory.pluggable().unwrap().gpa();
        for (gpa, shown) in
            [(at, false), (at + PLUG_ALIGN - MIB, false), (at - MIB / 2, false), (at + PLUG_ALIGN, true)]
        {
            assert_eq!(window.show(Some((gpa, Kind::Ram))), shown, "{gpa:x}");
        }
    }
}
