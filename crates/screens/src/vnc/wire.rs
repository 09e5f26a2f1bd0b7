//! What viewers say: messages parsed from bytes, which may be anything.

/// How a viewer wants its pixels (RFC 6143, 7.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Bytes of a pixel: 1, 2 or 4.
    pub bytes: u8,
    /// Bits that count.
    pub depth: u8,
    /// Whether the most significant byte comes first.
    pub big_endian: bool,
    /// The largest value of red, green and blue.
    pub max: [u16; 3],
    /// Where they are in the pixel, in bits; below 32.
    pub shift: [u8; 3],
}

impl Format {
    /// What the server has: 0x00RRGGBB, little-endian.
    pub const OURS: Self = Self { bytes: 4, depth: 24, big_endian: false, max: [255; 3], shift: [16, 8, 0] };

    /// As it goes over the wire.
    pub fn to_bytes(self) -> [u8; 16] {
        let [r, g, b] = self.max.map(u16::to_be_bytes);
        let [rs, gs, bs] = self.shift;
        let big = u8::from(self.big_endian);
        [self.bytes * 8, self.depth, big, 1, r[0], r[1], g[0], g[1], b[0], b[1], rs, gs, bs, 0, 0, 0]
    }

    fn parse(from: &[u8; 16]) -> Option<Self> {
        let &[bits, depth, big, true_colour, r0, r1, g0, g1, b0, b1, rs, gs, bs, ..] = from;
        let shift = [rs, gs, bs];
        let known = matches!(bits, 8 | 16 | 32) && true_colour != 0 && shift.iter().all(|s| *s < bits);
        known.then_some(Self {
            bytes: bits / 8,
            depth,
            big_endian: big != 0,
            max: [[r0, r1], [g0, g1], [b0, b1]].map(u16::from_be_bytes),
            shift,
        })
    }

    /// A pixel of ours in this format, in the low bytes.
    pub fn pixel(self, pixel: u32) -> u32 {
        if self.max == Self::OURS.max && self.shift == Self::OURS.shift {
            return pixel & 0xff_ffff;
        }
        let parts = [pixel >> 16, pixel >> 8, pixel].map(|part| part & 0xff);
        (0..3).fold(0, |v, n| v | (((parts[n] * u32::from(self.max[n]) + 127) / 255) << self.shift[n]))
    }

    /// Appends a pixel that [`Format::pixel`] has made.
    pub fn put(self, pixel: u32, to: &mut Vec<u8>) {
        let bytes = usize::from(self.bytes);
        if self.big_endian {
            to.extend(&pixel.to_be_bytes()[4 - bytes..]);
        } else {
            to.extend(&pixel.to_le_bytes()[..bytes]);
        }
    }
}

/// A message of the viewer's (RFC 6143, 7.5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// How it wants pixels.
    SetFormat(Format),
    /// What it understands, best first.
    SetEncodings(Vec<i32>),
    /// It wants to see a part of the screen: what changed of it, or all.
    Update { changes: bool, x: u16, y: u16, width: u16, height: u16 },
    /// A key, by its keysym.
    Keysym { down: bool, keysym: u32 },
    /// A key, by its number in scan code set 1.
    Key { down: bool, keysym: u32, xt: u32 },
    /// The pointer.
    Pointer { buttons: u16, x: u16, y: u16 },
    /// The size that it would like.
    Resize { width: u16, height: u16 },
    /// What we have no use for.
    Other,
}

/// The longest message that is understood.
pub const LONGEST: usize = 1 << 20;
/// More encodings than there are.
const ENCODINGS: usize = 1024;

/// A message that cannot be.
#[derive(Debug, PartialEq, Eq)]
pub struct Nonsense;

/// Takes a message off the beginning of `bytes`, if it is there whole, with the number of its bytes.
pub fn parse(bytes: &[u8]) -> Result<Option<(Message, usize)>, Nonsense> {
    let Some(&kind) = bytes.first() else { return Ok(None) };
    let word = |at: usize| bytes.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
    let long = |at: usize| Some(u32::from(word(at)?) << 16 | u32::from(word(at + 2)?));
    let message = || {
        Some(match kind {
            0 => (
                bytes.get(4..20).and_then(|b| b.first_chunk()).map(Format::parse)?.map(Message::SetFormat),
                20,
            ),
            2 => {
                let count = usize::from(word(2)?);
                if count > ENCODINGS {
                    return Some((None, 0));
                }
                let list = bytes.get(4..4 + 4 * count)?.chunks_exact(4);
                let list = list.map(|b| i32::from_be_bytes([b[0], b[1], b[2], b[3]])).collect();
                (Some(Message::SetEncodings(list)), 4 + 4 * count)
            }
            3 => {
                let (x, y, width, height) = (word(2)?, word(4)?, word(6)?, word(8)?);
                (Some(Message::Update { changes: bytes[1] != 0, x, y, width, height }), 10)
            }
            4 => (Some(Message::Keysym { keysym: long(4)?, down: bytes[1] != 0 }), 8),
            5 => {
                let (x, y) = (word(2)?, word(4)?);
                // With bit 7 a byte follows, of which this server has not told that it knows it.
                (Some(Message::Pointer { buttons: u16::from(bytes[1]), x, y }), 6)
            }
            // The clipboard: its length may be negative for an extension that we do not have.
            6 => {
                let length = long(4)? as usize;
                if length > LONGEST - 8 {
                    return Some((None, 0));
                }
                bytes.get(..8 + length)?;
                (Some(Message::Other), 8 + length)
            }
            251 => {
                let (width, height, screens) = (word(2)?, word(4)?, usize::from(*bytes.get(6)?));
                bytes.get(..8 + 16 * screens)?;
                (Some(Message::Resize { width, height }), 8 + 16 * screens)
            }
            // QEMU's extended key event, of which this server tells; it tells of none of QEMU's others.
            255 if *bytes.get(1)? == 0 => {
                (Some(Message::Key { down: word(2)? != 0, keysym: long(4)?, xt: long(8)? }), 12)
            }
            _ => (None, 0),
        })
    };
    match message() {
        None => Ok(None),
        Some((Some(message), length)) => Ok(Some((message, length))),
        Some((None, _)) => Err(Nonsense),
    }
}
