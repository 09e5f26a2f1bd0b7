//! The block of host memory, and the ways into it.

use std::arch::asm;
use std::ffi::CStr;
use std::fmt;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::guest::{Guest, Tracker};
use crate::plugs::{Pluggable, Plugs};
use crate::windows::{Keeper, Window, Windows};
use crate::{Alias, CodeMap, Gpa, Kind, PAGE_SIZE, PLUG_ALIGN, PLUG_MOST, Region, layout, plug_start};

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A size that is no multiple of the page size, or under 1 MiB.
    #[error("{0} bytes is no size for a guest's memory; give a multiple of 4 KiB, at least 1 MiB")]
    Size(u64),
    /// The host refused.
    #[error("the host did not give {0} MiB of memory to the guest: {1}; ask for less with --memory")]
    Host(u64, std::io::Error),
    /// The regions do not go together.
    #[error("the guest's memory regions cannot be laid out: {0}")]
    Layout(String),
}

/// A guest's memory. Clones share the same bytes.
#[derive(Clone)]
pub struct Memory(Arc<Inner>);

struct Inner {
    block: Block,
    regions: Vec<Region>,
    guest: Guest,
    code: Arc<CodeMap>,
    windows: Windows,
    plugs: Arc<Plugs>,
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("regions", &self.0.regions).finish_non_exhaustive()
    }
}

/// A region as KVM wants it.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// Where it is in the guest, and what.
    pub region: Region,
    /// Where it is in this process.
    pub host: *mut u8,
}

/// An integer that guest memory can be read and written as: `u8`, `u16`, `u32`, `u64` or `u128`.
pub trait Int: Copy + Eq + private::Sealed + 'static {}

mod private {
    pub trait Sealed: Sized {
        /// Atomically replaces `*p`, at any alignment (16 for `u128`), if it equals `old`; the value that was there.
        ///
        /// # Safety
        /// `p` is valid for reads and writes of `Self`, and all other accesses to it are volatile or atomic.
        unsafe fn cmpxchg(p: *mut Self, old: Self, new: Self) -> Self;
    }
}

macro_rules! int {
    ($($t:ty, $reg:ident, $form:literal, $acc:tt);*) => {$(
        impl Int for $t {}
        impl private::Sealed for $t {
            #[inline]
            unsafe fn cmpxchg(p: *mut Self, old: Self, new: Self) -> Self {
                let found: Self;
                // SAFETY: by the caller's promise; LOCK CMPXCHG is atomic at every alignment, which Rust's atomics are not.
                unsafe {
                    asm!(concat!("lock cmpxchg [{p}], {new", $form, "}"), p = in(reg) p, new = in($reg) new,
                         inout($acc) old => found, options(nostack));
                }
                found
            }
        }
    )*};
}
int!(u8, reg_byte, "", "al"; u16, reg, ":x", "ax"; u32, reg, ":e", "eax"; u64, reg, ":r", "rax");

impl Int for u128 {}
impl private::Sealed for u128 {
    #[inline]
    unsafe fn cmpxchg(p: *mut Self, old: Self, new: Self) -> Self {
        let (low, high): (u64, u64);
        // SAFETY: by the caller's promise. RBX is LLVM's: it is swapped in and out, and all operands have registers by name,
        // for LLVM may give RBX to one that has not. Every x86-64 processor since 2006 has the instruction.
        unsafe {
            asm!("xchg rsi, rbx", "lock cmpxchg16b [rdi]", "mov rbx, rsi",
                 in("rdi") p, inout("rsi") new as u64 => _, in("rcx") (new >> 64) as u64,
                 inout("rax") old as u64 => low, inout("rdx") (old >> 64) as u64 => high, options(nostack));
        }
        (high as u128) << 64 | low as u128
    }
}

#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T: Copy>(T);

/// The mapping itself.
struct Block {
    base: NonNull<u8>,
    len: u64,
    file: File,
}

// SAFETY: the mapping is shared memory, reached by raw pointers with volatile and atomic accesses alone.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

/// A file of `len` bytes that has no name, and takes memory when it is touched.
pub(crate) fn memfd(name: &CStr, len: u64) -> std::io::Result<File> {
    // SAFETY: the name is a C string; the result is checked before it is owned.
    let file = unsafe {
        let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        File::from(OwnedFd::from_raw_fd(fd))
    };
    file.set_len(len)?;
    Ok(file)
}

