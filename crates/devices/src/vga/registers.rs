//! The registers of IBM's VGA at their ports.

use serde::{Deserialize, Serialize};

use super::dispi::{Dispi, enable};

/// CRT controller.
pub mod crtc {
    pub const TOTAL_COLUMNS: usize = 1;
    pub const OVERFLOW: usize = 7;
    pub const MAX_ROW: usize = 9;
    pub const CURSOR_START: usize = 0xa;
    pub const CURSOR_END: usize = 0xb;
    pub const START: usize = 0xc;
    pub const CURSOR: usize = 0xe;
    pub const PROTECT: usize = 0x11;
    pub const LAST_LINE: usize = 0x12;
    pub const OFFSET: usize = 0x13;
    pub const MODE: usize = 0x17;
    pub const COMPARE: usize = 0x18;
}
/// Graphics controller.
pub mod graphics {
    pub const SET_RESET: usize = 0;
    pub const SET_RESET_ENABLE: usize = 1;
    pub const COMPARE: usize = 2;
    pub const ROTATE: usize = 3;
    pub const READ_MAP: usize = 4;
    pub const MODE: usize = 5;
    pub const MISC: usize = 6;
    pub const DONT_CARE: usize = 7;
    pub const BIT_MASK: usize = 8;
}
/// Sequencer.
pub mod sequencer {
    pub const CLOCKING: usize = 1;
    pub const MAP_MASK: usize = 2;
    pub const FONTS: usize = 3;
    pub const MEMORY_MODE: usize = 4;
    /// Of the memory mode.
    pub const CHAIN_4: u8 = 8;
}
/// Attribute controller.
pub mod attribute {
    pub const MODE: usize = 0x10;
    pub const PLANES: usize = 0x12;
    pub const PAN: usize = 0x13;
    pub const COLOUR: usize = 0x14;
    /// Of the index: the screen is on.
    pub const ON: u8 = 0x20;
}
/// Which bits the graphics controller's registers have.
const GRAPHICS_BITS: [u8; 9] = [0xf, 0xf, 0xf, 0x1f, 3, 0x7b, 0xf, 0xf, 0xff];
const SEQUENCER_BITS: [u8; 5] = [3, 0x3d, 0xf, 0x3f, 0xe];

/// The registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Legacy {
    /// Miscellaneous output: bit 0 says that the CRT controller is at 0x3d4, not at 0x3b4.
    pub misc: u8,
    /// Index of the next, and they.
    pub sequencer: (u8, [u8; 5]),
    /// As above.
    pub graphics: (u8, [u8; 9]),
    /// As above.
    pub crtc: (u8, [u8; 32]),
    /// As above; bit 5 of the index turns the screen on.
    pub attribute: (u8, [u8; 21]),
    /// Whether the attribute controller's next write is data.
    pub attribute_data: bool,
    /// Colours, red, green, blue, of 6 or 8 bits.
    pub palette: Vec<[u8; 3]>,
    /// Colour that is read or written next, and which part of it.
    pub dac: (u8, u8),
    /// Whether that is read.
    pub dac_reads: bool,
    /// Which bits of pixels count.
    pub dac_mask: u8,
    /// Whether colours have 8 bits.
    pub dac_8: bool,
    /// The four planes' bytes that were read last.
    pub latch: [u8; 4],
    /// Input status 1, whose retrace bits change with each read.
    pub status: u8,
    /// The first byte of memory in the window, set by the linear frame buffer's bank.
    pub bank: u32,
}

impl Default for Legacy {
    fn default() -> Self {
        Self {
            misc: 1,
            sequencer: (0, [0; 5]),
            graphics: (0, [0; 9]),
            crtc: (0, [0; 32]),
            attribute: (0, [0; 21]),
            attribute_data: false,
            palette: vec![[0; 3]; 256],
            dac: (0, 0),
            dac_reads: false,
            dac_mask: 0xff,
            dac_8: false,
            latch: [0; 4],
            status: 0,
            bank: 0,
        }
    }
}

impl Legacy {
    /// Brings what somebody made up in range.
    pub(super) fn set_in_range(&mut self) {
        self.palette.resize(256, [0; 3]);
        self.dac.1 %= 3;
    }

    /// Reads the port at `port` from 0x3b0.
    pub(super) fn read(&mut self, port: u64) -> u8 {
        let Some(port) = self.colour(port) else { return 0xff };
        match port {
            0x10 => self.attribute.0,
            0x11 => self.attribute.1.get(usize::from(self.attribute.0 & 0x1f)).copied().unwrap_or(0),
            0x14 => self.sequencer.0,
            0x15 => self.sequencer.1.get(usize::from(self.sequencer.0)).copied().unwrap_or(0),
            0x16 => self.dac_mask,
            0x17 if self.dac_reads => 3,
            0x18 => self.dac.0,
            0x19 => {
                let value = self.palette[usize::from(self.dac.0)][usize::from(self.dac.1)];
                self.next_colour();
                value
            }
            0x1c => self.misc,
            0x1e => self.graphics.0,
            0x1f => self.graphics.1.get(usize::from(self.graphics.0)).copied().unwrap_or(0),
            0x24 => self.crtc.0,
            0x25 => self.crtc.1.get(usize::from(self.crtc.0)).copied().unwrap_or(0),
            0x2a => {
                self.attribute_data = false;
                // Some wait for a retrace to begin, some for its end.
                self.status ^= 0x9;
                self.status
            }
            _ => 0,
        }
    }

