//! The high-precision event timer (IA-PC HPET Specification 1.0a): a 64-bit counter of 100 MHz and three comparators.
//!
//! The counter is the clock, and host timers are set for comparators alone. Periods that the host was too late for are
//! not made up for.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use machine::irq::{Input, Line, Msi};
use machine::{Clock, Registers, Timer, Timers};
use serde::{Deserialize, Serialize};

use crate::{At, Saved, lock};

#[cfg(test)]
mod tests;

/// Where its registers are.
pub const HPET: At = At::new(0xfed0_0000, 0x400);
/// Nanoseconds of a tick.
pub const TICK: u64 = 10;

const COMPARATORS: usize = 3;
/// Interrupts come no closer than this many nanoseconds.
const CLOSEST: u64 = 50_000;
/// Revision 1, three comparators, 64 bits, legacy replacement, Intel, period in femtoseconds.
const CAPABILITIES: u64 =
    1 | (COMPARATORS as u64 - 1) << 8 | 1 << 13 | 1 << 15 | 0x8086 << 16 | (TICK * 1_000_000) << 32;
const ENABLE: u64 = 1;
const LEGACY: u64 = 2;

/// Bits of a comparator's configuration.
mod tn {
    pub const LEVEL: u64 = 1 << 1;
    pub const INTERRUPT: u64 = 1 << 2;
    pub const PERIODIC: u64 = 1 << 3;
    pub const SET_VALUE: u64 = 1 << 6;
    pub const MODE_32: u64 = 1 << 8;
    pub const FSB: u64 = 1 << 14;
    /// Periodic, 64 bits, FSB; pins 2, 8 and 16–23 of the IOAPIC.
    pub const CAPABILITIES: u64 = 1 << 4 | 1 << 5 | 1 << 15 | 0xff_0104 << 32;
    pub const WRITABLE: u64 = LEVEL | INTERRUPT | PERIODIC | SET_VALUE | MODE_32 | 0x1f << 9 | FSB;
}

/// One comparator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Comparator {
    /// Configuration, without the capabilities.
    pub config: u64,
    /// What the counter is compared with.
    pub value: u64,
    /// What is added to it after a match, in periodic mode.
    pub period: u64,
    /// Message address (high half) and data.
    pub fsb: u64,
    /// It waits for its match. A one-shot does not after it.
    pub waits: bool,
}

impl Comparator {
    fn mask(&self) -> u64 {
        if self.config & tn::MODE_32 != 0 { u32::MAX.into() } else { u64::MAX }
    }

    fn periodic(&self) -> bool {
        self.config & tn::PERIODIC != 0
    }

    /// Ticks from `counter` to the match; 0 if that is past by less than half of the counter's range.
    fn distance(&self, counter: u64) -> u64 {
        let ahead = self.value.wrapping_sub(counter) & self.mask();
        if ahead > self.mask() / 2 { 0 } else { ahead }
    }

    /// Moves a periodic comparator past `counter`.
    fn advance(&mut self, counter: u64) {
        let period = self.period & self.mask();
        if period == 0 {
            self.waits = false;
            return;
        }
        let behind = counter.wrapping_sub(self.value) & self.mask();
        if behind <= self.mask() / 2 {
            let step = (behind / period).wrapping_add(1).wrapping_mul(period);
            self.value = self.value.wrapping_add(step) & self.mask();
        }
    }

    fn write_value(&mut self, value: u64, whole: bool) {
        let value = value & self.mask();
        if !self.periodic() || self.config & tn::SET_VALUE != 0 {
            self.value = value;
        }
        if self.periodic() {
            self.period = value;
        }
        if whole || self.config & tn::MODE_32 != 0 {
            self.config &= !tn::SET_VALUE;
        }
        self.waits = true;
    }
}

/// The timer's registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// General configuration.
    pub config: u64,
    /// Level-triggered interrupts that are up.
    pub status: u64,
    /// The counter when it stands, or what to add to guest time in ticks when it runs.
    pub counter: u64,
    /// By number.
    pub comparators: [Comparator; COMPARATORS],
}

type MsiSink = Box<dyn Fn(Msi) + Send + Sync>;

