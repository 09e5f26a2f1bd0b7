//! A memory balloon (virtio 1.2, section 5.5): the guest gives pages back that it does not need, by itself where it reports free
//! pages, and when it is asked to.

mod target;
#[cfg(test)]
mod tests;

use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use memory::{Memory, PAGE_SIZE};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::{Broken, Device, In, Out, Wires};
use crate::dma::{le16, le32, le64};
pub use target::{Stats, Target};

/// Pages' numbers of a request, or statistics, that are read at once.
const CHUNK: usize = 4096;
/// Bytes of a statistic: tag (2), value (8).
const STATISTIC: usize = 10;
/// Where the driver tells how many pages are in the balloon.
const ACTUAL: u64 = 4;

const F_STATS: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

/// The device.
#[derive(Debug)]
pub struct Balloon {
    memory: Memory,
    target: Arc<Target>,
    shared: Arc<Shared>,
}

/// What the target knows of the device.
#[derive(Debug, Default)]
struct Shared {
    wires: OnceLock<Wires>,
    features: AtomicU64,
}

impl Shared {
    /// The roles of the queues: those for features that were not accepted are left out, and the rest move up.
    fn roles(&self) -> impl Iterator<Item = Role> {
        let features = self.features.load(Ordering::SeqCst);
        let all = [
            (u64::MAX, Role::Inflate),
            (u64::MAX, Role::Deflate),
            (F_STATS, Role::Stats),
            (F_REPORTING, Role::Reporting),
        ];
        all.into_iter().filter(move |(feature, _)| features & feature != 0).map(|(_, role)| role)
    }

    /// Whether a driver is there.
    fn is_driven(&self) -> bool {
        self.features.load(Ordering::SeqCst) != 0
    }

    /// Has the driver look at the configuration.
    fn config_changed(&self) {
        if let Some(wires) = self.wires.get() {
            wires.config_changed();
        }
    }

    /// Has the queue of statistics looked at, if there is one.
    fn kick_stats(&self) -> bool {
        let queue = self.roles().position(|role| role == Role::Stats);
        if let (Some(queue), Some(wires)) = (queue, self.wires.get()) {
            wires.kick(queue);
        }
        queue.is_some()
    }
}

impl Balloon {
    /// A balloon in `memory` that follows `target`.
    pub fn new(memory: Memory, target: Arc<Target>) -> Self {
        let shared = Arc::new(Shared::default());
        target.connect(&memory, &shared);
        Self { memory, target, shared }
    }

    /// Gives back pages whose numbers are in `request`.
    fn inflate(&self, mut request: In<'_>) -> Result<(), Broken> {
        let mut numbers = [0; CHUNK];
        while request.available_bytes() > 0 {
            let n = request.available_bytes().min(CHUNK);
            request.read_exact(&mut numbers[..n]).map_err(|_| Broken)?;
            let (pages, rest) = numbers[..n].as_chunks::<4>();
            if !rest.is_empty() {
                return Err(Broken);
            }
            // Neighbours at once.
            let mut run = 0..0;
            for page in pages {
                let page = u64::from(le32(page, 0));
                if page == run.end && run.start < run.end {
                    run.end += 1;
                } else if page + 1 == run.start {
                    run.start = page;
                } else {
                    self.discard(run);
                    run = page..page + 1;
                }
            }
            self.discard(run);
        }
        Ok(())
    }

    fn discard(&self, pages: std::ops::Range<u64>) {
        self.memory.discard(pages.start * PAGE_SIZE, (pages.end - pages.start) * PAGE_SIZE);
    }

    fn stats(&self, mut request: In<'_>) -> Result<(), Broken> {
        let mut bytes = [0; CHUNK];
        let n = request.read(&mut bytes).map_err(|_| Broken)?;
        let mut stats = Stats::default();
        for statistic in bytes[..n].chunks_exact(STATISTIC) {
            stats.set(le16(statistic, 0), le64(statistic, 2));
        }
        self.target.came(stats);
        Ok(())
    }
}

impl Device for Balloon {
    fn kind(&self) -> u16 {
        VIRTIO_ID_BALLOON as u16
    }

    fn class(&self) -> u32 {
        // Memory of no other kind.
        0x05_8000
    }

    fn features(&self) -> u64 {
        F_STATS | F_DEFLATE_ON_OOM | F_REPORTING
    }

    fn queues(&self) -> &[u16] {
        &[128, 128, 128, 128]
    }

    fn config(&self) -> Vec<u8> {
        let pages = self.target.pages();
        [pages.0.to_le_bytes(), pages.1.to_le_bytes()].concat()
    }

    fn write_config(&self, offset: u64, size: u8, value: u64) {
        if (offset, size) == (ACTUAL, 4) {
            self.target.reached(value as u32);
        }
    }

    fn connect(&self, wires: Wires) {
        // Called once.
        let _ = self.shared.wires.set(wires);
    }

    fn set_features(&self, features: u64) {
        self.shared.features.store(features, Ordering::SeqCst);
    }

    fn reset(&self) {
        self.shared.features.store(0, Ordering::SeqCst);
        self.target.reached(0);
    }

    fn ready(&self, queue: usize) -> bool {
        // The driver's statistics wait in its buffer until they are wanted.
        self.shared.roles().nth(queue) != Some(Role::Stats) || self.target.wants_stats()
    }

    fn serve(&self, queue: usize, request: In<'_>, answer: Out<'_>) -> Result<usize, Broken> {
        match self.shared.roles().nth(queue) {
            Some(Role::Inflate) => self.inflate(request)?,
            // The guest may touch them again without being told.
            Some(Role::Deflate) | None => {}
            Some(Role::Stats) => self.stats(request)?,
            Some(Role::Reporting) => {
                answer.pieces().for_each(|(address, len)| self.memory.discard(address, len));
            }
        }
        Ok(0)
    }
}

impl Drop for Balloon {
    fn drop(&mut self) {
        self.target.disconnect(&self.shared);
    }
}
