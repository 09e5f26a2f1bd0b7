//! The two 8259A interrupt controllers (Intel 8259A data sheet; ICH9 data sheet, 13.4, for the edge/level registers).

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

/// One 8259A.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Chip {
    /// Levels of the inputs.
    lines: u8,
    /// Requested.
    irr: u8,
    /// In service.
    isr: u8,
    /// Masked.
    imr: u8,
    /// Inputs that are level-triggered (ELCR).
    elcr: u8,
    /// Vector of input 0.
    base: u8,
    /// Which ICW comes next: 2 to 4, or 0.
    next: u8,
    icw4_follows: bool,
    single: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    fully_nested: bool,
    poll: bool,
    read_isr: bool,
    /// The input with the highest priority.
    top: u8,
    /// Initialized at all: before that nothing is delivered.
    ready: bool,
}

impl Chip {
    /// Rank of the highest-priority bit of `bits`: 0 is the top; 8 where there is none.
    fn rank(&self, bits: u8) -> u8 {
        bits.rotate_right(self.top.into()).trailing_zeros() as u8
    }

    /// The input that wants service now.
    fn request(&self, slave: bool) -> Option<u8> {
        let rank = self.rank(self.irr & !self.imr);
        let mut service = self.isr;
        if self.special_mask {
            service &= !self.imr;
        }
        if self.fully_nested && !slave {
            service &= !(1 << 2); // the slave may interrupt itself
        }
        (self.ready && rank < self.rank(service)).then_some((rank + self.top) & 7)
    }

    fn set(&mut self, n: u8, level: bool) {
        let bit = 1 << n;
        if self.elcr & bit != 0 {
            self.irr = if level { self.irr | bit } else { self.irr & !bit };
        } else if level && self.lines & bit == 0 {
            self.irr |= bit;
        } else if !level {
            self.irr &= !bit; // an input must stay up until it is acknowledged
        }
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
    }

    /// The processor (or a poll) takes input `n`.
    fn take(&mut self, n: u8) {
        if self.elcr & 1 << n == 0 {
            self.irr &= !(1 << n);
        }
        if !self.auto_eoi {
            self.isr |= 1 << n;
        } else if self.rotate_on_auto_eoi {
            self.top = (n + 1) & 7;
        }
    }

    fn read(&mut self, port: u64, slave: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return self.request(slave).map_or(7, |n| {
                self.take(n);
                n | 0x80
            });
        }
        match port {
            0 if self.read_isr => self.isr,
            0 => self.irr,
            _ => self.imr,
        }
    }

    fn write(&mut self, port: u64, value: u8) {
        match (port, self.next) {
            (0, _) if value & 0x10 != 0 => self.initialize(value),
            (0, _) if value & 8 == 0 => self.end(value),
            (0, _) => {
                if value & 4 != 0 {
                    self.poll = true;
                }
                if value & 2 != 0 {
                    self.read_isr = value & 1 != 0;
                }
                if value & 0x40 != 0 {
                    self.special_mask = value & 0x20 != 0;
                }
            }
            (_, 2) => {
                self.base = value & 0xf8;
                self.advance(if self.single { 4 } else { 3 });
            }
            (_, 3) => self.advance(4),
            (_, 4) => {
                (self.auto_eoi, self.fully_nested) = (value & 2 != 0, value & 0x10 != 0);
                self.next = 0;
            }
            _ => self.imr = value,
        }
    }

    fn initialize(&mut self, icw1: u8) {
        let (lines, elcr) = (self.lines, self.elcr);
        *self = Self { lines, elcr, irr: lines & elcr, next: 2, ready: false, ..Self::default() };
        (self.icw4_follows, self.single) = (icw1 & 1 != 0, icw1 & 2 != 0);
    }

    fn advance(&mut self, next: u8) {
        self.next = if next == 4 && !self.icw4_follows { 0 } else { next };
        self.ready = true;
    }

    /// OCW2.
    fn end(&mut self, value: u8) {
        let level = value & 7;
        let rank = self.rank(self.isr);
        let highest = (rank < 8).then_some((rank + self.top) & 7);
        match (value >> 5, highest) {
            (0, _) => self.rotate_on_auto_eoi = false,
            (4, _) => self.rotate_on_auto_eoi = true,
            (1, Some(n)) => self.isr &= !(1 << n),
            (5, Some(n)) => {
                self.isr &= !(1 << n);
                self.top = (n + 1) & 7;
            }
            (3, _) => self.isr &= !(1 << level),
            (6, _) => self.top = (level + 1) & 7,
            (7, _) => {
                self.isr &= !(1 << level);
                self.top = (level + 1) & 7;
            }
            _ => {}
        }
    }
}