/// The high-precision event timer.
pub struct Hpet {
    state: Mutex<State>,
    /// Lines to the GSIs 0 to 23, for each comparator.
    lines: [Vec<Line>; COMPARATORS],
    gates: Mutex<Vec<Arc<Gate>>>,
    msi: MsiSink,
    clock: Arc<Clock>,
    timers: [Timer; COMPARATORS],
}

impl fmt::Debug for Hpet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Hpet").field(&*lock(&self.state)).finish()
    }
}

impl Hpet {
    /// A timer that interrupts by lines that `line` makes to GSIs, or by `msi`.
    pub fn new(
        line: impl Fn(u8) -> Line,
        msi: impl Fn(Msi) + Send + Sync + 'static,
        clock: Arc<Clock>,
        timers: &Timers,
    ) -> Arc<Self> {
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let timer = |n| {
                let weak = weak.clone();
                timers.timer(move || {
                    if let Some(hpet) = weak.upgrade() {
                        hpet.expire(n);
                    }
                })
            };
            Self {
                state: Mutex::default(),
                lines: std::array::from_fn(|_| (0..24).map(&line).collect()),
                gates: Mutex::default(),
                msi: Box::new(msi),
                clock,
                timers: std::array::from_fn(timer),
            }
        })
    }

    /// A line for the PIT (to IRQ 0) or the RTC (to IRQ 8): it leads to `line` but while this timer has taken their place.
    pub fn gate(&self, line: Line) -> Line {
        let legacy = lock(&self.state).config & LEGACY != 0;
        let gate = Arc::new(Gate { line, levels: Mutex::new((false, legacy)) });
        lock(&self.gates).push(gate.clone());
        Line::new(gate)
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
        ours.config &= ENABLE | LEGACY;
        ours.status &= (1 << COMPARATORS) - 1;
        ours.comparators.iter_mut().for_each(|c| c.config &= tn::WRITABLE);
        self.settle(&ours);
    }

    fn ticks(&self) -> u64 {
        self.clock.now() / TICK
    }

    fn counter(&self, state: &State) -> u64 {
        state.counter.wrapping_add(if state.config & ENABLE != 0 { self.ticks() } else { 0 })
    }

    /// The GSI of a comparator's interrupt: in legacy replacement IRQ 0 and 8, or as it is routed (pin 2 is IRQ 0's).
    fn gsi(&self, state: &State, n: usize) -> usize {
        let route = (state.comparators[n].config >> 9 & 0x1f) as usize;
        match (state.config & LEGACY != 0, n) {
            (true, 0) => 0,
            (true, 1) => 8,
            _ if route == 2 => 0,
            _ => route,
        }
    }

    fn expire(&self, n: usize) {
        let mut state = lock(&self.state);
        let counter = self.counter(&state);
        let enabled = state.config & ENABLE != 0;
        let comparator = &mut state.comparators[n];
        if !enabled || !comparator.waits || comparator.distance(counter) > 0 {
            return self.arm(&state, n);
        }
        comparator.waits = comparator.periodic();
        if comparator.periodic() {
            comparator.advance(counter);
        }
        let comparator = *comparator;
        if comparator.config & tn::INTERRUPT != 0 {
            if comparator.config & tn::FSB != 0 {
                (self.msi)(Msi { address: comparator.fsb >> 32, data: comparator.fsb as u32 });
            } else if comparator.config & tn::LEVEL != 0 {
                state.status |= 1 << n;
                self.settle_lines(&state);
            } else if let Some(line) = self.lines[n].get(self.gsi(&state, n)) {
                line.edge();
            }
        }
        self.arm(&state, n);
    }

    fn settle(&self, state: &MutexGuard<'_, State>) {
        self.settle_lines(state);
        (0..COMPARATORS).for_each(|n| self.arm(state, n));
        let legacy = state.config & LEGACY != 0;
        lock(&self.gates).iter().for_each(|gate| gate.shut(legacy));
    }

    fn settle_lines(&self, state: &State) {
        for (n, lines) in self.lines.iter().enumerate() {
            let up = state.status & 1 << n != 0 && state.comparators[n].config & tn::INTERRUPT != 0;
            let gsi = self.gsi(state, n);
            // An edge's line stays as it is, for whom has not acknowledged it yet.
            let edge = state.comparators[n].config & tn::LEVEL == 0;
            let settled = |(at, line): (usize, &Line)| {
                if !(edge && at == gsi) {
                    line.set(up && at == gsi);
                }
            };
            lines.iter().enumerate().for_each(settled);
        }
    }

    fn arm(&self, state: &State, n: usize) {
        let comparator = &state.comparators[n];
        if state.config & ENABLE == 0 || !comparator.waits || comparator.config & tn::INTERRUPT == 0 {
            return self.timers[n].cancel();
        }
        let ahead = comparator.distance(self.counter(state));
        // In ticks that began, so that the counter has reached the value then.
        let at = self.ticks().saturating_add(ahead).saturating_mul(TICK);
        // Also for a period of over half the range, whose next match always looks past.
        let fast =
            comparator.periodic() && (ahead == 0 || comparator.period & comparator.mask() < CLOSEST / TICK);
        let closest = if fast { self.clock.now().saturating_add(CLOSEST) } else { 0 };
        self.timers[n].set(at.max(closest));
    }

    fn read_register(&self, state: &State, register: u64) -> u64 {
        match register {
            0 => CAPABILITIES,
            0x10 => state.config,
            0x20 => state.status,
            0xf0 => self.counter(state),
            0x100..0x160 => {
                let comparator = &state.comparators[(register as usize - 0x100) / 0x20];
                match register & 0x1f {
                    0 => comparator.config | tn::CAPABILITIES,
                    8 => comparator.value,
                    0x10 => comparator.fsb,
                    _ => 0,
                }
            }
            _ => 0,
        }
    }

    /// `value` is the whole register, `mask` says which bits of it were written.
    fn write_register(&self, state: &mut State, register: u64, value: u64, mask: u64) {
        match register {
            0x10 => {
                let counter = self.counter(state);
                state.config = value & (ENABLE | LEGACY);
                state.counter = counter.wrapping_sub(if value & ENABLE != 0 { self.ticks() } else { 0 });
            }
            0x20 => state.status &= !(value & mask),
            0xf0 => {
                state.counter = value.wrapping_sub(if state.config & ENABLE != 0 { self.ticks() } else { 0 });
            }
            0x100..0x160 => {
                let n = (register as usize - 0x100) / 0x20;
                let comparator = &mut state.comparators[n];
                match register & 0x1f {
                    0 => {
                        comparator.config = value & tn::WRITABLE;
                        comparator.value &= comparator.mask();
                        if comparator.config & tn::LEVEL == 0 {
                            state.status &= !(1 << n);
                        }
                    }
                    8 => comparator.write_value(value, mask >> 32 != 0),
                    0x10 => comparator.fsb = value,
                    _ => {}
                }
            }
            _ => {}
        }
    }
}

