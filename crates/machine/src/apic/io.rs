//! The IOAPIC: 24 pins, as in Intel's ICH9 (82093AA data sheet; ICH9 data sheet, 13.5).

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use crate::Registers;
use crate::irq::{LocalApics, Msi};

/// Pins.
pub const PINS: usize = 24;
/// With a version of 0x20 and more there is an EOI register.
const VERSION: u32 = 0x20;

const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// The IOAPIC's registers, to save and restore. Version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    /// Layout of this structure.
    pub version: u32,
    /// APIC id.
    pub id: u8,
    /// Which register the window shows.
    pub select: u8,
    /// Redirection table.
    pub entries: [u64; PINS],
    /// Levels of the pins.
    pub levels: u32,
}

/// The IOAPIC.
pub struct IoApic {
    state: Mutex<IoApicState>,
    sink: Arc<dyn LocalApics>,
}

impl fmt::Debug for IoApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IoApic").field(&*self.lock()).finish()
    }
}

impl IoApic {
    /// All pins masked; messages go to `sink`.
    pub fn new(sink: Arc<dyn LocalApics>) -> Self {
        let state = IoApicState { version: 1, id: 0, select: 0, entries: [MASKED; PINS], levels: 0 };
        Self { state: Mutex::new(state), sink }
    }

    fn lock(&self) -> MutexGuard<'_, IoApicState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The registers, to save them.
    pub fn state(&self) -> IoApicState {
        self.lock().clone()
    }

    /// Goes on with saved registers.
    pub fn set_state(&self, saved: &IoApicState) {
        let mut state = self.lock();
        *state = saved.clone();
        self.tell_routes(&state);
    }

    /// Sets a pin's level; true is asserted, whichever its polarity.
    pub fn set(&self, pin: usize, level: bool) {
        let mut state = self.lock();
        let Some(&entry) = state.entries.get(pin) else { return };
        let before = state.levels >> pin & 1 != 0;
        state.levels = state.levels & !(1 << pin) | u32::from(level) << pin;
        if entry & LEVEL != 0 {
            self.serve(&mut state, pin);
        } else if level && !before && entry & MASKED == 0 {
            self.sink.send(message(entry));
        }
    }

    /// Sends a level-triggered pin's message, if it is due.
    fn serve(&self, state: &mut IoApicState, pin: usize) {
        let entry = state.entries[pin];
        let due = entry & LEVEL != 0 && entry & (MASKED | REMOTE_IRR) == 0 && state.levels >> pin & 1 != 0;
        if due && self.sink.send(message(entry)) {
            state.entries[pin] |= REMOTE_IRR;
        }
    }

    /// A processor ended the service of `vector`.
    pub fn eoi(&self, vector: u8) {
        let mut state = self.lock();
        for pin in 0..PINS {
            if state.entries[pin] as u8 == vector && state.entries[pin] & REMOTE_IRR != 0 {
                state.entries[pin] &= !REMOTE_IRR;
                self.serve(&mut state, pin);
            }
        }
    }

    fn tell_routes(&self, state: &IoApicState) {
        self.sink.routes(&state.entries.map(|e| (e & MASKED == 0).then(|| (message(e), e & LEVEL != 0))));
    }

    fn read_register(state: &IoApicState) -> u32 {
        match state.select {
            0 | 2 => u32::from(state.id) << 24,
            1 => VERSION | (PINS as u32 - 1) << 16,
            n => {
                let entry = state.entries.get(usize::from(n.wrapping_sub(0x10)) / 2).copied().unwrap_or(0);
                (entry >> (32 * (n & 1))) as u32
            }
        }
    }

    fn write_register(&self, state: &mut IoApicState, value: u32) {
        if state.select == 0 {
            state.id = (value >> 24 & 0xf) as u8;
        }
        let pin = usize::from(state.select.wrapping_sub(0x10)) / 2;
        let Some(entry) = state.entries.get_mut(pin).filter(|_| state.select >= 0x10) else { return };
        let shift = 32 * u32::from(state.select & 1);
        let new = *entry & !(0xffff_ffff << shift) | u64::from(value) << shift;
        *entry = new & WRITABLE | *entry & REMOTE_IRR;
        if *entry & LEVEL == 0 {
            // Software clears a stuck remote IRR by making the pin edge-triggered for a moment.
            *entry &= !REMOTE_IRR;
        }
        self.tell_routes(state);
        self.serve(state, pin);
    }
}

/// What a redirection entry sends.
fn message(entry: u64) -> Msi {
    let address = 0xfee0_0000 | (entry >> 56) << 12 | (entry >> 11 & 1) << 2;
    Msi { address, data: (entry & 0x87ff) as u32 | 1 << 14 }
}

impl Registers for IoApic {
    fn read(&self, offset: u64, _: u8) -> u64 {
        let state = self.lock();
        match offset & !3 {
            0 => state.select.into(),
            0x10 => Self::read_register(&state).into(),
            _ => 0,
        }
    }

    fn write(&self, offset: u64, _: u8, value: u64) {
        match offset & !3 {
            0 => self.lock().select = value as u8,
            0x10 => self.write_register(&mut self.lock(), value as u32),
            0x40 => self.eoi(value as u8),
            _ => {}
        }
    }
}
