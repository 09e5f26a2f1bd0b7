//! ACPI power management: the PM block of Intel's ICH9 (data sheet 316972, 13.8.3; ACPI 6.5, 4.8), and the port by which
//! firmware is asked to hand it over.
//!
//! There is no system management mode: the block is in ACPI mode from the start. Sleep states other than S5 are ignored.

use std::sync::{Arc, Mutex, MutexGuard};

use machine::irq::Line;
use machine::power::End;
use machine::{Clock, Power, Registers, Timer, Timers};
use serde::{Deserialize, Serialize};

use crate::{At, Saved, lock, read_bytes, write_bytes};

#[cfg(test)]
mod tests;

/// The block's ports. PM1a event block at +0, control at +4, timer at +8, GPE0 (16 bytes) at +0x20.
pub const PM: At = At::new(0x600, 0x80);
/// SMI command and status ports.
pub const SMI: At = At::new(0xb2, 2);
/// The PM1a event block, 4 bytes.
pub const PM1A_EVENT: u64 = PM.start;
/// The PM1a control block, 2 bytes.
pub const PM1A_CONTROL: u64 = PM.start + 4;
/// The timer, 4 bytes.
pub const TIMER: u64 = PM.start + 8;
/// The GPE0 block, [`GPE0_LEN`] bytes.
pub const GPE0: u64 = PM.start + 0x20;
/// Bytes of the GPE0 block: half status, half enable.
pub const GPE0_LEN: u8 = 16;
/// The interrupt of system control events.
pub const SCI: u8 = 9;
/// Bits that the timer counts with: TMR_VAL_EXT is to be 0 in the FADT.
pub const TIMER_BITS: u32 = 24;
/// The timer's rate in Hz.
pub const TIMER_HZ: u64 = 3_579_545;
/// What SLP_TYP is to be for S5, in the DSDT. Zero, for that is what firmware made for QEMU writes.
pub const SLEEP_TYPE_S5: u8 = 0;
/// What to write to the SMI command port to enable ACPI.
pub const ACPI_ENABLE: u8 = 2;
/// What to write to the SMI command port to disable ACPI.
pub const ACPI_DISABLE: u8 = 3;

/// What ICH9 itself takes as S5.
const SLEEP_TYPE_S5_ICH9: u16 = 7;
const TIMER_STATUS: u16 = 1;
const POWER_BUTTON: u16 = 1 << 8;
/// Timer, global lock, power button, sleep button, RTC.
const EVENTS: u16 = 0x721;
/// Bits of PM1a status that are cleared by writing 1: the events, bus master, wake.
const STATUS: u16 = EVENTS | 0x8010;
const SCI_ENABLE: u16 = 1;
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_ENABLE: u16 = 1 << 13;
/// SMI enable: a write to the SMI command port is an SMI. Set from the start, as if firmware had been here before: by this
/// firmware knows that there is no system management mode to prepare.
const APM_SMI: u32 = 1 << 5;

/// The block's registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// PM1a status.
    pub status: u16,
    /// PM1a enable.
    pub enable: u16,
    /// PM1a control.
    pub control: u16,
    /// GPE0 status.
    pub gpe_status: u64,
    /// GPE0 enable.
    pub gpe_enable: u64,
    /// SMI enable, which can be read back.
    pub smi_enable: u32,
    /// SMI command and status ports.
    pub smi_port: [u8; 2],
    /// Half turns of the timer that the status has seen.
    pub half_turns: u64,
}

/// The ACPI PM block.
#[derive(Debug)]
pub struct Pm {
    state: Mutex<State>,
    sci: Line,
    power: Power,
    clock: Arc<Clock>,
    timer: Timer,
}

impl Pm {
    /// A block whose interrupt is `sci` (level-triggered, active high at this end), and that powers off by `power`.
    pub fn new(sci: Line, power: Power, clock: Arc<Clock>, timers: &Timers) -> Arc<Self> {
        Arc::new_cyclic(|weak: &std::sync::Weak<Self>| {
            let weak = weak.clone();
            let timer = timers.timer(move || {
                if let Some(pm) = weak.upgrade() {
                    pm.settle(lock(&pm.state));
                }
            });
            let state = State { control: SCI_ENABLE, smi_enable: APM_SMI, ..State::default() };
            Self { state: Mutex::new(state), sci, power, clock, timer }
        })
    }

    /// The SMI ports' registers.
    pub fn smi(self: &Arc<Self>) -> Arc<dyn Registers> {
        Arc::new(Smi(self.clone()))
    }

    /// What the power button does: the guest's system hears of it if it listens.
    pub fn press_power_button(&self) {
        let mut state = lock(&self.state);
        state.status |= POWER_BUTTON;
        self.settle(state);
    }

    /// Raises general-purpose event `bit`, 0 to 63.
    pub fn raise_gpe(&self, bit: u8) {
        let mut state = lock(&self.state);
        state.gpe_status |= 1 << (bit & 63);
        self.settle(state);
    }

