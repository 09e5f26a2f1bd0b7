//! The interval timer: Intel's 8254 (data sheet 231164), and port 0x61, which has its third counter's gate and output.
//!
//! Nothing counts: what a counter holds is computed from the clock when somebody looks. Counter 0 drives IRQ 0; its ticks
//! that the host was too late for are not made up for.

use std::sync::{Arc, Mutex, MutexGuard};

use machine::irq::Line;
use machine::{Clock, Registers, Timer, Timers};
use serde::{Deserialize, Serialize};

use crate::{At, Saved, lock, read_bytes, write_bytes};

#[cfg(test)]
mod tests;

/// The timer's ports.
pub const PIT: At = At::new(0x40, 4);
/// System control port B.
pub const CONTROL_B: At = At::new(0x61, 1);
/// The counters' rate in Hz.
pub const HZ: u64 = 1_193_182;

/// Ticks of counter 0 come no closer than this many nanoseconds: it would be all that the host does.
const CLOSEST: u64 = 50_000;
/// Nanoseconds between turns of the memory refresh bit, which old software times loops by.
const REFRESH: u64 = 15_085;

/// How a counter's bytes are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// The low byte alone.
    Low,
    /// The high byte alone.
    High,
    /// The low, then the high byte.
    Both,
}

/// One counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    /// 0 to 5.
    pub mode: u8,
    /// Decimal.
    pub bcd: bool,
    /// Which bytes are accessed.
    pub access: Access,
    /// What was loaded: 1 to 65536.
    pub count: u32,
    /// The low byte written, while the high one is awaited.
    pub low: Option<u8>,
    /// The next read gives the high byte.
    pub high_next: bool,
    /// A latched count.
    pub latch: Option<u16>,
    /// A latched status.
    pub status: Option<u8>,
    /// The gate input.
    pub gate: bool,
    /// The tick at which counting began, if it did.
    pub start: Option<u64>,
    /// Ticks that were counted when the gate stopped it.
    pub held: Option<u64>,
}

impl Counter {
    fn reset(gate: bool) -> Self {
        Self {
            mode: 0,
            bcd: false,
            access: Access::Both,
            count: 0x10000,
            low: None,
            high_next: false,
            latch: None,
            status: None,
            gate,
            start: None,
            held: None,
        }
    }

    /// Brings what a file said in range.
    fn check(mut self) -> Self {
        self.mode = self.mode.min(5);
        self.count = self.count.clamp(1, self.modulus());
        self
    }

    fn modulus(&self) -> u32 {
        if self.bcd { 10_000 } else { 0x10000 }
    }

    /// Ticks counted since the load or trigger.
    fn elapsed(&self, now: u64) -> Option<u64> {
        self.held.or_else(|| self.start.map(|start| now.saturating_sub(start)))
    }

    fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn output(&self, now: u64) -> bool {
        let count = u64::from(self.count);
        let Some(t) = self.elapsed(now) else { return self.mode != 0 };
        match self.mode {
            0 | 1 => t >= count,
            _ if self.held.is_some() => true,
            2 => t % count != count - 1 || count == 1,
            3 => t % count < count.div_ceil(2),
            _ => t != count,
        }
    }

    fn value(&self, now: u64) -> u16 {
        let (count, modulus) = (u64::from(self.count), u64::from(self.modulus()));
        let t = self.elapsed(now).unwrap_or(0);
        let value = match self.mode {
            2 => count - t % count,
            3 => count - 2 * t % count,
            _ => (count + modulus - t % modulus) % modulus,
        } % modulus;
        if self.bcd { to_bcd(value as u16) } else { value as u16 }
    }

    /// A whole count was written.
    fn load(&mut self, raw: u16, now: u64) {
        let value = if self.bcd { from_bcd(raw) } else { u32::from(raw) };
        self.count = if value == 0 { self.modulus() } else { value };
        self.held = None;
        match self.mode {
            // These wait for the gate to rise.
            1 | 5 => {}
            _ => {
                self.start = Some(now);
                if !self.gate {
                    self.held = Some(0);
                }
            }
        }
    }