impl Block {
    fn new(len: u64) -> std::io::Result<Self> {
        let file = memfd(c"lodge-guest", len)?;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses, of a file that we own.
        let base = unsafe { libc::mmap(ptr::null_mut(), len as usize, prot, flags, file.as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: advice about our own mapping. Guests' memory in core dumps helps nobody and fills disks.
        unsafe { libc::madvise(base, len as usize, libc::MADV_DONTDUMP) };
        let base = NonNull::new(base.cast()).ok_or_else(|| std::io::Error::other("mapped at address 0"))?;
        Ok(Self { base, len, file })
    }
}

impl Block {
    /// Frees whole pages of the file, and with them of every mapping. Tells whether the host did.
    fn punch(&self, offset: u64, len: u64) -> bool {
        let (Ok(offset), Ok(len)) = (offset.try_into(), len.try_into()) else { return false };
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: an operation on a file that we own; its mappings stay, and are only reached by raw pointers with volatile and
        // atomic accesses, to which zeroes are as good as any bytes.
        unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) == 0 }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: our own mapping, to which no reference or region outlives `Inner`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len as usize) };
    }
}

impl Memory {
    /// Memory with `ram` bytes of RAM and `rom` bytes of firmware space below 4 GiB, laid out by [`layout`]. Host memory is
    /// taken when it is touched.
    ///
    /// # Errors
    /// Sizes that are no multiple of the page size, or a host that refuses.
    pub fn new(ram: u64, rom: u64) -> Result<Self, Error> {
        Self::with_windows(ram, rom, []).map(|(memory, [])| memory)
    }

    /// As [`Memory::new`], with [`Window`]s of these sizes: multiples of the page size, none of more than 1 GiB; 0 for one
    /// that is not wanted.
    ///
    /// # Errors
    /// As [`Memory::new`].
    pub fn with_windows<const N: usize>(
        ram: u64,
        rom: u64,
        sizes: [u64; N],
    ) -> Result<(Self, [Window; N]), Error> {
        Self::with_pluggable(ram, rom, sizes, 0)
    }

    /// As [`Memory::with_windows`], with so many bytes of [`Pluggable`] memory, a multiple of [`PLUG_ALIGN`] and at most
    /// [`PLUG_MOST`], from [`plug_start`] on.
    ///
    /// # Errors
    /// As [`Memory::new`].
    pub fn with_pluggable<const N: usize>(
        ram: u64,
        rom: u64,
        sizes: [u64; N],
        pluggable: u64,
    ) -> Result<(Self, [Window; N]), Error> {
        let whole = |size: u64| size.is_multiple_of(PAGE_SIZE) && size < 1 << 46;
        if ram < 1 << 20 || !whole(ram) || !whole(rom) || rom > 16 << 20 {
            return Err(Error::Size(ram));
        }
        if let Some(&size) = sizes.iter().find(|&&size| !whole(size) || size > 1 << 30) {
            return Err(Error::Size(size));
        }
        if pluggable > PLUG_MOST || !pluggable.is_multiple_of(PLUG_ALIGN) {
            return Err(Error::Size(pluggable));
        }
        let windows = Windows::new(&sizes, ram + rom);
        let len = ram + rom + sizes.iter().sum::<u64>();
        let plugs = Plugs::new(plug_start(ram), pluggable, len);
        let memory = Self::with_regions(layout(ram, rom), windows, plugs, len + pluggable).map_err(
            |error| match error {
                Error::Host(_, e) => Error::Host((ram + pluggable) >> 20, e),
                other => other,
            },
        )?;
        let windows = std::array::from_fn(|index| Window::new(&memory, index));
        Ok((memory, windows))
    }

