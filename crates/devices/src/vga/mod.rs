//! A VGA with a linear frame buffer: the PCI display 1234:1111 as QEMU's `std` and Bochs have it (QEMU's `docs/specs/standard-vga`;
//! Bochs' `VBE DISPI`; IBM's VGA as in FreeVGA's pages).
//!
//! Video memory is reached through the legacy window at 0xa0000, by the four planes, and whole through BAR 0, where it is the
//! guest's memory as RAM is. A byte of plane *p*
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
use memory::Window as Video;
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

/// What changes but memory.
#[derive(Default)]
struct Now {
    legacy: Legacy,
    dispi: Dispi,
}

/// The display.
pub struct Vga {
    config: Config,
    state: Mutex<Now>,
    memory: Video,
    edid: [u8; 128],
}

impl fmt::Debug for Vga {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vga").field("dispi", &lock(&self.state).dispi).finish_non_exhaustive()
    }
}

impl Vga {
    /// A display with `memory` of [`MEMORY`] bytes; its monitor prefers [`edid::PREFERRED`]. To be plugged in, and put on the
    /// buses by [`Vga::insert`].
    pub fn new(memory: Video) -> Arc<Self> {
        let mut config = Config::new(Id {
            vendor: 0x1234,
            device: 0x1111,
            revision: 2,
            class: 0x03_0000,
            subsystem: (0x1af4, 0x1100),
        });
        config.add_bar_at(MEMORY_BAR, Bar::Memory32(MEMORY as u32));
        config.add_bar_at(REGISTERS_BAR, Bar::Memory32(4096));
        let (width, height) = edid::PREFERRED;
        Arc::new(Self { config, state: Mutex::default(), memory, edid: edid::block(width, height) })
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
        let now = lock(&self.state);
        let mut memory = bytes(&self.memory, MEMORY);
        let used = memory.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        memory.truncate(used);
        Saved::V1(State { legacy: now.legacy.clone(), dispi: now.dispi.clone(), memory })
    }

    /// Goes on from `state`.
    pub fn set_state(&self, state: &Saved<State>) {
        let Saved::V1(State { legacy, dispi, memory }) = state;
        let mut now = lock(&self.state);
        *now = Now { legacy: legacy.clone(), dispi: dispi.clone() };
        now.legacy.set_in_range();
        self.memory.clear(MEMORY as u64);
        self.memory.write(0, memory);
    }

    fn write_dispi(&self, now: &mut Now, index: u16, value: u16) {
        let set = now.dispi.write(index, value);
        now.legacy.settle(&now.dispi);
        if set {
            now.legacy.follow(&now.dispi);
            if now.dispi.clears() {
                self.memory.clear(now.dispi.bytes() as u64);
            }
        }
    }
}

/// The first bytes of memory.
fn bytes(memory: &Video, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(0, &mut bytes);
    bytes
}

impl Source for Vga {
    fn draw(&self, picture: &mut Picture) {
        draw::draw(&lock(&self.state), &self.memory, picture);
    }
}

impl Function for Vga {
    fn config(&self) -> &Config {
        &self.config
    }

    fn bar_memory(&self, bar: usize) -> Option<&Video> {
        (bar == MEMORY_BAR).then_some(&self.memory)
    }

    fn read_bar(&self, bar: usize, offset: u64, size: u8) -> u64 {
        let mut state = lock(&self.state);
        let at = offset as usize;
        match (bar, offset) {
            (MEMORY_BAR, _) => {
                let mut bytes = [0; 8];
                self.memory.read(offset, &mut bytes[..usize::from(size).min(8)]);
                u64::from_le_bytes(bytes)
            }
            (REGISTERS_BAR, ..0x80) => {
                crate::read_bytes(offset, size, |at| self.edid.get(at as usize).copied().unwrap_or(0))
            }
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
            (MEMORY_BAR, _) => self.memory.write(offset, &value.to_le_bytes()[..usize::from(size).min(8)]),
            (REGISTERS_BAR, 0x400..0x420) => {
                crate::write_bytes(offset - 0x400 + 0x10, size, value, |port, byte| {
                    state.legacy.write(port, byte)
                });
            }
            (REGISTERS_BAR, 0x500..0x516) => {
                self.write_dispi(&mut state, ((at - 0x500) / 2) as u16, value as u16);
            }
            _ => {}
        }
    }
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
            self.0.write_dispi(&mut state, index, value as u16);
        }
    }
}

struct Window(Arc<Vga>);

impl Registers for Window {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let state = &mut *lock(&self.0.state);
        crate::read_bytes(offset, size, |at| planes::read(state, &self.0.memory, at as usize))
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let state = &mut *lock(&self.0.state);
        crate::write_bytes(offset, size, value, |at, byte| {
            planes::write(state, &self.0.memory, at as usize, byte);
        });
    }
}
