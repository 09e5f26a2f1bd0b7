//! What a VM's owner wants of the balloon, and hears from it. It outlives the device: after a reset of the machine the next one
//! follows it.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use memory::{Memory, PAGE_SIZE};

use super::Shared;
use crate::lock;

/// How much memory the guest is to have.
#[derive(Debug, Default)]
pub struct Target {
    state: Mutex<State>,
    /// Statistics came.
    news: Condvar,
}

#[derive(Debug, Default)]
struct State {
    link: Option<(Memory, Arc<Shared>)>,
    /// Bytes that the guest is to have; all if absent.
    wanted: Option<u64>,
    /// Pages in the balloon.
    pages: u32,
    /// Buffers of statistics that are still to be looked at: the first is as old as the request before.
    looks: u32,
    /// How often there were new ones.
    count: u64,
    stats: Stats,
}

/// What the guest says of its memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Unused.
    pub free: Option<u64>,
    /// All that it knows of.
    pub total: Option<u64>,
    /// What programs could have before it swaps.
    pub available: Option<u64>,
    /// Files' contents, which it could read again.
    pub caches: Option<u64>,
}

impl Stats {
    /// Takes a statistic (5.5.6.4).
    pub(super) fn set(&mut self, tag: u16, value: u64) {
        let field = match tag {
            4 => &mut self.free,
            5 => &mut self.total,
            6 => &mut self.available,
            7 => &mut self.caches,
            _ => return,
        };
        *field = Some(value);
    }
}

impl Target {
    /// Wants the guest to have so many bytes; all of its memory if absent. It follows when it can.
    pub fn set(&self, bytes: Option<u64>) {
        let link = {
            let mut state = lock(&self.state);
            state.wanted = bytes;
            state.link.clone()
        };
        if let Some((_, shared)) = link {
            shared.config_changed();
        }
    }

    /// Bytes that the guest is to have, if not all.
    pub fn wanted(&self) -> Option<u64> {
        lock(&self.state).wanted
    }

    /// Bytes in the balloon: the guest does not use them.
    pub fn ballooned(&self) -> u64 {
        u64::from(lock(&self.state).pages) * PAGE_SIZE
    }

    /// Bytes of host memory that the guest's take.
    pub fn held(&self) -> u64 {
        lock(&self.state).link.as_ref().map_or(0, |(memory, _)| memory.held())
    }

    /// Whether the guest has a driver for the balloon.
    pub fn has_driver(&self) -> bool {
        lock(&self.state).link.as_ref().is_some_and(|(_, shared)| shared.is_driven())
    }

    /// What the guest says of its memory now; none if it does not say so in time.
    pub fn stats(&self, patience: Duration) -> Option<Stats> {
        let mut state = lock(&self.state);
        let (_, shared) = state.link.clone()?;
        let before = state.count;
        state.looks = 2;
        drop(state);
        if !shared.kick_stats() {
            return None;
        }
        let old = |state: &mut State| state.count == before;
        let (state, wait) =
            self.news.wait_timeout_while(lock(&self.state), patience, old).unwrap_or_else(|e| e.into_inner());
        (!wait.timed_out()).then_some(state.stats)
    }

    pub(super) fn connect(&self, memory: &Memory, shared: &Arc<Shared>) {
        let mut state = lock(&self.state);
        state.link = Some((memory.clone(), shared.clone()));
        state.pages = 0;
    }

    pub(super) fn disconnect(&self, shared: &Arc<Shared>) {
        let mut state = lock(&self.state);
        if state.link.as_ref().is_some_and(|(_, ours)| Arc::ptr_eq(ours, shared)) {
            state.link = None;
        }
    }

    /// Pages that are to be in the balloon, and that are.
    pub(super) fn pages(&self) -> (u32, u32) {
        let state = lock(&self.state);
        let ram = state.link.as_ref().map_or(0, |(memory, _)| memory.ram_size());
        let surplus = ram.saturating_sub(state.wanted.unwrap_or(ram));
        (u32::try_from(surplus / PAGE_SIZE).unwrap_or(u32::MAX), state.pages)
    }

    pub(super) fn reached(&self, pages: u32) {
        lock(&self.state).pages = pages;
    }

    pub(super) fn wants_stats(&self) -> bool {
        lock(&self.state).looks > 0
    }

    pub(super) fn came(&self, stats: Stats) {
        let mut state = lock(&self.state);
        state.looks = state.looks.saturating_sub(1);
        if state.looks == 0 {
            state.count += 1;
            state.stats = stats;
            self.news.notify_all();
        }
    }
}
