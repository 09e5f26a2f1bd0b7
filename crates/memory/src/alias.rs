//! Two more mappings of guest memory, for engines whose translated code accesses it without asking anybody.
//!
//! In one of them a page can be written unless it holds code that an engine has cached; in the other no page can. A store
//! that must be noticed therefore faults on the host's MMU, whichever vCPU makes it. Around both lie guard pages.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use crate::PAGE_SIZE;

/// Bytes on each side of a mapping that nobody can access: more than the largest operand reaches.
const GUARD: usize = 1 << 16;

/// The two mappings.
pub struct Alias {
    base: NonNull<u8>,
    len: usize,
    /// A bit for each page that may not be written.
    protected: Box<[AtomicU64]>,
    /// Held while a page's protection changes, together with the marks that decide about it.
    lock: Mutex<()>,
}

// SAFETY: the mappings are only reached by address; nothing here hands out references into them.
unsafe impl Send for Alias {}
// SAFETY: as above.
unsafe impl Sync for Alias {}

impl std::fmt::Debug for Alias {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Alias").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Alias {
    pub(crate) fn new(file: &File, len: u64) -> std::io::Result<Self> {
        let len = usize::try_from(len).map_err(std::io::Error::other)?;
        let total = 2 * len + 3 * GUARD;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base = unsafe { libc::mmap(ptr::null_mut(), total, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let base =
            NonNull::new(base.cast::<u8>()).ok_or_else(|| std::io::Error::other("mapped at address 0"))?;
        let words = (len / PAGE_SIZE as usize).div_ceil(64);
        let protected = (0..words).map(|_| AtomicU64::new(0)).collect();
        let alias = Self { base, len, protected, lock: Mutex::new(()) };
        let both =
            [(alias.writable(), libc::PROT_READ | libc::PROT_WRITE), (alias.readable(), libc::PROT_READ)];
        for (at, prot) in both {
            let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
            // SAFETY: replaces a part of the reservation made above, which is ours.
            let got = unsafe { libc::mmap(at as *mut _, len, prot, flags, file.as_raw_fd(), 0) };
            if got == libc::MAP_FAILED {
                return Err(std::io::Error::last_os_error());
            }
            // SAFETY: advice about our own mapping.
            unsafe { libc::madvise(got, len, libc::MADV_DONTDUMP) };
        }
        Ok(alias)
    }

    /// Host address of the mapping in which pages without cached code can be written.
    pub fn writable(&self) -> u64 {
        self.base.as_ptr() as u64 + GUARD as u64
    }

    /// Host address of the mapping that can only be read.
    pub fn readable(&self) -> u64 {
        self.writable() + (self.len + GUARD) as u64
    }

    /// Bytes in each of them.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        false
    }

    pub(crate) fn hold(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Lets the page at `offset` be written through the first mapping, or not. The caller holds the lock.
    pub(crate) fn protect(&self, offset: u64, write: bool) {
        let page = offset & !(PAGE_SIZE - 1);
        if page >= self.len() {
            return;
        }
        let (word, bit) = ((page / PAGE_SIZE / 64) as usize, 1 << (page / PAGE_SIZE % 64));
        if write {
            self.protected[word].fetch_and(!bit, Ordering::SeqCst);
        } else {
            self.protected[word].fetch_or(bit, Ordering::SeqCst);
        }
        if self.set(page, PAGE_SIZE as usize, write) {
            return;
        }
        // The kernel splits mappings to change a page, and is out of them (vm.max_map_count). Nothing is writable then,
        // which is one mapping again; what is stored to becomes so page by page.
        let done = self.set(0, self.len, false);
        self.protected.iter().for_each(|word| word.store(u64::MAX, Ordering::SeqCst));
        assert!(done, "the host does not protect memory that it gave");
        // A store waits for this one, and would meet the same fault for ever.
        if write && self.set(page, PAGE_SIZE as usize, true) {
            self.protected[word].fetch_and(!bit, Ordering::SeqCst);
        }
    }

    /// Whether the page at `offset` cannot be written now.
    pub fn is_protected(&self, offset: u64) -> bool {
        let page = offset / PAGE_SIZE;
        self.protected
            .get((page / 64) as usize)
            .is_some_and(|w| w.load(Ordering::SeqCst) >> (page % 64) & 1 != 0)
    }

    fn set(&self, offset: u64, len: usize, write: bool) -> bool {
        let prot = if write { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: part of our own mapping.
        unsafe { libc::mprotect((self.writable() + offset) as *mut _, len, prot) == 0 }
    }
}

impl Drop for Alias {
    fn drop(&mut self) {
        // SAFETY: our own mapping; engines that know its addresses hold the memory it belongs to.
        unsafe { libc::munmap(self.base.as_ptr().cast(), 2 * self.len + 3 * GUARD) };
    }
}

#[cfg(test)]
mod tests {
    use crate::Memory;

    /// More than a process may have mappings (vm.max_map_count is 65530 by default): a store must get through all the same.
    #[test]
    fn a_page_becomes_writable_however_many_are() {
        const PAGES: u64 = 70_000;
        let memory = Memory::new((2 * PAGES) << 12, 0).unwrap();
        let alias = memory.alias().unwrap();
        for page in (0..2 * PAGES).step_by(2) {
            alias.protect(page << 12, false);
            assert!(alias.is_protected(page << 12));
        }
        for page in (0..2 * PAGES).step_by(2) {
            memory.code().unprotect(page << 12);
            if !alias.is_protected(page << 12) && page % 64 == 0 || page > 2 * PAGES - 64 {
                // SAFETY: inside the alias; faults if the page is not what the alias says.
                unsafe { ((alias.writable() + (page << 12)) as *mut u8).write_volatile(1) };
            }
        }
    }
}
