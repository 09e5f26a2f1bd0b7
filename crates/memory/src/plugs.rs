//! RAM that comes and goes while the guest runs: a range of guest-physical addresses above all other RAM, in blocks, each of
//! which is plugged or not.
//!
//! A block that is not plugged is nothing to the guest: neither its processors nor devices reach anything there, and it takes
//! no host memory. Its bytes in the block of host memory are kept for it, so whoever still uses what the map said before
//! reaches bytes of the guest's own, as with [windows](crate::windows); they are cleared before the guest sees them again.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Gpa, HOLE_END, Kind, Memory, Region};

/// Where the range begins and what its size is a multiple of: the largest block is no larger, and systems add memory in such
/// pieces (Linux' sections of 128 MiB).
pub const PLUG_ALIGN: u64 = 128 << 20;
/// Where the range begins is a multiple of this, for systems whose pieces are larger where there is much memory.
const START_ALIGN: u64 = 1 << 30;
/// The smallest block: a large page.
const SMALLEST: u64 = 2 << 20;
/// Blocks at most: on KVM each takes a memory slot.
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
}

impl Plugs {
    /// `size` bytes from `gpa` on, which have their place in the block of host memory at `offset`; none is plugged.
    pub(crate) fn new(gpa: Gpa, size: u64, offset: u64) -> Self {
        let block = block_size(size);
        let plugged = (0..size / block).map(|_| AtomicBool::new(false)).collect();
        Self { gpa, offset, block, plugged }
    }

    fn region(&self, index: usize) -> Region {
        let at = index as u64 * self.block;
        Region { gpa: self.gpa + at, size: self.block, offset: self.offset + at, kind: Kind::Ram }
    }

    fn is_plugged(&self, index: usize) -> bool {
        self.plugged.get(index).is_some_and(|plugged| plugged.load(Ordering::SeqCst))
    }

    /// All blocks, plugged or not.
    pub(crate) fn all(&self) -> impl Iterator<Item = Region> + '_ {
        (0..self.plugged.len()).map(|index| self.region(index))
    }

    /// All blocks in order, those that are not plugged as none.
    pub(crate) fn regions(&self) -> impl Iterator<Item = Option<Region>> + '_ {
        (0..self.plugged.len()).map(|index| self.is_plugged(index).then(|| self.region(index)))
    }

    /// The plugged block that holds `gpa`.
    #[inline]
    pub(crate) fn find(&self, gpa: Gpa) -> Option<Region> {
        let index = usize::try_from(gpa.checked_sub(self.gpa)? / self.block).ok()?;
        self.is_plugged(index).then(|| self.region(index))
    }

    /// Whether `gpa` is no address of the range, or one in a plugged block.
    #[inline]
    pub(crate) fn lets(&self, gpa: Gpa) -> bool {
        let end = self.gpa + self.block * self.plugged.len() as u64;
        !(self.gpa..end).contains(&gpa) || self.find(gpa).is_some()
    }
}

/// Pluggable memory. Clones are the same.
#[derive(Clone, Debug)]
pub struct Pluggable(Memory);

impl Pluggable {
    pub(crate) fn new(memory: &Memory) -> Option<Self> {
        (!memory.plugs().plugged.is_empty()).then(|| Self(memory.clone()))
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
        self.count(0..self.0.plugs().plugged.len()) as u64 * self.block_size()
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

    /// Plugs these blocks, which read as zeroes then, or unplugs them: what was in them is lost, and the host has its memory
    /// back. Blocks that there are not stay so, and those that are as wanted stay as they are.
    ///
    /// vCPUs that run learn of it as of windows that move. One of them that writes where a block just was may have the host
    /// keep a page for it until the block is plugged again.
    pub fn set(&self, blocks: Range<usize>, plugged: bool) {
        let (memory, plugs) = (&self.0, self.0.plugs());
        let give_back = |index| {
            let region = plugs.region(index);
            memory.clear(region.offset, region.size);
        };
        let blocks: Vec<usize> = blocks
            .take_while(|&index| index < plugs.plugged.len())
            .filter(|&index| plugs.is_plugged(index) != plugged)
            .collect();
        if blocks.is_empty() {
            return;
        }
        memory.windows().change(memory, !plugged, || {
            for &index in &blocks {
                if plugged {
                    give_back(index);
                }
                plugs.plugged[index].store(plugged, Ordering::SeqCst);
            }
        });
        if !plugged {
            blocks.into_iter().for_each(give_back);
        }
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
        pluggable.set(1..3, true);
        assert_eq!((pluggable.plugged(), memory.slots().flatten().count()), (4 * MIB, 4));
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
        pluggable.set(0..2, false);
        assert!(!keeper.is_current(), "forgets it");
        assert_ne!(memory.code().generation(offset), generation);
        assert_eq!((memory.offset(middle - 8), held - memory.held()), (None, 4096));
        assert!(!reach(middle - 8, 16) && reach(middle, 8));
        // What somebody has left there is not seen again.
        memory.store(offset, 1u64);
        pluggable.set(1..2, true);
        assert_eq!(memory.load::<u64>(offset), 0);
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
        pluggable.set(60..usize::MAX, true);
        assert_eq!(pluggable.plugged(), 8 * MIB);
        assert!(Memory::new(4 * MIB, 0).unwrap().pluggable().is_none());
    }
}
