//! The keyboard (IBM PS/2 Hardware Interface Technical Reference, "Keyboards": commands, scan code sets 1 and 2).

use std::collections::VecDeque;

use screens::Key;
use serde::{Deserialize, Serialize};

use super::{ACK, RESEND};

/// Bytes that wait for the guest; keys that are let go have more room than those that are pressed, so that none stays down.
const ROOM: (usize, usize) = (48, 96);
/// What the controller makes of set 2's codes, below 0x80: set 1's.
const TRANSLATED: [u8; 128] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59, //
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b, //
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d, //
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f, //
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61, //
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76, //
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f, //
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54, //
];
const EXTENDED: u8 = 0xe0;
const RELEASED: u8 = 0xf0;

/// A keyboard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keyboard {
    /// The set of scan codes that it sends.
    pub set: u8,
    /// Whether it sends keys at all.
    pub scanning: bool,
    /// Scroll, num and caps lock, from bit 0.
    pub lights: u8,
    /// The command whose data byte comes next, or 0.
    pub command: u8,
    /// What waits to be sent.
    pub out: VecDeque<u8>,
    /// What was sent last.
    pub last: u8,
}

impl Default for Keyboard {
    fn default() -> Self {
        Self { set: 2, scanning: true, lights: 0, command: 0, out: VecDeque::new(), last: 0 }
    }
}

impl Keyboard {
    /// A byte from the host.
    pub fn command(&mut self, byte: u8) {
        match (std::mem::take(&mut self.command), byte) {
            // Which set of scan codes.
            (0xf0, 0) => self.say(&[ACK, self.set]),
            (0xf0, 1 | 2) => {
                self.set = byte;
                self.say(&[ACK]);
            }
            (0xed, lights) => {
                self.lights = lights & 7;
                self.say(&[ACK]);
            }
            // How keys repeat: those who type repeat them.
            (0xf3, _) => self.say(&[ACK]),
            (_, 0xed | 0xf0 | 0xf3) => {
                self.command = byte;
                self.say(&[ACK]);
            }
            (_, 0xee) => self.say(&[0xee]),
            (_, 0xf2) => self.say(&[ACK, 0xab, 0x83]),
            (_, 0xf4) => {
                self.scanning = true;
                self.out.clear();
                self.say(&[ACK]);
            }
            (_, 0xf5 | 0xf6) => {
                *self = Self { scanning: byte == 0xf6, lights: self.lights, ..Self::default() };
                self.say(&[ACK]);
            }
            (_, 0xfe) => self.say(&[self.last]),
            // Reset, and the self-test went well.
            (_, 0xff) => {
                *self = Self::default();
                self.say(&[ACK, 0xaa]);
            }
            _ => self.say(&[RESEND]),
        }
    }

    fn say(&mut self, bytes: &[u8]) {
        if self.out.len() < ROOM.1 {
            self.out.extend(bytes);
        }
    }

    /// A key goes down or up. Whether there was room for it.
    pub fn key(&mut self, key: Key, down: bool) -> bool {
        let room = if down { ROOM.0 } else { ROOM.1 };
        if !self.scanning || self.out.len() + 3 > room {
            return false;
        }
        let Some(xt) = key.xt() else { return true };
        if xt & 0x80 != 0 {
            self.out.push_back(EXTENDED);
        }
        if self.set == 1 {
            self.out.push_back(xt & 0x7f | if down { 0 } else { 0x80 });
        } else {
            self.out.extend((!down).then_some(RELEASED));
            self.out.push_back(of_set_1(xt & 0x7f));
        }
        true
    }

    /// What is sent next.
    pub fn take(&mut self) -> Option<u8> {
        let byte = self.out.pop_front()?;
        self.last = byte;
        Some(byte)
    }

    /// Brings what somebody made up in range.
    pub fn set_in_range(&mut self) {
        self.set = self.set.clamp(1, 2);
        self.out.truncate(ROOM.1);
    }
}

/// The code in set 2 of one in set 1.
fn of_set_1(code: u8) -> u8 {
    match code {
        // F7 has two that are translated so.
        0x41 => 0x83,
        code => TRANSLATED.iter().position(|known| *known == code).unwrap_or(0) as u8,
    }
}

/// What the controller makes of a byte from the keyboard, if it is not to wait for the next; `released`: the last one said so.
pub fn translate(byte: u8, released: &mut bool) -> Option<u8> {
    let code = match byte {
        RELEASED => {
            *released = true;
            return None;
        }
        0x83 => 0x41,
        0x84 => 0x54,
        0x80.. => byte,
        _ => TRANSLATED[usize::from(byte)],
    };
    Some(if std::mem::take(released) && code < 0x80 { code | 0x80 } else { code })
}
