//! Translation of linear addresses, and accesses to memory by them.

use std::sync::Mutex;

use machine::Gpa;
use memory::{Kind, Memory};
use x86::control::{cr0, cr4};
use x86::exception::vector;
use x86::paging::{self, Access, Page, Paging, Tables};
use x86::segment::{attr, index};
use x86::{Exception, flags};

use crate::core::{Core, attention};
use crate::op::{Flow, Op, Result, slot};
use crate::tlb::Tlb;
use crate::word::Word;

/// Page tables in guest memory.
struct InMemory<'a>(&'a Memory);

impl Tables for InMemory<'_> {
    fn read(&mut self, gpa: u64, size: u8) -> u64 {
        match self.0.offset(gpa) {
            Some(offset) if size == 4 => self.0.load::<u32>(offset).into(),
            Some(offset) => self.0.load(offset),
            None => u64::MAX >> (64 - 8 * u32::from(size.min(8))),
        }
    }

    fn update(&mut self, gpa: u64, size: u8, old: u64, new: u64) -> bool {
        match self.0.region(gpa) {
            Some(r) if r.kind == Kind::Ram => {
                let offset = gpa - r.gpa + r.offset;
                if size == 4 {
                    self.0.compare_exchange(offset, old as u32, new as u32).is_ok()
                } else {
                    self.0.compare_exchange(offset, old, new).is_ok()
                }
            }
            _ => true,
        }
    }
}

/// Held during locked accesses that cross a page, which the host cannot do atomically.
static SPLIT_LOCK: Mutex<()> = Mutex::new(());

/// Where an access that the TLB could not serve ends up, a page at a time.
#[derive(Clone, Copy, Debug)]
enum Target {
    Ram(u64),
    /// Its bytes are in guest memory; stores go to the device at this address, if there is one (a flash chip).
    Rom(u64, Gpa),
    Device(Gpa),
}

/// A page as [`Core::map`] finds it.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    /// Of the 4 KiB around the address, in guest memory.
    pub offset: u64,
    /// Stores are allowed, and need not be noted in the page tables any more.
    pub writable: bool,
    /// The translation outlives a change of the address space.
    pub global: bool,
    /// Of the page in the guest's tables: 12, 21, 22 or 30.
    pub shift: u8,
}

/// An operand in memory, ready to be read and written without a fault.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    first: Target,
    /// The rest of an operand that crosses a page, and how many bytes lie before it.
    second: Option<(Target, u64)>,
}

impl Place {
    /// Offset in guest memory, if the operand lies in one page of RAM.
    pub fn ram(&self) -> Option<u64> {
        match (self.first, self.second) {
            (Target::Ram(offset), None) => Some(offset),
            _ => None,
        }
    }
}

/// Whether a linear address is canonical with 48 bits.
#[inline]
pub fn canonical(linear: u64) -> bool {
    ((linear as i64) << 16 >> 16) as u64 == linear
}

impl Core {
    /// What decides about translation now.
    pub fn paging(&self) -> Paging {
        Paging {
            cr0: self.s.cr0,
            cr3: self.s.cr3,
            cr4: self.s.cr4,
            efer: self.s.efer,
            pdpte: self.pdpte,
            physical_bits: x86::cpuid::PHYSICAL_BITS as u8,
        }
    }

    fn walk(&mut self, linear: u64, access: Access) -> Result<Page> {
        let paging = self.paging();
        match paging::walk(&paging, &mut InMemory(&self.memory), linear, access) {
            Ok(page) => Ok(page),
            Err(code) => self.raise(Exception::page_fault(linear, code)),
        }
    }

    /// Where `linear` lies, without any effect.
    pub fn peek(&self, linear: u64) -> Option<Gpa> {
        let access = Access { peek: true, smap_off: true, ..Access::default() };
        let page = paging::walk(&self.paging(), &mut InMemory(&self.memory), linear, access).ok()?;
        Some(page.gpa | linear & 0xfff)
    }

    /// Reads the four PDPTEs that CR3 points to.
    fn read_pdptes(&self) -> [u64; 4] {
        let table = self.s.cr3 & 0xffff_ffe0;
        let mut tables = InMemory(&self.memory);
        std::array::from_fn(|i| tables.read(table + 8 * i as u64, 8))
    }

