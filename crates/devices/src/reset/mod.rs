//! The ways to reset a PC, beside the keyboard controller ([`crate::ps2`]).
//!
//! * [`Control`]: the chipset's reset control register at port 0xcf9 (ICH9 data sheet, 13.7.5);
//! * [`FastA20`]: system control port A at 0x92 (ICH9, 13.7.3).
//!
//! Address line 20 is never masked; the bits for it can be read back.

use std::sync::{Arc, Mutex};

use machine::power::End;
use machine::{Power, Registers};
use serde::{Deserialize, Serialize};

use crate::{At, Saved, lock};

#[cfg(test)]
mod tests;

/// [`Control`]'s port. It lies within the ports of PCI configuration: give it to the host bridge where there is one.
pub const CONTROL: At = At::new(0xcf9, 1);
/// [`FastA20`]'s port.
pub const FAST_A20: At = At::new(0x92, 1);

/// A register of one byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Byte(pub u8);

/// The reset control register: a rising bit 2 resets.
#[derive(Debug)]
pub struct Control {
    state: Mutex<Byte>,
    power: Power,
}

impl Control {
    /// A register that resets by `power`.
    pub fn new(power: Power) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), power })
    }

    /// The register.
    pub fn state(&self) -> Saved<Byte> {
        Saved::V1(*lock(&self.state))
    }

    /// Goes on from `state`.
    pub fn set_state(&self, state: &Saved<Byte>) {
        let Saved::V1(state) = state;
        *lock(&self.state) = *state;
    }
}

impl Registers for Control {
    fn read(&self, _: u64, _: u8) -> u64 {
        lock(&self.state).0.into()
    }

    fn write(&self, _: u64, _: u8, value: u64) {
        let before = std::mem::replace(&mut lock(&self.state).0, value as u8 & 0xe);
        if value as u8 & !before & 4 != 0 {
            self.power.request(End::Reset);
        }
    }
}

/// System control port A: bit 1 opens address line 20, a rising bit 0 resets.
#[derive(Debug)]
pub struct FastA20 {
    state: Mutex<Byte>,
    power: Power,
}

impl FastA20 {
    /// A port that resets by `power`.
    pub fn new(power: Power) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(Byte(2)), power })
    }

    /// The register.
    pub fn state(&self) -> Saved<Byte> {
        Saved::V1(*lock(&self.state))
    }

    /// Goes on from `state`.
    pub fn set_state(&self, state: &Saved<Byte>) {
        let Saved::V1(state) = state;
        *lock(&self.state) = *state;
    }
}

impl Registers for FastA20 {
    fn read(&self, _: u64, _: u8) -> u64 {
        lock(&self.state).0.into()
    }

    fn write(&self, _: u64, _: u8, value: u64) {
        let before = std::mem::replace(&mut lock(&self.state).0, value as u8 & 3);
        if value as u8 & !before & 1 != 0 {
            self.power.request(End::Reset);
        }
    }
}
