//! Exceptions (SDM vol. 3A, chapter 6).

use serde::{Deserialize, Serialize};

/// Vector numbers (SDM vol. 3A, table 6-1).
pub mod vector {
    #![allow(missing_docs)]
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

/// Bits of a page fault's error code (SDM vol. 3A, 4.7).
pub mod pf {
    #![allow(missing_docs)]
    /// The page was present: a protection violation.
    pub const P: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RESERVED: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
}

/// An exception that an instruction raised, before its delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exception {
    /// Vector number.
    pub vector: u8,
    /// The error code that delivery pushes, for the vectors that have one.
    pub error_code: Option<u32>,
    /// For #PF: the linear address, which delivery puts in CR2. For #DB: the bits that delivery sets in DR6.
    pub address: u64,
}

impl Exception {
    /// An exception with no error code.
    pub const fn new(vector: u8) -> Self {
        Self { vector, error_code: None, address: 0 }
    }

    /// An exception with an error code.
    pub const fn with_code(vector: u8, code: u32) -> Self {
        Self { vector, error_code: Some(code), address: 0 }
    }

    /// Invalid opcode.
    pub const UD: Self = Self::new(vector::UD);
    /// Device not available.
    pub const NM: Self = Self::new(vector::NM);
    /// Divide error.
    pub const DE: Self = Self::new(vector::DE);
    /// General protection with error code 0, by far the most common.
    pub const GP0: Self = Self::with_code(vector::GP, 0);
    /// Stack fault with error code 0.
    pub const SS0: Self = Self::with_code(vector::SS, 0);

    /// General protection that names a selector.
    pub const fn gp(code: u16) -> Self {
        Self::with_code(vector::GP, code as u32)
    }

    /// Page fault at linear address `address` with the bits of [`pf`].
    pub const fn page_fault(address: u64, code: u32) -> Self {
        Self { vector: vector::PF, error_code: Some(code), address }
    }
}
