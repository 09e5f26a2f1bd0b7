//! What parent and child exchange through shared memory. Plain data: every bit pattern is valid.

use std::sync::atomic::AtomicU32;

use crate::state::XSAVE_SIZE;

/// Cases per request: enough to make the hand-over (some 20 µs) small.
pub const BATCH: usize = 256;
/// Bytes of memory that a case has.
pub const WINDOW: usize = 256;
/// Bytes of executable memory.
pub const CODE_SIZE: usize = 0x2000;

#[repr(C)]
pub struct WireCase {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub xsave: [u8; XSAVE_SIZE],
    pub code: [u8; 16],
    pub code_length: u32,
    /// As a number: see `Mode`.
    pub mode: u32,
    pub step: u32,
    /// Offset of the window in the data pages.
    pub window: u32,
    pub memory: [u8; WINDOW],
}

#[repr(C)]
pub struct WireReply {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub xsave: [u8; XSAVE_SIZE],
    pub memory: [u8; WINDOW],
    pub strayed: u32,
    /// 0 when the instruction ran through.
    pub signal: u32,
    pub trap: u64,
    pub error: u64,
    pub address: u64,
}

#[repr(C, align(4096))]
pub struct Shared {
    /// Alias of the child's executable pages.
    pub code: [u8; CODE_SIZE],
    /// Counts requests; the child waits on it.
    pub request: AtomicU32,
    /// Follows `request` when the child has done it; the parent waits on it.
    pub reply: AtomicU32,
    pub count: AtomicU32,
    /// The case that the child is at.
    pub progress: AtomicU32,
    /// An errno if the child could not set itself up.
    pub failure: AtomicU32,
    /// Whether the system gave the child segments for 16-bit code.
    pub has_16_bit: AtomicU32,
    pub cases: [WireCase; BATCH],
    pub replies: [WireReply; BATCH],
}