    fn uses_pdptes(&self) -> bool {
        self.s.cr0 & cr0::PG != 0 && self.s.cr4 & cr4::PAE != 0 && !self.long()
    }

    /// Loads the PDPTEs, as taking over a state does.
    pub fn load_pdptes_quietly(&mut self) {
        if self.uses_pdptes() {
            self.pdpte = self.read_pdptes();
        }
    }

    /// Loads the PDPTEs, as MOV to CR3 and changes of paging do.
    pub fn load_pdptes(&mut self) -> Result<()> {
        if self.uses_pdptes() {
            let entries = self.read_pdptes();
            let paging = self.paging();
            if entries.iter().any(|&e| paging.pdpte_reserved(e)) {
                return self.gp();
            }
            self.pdpte = entries;
        }
        Ok(())
    }

    fn target(&self, gpa: Gpa) -> Target {
        match self.memory.region(gpa) {
            Some(r) if r.kind == Kind::Ram => Target::Ram(gpa - r.gpa + r.offset),
            Some(r) => Target::Rom(gpa - r.gpa + r.offset, gpa),
            None => Target::Device(gpa),
        }
    }

    /// Translates for an access with the rights of `bank`, and fills the TLB.
    fn translate(&mut self, linear: u64, write: bool, bank: usize) -> Result<Target> {
        let e = self.tlb.entry(bank, linear);
        if (if write { e.write } else { e.read }) == linear & !0xfff {
            return Ok(Target::Ram(e.offset | linear & 0xfff));
        }
        self.count.tlb_misses += 1;
        let access = Access {
            write,
            fetch: false,
            user: bank == Tlb::USER || bank == Tlb::USER_ALIGNED,
            smap_off: bank == Tlb::SYSTEM_AC,
            peek: false,
        };
        let page = self.walk(linear, access)?;
        let target = self.target(page.gpa);
        let (offset, writable) = match target {
            Target::Ram(offset) => (offset, page.writable),
            Target::Rom(offset, _) => (offset, false),
            Target::Device(_) => return Ok(at(target, linear)),
        };
        if bank != Tlb::USER_ALIGNED && !(self.watched && self.page_watched(linear)) {
            self.tlb.fill(bank, linear, offset, writable, page.global, page.shift);
        }
        Ok(at(target, linear))
    }

    /// Where the page of `linear` lies, for an access with the rights of `bank`: for engines with page tables of their own.
    /// `None` if it is a device, or wants to be looked at closely each time.
    ///
    /// # Errors
    /// The access faults.
    pub fn map(&mut self, linear: u64, write: bool, bank: usize) -> Result<Option<Mapping>> {
        self.check_linear(linear, 1, index::DS as u8)?;
        let access = Access {
            write,
            fetch: false,
            user: bank == Tlb::USER || bank == Tlb::USER_ALIGNED,
            smap_off: bank == Tlb::SYSTEM_AC,
            peek: false,
        };
        let page = self.walk(linear, access)?;
        let close = bank == Tlb::USER_ALIGNED || self.watched && self.page_watched(linear);
        let (offset, writable) = match self.target(page.gpa) {
            Target::Ram(offset) => (offset, page.writable),
            Target::Rom(offset, _) => (offset, false),
            Target::Device(_) => return Ok(None),
        };
        let mapping = Mapping { offset: offset & !0xfff, writable, global: page.global, shift: page.shift };
        Ok((!close).then_some(mapping))
    }

    fn check_linear(&mut self, linear: u64, size: u64, segment: u8) -> Result<()> {
        let last = linear.wrapping_add(size - 1);
        if self.bits == 64 && !(canonical(linear) && canonical(last)) {
            let e = if usize::from(segment) == index::SS { Exception::SS0 } else { Exception::GP0 };
            return self.raise(e);
        }
        Ok(())
    }

