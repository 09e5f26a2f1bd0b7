//! The registers (manual, chapter 13): what a driver writes into most of them is kept and read back; what acts, acts elsewhere.

use serde::{Deserialize, Serialize};

/// Offsets.
pub mod reg {
    pub const CTRL: u32 = 0;
    pub const STATUS: u32 = 8;
    pub const EECD: u32 = 0x10;
    pub const EERD: u32 = 0x14;
    pub const CTRL_EXT: u32 = 0x18;
    pub const MDIC: u32 = 0x20;
    pub const VET: u32 = 0x38;
    pub const ICR: u32 = 0xc0;
    pub const ITR: u32 = 0xc4;
    pub const ICS: u32 = 0xc8;
    pub const IMS: u32 = 0xd0;
    pub const IMC: u32 = 0xd8;
    pub const RCTL: u32 = 0x100;
    pub const TCTL: u32 = 0x400;
    pub const PBA: u32 = 0x1000;
    pub const RDBAL: u32 = 0x2800;
    pub const RDLEN: u32 = 0x2808;
    pub const RDH: u32 = 0x2810;
    pub const RDT: u32 = 0x2818;
    pub const TDBAL: u32 = 0x3800;
    pub const TDLEN: u32 = 0x3808;
    pub const TDH: u32 = 0x3810;
    pub const TDT: u32 = 0x3818;
    /// Statistics, which a read clears: missed packets, good ones received and sent, bytes in 64 bits.
    pub const STATISTICS: u32 = 0x4000;
    pub const MPC: u32 = 0x4010;
    pub const GPRC: u32 = 0x4074;
    pub const BPRC: u32 = 0x4078;
    pub const MPRC: u32 = 0x407c;
    pub const GPTC: u32 = 0x4080;
    pub const GORC: u32 = 0x4088;
    pub const GOTC: u32 = 0x4090;
    pub const TOR: u32 = 0x40c0;
    pub const TOT: u32 = 0x40c8;
    pub const TPR: u32 = 0x40d0;
    pub const TPT: u32 = 0x40d4;
    pub const MPTC: u32 = 0x40f0;
    pub const BPTC: u32 = 0x40f4;
    pub const TSCTC: u32 = 0x40f8;
    pub const STATISTICS_END: u32 = 0x4100;
    pub const RXCSUM: u32 = 0x5000;
    pub const MTA: u32 = 0x5200;
    pub const RA: u32 = 0x5400;
    pub const VFTA: u32 = 0x5600;
    /// Behind the last.
    pub const END: u32 = 0x6000;
}

pub mod ctrl {
    pub const RST: u32 = 1 << 26;
    pub const VME: u32 = 1 << 30;
    pub const PHY_RST: u32 = 1 << 31;
    /// Full duplex, auto-speed detection off, 1000 Mb/s.
    pub const START: u32 = 1 | 2 << 8;
}
pub mod status {
    pub const FULL_DUPLEX: u32 = 1;
    pub const LINK_UP: u32 = 2;
    pub const SPEED_1000: u32 = 2 << 6;
}
/// CTRL_EXT: read the EEPROM anew.
pub const EE_RST: u32 = 1 << 13;

/// Causes of interrupts.
pub mod cause {
    /// A descriptor was written back.
    pub const TXDW: u32 = 1;
    /// The transmit ring is empty.
    pub const TXQE: u32 = 1 << 1;
    /// The link came or went.
    pub const LSC: u32 = 1 << 2;
    /// Few receive descriptors are left.
    pub const RXDMT0: u32 = 1 << 4;
    /// A frame had to wait, for there were none.
    pub const RXO: u32 = 1 << 6;
    /// A frame was received.
    pub const RXT0: u32 = 1 << 7;
    pub const MDAC: u32 = 1 << 9;
    pub const PHY: u32 = 1 << 12;
    pub const ALL: u32 = 0x1_f6df;
}

/// The registers that are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Words(Vec<u32>);

impl Words {
    pub fn new() -> Self {
        let mut words = Self(vec![0; reg::END as usize / 4]);
        words.set(reg::CTRL, ctrl::START);
        words.set(reg::VET, 0x8100);
        words.set(reg::PBA, 0x30);
        words
    }

