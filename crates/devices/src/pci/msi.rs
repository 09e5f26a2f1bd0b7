//! Message-signalled interrupts of a function: the MSI-X table and pending bits (PCI 3.0, 6.8.2).

use machine::irq::Msi;
use serde::{Deserialize, Serialize};

/// Bytes of a table entry.
const ENTRY: usize = 16;
const MASKED: u8 = 1;

/// Table and pending bits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    entries: Vec<u8>,
    pending: Vec<u8>,
}

impl Table {
    /// A table of masked entries.
    pub fn new(vectors: u16) -> Self {
        let n = usize::from(vectors);
        let mut entries = vec![0; n * ENTRY];
        entries.iter_mut().skip(12).step_by(ENTRY).for_each(|control| *control = MASKED);
        Self { entries, pending: vec![0; n.div_ceil(64) * 8] }
    }

    /// Brings what a file said in range.
    pub fn like(mut self, other: &Self) -> Self {
        self.entries.resize(other.entries.len(), 0);
        self.pending.resize(other.pending.len(), 0);
        self
    }

    /// How many entries there are.
    pub fn vectors(&self) -> usize {
        self.entries.len() / ENTRY
    }

    /// Where the pending bits begin in the BAR, behind the table.
    pub fn pending_at(&self) -> u64 {
        (self.entries.len() as u64).next_multiple_of(4096)
    }

    fn byte(&mut self, offset: u64) -> Option<&mut u8> {
        match offset.checked_sub(self.pending_at()) {
            None => self.entries.get_mut(offset as usize),
            Some(at) => self.pending.get_mut(at as usize),
        }
    }

    pub fn read(&mut self, offset: u64) -> u8 {
        self.byte(offset).map_or(0, |byte| *byte)
    }

    pub fn write(&mut self, offset: u64, value: u8) {
        // The pending bits are for reading.
        if offset < self.pending_at()
            && let Some(byte) = self.byte(offset)
        {
            *byte = if offset % ENTRY as u64 == 12 { value & MASKED } else { value };
        }
    }

    /// What `vector` sends, or `None` if it is masked and was marked as pending, or does not exist.
    pub fn raise(&mut self, vector: u16, masked: bool) -> Option<Msi> {
        let entry = self.entries.chunks_exact(ENTRY).nth(vector.into())?;
        if masked || entry[12] & MASKED != 0 {
            self.pending[usize::from(vector / 8)] |= 1 << (vector % 8);
            return None;
        }
        let word = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        Some(Msi { address: u64::from(word(4)) << 32 | u64::from(word(0)), data: word(8) })
    }

    /// The vectors that were pending and are not masked any more, with their messages.
    pub fn take_pending(&mut self) -> Vec<(u16, Msi)> {
        let mut out = vec![];
        if self.pending.iter().all(|&b| b == 0) {
            return out;
        }
        for vector in 0..self.vectors() as u16 {
            let (at, bit) = (usize::from(vector / 8), 1 << (vector % 8));
            if self.pending[at] & bit != 0 {
                self.pending[at] &= !bit;
                // One that is still masked marks itself again.
                out.extend(self.raise(vector, false).map(|message| (vector, message)));
            }
        }
        out
    }
}