    /// Makes sure that `size` bytes (at most 64) at `linear` can be accessed with the rights of `bank`.
    #[cold]
    #[inline(never)]
    pub fn place(&mut self, linear: u64, size: u64, write: bool, segment: u8, bank: usize) -> Result<Place> {
        self.check_linear(linear, size, segment)?;
        let mask = if self.long() { u64::MAX } else { 0xffff_ffff };
        let linear = linear & mask;
        if bank == Tlb::USER_ALIGNED && size <= 8 && linear & (size - 1) != 0 {
            return self.raise(Exception::with_code(vector::AC, 0));
        }
        let room = 0x1000 - (linear & 0xfff);
        let first = self.translate(linear, write, bank)?;
        let second = if size > room {
            Some((self.translate(linear.wrapping_add(room) & mask, write, bank)?, room))
        } else {
            None
        };
        if self.watched {
            self.check_watch(linear, size, write);
        }
        Ok(Place { first, second })
    }

    fn target_read(&mut self, target: Target, size: u64) -> u64 {
        match (target, size) {
            (Target::Ram(o) | Target::Rom(o, _), 8) => self.memory.load(o),
            (Target::Ram(o) | Target::Rom(o, _), 4) => self.memory.load::<u32>(o).into(),
            (Target::Ram(o) | Target::Rom(o, _), 2) => self.memory.load::<u16>(o).into(),
            (Target::Ram(o) | Target::Rom(o, _), 1) => self.memory.load::<u8>(o).into(),
            (Target::Device(gpa), 1 | 2 | 4 | 8) => self.device_read(gpa, size as u8),
            _ => (0..size.min(8)).fold(0, |v, i| v | self.target_read(step(target, i), 1) << (8 * i)),
        }
    }

    fn target_write(&mut self, target: Target, size: u64, value: u64) {
        match (target, size) {
            (Target::Ram(o), 8) => self.hit |= self.memory.store(o, value),
            (Target::Ram(o), 4) => self.hit |= self.memory.store(o, value as u32),
            (Target::Ram(o), 2) => self.hit |= self.memory.store(o, value as u16),
            (Target::Ram(o), 1) => self.hit |= self.memory.store(o, value as u8),
            (Target::Rom(_, gpa) | Target::Device(gpa), 1 | 2 | 4 | 8) => {
                self.device_write(gpa, size as u8, value)
            }
            _ => (0..size.min(8)).for_each(|i| self.target_write(step(target, i), 1, value >> (8 * i))),
        }
    }

    /// Reads a place that `size` bytes were made sure of; at most 8.
    pub fn place_read(&mut self, place: &Place, size: u64) -> u64 {
        match place.second {
            None => self.target_read(place.first, size),
            Some((second, room)) => {
                let low = self.target_read(place.first, room);
                low | self.target_read(second, size - room) << (8 * room)
            }
        }
    }

    /// Writes a place that `size` bytes were made sure of; at most 8.
    pub fn place_write(&mut self, place: &Place, size: u64, value: u64) {
        match place.second {
            None => self.target_write(place.first, size, value),
            Some((second, room)) => {
                self.target_write(place.first, room, value);
                self.target_write(second, size - room, value >> (8 * room));
            }
        }
    }

    /// Reads bytes of a place, in pieces of eight where they lie so.
    pub fn place_read_bytes(&mut self, place: &Place, to: &mut [u8]) {
        self.bytes(place, to.len() as u64, |c, target, at, n| {
            let v = c.target_read(target, n).to_le_bytes();
            to[at..at + n as usize].copy_from_slice(&v[..n as usize]);
        });
    }

    /// Writes bytes of a place.
    pub fn place_write_bytes(&mut self, place: &Place, from: &[u8]) {
        self.bytes(place, from.len() as u64, |c, target, at, n| {
            let mut v = [0; 8];
            v[..n as usize].copy_from_slice(&from[at..at + n as usize]);
            c.target_write(target, n, u64::from_le_bytes(v));
        });
    }

    fn bytes(&mut self, place: &Place, len: u64, mut f: impl FnMut(&mut Self, Target, usize, u64)) {
        let room = place.second.map_or(len, |(_, room)| room);
        let mut at = 0;
        while at < len {
            let (target, left) = match place.second {
                Some((second, room)) if at >= room => (step(second, at - room), len - at),
                _ => (step(place.first, at), room - at),
            };
            let n = [8, 4, 2, 1].into_iter().find(|&n| n <= left).unwrap_or(1);
            f(self, target, at as usize, n);
            at += n;
        }
    }

