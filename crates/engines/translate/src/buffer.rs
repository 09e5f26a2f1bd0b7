//! The memory that translated code lies in: one memfd mapped twice, so that no page is writable and executable.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use crate::Error;

/// Code of one vCPU, filled from the start until it is full.
pub struct Buffer {
    execute: *mut u8,
    write: *mut u8,
    size: usize,
    used: usize,
}

// SAFETY: the mappings are this value's own; only the vCPU's thread writes or executes them.
unsafe impl Send for Buffer {}

impl Buffer {
    /// A buffer of `size` bytes, which is a multiple of the page size. Memory is taken as code comes.
    ///
    /// # Errors
    /// The host gives no memory for code.
    pub fn new(size: usize) -> Result<Self, Error> {
        let failed = |_| Error::Map("memory for code", std::io::Error::last_os_error());
        // SAFETY: the name is a C string; the descriptor is checked before it is owned.
        let file = unsafe {
            let fd = libc::memfd_create(c"lodge-code".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(failed(()));
            }
            File::from(OwnedFd::from_raw_fd(fd))
        };
        file.set_len(size as u64).map_err(|e| Error::Map("memory for code", e))?;
        let map = |prot| {
            let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
            // SAFETY: a new mapping at an address that the kernel chooses, of a file of ours.
            let at = unsafe { libc::mmap(ptr::null_mut(), size, prot, flags, file.as_raw_fd(), 0) };
            if at == libc::MAP_FAILED { Err(failed(())) } else { Ok(at.cast::<u8>()) }
        };
        let execute = map(libc::PROT_READ | libc::PROT_EXEC)?;
        let write = map(libc::PROT_READ | libc::PROT_WRITE)?;
        Ok(Self { execute, write, size, used: 0 })
    }

    /// Where the next code will be executed.
    pub fn next(&self) -> u64 {
        self.execute as u64 + self.used as u64
    }

    /// First and last address of code, exclusive.
    pub fn range(&self) -> (u64, u64) {
        (self.execute as u64, self.execute as u64 + self.size as u64)
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Whether `len` more bytes fit.
    pub fn fits(&self, len: usize) -> bool {
        self.size - self.used >= len + 64
    }

    /// Appends code that was made for [`Buffer::next`]. Nothing happens if it does not fit.
    pub fn push(&mut self, code: &[u8]) {
        if !self.fits(code.len()) {
            return;
        }
        // SAFETY: inside the mapping, as just checked.
        unsafe { ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(self.used), code.len()) };
        self.used = (self.used + code.len()).next_multiple_of(16).min(self.size);
    }

    /// The `len` bytes at the executable address `at`; none if they are not all in use.
    pub fn bytes(&self, at: u64, len: usize) -> &[u8] {
        let offset = at.wrapping_sub(self.execute as u64) as usize;
        if offset.checked_add(len).is_none_or(|end| end > self.used) {
            return &[];
        }
        // SAFETY: inside the part in use, which nobody writes while `self` is borrowed.
        unsafe { std::slice::from_raw_parts(self.write.add(offset), len) }
    }

    /// Replaces the four bytes at the executable address `at`: a branch's distance.
    pub fn patch(&mut self, at: u64, value: i32) {
        let offset = at.wrapping_sub(self.execute as u64) as usize;
        if offset <= self.used.saturating_sub(4) {
            // SAFETY: inside the part in use. This thread alone executes the code, and is not doing so now.
            unsafe { self.write.add(offset).cast::<i32>().write_unaligned(value) };
        }
    }

    /// Overwrites code at the executable address `at`: at most 16 bytes, which every piece of code has.
    pub fn replace(&mut self, at: u64, code: &[u8]) {
        let offset = at.wrapping_sub(self.execute as u64) as usize;
        if code.len() <= 16 && offset <= self.used.saturating_sub(code.len()) {
            // SAFETY: inside the part in use. This thread alone executes the code, and is not doing so now.
            unsafe { ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(offset), code.len()) };
        }
    }

    /// Forgets all code behind the first `keep` bytes.
    pub fn truncate(&mut self, keep: usize) {
        self.used = keep.min(self.used);
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: our own mappings, in which nothing executes any more.
        unsafe {
            libc::munmap(self.execute.cast(), self.size);
            libc::munmap(self.write.cast(), self.size);
        }
    }
}
