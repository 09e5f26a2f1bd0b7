//! Input devices (5.8): a keyboard, and a tablet, whose pointer is where the viewer's is.

use std::collections::VecDeque;
use std::fmt;
use std::io::Write;
use std::sync::{Mutex, OnceLock};

use screens::{Input, Key, Point};
use serde::{Deserialize, Serialize};

use super::{Broken, Device, In, Out, Wires};
use crate::{Saved, lock};

const EVENTS: usize = 0;
/// Events that wait for the driver's buffers.
const ROOM: usize = 512;
/// The tablet's axes go from 0 to this.
const AXIS: u32 = 0x7fff;

/// Types and codes of events (`linux/input-event-codes.h`).
mod ev {
    pub const SYN: u16 = 0;
    pub const KEY: u16 = 1;
    pub const REL: u16 = 2;
    pub const ABS: u16 = 3;
    pub const LED: u16 = 0x11;
    pub const REPEAT: u16 = 0x14;
    pub const X: u16 = 0;
    pub const Y: u16 = 1;
    pub const WHEEL: u16 = 8;
    pub const HORIZONTAL_WHEEL: u16 = 6;
}
/// What can be asked for in the configuration.
mod select {
    pub const NAME: u8 = 1;
    pub const IDS: u8 = 3;
    pub const EVENTS: u8 = 0x11;
    pub const AXIS: u8 = 0x12;
}
/// The buttons of a [`Point`], from its bit 0: left, middle, right; wheels have none; back and forward.
const BUTTONS: [(u32, u16); 5] = [(0, 0x110), (1, 0x112), (2, 0x111), (7, 0x113), (8, 0x114)];

/// Which one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A keyboard.
    Keyboard,
    /// A tablet with three buttons, two more and wheels.
    Tablet,
}

/// An event: type, code, value.
type Event = (u16, u16, u32);

/// What is saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// What the driver asks for: which table, and which part of it.
    pub select: (u8, u8),
    /// Whether a driver has set it up.
    pub active: bool,
    /// What waits for it.
    pub events: VecDeque<(u16, u16, u32)>,
    /// The pointer as it was told last.
    pub at: (u32, u32),
    /// And its buttons.
    pub buttons: u16,
}

/// An input device.
pub struct InputDevice {
    kind: Kind,
    state: Mutex<State>,
    wires: OnceLock<Wires>,
}

