//! Address spaces: linear page tables, and what tells the jumps of one space from those of another.
//!
//! A guest that uses PCIDs keeps the translations of several processes in its TLB. So do we: each PCID has tables of its own,
//! and a change of CR3 that keeps them costs nothing.

use interpret::tlb::Flush;
use rustc_hash::FxHashSet;

use crate::Error;
use crate::block::Mode;
use crate::frame::Frame;
use crate::lpt::Lpt;

/// Spaces that are kept at most; Linux uses six.
const MOST: usize = 8;
/// Spaces of all vCPUs together: each takes 1.5 TiB of the 128 TiB of addresses that the host has for us.
const TOGETHER: usize = 40;
/// Bytes that a page of entries counts for: it may well need a page table of the host's for itself.
const PAGE: usize = 8 << 10;
/// Pages of entries that a vCPU may have in any case.
const LEAST: usize = 256;
/// Linear pages with code that are remembered at most.
const PAGES: usize = 1 << 16;
/// Salts that there are.
const SALTS: u16 = 0x7ff0;
const MODES: usize = 64;

struct Space {
    pcid: u16,
    /// By the TLB's banks: supervisor, user, supervisor with access to user pages.
    tables: [Lpt; 3],
    /// For code in user mode; 0 where there is none yet.
    salts: [u16; MODES],
    /// When it was last switched to.
    used: u64,
}

impl Space {
    fn new(pcid: u16) -> Result<Self, Error> {
        let tables = [Lpt::new()?, Lpt::new()?, Lpt::new()?];
        Ok(Self { pcid, tables, salts: [0; MODES], used: 0 })
    }

    fn flush_local(&mut self) {
        self.tables.iter_mut().for_each(Lpt::flush_local);
        self.salts = [0; MODES];
    }

    fn flush_all(&mut self) {
        self.tables.iter_mut().for_each(Lpt::flush_all);
        self.salts = [0; MODES];
    }
}

/// All address spaces of a vCPU.
pub struct Spaces {
    spaces: Vec<Space>,
    /// Spaces at most.
    most: usize,
    /// Pages of entries in all tables, and how many there may be.
    touched: usize,
    room: usize,
    now: usize,
    time: u64,
    next_salt: u16,
    /// For code in supervisor mode, which is the same in all spaces as long as its pages are global.
    salts: [u16; MODES],
    /// The table of jumps has supervisor addresses from pages that are not.
    local: bool,
    /// Linear pages, and GiB, that the table of jumps has addresses in.
    pages: FxHashSet<u64>,
    gibs: FxHashSet<u64>,
}

impl Spaces {
    /// One space, empty, for one of `vcpus`, which may together take `bytes` of the host's memory.
    ///
    /// # Errors
    /// The host lacks address space.
    pub fn new(vcpus: u32, bytes: u64) -> Result<Self, Error> {
        let vcpus = vcpus.max(1) as usize;
        Ok(Self {
            spaces: vec![Space::new(0)?],
            most: (TOGETHER / vcpus).clamp(1, MOST),
            touched: 0,
            room: (bytes as usize / PAGE / vcpus).max(LEAST),
            now: 0,
            time: 0,
            next_salt: 2,
            salts: [0; MODES],
            local: false,
            pages: FxHashSet::default(),
            gibs: FxHashSet::default(),
        })
    }

    /// The table of the current space for a bank of the TLB.
    #[inline]
    pub fn table(&mut self, bank: usize) -> &mut Lpt {
        let now = self.now;
        &mut self.spaces[now].tables[bank.min(2)]
    }

    /// Fills an entry in the current space's table for a bank of the TLB: see [`Lpt::fill`]. A guest that touches memory here
    /// and there, and so makes us take more than our share, finds all tables empty.
    #[must_use]
    pub fn fill(&mut self, bank: usize, linear: u64, host: u64, global: bool, shift: u8) -> bool {
        if self.touched >= self.room {
            self.spaces.iter_mut().flat_map(|s| &mut s.tables).for_each(Lpt::release);
            self.touched = 0;
        }
        let table = self.table(bank);
        let before = table.touched();
        let filled = table.fill(linear, host, global, shift);
        self.touched += self.table(bank).touched() - before;
        filled
    }

    /// What is added to linear addresses in the table of jumps, in the current space.
    #[inline]
    pub fn salt(&mut self, frame: &Frame, mode: Mode, user: bool) -> u64 {
        let now = self.now;
        let salts = if user { &mut self.spaces[now].salts } else { &mut self.salts };
        let n = match salts[usize::from(mode.0) % MODES] {
            0 => self.new_salt(frame, mode, user),
            n => n,
        };
        // The low bits spread what different processes have at the same addresses.
        u64::from(n) << 48 | u64::from(n.wrapping_mul(0x9e37) & 0x7fff)
    }

    #[cold]
    fn new_salt(&mut self, frame: &Frame, mode: Mode, user: bool) -> u16 {
        if self.next_salt >= SALTS {
            frame.clear_jumps();
            self.next_salt = 2;
            self.reset_salts();
        }
        let n = self.next_salt;
        self.next_salt += 2;
        let now = self.now;
        let salts = if user { &mut self.spaces[now].salts } else { &mut self.salts };
        salts[usize::from(mode.0) % MODES] = n;
        n
    }

