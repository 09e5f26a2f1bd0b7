//! Transmission (manual, 3.3 to 3.6): legacy, context and data descriptors, checksums, VLAN tags, and long TCP segments, which are cut
//! here.

use memory::Memory;
use serde::{Deserialize, Serialize};

use super::registers::{Words, cause, ctrl, reg};
use crate::dma::{Fault, fetch, le16, le32, le64, load, store};
use crate::net::{ETHERNET, LONGEST_FRAME, checksum, sum};

const ENABLE: u32 = 1 << 1;
const PAD: u32 = 1 << 3;
/// Bytes of the shortest frame, without its checksum.
const SHORTEST: usize = 60;
/// Pieces of one frame at most.
const MOST_PIECES: usize = 4096;

/// Commands in byte 11.
mod command {
    pub const END: u8 = 1;
    /// Legacy: a checksum is to be inserted.
    pub const CHECKSUM: u8 = 1 << 2;
    /// Data and context: a long segment.
    pub const SEGMENT: u8 = 1 << 2;
    /// Context: it is TCP, else UDP; it is IPv4.
    pub const TCP: u8 = 1;
    pub const IPV4: u8 = 2;
    pub const REPORT: u8 = 1 << 3;
    pub const REPORT_SENT: u8 = 1 << 4;
    pub const EXTENDED: u8 = 1 << 5;
    pub const VLAN: u8 = 1 << 6;
}
/// Kinds of extended descriptors, in the upper half of byte 10.
const CONTEXT: u8 = 0;
const DATA: u8 = 1;
/// What a data descriptor wants, in byte 13: the IP header's checksum, TCP's or UDP's.
const IP_CHECKSUM: u8 = 1;
const TCP_CHECKSUM: u8 = 2;
const DONE: u8 = 1;

/// Where a checksum starts, where it goes, where the last byte is that it covers (0: the end).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    start: u8,
    at: u8,
    last: u16,
}

impl Place {
    fn parse(bytes: &[u8]) -> Self {
        Self { start: bytes[0], at: bytes[1], last: le16(bytes, 2) }
    }

    /// Puts the checksum of these bytes, with `more` in the sum, into its place. Nothing where that is outside of the frame.
    fn insert(self, frame: &mut [u8], more: u16) {
        let end = if self.last == 0 { frame.len() } else { frame.len().min(usize::from(self.last) + 1) };
        let (start, at) = (usize::from(self.start), usize::from(self.at));
        let Some(covered) = frame.get(start..end) else { return };
        let all = u32::from(sum(covered)) + u32::from(more);
        let all = (all & 0xffff) as u16 + (all >> 16) as u16;
        if let Some(place) = frame.get_mut(at..at + 2) {
            place.copy_from_slice(&checksum(all).to_be_bytes());
        }
    }
}

/// What a context descriptor says of the data that follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Context {
    ip: Place,
    tcp: Place,
    is_tcp: bool,
    ipv4: bool,
    header: u8,
    segment: u16,
}

/// A frame on its way together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transmitter {
    /// For frames as they are, and for long segments.
    contexts: [Context; 2],
    bytes: Vec<u8>,
    pieces: usize,
    /// It is too long, or its bytes could not be had: it is not sent.
    bad: bool,
    /// The first piece's wishes.
    options: Option<u8>,
}

/// A descriptor.
struct Descriptor([u8; 16]);

impl Descriptor {
    fn command(&self) -> u8 {
        self.0[11]
    }

    fn has(&self, bit: u8) -> bool {
        self.command() & bit != 0
    }

    fn is_extended(&self) -> bool {
        self.has(command::EXTENDED)
    }

    fn len(&self) -> usize {
        let len = le32(&self.0, 8);
        (if self.is_extended() { len & 0xf_ffff } else { len & 0xffff }) as usize
    }
}

impl Transmitter {
    /// Brings what came from elsewhere in range.
    pub fn sanitize(&mut self) {
        self.bytes.truncate(LONGEST_FRAME);
    }

    /// Whether there is a descriptor to be done.
    pub fn has_work(words: &Words) -> bool {
        words.has(reg::TCTL, ENABLE) && words.ring(reg::TDBAL).is_some_and(|ring| ring.owned() > 0)
    }

    /// Does the next descriptor: frames to be sent, and causes of interrupts.
    pub fn step(&mut self, words: &mut Words, memory: &Memory) -> (Vec<Vec<u8>>, u32) {
        let Some(ring) = words.ring(reg::TDBAL).filter(|ring| ring.owned() > 0) else {
            return Default::default();
        };
        let at = ring.at(0);
        words.set(reg::TDH, ring.index(1));
        let mut causes = if ring.owned() == 1 { cause::TXQE } else { 0 };
        // A descriptor that cannot be read is passed over: nothing could be written back either.
        let Ok(bytes) = fetch(memory, at) else { return (Vec::new(), causes) };
        let descriptor = Descriptor(bytes);
        let frames = self.take(&descriptor, words, memory);
        if descriptor.has(command::REPORT | command::REPORT_SENT) {
            causes |= cause::TXDW;
            // Its memory may have gone.
            let _ = store(memory, at + 12, &[descriptor.0[12] | DONE]);
        }
        (frames, causes)
    }

