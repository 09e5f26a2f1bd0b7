//! The real-time clock and its battery-backed memory: Motorola's MC146818 (data sheet of 1984), with the PC's use of the
//! memory, as firmware for QEMU expects it.
//!
//! The clock shows UTC. What passes by between two looks is computed when somebody looks, so nothing runs unless an
//! interrupt is enabled.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use machine::irq::Line;
use machine::{Clock, Registers, Timer, Timers};
use serde::{Deserialize, Serialize};

use crate::{At, Saved, lock, read_bytes, write_bytes};

mod calendar;
#[cfg(test)]
mod tests;

use calendar::Date;

/// Index and data ports, twice: the second pair reaches the upper 128 bytes. The interrupt is 8.
pub const RTC: At = At::new(0x70, 4);

mod reg {
    pub const SECONDS_ALARM: usize = 1;
    pub const MINUTES_ALARM: usize = 3;
    pub const HOURS_ALARM: usize = 5;
    pub const A: usize = 0xa;
    pub const B: usize = 0xb;
    pub const C: usize = 0xc;
    pub const D: usize = 0xd;
    pub const CENTURY: usize = 0x32;
}
mod a {
    pub const UPDATE_IN_PROGRESS: u8 = 0x80;
}
mod b {
    pub const SET: u8 = 0x80;
    pub const PERIODIC: u8 = 0x40;
    pub const ALARM: u8 = 0x20;
    pub const UPDATED: u8 = 0x10;
    pub const BINARY: u8 = 4;
    pub const HOURS_24: u8 = 2;
}
/// Register C's bit 7: one of the flags is up that has its interrupt enabled.
const IRQ: u8 = 0x80;
const SECOND: i64 = 1_000_000_000;
/// How long before an update it is announced, in nanoseconds.
const NOTICE: i64 = 244_000;
const PERIOD_HZ: i64 = 32_768;
const DAY: i64 = 86_400;

/// The clock's registers and memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Index of each pair of ports.
    pub index: [u8; 2],
    /// All bytes; those of the time are as they were written last, see `ahead`.
    pub bytes: Vec<u8>,
    /// Nanoseconds from the guest clock's zero to 1970, negated: what to add for the time of day.
    pub ahead: i64,
    /// Guest time up to which flags were raised.
    pub seen: u64,
}

/// The real-time clock.
#[derive(Debug)]
pub struct Rtc {
    state: Mutex<State>,
    irq: Line,
    clock: Arc<Clock>,
    timer: Timer,
}

