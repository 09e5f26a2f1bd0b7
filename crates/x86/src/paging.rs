//! Page tables and their walk: 32-bit, PAE and 4-level paging (SDM vol. 3A, chapter 4).

use crate::control::{cr0, cr4, efer};
use crate::exception::pf;

/// Bits of a page-table entry.
pub mod entry {
    #![allow(missing_docs)]
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    /// In a directory entry: maps a page, not a table.
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
    /// Bits that hold a physical address in an 8-byte entry.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// Physical memory as the walker sees it.
pub trait Tables {
    /// Reads an entry of `size` (4 or 8) bytes.
    fn read(&mut self, gpa: u64, size: u8) -> u64;

    /// Atomically replaces `old` by `new`; false if something else was there by then.
    fn update(&mut self, gpa: u64, size: u8, old: u64, new: u64) -> bool;
}

/// What of the control registers decides about translation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Paging {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// The four page-directory-pointer-table entries that a load of CR3 read, with PAE paging outside long mode.
    pub pdpte: [u64; 4],
    /// Width of a physical address in bits.
    pub physical_bits: u8,
}

/// What an access wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Stores.
    pub write: bool,
    /// Fetches an instruction.
    pub fetch: bool,
    /// Comes from CPL 3 and is no implicit supervisor access.
    pub user: bool,
    /// A supervisor access that SMAP lets through (EFLAGS.AC set, and explicit).
    pub smap_off: bool,
    /// Do not set accessed and dirty bits: somebody only wants to know.
    pub peek: bool,
}

/// A translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Physical address of the 4 KiB page.
    pub gpa: u64,
    /// A store with the same rights would be let through, and sets no bit in the tables.
    pub writable: bool,
    /// Survives a load of CR3.
    pub global: bool,
    /// Bytes that the leaf maps, as a power of two: 12, 21, 22 or 30; 0 without paging.
    pub shift: u8,
}

impl Paging {
    fn pae(&self) -> bool {
        self.cr4 & cr4::PAE != 0
    }

