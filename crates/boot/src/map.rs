//! The memory map that guests are told, the same in all forms of boot.

use memory::{HOLE_END, Kind, Memory};

use crate::at;

/// What a range is, in e820's numbers, which PVH and multiboot share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Use {
    Ram = 1,
    Reserved = 2,
}

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    pub size: u64,
    pub kind: Use,
}

/// The configuration space's window of memory, which firmware reserves.
pub const MCFG: u64 = 0xb000_0000;
/// Its bytes: 256 buses.
pub const MCFG_SIZE: u64 = 256 << 20;

/// All of it, sorted.
pub fn ranges(memory: &Memory) -> Vec<Range> {
    let range = |start, end, kind| Range { start, size: end - start, kind };
    let mut all = vec![
        range(0, at::EBDA, Use::Ram),
        range(at::EBDA, 0xa_0000, Use::Reserved),
        range(0xc_0000, at::HIGH, Use::Reserved),
    ];
    for region in memory.regions() {
        let end = region.gpa + region.size;
        match region.kind {
            Kind::Ram if end > at::HIGH => all.push(range(region.gpa.max(at::HIGH), end, Use::Ram)),
            Kind::Rom => all.push(range(region.gpa, end, Use::Reserved)),
            Kind::Ram => {}
        }
    }
    all.push(range(MCFG, MCFG + MCFG_SIZE, Use::Reserved));
    all.sort_by_key(|r| r.start);
    debug_assert!(all.windows(2).all(|w| w[0].start + w[0].size <= w[1].start), "{all:x?}");
    all
}

/// RAM as firmware is told of it, which takes from it what it wants: entries of 20 bytes as e820 has them.
pub fn ram_for_firmware(memory: &Memory) -> Vec<u8> {
    let above = memory.regions().iter().filter(|r| r.kind == Kind::Ram && r.gpa >= HOLE_END);
    std::iter::once((0, low_end(memory)))
        .chain(above.map(|r| (r.gpa, r.size)))
        .flat_map(|(start, size)| {
            let mut entry = [0; 20];
            entry[..8].copy_from_slice(&start.to_le_bytes());
            entry[8..16].copy_from_slice(&size.to_le_bytes());
            entry[16..].copy_from_slice(&(Use::Ram as u32).to_le_bytes());
            entry
        })
        .collect()
}

/// Where RAM below 4 GiB ends.
pub fn low_end(memory: &Memory) -> u64 {
    let ram = memory.regions().iter().filter(|r| r.kind == Kind::Ram && r.gpa < HOLE_END);
    ram.map(|r| r.gpa + r.size).max().unwrap_or(0)
}
