//! A socket device (virtio 1.2, section 5.10): streams between programs of the host and of the guest, without a network.
//!
//! Only the host opens streams: nobody listens to the guest. [`Hub`] is the host's side, which outlives the machine's resets (and
//! ends its streams); a [`Vsock`] is one machine's device. All that waits in it is bounded: see [`connection`].

mod connection;
mod hub;
mod packet;
mod stream;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::{Broken, Device, In, Out, Wires};

pub use hub::Hub;
pub use stream::Stream;

/// The guest's context ID. No other guest is in reach.
pub const GUEST: u64 = 3;
/// The host's (5.10.4).
pub const HOST: u64 = 2;

/// Queues: to the guest, to the host, and events, of which there are none.
const TO_GUEST: usize = 0;
const TO_HOST: usize = 1;
const QUEUES: [u16; 3] = [128, 128, 16];

/// The device.
#[derive(Debug)]
pub struct Vsock(Arc<Hub>);

impl Vsock {
    /// A device for a new machine. What streams the last machine had are reset.
    pub fn new(hub: Arc<Hub>) -> Self {
        hub.reset();
        Self(hub)
    }
}

impl Device for Vsock {
    fn kind(&self) -> u16 {
        VIRTIO_ID_VSOCK as u16
    }

    fn class(&self) -> u32 {
        // A communication device of no other kind.
        0x07_8000
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn config(&self) -> Vec<u8> {
        GUEST.to_le_bytes().to_vec()
    }

    fn connect(&self, wires: Wires) {
        self.0.attach(wires);
    }

    fn reset(&self) {
        self.0.reset();
    }

    fn ready(&self, queue: usize) -> bool {
        match queue {
            TO_GUEST => self.0.has_packets(),
            TO_HOST => self.0.takes_packets(),
            _ => false,
        }
    }

    fn serve(&self, queue: usize, request: In<'_>, answer: Out<'_>) -> Result<usize, Broken> {
        match queue {
            TO_GUEST => {
                let room = answer.available_bytes();
                self.0.give_packet(answer, room)
            }
            TO_HOST => {
                let len = request.available_bytes();
                self.0.take_packet(request, len).map(|()| 0)
            }
            _ => Err(Broken),
        }
    }
}
