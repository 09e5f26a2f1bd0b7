//! Virtio 1.2 devices on PCI, by the modern transport, with split and packed rings.
//!
//! A [`Device`] says what it is and serves requests; [`Pci`] makes a PCI function of it, with one or more threads for each
//! queue. Requests that break the rules put the device in the state "needs reset", and change nothing
//! else.

pub mod balloon;
pub mod blk;
pub mod console;
pub mod fs;
pub mod gpu;
pub mod input;
pub mod mem;
pub mod net;
mod packed;
mod queue;
mod request;
mod ring;
pub mod rng;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod transport;
pub mod vsock;

pub use request::{In, Out};
pub use ring::QueueState;
pub use transport::{Pci, PciState, Wires};

/// The request cannot be understood at all: the driver is broken.
#[derive(Debug)]
pub struct Broken;

/// A virtio device, behind its transport.
pub trait Device: Send + Sync {
    /// The number of its type (section 5).
    fn kind(&self) -> u16;

    /// Class, subclass and programming interface of its PCI function.
    fn class(&self) -> u32;

    /// Features that it offers beside the transport's.
    fn features(&self) -> u64;

    /// The largest size of each of its queues, a power of two up to 32768.
    fn queues(&self) -> &[u16];

    /// How many requests of a queue it serves at once, where that is faster.
    fn threads(&self) -> usize {
        1
    }

    /// Whether packed rings are offered beside split ones: Linux takes them then.
    fn packed_rings(&self) -> bool {
        false
    }

    /// Its configuration as the driver reads it.
    fn config(&self) -> Vec<u8>;

    /// The driver writes to the configuration, `size` bytes (1, 2, 4 or 8) at `offset`, which may lie outside.
    fn write_config(&self, _offset: u64, _size: u8, _value: u64) {}

    /// Called once, before all else: how the device speaks first. Whoever keeps the wires keeps nothing alive.
    fn connect(&self, _wires: Wires) {}

    /// The features that the driver has accepted, the transport's among them.
    fn set_features(&self, _features: u64) {}

    /// The driver has reset the device: no request is being served, and what the driver set is forgotten.
    fn reset(&self) {}

    /// Whether the device has use for a request of queue `queue` now. Until it has, requests wait in the ring; a device that
    /// comes to have use for one calls [`Wires::kick`]. Such a queue is best served by one thread.
    fn ready(&self, _queue: usize) -> bool {
        true
    }

    /// Serves a request of queue `queue`. Gives the bytes that were written.
    ///
    /// # Errors
    /// The request makes no sense.
    fn serve(&self, queue: usize, request: In<'_>, answer: Out<'_>) -> Result<usize, Broken>;
}
