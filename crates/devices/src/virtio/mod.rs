//! Virtio 1.2 devices on PCI, by the modern transport and split rings. The rings themselves are the crate virtio-queue's.
//!
//! A [`Device`] says what it is and serves requests; [`Pci`] makes a PCI function of it, with one or more threads for each
//! queue. Requests that break the rules put the device in the state "needs reset", and change nothing
//! else.

pub mod blk;
mod queue;
pub mod rng;
#[cfg(test)]
mod tests;
mod transport;

use virtio_queue::{Reader, Writer};
use vm_memory::GuestMemory;
use vm_memory::bitmap::WithBitmapSlice;

pub use queue::QueueState;
pub use transport::{Pci, PciState};

/// The bits of guest memory that a request can be read from and written to.
pub type In<'a> = Reader<'a, Slice<'a>>;
/// See [`In`].
pub type Out<'a> = Writer<'a, Slice<'a>>;
type Slice<'a> = <<memory::Guest as GuestMemory>::Bitmap as WithBitmapSlice<'a>>::S;

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

    /// The largest size of each of its queues, a power of two.
    fn queues(&self) -> &[u16];

    /// How many requests of a queue it serves at once, where that is faster.
    fn threads(&self) -> usize {
        1
    }

    /// Its configuration, which drivers only read.
    fn config(&self) -> Vec<u8>;

    /// Serves a request of queue `queue`. Gives the bytes that were written.
    ///
    /// # Errors
    /// The request makes no sense.
    fn serve(&self, queue: usize, request: In<'_>, answer: Out<'_>) -> Result<usize, Broken>;
}
