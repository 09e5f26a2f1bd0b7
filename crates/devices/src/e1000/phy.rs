//! The PHY (manual, 13.4.4 and IEEE 802.3, clause 22; the Marvell 88E1011's own registers as drivers know them). The link is
//! always one of 1000 Mb/s, full duplex.

use serde::{Deserialize, Serialize};

/// MDIC's bits: register, PHY, operation, ready, interrupt wanted, error.
const REGISTER: u32 = 16;
const PHY: u32 = 21;
const WRITE: u32 = 1 << 26;
const READ: u32 = 2 << 26;
const READY: u32 = 1 << 28;
const INTERRUPT: u32 = 1 << 29;
const ERROR: u32 = 1 << 30;
const ADDRESS: u32 = 1;

mod number {
    pub const CONTROL: usize = 0;
    pub const STATUS: usize = 1;
    pub const SPECIFIC_STATUS: usize = 17;
    pub const INTERRUPT_STATUS: usize = 19;
}
const RESET: u16 = 1 << 15;
const RESTART: u16 = 1 << 9;
const POWER_DOWN: u16 = 1 << 11;
/// Auto-negotiation is complete, and there is a link.
const STATUS_UP: u16 = 1 << 5 | 1 << 2;
/// 1000 Mb/s, full duplex, resolved; there is a link.
const SPECIFIC_UP: u16 = 0x8000 | 0x2000 | 0x800 | 0x400;
const LINK_CHANGED: u16 = 1 << 10 | 1 << 11;

/// Its registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phy(Vec<u16>);

/// What came of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// What MDIC reads now.
    pub mdic: u32,
    /// The driver wants an interrupt.
    pub interrupt: bool,
    /// The link was made anew.
    pub restarted: bool,
}

impl Phy {
    pub fn new() -> Self {
        let mut registers = vec![0; 32];
        for (n, value) in [
            (number::CONTROL, 0x1140),
            // 10 and 100 Mb/s, extended status, auto-negotiation.
            (number::STATUS, 0x7949),
            (2, 0x0141),
            (3, 0x0c24),
            (4, 0x0de1),
            // What the partner can: everything.
            (5, 0x45e1),
            (6, 1),
            (9, 0x0e00),
            (10, 0x3c00),
            (15, 0x3000),
            (16, 0x0360),
            (20, 0x0d60),
        ] {
            registers[n] = value;
        }
        Self(registers)
    }

    /// Brings what came from elsewhere in range.
    pub fn sanitize(&mut self) {
        self.0.resize(32, 0);
    }

    /// Whether it works.
    pub fn is_on(&self) -> bool {
        self.0[number::CONTROL] & POWER_DOWN == 0
    }

    /// Notes that the link came or went.
    pub fn link_changed(&mut self) {
        self.0[number::INTERRUPT_STATUS] |= LINK_CHANGED;
    }

    /// What a write of `mdic` does, where the cable is there or not.
    pub fn access(&mut self, mdic: u32, cable: bool) -> Access {
        let n = (mdic >> REGISTER & 0x1f) as usize;
        let interrupt = mdic & INTERRUPT != 0;
        let mut done = Access { mdic: mdic | READY, interrupt, restarted: false };
        match mdic & (WRITE | READ) {
            _ if mdic >> PHY & 0x1f != ADDRESS => done.mdic |= ERROR,
            READ => {
                let value = self.read(n, cable && self.is_on());
                done.mdic = mdic & !0xffff | READY | u32::from(value);
            }
            WRITE => done.restarted = self.write(n, mdic as u16),
            _ => done.mdic |= ERROR,
        }
        done
    }

    fn read(&mut self, n: usize, up: bool) -> u16 {
        let value = self.0[n];
        match n {
            number::STATUS if up => value | STATUS_UP,
            number::SPECIFIC_STATUS if up => value | SPECIFIC_UP,
            number::INTERRUPT_STATUS => std::mem::take(&mut self.0[n]),
            _ => value,
        }
    }

    /// Whether the link is made anew by this.
    fn write(&mut self, n: usize, value: u16) -> bool {
        match n {
            number::CONTROL if value & RESET != 0 => *self = Self::new(),
            number::CONTROL => self.0[n] = value & !RESTART & 0xfd80 | value & 0x40,
            4 | 7 | 9 | 16 | 18 | 20 | 24 | 25 | 29 | 30 => self.0[n] = value,
            _ => {}
        }
        n == number::CONTROL
    }
}
