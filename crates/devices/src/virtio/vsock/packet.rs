//! Packets' headers (5.10.6).

/// Bytes of a header.
pub const HEADER: usize = 44;
/// The only type of socket that there is: a stream.
pub const STREAM: u16 = 1;
/// Flags of [`Op::SHUTDOWN`]: the sender reads no more, or writes no more.
pub const NO_READING: u32 = 1;
/// See [`NO_READING`].
pub const NO_WRITING: u32 = 2;

/// What a packet does.
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// A header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub from_cid: u64,
    pub to_cid: u64,
    pub from_port: u32,
    pub to_port: u32,
    /// Bytes of data after it.
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    /// Bytes that the sender's buffer for this stream holds.
    pub room: u32,
    /// Bytes that were read from it, modulo 2³².
    pub read: u32,
}

impl Header {
    pub fn from_bytes(bytes: &[u8; HEADER]) -> Self {
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            from_cid: u64_at(0),
            to_cid: u64_at(8),
            from_port: u32_at(16),
            to_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            room: u32_at(36),
            read: u32_at(40),
        }
    }

    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.from_cid.to_le_bytes());
        put(8, &self.to_cid.to_le_bytes());
        put(16, &self.from_port.to_le_bytes());
        put(20, &self.to_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.room.to_le_bytes());
        put(40, &self.read.to_le_bytes());
        bytes
    }
}
