//! Which bytes of guest memory engines have cached as code, so that stores to them are noticed.
//!
//! An engine that decodes a block marks the 64-byte lines it read ([`CodeMap::mark`]) and remembers the page's
//! [`generation`](CodeMap::generation). Whoever stores into a marked line bumps the generation, after the bytes have
//! changed. A cached block is valid while its page's generation is the one it remembers.
//!
//! The order that makes this race-free: the engine reads the generation *before* it marks and marks *before* it reads the
//! bytes; a store writes the bytes *before* it reads the marks. Between the two halves of the store there is no fence, for
//! stores are the hot side: `mark` has the kernel put one into every running thread instead (membarrier(2)).
//!
//! Translated code stores through an [`Alias`] and reads no marks: there, pages with marks cannot be written. A page stays
//! protected after its marks have gone, until somebody stores to it ([`CodeMap::unprotect`]).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, compiler_fence, fence};

use crate::alias::Alias;

const PAGE_SHIFT: u32 = 12;
const LINE_SHIFT: u32 = 6;

/// Marks and generations for every page of a guest's memory, by offset into its block.
#[derive(Debug)]
pub struct CodeMap {
    /// A bit for each 64-byte line of a page.
    lines: Box<[AtomicU64]>,
    generations: Box<[AtomicU32]>,
    /// Counts all changes of generations.
    changes: AtomicU64,
    pub(crate) alias: OnceLock<Alias>,
}

impl CodeMap {
    pub(crate) fn new(bytes: u64) -> Self {
        order_threads_is_exact();
        let pages = (bytes >> PAGE_SHIFT) as usize;
        // Zeroed allocations of this size come untouched from the kernel: they cost memory only where code is marked.
        // SAFETY: an atomic integer may hold any bit pattern, zero included.
        let (lines, generations) = unsafe {
            (Box::new_zeroed_slice(pages).assume_init(), Box::new_zeroed_slice(pages).assume_init())
        };
        Self { lines, generations, changes: AtomicU64::new(0), alias: OnceLock::new() }
    }

    /// The generation of the page that holds `offset`. A cached block is stale once it differs.
    #[inline]
    pub fn generation(&self, offset: u64) -> u32 {
        self.generations.get((offset >> PAGE_SHIFT) as usize).map_or(0, |g| g.load(Ordering::Acquire))
    }

    /// Marks `len` bytes at `offset`, which lie in one page, as cached.
    pub fn mark(&self, offset: u64, len: u64) {
        let Some(lines) = self.lines.get((offset >> PAGE_SHIFT) as usize) else { return };
        let mask = mask(offset, len);
        if lines.load(Ordering::SeqCst) & mask == mask {
            return;
        }
        let alias = self.alias.get();
        let _held = alias.map(Alias::hold);
        // Who finds a mark believes that the page cannot be written.
        if let Some(alias) = alias.filter(|alias| !alias.is_protected(offset)) {
            alias.protect(offset, false);
        }
        let before = lines.fetch_or(mask, Ordering::SeqCst);
        if before & mask != mask {
            order_threads();
        }
    }

    /// How often a generation has changed: while this stands, all do.
    #[inline]
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Whether the page that holds `offset` holds cached code.
    #[inline]
    pub fn holds_code(&self, offset: u64) -> bool {
        self.lines.get((offset >> PAGE_SHIFT) as usize).is_some_and(|l| l.load(Ordering::SeqCst) != 0)
    }

    /// Lets the page that holds `offset` be written through the writable [`Alias`], if it holds no cached code: tells
    /// whether it can be.
    pub fn unprotect(&self, offset: u64) -> bool {
        let Some(alias) = self.alias.get() else { return false };
        let _held = alias.hold();
        if self.holds_code(offset) {
            return false;
        }
        alias.protect(offset, true);
        true
    }

    /// To be called after a store of `len` bytes at `offset`, which lie in one page. Tells whether cached code changed.
    #[inline]
    pub fn stored(&self, offset: u64, len: u64) -> bool {
        let page = (offset >> PAGE_SHIFT) as usize;
        compiler_fence(Ordering::SeqCst);
        let Some(lines) = self.lines.get(page) else { return false };
        let marked = lines.load(Ordering::Relaxed);
        if marked == 0 || marked & mask(offset, len) == 0 {
            return false;
        }
        self.changed(page);
        true
    }

    #[cold]
    fn changed(&self, page: usize) {
        // Marks go first: whoever decodes after this sees the new bytes and marks afresh.
        self.lines[page].store(0, Ordering::SeqCst);
        self.generations[page].fetch_add(1, Ordering::SeqCst);
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// As [`CodeMap::stored`], for any length.
    pub fn stored_range(&self, offset: u64, len: u64) -> bool {
        let (mut at, mut hit) = (offset, false);
        let end = offset.saturating_add(len);
        while at < end {
            let n = (end - at).min(crate::PAGE_SIZE - at % crate::PAGE_SIZE);
            hit |= self.stored(at, n);
            at += n;
        }
        hit
    }
}

/// Orders the memory accesses of every running thread of this process: the one half of a barrier between a store and a load
/// that stands for both. Devices' threads call it, for an engine may drop the guest's half. Kernels before 4.14, and sandboxes
/// that refuse the call, leave us with a fence on this side alone: a window of nanoseconds in which cross-modified code may go
/// unnoticed.
pub fn order_threads() {
    membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED);
}

/// Whether [`order_threads`] is more than a fence on the calling thread's side.
pub fn order_threads_is_exact() -> bool {
    membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)
}

fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: membarrier takes three integers and touches no memory of ours.
    let done = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    fence(Ordering::SeqCst);
    done == 0
}

/// The lines that `len` bytes at `offset` touch; they lie in one page and `len` is not 0.
#[inline]
fn mask(offset: u64, len: u64) -> u64 {
    let first = (offset >> LINE_SHIFT) & 63;
    let last = (((offset & 0xfff) + len.max(1) - 1) >> LINE_SHIFT).min(63);
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_stores_to_marked_lines_count() {
        let map = CodeMap::new(0x4000);
        let before = map.generation(0x1000);
        map.mark(0x1080, 100); // lines 2, 3
        assert!(!map.stored(0x107f, 1));
        assert!(!map.stored(0x1100, 8));
        assert!(!map.stored(0x2080, 8));
        assert_eq!(map.generation(0x1000), before);
        assert!(map.stored(0x107c, 8), "reaches into line 2");
        assert_ne!(map.generation(0x1fff), before);
        assert!(!map.stored(0x1080, 8), "marks are gone until code is cached again");
    }

    #[test]
    fn ranges_span_pages_and_run_off_the_end_harmlessly() {
        let map = CodeMap::new(0x4000);
        map.mark(0x3ff8, 8);
        map.stored_range(0x0f00, 0x1_0000);
        assert_eq!(map.generation(0x3000), 1);
        assert_eq!(map.generation(0x2000), 0);
    }
}