    fn with_regions(regions: Vec<Region>, windows: Windows, plugs: Plugs, len: u64) -> Result<Self, Error> {
        let block = Block::new(len).map_err(|e| Error::Host(len >> 20, e))?;
        let code = Arc::new(CodeMap::new(len));
        let file = Arc::new(block.file.try_clone().map_err(|e| Error::Host(len >> 20, e))?);
        let mut mapped = Vec::new();
        for region in regions.iter().copied().chain(plugs.blocks()) {
            let tracker = Tracker::new(code.clone(), region.offset);
            // SAFETY: regions lie inside the block by construction in `layout`, those of `plugs` in `with_pluggable`.
            let host = unsafe { block.base.as_ptr().add(region.offset as usize) };
            // SAFETY: the pointer is part of a mapping that outlives the region: both are in `Inner`, regions first.
            let map = unsafe {
                MmapRegionBuilder::new_with_bitmap(region.size as usize, tracker)
                    .with_raw_mmap_pointer(host)
                    .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                    .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                    .with_file_offset(FileOffset::from_arc(file.clone(), region.offset))
                    .build()
            }
            .map_err(|e| Error::Layout(e.to_string()))?;
            mapped.push(GuestRegionMmap::new(map, GuestAddress(region.gpa)).ok_or_else(|| {
                Error::Layout(format!("{region:x?} runs off the end of the address space"))
            })?);
        }
        let all = GuestMemoryMmap::from_regions(mapped).map_err(|e| Error::Layout(e.to_string()))?;
        let plugs = Arc::new(plugs);
        let guest = Guest::new(all, plugs.clone());
        Ok(Self(Arc::new(Inner { block, regions, guest, code, windows, plugs })))
    }

    /// The guest-physical view, for loaders and devices. Stores through it invalidate cached code as all others do.
    pub fn guest(&self) -> &Guest {
        &self.0.guest
    }

    pub(crate) fn windows(&self) -> &Windows {
        &self.0.windows
    }

    pub(crate) fn plugs(&self) -> &Plugs {
        &self.0.plugs
    }

    /// The RAM that comes and goes, if there is any.
    pub fn pluggable(&self) -> Option<Pluggable> {
        Pluggable::new(self)
    }

    /// What a vCPU holds that keeps what it finds of the map; `kick` is called by others, to have it look up.
    pub fn keeper(&self, kick: impl Fn() + Send + Sync + 'static) -> Keeper {
        Keeper::new(self, Box::new(kick))
    }

    /// Has `listener` called now, and again after every change of [`Memory::slots`], one call at a time. It must not change
    /// windows, and not own this memory.
    pub fn listen(&self, listener: impl Fn(&Self) + Send + Sync + 'static) {
        self.windows().listen(self, Box::new(listener));
    }

    /// The regions that stay where they are, sorted by address: neither windows nor pluggable memory.
    pub fn regions(&self) -> &[Region] {
        &self.0.regions
    }

    /// Bytes of RAM, pluggable memory not among them.
    pub fn ram_size(&self) -> u64 {
        self.0.regions.iter().filter(|r| r.kind == Kind::Ram).map(|r| r.offset + r.size).max().unwrap_or(0)
    }

    /// Bytes in the block, RAM, ROM, windows and pluggable memory: all offsets are below.
    pub fn len(&self) -> u64 {
        self.0.block.len
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Which parts engines have cached as code.
    pub fn code(&self) -> &CodeMap {
        &self.0.code
    }

    /// The mappings for translated code, made at the first call.
    ///
    /// # Errors
    /// The host has no room for them.
    pub fn alias(&self) -> Result<&Alias, Error> {
        let alias = &self.0.code.alias;
        if let Some(alias) = alias.get() {
            return Ok(alias);
        }
        let made =
            Alias::new(&self.0.block.file, self.len()).map_err(|e| Error::Host(self.len() >> 20, e))?;
        Ok(alias.get_or_init(|| made))
    }

    /// The region, window or plugged block that holds `gpa` now.
    #[inline]
    pub fn region(&self, gpa: Gpa) -> Option<Region> {
        let fixed = self.0.regions.iter().find(|r| gpa >= r.gpa && gpa - r.gpa < r.size);
        fixed.copied().or_else(|| self.plugs().find(gpa)).or_else(|| self.windows().find(gpa))
    }

    /// The offset of `gpa` in the block.
    #[inline]
    pub fn offset(&self, gpa: Gpa) -> Option<u64> {
        self.region(gpa).map(|r| gpa - r.gpa + r.offset)
    }

    /// Every region with its host address, then every window: where the guest sees it, if it does. Pluggable memory is
    /// [`Memory::pluggable_slot`]'s.
    pub fn slots(&self) -> impl Iterator<Item = Option<Slot>> + '_ {
        let fixed = self.0.regions.iter().map(|&region| Some(region));
        // SAFETY: regions lie inside the block by construction in `layout`, windows in `with_pluggable`.
        let slot = |region: Region| Slot { region, host: unsafe { self.at(region.offset) } };
        fixed.chain(self.windows().regions()).map(move |region| region.map(slot))
    }

