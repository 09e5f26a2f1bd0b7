//! Where RAM and ROM lie in the guest-physical address space of the PC.

use crate::Gpa;

/// RAM below 4 GiB ends here at the latest; what is left goes above 4 GiB. Configuration space (MCFG), PCI windows, IOAPIC,
/// HPET, LAPIC and firmware lie in the hole.
pub const HOLE_START: Gpa = 0x8000_0000;
/// First address after the hole.
pub const HOLE_END: Gpa = 0x1_0000_0000;

/// What a region is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Readable and writable.
    Ram,
    /// Readable; the guest's writes have no effect.
    Rom,
}

/// A run of guest-physical addresses with memory behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First guest-physical address; a multiple of the page size.
    pub gpa: Gpa,
    /// Bytes; a multiple of the page size.
    pub size: u64,
    /// Where in the block of host memory it lies.
    pub offset: u64,
    /// RAM or ROM.
    pub kind: Kind,
}

/// Lays out `ram` bytes of RAM, and `rom` bytes of firmware that end at 4 GiB, as a PC has them: conventional memory to
/// 0xa0000, the legacy video hole, RAM from 0xc0000 (where firmware is shadowed) to the hole, and the rest from 4 GiB on.
/// Both sizes are multiples of the page size; `ram` is at least 1 MiB.
pub fn layout(ram: u64, rom: u64) -> Vec<Region> {
    let low = ram.min(HOLE_START);
    let region = |gpa, size, offset| Region { gpa, size, offset, kind: Kind::Ram };
    let mut regions = vec![region(0, 0xa_0000, 0), region(0xc_0000, low - 0xc_0000, 0xc_0000)];
    if rom > 0 {
        regions.push(Region { gpa: HOLE_END - rom, size: rom, offset: ram, kind: Kind::Rom });
    }
    if ram > low {
        regions.push(region(HOLE_END, ram - low, low));
    }
    regions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_over_two_gib_continues_above_four() {
        let regions = layout(3 << 30, 0x2_0000);
        let covered: u64 = regions.iter().filter(|r| r.kind == Kind::Ram).map(|r| r.size).sum();
        assert_eq!(covered, (3 << 30) - 0x2_0000, "all but the legacy video hole");
        assert_eq!(regions[3], Region { gpa: HOLE_END, size: 1 << 30, offset: HOLE_START, kind: Kind::Ram });
        assert_eq!(regions[2].gpa + regions[2].size, HOLE_END);
        assert!(
            regions.windows(2).all(|w| w[0].gpa + w[0].size <= w[1].gpa),
            "sorted and disjoint: {regions:x?}"
        );
    }
}
