//! A queue's registers, and the ring that they set up: split (virtio 1.2, section 2.7; the crate virtio-queue's) or packed.

use std::sync::atomic::Ordering;

use memory::Memory;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{QueueOwnedT, QueueT};

use super::Broken;
use super::packed::Packed;
use super::request::Request;

/// A queue's registers and indices as data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries.
    pub size: u16,
    /// The driver has enabled it.
    pub ready: bool,
    /// Guest-physical addresses of the descriptor table, the available ring and the used ring; of a packed ring, and of the
    /// driver's and the device's event suppression.
    pub rings: [u64; 3],
    /// Where the device is in the available ring, and in the used ring; in a packed ring with the wrap counters in bit 15.
    pub next: [u16; 2],
    /// MSI-X vector, or 0xffff.
    pub vector: u16,
}

/// A queue as its driver sets it up.
#[derive(Debug)]
pub struct Queue {
    most: u16,
    size: u16,
    rings: [u64; 3],
    /// The driver has enabled it.
    ring: Option<Ring>,
}

impl Queue {
    /// A queue of at most `most` entries.
    pub fn new(most: u16) -> Self {
        Self { most, size: most, rings: [0; 3], ring: None }
    }

    pub fn reset(&mut self) {
        *self = Self::new(self.most);
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    /// A size that cannot be leaves the one that was.
    pub fn set_size(&mut self, size: u16) {
        if (1..=self.most).contains(&size) {
            self.size = size;
        }
    }

    /// The addresses of its parts.
    pub fn rings(&mut self) -> &mut [u64; 3] {
        &mut self.rings
    }

    pub fn is_enabled(&self) -> bool {
        self.ring.is_some()
    }

    pub fn ring(&mut self) -> Option<&mut Ring> {
        self.ring.as_mut()
    }

    /// Enables it, unless what the driver has set up cannot be.
    pub fn enable(&mut self, memory: &Memory, features: u64) {
        let start = if features >> VIRTIO_F_RING_PACKED & 1 == 1 { Packed::START } else { [0; 2] };
        self.ring = Ring::new(self.size, self.rings, start, memory, features);
    }

    pub fn state(&self, vector: u16) -> QueueState {
        let next = self.ring.as_ref().map_or([0; 2], Ring::next);
        QueueState { size: self.size, ready: self.is_enabled(), rings: self.rings, next, vector }
    }

    pub fn set_state(&mut self, from: &QueueState, memory: &Memory, features: u64) {
        self.reset();
        self.set_size(from.size);
        self.rings = from.rings;
        if from.ready {
            self.ring = Ring::new(self.size, self.rings, from.next, memory, features);
        }
    }
}

/// Where requests come from, and go back to.
#[derive(Debug)]
pub enum Ring {
    Split(virtio_queue::Queue),
    Packed(Packed),
}

impl Ring {
    fn new(size: u16, rings: [u64; 3], next: [u16; 2], memory: &Memory, features: u64) -> Option<Self> {
        let event_idx = features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1;
        if features >> VIRTIO_F_RING_PACKED & 1 == 1 {
            return Packed::new(size, rings, next, memory, event_idx).map(Self::Packed);
        }
        let mut q = virtio_queue::Queue::new(size).ok()?;
        let half = |a: u64| (Some(a as u32), Some((a >> 32) as u32));
        let [desc, avail, used] = rings.map(half);
        q.set_desc_table_address(desc.0, desc.1);
        q.set_avail_ring_address(avail.0, avail.1);
        q.set_used_ring_address(used.0, used.1);
        q.set_next_avail(next[0]);
        q.set_next_used(next[1]);
        q.set_event_idx(event_idx);
        q.set_ready(true);
        // An address that is not aligned has not been taken.
        let taken = [q.desc_table(), q.avail_ring(), q.used_ring()] == rings;
        (taken && q.is_valid(memory.guest())).then_some(Self::Split(q))
    }

    fn next(&self) -> [u16; 2] {
        match self {
            Self::Split(q) => [q.next_avail(), q.next_used()],
            Self::Packed(q) => q.next(),
        }
    }

    /// Takes the next request out.
    pub fn take(&mut self, memory: &Memory) -> Result<Option<Request>, Broken> {
        match self {
            Self::Split(q) => take_split(q, memory),
            Self::Packed(q) => q.take(memory),
        }
    }

    /// Whether there is a request.
    pub fn is_waiting(&self, memory: &Memory) -> Result<bool, Broken> {
        match self {
            Self::Split(q) => {
                let index = q.avail_idx(memory.guest(), Ordering::Acquire).map_err(|_| Broken)?;
                Ok(index.0 != q.next_avail())
            }
            Self::Packed(q) => q.is_waiting(memory),
        }
    }

    /// Has the driver tell of its next request, or not: which it may do all the same.
    pub fn listen(&mut self, memory: &Memory, on: bool) -> Result<(), Broken> {
        match self {
            Self::Split(q) if on => q.enable_notification(memory.guest()).map(drop).map_err(|_| Broken),
            Self::Split(q) => q.disable_notification(memory.guest()).map_err(|_| Broken),
            Self::Packed(q) => q.listen(memory, on),
        }
    }

    /// Gives a request back, `written` bytes of whose answer were written.
    pub fn give(&mut self, memory: &Memory, request: &Request, written: u32) -> Result<(), Broken> {
        match self {
            Self::Split(q) => q.add_used(memory.guest(), request.id, written).map_err(|_| Broken),
            Self::Packed(q) => q.give(memory, request, written),
        }
    }

    /// Whether the driver wants to hear of what was given back since the last call.
    pub fn is_awaited(&mut self, memory: &Memory) -> Result<bool, Broken> {
        match self {
            Self::Split(q) => q.needs_notification(memory.guest()).map_err(|_| Broken),
            Self::Packed(q) => q.is_awaited(memory),
        }
    }
}

fn take_split(q: &mut virtio_queue::Queue, memory: &Memory) -> Result<Option<Request>, Broken> {
    let Some(chain) = q.iter(memory.guest()).map_err(|_| Broken)?.next() else { return Ok(None) };
    let mut request = Request::default();
    (request.id, request.places) = (chain.head_index(), 1);
    // The crate ends a chain silently where it is broken.
    let mut whole = false;
    for descriptor in chain {
        request.push(memory, descriptor.addr().0, descriptor.len(), descriptor.is_write_only())?;
        whole = !descriptor.has_next();
    }
    if whole { Ok(Some(request)) } else { Err(Broken) }
}