    /// All of pluggable memory as one slot that never changes, if there is any: what the guest reaches through it changes with
    /// what is plugged. It is made at the first call, for engines whose guests reach memory by host address.
    ///
    /// # Errors
    /// The host has no room for it.
    pub fn pluggable_slot(&self) -> Result<Option<Slot>, Error> {
        let plugs = self.plugs();
        // Nothing is plugged or unplugged meanwhile.
        self.windows().change(|| plugs.slot(&self.0.block.file).map_err(|e| Error::Host(self.len() >> 20, e)))
    }

    /// Gives the host back pages of the block that nobody is to use: what is left in them is anybody's guess.
    pub(crate) fn give_back(&self, offset: u64, len: u64) {
        // What the host refuses is cleared before it is used again.
        self.0.block.punch(offset, len);
    }

    /// # Safety
    /// `offset` is at most the block's length.
    #[inline]
    unsafe fn at(&self, offset: u64) -> *mut u8 {
        // SAFETY: by the caller's promise, inside the mapping or one past its end.
        unsafe { self.0.block.base.as_ptr().add(offset as usize) }
    }

    /// The host address of `T` at `offset`, if it lies in the block.
    #[inline]
    fn ptr<T: Int>(&self, offset: u64) -> Option<*mut T> {
        if offset <= self.0.block.len - size_of::<T>() as u64 {
            // SAFETY: just checked; the block is larger than any `T`.
            Some(unsafe { self.at(offset) }.cast())
        } else {
            None
        }
    }

    /// Reads a little-endian integer at `offset`, in one access of its size. Zero outside the block, which an offset from
    /// [`Memory::offset`] never is.
    #[inline]
    pub fn load<T: Int + Default>(&self, offset: u64) -> T {
        match self.ptr::<T>(offset) {
            // SAFETY: in the block; volatile, for the guest's other vCPUs may write at any time; any bits are a `T`.
            Some(p) => unsafe { p.cast::<Unaligned<T>>().read_volatile().0 },
            None => T::default(),
        }
    }

    /// Writes a little-endian integer at `offset`, in one access of its size. Tells whether cached code changed.
    /// Like [`Memory::load`] it lies in one page.
    #[inline]
    pub fn store<T: Int>(&self, offset: u64, value: T) -> bool {
        let Some(p) = self.ptr::<T>(offset) else { return false };
        // SAFETY: in the block; volatile as in `load`.
        unsafe { p.cast::<Unaligned<T>>().write_volatile(Unaligned(value)) };
        self.0.code.stored(offset, size_of::<T>() as u64)
    }

    /// Atomically replaces the integer at `offset`, at any alignment (16 for `u128`: else `Err` with `old`), if it equals
    /// `old`. `Ok` tells whether cached code changed, `Err` holds the value that was there.
    #[inline]
    pub fn compare_exchange<T: Int + Default>(&self, offset: u64, old: T, new: T) -> Result<bool, T> {
        let Some(p) = self.ptr::<T>(offset) else { return Err(T::default()) };
        if size_of::<T>() == 16 && !offset.is_multiple_of(16) {
            return Err(old);
        }
        // SAFETY: in the block; every access to it is volatile or atomic; aligned where it has to be.
        let found = unsafe { T::cmpxchg(p, old, new) };
        if found == old { Ok(self.0.code.stored(offset, size_of::<T>() as u64)) } else { Err(found) }
    }

    /// Copies `len` bytes from one offset to another, upwards byte by byte, as the processor's MOVS does. Each range lies in
    /// one page. Tells whether cached code changed.
    pub fn copy(&self, from: u64, to: u64, len: u64) -> bool {
        let end = self.0.block.len;
        if len == 0 || len > PAGE_SIZE || from > end - len || to > end - len {
            return false;
        }
        // SAFETY: both ranges are in the block, as just checked; the block is only accessed by raw pointers.
        unsafe {
            asm!("rep movsb", inout("rcx") len => _, inout("rsi") self.at(from) => _, inout("rdi") self.at(to) => _,
                 options(nostack, preserves_flags));
        }
        self.0.code.stored(to, len)
    }

