//! Pictures: pixels in memory, and PNG files of them.

use std::io::Write;

/// The largest width and height of a picture.
pub const MAX_SIDE: u32 = 8192;
/// The largest number of pixels: 64 MiB.
const MAX_PIXELS: usize = 16 << 20;

/// A picture: pixels as 0x00RRGGBB, row by row from the top left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Picture {
    width: u32,
    height: u32,
    pixels: Vec<u32>,
}

/// A part of a picture, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// The guest's mouse cursor, where it does not draw one itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Its pixels, whose upper 8 bits are opacity; without any it is hidden.
    pub picture: Picture,
    /// The pixel that points, from the upper left corner.
    pub hot: (u32, u32),
}

impl Picture {
    /// Pixels of width and height.
    pub fn size(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    /// Sets the size, as near as the limits allow; where it is another one than before, all pixels are black.
    pub fn resize(&mut self, width: u32, height: u32) {
        let width = width.clamp(1, MAX_SIDE);
        let height = height.clamp(1, MAX_SIDE).min((MAX_PIXELS / width as usize) as u32);
        if (width, height) != (self.width, self.height) {
            (self.width, self.height) = (width, height);
            self.pixels.clear();
            self.pixels.resize(width as usize * height as usize, 0);
        }
    }

    /// Paints all of it.
    pub fn fill(&mut self, pixel: u32) {
        self.pixels.fill(pixel);
    }

    /// A row of pixels; none beyond the lower edge.
    pub fn row(&self, y: u32) -> &[u32] {
        let width = self.width as usize;
        self.pixels.get(y as usize * width..(y as usize + 1) * width).unwrap_or_default()
    }

    /// A row of pixels, to be drawn; none beyond the lower edge.
    pub fn row_mut(&mut self, y: u32) -> &mut [u32] {
        let width = self.width as usize;
        self.pixels.get_mut(y as usize * width..(y as usize + 1) * width).unwrap_or_default()
    }

    /// The pixels of a row of `rect`, which lies inside.
    pub fn part(&self, rect: Rect, row: u32) -> &[u32] {
        let x = rect.x as usize;
        self.row(rect.y + row).get(x..x + rect.width as usize).unwrap_or_default()
    }

    /// Writes it as a PNG file (RGB, 8 bits).
    ///
    /// # Errors
    /// What `to` says.
    pub fn png(&self, to: impl Write) -> std::io::Result<()> {
        let mut encoder = png::Encoder::new(to, self.width.max(1), self.height.max(1));
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut bytes: Vec<u8> =
            self.pixels.iter().flat_map(|p| [(p >> 16) as u8, (p >> 8) as u8, *p as u8]).collect();
        if bytes.is_empty() {
            bytes = vec![0; 3];
        }
        let told = |error| match error {
            png::EncodingError::IoError(error) => error,
            other => std::io::Error::other(other),
        };
        let mut writer = encoder.write_header().map_err(told)?;
        writer.write_image_data(&bytes).map_err(told)?;
        writer.finish().map_err(told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_png_holds_the_pixels() {
        let mut picture = Picture::default();
        picture.resize(3, 2);
        picture.row_mut(1).copy_from_slice(&[0x112233, 0xff0000, 0x0000ff]);
        let mut bytes = Vec::new();
        picture.png(&mut bytes).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
        let mut out = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut out).unwrap();
        assert_eq!((info.width, info.height), (3, 2));
        assert_eq!(out[9..], [0x11, 0x22, 0x33, 0xff, 0, 0, 0, 0, 0xff]);
        picture.resize(u32::MAX, u32::MAX);
        assert!(picture.pixels.len() <= MAX_PIXELS);
    }
}
