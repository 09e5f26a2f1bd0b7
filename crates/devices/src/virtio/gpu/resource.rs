//! Pictures that the driver makes (5.7.6.8): in its memory, and as the device knows them.

use memory::Guest;
use screens::Picture;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

/// The longest side of a resource.
const MAX_SIDE: u32 = 16384;
/// Pixels of all resources together, 256 MiB.
pub const MAX_PIXELS: u64 = 64 << 20;

/// A rectangle as drivers have it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rect {
    /// Left edge.
    pub x: u32,
    /// Upper edge.
    pub y: u32,
    /// Width.
    pub width: u32,
    /// Height.
    pub height: u32,
}

impl Rect {
    /// Whether it lies in `width` by `height` pixels, and has some.
    pub fn is_in(&self, width: u32, height: u32) -> bool {
        let ends =
            |start: u32, len: u32, end: u32| len > 0 && start.checked_add(len).is_some_and(|e| e <= end);
        ends(self.x, self.width, width) && ends(self.y, self.height, height)
    }
}

/// Where red, green, blue and opacity are among a pixel's four bytes. Only cursors have opacity; Linux makes them in formats that by
/// their names have none (`X8`), with it in the byte that is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Format {
    colours: [u8; 3],
    opacity: u8,
}

impl Format {
    /// The format of a number.
    pub fn of(number: u32) -> Option<Self> {
        let format = |r, g, b, opacity| Some(Self { colours: [r, g, b], opacity });
        match number {
            1 | 2 => format(2, 1, 0, 3),    // B8G8R8A8, B8G8R8X8
            3 | 4 => format(1, 2, 3, 0),    // A8R8G8B8, X8R8G8B8
            67 | 134 => format(0, 1, 2, 3), // R8G8B8A8, R8G8B8X8
            68 | 121 => format(3, 2, 1, 0), // X8B8G8R8, A8B8G8R8
            _ => None,
        }
    }

    fn pixel(self, bytes: [u8; 4]) -> u32 {
        let at = |n: u8| u32::from(bytes[usize::from(n & 3)]);
        let [r, g, b] = self.colours.map(at);
        at(self.opacity) << 24 | r << 16 | g << 8 | b
    }
}

/// A resource.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resource {
    format: Format,
    width: u32,
    height: u32,
    /// Opacity, red, green, blue.
    pixels: Vec<u32>,
    /// Where it is in guest memory: addresses and lengths.
    pub backing: Vec<(u64, u32)>,
}

impl Resource {
    /// An empty picture, if there can be one of that size.
    pub fn new(format: Format, width: u32, height: u32) -> Option<Self> {
        let sizes = 1..=MAX_SIDE;
        if !sizes.contains(&width) || !sizes.contains(&height) {
            return None;
        }
        let pixels = vec![0; width as usize * height as usize];
        Some(Self { format, width, height, pixels, backing: Vec::new() })
    }

    /// Width and height.
    pub fn size(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    /// How many pixels it has.
    pub fn count(&self) -> u64 {
        self.pixels.len() as u64
    }

    /// Whether a saved one is as [`Resource::new`] makes them.
    pub fn is_sound(&self) -> bool {
        self.width <= MAX_SIDE
            && self.height <= MAX_SIDE
            && self.pixels.len() as u64 == u64::from(self.width) * u64::from(self.height)
    }

    /// Copies `rect`, which lies inside, from guest memory, where it begins at `offset`. What is in no memory stays.
    pub fn transfer(&mut self, guest: &Guest, rect: Rect, offset: u64) {
        let stride = u64::from(self.width) * 4;
        let mut bytes = vec![0; rect.width as usize * 4];
        let mut place = Place { backing: &self.backing, before: 0 };
        for row in 0..rect.height {
            let Some(at) = offset.checked_add(stride * u64::from(row)) else { return };
            place.read(guest, at, &mut bytes);
            let first = (rect.y + row) as usize * self.width as usize + rect.x as usize;
            let pixels = self.pixels.iter_mut().skip(first).take(rect.width as usize);
            for (to, from) in pixels.zip(bytes.chunks_exact(4)) {
                *to = self.format.pixel([from[0], from[1], from[2], from[3]]);
            }
        }
    }

    /// Draws `rect` of it.
    pub fn draw(&self, rect: Rect, picture: &mut Picture) {
        picture.resize(rect.width, rect.height);
        for y in 0..picture.size().1 {
            let first = (rect.y + y) as usize * self.width as usize + rect.x as usize;
            let row = picture.row_mut(y);
            if let Some(from) = self.pixels.get(first..first + row.len()) {
                row.iter_mut().zip(from).for_each(|(to, from)| *to = from & 0xff_ffff);
            }
        }
    }

    /// The whole with its opacity.
    pub fn picture(&self) -> Picture {
        let mut picture = Picture::default();
        picture.resize(self.width, self.height);
        for y in 0..picture.size().1 {
            let first = y as usize * self.width as usize;
            let row = picture.row_mut(y);
            row.copy_from_slice(&self.pixels[first..first + row.len()]);
        }
        picture
    }
}

/// Where in the pieces of guest memory a reader is who goes forward.
struct Place<'a> {
    backing: &'a [(u64, u32)],
    /// Bytes before the first of them.
    before: u64,
}

impl Place<'_> {
    /// Reads bytes at `at`, which is not before an earlier one's.
    fn read(&mut self, guest: &Guest, mut at: u64, mut to: &mut [u8]) {
        while let Some(&(address, length)) = self.backing.first() {
            if at >= self.before + u64::from(length) {
                self.before += u64::from(length);
                self.backing = &self.backing[1..];
                continue;
            }
            let within = at - self.before;
            let count = to.len().min((u64::from(length) - within) as usize);
            let (now, rest) = to.split_at_mut(count);
            if let Some(address) = address.checked_add(within)
                && guest.read_slice(now, GuestAddress(address)).is_err()
            {
                // No memory there: black.
                now.fill(0);
            }
            (to, at) = (rest, at + count as u64);
            if to.is_empty() {
                return;
            }
        }
    }
}
