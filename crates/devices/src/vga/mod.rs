//! A VGA with a linear frame buffer: the PCI display 1234:1111 as QEMU's `std` and Bochs have it (QEMU's `docs/specs/standard-vga`;
//! Bochs' `VBE DISPI`; IBM's VGA as in FreeVGA's pages).
//!
//! Video memory is reached through the legacy window at 0xa0000, by the four planes, and whole through BAR 0. A byte of plane *p*
//! at *a* is byte 4*a* + *p* of it; with "chain 4" a byte of the window is the same byte of it. Registers are at the legacy ports,
//! and once more in BAR 2. What the screen shows is drawn from memory and registers when somebody looks.

mod dispi;
mod draw;
mod planes;
mod registers;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Arc, Mutex};

use machine::{Bus, Registers, bus};
use screens::{Picture, Source, edid};
use serde::{Deserialize, Serialize};

use crate::pci::{Address, Bar, Config, Function, Id};
use crate::{At, Saved, lock};

pub use dispi::Dispi;
pub use registers::Legacy;

/// The legacy ports.
pub const PORTS: At = At::new(0x3b0, 0x30);
/// The ports of the linear frame buffer's registers: index, data, data.
pub const DISPI: At = At::new(0x1ce, 4);
/// The legacy window.
pub const WINDOW: At = At::new(0xa_0000, 0x2_0000);
/// Where on the bus it is plugged in.
pub const ADDRESS: Address = match Address::new(0x1e, 0) {
    Some(at) => at,
    None => unreachable!(),
};
/// Bytes of video memory.
pub const MEMORY: usize = 16 << 20;
const MEMORY_BAR: usize = 0;
const REGISTERS_BAR: usize = 2;

/// Everything that changes but the PCI configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The registers of IBM's VGA.
    pub legacy: Legacy,
    /// The registers of the linear frame buffer.
    pub dispi: Dispi,
    /// Video memory, up to the last byte that is not 0.
    pub memory: Vec<u8>,
}

/// The display.
pub struct Vga {
    config: Config,
    state: Mutex<State>,
    edid: [u8; 128],
}

impl fmt::Debug for Vga {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vga").field("dispi", &lock(&self.state).dispi).finish_non_exhaustive()
    }
}

impl Vga {
    /// A display; its monitor prefers [`edid::PREFERRED`]. To be plugged in, and put on the buses by [`Vga::insert`].
    pub fn new() -> Arc<Self> {
        let mut config = Config::new(Id {
            vendor: 0x1234,
            device: 0x1111,
            revision: 2,
            class: 0x03_0000,
            subsystem: (0x1af4, 0x1100),
        });
        config.add_bar_at(MEMORY_BAR, Bar::Memory32(MEMORY as u32));
        config.add_bar_at(REGISTERS_BAR, Bar::Memory32(4096));
        let state = State { legacy: Legacy::default(), dispi: Dispi::default(), memory: vec![0; MEMORY] };
        let (width, height) = edid::PREFERRED;
        Arc::new(Self { config, state: Mutex::new(state), edid: edid::block(width, height) })
    }

    /// Puts the legacy ports and the legacy window on the buses.
    ///
    /// # Errors
    /// Something else is there.
    pub fn insert(self: &Arc<Self>, ports: &Bus, mmio: &Bus) -> Result<(), bus::Overlap> {
        ports.insert(PORTS.start, PORTS.len, "VGA", Arc::new(Ports(self.clone())))?;
        ports.insert(DISPI.start, DISPI.len, "VGA", Arc::new(DispiPorts(self.clone())))?;
        mmio.insert(WINDOW.start, WINDOW.len, "VGA", Arc::new(Window(self.clone())))
    }

    /// Registers and memory; the configuration space is saved with the bus.
    pub fn state(&self) -> Saved<State> {
        let mut state = lock(&self.state).clone();
        let used = state.memory.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        state.memory.truncate(used);
        Saved::V1(state)
    }