impl Rtc {
    /// A clock with interrupt line `irq` that shows `now`, of a machine with `ram` bytes of memory in the layout of
    /// [`memory::layout`].
    pub fn new(irq: Line, clock: Arc<Clock>, timers: &Timers, now: SystemTime, ram: u64) -> Arc<Self> {
        let since = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64);
        let zero = clock.now();
        let ahead = since.saturating_sub(zero as i64);
        let state = State { index: [0; 2], bytes: memory_bytes(ram), ahead, seen: zero };
        Arc::new_cyclic(|weak: &std::sync::Weak<Self>| {
            let weak = weak.clone();
            let timer = timers.timer(move || {
                if let Some(rtc) = weak.upgrade() {
                    rtc.settle(lock(&rtc.state), rtc.clock.now());
                }
            });
            Self { state: Mutex::new(state), irq, clock, timer }
        })
    }

    /// Sets a byte of memory (0x0e and up) as firmware or the assembler of the machine knows it.
    pub fn set(&self, index: u8, value: u8) {
        lock(&self.state).bytes[usize::from(index)] = value;
    }

    /// The registers and memory.
    pub fn state(&self) -> Saved<State> {
        Saved::V1(lock(&self.state).clone())
    }

    /// Goes on from `state`. The time of day goes on from when it was saved.
    pub fn set_state(&self, state: &Saved<State>) {
        let Saved::V1(state) = state;
        let mut state = state.clone();
        state.bytes.resize(256, 0);
        let mut ours = lock(&self.state);
        *ours = state;
        self.settle(ours, self.clock.now());
    }

    /// After a change, or when time has gone on to `now`: the flags, the interrupt, the next time to look.
    ///
    /// An access happens at one time. If register C, just read, were raised by a later look at the clock, the line would not
    /// fall between, and a controller that waits for an edge would wait for ever.
    fn settle(&self, mut state: MutexGuard<'_, State>, now: u64) {
        state.catch_up(now);
        let irq = state.bytes[reg::C] & state.bytes[reg::B] & (b::PERIODIC | b::ALARM | b::UPDATED) != 0;
        state.bytes[reg::C] = state.bytes[reg::C] & !IRQ | if irq { IRQ } else { 0 };
        self.irq.set(irq);
        match state.next(now) {
            Some(next) => self.timer.set(next),
            None => self.timer.cancel(),
        }
    }

    fn read_byte(&self, state: &mut State, now: u64, offset: u64) -> u8 {
        let index = match offset {
            1 => usize::from(state.index[0]),
            3 => usize::from(state.index[1]) | 0x80,
            // The index cannot be read.
            _ => return 0xff,
        };
        match index {
            0..=9 | reg::CENTURY if state.running() => {
                state.show(now);
                state.bytes[index]
            }
            reg::A => {
                let updating = state.running() && state.time(now).rem_euclid(SECOND) >= SECOND - NOTICE;
                state.bytes[reg::A] | if updating { a::UPDATE_IN_PROGRESS } else { 0 }
            }
            reg::C => std::mem::take(&mut state.bytes[reg::C]),
            _ => state.bytes[index],
        }
    }

    fn write_byte(&self, state: &mut State, now: u64, offset: u64, value: u8) {
        let index = match offset {
            0 | 2 => {
                // Bit 7 of the first index masks NMIs, which nobody sends.
                state.index[offset as usize / 2] = value & 0x7f;
                return;
            }
            1 => usize::from(state.index[0]),
            3 => usize::from(state.index[1]) | 0x80,
            _ => return,
        };
        match index {
            reg::SECONDS_ALARM | reg::MINUTES_ALARM | reg::HOURS_ALARM => state.bytes[index] = value,
            0..=9 | reg::CENTURY if state.running() => {
                state.show(now);
                state.bytes[index] = value;
                state.adjust(now);
            }
            reg::A => state.bytes[reg::A] = value & !a::UPDATE_IN_PROGRESS,
            reg::B => {
                let was_running = state.running();
                if was_running {
                    // In the format that was; then it stands.
                    state.show(now);
                }
                state.bytes[reg::B] = value;
                if value & b::SET != 0 {
                    state.bytes[reg::B] &= !b::UPDATED;
                } else if !was_running {
                    state.adjust(now);
                }
            }
            reg::C | reg::D => {}
            _ => state.bytes[index] = value,
        }
    }
}

impl State {
    /// Whether the time goes on: the guest is not about to set it.
    fn running(&self) -> bool {
        self.bytes[reg::B] & b::SET == 0
    }

    /// Nanoseconds since 1970.
    fn time(&self, now: u64) -> i64 {
        self.ahead.saturating_add(now as i64)
    }

