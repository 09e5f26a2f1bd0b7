//! The registers of the linear frame buffer: Bochs' "VBE DISPI" interface.

use serde::{Deserialize, Serialize};

use super::MEMORY;

/// The newest version of the interface.
const ID: u16 = 0xb0c5;
/// Bits of [`Dispi::enable`].
pub mod enable {
    pub const ENABLED: u16 = 1;
    /// Reading the sizes gives the largest.
    pub const LIMITS: u16 = 2;
    pub const DAC_8: u16 = 0x20;
    pub const KEEP_MEMORY: u16 = 0x80;
}
/// The largest mode that fits.
const LARGEST: (u16, u16) = (2560, 1600);

/// The registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dispi {
    /// Which register the data port is.
    pub index: u16,
    /// Width of the picture in pixels.
    pub width: u16,
    /// Height.
    pub height: u16,
    /// Bits of a pixel: 4, 8, 15, 16, 24 or 32.
    pub depth: u16,
    /// Whether it is on, and how.
    pub enable: u16,
    /// Which 64 KiB the legacy window shows.
    pub bank: u16,
    /// Pixels from one row to the next.
    pub virtual_width: u16,
    /// The first pixel that is shown.
    pub x: u16,
    /// The first row that is shown.
    pub y: u16,
}

impl Dispi {
    /// Whether the linear frame buffer is shown.
    pub fn enabled(&self) -> bool {
        self.enable & enable::ENABLED != 0
    }

    /// Whether the last write to `enable` asks for empty memory.
    pub fn clears(&self) -> bool {
        self.enabled() && self.enable & enable::KEEP_MEMORY == 0
    }

    /// Bytes of `pixels` pixels.
    pub fn bytes_of(&self, pixels: usize) -> usize {
        match self.depth {
            4 => pixels / 2,
            8 => pixels,
            15 | 16 => pixels * 2,
            24 => pixels * 3,
            _ => pixels * 4,
        }
    }

    /// Bytes from one row to the next.
    pub fn stride(&self) -> usize {
        self.bytes_of(usize::from(self.virtual_width.max(self.width)))
    }

    /// Bytes of the picture.
    pub fn bytes(&self) -> usize {
        self.stride() * usize::from(self.height)
    }

    pub(super) fn read(&self, index: u16) -> u16 {
        let limits = self.enable & enable::LIMITS != 0;
        match index {
            0 => ID,
            1 if limits => LARGEST.0,
            1 => self.width,
            2 if limits => LARGEST.1,
            2 => self.height,
            3 if limits => 32,
            3 => self.depth,
            4 => self.enable,
            5 => self.bank,
            6 => self.virtual_width,
            // As many rows as there is memory for.
            7 => MEMORY.checked_div(self.stride()).map_or(0, |rows| rows.min(0xffff) as u16),
            8 => self.x,
            9 => self.y,
            10 => (MEMORY >> 16) as u16,
            _ => 0,
        }
    }

    /// Writes a register. Whether the mode was set or left.
    pub(super) fn write(&mut self, index: u16, value: u16) -> bool {
        match index {
            1 => self.width = value,
            2 => self.height = value,
            3 => self.depth = if value == 0 { 8 } else { value },
            4 => {
                let was = std::mem::replace(&mut self.enable, value);
                if value & enable::ENABLED == 0 {
                    self.bank = 0;
                } else if was & enable::ENABLED == 0 {
                    (self.virtual_width, self.x, self.y) = (self.width, 0, 0);
                    return true;
                }
            }
            5 => self.bank = value & (MEMORY / 0x1_0000 - 1) as u16,
            6 => self.virtual_width = value,
            8 => self.x = value,
            9 => self.y = value,
            _ => {}
        }
        false
    }
}