    /// Reads bytes at a linear address (at most 64) with the current rights.
    pub fn read_bytes(&mut self, linear: u64, segment: u8, to: &mut [u8]) -> Result<()> {
        let place = self.place(linear, to.len() as u64, false, segment, self.bank)?;
        self.place_read_bytes(&place, to);
        Ok(())
    }

    /// Whether the registers of this processor's APIC are at `gpa`: enabled, and not in x2APIC mode.
    fn is_local_apic(&self, gpa: Gpa) -> bool {
        const MODE: u64 = 3 << 10;
        const ENABLED: u64 = 1 << 11;
        let base = self.local.base();
        base & MODE == ENABLED && gpa & !0xfff == base & x86::paging::entry::ADDRESS
    }

    #[cold]
    fn device_read(&mut self, gpa: Gpa, size: u8) -> u64 {
        self.count.mmio += 1;
        if self.is_local_apic(gpa) {
            let value = self.local.read((gpa & 0xffc) as u16);
            return u64::from(value >> (8 * (gpa & 3))) & (u64::MAX >> (64 - 8 * u32::from(size)));
        }
        self.machine.mmio.read(gpa, size)
    }

    #[cold]
    fn device_write(&mut self, gpa: Gpa, size: u8, value: u64) {
        self.count.mmio += 1;
        if self.is_local_apic(gpa) {
            return self.local.write((gpa & 0xffc) as u16, value as u32);
        }
        self.machine.mmio.write(gpa, size, value);
        self.look_at_map();
    }

    /// To be called after a write to a device, which may have changed where memory is.
    #[inline]
    pub fn look_at_map(&mut self) {
        if !self.keeper.is_current() {
            self.forget_map();
            // Others are waited for when nothing is held: between two instructions.
            self.attend(attention::MAP, true);
        }
    }

    /// Forgets where memory was.
    #[cold]
    pub fn forget_map(&mut self) {
        self.tlb.flush_all();
        self.context_changed();
    }

    /// Loads from a linear address with the current rights.
    #[inline(always)]
    pub fn read<T: Word>(&mut self, linear: u64, segment: u8) -> Result<T> {
        let e = self.tlb.entry(self.bank, linear);
        if e.read == linear.wrapping_add(T::SIZE - 1) & !0xfff {
            Ok(self.memory.load(e.offset | linear & 0xfff))
        } else {
            self.read_slow(linear, T::SIZE, segment).map(T::of)
        }
    }

    #[cold]
    #[inline(never)]
    fn read_slow(&mut self, linear: u64, size: u64, segment: u8) -> Result<u64> {
        let place = self.place(linear, size, false, segment, self.bank)?;
        Ok(self.place_read(&place, size))
    }

    /// Stores to a linear address with the current rights.
    #[inline(always)]
    pub fn write<T: Word>(&mut self, linear: u64, segment: u8, value: T) -> Result<Flow> {
        let e = self.tlb.entry(self.bank, linear);
        if e.write == linear.wrapping_add(T::SIZE - 1) & !0xfff {
            if self.memory.store(e.offset | linear & 0xfff, value) {
                self.hit = true;
                return Ok(Flow::End);
            }
            Ok(Flow::Next)
        } else {
            self.write_slow(linear, T::SIZE, segment, value.u())
        }
    }

    #[cold]
    #[inline(never)]
    fn write_slow(&mut self, linear: u64, size: u64, segment: u8, value: u64) -> Result<Flow> {
        let place = self.place(linear, size, true, segment, self.bank)?;
        self.place_write(&place, size, value);
        Ok(if self.attention != 0 || self.hit { Flow::End } else { Flow::Next })
    }

