//! The ways to reset a PC, and the keyboard controller, which is one of them.
//!
//! * [`Control`]: the chipset's reset control register at port 0xcf9 (ICH9 data sheet, 13.7.5);
//! * [`FastA20`]: system control port A at 0x92 (ICH9, 13.7.3);
//! * [`I8042`]: the keyboard controller at 0x60 and 0x64. No mouse is plugged in, and a keyboard only for firmware, which
//!   waits for one; nobody types on it. Without, what is sent to the keyboard is answered by the controller with a time-out,
//!   at once, so that a driver need not wait.
//!
//! Address line 20 is never masked; the bits for it can be read back.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use machine::irq::Line;
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
/// [`I8042`]'s data port.
pub const I8042_DATA: At = At::new(0x60, 1);
/// [`I8042`]'s status and command port.
pub const I8042_COMMAND: At = At::new(0x64, 1);

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

mod status {
    pub const OUTPUT_FULL: u8 = 1;
    pub const SYSTEM: u8 = 4;
    pub const COMMAND: u8 = 8;
    pub const UNLOCKED: u8 = 0x10;
    pub const FROM_MOUSE: u8 = 0x20;
    pub const TIMEOUT: u8 = 0x40;
}
/// Bits of the command byte, which is byte 0 of the controller's RAM.
mod ctr {
    pub const KEYBOARD_INTERRUPT: u8 = 1;
    pub const MOUSE_INTERRUPT: u8 = 2;
    pub const SYSTEM: u8 = 4;
    pub const KEYBOARD_OFF: u8 = 0x10;
    pub const MOUSE_OFF: u8 = 0x20;
    pub const TRANSLATE: u8 = 0x40;
}
/// Who sends a resend request when nobody is there to answer.
const RESEND: u8 = 0xfe;
/// Answers that wait to be read.
const ANSWERS: usize = 16;

/// A byte for the guest, with the status bits that come with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// What is read.
    pub byte: u8,
    /// From the mouse, or in place of an answer that never came.
    pub status: u8,
}

/// The keyboard controller's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// RAM; byte 0 is the command byte.
    pub ram: Vec<u8>,
    /// Output port: bit 1 is address line 20.
    pub output_port: u8,
    /// The command whose data byte comes next, or 0.
    pub command: u8,
    /// Whether the last write was a command.
    pub was_command: bool,
    /// What is to be read, oldest first.
    pub answers: VecDeque<Answer>,
    /// The keyboard's command whose data byte comes next, or 0.
    #[serde(default)]
    pub keyboard_command: u8,
}

/// What is plugged in where the keyboard goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plugged {
    /// Nothing.
    Nothing,
    /// A keyboard.
    Keyboard,
}

/// The keyboard controller.
#[derive(Debug)]
pub struct I8042 {
    plugged: Plugged,
    state: Mutex<State>,
    keyboard: Line,
    mouse: Line,
    power: Power,
}

impl I8042 {
    /// A controller with the interrupt lines of keyboard (1) and mouse (12), with `plugged` in place of the keyboard, that resets by `power`.
    pub fn new(plugged: Plugged, keyboard: Line, mouse: Line, power: Power) -> Arc<Self> {
        let mut ram = vec![0; 32];
        ram[0] = ctr::SYSTEM | ctr::KEYBOARD_OFF | ctr::MOUSE_OFF;
        let state = State {
            ram,
            output_port: 3,
            command: 0,
            was_command: false,
            answers: VecDeque::new(),
            keyboard_command: 0,
        };
        Arc::new(Self { plugged, state: Mutex::new(state), keyboard, mouse, power })
    }

    /// The data port's registers.
    pub fn data(self: &Arc<Self>) -> Arc<dyn Registers> {
        Arc::new(Data(self.clone()))
    }

    /// The status and command port's registers.
    pub fn command(self: &Arc<Self>) -> Arc<dyn Registers> {
        Arc::new(Command(self.clone()))
    }

    /// The registers.
    pub fn state(&self) -> Saved<State> {
        Saved::V1(lock(&self.state).clone())
    }

    /// Goes on from `state`.
    pub fn set_state(&self, state: &Saved<State>) {
        let Saved::V1(state) = state;
        let mut state = state.clone();
        state.ram.resize(32, 0);
        state.answers.truncate(ANSWERS);
        let mut ours = lock(&self.state);
        *ours = state;
        self.settle(ours);
    }

    fn settle(&self, state: MutexGuard<'_, State>) {
        let front = state.answers.front().map(|a| a.status & status::FROM_MOUSE != 0);
        self.keyboard.set(front == Some(false) && state.ram[0] & ctr::KEYBOARD_INTERRUPT != 0);
        self.mouse.set(front == Some(true) && state.ram[0] & ctr::MOUSE_INTERRUPT != 0);
    }

