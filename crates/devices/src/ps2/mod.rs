//! The keyboard controller (8042) at ports 0x60 and 0x64, with keyboard and mouse (IBM PS/2 Hardware Interface Technical
//! Reference, "Keyboard and Auxiliary Device Controller").
//!
//! What was sent by one of the devices waits there until the controller has nothing else to be read. Where nothing is plugged in,
//! what is sent is answered by the controller with a time-out, at once, so that a driver need not wait.
//!
//! Address line 20 is never masked; the bits for it can be read back.

mod keyboard;
mod mouse;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use machine::irq::Line;
use machine::power::End;
use machine::{Power, Registers};
use screens::{Input, Key, Point};
use serde::{Deserialize, Serialize};

pub use keyboard::Keyboard;
pub use mouse::Mouse;

use crate::{At, Saved, lock};

/// The data port.
pub const DATA: At = At::new(0x60, 1);
/// The status and command port.
pub const COMMAND: At = At::new(0x64, 1);
/// What a device says to what it understood, and to what it did not, or what is said where there is none.
const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;

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

/// The keyboard controller's registers, and its devices.
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
    /// Whether the key whose code comes next from the keyboard was let go, where codes are translated.
    pub released: bool,
    /// The keyboard.
    pub keyboard: Keyboard,
    /// The mouse.
    pub mouse: Mouse,
}

/// What is plugged in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plugged {
    /// Nothing.
    Nothing,
    /// A keyboard and a mouse.
    Both,
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
    /// A controller with the interrupt lines of keyboard (1) and mouse (12), that resets by `power`.
    pub fn new(plugged: Plugged, keyboard: Line, mouse: Line, power: Power) -> Arc<Self> {
        let mut ram = vec![0; 32];
        ram[0] = ctr::SYSTEM | ctr::KEYBOARD_OFF | ctr::MOUSE_OFF;
        let state = State {
            ram,
            output_port: 3,
            command: 0,
            was_command: false,
            answers: VecDeque::new(),
            released: false,
            keyboard: Keyboard::default(),
            mouse: Mouse::default(),
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
        state.keyboard.set_in_range();
        state.mouse.set_in_range();
        let mut ours = lock(&self.state);
        *ours = state;
        self.settle(ours);
    }

    /// What comes from the devices next, and the interrupts.
    fn settle(&self, mut state: MutexGuard<'_, State>) {
        state.fetch();
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

    /// The status of what comes by way of the mouse's side, which without a mouse this controller has not either.
    fn aux(&self) -> u8 {
        if self.plugged == Plugged::Both { status::FROM_MOUSE } else { 0 }
    }

    fn execute(&self, state: &mut State, command: u8) {
        match command {
            0x20..=0x3f => state.answer(state.ram[usize::from(command & 0x1f)], 0),
            0x60..=0x7f | 0xcb | 0xd1..=0xd4 => state.command = command,
            0xa7 => state.ram[0] |= ctr::MOUSE_OFF,
            0xa8 => state.ram[0] &= !ctr::MOUSE_OFF,
            // No mouse: "clock line stuck low".
            0xa9 => state.answer(if self.plugged == Plugged::Both { 0 } else { 1 }, 0),
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
        match (std::mem::take(&mut state.command), self.plugged) {
            (command @ 0x60..=0x7f, _) => state.ram[usize::from(command & 0x1f)] = byte,
            (0xd1, _) => self.set_output_port(state, byte),
            (0xd2, _) => state.answer(byte, 0),
            // Loops back.
            (0xd3, _) => state.answer(byte, self.aux()),
            (0xd4, Plugged::Nothing) => state.answer(RESEND, status::TIMEOUT | status::FROM_MOUSE),
            (0xd4, Plugged::Both) => {
                state.ram[0] &= !ctr::MOUSE_OFF;
                state.mouse.command(byte);
            }
            (0, plugged) => {
                state.ram[0] &= !ctr::KEYBOARD_OFF;
                match plugged {
                    Plugged::Nothing => state.answer(RESEND, status::TIMEOUT),
                    Plugged::Both => state.keyboard.command(byte),
                }
            }
            _ => {}
        }
    }

    /// Something happens to a device.
    fn typed(&self, happens: impl FnOnce(&mut State) -> bool) -> bool {
        if self.plugged == Plugged::Nothing {
            return false;
        }
        let mut state = lock(&self.state);
        let taken = happens(&mut state);
        self.settle(state);
        taken
    }
}

impl Input for I8042 {
    fn key(&self, key: Key, down: bool) -> bool {
        self.typed(|state| state.keyboard.key(key, down))
    }

    fn point(&self, point: Point) -> bool {
        self.typed(|state| state.mouse.point(point))
    }
}

impl State {
    fn answer(&mut self, byte: u8, status: u8) {
        if self.answers.len() < ANSWERS {
            self.answers.push_back(Answer { byte, status });
        }
    }

    /// Gets the next byte of a device, if nothing else waits and the device may send.
    fn fetch(&mut self) {
        while self.answers.is_empty() && self.ram[0] & ctr::KEYBOARD_OFF == 0 {
            let Some(byte) = self.keyboard.take() else { break };
            let translated = match self.ram[0] & ctr::TRANSLATE {
                0 => Some(byte),
                _ => keyboard::translate(byte, &mut self.released),
            };
            translated.into_iter().for_each(|byte| self.answer(byte, 0));
        }
        if self.answers.is_empty()
            && self.ram[0] & ctr::MOUSE_OFF == 0
            && let Some(byte) = self.mouse.take()
        {
            self.answer(byte, status::FROM_MOUSE);
        }
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
