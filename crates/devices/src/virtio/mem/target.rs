//! How much a VM's owner wants to be plugged. It outlives the device: after a reset of the machine nothing is plugged, and the
//! guest gets it again.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use memory::{Pluggable, block_size};

use super::Shared;
use crate::lock;

/// How much memory the guest is to have beside that which it started with.
#[derive(Debug, Default)]
pub struct Target {
    room: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    link: Option<(Pluggable, Arc<Shared>)>,
    requested: u64,
}

impl Target {
    /// For so many bytes at most, a multiple of [`memory::PLUG_ALIGN`]; nothing is wanted yet.
    pub fn new(room: u64) -> Self {
        Self { room, ..Self::default() }
    }

    /// Bytes at most.
    pub fn room(&self) -> u64 {
        self.room
    }

    /// Wants the guest to have so many bytes more, or whole blocks for them, as far as there is room. It follows when it can.
    pub fn set(&self, bytes: u64) {
        let link = {
            let mut state = lock(&self.state);
            state.requested = bytes.min(self.room).next_multiple_of(block_size(self.room)).min(self.room);
            state.link.clone()
        };
        if let Some((_, shared)) = link {
            shared.config_changed();
        }
    }

    /// Bytes that are wanted.
    pub fn requested(&self) -> u64 {
        lock(&self.state).requested
    }

    /// Bytes that the guest has plugged.
    pub fn plugged(&self) -> u64 {
        lock(&self.state).link.as_ref().map_or(0, |(memory, _)| memory.plugged())
    }

    /// Whether the guest has a driver.
    pub fn has_driver(&self) -> bool {
        lock(&self.state).link.as_ref().is_some_and(|(_, shared)| shared.driven.load(Ordering::SeqCst))
    }

    pub(super) fn connect(&self, memory: &Pluggable, shared: &Arc<Shared>) {
        lock(&self.state).link = Some((memory.clone(), shared.clone()));
    }

    pub(super) fn disconnect(&self, shared: &Arc<Shared>) {
        let mut state = lock(&self.state);
        if state.link.as_ref().is_some_and(|(_, ours)| Arc::ptr_eq(ours, shared)) {
            state.link = None;
        }
    }
}
