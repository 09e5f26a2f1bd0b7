//! Linear page tables: from a guest's linear page to what must be added to reach its bytes in the host.
//!
//! A table is a reservation of 512 GiB, an entry of 8 bytes for each of the 2^36 pages that 48 bits of address have; the
//! host gives memory where entries are. Translated code indexes it with bits 47 to 12 of an address, whatever the others
//! are, so that it never reads beside it. An entry of 0 says: ask. Any other is host address minus linear address, so that
//! an address that is not canonical leads to a host address that is not either, which faults.

use std::collections::HashSet;
use std::ptr::NonNull;

use crate::Error;

/// Bytes of a table.
const SIZE: usize = 8 << 36;
/// Pages that one page of entries covers, and bytes.
const REGION: u64 = 512;

/// A part of the table that is in use: 512 entries, which is 2 MiB of linear addresses.
#[derive(Clone, Copy)]
struct Region {
    number: u64,
    /// It has entries that are not global.
    local: bool,
    /// It has entries from guest pages larger than 4 KiB.
    large: bool,
}

/// The table of one vCPU and one set of access rights.
pub struct Lpt {
    base: NonNull<u64>,
    used: Vec<Region>,
    /// Numbers of all regions for which the host gave memory, in use or not.
    touched: HashSet<u64>,
    /// Numbers of the 1 GiB ranges with entries from guest pages of that size.
    huge: Vec<u64>,
    last: usize,
}

// SAFETY: the mapping is this value's own.
unsafe impl Send for Lpt {}

fn page(linear: u64) -> u64 {
    (linear >> 12) & ((1 << 36) - 1)
}

impl Lpt {
    /// An empty table.
    ///
    /// # Errors
    /// The host does not give so much address space (strict overcommit, or a limit on address space).
    pub fn new() -> Result<Self, Error> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), SIZE, prot, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(Error::Map("512 GiB of address space", std::io::Error::last_os_error()));
        }
        // SAFETY: advice about our own mapping: neither dumped nor, with entries so far apart, put in huge pages.
        unsafe {
            libc::madvise(base, SIZE, libc::MADV_DONTDUMP);
            libc::madvise(base, SIZE, libc::MADV_NOHUGEPAGE);
        }
        let base = NonNull::new(base.cast()).ok_or(Error::Space)?;
        Ok(Self { base, used: Vec::new(), touched: HashSet::new(), huge: Vec::new(), last: 0 })
    }

    /// Address of the table: GS base of translated code.
    pub fn base(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    fn entry(&self, page: u64) -> *mut u64 {
        // SAFETY: `page` has 36 bits, as many as the table has entries.
        unsafe { self.base.as_ptr().add((page & ((1 << 36) - 1)) as usize) }
    }

    /// The entry of the page of `linear`.
    pub fn get(&self, linear: u64) -> u64 {
        // SAFETY: inside the mapping.
        unsafe { self.entry(page(linear)).read() }
    }

    /// Fills the entry of `linear`, whose page's bytes lie at `host`. False where the guest's address is the host's own, which
    /// an entry cannot say: such a page is not filled.
    #[must_use]
    pub fn fill(&mut self, linear: u64, host: u64, global: bool, shift: u8) -> bool {
        let entry = host.wrapping_sub(linear & !0xfff);
        if entry == 0 {
            return false;
        }
        let page = page(linear);
        let number = page / REGION;
        let region = match self.used.get_mut(self.last) {
            Some(r) if r.number == number => r,
            _ => self.region(number),
        };
        region.local |= !global;
        region.large |= shift > 12;
        // SAFETY: inside the mapping.
        unsafe { self.entry(page).write(entry) };
        if shift >= 30 && !self.huge.contains(&(page >> 18)) {
            self.huge.push(page >> 18);
        }
        true
    }

    fn region(&mut self, number: u64) -> &mut Region {
        let found = self.used.iter().position(|r| r.number == number);
        self.last = match found {
            Some(i) => i,
            None => {
                self.touched.insert(number);
                self.used.push(Region { number, local: false, large: false });
                self.used.len() - 1
            }
        };
        let last = self.last;
        &mut self.used[last]
    }

    /// Pages of memory that the host gave for entries, in use or not.
    pub fn touched(&self) -> usize {
        self.touched.len()
    }

    /// Empties the table, and gives its memory back to the host.
    pub fn release(&mut self) {
        self.used.clear();
        self.huge.clear();
        self.last = 0;
        // SAFETY: our own private mapping; it reads as zeros afterwards, which is an empty table.
        unsafe { libc::madvise(self.base.as_ptr().cast(), SIZE, libc::MADV_DONTNEED) };
        self.touched.clear();
    }

    fn clear(&self, number: u64) {
        // SAFETY: 512 entries inside the mapping, for `number` has 27 bits.
        unsafe { self.entry(number * REGION).write_bytes(0, REGION as usize) };
    }

    /// Empties the table.
    pub fn flush_all(&mut self) {
        for r in &self.used {
            self.clear(r.number);
        }
        self.used.clear();
        self.huge.clear();
        self.last = 0;
    }

    /// Drops at least all entries that are not global.
    pub fn flush_local(&mut self) {
        let mut kept = std::mem::take(&mut self.used);
        kept.retain(|r| {
            if r.local {
                self.clear(r.number);
            }
            !r.local
        });
        self.used = kept;
        self.last = 0;
        if self.used.is_empty() {
            self.huge.clear();
        }
    }

    /// Drops the entries of the guest page that `linear` is in.
    pub fn flush_page(&mut self, linear: u64) {
        let page = page(linear);
        if self.huge.contains(&(page >> 18)) {
            self.huge.retain(|&n| n != page >> 18);
            let (inside, rest): (Vec<Region>, Vec<Region>) =
                self.used.iter().partition(|r| r.number >> 9 == page >> 18);
            inside.iter().for_each(|r| self.clear(r.number));
            self.used = rest;
            self.last = 0;
            return;
        }
        // A page of 4 MiB covers two regions.
        let pair = (page / REGION) & !1;
        for number in [pair, pair + 1] {
            if self.used.iter().any(|r| r.number == number && r.large) {
                self.clear(number);
            }
        }
        self.forget(linear);
    }

    /// Drops the one entry of `linear`: the next access asks.
    pub fn forget(&mut self, linear: u64) {
        // An entry that is 0 stays untouched, so that the host need not give memory for it.
        if self.used.iter().any(|r| r.number == page(linear) / REGION) {
            // SAFETY: inside the mapping.
            unsafe { self.entry(page(linear)).write(0) };
        }
    }
}

