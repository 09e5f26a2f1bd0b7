//! Commands as they are in submission queues (NVMe 1.4, section 4.2), where their data is, and how they end.

use memory::Memory;

use crate::dma::{Fault, Pieces, fetch, le16, le32, le64};

/// Bytes of a command.
pub const COMMAND: usize = 64;
/// Bytes of a page, the only size that there is.
pub const PAGE: u64 = 4096;
/// Bytes of a command's data at most, as a power of two of pages.
pub const MDTS: u8 = 8;
const MOST: u64 = PAGE << MDTS;

/// How a command ended: status code type and status code, and "do not retry" (figure 124, without the phase).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u16);

impl Status {
    const DO_NOT_RETRY: u16 = 1 << 14;
    pub const OK: Self = Self(0);
    pub const BAD_OPCODE: Self = Self(1 | Self::DO_NOT_RETRY);
    pub const BAD_FIELD: Self = Self(2 | Self::DO_NOT_RETRY);
    pub const TRANSFER: Self = Self(4 | Self::DO_NOT_RETRY);
    pub const BAD_NAMESPACE: Self = Self(0xb | Self::DO_NOT_RETRY);
    pub const BAD_OFFSET: Self = Self(0x13 | Self::DO_NOT_RETRY);
    pub const PROTECTED: Self = Self(0x20 | Self::DO_NOT_RETRY);
    pub const OUT_OF_RANGE: Self = Self(0x80 | Self::DO_NOT_RETRY);
    pub const BAD_COMPLETION_QUEUE: Self = Self(0x100 | Self::DO_NOT_RETRY);
    pub const BAD_QUEUE: Self = Self(0x101 | Self::DO_NOT_RETRY);
    pub const BAD_QUEUE_SIZE: Self = Self(0x102 | Self::DO_NOT_RETRY);
    pub const TOO_MANY_EVENT_REQUESTS: Self = Self(0x105 | Self::DO_NOT_RETRY);
    pub const BAD_VECTOR: Self = Self(0x108 | Self::DO_NOT_RETRY);
    pub const BAD_LOG_PAGE: Self = Self(0x109 | Self::DO_NOT_RETRY);
    pub const BAD_QUEUE_DELETION: Self = Self(0x10c | Self::DO_NOT_RETRY);
    pub const NOT_SAVEABLE: Self = Self(0x10d | Self::DO_NOT_RETRY);
    pub const WRITE_FAULT: Self = Self(0x280);
    pub const UNREADABLE: Self = Self(0x281);
}

impl From<Fault> for Status {
    fn from(_: Fault) -> Self {
        Self::TRANSFER
    }
}

/// A command.
#[derive(Clone, Debug)]
pub struct Command {
    pub opcode: u8,
    pub id: u16,
    pub namespace: u32,
    /// Command double words 10 to 15.
    pub words: [u32; 6],
    /// PRP entries 1 and 2.
    prp: [u64; 2],
    /// Neither fused nor with scatter-gather lists.
    plain: bool,
}

impl Command {
    pub fn parse(bytes: &[u8; COMMAND]) -> Self {
        Self {
            opcode: bytes[0],
            id: le16(bytes, 2),
            namespace: le32(bytes, 4),
            words: std::array::from_fn(|n| le32(bytes, 40 + 4 * n)),
            prp: [le64(bytes, 24), le64(bytes, 32)],
            plain: bytes[1] & 0xc3 == 0,
        }
    }

    /// Refuses what is not offered.
    pub fn check(&self) -> Result<(), Status> {
        if self.plain { Ok(()) } else { Err(Status::BAD_FIELD) }
    }

    /// The first PRP entry, where it is the address of a queue.
    pub fn address(&self) -> u64 {
        self.prp[0]
    }

    /// Where the command's `len` bytes of data lie (section 4.3).
    pub fn data(&self, memory: &Memory, len: u64) -> Result<Pieces, Status> {
        if len > MOST {
            return Err(Status::BAD_FIELD);
        }
        let [first, second] = self.prp;
        if first & 3 != 0 {
            return Err(Status::BAD_OFFSET);
        }
        let mut pieces = Pieces::default();
        let n = (PAGE - first % PAGE).min(len);
        pieces.push(first, n);
        let rest = len - n;
        if rest > PAGE {
            list(memory, second, rest, &mut pieces)?;
        } else if rest > 0 {
            pieces.push(page(second)?, rest);
        }
        Ok(pieces)
    }
}

fn page(address: u64) -> Result<u64, Status> {
    if address.is_multiple_of(PAGE) { Ok(address) } else { Err(Status::BAD_OFFSET) }
}

/// The pages of a PRP list for `rest` bytes. Each page of the list but the first has 511 of them at least, so it ends.
fn list(memory: &Memory, at: u64, mut rest: u64, pieces: &mut Pieces) -> Result<(), Status> {
    if at & 7 != 0 {
        return Err(Status::BAD_OFFSET);
    }
    let mut at = at;
    while rest > 0 {
        let entry = u64::from_le_bytes(fetch(memory, at)?);
        let last_of_page = at % PAGE == PAGE - 8;
        if last_of_page && rest > PAGE {
            at = page(entry)?;
            continue;
        }
        let n = rest.min(PAGE);
        pieces.push(page(entry)?, n);
        rest -= n;
        at = at.wrapping_add(8);
    }
    Ok(())
}