    /// Whether the guest's system listens to general-purpose event `bit`, 0 to 63.
    pub fn hears_gpe(&self, bit: u8) -> bool {
        lock(&self.state).gpe_enable >> (bit & 63) & 1 == 1
    }

    /// The registers.
    pub fn state(&self) -> Saved<State> {
        Saved::V1(lock(&self.state).clone())
    }

    /// Goes on from `state`.
    pub fn set_state(&self, state: &Saved<State>) {
        let Saved::V1(state) = state;
        let mut ours = lock(&self.state);
        *ours = state.clone();
        self.settle(ours);
    }

    fn ticks(&self) -> u64 {
        (u128::from(self.clock.now()) * u128::from(TIMER_HZ) / 1_000_000_000) as u64
    }

    /// After a change, or when time has gone on: the timer's status, the interrupt, the next time to look.
    fn settle(&self, mut state: MutexGuard<'_, State>) {
        self.count(&mut state);
        let events = state.status & state.enable & EVENTS != 0 || state.gpe_status & state.gpe_enable != 0;
        self.sci.set(events && state.control & SCI_ENABLE != 0);
        if state.enable & !state.status & TIMER_STATUS != 0 {
            let next = u128::from(state.half_turns + 1) << (TIMER_BITS - 1);
            let ns = (next * 1_000_000_000).div_ceil(u128::from(TIMER_HZ));
            self.timer.set(ns.try_into().unwrap_or(u64::MAX));
        } else {
            self.timer.cancel();
        }
    }

    /// The timer's status is set whenever its top bit changes.
    fn count(&self, state: &mut State) {
        let half_turns = self.ticks() >> (TIMER_BITS - 1);
        if std::mem::replace(&mut state.half_turns, half_turns) != half_turns {
            state.status |= TIMER_STATUS;
        }
    }

    fn read_byte(&self, state: &State, offset: u64) -> u8 {
        let (register, at): (u64, u64) = match offset {
            0..2 => (state.status.into(), 0),
            2..4 => (state.enable.into(), 2),
            4..6 => (state.control.into(), 4),
            8..12 => (self.ticks() & ((1 << TIMER_BITS) - 1), 8),
            0x20..0x28 => (state.gpe_status, 0x20),
            0x28..0x30 => (state.gpe_enable, 0x28),
            0x30..0x34 => (state.smi_enable.into(), 0x30),
            _ => (0, offset),
        };
        (register >> (8 * (offset - at))) as u8
    }

    fn write_byte(&self, state: &mut State, offset: u64, value: u8) {
        let put = |register: u64, at: u64| {
            let shift = 8 * (offset - at);
            register & !(0xff << shift) | u64::from(value) << shift
        };
        match offset {
            0..2 => state.status &= !(put(0, 0) as u16 & STATUS),
            2..4 => state.enable = put(state.enable.into(), 2) as u16 & EVENTS,
            4..6 => {
                // The mode is for the SMI command port to switch.
                let value = put(state.control.into(), 4) as u16 & !SCI_ENABLE;
                state.control = value & !SLEEP_ENABLE | state.control & SCI_ENABLE;
                let kind = value >> SLEEP_TYPE_SHIFT & 7;
                let off = kind == u16::from(SLEEP_TYPE_S5) || kind == SLEEP_TYPE_S5_ICH9;
                if value & SLEEP_ENABLE != 0 && off {
                    self.power.request(End::PowerOff);
                }
            }
            0x20..0x28 => state.gpe_status &= !put(0, 0x20),
            0x28..0x30 => state.gpe_enable = put(state.gpe_enable, 0x28),
            0x30..0x34 => state.smi_enable = put(state.smi_enable.into(), 0x30) as u32,
            _ => {}
        }
    }
}

impl Registers for Pm {
    fn read(&self, offset: u64, size: u8) -> u64 {
        if (offset, size) == (8, 4) {
            // Linux reads it as a clock: no lock, and in one go.
            return self.ticks() & ((1 << TIMER_BITS) - 1);
        }
        let mut state = lock(&self.state);
        self.count(&mut state);
        let value = read_bytes(offset, size, |offset| self.read_byte(&state, offset));
        self.settle(state);
        value
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let mut state = lock(&self.state);
        self.count(&mut state);
        write_bytes(offset, size, value, |offset, value| self.write_byte(&mut state, offset, value));
        self.settle(state);
    }
}

struct Smi(Arc<Pm>);

impl Registers for Smi {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let state = lock(&self.0.state);
        read_bytes(offset, size, |offset| state.smi_port.get(offset as usize).copied().unwrap_or(0xff))
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let mut state = lock(&self.0.state);
        write_bytes(offset, size, value, |offset, value| {
            if let Some(port) = state.smi_port.get_mut(offset as usize) {
                *port = value;
            }
            match (offset, value) {
                (0, ACPI_ENABLE) => state.control |= SCI_ENABLE,
                (0, ACPI_DISABLE) => state.control &= !SCI_ENABLE,
                _ => {}
            }
        });
        self.0.settle(state);
    }
}