    fn encode(&self, value: u8) -> u8 {
        if self.bytes[reg::B] & b::BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.bytes[reg::B] & b::BINARY != 0 {
            value
        } else {
            (value >> 4).min(9) * 10 + (value & 0xf).min(9)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.bytes[reg::B] & b::HOURS_24 != 0 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { 0x80 } else { 0 };
        self.encode((hour + 11) % 12 + 1) | afternoon
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.bytes[reg::B] & b::HOURS_24 != 0 {
            return self.decode(value);
        }
        self.decode(value & 0x7f) % 12 + if value & 0x80 != 0 { 12 } else { 0 }
    }

    /// Writes the time into its registers.
    fn show(&mut self, now: u64) {
        let date = Date::at(self.time(now).div_euclid(SECOND));
        self.bytes[0] = self.encode(date.second);
        self.bytes[2] = self.encode(date.minute);
        self.bytes[4] = self.encode_hour(date.hour);
        self.bytes[6] = self.encode(date.weekday);
        self.bytes[7] = self.encode(date.day);
        self.bytes[8] = self.encode(date.month);
        self.bytes[9] = self.encode((date.year % 100) as u8);
        self.bytes[reg::CENTURY] = self.encode((date.year / 100 % 100) as u8);
    }

    /// Goes on from the time in the registers.
    fn adjust(&mut self, now: u64) {
        let year = self.decode(self.bytes[9]).min(99);
        let century = self.decode(self.bytes[reg::CENTURY]).min(99);
        let seconds = Date {
            second: self.decode(self.bytes[0]),
            minute: self.decode(self.bytes[2]),
            hour: self.decode_hour(self.bytes[4]),
            weekday: 1,
            day: self.decode(self.bytes[7]),
            month: self.decode(self.bytes[8]),
            year: i64::from(century) * 100 + i64::from(year),
        }
        .seconds();
        let within = self.time(now).rem_euclid(SECOND);
        self.ahead = seconds.saturating_mul(SECOND).saturating_add(within).saturating_sub(now as i64);
        self.seen = now;
    }

    /// Nanoseconds' worth of periods since 1970: their number, and how many base ticks make one.
    fn period(&self) -> Option<u32> {
        match self.bytes[reg::A] & 0xf {
            0 => None,
            // With the PC's crystal these two are the same as 8 and 9.
            rate @ 1..=2 => Some(u32::from(rate) + 6),
            rate => Some(u32::from(rate) - 1),
        }
    }

    fn periods(&self, now: u64) -> Option<i64> {
        let ticks = i128::from(self.time(now)) * i128::from(PERIOD_HZ) / i128::from(SECOND);
        self.period().map(|shift| (ticks >> shift) as i64)
    }

    fn alarm_at(&self, second: i64) -> bool {
        let date = Date::at(second);
        let matches =
            |register: usize, value: u8| self.bytes[register] >= 0xc0 || self.bytes[register] == value;
        matches(reg::SECONDS_ALARM, self.encode(date.second))
            && matches(reg::MINUTES_ALARM, self.encode(date.minute))
            && matches(reg::HOURS_ALARM, self.encode_hour(date.hour))
    }

    /// Raises the flags of what happened up to `now`.
    fn catch_up(&mut self, now: u64) {
        let seen = std::mem::replace(&mut self.seen, now);
        if now <= seen {
            return;
        }
        if self.periods(seen) != self.periods(now) {
            self.bytes[reg::C] |= b::PERIODIC;
        }
        let (from, to) = (self.time(seen).div_euclid(SECOND), self.time(now).div_euclid(SECOND));
        if self.running() && from < to {
            self.bytes[reg::C] |= b::UPDATED;
            if (from.max(to.saturating_sub(DAY)) + 1..=to).any(|second| self.alarm_at(second)) {
                self.bytes[reg::C] |= b::ALARM;
            }
        }
    }

    /// When a flag that interrupts, and is not up yet, may be raised next.
    fn next(&self, now: u64) -> Option<u64> {
        let waits = self.bytes[reg::B] & !self.bytes[reg::C];
        let ns = |ahead: i64| now.saturating_add(ahead.max(1) as u64);
        let second = (self.running() && waits & (b::UPDATED | b::ALARM) != 0)
            .then(|| ns(SECOND - self.time(now).rem_euclid(SECOND)));
        let period = self.period().zip(self.periods(now)).filter(|_| waits & b::PERIODIC != 0);
        let period = period.map(|(shift, n)| {
            let tick = (i128::from(n) + 1) << shift;
            let at = (tick * i128::from(SECOND) + i128::from(PERIOD_HZ - 1)) / i128::from(PERIOD_HZ);
            ns((at - i128::from(self.time(now))).clamp(1, i128::from(SECOND)) as i64)
        });
        second.into_iter().chain(period).min()
    }
}

/// The memory of a PC with `ram` bytes, as SeaBIOS and others read it.
fn memory_bytes(ram: u64) -> Vec<u8> {
    let mut bytes = vec![0; 256];
    bytes[reg::A] = 0x26; // 32,768 Hz crystal, 1,024 Hz periodic
    bytes[reg::B] = b::HOURS_24;
    bytes[reg::D] = 0x80; // the battery is good
    bytes[0x14] = 2; // there is an FPU
    let mut put =
        |at: usize, value: u64, len: usize| bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
    let low = ram.min(memory::HOLE_START);
    let above_1m = ((low >> 10).saturating_sub(1024)).min(0xffff);
    put(0x15, 640, 2);
    put(0x17, above_1m, 2);
    put(0x30, above_1m, 2);
    put(0x34, (low.saturating_sub(16 << 20) >> 16).min(0xffff), 2);
    put(0x5b, ((ram - low) >> 16).min(0xff_ffff), 3);
    bytes
}

impl Registers for Rtc {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let mut state = lock(&self.state);
        let now = self.clock.now();
        state.catch_up(now);
        let value = read_bytes(offset, size, |offset| {
            // Register C's bit 7 is to be right when read.
            let flags = state.bytes[reg::C] & state.bytes[reg::B] & (b::PERIODIC | b::ALARM | b::UPDATED);
            state.bytes[reg::C] |= if flags != 0 { IRQ } else { 0 };
            self.read_byte(&mut state, now, offset)
        });
        self.settle(state, now);
        value
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let mut state = lock(&self.state);
        let now = self.clock.now();
        state.catch_up(now);
        write_bytes(offset, size, value, |offset, value| self.write_byte(&mut state, now, offset, value));
        self.settle(state, now);
    }
}