    fn take(&mut self, descriptor: &Descriptor, words: &mut Words, memory: &Memory) -> Vec<Vec<u8>> {
        let kind = descriptor.0[10] >> 4;
        if descriptor.is_extended() && kind == CONTEXT {
            self.contexts[usize::from(descriptor.has(command::SEGMENT))] = Context {
                ip: Place::parse(&descriptor.0),
                tcp: Place::parse(&descriptor.0[4..]),
                is_tcp: descriptor.has(command::TCP),
                ipv4: descriptor.has(command::IPV4),
                header: descriptor.0[13],
                segment: le16(&descriptor.0, 14),
            };
            return Vec::new();
        }
        let unknown = descriptor.is_extended() && kind != DATA;
        if unknown || self.add(descriptor, memory).is_err() {
            self.bad = true;
        }
        if !descriptor.has(command::END) {
            return Vec::new();
        }
        let frames = if self.bad { Vec::new() } else { self.finish(descriptor, words) };
        *self = Self { contexts: self.contexts, ..Self::default() };
        frames
    }

    /// Adds a piece to the frame.
    fn add(&mut self, descriptor: &Descriptor, memory: &Memory) -> Result<(), Fault> {
        if descriptor.is_extended() {
            self.options.get_or_insert(descriptor.0[13]);
        }
        self.pieces += 1;
        let (start, len) = (self.bytes.len(), descriptor.len());
        if self.bad || start + len > LONGEST_FRAME || self.pieces > MOST_PIECES {
            return Err(Fault::Short);
        }
        self.bytes.resize(start + len, 0);
        load(memory, le64(&descriptor.0, 0), &mut self.bytes[start..])
    }

    /// The frames that the finished one becomes; `last` is its last descriptor.
    fn finish(&mut self, last: &Descriptor, words: &mut Words) -> Vec<Vec<u8>> {
        let mut frame = std::mem::take(&mut self.bytes);
        let options = self.options.unwrap_or(0);
        let mut frames = if !last.is_extended() {
            if last.has(command::CHECKSUM) {
                Place { start: last.0[13], at: last.0[10], last: 0 }.insert(&mut frame, 0);
            }
            vec![frame]
        } else if last.has(command::SEGMENT) {
            let frames = self.contexts[1].cut(&frame, options);
            words.count(reg::TSCTC, 1);
            frames
        } else {
            self.contexts[0].insert(&mut frame, options, 0);
            vec![frame]
        };
        let tag = last.has(command::VLAN) && words.has(reg::CTRL, ctrl::VME);
        for frame in &mut frames {
            if tag && frame.len() >= ETHERNET {
                let kind = (words.get(reg::VET) as u16).to_be_bytes();
                let tag = le16(&last.0, 14).to_be_bytes();
                frame.splice(12..12, [kind, tag].concat());
            }
            if words.has(reg::TCTL, PAD) && frame.len() < SHORTEST {
                frame.resize(SHORTEST, 0);
            }
        }
        frames.retain(|frame| (ETHERNET..=LONGEST_FRAME).contains(&frame.len()));
        frames.iter().for_each(|frame| count(words, frame));
        frames
    }
}

impl Context {
    /// Puts in the checksums that are wanted; `more` belongs to TCP's sum.
    fn insert(&self, frame: &mut [u8], options: u8, more: u16) {
        // TCP's covers nothing of IP's header, so the order does not matter.
        if options & IP_CHECKSUM != 0 {
            self.ip.insert(frame, 0);
        }
        if options & TCP_CHECKSUM != 0 {
            self.tcp.insert(frame, more);
        }
    }

    /// Cuts a long segment (3.5): each piece has the headers, with their lengths, numbers and flags brought up to date.
    fn cut(&self, frame: &[u8], options: u8) -> Vec<Vec<u8>> {
        let (header, size) = (usize::from(self.header), usize::from(self.segment));
        let (ip, tcp) = (usize::from(self.ip.start), usize::from(self.tcp.start));
        let sound = size > 0 && header <= frame.len() && ip + 20 <= header && tcp + 8 <= header;
        let sound = sound && (!self.is_tcp || tcp + 20 <= header) && (self.ipv4 || ip + 40 <= header);
        // Each piece costs as much as a frame does.
        if !sound || (frame.len() - header).div_ceil(size) > MOST_PIECES {
            return Vec::new();
        }
        let (headers, data) = frame.split_at(header);
        let count = data.len().div_ceil(size);
        let pieces = data.chunks(size).enumerate().map(|(n, data)| {
            let mut piece = [headers, data].concat();
            let len = piece.len();
            let mut put =
                |at: usize, value: usize| piece[at..at + 2].copy_from_slice(&(value as u16).to_be_bytes());
            if self.ipv4 {
                put(ip + 2, len - ip);
                let id = u16::from_be_bytes([headers[ip + 4], headers[ip + 5]]);
                put(ip + 4, id.wrapping_add(n as u16).into());
            } else {
                put(ip + 4, len - ip - 40);
            }
            if self.is_tcp {
                let number = u32::from_be_bytes(std::array::from_fn(|i| headers[tcp + 4 + i]));
                let number = number.wrapping_add((n * size) as u32);
                piece[tcp + 4..tcp + 8].copy_from_slice(&number.to_be_bytes());
                if n + 1 < count {
                    // Only the last one ends, and pushes.
                    piece[tcp + 13] &= !0x9;
                }
            } else {
                put(tcp + 4, len - tcp);
            }
            // The driver's sum over the pseudo header knows no length.
            self.insert(&mut piece, options, (len - tcp) as u16);
            piece
        });
        pieces.collect()
    }
}

/// Statistics of what is sent.
fn count(words: &mut Words, frame: &[u8]) {
    let bytes = frame.len() as u64 + 4;
    for at in [reg::GPTC, reg::TPT] {
        words.count(at, 1);
    }
    for at in [reg::GOTC, reg::TOT] {
        words.count_wide(at, bytes);
    }
    match frame {
        [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, ..] => words.count(reg::BPTC, 1),
        [first, ..] if first & 1 == 1 => words.count(reg::MPTC, 1),
        _ => {}
    }
}