    fn control(&mut self, value: u8) {
        self.access = match value >> 4 & 3 {
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        self.mode = match value >> 1 & 7 {
            mode @ 0..=5 => mode,
            mode => mode - 4,
        };
        *self = Self { bcd: value & 1 != 0, mode: self.mode, access: self.access, ..Self::reset(self.gate) };
        self.count = self.modulus();
    }

    fn write(&mut self, value: u8, now: u64) {
        match (self.access, self.low.take()) {
            (Access::Low, _) => self.load(value.into(), now),
            (Access::High, _) => self.load(u16::from(value) << 8, now),
            (Access::Both, Some(low)) => self.load(u16::from_le_bytes([low, value]), now),
            (Access::Both, None) => {
                self.low = Some(value);
                if self.mode == 0 {
                    // The first byte stops the count.
                    self.start = None;
                    self.held = None;
                }
            }
        }
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let value = self.latch.unwrap_or_else(|| self.value(now));
        let high = match self.access {
            Access::Low => false,
            Access::High => true,
            Access::Both => {
                self.high_next = !self.high_next;
                !self.high_next
            }
        };
        if high || self.access == Access::Low {
            self.latch = None;
        }
        if high { (value >> 8) as u8 } else { value as u8 }
    }

    fn latch_status(&mut self, now: u64) {
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::Both => 3,
        };
        let null = self.start.is_none();
        let status = u8::from(self.output(now)) << 7
            | u8::from(null) << 6
            | access << 4
            | self.mode << 1
            | u8::from(self.bcd);
        self.status.get_or_insert(status);
    }

    fn set_gate(&mut self, gate: bool, now: u64) {
        let rises = gate && !self.gate;
        let falls = !gate && self.gate;
        self.gate = gate;
        match self.mode {
            0 | 4 if falls => self.held = self.elapsed(now),
            0 | 4 if rises => {
                if let Some(held) = self.held.take() {
                    self.start = Some(now.saturating_sub(held));
                }
            }
            2 | 3 if falls => self.held = self.start.map(|_| 0),
            2 | 3 if rises && self.held.take().is_some() => self.start = Some(now),
            1 | 5 if rises => self.start = Some(now),
            _ => {}
        }
    }
}

fn from_bcd(value: u16) -> u32 {
    (0..4).rev().fold(0, |v, i| v * 10 + u32::from(value >> (4 * i) & 0xf).min(9))
}

fn to_bcd(value: u16) -> u16 {
    (0..4).fold(0, |v, i| v | (value / 10u16.pow(i) % 10) << (4 * i))
}

/// The timer's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The three counters.
    pub counters: [Counter; 3],
    /// Bits 0–3 of port 0x61: gate 2, speaker, and two enables of checks that no PC makes any more.
    pub control_b: u8,
}

/// The interval timer.
#[derive(Debug)]
pub struct Pit {
    state: Mutex<State>,
    irq: Line,
    clock: Arc<Clock>,
    timer: Timer,
}

impl Pit {
    /// A timer whose counter 0 drives `irq`.
    pub fn new(irq: Line, clock: Arc<Clock>, timers: &Timers) -> Arc<Self> {
        Arc::new_cyclic(|weak: &std::sync::Weak<Self>| {
            let weak = weak.clone();
            let timer = timers.timer(move || {
                if let Some(pit) = weak.upgrade() {
                    pit.expire();
                }
            });
            let counters = [Counter::reset(true), Counter::reset(true), Counter::reset(false)];
            Self { state: Mutex::new(State { counters, control_b: 0 }), irq, clock, timer }
        })
    }

    /// Port 0x61's registers.
    pub fn control_b(self: &Arc<Self>) -> Arc<dyn Registers> {
        Arc::new(ControlB(self.clone()))
    }

    /// The registers.
    pub fn state(&self) -> Saved<State> {
        Saved::V1(lock(&self.state).clone())
    }