/// Accesses are of 4 or 8 bytes, aligned; what else a guest tries reads and writes part of a register.
impl Registers for Hpet {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let state = lock(&self.state);
        let value = self.read_register(&state, offset & !7) >> (8 * (offset & 7));
        value & (u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8))))
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let mut state = lock(&self.state);
        let shift = 8 * (offset & 7);
        let mask = (u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8)))) << shift;
        let register = offset & !7;
        let before = match (register, state.comparators.get((register.wrapping_sub(0x100) / 0x20) as usize)) {
            // The half that is not written of a period is the period's.
            (0x100..0x160, Some(c)) if register & 0x1f == 8 && c.periodic() => c.period,
            _ => self.read_register(&state, register),
        };
        self.write_register(&mut state, register, before & !mask | (value << shift) & mask, mask);
        self.settle(&state);
    }
}

/// A line that legacy replacement cuts.
struct Gate {
    line: Line,
    /// What the owner set, and whether the gate is shut.
    levels: Mutex<(bool, bool)>,
}

impl Gate {
    fn shut(&self, shut: bool) {
        let mut levels = lock(&self.levels);
        if levels.1 != shut {
            levels.1 = shut;
            self.line.set(levels.0 && !shut);
        }
    }
}

impl Input for Gate {
    fn set(&self, level: bool) {
        let mut levels = lock(&self.levels);
        levels.0 = level;
        if !levels.1 {
            self.line.set(level);
        }
    }
}
