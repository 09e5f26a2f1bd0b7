//! Raw images: the host's file is the disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::chain::Layer;
use crate::{Format, MAGIC, held};

#[derive(Debug)]
pub struct Raw {
    file: File,
    /// Held while the first bytes are written, if they must not come to look like another format.
    guard: Option<Mutex<()>>,
    /// The same file past the host's cache.
    direct: Option<Layer>,
}

impl Raw {
    pub fn new(file: File, guarded: bool, direct: Option<Layer>) -> Raw {
        Raw { file, guard: guarded.then(Mutex::default), direct }
    }

    pub fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        match &self.direct {
            Some(direct) => direct.read(to, offset),
            None => self.file.read_exact_at(to, offset),
        }
    }

    /// Writes, unless the image then looked like another format than raw: gives that format.
    pub fn write(&self, offset: u64, from: &[u8]) -> io::Result<Format> {
        let start = offset.min(MAGIC as u64) as usize;
        let _alone = match &self.guard {
            Some(guard) if start < MAGIC => {
                let alone = held(guard.lock());
                let mut head = head(&self.file)?;
                let overlap = from.len().min(MAGIC - start);
                head[start..start + overlap].copy_from_slice(&from[..overlap]);
                match Format::detect(&head) {
                    Format::Raw => Some(alone),
                    forged => return Ok(forged),
                }
            }
            _ => None,
        };
        match &self.direct {
            Some(direct) => direct.write(from, offset)?,
            None => self.file.write_all_at(from, offset)?,
        }
        Ok(Format::Raw)
    }

    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Makes a hole, which reads as zero.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
    }

    /// Zeroes, and keeps the space.
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, len)
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(()); // the host calls that invalid
        }
        match fallocate(&self.file, flags, offset, len) {
            // Block devices call what is not aligned to their blocks invalid.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Err(io::ErrorKind::Unsupported.into()),
            other => Ok(other?),
        }
    }
}

/// The first bytes of an image, zeroes where it is shorter.
pub fn head(file: &File) -> io::Result<[u8; MAGIC]> {
    let mut head = [0; MAGIC];
    let mut have = 0;
    while have < MAGIC {
        match file.read_at(&mut head[have..], have as u64) {
            Ok(0) => break,
            Ok(more) => have += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(head)
}