    /// Goes on from `state`.
    pub fn set_state(&self, state: &Saved<State>) {
        let Saved::V1(state) = state;
        let mut ours = lock(&self.state);
        *ours = State { counters: state.counters.map(Counter::check), ..*state };
        self.settle(ours);
    }

    fn ticks(&self) -> u64 {
        ticks_at(self.clock.now())
    }

    /// Counter 0 is due, or nearly.
    fn expire(&self) {
        let state = lock(&self.state);
        let counter = &state.counters[0];
        if counter.periodic() || counter.mode >= 4 {
            // Low for a tick of the counter or half a period, which nobody sees.
            self.irq.set(false);
        }
        if counter.start.is_some() {
            self.irq.set(true);
            self.arm(&state);
        }
    }

    /// Counter 0 was programmed: its output now, and when it rises next.
    fn settle(&self, state: MutexGuard<'_, State>) {
        self.irq.set(state.counters[0].output(self.ticks()));
        self.arm(&state);
    }

    fn arm(&self, state: &State) {
        let counter = &state.counters[0];
        let now = self.clock.now();
        let ticks = ticks_at(now);
        let Some(start) = counter.start else { return self.timer.cancel() };
        let count = u64::from(counter.count);
        let t = ticks.saturating_sub(start);
        if counter.periodic() {
            let next = start.saturating_add((t / count + 1).saturating_mul(count));
            let closest = if count < ticks_at(CLOSEST) { now.saturating_add(CLOSEST) } else { 0 };
            self.timer.set(ns_at(next).max(closest));
        } else if t < count {
            self.timer.set(ns_at(start.saturating_add(count)));
        } else {
            self.timer.cancel();
        }
    }

    fn control(&self, state: &mut State, value: u8) -> bool {
        let now = self.ticks();
        let which = usize::from(value >> 6);
        if let Some(counter) = state.counters.get_mut(which) {
            if value & 0x30 == 0 {
                let value = counter.value(now);
                counter.latch.get_or_insert(value);
                return false;
            }
            counter.control(value);
            return which == 0;
        }
        let chosen = state.counters.iter_mut().enumerate().filter(|(i, _)| value & (2 << i) != 0);
        for (_, counter) in chosen {
            if value & 0x20 == 0 {
                let value = counter.value(now);
                counter.latch.get_or_insert(value);
            }
            if value & 0x10 == 0 {
                counter.latch_status(now);
            }
        }
        false
    }
}

fn ticks_at(ns: u64) -> u64 {
    (u128::from(ns) * u128::from(HZ) / 1_000_000_000) as u64
}

fn ns_at(ticks: u64) -> u64 {
    (u128::from(ticks) * 1_000_000_000).div_ceil(u128::from(HZ)).try_into().unwrap_or(u64::MAX)
}

impl Registers for Pit {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let mut state = lock(&self.state);
        let now = self.ticks();
        read_bytes(offset, size, |offset| {
            // The control register cannot be read.
            state.counters.get_mut(offset as usize).map_or(0xff, |counter| counter.read(now))
        })
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let mut state = lock(&self.state);
        let now = self.ticks();
        let mut changed = false;
        write_bytes(offset, size, value, |offset, value| match offset {
            0..3 => {
                state.counters[offset as usize].write(value, now);
                changed |= offset == 0;
            }
            3 => changed |= self.control(&mut state, value),
            _ => {}
        });
        if changed {
            self.settle(state);
        }
    }
}

struct ControlB(Arc<Pit>);

impl Registers for ControlB {
    fn read(&self, _: u64, _: u8) -> u64 {
        let pit = &self.0;
        let state = lock(&pit.state);
        let refresh = u8::from(pit.clock.now() / REFRESH % 2 == 1) << 4;
        let output = u8::from(state.counters[2].output(pit.ticks())) << 5;
        (state.control_b | refresh | output).into()
    }

    fn write(&self, _: u64, _: u8, value: u64) {
        let mut state = lock(&self.0.state);
        state.control_b = value as u8 & 0xf;
        state.counters[2].set_gate(value & 1 != 0, self.0.ticks());
    }
}
