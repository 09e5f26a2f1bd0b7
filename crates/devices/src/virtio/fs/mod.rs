//! A directory of the host (virtio 1.2, section 5.11): requests are FUSE's, which the crate `shares` serves.

use shares::Session;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use super::{Broken, Device, In, Out};

/// Bytes of a tag at most.
pub const LONGEST_TAG: usize = 36;
/// Requests that must not wait for others, and requests.
const QUEUES: [u16; 2] = [64, 512];
/// Requests of a queue that are served at once.
const AT_ONCE: usize = 4;

/// The device.
#[derive(Debug)]
pub struct Fs {
    session: Session,
    tag: String,
}

impl Fs {
    /// A device that serves `session`, by which the guest mounts `tag`; of that the guest sees [`LONGEST_TAG`] bytes.
    pub fn new(session: Session, tag: &str) -> Self {
        Self { session, tag: tag.to_owned() }
    }
}

impl Device for Fs {
    fn kind(&self) -> u16 {
        VIRTIO_ID_FS as u16
    }

    fn class(&self) -> u32 {
        // A mass storage controller of no other kind.
        0x01_8000
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn threads(&self) -> usize {
        AT_ONCE
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; LONGEST_TAG];
        config.iter_mut().zip(self.tag.bytes()).for_each(|(to, from)| *to = from);
        // One queue of requests.
        config.extend(1u32.to_le_bytes());
        config
    }

    fn serve(&self, _: usize, request: In<'_>, answer: Out<'_>) -> Result<usize, Broken> {
        let (len, room) = (request.available_bytes(), answer.available_bytes());
        self.session.serve(request, len, answer, room).map_err(|_| Broken)
    }
}