    /// Goes on from `state`.
    pub fn set_state(&self, state: &Saved<State>) {
        let Saved::V1(state) = state;
        let mut state = state.clone();
        state.memory.resize(MEMORY, 0);
        state.legacy.set_in_range();
        *lock(&self.state) = state;
    }
}

impl State {
    fn write_dispi(&mut self, index: u16, value: u16) {
        let set = self.dispi.write(index, value);
        self.legacy.settle(&self.dispi);
        if set {
            self.legacy.follow(&self.dispi);
            if self.dispi.clears() {
                let used = self.dispi.bytes().min(self.memory.len());
                self.memory[..used].fill(0);
            }
        }
    }
}

impl Source for Vga {
    fn draw(&self, picture: &mut Picture) {
        draw::draw(&lock(&self.state), picture);
    }
}

impl Function for Vga {
    fn config(&self) -> &Config {
        &self.config
    }

    fn read_bar(&self, bar: usize, offset: u64, size: u8) -> u64 {
        let mut state = lock(&self.state);
        let at = offset as usize;
        match (bar, offset) {
            (MEMORY_BAR, _) => read_memory(&state.memory, at, size),
            (REGISTERS_BAR, ..0x80) => read_memory(&self.edid, at, size),
            (REGISTERS_BAR, 0x400..0x420) => {
                crate::read_bytes(offset - 0x400 + 0x10, size, |port| state.legacy.read(port))
            }
            (REGISTERS_BAR, 0x500..0x516) => state.dispi.read(((at - 0x500) / 2) as u16).into(),
            _ => 0,
        }
    }

    fn write_bar(&self, bar: usize, offset: u64, size: u8, value: u64) {
        let mut state = lock(&self.state);
        let at = offset as usize;
        match (bar, offset) {
            (MEMORY_BAR, _) => write_memory(&mut state.memory, at, size, value),
            (REGISTERS_BAR, 0x400..0x420) => {
                crate::write_bytes(offset - 0x400 + 0x10, size, value, |port, byte| {
                    state.legacy.write(port, byte)
                });
            }
            (REGISTERS_BAR, 0x500..0x516) => state.write_dispi(((at - 0x500) / 2) as u16, value as u16),
            _ => {}
        }
    }
}

/// Bytes as a little-endian number; 0 beyond the end.
fn read_memory(memory: &[u8], at: usize, size: u8) -> u64 {
    let mut bytes = [0; 8];
    let from = memory.get(at..).unwrap_or_default();
    bytes.iter_mut().zip(from).take(size.into()).for_each(|(to, from)| *to = *from);
    u64::from_le_bytes(bytes)
}

fn write_memory(memory: &mut [u8], at: usize, size: u8, value: u64) {
    let to = memory.get_mut(at..).unwrap_or_default();
    to.iter_mut().zip(value.to_le_bytes()).take(size.into()).for_each(|(to, from)| *to = from);
}

struct Ports(Arc<Vga>);

impl Registers for Ports {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let mut state = lock(&self.0.state);
        crate::read_bytes(offset, size, |port| state.legacy.read(port))
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let mut state = lock(&self.0.state);
        crate::write_bytes(offset, size, value, |port, byte| state.legacy.write(port, byte));
    }
}

struct DispiPorts(Arc<Vga>);

impl Registers for DispiPorts {
    fn read(&self, offset: u64, _: u8) -> u64 {
        let state = lock(&self.0.state);
        if offset == 0 { state.dispi.index.into() } else { state.dispi.read(state.dispi.index).into() }
    }

    fn write(&self, offset: u64, _: u8, value: u64) {
        let mut state = lock(&self.0.state);
        if offset == 0 {
            state.dispi.index = value as u16;
        } else {
            let index = state.dispi.index;
            state.write_dispi(index, value as u16);
        }
    }
}

struct Window(Arc<Vga>);

impl Registers for Window {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let state = &mut *lock(&self.0.state);
        crate::read_bytes(offset, size, |at| planes::read(state, at as usize))
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let state = &mut *lock(&self.0.state);
        crate::write_bytes(offset, size, value, |at, byte| planes::write(state, at as usize, byte));
    }
}