    /// Writes `value` into each of the `count` words of 8 bytes from `offset` on, which lie in one page. Tells whether cached
    /// code changed.
    pub fn fill(&self, offset: u64, value: u64, count: u64) -> bool {
        if count == 0 || count > PAGE_SIZE / 8 || offset > self.0.block.len - 8 * count {
            return false;
        }
        // SAFETY: the range is in the block, as just checked; the block is only accessed by raw pointers.
        unsafe {
            asm!("rep stosq", inout("rcx") count => _, inout("rdi") self.at(offset) => _, in("rax") value,
                 options(nostack, preserves_flags));
        }
        self.0.code.stored(offset, 8 * count)
    }

    /// Gives the host back the whole pages of RAM among `len` bytes at `gpa`: they read as zeroes from then on, and take host
    /// memory again when they are touched. What the host refuses stays as it is.
    pub fn discard(&self, gpa: Gpa, len: u64) {
        let end = gpa.saturating_add(len) & !(PAGE_SIZE - 1);
        let start = gpa.checked_next_multiple_of(PAGE_SIZE).unwrap_or(end);
        let fixed = self.0.regions.iter().copied().filter(|region| region.kind == Kind::Ram);
        for region in fixed.chain(self.plugs().regions()) {
            let (from, to) = (start.max(region.gpa), end.min(region.gpa + region.size));
            if from >= to {
                continue;
            }
            let (offset, len) = (from - region.gpa + region.offset, to - from);
            if self.0.block.punch(offset, len) {
                self.0.code.stored_range(offset, len);
            }
        }
    }

    /// Bytes of host memory that the guest's take now.
    pub fn held(&self) -> u64 {
        // The file is ours and open; what it holds is counted in blocks of 512 bytes.
        self.0.block.file.metadata().map_or(0, |file| file.blocks() * 512)
    }

    /// Copies bytes out, from `offset`. What lies outside the block reads as zero.
    pub fn read(&self, offset: u64, to: &mut [u8]) {
        let known = (to.len() as u64).min(self.len().saturating_sub(offset)) as usize;
        let (to, rest) = to.split_at_mut(known);
        if !to.is_empty() {
            // SAFETY: the source is in the block, as just checked; the destination is a slice of as many bytes.
            unsafe {
                asm!("rep movsb", inout("rcx") known => _, inout("rsi") self.at(offset) => _,
                     inout("rdi") to.as_mut_ptr() => _, options(nostack, preserves_flags));
            }
        }
        rest.fill(0);
    }

    /// Copies bytes in, to `offset`, as far as they lie in the block. Tells whether cached code changed.
    pub fn write(&self, offset: u64, from: &[u8]) -> bool {
        let known = (from.len() as u64).min(self.len().saturating_sub(offset));
        if known == 0 {
            return false;
        }
        // SAFETY: the destination is in the block, as just checked; the source is a slice of at least as many bytes.
        unsafe {
            asm!("rep movsb", inout("rcx") known => _, inout("rsi") from.as_ptr() => _,
                 inout("rdi") self.at(offset) => _, options(nostack, preserves_flags));
        }
        self.0.code.stored_range(offset, known)
    }

