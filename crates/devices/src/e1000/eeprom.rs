//! The EEPROM (manual, chapter 5): 64 words, read by a register or bit by bit as a Microwire chip (93C46).

use serde::{Deserialize, Serialize};

use super::ID;
use crate::net::Mac;

const WORDS: usize = 64;
/// All words add up to this.
const SUM: u16 = 0xbaba;
/// EECD's bits: clock, chip select, data to and from the chip; the driver asks for the chip, and has it; there is one.
const CLOCK: u32 = 1;
const SELECT: u32 = 2;
const TO: u32 = 4;
const FROM: u32 = 8;
const REQUEST: u32 = 1 << 6;
const GRANT: u32 = 1 << 7;
const PRESENT: u32 = 1 << 8;
/// EERD's: begin, done, address, data.
const START: u32 = 1;
const DONE: u32 = 1 << 4;
const ADDRESS: u32 = 8;
const DATA: u32 = 16;
/// A start bit, two bits of the command, six of the address.
const COMMAND: u32 = 0b110 << 6;
const COMMAND_BITS: u32 = 9;

/// What is in it.
pub fn contents(mac: Mac) -> [u16; WORDS] {
    let mut words = [0; WORDS];
    for (word, pair) in words.iter_mut().zip(mac.as_chunks::<2>().0) {
        *word = u16::from_le_bytes(*pair);
    }
    // Initialization control 1: 1000 Mb/s full duplex, subsystem and vendor from here. No wake-up anywhere.
    words[0xa] = 0x4408 | 3;
    words[0xb] = ID.subsystem.1;
    words[0xc] = ID.subsystem.0;
    words[0xd] = ID.device;
    words[0xe] = ID.vendor;
    words[0xf] = 0x3040;
    let sum = words.iter().fold(0u16, |sum, word| sum.wrapping_add(*word));
    words[WORDS - 1] = SUM.wrapping_sub(sum);
    words
}

/// What EERD reads after `value` was written.
pub fn read(words: &[u16; WORDS], value: u32) -> u32 {
    let address = value >> ADDRESS & 0xff;
    let data = words.get(address as usize).copied().unwrap_or(0xffff);
    match value & START {
        0 => address << ADDRESS,
        _ => u32::from(data) << DATA | address << ADDRESS | DONE,
    }
}

/// The chip's pins, and what goes through them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Microwire {
    pins: u32,
    /// Bits that came in since the start bit, and how many.
    came: u32,
    count: u32,
    /// Bits that are to go out, and how many.
    going: u32,
    left: u32,
    next: u32,
}

impl Microwire {
    /// What EECD reads.
    pub fn read(&self) -> u32 {
        let grant = if self.pins & REQUEST != 0 { GRANT } else { 0 };
        // Idle the line is high.
        let high = self.left == 0 || self.going >> (self.left - 1) & 1 == 1;
        self.pins | grant | PRESENT | if high { FROM } else { 0 }
    }

    /// A write to EECD.
    pub fn write(&mut self, words: &[u16; WORDS], value: u32) {
        let rises = value & !self.pins & CLOCK != 0;
        self.pins = value & (CLOCK | SELECT | TO | REQUEST | 0x30);
        if value & SELECT == 0 {
            *self = Self { pins: self.pins, ..Self::default() };
        } else if rises {
            self.clock(words, u32::from(value & TO != 0));
        }
    }

    fn clock(&mut self, words: &[u16; WORDS], bit: u32) {
        if self.count == COMMAND_BITS {
            self.left = self.left.saturating_sub(1);
            if self.left == 0 {
                self.load(words);
            }
            return;
        }
        // Zeroes before the start bit are not counted.
        if self.count > 0 || bit == 1 {
            self.came = self.came << 1 | bit;
            self.count += 1;
        }
        if self.count == COMMAND_BITS {
            if self.came & !0x3f == COMMAND {
                self.next = self.came & 0x3f;
                // A zero goes first.
                self.load(words);
                self.left += 1;
            } else {
                // Writing is ignored.
                self.count = 0;
                self.came = 0;
            }
        }
    }

    /// The next word goes out.
    fn load(&mut self, words: &[u16; WORDS]) {
        self.going = words[self.next as usize % WORDS].into();
        self.left = 16;
        self.next = (self.next + 1) % WORDS as u32;
    }

    /// Brings what came from elsewhere in range.
    pub fn sanitize(&mut self) {
        if self.count > COMMAND_BITS || self.left > 17 || self.next >= WORDS as u32 {
            *self = Self::default();
        }
    }
}
