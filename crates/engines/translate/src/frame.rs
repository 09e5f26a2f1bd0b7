//! What translated code has at hand while it runs: the vCPU's frame.
//!
//! RSP points into the frame all the while: it is the frame's address, and its low 16 bits are the control word with which
//! BEXTR takes the page number out of a linear address (start 12, length 36). So the frame lies at such an address. Below
//! it is room for one word that is pushed, and no stack: signals are taken on another.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::Error;

/// Low 16 bits of the frame's address: BEXTR control for bits 47 to 12.
const CONTROL: usize = 36 << 8 | 12;

/// Offsets in the frame, from RSP. All 8-byte fields are aligned, for the frame itself lies at 4 modulo 8.
pub mod at {
    /// Guest registers without a host register of their own: R10, R11, R15.
    pub const STOLEN: [i32; 3] = [4, 12, 20];
    /// Linear address of the page of code that runs.
    pub const PAGE: i32 = 28;
    /// What is added to a linear address before it is looked up in the table of jumps. Whoever rings changes it.
    pub const SALT: i32 = 36;
    /// The same, as it was when translated code was entered.
    pub const OWN_SALT: i32 = 172;
    /// Addends of groups of accesses: this one and those below it.
    pub const GROUPS: i32 = -20;
    /// For a rewritten instruction's own use.
    pub const SCRATCH: i32 = 44;
    /// FS base.
    pub const FS: i32 = 52;
    /// GS base.
    pub const GS: i32 = 60;
    /// Status flags, when they are in memory: AX after LAHF and SETO AL.
    pub const FLAGS: i32 = 68;
    /// Why translated code was left: the number of a site.
    pub const SITE: i32 = 72;
    /// Not 0: leave at the next backward jump.
    pub const POLL: i32 = 76;
    /// Not 0: an interrupt waits for IF. Beside [`POLL`], so that both can be looked at at once.
    pub const WAITING: i32 = 80;
    /// RDI when translated code was left: a linear address.
    pub const LINEAR: i32 = 84;
    /// The host's stack pointer.
    pub const HOST_RSP: i32 = 92;
    /// Address of the guest's general-purpose registers, 16 of 8 bytes.
    pub const REGISTERS: i32 = 100;
    /// Address of the guest's `native::SimdState`.
    pub const SIMD: i32 = 108;
    /// MXCSR of the host's code.
    pub const MXCSR: i32 = 116;
    /// Kept while a word is pushed.
    pub const SCRATCH2: i32 = 124;
    /// Where a jump leads that is not linked.
    pub const TARGET: i32 = 164;
    /// Host address, kind and RFLAGS of a fault in translated code.
    pub const FAULT_PC: i32 = 132;
    /// See [`FAULT_PC`].
    pub const FAULT_ADDRESS: i32 = 140;
    /// See [`FAULT_PC`].
    pub const FAULT_FLAGS: i32 = 148;
    /// See [`FAULT_PC`]: the signal.
    pub const FAULT_SIGNAL: i32 = 156;
    /// Why translated code was left: a [`super::reason`].
    pub const REASON: i32 = 180;
    /// Low half of RFLAGS without the status flags.
    pub const RFLAGS: i32 = 184;
    /// Not 0: the privilege level is 0.
    pub const SYSTEM: i32 = 188;
    /// IA32_KERNEL_GS_BASE.
    pub const KERNEL_GS: i32 = 196;
    /// Linear page tables for supervisor accesses, without and with access to user pages.
    pub const TABLE: i32 = 204;
    /// See [`TABLE`].
    pub const TABLE_AC: i32 = 212;
    /// 2^47, which added to a canonical address gives one of 48 bits.
    pub const HALF: i32 = 220;
    /// The selectors in ES, CS, SS, DS, FS and GS, 8 bytes each.
    pub const SELECTORS: i32 = 228;
    /// The table of jumps: entries of 16 bytes, salted linear address and host address.
    pub const JUMPS: i32 = 0x1004;
}

/// Why translated code was left.
pub mod reason {
    /// At a site.
    pub const SITE: u32 = 0;
    /// A host fault.
    pub const FAULT: u32 = 1;
}

/// Entries of the table of jumps.
pub const JUMPS: usize = 1 << 16;
/// A salt that no entry has, so that every jump misses.
pub const NO_SALT: u64 = 0x7fff << 48;
const SIZE: usize = at::JUMPS as usize + 16 * JUMPS + 4096;

/// A vCPU's frame.
pub struct Frame {
    base: *mut u8,
    map: Arc<Map>,
}

// SAFETY: the mapping is this value's own; what other threads touch is atomic.
unsafe impl Send for Frame {}

struct Map(NonNull<u8>);

// SAFETY: an address.
unsafe impl Send for Map {}
// SAFETY: an address.
unsafe impl Sync for Map {}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which neither the frame nor a bell uses any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), MAP) };
    }
}

const MAP: usize = SIZE + 2 * (1 << 16);