    fn long(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// Bits that must be zero in 8-byte entries.
    fn reserved(&self) -> u64 {
        let high = entry::ADDRESS & !((1u64 << self.physical_bits) - 1);
        let nx = if self.efer & efer::NXE == 0 { entry::NX } else { 0 };
        // Outside long mode, bits 52 to 62 are reserved; inside they are ignored.
        let ignored = if self.long() { 0 } else { 0x7ff0_0000_0000_0000 };
        high | nx | ignored
    }

    /// Whether the PDPTE, as loaded by MOV to CR3 with PAE paging, has reserved bits set.
    pub fn pdpte_reserved(&self, entry: u64) -> bool {
        entry & entry::P != 0 && entry & (!((1u64 << self.physical_bits) - 1) | 0x1e6) != 0
    }
}

/// A leaf on the way to being judged.
struct Leaf {
    gpa: u64,
    entry: u64,
    size: u8,
    shift: u8,
    /// Physical address that the leaf maps.
    base: u64,
    /// R/W and U/S, and-ed over all levels; NX or-ed.
    rights: u64,
}

/// Translates `linear`.
///
/// # Errors
/// The bits of a page fault's error code.
pub fn walk(p: &Paging, tables: &mut impl Tables, linear: u64, access: Access) -> Result<Page, u32> {
    if p.cr0 & cr0::PG == 0 {
        return Ok(Page { gpa: linear & !0xfff, writable: true, global: false, shift: 0 });
    }
    loop {
        // A table entry changed under the walk: walk again.
        if let Some(result) = attempt(p, tables, linear, access) {
            return result;
        }
    }
}

fn code(p: &Paging, access: Access, extra: u32) -> u32 {
    let nx_matters = p.cr4 & cr4::SMEP != 0 || (p.efer & efer::NXE != 0 && p.pae());
    extra
        | if access.write { pf::WRITE } else { 0 }
        | if access.user { pf::USER } else { 0 }
        | if access.fetch && nx_matters { pf::FETCH } else { 0 }
}

fn attempt(p: &Paging, tables: &mut impl Tables, linear: u64, access: Access) -> Option<Result<Page, u32>> {
    let leaf = match find(p, tables, linear, access)? {
        Ok(leaf) => leaf,
        Err(e) => return Some(Err(e)),
    };
    let user_page = leaf.rights & entry::U != 0;
    let write_right = leaf.rights & entry::W != 0;
    let may_write = if access.user { write_right && user_page } else { write_right || p.cr0 & cr0::WP == 0 };
    let nx = leaf.rights & entry::NX != 0;
    let smep = !access.user && user_page && p.cr4 & cr4::SMEP != 0;
    let smap = !access.user && user_page && !access.fetch && p.cr4 & cr4::SMAP != 0 && !access.smap_off;
    let denied =
        (access.user && !user_page) || (access.write && !may_write) || (access.fetch && (nx || smep)) || smap;
    if denied {
        return Some(Err(code(p, access, pf::P)));
    }
    let mut want = leaf.entry | entry::A;
    if access.write {
        want |= entry::D;
    }
    if want != leaf.entry && !access.peek && !tables.update(leaf.gpa, leaf.size, leaf.entry, want) {
        return None;
    }
    let within = linear & ((1u64 << leaf.shift) - 1) & !0xfff;
    Some(Ok(Page {
        gpa: leaf.base + within,
        writable: may_write && want & entry::D != 0,
        global: leaf.entry & entry::G != 0 && p.cr4 & cr4::PGE != 0,
        shift: leaf.shift,
    }))
}

/// Walks to the leaf, setting accessed bits on the way. `None`: try again.
fn find(p: &Paging, tables: &mut impl Tables, linear: u64, access: Access) -> Option<Result<Leaf, u32>> {
    if !p.pae() {
        return find_32(p, tables, linear, access);
    }
    let reserved = p.reserved();
    let mut rights = entry::W | entry::U;
    let (mut table, mut level) = if p.long() {
        (p.cr3 & entry::ADDRESS, 4)
    } else {
        let pdpte = p.pdpte[(linear >> 30) as usize & 3];
        if pdpte & entry::P == 0 {
            return Some(Err(code(p, access, 0)));
        }
        (pdpte & entry::ADDRESS, 2)
    };
    loop {
        let shift = 12 + 9 * (level - 1);
        let gpa = table + ((linear >> shift) & 0x1ff) * 8;
        let e = tables.read(gpa, 8);
        if e & entry::P == 0 {
            return Some(Err(code(p, access, 0)));
        }
        let is_leaf = level == 1 || (e & entry::PS != 0 && level < 4);
        let mut bad = e & reserved != 0 || (level == 4 && e & entry::PS != 0);
        if is_leaf && level > 1 {
            // Bit 12 of a large page's entry is PAT.
            bad |= e & ((1u64 << shift) - 1) & !0x1fff != 0;
        }
        if bad {
            return Some(Err(code(p, access, pf::P | pf::RESERVED)));
        }
        rights = (rights & (e | entry::NX)) | (e & entry::NX);
        if is_leaf {
            let base = e & entry::ADDRESS & !((1u64 << shift) - 1);
            return Some(Ok(Leaf { gpa, entry: e, size: 8, shift: shift as u8, base, rights }));
        }
        if e & entry::A == 0 && !access.peek && !tables.update(gpa, 8, e, e | entry::A) {
            return None;
        }
        table = e & entry::ADDRESS;
        level -= 1;
    }
}

fn find_32(p: &Paging, tables: &mut impl Tables, linear: u64, access: Access) -> Option<Result<Leaf, u32>> {
    let linear = linear & 0xffff_ffff;
    let gpa = (p.cr3 & 0xffff_f000) + (linear >> 22) * 4;
    let e = tables.read(gpa, 4);
    if e & entry::P == 0 {
        return Some(Err(code(p, access, 0)));
    }
    let rights = e & (entry::W | entry::U);
    if e & entry::PS != 0 && p.cr4 & cr4::PSE != 0 {
        // PSE-36: bits 13 to 20 are bits 32 to 39 of the address.
        let base = (e & 0xffc0_0000) | ((e >> 13 & 0xff) << 32);
        if e & (1 << 21) != 0 || base >> p.physical_bits != 0 {
            return Some(Err(code(p, access, pf::P | pf::RESERVED)));
        }
        return Some(Ok(Leaf { gpa, entry: e, size: 4, shift: 22, base, rights }));
    }
    if e & entry::A == 0 && !access.peek && !tables.update(gpa, 4, e, e | entry::A) {
        return None;
    }
    let gpa = (e & 0xffff_f000) + ((linear >> 12) & 0x3ff) * 4;
    let e = tables.read(gpa, 4);
    if e & entry::P == 0 {
        return Some(Err(code(p, access, 0)));
    }
    let rights = rights & e;
    Some(Ok(Leaf { gpa, entry: e, size: 4, shift: 12, base: e & 0xffff_f000, rights }))
}
