//! The devices of the PC, one folder each, all of one shape: what it is, its registers, its saved state, its tests.
//!
//! A device takes what it needs (interrupt lines, clock, timers, memory, the power switch) when it is made, and answers at
//! one or more ranges of the machine's buses; there is no device manager. Whoever assembles the machine inserts the
//! ranges, whose standard addresses are constants of each module.
//!
//! Every device has `state()`, its registers as data, and `set_state()`. Times in a state are guest time
//! ([`machine::Clock`]), so the clock is to be restored before the devices. A state may come from a file that somebody
//! made up: `set_state` brings all of it in range.
#![forbid(unsafe_code)]

pub mod ahci;
pub mod debug;
mod dma;
pub mod e1000;
pub mod flash;
pub mod fw_cfg;
pub mod hpet;
pub mod net;
pub mod nvme;
pub mod pci;
pub mod pit;
pub mod pm;
pub mod ps2;
pub mod reset;
pub mod rtc;
pub mod serial;
pub mod vga;
pub mod virtio;

use std::sync::{Mutex, MutexGuard};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};

/// A device's saved state with the version of its layout. A device whose layout changes gets an enum of its own, with a
/// variant for each version that it can read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "version", content = "state")]
pub enum Saved<T> {
    /// The first layout.
    #[serde(rename = "1")]
    V1(T),
}

/// Where a device answers: first address and number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

impl At {
    /// `len` bytes from `start`.
    pub const fn new(start: u64, len: u64) -> Self {
        Self { start, len }
    }
}

/// Locks; a thread that panicked with the lock leaves the device as it was then.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// A wide read of a device whose registers are bytes.
fn read_bytes(offset: u64, size: u8, mut read: impl FnMut(u64) -> u8) -> u64 {
    (0..size).fold(0, |v, i| v | u64::from(read(offset + u64::from(i))) << (8 * i))
}

/// A wide write to a device whose registers are bytes.
fn write_bytes(offset: u64, size: u8, value: u64, mut write: impl FnMut(u64, u8)) {
    (0..size).for_each(|i| write(offset + u64::from(i), (value >> (8 * i)) as u8));
}

/// A read of a device whose registers are aligned words of 32 bits, of which it may be a part or two.
fn read_words(offset: u64, size: u8, read: impl Fn(u64) -> u32) -> u64 {
    let first = offset & !7;
    let wide = u64::from(read(first + 4)) << 32 | u64::from(read(first));
    wide >> (8 * (offset & 7)) & u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8)))
}

/// A write to such a device. Drivers write registers whole; a wide write is of two.
fn write_words(offset: u64, size: u8, value: u64, mut write: impl FnMut(u64, u32)) {
    if offset & 3 != 0 || size < 4 {
        return;
    }
    write(offset, value as u32);
    if size == 8 {
        write(offset + 4, (value >> 32) as u32);
    }
}

/// Waits for a device's threads, which have been told to end.
fn join(threads: &Mutex<Vec<JoinHandle<()>>>) {
    for thread in std::mem::take(&mut *lock(threads)) {
        // A thread that panicked has said so.
        let _ = thread.join();
    }
}

/// What tests of several devices need.
#[cfg(test)]
mod testing {
    use super::*;
    use machine::irq::{Input, Line};
    use machine::{Clock, Registers, Timers};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    /// The far end of a line: its level, and how often it rose.
    #[derive(Default)]
    pub struct Probe {
        level: AtomicBool,
        edges: AtomicUsize,
    }

    impl Input for Probe {
        fn set(&self, level: bool) {
            if level && !self.level.swap(level, Ordering::SeqCst) {
                self.edges.fetch_add(1, Ordering::SeqCst);
            }
            self.level.store(level, Ordering::SeqCst);
        }
    }

    impl Probe {
        pub fn level(&self) -> bool {
            self.level.load(Ordering::SeqCst)
        }

        /// Rising edges since the last call.
        pub fn edges(&self) -> usize {
            self.edges.swap(0, Ordering::SeqCst)
        }
    }

    pub fn probe() -> (Line, Arc<Probe>) {
        let probe = Arc::new(Probe::default());
        (Line::new(probe.clone()), probe)
    }

    /// Waits for what a device's thread does.
    #[track_caller]
    pub fn until(what: &str, mut done: impl FnMut() -> bool) {
        let patience = Instant::now() + Duration::from_secs(100);
        while !done() {
            assert!(Instant::now() < patience, "never: {what}");
            std::thread::yield_now();
        }
    }

    pub fn time() -> (Arc<Clock>, Timers) {
        let clock = Arc::new(Clock::manual(1_000_000));
        let timers = Timers::new(clock.clone()).unwrap();
        (clock, timers)
    }

    /// xorshift64*.
    pub struct Random(u64);

    impl Random {
        /// Seeded from the clock, or from the environment to repeat a failure; prints the seed.
        pub fn new() -> Self {
            let seed = std::env::var("LODGE_SEED")
                .ok()
                .and_then(|s| s.parse().ok())
                .unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().map_or(1, |d| d.as_nanos() as u64) | 1);
            println!("LODGE_SEED={seed}");
            Self(seed)
        }

        pub fn next(&mut self) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
        }

        pub fn below(&mut self, n: u64) -> u64 {
            self.next() % n
        }
    }

    /// What a hostile guest does: `n` reads and writes of every size all over the registers, and time goes on.
    pub fn batter(registers: &dyn Registers, len: u64, n: u32, timers: Option<&Timers>) {
        let mut random = Random::new();
        for _ in 0..n {
            let size = 1u8 << random.below(4);
            let offset = random.below(len);
            if random.below(3) == 0 {
                registers.read(offset, size);
            } else {
                let value = match random.below(4) {
                    0 => 0,
                    1 => u64::MAX,
                    _ => random.next(),
                };
                registers.write(offset, size, value & (u64::MAX >> (64 - 8 * u32::from(size))));
            }
            if let Some(timers) = timers
                && random.below(8) == 0
            {
                let bits = random.below(30);
                timers.advance(random.next() >> 34 >> (29 - bits));
            }
        }
    }

    /// The state survives being written out and read in.
    pub fn through_json<T: Serialize + for<'a> Deserialize<'a>>(state: &T) -> T {
        serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
    }
}