    /// Reads, changes and writes an operand. `f` may be called again, with flags as they were, if `lock`.
    #[inline(always)]
    pub fn modify<T: Word>(
        &mut self,
        linear: u64,
        segment: u8,
        lock: bool,
        f: impl Fn(&mut Self, T) -> T,
    ) -> Result<Flow> {
        let e = self.tlb.entry(self.bank, linear);
        let offset = if e.write == linear.wrapping_add(T::SIZE - 1) & !0xfff {
            e.offset | linear & 0xfff
        } else {
            let place = self.place(linear, T::SIZE, true, segment, self.bank)?;
            match place.ram() {
                Some(offset) => offset,
                None => {
                    let _guard = lock.then(|| SPLIT_LOCK.lock());
                    let old = T::of(self.place_read(&place, T::SIZE));
                    let new = f(self, old);
                    self.place_write(&place, T::SIZE, new.u());
                    return Ok(Flow::End);
                }
            }
        };
        let hit = if lock {
            let lazy = self.lazy;
            let mut old: T = self.memory.load(offset);
            loop {
                self.lazy = lazy;
                let new = f(self, old);
                match self.memory.compare_exchange(offset, old, new) {
                    Ok(hit) => break hit,
                    Err(found) => old = found,
                }
            }
        } else {
            let old = self.memory.load(offset);
            let new = f(self, old);
            self.memory.store(offset, new)
        };
        if hit {
            self.hit = true;
            return Ok(Flow::End);
        }
        Ok(Flow::Next)
    }

    /// Reads with supervisor rights, as the processor does for descriptor tables and TSSs.
    pub fn read_system<T: Word>(&mut self, linear: u64) -> Result<T> {
        let place = self.system_place(linear, T::SIZE, false)?;
        Ok(T::of(self.place_read(&place, T::SIZE)))
    }

    /// Writes with supervisor rights.
    pub fn write_system<T: Word>(&mut self, linear: u64, value: T) -> Result<()> {
        let place = self.system_place(linear, T::SIZE, true)?;
        self.place_write(&place, T::SIZE, value.u());
        Ok(())
    }

    /// Makes sure that a supervisor access will not fault.
    pub fn system_place(&mut self, linear: u64, size: u64, write: bool) -> Result<Place> {
        let bank = if self.s.cr4 & cr4::SMAP == 0 { Tlb::SYSTEM_AC } else { Tlb::SYSTEM };
        let mask = if self.long() { u64::MAX } else { 0xffff_ffff };
        let linear = linear & mask;
        if self.long() && !canonical(linear) {
            return self.gp();
        }
        self.place(linear, size, write, index::DS as u8, bank)
    }

    /// Offset in guest memory of the instruction at `linear`; `None` if a device is there.
    pub fn fetch(&mut self, linear: u64) -> Result<Option<u64>> {
        let user = self.cpl == 3;
        if let Some(offset) = self.tlb.fetch(user, linear) {
            return Ok(Some(offset));
        }
        if self.bits == 64 && !canonical(linear) {
            return self.gp();
        }
        self.count.tlb_misses += 1;
        let page = self.walk(linear, Access { fetch: true, user, ..Access::default() })?;
        match self.target(page.gpa) {
            Target::Device(_) => Ok(None),
            Target::Ram(offset) | Target::Rom(offset, _) => {
                self.tlb.fill_code(user, linear, offset, page.global, page.shift);
                Ok(Some(offset | linear & 0xfff))
            }
        }
    }

    /// The linear address of an op's memory operand of `size` bytes.
    #[inline(always)]
    pub fn operand(&mut self, op: &Op, size: u64, write: bool) -> Result<u64> {
        if op.flat {
            let index = self.r[usize::from(op.index & 31)] << (op.scale & 3);
            let base = self.r[usize::from(op.base & 31)].wrapping_add(self.r[usize::from(op.seg_slot & 31)]);
            Ok(base.wrapping_add(index).wrapping_add(op.disp))
        } else {
            let offset = self.effective(op);
            self.linear(op.segment, offset, size, write)
        }
    }

    /// The effective address (offset in the segment) of an op's memory operand.
    #[inline(always)]
    pub fn effective(&self, op: &Op) -> u64 {
        let index = self.r[usize::from(op.index & 31)] << (op.scale & 3);
        let sum = self.r[usize::from(op.base & 31)].wrapping_add(index).wrapping_add(op.disp);
        match op.address_size {
            8 => sum,
            4 => sum & 0xffff_ffff,
            _ => sum & 0xffff,
        }
    }