/// Both controllers, to save and restore. Version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    version: u32,
    chips: [Chip; 2],
}

/// The two controllers: 16 inputs, the second's output on the first's input 2.
#[derive(Debug)]
pub struct Pics(Mutex<PicState>);

impl Default for Pics {
    fn default() -> Self {
        Self(Mutex::new(PicState { version: 1, chips: Default::default() }))
    }
}

impl Pics {
    /// Does something to the controllers; `intr` is told the output's level while no other can change it.
    fn with<R>(&self, intr: impl FnOnce(bool), f: impl FnOnce(&mut [Chip; 2]) -> R) -> R {
        let mut state = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let result = f(&mut state.chips);
        let [master, slave] = &mut state.chips;
        master.set(2, slave.request(true).is_some());
        intr(master.request(false).is_some());
        result
    }

    /// The registers, to save them.
    pub fn state(&self) -> PicState {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Goes on with saved registers.
    pub fn set_state(&self, saved: &PicState, intr: impl FnOnce(bool)) {
        self.with(intr, |chips| {
            *chips = saved.chips.clone();
            for chip in chips {
                (chip.base, chip.top) = (chip.base & 0xf8, chip.top & 7); // a saved file may be wrong
            }
        });
    }

    /// Sets the level of one of the 16 inputs.
    pub fn set(&self, input: u8, level: bool, intr: impl FnOnce(bool)) {
        if input != 2 && input < 16 {
            self.with(intr, |chips| chips[usize::from(input >> 3)].set(input & 7, level));
        }
    }

    /// The INTA cycle: the vector of the highest request, or the spurious one if it has gone.
    pub fn acknowledge(&self, intr: impl FnOnce(bool)) -> u8 {
        self.with(intr, |[master, slave]| match master.request(false) {
            Some(2) => {
                master.take(2);
                let n = slave.request(true);
                if let Some(n) = n {
                    slave.take(n);
                }
                // Its output falls with the INTA, so that its next request is an edge again.
                master.set(2, false);
                slave.base + n.unwrap_or(7)
            }
            Some(n) => {
                master.take(n);
                master.base + n
            }
            None => master.base + 7,
        })
    }

    /// A read of port `port` (0 or 1) of controller `chip` (0 or 1).
    pub fn read(&self, chip: usize, port: u64, intr: impl FnOnce(bool)) -> u8 {
        self.with(intr, |chips| {
            let chip = chip & 1;
            if chip == 1 && chips[1].poll {
                chips[0].set(2, false); // a poll is the slave's INTA
            }
            chips[chip].read(port, chip == 1)
        })
    }

    /// A write to port `port` (0 or 1) of controller `chip` (0 or 1).
    pub fn write(&self, chip: usize, port: u64, value: u8, intr: impl FnOnce(bool)) {
        self.with(intr, |chips| chips[chip & 1].write(port, value));
    }

    /// The edge/level register of controller `chip`.
    pub fn elcr(&self, chip: usize) -> u8 {
        self.state().chips[chip & 1].elcr
    }

    /// Sets the edge/level register: the timer, the keyboard, the cascade, the RTC and the FPU stay edges.
    pub fn set_elcr(&self, chip: usize, value: u8, intr: impl FnOnce(bool)) {
        let fixed = if chip == 0 { 0x07 } else { 0x21 };
        self.with(intr, |chips| {
            let chip = &mut chips[chip & 1];
            chip.elcr = value & !fixed;
            chip.irr = chip.irr & !chip.elcr | chip.lines & chip.elcr;
        });
    }
}