    fn set_output_port(&self, state: &mut State, value: u8) {
        state.output_port = value;
        if value & 1 == 0 {
            self.power.request(End::Reset);
        }
    }

    fn execute(&self, state: &mut State, command: u8) {
        match command {
            0x20..=0x3f => state.answer(state.ram[usize::from(command & 0x1f)], 0),
            0x60..=0x7f | 0xcb | 0xd1..=0xd4 => state.command = command,
            0xa7 => state.ram[0] |= ctr::MOUSE_OFF,
            0xa8 => state.ram[0] &= !ctr::MOUSE_OFF,
            // No mouse: "clock line stuck low".
            0xa9 => state.answer(1, 0),
            0xaa => {
                state.ram[0] |= ctr::SYSTEM;
                state.answer(0x55, 0);
            }
            0xab => state.answer(0, 0),
            0xad => state.ram[0] |= ctr::KEYBOARD_OFF,
            0xae => state.ram[0] &= !ctr::KEYBOARD_OFF,
            // Input port: keyboard not locked.
            0xc0 => state.answer(0x80, 0),
            0xd0 => state.answer(state.output_port, 0),
            // Pulse the output port's low bits that are 0 in the command; bit 0 is the processor's reset.
            0xf0..=0xff if command & 1 == 0 => self.power.request(End::Reset),
            _ => {}
        }
    }

    fn data_byte(&self, state: &mut State, byte: u8) {
        match std::mem::take(&mut state.command) {
            command @ 0x60..=0x7f => state.ram[usize::from(command & 0x1f)] = byte,
            0xd1 => self.set_output_port(state, byte),
            0xd2 => state.answer(byte, 0),
            // Loops back by way of the mouse's side, which this controller has no more than a mouse: no AUX bit.
            0xd3 => state.answer(byte, 0),
            0xd4 => state.answer(RESEND, status::TIMEOUT | status::FROM_MOUSE),
            0 => {
                state.ram[0] &= !ctr::KEYBOARD_OFF;
                match self.plugged {
                    Plugged::Nothing => state.answer(RESEND, status::TIMEOUT),
                    Plugged::Keyboard => state.keyboard(byte),
                }
            }
            _ => {}
        }
    }
}

impl State {
    fn answer(&mut self, byte: u8, status: u8) {
        if self.answers.len() < ANSWERS {
            self.answers.push_back(Answer { byte, status });
        }
    }

    /// A byte for the keyboard (IBM PS/2 Hardware Interface Technical Reference, Keyboards, "Commands").
    fn keyboard(&mut self, byte: u8) {
        const ACK: u8 = 0xfa;
        let answers: &[u8] = match (std::mem::take(&mut self.keyboard_command), byte) {
            // Which set of scan codes.
            (0xf0, 0) => &[ACK, 2],
            (1.., _) | (_, 0xf4..=0xf6) => &[ACK],
            // Lights, scan codes, repetition: a data byte follows.
            (_, 0xed | 0xf0 | 0xf3) => {
                self.keyboard_command = byte;
                &[ACK]
            }
            (_, 0xee) => &[0xee],
            // Who it is, as the controller translates it.
            (_, 0xf2) if self.ram[0] & ctr::TRANSLATE != 0 => &[ACK, 0xab, 0x41],
            (_, 0xf2) => &[ACK, 0xab, 0x83],
            // Reset, and the self-test went well.
            (_, 0xff) => &[ACK, 0xaa],
            _ => &[RESEND],
        };
        answers.iter().for_each(|answer| self.answer(*answer, 0));
    }

    fn status(&self) -> u8 {
        let answer = self
            .answers
            .front()
            .map_or(0, |a| status::OUTPUT_FULL | a.status & (status::FROM_MOUSE | status::TIMEOUT));
        let command = if self.was_command { status::COMMAND } else { 0 };
        answer | command | self.ram[0] & status::SYSTEM | status::UNLOCKED
    }
}

struct Data(Arc<I8042>);

impl Registers for Data {
    fn read(&self, _: u64, _: u8) -> u64 {
        let mut state = lock(&self.0.state);
        let byte = state.answers.pop_front().map_or(0, |a| a.byte);
        // An edge for each answer, also where the next one waits already.
        self.0.keyboard.set(false);
        self.0.mouse.set(false);
        self.0.settle(state);
        byte.into()
    }

    fn write(&self, _: u64, _: u8, value: u64) {
        let mut state = lock(&self.0.state);
        state.was_command = false;
        self.0.data_byte(&mut state, value as u8);
        self.0.settle(state);
    }
}

struct Command(Arc<I8042>);

impl Registers for Command {
    fn read(&self, _: u64, _: u8) -> u64 {
        lock(&self.0.state).status().into()
    }

    fn write(&self, _: u64, _: u8, value: u64) {
        let mut state = lock(&self.0.state);
        state.was_command = true;
        state.command = 0;
        self.0.execute(&mut state, value as u8);
        self.0.settle(state);
    }
}
