//! The software TLB: from linear pages to offsets in guest memory.

/// Entries of one bank.
pub const ENTRIES: usize = 1024;
const BANKS: usize = 4;
const FETCH: usize = 256;
/// No page has this tag.
const NONE: u64 = u64::MAX;

/// Where a linear page's bytes are, and who may do what.
#[derive(Clone, Copy)]
pub struct Entry {
    /// Linear address of the page if loads are allowed.
    pub read: u64,
    /// Linear address of the page if stores are allowed, the dirty bit being set.
    pub write: u64,
    /// Offset of the page in guest memory.
    pub offset: u64,
    global: bool,
}

#[derive(Clone, Copy)]
struct Code {
    tag: u64,
    offset: u64,
    global: bool,
}

const EMPTY: Entry = Entry { read: NONE, write: NONE, offset: 0, global: false };
const NO_CODE: Code = Code { tag: NONE, offset: 0, global: false };

/// What the TLB was told to forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Everything.
    All,
    /// All pages that are not global.
    Local,
    /// The page of this linear address.
    Page(u64),
}

/// Direct-mapped, with a bank for each set of access rights.
pub struct Tlb {
    entries: Box<[Entry; ENTRIES * BANKS]>,
    code: Box<[Code; FETCH * 2]>,
    /// Counts what invalidated translations of code.
    pub epoch: u64,
    /// Linear ranges (lower half, upper half) that hold all pages larger than 4 KiB.
    large: [(u64, u64); 2],
    /// Flushes of more than a page.
    pub flushes: u64,
    used: [bool; BANKS],
    /// What was forgotten, for an engine with page tables of its own that takes note of it (then `Some`).
    pub log: Option<Vec<Flush>>,
}

impl Default for Tlb {
    fn default() -> Self {
        Self {
            entries: Box::new([EMPTY; ENTRIES * BANKS]),
            code: Box::new([NO_CODE; FETCH * 2]),
            epoch: 1,
            large: [(u64::MAX, 0); 2],
            flushes: 0,
            used: [false; BANKS],
            log: None,
        }
    }
}

impl Tlb {
    /// Supervisor accesses with SMAP in force; implicit ones always.
    pub const SYSTEM: usize = 0;
    /// Accesses from CPL 3.
    pub const USER: usize = ENTRIES;
    /// Supervisor accesses with SMAP off or overridden by EFLAGS.AC.
    pub const SYSTEM_AC: usize = 2 * ENTRIES;
    /// Accesses from CPL 3 with alignment checks: never filled, so all are looked at closely.
    pub const USER_ALIGNED: usize = 3 * ENTRIES;

    /// The entry that a linear address could be in.
    #[inline(always)]
    pub fn entry(&self, bank: usize, linear: u64) -> &Entry {
        let page = (linear >> 12) as usize & (ENTRIES - 1);
        &self.entries[(bank | page) & (ENTRIES * BANKS - 1)]
    }

    /// Remembers a page for loads, and for stores if `write`.
    pub fn fill(&mut self, bank: usize, linear: u64, offset: u64, write: bool, global: bool, shift: u8) {
        let tag = linear & !0xfff;
        let page = (linear >> 12) as usize & (ENTRIES - 1);
        self.used[(bank / ENTRIES) & (BANKS - 1)] = true;
        self.entries[(bank | page) & (ENTRIES * BANKS - 1)] =
            Entry { read: tag, write: if write { tag } else { NONE }, offset, global };
        self.note_size(linear, shift);
    }

    fn note_size(&mut self, linear: u64, shift: u8) {
        if shift > 12 {
            let mask = (1u64 << shift) - 1;
            let range = &mut self.large[usize::from(linear >> 63 != 0)];
            *range = (range.0.min(linear & !mask), range.1.max(linear | mask));
        }
    }

    /// Where the page of code at `linear` is.
    #[inline]
    pub fn fetch(&self, user: bool, linear: u64) -> Option<u64> {
        let e = &self.code[(linear >> 12) as usize & (FETCH - 1) | (usize::from(user) * FETCH)];
        (e.tag == linear & !0xfff).then_some(e.offset | linear & 0xfff)
    }

    /// Remembers a page of code.
    pub fn fill_code(&mut self, user: bool, linear: u64, offset: u64, global: bool, shift: u8) {
        let slot = (linear >> 12) as usize & (FETCH - 1) | (usize::from(user) * FETCH);
        self.code[slot] = Code { tag: linear & !0xfff, offset, global };
        self.note_size(linear, shift);
    }

    /// Forgets everything.
    pub fn flush_all(&mut self) {
        self.note(Flush::All);
        self.forget_all();
    }

    fn forget_all(&mut self) {
        self.flush(false);
        self.large = [(u64::MAX, 0); 2];
    }

    /// Whether a page larger than 4 KiB may be at `linear`.
    pub fn may_be_large(&self, linear: u64) -> bool {
        let (low, high) = self.large[usize::from(linear >> 63 != 0)];
        (low..=high).contains(&linear)
    }

    fn note(&mut self, flush: Flush) {
        if let Some(log) = &mut self.log {
            // A log that nobody reads does not grow.
            if log.len() >= 64 {
                log.clear();
                log.push(Flush::All);
            }
            log.push(flush);
        }
    }

    /// Forgets all pages that are not global.
    pub fn flush_local(&mut self) {
        self.note(Flush::Local);
        self.flush(true);
    }

    fn flush(&mut self, keep_global: bool) {
        self.epoch += 1;
        self.flushes += 1;
        for (bank, entries) in self.entries.chunks_exact_mut(ENTRIES).enumerate() {
            if !std::mem::take(&mut self.used[bank]) {
                continue;
            }
            for e in entries {
                if !(keep_global && e.global) {
                    *e = EMPTY;
                } else if e.read != NONE {
                    self.used[bank] = true;
                }
            }
        }
        for e in self.code.iter_mut() {
            if !(keep_global && e.global) {
                *e = NO_CODE;
            }
        }
    }

    /// Forgets the page of `linear`.
    pub fn flush_page(&mut self, linear: u64) {
        self.note(Flush::Page(linear));
        let (low, high) = self.large[usize::from(linear >> 63 != 0)];
        if linear >= low && linear <= high {
            return self.forget_all();
        }
        self.epoch += 1;
        let page = (linear >> 12) as usize;
        for bank in 0..BANKS {
            let e = &mut self.entries[(bank * ENTRIES) | page & (ENTRIES - 1)];
            if e.read == linear & !0xfff {
                *e = EMPTY;
            }
        }
        for user in 0..2 {
            let e = &mut self.code[(user * FETCH) | page & (FETCH - 1)];
            if e.tag == linear & !0xfff {
                *e = NO_CODE;
            }
        }
    }
}
