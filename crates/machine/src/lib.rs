//! What a PC is, without saying what runs it or what is plugged in: buses, interrupt controllers, clock and timers, the
//! canonical CPU state, and the traits that engines ([`cpu::Vcpu`]) and devices ([`bus::Registers`]) implement.
//!
//! Knows no engine and no device: only the `vm` crate puts them together.
#![forbid(unsafe_code)]

pub mod apic;
pub mod bus;
pub mod clock;
pub mod cpu;
pub mod irq;
pub mod irqs;
pub mod pic;
pub mod power;

use std::sync::Arc;

pub use bus::{Bus, Registers};
pub use clock::{Clock, Timer, Timers};
pub use memory::{Gpa, Memory};
pub use power::Power;
pub use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

/// What all vCPUs and devices of one VM share.
pub struct Machine {
    /// RAM and ROM.
    pub memory: Memory,
    /// The 64 KiB of I/O ports.
    pub ports: Bus,
    /// Guest-physical addresses that are no memory.
    pub mmio: Bus,
    /// Guest time.
    pub clock: Arc<Clock>,
    /// What is to happen later in guest time.
    pub timers: Timers,
    /// How the machine ends.
    pub power: Power,
}

impl Machine {
    /// A machine without devices, with timers of `clock` and a power switch of its own.
    ///
    /// # Errors
    /// The host gives no thread for timers.
    pub fn new(memory: Memory, clock: Clock) -> std::io::Result<Self> {
        let clock = Arc::new(clock);
        let (ports, mmio, power) = (Bus::default(), Bus::default(), Power::default());
        Ok(Self { memory, ports, mmio, timers: Timers::new(clock.clone())?, clock, power })
    }
}