impl Drop for Lpt {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which no translated code uses any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_and_go() {
        let mut t = Lpt::new().unwrap();
        let (user, kernel) = (0x7fff_ffff_f123, 0xffff_8880_0020_0000u64);
        assert!(t.fill(user, 0x5555_0000_0000, false, 12));
        assert!(t.fill(kernel, 0x5555_0020_0000, true, 21));
        assert_eq!(t.get(user).wrapping_add(user), 0x5555_0000_0123);
        assert_eq!(t.get(kernel).wrapping_add(kernel), 0x5555_0020_0000);
        t.flush_local();
        assert_eq!(t.get(user), 0);
        assert_ne!(t.get(kernel), 0);
        t.flush_page(kernel + 0x5000);
        assert_eq!(t.get(kernel), 0, "the same large page");
    }

    #[test]
    fn a_page_of_a_gibibyte_goes_at_once() {
        let mut t = Lpt::new().unwrap();
        assert!(t.fill(0x4000_0000, 0x10_0000_0000, true, 30));
        assert!(t.fill(0x7fff_f000, 0x10_3fff_f000, true, 30));
        assert!(t.fill(0x8000_0000, 0x10_4000_0000, true, 30));
        t.flush_page(0x5000_0000);
        assert_eq!((t.get(0x4000_0000), t.get(0x7fff_f000)), (0, 0));
        assert_ne!(t.get(0x8000_0000), 0);
    }

    #[test]
    fn a_table_that_was_given_back_is_empty() {
        let mut t = Lpt::new().unwrap();
        for n in 0..100 {
            assert!(t.fill(n << 30, 0x5555_0000_0000, true, 30));
        }
        t.flush_local();
        assert_eq!(t.touched(), 100);
        t.release();
        assert_eq!((t.touched(), t.get(0), t.get(99 << 30)), (0, 0, 0));
        assert!(t.fill(0, 0x5555_0000_0000, true, 12));
        t.flush_page(0x3fff_f000);
        assert_ne!(t.get(0), 0, "not of a large page any more");
    }

    #[test]
    fn an_entry_never_says_ask_once_it_is_filled() {
        let mut t = Lpt::new().unwrap();
        assert!(!t.fill(0x7f12_3456_7abc, 0x7f12_3456_7000, false, 12));
        assert_eq!((t.get(0x7f12_3456_7000), t.used.len()), (0, 0));
    }
}