    /// The linear address of `size` bytes at `offset` in a segment, checked as the mode wants it.
    #[inline]
    pub fn linear(&mut self, segment: u8, offset: u64, size: u64, write: bool) -> Result<u64> {
        let n = usize::from(segment);
        if self.bits == 64 {
            let base = match n {
                index::FS => self.r[usize::from(slot::FS)],
                index::GS => self.r[usize::from(slot::GS)],
                _ => 0,
            };
            return Ok(base.wrapping_add(offset));
        }
        let flat = self.flat >> (n + if write { 8 } else { 0 }) & 1 != 0;
        if flat && offset.wrapping_add(size - 1) <= 0xffff_ffff {
            return Ok(offset);
        }
        self.linear_checked(n, offset, size, write)
    }

    #[cold]
    fn linear_checked(&mut self, n: usize, offset: u64, size: u64, write: bool) -> Result<u64> {
        let s = self.s.segments[n % 6];
        let code = s.has(attr::CODE);
        let rights = if !self.protected() {
            true
        } else if write {
            !code && s.has(attr::RW)
        } else {
            !code || s.has(attr::RW)
        };
        let last = offset.saturating_add(size - 1);
        let inside = if !code && s.has(attr::DC) {
            let top = if s.has(attr::DB) { 0xffff_ffff } else { 0xffff };
            offset > s.limit.into() && last <= top
        } else {
            last <= s.limit.into()
        };
        if !(s.usable() && rights && inside) {
            let e = if n == index::SS { Exception::SS0 } else { Exception::GP0 };
            return self.raise(e);
        }
        Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Loads an op's memory operand.
    #[inline(always)]
    pub fn load<T: Word>(&mut self, op: &Op) -> Result<T> {
        let linear = self.operand(op, T::SIZE, false)?;
        self.read(linear, op.segment)
    }

    /// Stores to an op's memory operand.
    #[inline(always)]
    pub fn store<T: Word>(&mut self, op: &Op, value: T) -> Result<Flow> {
        let linear = self.operand(op, T::SIZE, true)?;
        self.write(linear, op.segment, value)
    }

    /// Reads the operand that is register `reg` or, with `M`, in memory.
    #[inline(always)]
    pub fn get_rm<T: Word, const M: bool>(&mut self, op: &Op, reg: u8) -> Result<T> {
        if M { self.load(op) } else { Ok(T::get(self, reg)) }
    }

    /// Changes the first operand, a register or, with `M`, in memory.
    #[inline(always)]
    pub fn modify_rm<T: Word, const M: bool>(
        &mut self,
        op: &Op,
        f: impl Fn(&mut Self, T) -> T,
    ) -> Result<Flow> {
        if M {
            let linear = self.operand(op, T::SIZE, true)?;
            self.modify(linear, op.segment, op.lock, f)
        } else {
            let old = T::get(self, op.dst);
            let new = f(self, old);
            T::set(self, op.dst, new);
            Ok(Flow::Next)
        }
    }

    /// Writes the first operand, a register or, with `M`, in memory.
    #[inline(always)]
    pub fn set_rm<T: Word, const M: bool>(&mut self, op: &Op, value: T) -> Result<Flow> {
        if M {
            self.store(op, value)
        } else {
            T::set(self, op.dst, value);
            Ok(Flow::Next)
        }
    }

    /// RFLAGS.AC, for SMAP.
    pub fn set_ac(&mut self, on: bool) {
        self.rflags = self.rflags & !flags::AC | if on { flags::AC } else { 0 };
        self.rights_changed();
    }
}

fn at(target: Target, linear: u64) -> Target {
    step(target, linear & 0xfff)
}

fn step(target: Target, by: u64) -> Target {
    match target {
        Target::Ram(o) => Target::Ram(o.wrapping_add(by)),
        Target::Rom(o, g) => Target::Rom(o.wrapping_add(by), g.wrapping_add(by)),
        Target::Device(g) => Target::Device(g.wrapping_add(by)),
    }
}
