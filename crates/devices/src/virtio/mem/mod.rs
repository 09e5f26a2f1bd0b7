//! Memory that is plugged and unplugged in blocks (virtio 1.2, section 5.15): how a guest comes to have more than it started with.
//! The host says how much, the guest asks for the blocks.

mod target;
#[cfg(test)]
mod tests;

use std::io::{Read, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use memory::Pluggable;
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;

use super::{Broken, Device, In, Out, Wires};
use crate::dma::{le16, le64};
use crate::lock;
pub use target::Target;

/// The driver does not touch what is not plugged. One that does not accept it finds nothing there either.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Bytes of a request, whatever it asks for: type (2), padding (6), address (8), blocks (2), padding (6).
const REQUEST: usize = 24;
/// Bytes of an answer: type (2), padding (6), state (2).
const ANSWER: usize = 10;

/// What a request asks for (5.15.6).
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// The answers: done; more than is wanted; not now; wrong.
const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

/// How blocks are (5.15.6.6).
const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

/// The device.
#[derive(Debug)]
pub struct Mem {
    memory: Pluggable,
    target: Arc<Target>,
    shared: Arc<Shared>,
    /// Held while blocks change.
    changing: Mutex<()>,
}

/// What the target knows of the device.
#[derive(Debug, Default)]
struct Shared {
    wires: OnceLock<Wires>,
    driven: AtomicBool,
}

impl Shared {
    /// Has the driver look at the configuration.
    fn config_changed(&self) {
        if let Some(wires) = self.wires.get() {
            wires.config_changed();
        }
    }
}

impl Mem {
    /// A device for `memory`, of which the guest gets what `target` says.
    pub fn new(memory: Pluggable, target: Arc<Target>) -> Self {
        let shared = Arc::new(Shared::default());
        target.connect(&memory, &shared);
        Self { memory, target, shared, changing: Mutex::default() }
    }

    /// Does what a request asks for: the answer's type, and its state.
    fn act(&self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        let _changing = lock(&self.changing);
        if kind == UNPLUG_ALL {
            let all = self.memory.size() / self.memory.block_size();
            return (done(self.memory.unplug(0..all as usize)), 0);
        }
        let Some(blocks) = self.memory.blocks(address, count.into()) else { return (ERROR, 0) };
        match kind {
            PLUG => (self.plug(blocks), 0),
            UNPLUG => (self.unplug(blocks), 0),
            STATE => (ACK, self.state(blocks)),
            _ => (ERROR, 0),
        }
    }

    fn plug(&self, blocks: Range<usize>) -> u16 {
        if self.memory.count(blocks.clone()) > 0 {
            return ERROR;
        }
        let after = self.memory.plugged() + blocks.len() as u64 * self.memory.block_size();
        if after > self.target.requested() {
            return NACK;
        }
        done(self.memory.plug(blocks))
    }

    fn unplug(&self, blocks: Range<usize>) -> u16 {
        if self.memory.count(blocks.clone()) < blocks.len() {
            return ERROR;
        }
        done(self.memory.unplug(blocks))
    }

    fn state(&self, blocks: Range<usize>) -> u16 {
        match self.memory.count(blocks.clone()) {
            0 => UNPLUGGED,
            n if n == blocks.len() => PLUGGED,
            _ => MIXED,
        }
    }
}

fn done(done: bool) -> u16 {
    if done { ACK } else { BUSY }
}

impl Device for Mem {
    fn kind(&self) -> u16 {
        VIRTIO_ID_MEM as u16
    }

    fn class(&self) -> u32 {
        // Memory of no other kind.
        0x05_8000
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    fn queues(&self) -> &[u16] {
        &[128]
    }

    /// Block size, node (0, with its padding), first address, size, usable size (all), plugged, wanted (5.15.4).
    fn config(&self) -> Vec<u8> {
        let m = &self.memory;
        let fields = [m.block_size(), 0, m.gpa(), m.size(), m.size(), m.plugged(), self.target.requested()];
        fields.iter().flat_map(|field| field.to_le_bytes()).collect()
    }

    fn connect(&self, wires: Wires) {
        // Called once.
        let _ = self.shared.wires.set(wires);
    }

    fn set_features(&self, features: u64) {
        self.shared.driven.store(features != 0, Ordering::SeqCst);
    }

    /// What is plugged stays so (5.15.5.2), for the guest still uses it: only with the machine all of it goes.
    fn reset(&self) {
        self.shared.driven.store(false, Ordering::SeqCst);
    }

    fn serve(&self, _queue: usize, mut request: In<'_>, mut answer: Out<'_>) -> Result<usize, Broken> {
        let mut bytes = [0; REQUEST];
        // Before anything is done: a driver has to hear of it.
        if answer.available_bytes() < ANSWER {
            return Err(Broken);
        }
        request.read_exact(&mut bytes).map_err(|_| Broken)?;
        let (kind, state) = self.act(le16(&bytes, 0), le64(&bytes, 8), le16(&bytes, 16));
        let mut bytes = [0; ANSWER];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&state.to_le_bytes());
        answer.write_all(&bytes).map_err(|_| Broken)?;
        Ok(ANSWER)
    }
}

impl Drop for Mem {
    fn drop(&mut self) {
        self.target.disconnect(&self.shared);
    }
}
