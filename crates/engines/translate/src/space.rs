//! Address spaces: linear page tables, and what tells the jumps of one space from those of another.
//!
//! A guest that uses PCIDs keeps the translations of several processes in its TLB. So do we: each PCID has tables of its own,
//! and a change of CR3 that keeps them costs nothing.

use std::collections::HashSet;

use interpret::tlb::Flush;

use crate::Error;
use crate::block::Mode;
use crate::frame::Frame;
use crate::lpt::Lpt;

/// Spaces that are kept at most; Linux uses six.
const MOST: usize = 8;
/// Spaces of all vCPUs together: each takes 1.5 TiB of the 128 TiB of addresses that the host has for us.
const TOGETHER: usize = 40;
/// Linear pages with code that are remembered at most.
const PAGES: usize = 1 << 16;
/// Salts that there are.
const SALTS: u16 = 0x7ff0;
const MODES: usize = 32;

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
    now: usize,
    time: u64,
    next_salt: u16,
    /// For code in supervisor mode, which is the same in all spaces as long as its pages are global.
    salts: [u16; MODES],
    /// The table of jumps has supervisor addresses from pages that are not.
    local: bool,
    /// Linear pages, and GiB, that the table of jumps has addresses in.
    pages: HashSet<u64>,
    gibs: HashSet<u64>,
}

impl Spaces {
    /// One space, empty, for one of `vcpus`.
    ///
    /// # Errors
    /// The host lacks address space.
    pub fn new(vcpus: u32) -> Result<Self, Error> {
        Ok(Self {
            spaces: vec![Space::new(0)?],
            most: (TOGETHER / vcpus.max(1) as usize).clamp(1, MOST),
            now: 0,
            time: 0,
            next_salt: 2,
            salts: [0; MODES],
            local: false,
            pages: HashSet::new(),
            gibs: HashSet::new(),
        })
    }

    /// The table of the current space for a bank of the TLB.
    #[inline]
    pub fn table(&mut self, bank: usize) -> &mut Lpt {
        let now = self.now;
        &mut self.spaces[now].tables[bank.min(2)]
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