    /// Sets bytes to 0: whole pages by giving them back to the host, if it takes them.
    pub(crate) fn clear(&self, offset: u64, len: u64) {
        let whole = len & !(PAGE_SIZE - 1);
        let done = if offset.is_multiple_of(PAGE_SIZE) && whole > 0 && self.0.block.punch(offset, whole) {
            self.0.code.stored_range(offset, whole);
            whole
        } else {
            0
        };
        let zeroes = [0; PAGE_SIZE as usize];
        let mut at = done;
        while at < len {
            let n = (len - at).min(PAGE_SIZE);
            self.write(offset + at, &zeroes[..n as usize]);
            at += n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn the_views_show_the_same_bytes() {
        let memory = Memory::new(16 << 20, 0x1_0000).unwrap();
        memory.guest().write_obj(0x1122_3344_5566_7788u64, GuestAddress(0x10_0003)).unwrap();
        let offset = memory.offset(0x10_0003).unwrap();
        assert_eq!(memory.load::<u64>(offset), 0x1122_3344_5566_7788);
        assert!(!memory.store(offset + 7, 0xffu8));
        assert_eq!(memory.guest().read_obj::<u64>(GuestAddress(0x10_0003)).unwrap() >> 56, 0xff);
        assert_eq!(memory.offset(0xa_0000), None, "the legacy video hole");
        assert_eq!(memory.region(0xffff_fff0).unwrap().kind, Kind::Rom);
    }

    #[test]
    fn stores_by_devices_invalidate_code() {
        let memory = Memory::new(16 << 20, 0).unwrap();
        let offset = memory.offset(0x20_0000).unwrap();
        let before = memory.code().generation(offset);
        memory.code().mark(offset + 0x40, 16);
        memory.guest().write_slice(&[0; 8192], GuestAddress(0x1f_f000)).unwrap();
        assert_ne!(memory.code().generation(offset), before);
    }

    #[test]
    fn discarded_pages_are_the_hosts_again_and_read_as_zeroes() {
        let memory = Memory::new(16 << 20, 0x1_0000).unwrap();
        let alias = memory.alias().unwrap();
        let gpa = 0x40_0000;
        let offset = memory.offset(gpa).unwrap();
        memory.guest().write_slice(&vec![0x5a; 8 << 20], GuestAddress(gpa)).unwrap();
        memory.code().mark(offset + 0x2040, 16);
        let (held, generation) = (memory.held(), memory.code().generation(offset + 0x2000));
        assert!(held >= 8 << 20, "{held}");
        // All but parts of the first and the last page.
        memory.discard(gpa + 1, (4 << 20) - 2);
        assert_eq!(held - memory.held(), (4 << 20) - 2 * PAGE_SIZE);
        assert_eq!(memory.load::<u64>(offset + 0xff8), 0x5a5a_5a5a_5a5a_5a5a);
        assert_eq!(memory.load::<u64>(offset + 0x2040), 0);
        for base in [alias.writable(), alias.readable()] {
            // SAFETY: inside the alias, and aligned.
            let there = unsafe { ((base + offset + 0x2040) as *const u64).read_volatile() };
            assert_eq!(there, 0, "in every mapping");
        }
        assert_ne!(memory.code().generation(offset + 0x2000), generation, "code that was there is stale");
        memory.store(offset + 0x3000, 7u64);
        assert_eq!(memory.load::<u64>(offset + 0x3000), 7);
        // What is no RAM, or nothing, stays as it is.
        let rom = memory.offset(0xffff_0000).unwrap();
        memory.store(rom, 1u64);
        let held = memory.held();
        for (gpa, len) in [(0xffff_0000, 0x1_0000), (0xa_0000, 0x1_0000), (u64::MAX - 5, u64::MAX), (gpa, 0)]
        {
            memory.discard(gpa, len);
        }
        assert_eq!((memory.held(), memory.load::<u64>(rom)), (held, 1));
    }

    #[test]
    fn offsets_outside_are_harmless() {
        let memory = Memory::new(1 << 20, 0).unwrap();
        for offset in [memory.len() - 7, memory.len(), u64::MAX] {
            assert_eq!(memory.load::<u64>(offset), 0);
            assert!(!memory.store(offset, 1u64));
            assert_eq!(memory.compare_exchange(offset, 0u64, 1), Err(0));
        }
        assert_eq!(memory.load::<u64>(memory.len() - 8), 0);
    }

    #[test]
    fn compare_exchange_at_every_size_and_alignment() {
        let memory = Memory::new(1 << 20, 0).unwrap();
        memory.store(61, 0x0102_0304u32); // across a cache line
        assert_eq!(memory.compare_exchange(61, 0x0102_0304u32, 5), Ok(false));
        assert_eq!(memory.compare_exchange(61, 0x0102_0304u32, 6), Err(5));
        assert_eq!(memory.compare_exchange(61, 5u8, 6), Ok(false));
        assert_eq!(memory.compare_exchange(61, 6u16, 7), Ok(false));
        assert_eq!(memory.compare_exchange(64, 0u128, 9 << 100), Ok(false));
        assert_eq!(memory.compare_exchange(64, 1u128, 0), Err(9 << 100));
        assert_eq!(memory.compare_exchange(65, 0u128, 0), Err(0), "unaligned");
    }
}
