//! Reception (manual, 3.2 and 13.4.22): which frames are wanted, and where they go.

use memory::Memory;

use super::registers::{Words, cause, ctrl, reg};
use crate::dma::{fetch, le64, publish, store};
use crate::net::{Header, Mac, sum};

const ENABLE: u32 = 1 << 1;
const ALL_UNICASTS: u32 = 1 << 3;
const ALL_MULTICASTS: u32 = 1 << 4;
const LONG: u32 = 1 << 5;
const BROADCASTS: u32 = 1 << 15;
const VLAN_FILTER: u32 = 1 << 18;
const SIZE_TIMES_16: u32 = 1 << 25;
const NO_CRC: u32 = 1 << 26;
/// RXCSUM: checksums of TCP and UDP are looked at.
const TCP_CHECKSUM: u32 = 1 << 9;
/// A receive address is valid.
const VALID: u32 = 1 << 31;
/// Bytes on the wire with its checksum: of an ordinary frame with a VLAN tag, and of a long one.
const LONGEST: usize = 1522;
const LONGEST_LONG: usize = 16384;
/// Bytes of the shortest frame, without its checksum.
const SHORTEST: usize = 60;

/// A descriptor's status: done, the frame's end, no checksum was looked at, a VLAN tag was taken out, TCP's checksum was.
const DONE: u8 = 1;
const END: u8 = 2;
const UNCHECKED: u8 = 4;
const TAGGED: u8 = 8;
const TCP_CHECKED: u8 = 0x20;

/// Whether frames are received at all.
pub fn is_on(words: &Words) -> bool {
    words.has(reg::RCTL, ENABLE)
}

/// Whether the guest wants a frame.
pub fn wants(words: &Words, frame: &[u8]) -> bool {
    let Some(&to) = frame.first_chunk::<6>() else { return false };
    let most = if words.has(reg::RCTL, LONG) { LONGEST_LONG } else { LONGEST };
    frame.len() + 4 <= most
        && passes(words, to)
        && (!words.has(reg::RCTL, VLAN_FILTER) || knows_vlan(words, frame))
}

fn passes(words: &Words, to: Mac) -> bool {
    if to == [0xff; 6] && words.has(reg::RCTL, BROADCASTS) {
        return true;
    }
    let multicast = to[0] & 1 == 1;
    if words.has(reg::RCTL, if multicast { ALL_MULTICASTS } else { ALL_UNICASTS }) {
        return true;
    }
    let low = u32::from_le_bytes([to[0], to[1], to[2], to[3]]);
    let high = u32::from(to[5]) << 8 | u32::from(to[4]);
    // The destination is to be compared, says 0 in bits 16 and 17.
    let mut exact = (0..16).map(|n| (words.get(reg::RA + 8 * n), words.get(reg::RA + 8 * n + 4)));
    if exact.any(|(l, h)| l == low && h & !VALID == high && h & VALID != 0) {
        return true;
    }
    let shift = [4, 3, 2, 0][(words.get(reg::RCTL) >> 12 & 3) as usize];
    let hash = high >> shift & 0xfff;
    multicast && words.has(reg::MTA + (hash >> 5) * 4, 1 << (hash & 31))
}

fn tag(words: &Words, frame: &[u8]) -> Option<u16> {
    let kind = (words.get(reg::VET) as u16).to_be_bytes();
    match frame.get(12..16) {
        Some(&[a, b, c, d]) if [a, b] == kind => Some(u16::from_be_bytes([c, d])),
        _ => None,
    }
}

/// Frames without a tag are of no VLAN, which is not filtered.
fn knows_vlan(words: &Words, frame: &[u8]) -> bool {
    tag(words, frame).is_none_or(|tag| {
        let id = u32::from(tag & 0xfff);
        words.has(reg::VFTA + (id >> 5) * 4, 1 << (id & 31))
    })
}

/// Bytes of a buffer.
fn buffer_size(words: &Words) -> usize {
    let size = 2048 >> (words.get(reg::RCTL) >> 16 & 3);
    match words.has(reg::RCTL, SIZE_TIMES_16) {
        // 32 KiB is reserved.
        true => (size * 16).min(16384),
        false => size,
    }
}

/// What becomes of a frame.
pub enum Outcome {
    /// It is in the guest's memory, or lost; causes of interrupts.
    Done(u32),
    /// There are too few descriptors for it.
    Wait,
}

/// Puts a frame into the guest's buffers.
pub fn receive(words: &mut Words, memory: &Memory, header: &Header, frame: &[u8]) -> Outcome {
    let mut bytes = frame.to_vec();
    let vlan = if words.has(reg::CTRL, ctrl::VME) { tag(words, frame) } else { None };
    if vlan.is_some() {
        bytes.drain(12..16);
    }
    bytes.resize(bytes.len().max(SHORTEST), 0);
    let wire = bytes.len() + 4;
    let check_sum = sum(bytes.get((words.get(reg::RXCSUM) & 0xff) as usize..).unwrap_or_default());
    if !words.has(reg::RCTL, NO_CRC) {
        let crc = crc32fast::hash(&bytes);
        bytes.extend(crc.to_le_bytes());
    }
    let size = buffer_size(words);
    let needed = bytes.len().div_ceil(size) as u32;
    let Some(ring) = words.ring(reg::RDBAL) else { return Outcome::Wait };
    if needed >= ring.count {
        words.count(reg::MPC, 1);
        return Outcome::Done(cause::RXO);
    }
    if needed > ring.owned() {
        return Outcome::Wait;
    }
    let checked = header.valid && words.has(reg::RXCSUM, TCP_CHECKSUM);
    let status = if checked { TCP_CHECKED } else { UNCHECKED } | vlan.map_or(0, |_| TAGGED);
    for (n, piece) in bytes.chunks(size).enumerate() {
        let n = n as u32;
        let end = if n + 1 == needed { END } else { 0 };
        let at = ring.at(n);
        // What cannot be written is lost; the rest goes on.
        let Ok(descriptor) = fetch::<16>(memory, at) else { continue };
        let _ = store(memory, le64(&descriptor, 0), piece);
        let length = u32::from(check_sum) << 16 | piece.len() as u32;
        let _ = store(memory, at.wrapping_add(8), &length.to_le_bytes());
        // Last, for the driver waits for it.
        let done = u32::from(vlan.unwrap_or(0)) << 16 | u32::from(status | end | DONE);
        let _ = publish(memory, at.wrapping_add(12), done);
    }
    words.set(reg::RDH, ring.index(needed));
    count(words, frame, wire);
    let left = ring.owned() - needed;
    let few = ring.count >> ((words.get(reg::RCTL) >> 8 & 3) + 1).min(3);
    Outcome::Done(cause::RXT0 | if left <= few { cause::RXDMT0 } else { 0 })
}

/// Statistics of what is received.
fn count(words: &mut Words, frame: &[u8], wire: usize) {
    for at in [reg::GPRC, reg::TPR] {
        words.count(at, 1);
    }
    for at in [reg::GORC, reg::TOR] {
        words.count_wide(at, wire as u64);
    }
    match frame {
        [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, ..] => words.count(reg::BPRC, 1),
        [first, ..] if first & 1 == 1 => words.count(reg::MPRC, 1),
        _ => {}
    }
}
