//! What controllers do with guest memory: the pieces that a request's data lies in, and a disk's bytes there and back.

use std::sync::atomic::Ordering;

use disks::Disk;
use memory::Memory;
use vm_memory::{Bytes, GuestAddress};

/// Bytes that are carried between guest and disk at once.
const CHUNK: u64 = 1 << 20;

/// Why data did not get to where it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// There is no guest memory at an address that the guest named.
    Memory,
    /// The pieces are less than the data.
    Short,
    /// The disk's file failed, or refuses.
    Disk,
}

/// Where in guest memory a request's data lies, piece by piece: address and bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pieces(Vec<(u64, u64)>);

impl Pieces {
    /// Adds a piece.
    pub fn push(&mut self, address: u64, bytes: u64) {
        self.0.push((address, bytes));
    }

    /// Bytes of all pieces.
    pub fn len(&self) -> u64 {
        self.0.iter().fold(0, |all, piece| all.saturating_add(piece.1))
    }

    /// Copies the first bytes out of guest memory.
    pub fn get(&self, memory: &Memory, to: &mut [u8]) -> Result<(), Fault> {
        self.cursor(memory).get(to)
    }

    /// Copies into the first bytes of guest memory.
    pub fn put(&self, memory: &Memory, from: &[u8]) -> Result<(), Fault> {
        self.cursor(memory).put(from)
    }

    /// Copies into guest memory behind the first `skip` bytes.
    pub fn put_at(&self, memory: &Memory, skip: u64, from: &[u8]) -> Result<(), Fault> {
        let mut cursor = self.cursor(memory);
        cursor.skip(skip);
        cursor.put(from)
    }

    /// Reads `len` bytes of `disk` from `at` on into guest memory.
    pub fn read(&self, memory: &Memory, disk: &Disk, at: u64, len: u64) -> Result<(), Fault> {
        let mut cursor = self.cursor(memory);
        chunks(at, len, |at, bytes| {
            disk.read(at, bytes).map_err(|_| Fault::Disk)?;
            cursor.put(bytes)
        })
    }

    /// Writes `len` bytes from guest memory to `disk`, from `at` on.
    pub fn write(&self, memory: &Memory, disk: &Disk, at: u64, len: u64) -> Result<(), Fault> {
        let mut cursor = self.cursor(memory);
        chunks(at, len, |at, bytes| {
            cursor.get(bytes)?;
            disk.write(at, bytes).map_err(|_| Fault::Disk)
        })
    }

    /// The place before the first byte.
    pub fn cursor<'a>(&'a self, memory: &'a Memory) -> Cursor<'a> {
        Cursor { memory, pieces: &self.0, done: 0 }
    }
}

/// Calls `each` with the place and a buffer for every part of `len` bytes from `at` on.
fn chunks(at: u64, len: u64, mut each: impl FnMut(u64, &mut [u8]) -> Result<(), Fault>) -> Result<(), Fault> {
    let mut buffer = vec![0; len.min(CHUNK) as usize];
    (0..len).step_by(CHUNK as usize).try_for_each(|done| {
        let n = (len - done).min(CHUNK) as usize;
        each(at.checked_add(done).ok_or(Fault::Disk)?, &mut buffer[..n])
    })
}

/// A place in the pieces.
#[derive(Clone)]
pub struct Cursor<'a> {
    memory: &'a Memory,
    pieces: &'a [(u64, u64)],
    /// Bytes that are behind us, from the start of the first of these pieces on.
    done: u64,
}

impl Cursor<'_> {
    /// Copies bytes out of guest memory.
    pub fn get(&mut self, to: &mut [u8]) -> Result<(), Fault> {
        let memory = self.memory;
        self.walk(to.len(), |at, range| memory.guest().read_slice(&mut to[range], at))
    }

    /// Copies bytes into guest memory.
    pub fn put(&mut self, from: &[u8]) -> Result<(), Fault> {
        let memory = self.memory;
        self.walk(from.len(), |at, range| memory.guest().write_slice(&from[range], at))
    }

    /// Goes on without copying.
    pub fn skip(&mut self, bytes: u64) {
        self.done = self.done.saturating_add(bytes);
    }

    /// Where the next `bytes` bytes lie: addresses, and bytes of each piece.
    pub fn pieces(&self, bytes: u64) -> impl Iterator<Item = (u64, u64)> {
        let (mut skip, mut left) = (self.done, bytes);
        self.pieces.iter().filter_map(move |&(address, len)| {
            let skipped = skip.min(len);
            skip -= skipped;
            let n = (len - skipped).min(left);
            left -= n;
            (n > 0).then(|| (address.saturating_add(skipped), n))
        })
    }

    /// Calls `each` for every address and the range of the `len` bytes that lies there.
    fn walk<E>(
        &mut self,
        len: usize,
        mut each: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), E>,
    ) -> Result<(), Fault> {
        let mut have = 0;
        while have < len {
            let (&(address, bytes), rest) = self.pieces.split_first().ok_or(Fault::Short)?;
            if self.done >= bytes {
                (self.pieces, self.done) = (rest, self.done - bytes);
                continue;
            }
            let n = (bytes - self.done).min((len - have) as u64);
            let at = address.checked_add(self.done).ok_or(Fault::Memory)?;
            each(GuestAddress(at), have..have + n as usize).map_err(|_| Fault::Memory)?;
            have += n as usize;
            self.done += n;
        }
        Ok(())
    }
}

/// Reads `N` bytes at a guest-physical address.
pub fn fetch<const N: usize>(memory: &Memory, at: u64) -> Result<[u8; N], Fault> {
    let mut bytes = [0; N];
    memory.guest().read_slice(&mut bytes, GuestAddress(at)).map_err(|_| Fault::Memory)?;
    Ok(bytes)
}

/// Reads bytes at a guest-physical address.
pub fn load(memory: &Memory, at: u64, to: &mut [u8]) -> Result<(), Fault> {
    memory.guest().read_slice(to, GuestAddress(at)).map_err(|_| Fault::Memory)
}

/// Writes bytes at a guest-physical address.
pub fn store(memory: &Memory, at: u64, bytes: &[u8]) -> Result<(), Fault> {
    memory.guest().write_slice(bytes, GuestAddress(at)).map_err(|_| Fault::Memory)
}

/// Writes a number whole, after everything that was written before.
pub fn publish(memory: &Memory, at: u64, value: u32) -> Result<(), Fault> {
    memory.guest().store(value.to_le(), GuestAddress(at), Ordering::Release).map_err(|_| Fault::Memory)
}

/// The little-endian number of two bytes at `at`.
pub fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(std::array::from_fn(|n| bytes[at + n]))
}

/// The little-endian number of four bytes at `at`.
pub fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|n| bytes[at + n]))
}

/// The little-endian number of eight bytes at `at`.
pub fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|n| bytes[at + n]))
}
