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
    /// It is in the list of those in use.
    listed: bool,
}

#[derive(Clone, Copy)]
struct Code {
    tag: u64,
    offset: u64,
    global: bool,
    listed: bool,
}

const EMPTY: Entry = Entry { read: NONE, write: NONE, offset: 0, global: false, listed: false };
const NO_CODE: Code = Code { tag: NONE, offset: 0, global: false, listed: false };

/// What the TLB was told to forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Everything.
    All,
    /// All pages that are not global, whatever their PCID.
    Local,
    /// CR3 was written: the PCID of what comes, and whether its pages, global ones aside, are kept.
    Switch(u16, bool),
    /// All pages of a PCID that are not global.
    Context(u16),
    /// The page of this linear address.
    Page(u64),
}

/// The entry of a bank that a linear address belongs to. Copies often go between addresses a power of two apart, so higher
/// bits count too.
#[inline(always)]
fn index(linear: u64) -> usize {
    (linear >> 12 ^ linear >> 22) as usize & (ENTRIES - 1)
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
    /// Entries in use, and entries for code.
    used: Vec<u16>,
    used_code: Vec<u16>,
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
            used: Vec::new(),
            used_code: Vec::new(),
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
        let page = index(linear);
        &self.entries[(bank | page) & (ENTRIES * BANKS - 1)]
    }

    /// Remembers a page for loads, and for stores if `write`.
    pub fn fill(&mut self, bank: usize, linear: u64, offset: u64, write: bool, global: bool, shift: u8) {
        let tag = linear & !0xfff;
        let page = index(linear);
        let n = (bank | page) & (ENTRIES * BANKS - 1);
        if !self.entries[n].listed {
            self.used.push(n as u16);
        }
        self.entries[n] =
            Entry { read: tag, write: if write { tag } else { NONE }, offset, global, listed: true };
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

    /// Whether the page of code at `linear`, which [`Tlb::fetch`] just found, is global.
    pub fn is_global(&self, user: bool, linear: u64) -> bool {
        let e = &self.code[(linear >> 12) as usize & (FETCH - 1) | (usize::from(user) * FETCH)];
        e.tag == linear & !0xfff && e.global
    }

    /// Remembers a page of code.
    pub fn fill_code(&mut self, user: bool, linear: u64, offset: u64, global: bool, shift: u8) {
        let slot = (linear >> 12) as usize & (FETCH - 1) | (usize::from(user) * FETCH);
        if !self.code[slot].listed {
            self.used_code.push(slot as u16);
        }
        self.code[slot] = Code { tag: linear & !0xfff, offset, global, listed: true };
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

    /// CR3 was written. Here pages have no PCID, so all that are not global are forgotten.
    pub fn switch(&mut self, pcid: u16, keep: bool) {
        self.note(Flush::Switch(pcid, keep));
        self.flush(true);
    }

    /// Forgets all pages of a PCID that are not global.
    pub fn flush_context(&mut self, pcid: u16) {
        self.note(Flush::Context(pcid));
        self.flush(true);
    }

    /// Forgets all pages that are not global.
    pub fn flush_local(&mut self) {
        self.note(Flush::Local);
        self.flush(true);
    }

    fn flush(&mut self, keep_global: bool) {
        self.epoch += 1;
        self.flushes += 1;
        let Self { entries, code, used, used_code, .. } = self;
        used.retain(|&n| {
            let e = &mut entries[usize::from(n) & (ENTRIES * BANKS - 1)];
            let keep = keep_global && e.global && e.read != NONE;
            if !keep {
                *e = EMPTY;
            }
            keep
        });
        used_code.retain(|&n| {
            let e = &mut code[usize::from(n) & (FETCH * 2 - 1)];
            let keep = keep_global && e.global && e.tag != NONE;
            if !keep {
                *e = NO_CODE;
            }
            keep
        });
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
            let e = &mut self.entries[(bank * ENTRIES) | index(linear)];
            if e.read == linear & !0xfff {
                *e = Entry { listed: true, ..EMPTY };
            }
        }
        for user in 0..2 {
            let e = &mut self.code[(user * FETCH) | page & (FETCH - 1)];
            if e.tag == linear & !0xfff {
                *e = Code { listed: true, ..NO_CODE };
            }
        }
    }
}
