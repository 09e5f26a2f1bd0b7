//! What is said of a frame before it (virtio 1.2, 5.1.6): work that the receiver may leave to others, or has to do.

use virtio_bindings::virtio_net as b;

use crate::dma::le16;

/// Bytes of the header in a buffer of the driver's.
pub const HEADER: usize = 12;
/// Bytes of a frame, without the header: an IP packet of 64 KiB and Ethernet's own header with a VLAN.
pub const LONGEST_FRAME: usize = (1 << 16) + 18;
/// Bytes of Ethernet's header: destination, source, type.
pub const ETHERNET: usize = 14;

/// What is left to do on a frame, and what is known of it. Offsets are inside the frame that it was made for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The checksum covers the bytes from here on, and is to be put this many bytes behind.
    pub checksum: Option<(u16, u16)>,
    /// The checksum is known to be right.
    pub valid: bool,
    /// The frame is to be cut into several.
    pub segments: Option<Segments>,
}

/// How a long TCP segment is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// It is of TCP over IPv6, else over IPv4.
    pub ipv6: bool,
    /// It has congestion notification: only the first piece keeps CWR.
    pub ecn: bool,
    /// Bytes of data in each piece, not 0.
    pub size: u16,
    /// Bytes of the headers before the data, as a hint.
    pub header: u16,
}

impl Header {
    /// Reads a header as guests and TAP devices write it, for a frame of `len` bytes. None if it makes no sense.
    pub fn parse(bytes: &[u8; HEADER], len: usize) -> Option<Self> {
        let (flags, kind) = (u32::from(bytes[0]), u32::from(bytes[1]));
        let [header, size, start, offset] = [2, 4, 6, 8].map(|at| le16(bytes, at));
        let checksum = (flags & b::VIRTIO_NET_HDR_F_NEEDS_CSUM != 0).then_some((start, offset));
        if checksum.is_some_and(|(start, offset)| usize::from(start) + usize::from(offset) + 2 > len) {
            return None;
        }
        let ipv6 = match kind & !b::VIRTIO_NET_HDR_GSO_ECN {
            b::VIRTIO_NET_HDR_GSO_NONE => {
                let valid = flags & b::VIRTIO_NET_HDR_F_DATA_VALID != 0;
                return Some(Self { checksum, valid, segments: None });
            }
            b::VIRTIO_NET_HDR_GSO_TCPV4 => false,
            b::VIRTIO_NET_HDR_GSO_TCPV6 => true,
            _ => return None,
        };
        // Each piece has a checksum of its own.
        let sound = size > 0 && checksum.is_some() && usize::from(header) <= len;
        let ecn = kind & b::VIRTIO_NET_HDR_GSO_ECN != 0;
        sound.then_some(Self { checksum, valid: false, segments: Some(Segments { ipv6, ecn, size, header }) })
    }

    /// As guests and TAP devices read it.
    pub fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut put = |at: usize, value: u16| bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        // One buffer holds the frame.
        put(10, 1);
        let mut flags = if self.valid { b::VIRTIO_NET_HDR_F_DATA_VALID } else { 0 };
        if let Some((start, offset)) = self.checksum {
            flags |= b::VIRTIO_NET_HDR_F_NEEDS_CSUM;
            put(6, start);
            put(8, offset);
        }
        let mut kind = b::VIRTIO_NET_HDR_GSO_NONE;
        if let Some(Segments { ipv6, ecn, size, header }) = self.segments {
            kind = if ipv6 { b::VIRTIO_NET_HDR_GSO_TCPV6 } else { b::VIRTIO_NET_HDR_GSO_TCPV4 };
            kind |= if ecn { b::VIRTIO_NET_HDR_GSO_ECN } else { 0 };
            put(2, header);
            put(4, size);
        }
        (bytes[0], bytes[1]) = (flags as u8, kind as u8);
        bytes
    }

    /// Computes the checksum that was left to do (RFC 1071): its place holds the pseudo header's sum.
    pub fn finish_checksum(&mut self, frame: &mut [u8]) {
        let Some((start, offset)) = self.checksum.take() else { return };
        let (start, at) = (usize::from(start), usize::from(start) + usize::from(offset));
        if at + 2 > frame.len() {
            return;
        }
        let checksum = checksum(sum(&frame[start..]));
        frame[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    }
}

/// The one's complement sum of words in network order (RFC 1071).
pub fn sum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
    let mut sum: u64 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The checksum for such a sum. UDP's "none" is 0, and these are the same number.
pub fn checksum(sum: u16) -> u16 {
    if sum == 0xffff { sum } else { !sum }
}

/// The queue that a frame's stream goes to, of so many: all of a TCP or UDP stream over IPv4 or IPv6 goes to the same one, whichever its
/// direction.
pub fn queue_of(frame: &[u8], queues: usize) -> usize {
    let (addresses, length, protocol, ports) = match frame.get(12..ETHERNET) {
        Some([0x08, 0x00]) => (26, 8, 23, 34),
        Some([0x86, 0xdd]) => (22, 32, 20, 54),
        _ => return 0,
    };
    let Some(both) = frame.get(addresses..addresses + length) else { return 0 };
    let mut sum = both.chunks(2).fold(0, |sum, pair| sum ^ (u32::from(pair[0]) << 8 | u32::from(pair[1])));
    // TCP or UDP, without options of IPv4's before it.
    let plain = frame[ETHERNET] == 0x45 || length == 32;
    if let (Some(6 | 17), true, Some(ports)) = (frame.get(protocol), plain, frame.get(ports..ports + 4)) {
        sum ^= u32::from(ports[0] ^ ports[2]) << 8 | u32::from(ports[1] ^ ports[3]);
    }
    (sum.wrapping_mul(0x9e37_79b1) >> 16) as usize % queues.max(1)
}
