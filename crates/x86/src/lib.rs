//! What an x86 processor is, as types: registers, segments and descriptors, exceptions, page tables, CPUID, MSRs.
//!
//! Everything that knows x86 learns it here. Nothing in this crate touches memory, does I/O or allocates.
//! "SDM" is Intel's Software Developer's Manual, "APM" AMD's Architecture Programmer's Manual.
#![no_std]
#![forbid(unsafe_code)]

pub mod control;
pub mod cpuid;
pub mod exception;
pub mod flags;
pub mod msr;
pub mod paging;
pub mod segment;

pub use exception::Exception;
pub use segment::{Segment, Table};

/// General-purpose register numbers, as instructions encode them (SDM vol. 2A, table 2-2).
pub mod gpr {
    #![allow(missing_docs)]
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    pub const R8: usize = 8;
    pub const R9: usize = 9;
    pub const R10: usize = 10;
    pub const R11: usize = 11;
    pub const R12: usize = 12;
    pub const R13: usize = 13;
    pub const R14: usize = 14;
    pub const R15: usize = 15;
}
