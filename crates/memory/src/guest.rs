//! The guest-physical view of guest memory, by vm-memory's traits.

use std::fmt;
use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::CodeMap;
use crate::plugs::Plugs;

/// What loaders and devices use: RAM, ROM, and what is plugged of pluggable memory.
pub struct Guest {
    all: GuestMemoryMmap<Tracker>,
    plugs: Arc<Plugs>,
}

impl Guest {
    /// `all` has a region for each block of `plugs`.
    pub(crate) fn new(all: GuestMemoryMmap<Tracker>, plugs: Arc<Plugs>) -> Self {
        Self { all, plugs }
    }
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guest").finish_non_exhaustive()
    }
}

impl GuestMemoryBackend for Guest {
    type R = GuestRegionMmap<Tracker>;

    fn find_region(&self, address: GuestAddress) -> Option<&Self::R> {
        self.all.find_region(address).filter(|_| self.plugs.lets(address.0))
    }

    fn iter(&self) -> impl Iterator<Item = &Self::R> {
        self.all.iter().filter(|region| self.plugs.lets(region.start_addr().0))
    }
}

/// Tells the code map of stores that vm-memory makes.
#[derive(Clone, Debug)]
pub struct Tracker {
    code: Arc<CodeMap>,
    base: u64,
}

impl Tracker {
    /// For the region at `base` in the block.
    pub(crate) fn new(code: Arc<CodeMap>, base: u64) -> Self {
        Self { code, base }
    }
}

impl WithBitmapSlice<'_> for Tracker {
    type S = Self;
}

impl BitmapSlice for Tracker {}

impl Bitmap for Tracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.code.stored_range(self.base + offset as u64, len as u64);
    }

    fn dirty_at(&self, _: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { code: self.code.clone(), base: self.base + offset as u64 }
    }
}
