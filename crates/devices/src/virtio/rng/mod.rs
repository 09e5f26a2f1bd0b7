//! An entropy device (virtio 1.2, section 5.4): the host's random bytes.

use std::fs::File;
use std::io::{Read, Write};

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::{Broken, Device, In, Out};

/// Bytes of one request at most; the driver asks again.
const MOST: usize = 64 << 10;

/// The device.
#[derive(Debug)]
pub struct Rng(File);

impl Rng {
    /// A device that reads `/dev/urandom`.
    ///
    /// # Errors
    /// The host has none.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self(File::open("/dev/urandom")?))
    }
}

impl Device for Rng {
    fn kind(&self) -> u16 {
        VIRTIO_ID_RNG as u16
    }

    fn class(&self) -> u32 {
        // Cryptography, network and computing.
        0x10_0000
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &[u16] {
        &[64]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn serve(&self, _: usize, _: In<'_>, mut answer: Out<'_>) -> Result<usize, Broken> {
        let mut bytes = vec![0; answer.available_bytes().min(MOST)];
        (&self.0).read_exact(&mut bytes).map_err(|_| Broken)?;
        answer.write_all(&bytes).map_err(|_| Broken)?;
        Ok(bytes.len())
    }
}