    /// Writes the port at `port` from 0x3b0.
    pub(super) fn write(&mut self, port: u64, value: u8) {
        let Some(port) = self.colour(port) else { return };
        match port {
            0x10 => self.write_attribute(value),
            0x12 => self.misc = value,
            0x14 => self.sequencer.0 = value & 7,
            0x15 => put(&mut self.sequencer.1, self.sequencer.0, value, &SEQUENCER_BITS),
            0x16 => self.dac_mask = value,
            0x17 | 0x18 => (self.dac, self.dac_reads) = ((value, 0), port == 0x17),
            0x19 => {
                let value = if self.dac_8 { value } else { value & 0x3f };
                self.palette[usize::from(self.dac.0)][usize::from(self.dac.1)] = value;
                self.next_colour();
            }
            0x1e => self.graphics.0 = value & 0xf,
            0x1f => put(&mut self.graphics.1, self.graphics.0, value, &GRAPHICS_BITS),
            0x24 => self.crtc.0 = value,
            0x25 => self.write_crtc(value),
            _ => {}
        }
    }

    /// Ports that are there twice, for colour and for monochrome monitors, as those for colour; none for those that are off.
    fn colour(&self, port: u64) -> Option<u64> {
        let colour = self.misc & 1 != 0;
        match port {
            ..0x10 => (!colour).then_some(port + 0x20),
            0x20.. => colour.then_some(port),
            _ => Some(port),
        }
    }

    fn next_colour(&mut self) {
        self.dac = match self.dac {
            (colour, 2) => (colour.wrapping_add(1), 0),
            (colour, part) => (colour, part + 1),
        };
    }

    fn write_attribute(&mut self, value: u8) {
        if !self.attribute_data {
            self.attribute.0 = value & 0x3f;
        } else if let Some(to) = self.attribute.1.get_mut(usize::from(self.attribute.0 & 0x1f)) {
            *to = value;
        }
        self.attribute_data = !self.attribute_data;
    }

    fn write_crtc(&mut self, value: u8) {
        let index = usize::from(self.crtc.0);
        let protected = self.crtc.1[crtc::PROTECT] & 0x80 != 0;
        match self.crtc.1.get_mut(index) {
            Some(overflow) if protected && index == crtc::OVERFLOW => {
                *overflow = *overflow & !0x10 | value & 0x10
            }
            Some(_) if protected && index < crtc::OVERFLOW => {}
            Some(register) => *register = value,
            None => {}
        }
    }

    /// The linear frame buffer was turned on: its memory is to be seen through the window, too.
    pub(super) fn follow(&mut self, dispi: &Dispi) {
        self.graphics.1[graphics::MISC] = self.graphics.1[graphics::MISC] & !0xc | 5;
        self.crtc.1[crtc::MODE] |= 3;
        self.sequencer.1[sequencer::MAP_MASK] = 0xf;
        let mode = &mut self.graphics.1[graphics::MODE];
        if dispi.depth == 4 {
            *mode &= !0x60;
            self.sequencer.1[sequencer::MEMORY_MODE] &= !sequencer::CHAIN_4;
        } else {
            *mode = *mode & !0x60 | 0x40;
            self.sequencer.1[sequencer::MEMORY_MODE] |= sequencer::CHAIN_4;
        }
    }

    /// What the linear frame buffer's registers mean for these.
    pub(super) fn settle(&mut self, dispi: &Dispi) {
        self.dac_8 = dispi.enable & enable::DAC_8 != 0;
        let shift = if dispi.depth == 4 { 14 } else { 16 };
        self.bank = if dispi.enabled() { u32::from(dispi.bank) << shift } else { 0 };
    }

    /// A colour as a pixel.
    pub(super) fn colour_of(&self, index: u8) -> u32 {
        let part = |v: u8| u32::from(if self.dac_8 { v } else { v << 2 | v >> 4 & 3 });
        let [r, g, b] = self.palette[usize::from(index & self.dac_mask)];
        part(r) << 16 | part(g) << 8 | part(b)
    }

    /// The attribute controller's 16 colours as pixels.
    pub(super) fn colours(&self) -> [u32; 16] {
        let registers = &self.attribute.1;
        let select = registers[attribute::COLOUR];
        std::array::from_fn(|n| {
            let high = (select & 0xc) << 4;
            let index = if registers[attribute::MODE] & 0x80 != 0 {
                registers[n] & 0xf | (select & 3) << 4
            } else {
                registers[n] & 0x3f
            };
            self.colour_of(high | index)
        })
    }
}

fn put(registers: &mut [u8], index: u8, value: u8, bits: &[u8]) {
    if let (Some(to), Some(bits)) = (registers.get_mut(usize::from(index)), bits.get(usize::from(index))) {
        *to = value & bits;
    }
}
