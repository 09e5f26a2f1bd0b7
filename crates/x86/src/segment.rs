//! Segment registers and descriptor tables (SDM vol. 3A, 3.4 and 3.5).

use serde::{Deserialize, Serialize};

/// Numbers of the segment registers, as instructions encode them.
pub mod index {
    #![allow(missing_docs)]
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Access rights as in bits 8–23 of a descriptor's high word, so that type is bits 0–3, S bit 4, DPL bits 5–6,
    /// P bit 7, AVL bit 12, L bit 13, D/B bit 14, G bit 15 (bits 8–11 are zero). Zero means unusable (a null selector).
    pub attributes: u16,
    /// The last byte's offset, after scaling by G.
    pub limit: u32,
    /// Linear address of byte 0.
    pub base: u64,
}

/// Bits of [`Segment::attributes`].
pub mod attr {
    #![allow(missing_docs)]
    pub const TYPE: u16 = 0xf;
    /// Code or data.
    pub const ACCESSED: u16 = 1 << 0;
    /// Data: writable. Code: readable.
    pub const RW: u16 = 1 << 1;
    /// Data: expand down. Code: conforming.
    pub const DC: u16 = 1 << 2;
    pub const CODE: u16 = 1 << 3;
    pub const S: u16 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const DPL: u16 = 3 << 5;
    pub const P: u16 = 1 << 7;
    pub const AVL: u16 = 1 << 12;
    pub const L: u16 = 1 << 13;
    pub const DB: u16 = 1 << 14;
    pub const G: u16 = 1 << 15;
}

impl Segment {
    /// The real-mode segment that `selector` names.
    pub const fn real(selector: u16) -> Self {
        Self {
            selector,
            attributes: attr::P | attr::S | attr::RW | attr::ACCESSED,
            limit: 0xffff,
            base: (selector as u64) << 4,
        }
    }

    /// Reads the eight bytes of a code, data or 32-bit system descriptor. The base of a 16-byte system descriptor
    /// (long mode) wants its upper half added.
    pub const fn from_descriptor(selector: u16, d: u64) -> Self {
        let attributes = ((d >> 40) & 0xf0ff) as u16;
        let raw = ((d & 0xffff) | ((d >> 32) & 0xf_0000)) as u32;
        let limit = if attributes & attr::G != 0 { (raw << 12) | 0xfff } else { raw };
        let base = ((d >> 16) & 0xff_ffff) | ((d >> 32) & 0xff00_0000);
        Self { selector, attributes, limit, base }
    }

    /// Whether the register holds a usable segment.
    pub const fn usable(&self) -> bool {
        self.attributes & attr::P != 0
    }

    /// Descriptor privilege level.
    pub const fn dpl(&self) -> u8 {
        ((self.attributes & attr::DPL) >> attr::DPL_SHIFT) as u8
    }

    /// Whether all of `bits` (of [`attr`]) are set.
    pub const fn has(&self, bits: u16) -> bool {
        self.attributes & bits == bits
    }

    /// The type field: for system descriptors, see SDM vol. 3A, table 3-2.
    pub const fn kind(&self) -> u8 {
        (self.attributes & attr::TYPE) as u8
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Linear address.
    pub base: u64,
    /// The last byte's offset.
    pub limit: u16,
}
