//! Writing into guest memory before the guest runs.

use memory::Memory;
use vm_memory::{Bytes, GuestAddress};

use crate::{Error, at};

/// Copies `bytes` to `gpa`.
pub fn bytes(memory: &Memory, gpa: u64, bytes: &[u8]) -> Result<(), Error> {
    memory.guest().write_slice(bytes, GuestAddress(gpa)).map_err(|_| Error::NoMemory(gpa))
}

/// Puts a command line, zero-terminated, at `at` (at least [`at::CMDLINE`]). Where the next may be put.
pub fn cmdline(memory: &Memory, at: u64, text: &str, max: usize) -> Result<u64, Error> {
    let max = max.min(at::CMDLINE_END.saturating_sub(at + 1) as usize);
    if text.len() > max {
        return Err(Error::Cmdline { len: text.len(), max });
    }
    bytes(memory, at, text.as_bytes())?;
    bytes(memory, at + text.len() as u64, &[0])?;
    Ok(at + text.len() as u64 + 1)
}

/// Where `size` bytes fit as high as possible below `limit` in the RAM under 4 GiB, page-aligned, not below `floor`.
pub fn high(memory: &Memory, size: u64, limit: u64, floor: u64) -> Option<u64> {
    let end = memory.region(at::HIGH).map(|r| r.gpa + r.size)?.min(limit);
    let start = end.checked_sub(size)? & !(memory::PAGE_SIZE - 1);
    (start >= floor).then_some(start)
}
