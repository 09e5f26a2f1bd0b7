//! The mouse (IBM PS/2 Hardware Interface Technical Reference, "Auxiliary device"), with a wheel (IntelliMouse) and five buttons
//! (IntelliMouse Explorer), which a driver finds by setting sample rates.

use std::collections::VecDeque;

use screens::Point;
use serde::{Deserialize, Serialize};

use super::{ACK, RESEND};

/// Bytes that wait for the guest; beyond this, movements are added up.
const ROOM: usize = 64;

/// A mouse.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mouse {
    /// 0, with a wheel 3, with five buttons 4.
    pub id: u8,
    /// Whether it tells of movements itself.
    pub enabled: bool,
    /// Whether it does so only when asked.
    pub remote: bool,
    /// Whether it sends back whatever it gets.
    pub echo: bool,
    /// Whether movements count twice.
    pub twice: bool,
    /// Counts per millimetre, as a power of two.
    pub resolution: u8,
    /// Samples per second: the last three.
    pub rates: [u8; 3],
    /// The command whose data byte comes next, or 0.
    pub command: u8,
    /// What waits to be sent.
    pub out: VecDeque<u8>,
    /// Where the pointer was.
    pub at: Option<(u32, u32)>,
    /// Buttons as a [`Point`] has them.
    pub buttons: u16,
    /// Right, up, and the wheel towards the user, since the last packet.
    pub moved: [i32; 3],
    /// Whether there is something to be told.
    pub news: bool,
}

impl Default for Mouse {
    fn default() -> Self {
        Self {
            id: 0,
            enabled: false,
            remote: false,
            echo: false,
            twice: false,
            resolution: 2,
            rates: [100; 3],
            command: 0,
            out: VecDeque::new(),
            at: None,
            buttons: 0,
            moved: [0; 3],
            news: false,
        }
    }
}

impl Mouse {
    /// A byte from the host.
    pub fn command(&mut self, byte: u8) {
        if self.echo && !matches!(byte, 0xec | 0xff) {
            return self.say(&[byte]);
        }
        match (std::mem::take(&mut self.command), byte) {
            (0xe8, resolution) => {
                self.resolution = resolution & 3;
                self.say(&[ACK]);
            }
            (0xf3, rate) => self.set_rate(rate),
            (_, 0xe8 | 0xf3) => {
                self.command = byte;
                self.say(&[ACK]);
            }
            (_, 0xe6 | 0xe7) => {
                self.twice = byte == 0xe7;
                self.say(&[ACK]);
            }
            (_, 0xe9) => self.say(&[ACK, self.status(), self.resolution, self.rates[2]]),
            (_, 0xea | 0xf0) => {
                self.remote = byte == 0xf0;
                self.say(&[ACK]);
            }
            (_, 0xeb) => {
                self.say(&[ACK]);
                self.packet();
            }
            (_, 0xec | 0xee) => {
                self.echo = byte == 0xee;
                self.say(&[ACK]);
            }
            (_, 0xf2) => self.say(&[ACK, self.id]),
            (_, 0xf4 | 0xf5) => {
                self.enabled = byte == 0xf4;
                self.out.clear();
                self.say(&[ACK]);
            }
            (_, 0xf6) => {
                *self = Self { id: self.id, ..Self::default() };
                self.say(&[ACK]);
            }
            // Reset: the self-test went well, and it is a plain mouse.
            (_, 0xff) => {
                *self = Self::default();
                self.say(&[ACK, 0xaa, 0]);
            }
            _ => self.say(&[RESEND]),
        }
    }

    fn say(&mut self, bytes: &[u8]) {
        if self.out.len() < 2 * ROOM {
            self.out.extend(bytes);
        }
    }

    fn set_rate(&mut self, rate: u8) {
        self.rates = [self.rates[1], self.rates[2], rate];
        match self.rates {
            [200, 100, 80] => self.id = 3,
            [200, 200, 80] => self.id = 4,
            _ => {}
        }
        self.say(&[ACK]);
    }

    fn status(&self) -> u8 {
        let mode = u8::from(self.remote) << 6 | u8::from(self.enabled) << 5 | u8::from(self.twice) << 4;
        // Left, middle, right.
        mode | ((self.buttons & 1) << 2 | (self.buttons & 6) >> 1) as u8
    }

    /// The pointer is elsewhere, or buttons have changed. Whether anybody listens.
    pub fn point(&mut self, point: Point) -> bool {
        if !self.enabled {
            self.at = None;
            return false;
        }
        let now = (point.x.min(0xffff), point.y.min(0xffff));
        let (x, y) = self.at.replace(now).unwrap_or(now);
        let pressed = point.buttons & !self.buttons;
        let wheel = i32::from(pressed & 0x10 != 0) - i32::from(pressed & 8 != 0);
        let moved = [now.0 as i32 - x as i32, y as i32 - now.1 as i32, wheel];
        let buttons = point.buttons & 0x187;
        let clicked = buttons != self.buttons & 0x187;
        if clicked {
            // What was before happened with the buttons as they were.
            self.packets();
        }
        self.buttons = point.buttons;
        for (sum, more) in self.moved.iter_mut().zip(moved) {
            *sum = (*sum + more).clamp(-0x1_0000, 0x1_0000);
        }
        self.news |= clicked || moved != [0; 3];
        if clicked || self.out.is_empty() {
            self.packets();
        }
        true
    }

    fn packets(&mut self) {
        while self.news && self.enabled && !self.remote && self.out.len() < ROOM {
            self.packet();
        }
    }

    fn packet(&mut self) {
        let [x, y, z] = self.moved;
        let (dx, dy, dz) = (x.clamp(-255, 255), y.clamp(-255, 255), z.clamp(-7, 7));
        self.moved = [x - dx, y - dy, z - dz];
        self.news = self.moved != [0; 3];
        let signs = u8::from(dx < 0) << 4 | u8::from(dy < 0) << 5;
        let buttons = self.buttons;
        // Left, right, middle.
        let three = (buttons & 1 | buttons >> 1 & 2 | (buttons & 2) << 1) as u8;
        self.out.extend([8 | three | signs, dx as u8, dy as u8]);
        match self.id {
            3 => self.out.push_back(dz as u8),
            // Back and forward.
            4 => self.out.push_back(dz as u8 & 0xf | ((buttons >> 7 & 3) << 4) as u8),
            _ => {}
        }
    }

    /// What is sent next.
    pub fn take(&mut self) -> Option<u8> {
        if self.out.is_empty() {
            self.packets();
        }
        self.out.pop_front()
    }

    /// Brings what somebody made up in range.
    pub fn set_in_range(&mut self) {
        self.out.truncate(2 * ROOM + 4);
        self.moved = self.moved.map(|moved| moved.clamp(-0x1_0000, 0x1_0000));
        self.at = self.at.map(|(x, y)| (x.min(0xffff), y.min(0xffff)));
        self.resolution &= 3;
    }
}
