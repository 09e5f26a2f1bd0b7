//! Pixels as viewers want them: plain, compressed whole, or ZRLE (RFC 6143, 7.7).

use flate2::{Compress, Compression, FlushCompress};

use super::wire::Format;
use crate::{Picture, Rect};

/// ZRLE's tiles.
const TILE: u32 = 64;

/// A viewer's compressed stream, which goes on from one rectangle to the next.
pub struct Stream(Compress);

impl Default for Stream {
    fn default() -> Self {
        Self(Compress::new(Compression::new(3), true))
    }
}

impl Stream {
    /// Compresses `bytes` with the stream's length before them.
    fn append(&mut self, bytes: &[u8], to: &mut Vec<u8>) {
        let length_at = to.len();
        to.extend([0; 4]);
        let mut rest = bytes;
        loop {
            to.reserve(rest.len() / 2 + 1024);
            let before = self.0.total_in();
            // It fails only where a stream is used after its end, and this one has none.
            let done = self.0.compress_vec(rest, to, FlushCompress::Sync);
            rest = &rest[(self.0.total_in() - before) as usize..];
            // With room to spare, all is out.
            if done.is_err() || (rest.is_empty() && to.len() < to.capacity()) {
                break;
            }
        }
        let length = (to.len() - length_at - 4) as u32;
        to[length_at..length_at + 4].copy_from_slice(&length.to_be_bytes());
    }
}

/// The pixels of `rect`, one by one.
pub fn raw(picture: &Picture, rect: Rect, format: Format, to: &mut Vec<u8>) {
    to.reserve((rect.width * rect.height) as usize * usize::from(format.bytes));
    for row in 0..rect.height {
        picture.part(rect, row).iter().for_each(|pixel| format.put(format.pixel(*pixel), to));
    }
}

/// The same, compressed.
pub fn zlib(picture: &Picture, rect: Rect, format: Format, stream: &mut Stream, to: &mut Vec<u8>) {
    let mut bytes = Vec::new();
    raw(picture, rect, format, &mut bytes);
    stream.append(&bytes, to);
}

/// In tiles, each with a palette where it has few colours, compressed.
pub fn zrle(picture: &Picture, rect: Rect, format: Format, stream: &mut Stream, to: &mut Vec<u8>) {
    let mut bytes = Vec::new();
    for y in (0..rect.height).step_by(TILE as usize) {
        for x in (0..rect.width).step_by(TILE as usize) {
            let (width, height) = ((rect.width - x).min(TILE), (rect.height - y).min(TILE));
            tile(picture, Rect { x: rect.x + x, y: rect.y + y, width, height }, format, &mut bytes);
        }
    }
    stream.append(&bytes, to);
}

/// A pixel as ZRLE has it: where one of 4 bytes has an empty byte at one end, that is left out.
struct Compact {
    format: Format,
    skip: Option<std::ops::Range<usize>>,
}

impl Compact {
    fn new(format: Format) -> Self {
        let mask = (0..3).fold(0u64, |mask, n| mask | u64::from(format.max[n]) << format.shift[n]);
        let low = mask < 1 << 24;
        let high = mask & 0xff == 0 && mask < 1 << 32;
        let skip = match (format.bytes == 4 && format.depth <= 24, format.big_endian) {
            (true, false) if low => Some(0..3),
            (true, false) if high => Some(1..4),
            (true, true) if low => Some(1..4),
            (true, true) if high => Some(0..3),
            _ => None,
        };
        Self { format, skip }
    }

    fn put(&self, pixel: u32, to: &mut Vec<u8>) {
        let pixel = self.format.pixel(pixel);
        match &self.skip {
            None => self.format.put(pixel, to),
            Some(part) if self.format.big_endian => to.extend(&pixel.to_be_bytes()[part.clone()]),
            Some(part) => to.extend(&pixel.to_le_bytes()[part.clone()]),
        }
    }
}

fn tile(picture: &Picture, rect: Rect, format: Format, to: &mut Vec<u8>) {
    let compact = Compact::new(format);
    let rows = || (0..rect.height).map(|row| picture.part(rect, row));
    let mut palette: Vec<u32> = Vec::new();
    let few = rows().flatten().all(|pixel| {
        palette.contains(pixel) || {
            palette.push(*pixel);
            palette.len() <= 16
        }
    });
    if !few {
        to.push(0);
        rows().flatten().for_each(|pixel| compact.put(*pixel, to));
        return;
    }
    to.push(palette.len() as u8);
    palette.iter().for_each(|pixel| compact.put(*pixel, to));
    let bits = match palette.len() {
        ..=1 => return,
        2 => 1,
        3..=4 => 2,
        _ => 4,
    };
    for row in rows() {
        for pixels in row.chunks(8 / bits) {
            let byte = pixels.iter().enumerate().fold(0u8, |byte, (n, pixel)| {
                let index = palette.iter().position(|known| known == pixel).unwrap_or(0);
                byte | (index as u8) << (8 - bits * (n + 1))
            });
            to.push(byte);
        }
    }
}