    /// Brings what came from elsewhere in range.
    pub fn sanitize(&mut self) {
        self.0.resize(reg::END as usize / 4, 0);
    }

    pub fn get(&self, at: u32) -> u32 {
        self.0.get(at as usize / 4).copied().unwrap_or(0)
    }

    pub fn set(&mut self, at: u32, value: u32) {
        if let Some(word) = self.0.get_mut(at as usize / 4) {
            *word = value;
        }
    }

    pub fn has(&self, at: u32, bits: u32) -> bool {
        self.get(at) & bits != 0
    }

    /// The 64 bits at two registers.
    pub fn wide(&self, at: u32) -> u64 {
        u64::from(self.get(at + 4)) << 32 | u64::from(self.get(at))
    }

    /// Counts; a counter stays at its end.
    pub fn count(&mut self, at: u32, n: u32) {
        self.set(at, self.get(at).saturating_add(n));
    }

    pub fn count_wide(&mut self, at: u32, n: u64) {
        let sum = self.wide(at).saturating_add(n);
        self.set(at, sum as u32);
        self.set(at + 4, (sum >> 32) as u32);
    }

    /// Reads a statistic, and clears it: of two words when the second one is read.
    pub fn take_statistic(&mut self, at: u32) -> u32 {
        let value = self.get(at);
        match at {
            reg::GORC | reg::GOTC | reg::TOR | reg::TOT => return value,
            _ if matches!(at - 4, reg::GORC | reg::GOTC | reg::TOR | reg::TOT) => self.set(at - 4, 0),
            _ => {}
        }
        self.set(at, 0);
        value
    }

    /// The ring whose registers are at `base` ([`reg::RDBAL`] or [`reg::TDBAL`]), if it makes sense.
    pub fn ring(&self, base: u32) -> Option<Ring> {
        let count = (self.get(base + 8) & 0xf_ff80) / 16;
        let (head, tail) = (self.get(base + 0x10), self.get(base + 0x18));
        let start = self.wide(base) & !0xf;
        (head < count && tail < count).then_some(Ring { start, count, head, tail })
    }
}

/// The bits of a register that a driver can write and read back; the others are 0.
pub fn kept(at: u32) -> u32 {
    match at {
        // Flow control, wake-up, LEDs, timings: no more than kept.
        0x28 | 0x2c | 0x30 | 0x170 | 0x178 | 0x410 | 0x458 | 0xe00 | 0x2160 | 0x2168 | 0x2410..=0x2428 => {
            u32::MAX
        }
        0x2820 | 0x282c | 0x2c00 | 0x3820 | 0x382c | 0x3830 | 0x2828 | 0x3828 | 0x3000 => u32::MAX,
        0x5800 | 0x5808 | 0x5820 | 0x5838 | 0x5f00..=0x5f28 => u32::MAX,
        reg::CTRL_EXT => !EE_RST,
        reg::VET => 0xffff,
        reg::ITR => 0xffff,
        reg::RCTL | reg::TCTL | reg::PBA | reg::RXCSUM => u32::MAX,
        reg::RDBAL | reg::TDBAL => !0xf,
        0x2804 | 0x3804 => u32::MAX,
        reg::RDLEN | reg::TDLEN => 0xf_ff80,
        reg::RDH | reg::RDT | reg::TDH | reg::TDT => 0xffff,
        reg::MTA..0x5400 | reg::VFTA..0x5800 => u32::MAX,
        // 16 addresses in pairs of words.
        reg::RA..0x5480 => {
            if at & 4 == 0 {
                u32::MAX
            } else {
                0x8003_ffff
            }
        }
        _ => 0,
    }
}

/// A ring of descriptors of 16 bytes.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    start: u64,
    pub count: u32,
    /// The next descriptor for the controller.
    pub head: u32,
    /// The first one that is the driver's.
    pub tail: u32,
}

impl Ring {
    /// Descriptors that are the controller's.
    pub fn owned(&self) -> u32 {
        (self.tail + self.count - self.head) % self.count
    }

    /// The address of the descriptor that is the `n`th from the head on.
    pub fn at(&self, n: u32) -> u64 {
        self.start.wrapping_add(u64::from(self.index(n)) * 16)
    }

    /// Its number.
    pub fn index(&self, n: u32) -> u32 {
        (self.head + n) % self.count
    }
}