    fn reset_salts(&mut self) {
        self.spaces.iter_mut().for_each(|s| s.salts = [0; MODES]);
        self.salts = [0; MODES];
        self.pages.clear();
        self.gibs.clear();
        self.local = false;
    }

    /// Notes that the table of jumps has the address `linear` now.
    pub fn entered(&mut self, linear: u64, user: bool, global: bool) {
        self.local |= !user && !global;
        if self.pages.len() >= PAGES {
            self.reset_salts();
        }
        self.pages.insert(linear >> 12);
        self.gibs.insert(linear >> 30);
    }

    /// Forgets what the guest's TLB forgot. `large` tells where pages larger than 4 KiB may be.
    pub fn flush(&mut self, flush: Flush, large: impl Fn(u64) -> bool) {
        match flush {
            Flush::All => {
                self.spaces.iter_mut().for_each(Space::flush_all);
                self.reset_salts();
            }
            Flush::Local => {
                self.spaces.iter_mut().for_each(Space::flush_local);
                self.forget_local();
            }
            Flush::Context(pcid) => {
                self.spaces.iter_mut().filter(|s| s.pcid == pcid).for_each(Space::flush_local);
                self.forget_local();
            }
            Flush::Switch(pcid, keep) => self.switch(pcid, keep),
            Flush::Page(linear) => {
                for space in &mut self.spaces {
                    space.tables.iter_mut().for_each(|t| t.flush_page(linear));
                }
                let code = self.pages.contains(&(linear >> 12));
                if code || large(linear) && self.gibs.contains(&(linear >> 30)) {
                    self.reset_salts();
                }
            }
        }
    }

    fn forget_local(&mut self) {
        if std::mem::take(&mut self.local) {
            self.salts = [0; MODES];
        }
    }

    /// Makes sure that the address space is that of `pcid`: a state that was loaded, and CR4, change it without a switch.
    pub fn settle(&mut self, pcid: u16) {
        if self.spaces[self.now].pcid != pcid {
            self.switch(pcid, false);
        }
    }

    fn switch(&mut self, pcid: u16, keep: bool) {
        self.forget_local();
        self.time += 1;
        if let Some(n) = self.spaces.iter().position(|s| s.pcid == pcid) {
            self.now = n;
            if !keep {
                self.spaces[n].flush_local();
            }
        } else if self.spaces.len() < self.most
            && let Ok(space) = Space::new(pcid)
        {
            self.spaces.push(space);
            self.now = self.spaces.len() - 1;
        } else {
            let oldest = (0..self.spaces.len()).min_by_key(|&n| self.spaces[n].used).unwrap_or(0);
            self.spaces[oldest].flush_all();
            self.spaces[oldest].pcid = pcid;
            self.now = oldest;
        }
        self.spaces[self.now].used = self.time;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_touches_and_forgets_is_given_back_to_the_host() {
        let mut s = Spaces::new(2, 16 << 20).unwrap();
        let last = 20 * LEAST as u64;
        for n in 0..=last {
            if n % 100 == 0 {
                s.flush(Flush::Switch((n / 100 % 5) as u16, n % 200 == 0), |_| false);
            }
            assert!(s.fill((n % 3) as usize, n << 21, 0x5555_0000_0000, false, 12));
            let touched: usize = s.spaces.iter().flat_map(|s| &s.tables).map(Lpt::touched).sum();
            assert!(touched == s.touched && touched <= 1024);
        }
        assert_ne!(s.table((last % 3) as usize).get(last << 21), 0);
    }

    #[test]
    fn an_entry_that_is_wanted_now_is_filled_even_without_room() {
        let mut s = Spaces::new(64, 0).unwrap();
        for n in 0..3 * LEAST as u64 {
            assert!(s.fill(0, n << 30, 0x5555_0000_0000, true, 30));
            assert_ne!(s.table(0).get(n << 30), 0);
            assert!(s.touched <= LEAST);
        }
        s.flush(Flush::Page((3 * LEAST as u64 - 1) << 30 | 0x1000), |_| true);
        assert_eq!(s.table(0).get((3 * LEAST as u64 - 1) << 30), 0);
    }

    #[test]
    fn a_state_that_is_loaded_is_not_taken_for_the_address_space_before() {
        let mut s = Spaces::new(1, 16 << 20).unwrap();
        s.flush(Flush::Switch(2, true), |_| false);
        // A state with PCID 1 is loaded.
        s.flush(Flush::All, |_| false);
        s.settle(1);
        assert!(s.fill(0, 0x40_0000, 0x5555_0000_0000, false, 12));
        s.flush(Flush::Switch(2, true), |_| false);
        assert_eq!(s.table(0).get(0x40_0000), 0, "PCID 2 knows nothing");
        s.flush(Flush::Switch(1, true), |_| false);
        assert_ne!(s.table(0).get(0x40_0000), 0, "PCID 1 still does");
    }
}