impl Frame {
    /// A frame of zeros.
    ///
    /// # Errors
    /// The host gives no memory.
    pub fn new() -> Result<Self, Error> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let map = unsafe { libc::mmap(std::ptr::null_mut(), MAP, prot, flags, -1, 0) };
        if map == libc::MAP_FAILED {
            return Err(Error::Map("a vCPU's frame", std::io::Error::last_os_error()));
        }
        let map = Arc::new(Map(NonNull::new(map.cast::<u8>()).ok_or(Error::Space)?));
        let start = map.0.as_ptr() as usize;
        let base = (start & !0xffff) + CONTROL;
        let base = if base < start { base + 0x1_0000 } else { base };
        // SAFETY: at most 64 KiB above the start of a mapping that is 128 KiB larger than the frame.
        let base = unsafe { map.0.as_ptr().add(base - start) };
        let frame = Self { base, map };
        frame.set32(at::MXCSR, 0x1f80);
        frame.set(at::HALF, 1 << 47);
        frame.clear_jump(0);
        Ok(frame)
    }

    /// What RSP is in translated code.
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    fn at<T>(&self, offset: i32) -> *mut T {
        debug_assert!((0..SIZE as i32 - 16).contains(&offset));
        // SAFETY: all offsets are constants inside the frame, or entries of its table with a bounded number.
        unsafe { self.base.add(offset as usize).cast() }
    }

    /// Reads a field.
    #[inline]
    pub fn get(&self, offset: i32) -> u64 {
        // SAFETY: inside the frame, and aligned.
        unsafe { self.at::<u64>(offset).read() }
    }

    /// Writes a field.
    #[inline]
    pub fn set(&self, offset: i32, value: u64) {
        // SAFETY: inside the frame, and aligned. Only this thread touches it.
        unsafe { self.at::<u64>(offset).write(value) }
    }

    /// Reads a field of four bytes.
    #[inline]
    pub fn get32(&self, offset: i32) -> u32 {
        // SAFETY: inside the frame, and aligned.
        unsafe { self.at::<u32>(offset).read() }
    }

    /// Writes a field of four bytes.
    #[inline]
    pub fn set32(&self, offset: i32, value: u32) {
        // SAFETY: inside the frame, and aligned. Only this thread touches it.
        unsafe { self.at::<u32>(offset).write(value) }
    }

    /// Lets jumps be looked up with `salt`, and backward jumps go on: until the [`Bell`] rings again.
    #[inline]
    pub fn listen(&self, salt: u64) {
        // SAFETY: inside the frame, aligned, and only ever accessed atomically or by translated code.
        let (poll, word) =
            unsafe { (AtomicU32::from_ptr(self.at(at::POLL)), AtomicU64::from_ptr(self.at(at::SALT))) };
        self.set(at::OWN_SALT, salt);
        poll.store(0, Ordering::SeqCst);
        word.store(salt, Ordering::SeqCst);
    }

    /// Whether the bell rang since [`Frame::listen`].
    #[inline]
    pub fn is_rung(&self) -> bool {
        // SAFETY: inside the frame, aligned, and only ever accessed atomically or by translated code.
        unsafe { AtomicU32::from_ptr(self.at(at::POLL)) }.load(Ordering::SeqCst) != 0
    }

    /// What makes translated code be left.
    pub fn bell(&self) -> Bell {
        Bell { poll: self.at(at::POLL), salt: self.at(at::SALT), _map: self.map.clone() }
    }

    /// Entry `n` of the table of jumps.
    #[inline]
    pub fn jump(&self, n: u16) -> (u64, u64) {
        let at = at::JUMPS + 16 * i32::from(n);
        (self.get(at), self.get(at + 8))
    }

    /// Enters a jump to `host` for the salted linear address `tag`.
    #[inline]
    pub fn set_jump(&self, tag: u64, host: u64) {
        let at = at::JUMPS + 16 * i32::from(tag as u16);
        self.set(at, tag);
        self.set(at + 8, host);
    }

    /// Removes entry `n`: the tag of another place never fits it.
    #[inline]
    pub fn clear_jump(&self, n: u16) {
        self.set(at::JUMPS + 16 * i32::from(n), u64::from(!n));
    }

    /// Removes all entries.
    pub fn clear_jumps(&self) {
        (0..=u16::MAX).for_each(|n| self.clear_jump(n));
    }
}

/// Makes a vCPU leave translated code soon, from any thread.
pub struct Bell {
    poll: *mut u32,
    salt: *mut u64,
    _map: Arc<Map>,
}

// SAFETY: both words are only accessed atomically here.
unsafe impl Send for Bell {}
// SAFETY: as above.
unsafe impl Sync for Bell {}

impl Bell {
    /// Rings.
    pub fn ring(&self) {
        // SAFETY: aligned words of a mapping that the bell keeps.
        unsafe {
            AtomicU64::from_ptr(self.salt).store(NO_SALT, Ordering::SeqCst);
            AtomicU32::from_ptr(self.poll).store(1, Ordering::SeqCst);
        }
    }
}