impl fmt::Debug for InputDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InputDevice").field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl InputDevice {
    /// A device that nobody uses yet.
    pub fn new(kind: Kind) -> Self {
        Self { kind, state: Mutex::default(), wires: OnceLock::new() }
    }

    /// What waits, and what was told.
    pub fn state(&self) -> Saved<State> {
        Saved::V1(lock(&self.state).clone())
    }

    /// Goes on from `state`.
    pub fn set_state(&self, state: &Saved<State>) {
        let Saved::V1(state) = state;
        let mut state = state.clone();
        state.events.truncate(2 * ROOM);
        *lock(&self.state) = state;
    }

    /// A table of the configuration.
    fn table(&self, select: (u8, u8)) -> Vec<u8> {
        let keyboard = self.kind == Kind::Keyboard;
        match select {
            (select::NAME, 0) if keyboard => b"Lodge keyboard".to_vec(),
            (select::NAME, 0) => b"Lodge tablet".to_vec(),
            // Bus (virtual), vendor, product, version.
            (select::IDS, 0) => {
                let product = if keyboard { 1 } else { 2 };
                [6u16, 0x1af4, product, 1].iter().flat_map(|w| w.to_le_bytes()).collect()
            }
            (select::EVENTS, kind) => bits(self.codes(kind.into())),
            (select::AXIS, 0 | 1) if !keyboard => {
                [0, AXIS, 0, 0, 0].iter().flat_map(|w: &u32| w.to_le_bytes()).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The codes of a type of events that it has.
    fn codes(&self, kind: u16) -> Vec<u16> {
        match (self.kind, kind) {
            (Kind::Keyboard, ev::KEY) => (1..0x100).filter(|code| Key(*code).xt().is_some()).collect(),
            (Kind::Keyboard, ev::LED) => vec![0, 1, 2],
            (Kind::Keyboard, ev::REPEAT) => vec![0, 1],
            (Kind::Tablet, ev::KEY) => BUTTONS.iter().map(|(_, code)| *code).collect(),
            (Kind::Tablet, ev::REL) => vec![ev::HORIZONTAL_WHEEL, ev::WHEEL],
            (Kind::Tablet, ev::ABS) => vec![ev::X, ev::Y],
            _ => Vec::new(),
        }
    }

    /// Puts events into the queue, if somebody uses it and there is room; `must`: those that end what others began have more.
    fn tell(&self, state: &mut State, events: &[Event], must: bool) -> bool {
        let room = if must { 2 * ROOM } else { ROOM };
        if !state.active || state.events.len() + events.len() + 1 > room {
            return false;
        }
        if !events.is_empty() {
            state.events.extend(events);
            state.events.push_back((ev::SYN, 0, 0));
        }
        true
    }

    fn kick(&self) {
        if let Some(wires) = self.wires.get() {
            wires.kick(EVENTS);
        }
    }
}

/// A bit for each code.
fn bits(codes: Vec<u16>) -> Vec<u8> {
    let mut bits = vec![0; codes.iter().max().map_or(0, |max| usize::from(max / 8) + 1)];
    codes.iter().for_each(|code| bits[usize::from(code / 8)] |= 1 << (code % 8));
    bits
}

impl Device for InputDevice {
    fn kind(&self) -> u16 {
        18
    }

    fn class(&self) -> u32 {
        if self.kind == Kind::Keyboard { 0x09_0000 } else { 0x09_8000 }
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &[u16] {
        &[64, 64]
    }

    /// Select, subselect, size, five bytes of nothing, and the table.
    fn config(&self) -> Vec<u8> {
        let select = lock(&self.state).select;
        let table = self.table(select);
        let mut config = vec![select.0, select.1, table.len() as u8, 0, 0, 0, 0, 0];
        config.extend(table);
        config.resize(8 + 128, 0);
        config
    }

    fn write_config(&self, offset: u64, size: u8, value: u64) {
        let mut state = lock(&self.state);
        for (at, byte) in (offset..).zip(value.to_le_bytes()).take(size.into()) {
            match at {
                0 => state.select.0 = byte,
                1 => state.select.1 = byte,
                _ => {}
            }
        }
    }

    fn connect(&self, wires: Wires) {
        // The transport calls once.
        let _ = self.wires.set(wires);
    }

    fn set_features(&self, _: u64) {
        lock(&self.state).active = true;
    }

    fn reset(&self) {
        *lock(&self.state) = State::default();
    }

    fn ready(&self, queue: usize) -> bool {
        queue != EVENTS || !lock(&self.state).events.is_empty()
    }

    fn serve(&self, queue: usize, _: In<'_>, mut to: Out<'_>) -> Result<usize, Broken> {
        // What the driver tells of lights is of no use here.
        if queue != EVENTS {
            return Ok(0);
        }
        let Some((kind, code, value)) = lock(&self.state).events.pop_front() else { return Ok(0) };
        let mut bytes = [0; 8];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[2..4].copy_from_slice(&code.to_le_bytes());
        bytes[4..].copy_from_slice(&value.to_le_bytes());
        to.write_all(&bytes).map_err(|_| Broken)?;
        Ok(bytes.len())
    }
}

impl Input for InputDevice {
    fn key(&self, key: Key, down: bool) -> bool {
        if self.kind != Kind::Keyboard {
            return false;
        }
        let known = key.xt().map(|_| (ev::KEY, key.0, u32::from(down)));
        let taken = self.tell(&mut lock(&self.state), known.as_slice(), !down);
        self.kick();
        taken
    }

    fn point(&self, point: Point) -> bool {
        if self.kind != Kind::Tablet {
            return false;
        }
        let mut state = lock(&self.state);
        let scale = |at: u32, size: u32| {
            let last = u64::from(size.saturating_sub(1).max(1));
            (u64::from(at).min(last) * u64::from(AXIS) / last) as u32
        };
        let at = (scale(point.x, point.size.0), scale(point.y, point.size.1));
        let mut events = Vec::new();
        events.extend((at.0 != state.at.0).then_some((ev::ABS, ev::X, at.0)));
        events.extend((at.1 != state.at.1).then_some((ev::ABS, ev::Y, at.1)));
        let changed = point.buttons ^ state.buttons;
        for (bit, code) in BUTTONS {
            if changed & 1 << bit != 0 {
                events.push((ev::KEY, code, u32::from(point.buttons >> bit & 1)));
            }
        }
        let wheels = [
            (3, ev::WHEEL, 1i32),
            (4, ev::WHEEL, -1),
            (5, ev::HORIZONTAL_WHEEL, -1),
            (6, ev::HORIZONTAL_WHEEL, 1),
        ];
        for (bit, code, way) in wheels {
            if changed & point.buttons & 1 << bit != 0 {
                events.push((ev::REL, code, way as u32));
            }
        }
        let taken = self.tell(&mut state, &events, changed & !point.buttons != 0);
        if taken {
            (state.at, state.buttons) = (at, point.buttons);
        }
        let active = state.active;
        drop(state);
        self.kick();
        active
    }
}
