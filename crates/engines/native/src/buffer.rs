//! Memory for stubs: never writable and executable at once.

use std::ptr::NonNull;

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use crate::{Error, Unsupported};

const PAGE: usize = 4096;
/// Stubs start on a boundary that suits the processor's fetch.
const ALIGN: usize = 32;

/// A bounded, append-only buffer of machine code, owned and executed by one thread at a time.
pub(crate) struct CodeBuffer {
    base: NonNull<u8>,
    used: usize,
}

// SAFETY: the mapping belongs to this value alone, and nothing in it is bound to a thread.
unsafe impl Send for CodeBuffer {}

impl CodeBuffer {
    pub const SIZE: usize = 1 << 20;

    pub fn new() -> Result<Self, Error> {
        // SAFETY: a fresh private mapping at an address of the kernel's choice touches no other memory.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                Self::SIZE,
                ProtFlags::READ | ProtFlags::EXEC,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(Error::Map)?;
        let base = NonNull::new(base.cast()).ok_or(Error::Map(rustix::io::Errno::NOMEM))?;
        Ok(CodeBuffer { base, used: 0 })
    }

    /// Appends `code` and returns its address. The kernel calls that change the protection also serialize the
    /// processor, so stale prefetched bytes are never executed.
    pub fn push(&mut self, code: &[u8]) -> Result<NonNull<u8>, Unsupported> {
        let start = self.used;
        let end = start.checked_add(code.len()).filter(|&end| end <= Self::SIZE).ok_or(Unsupported::Full)?;
        let first_page = start / PAGE * PAGE;
        let length = end - first_page;
        // SAFETY: start..end, and the pages around it, lie inside the mapping, which `&mut self` makes ours alone;
        // no stub runs meanwhile.
        unsafe {
            let pages = self.base.as_ptr().add(first_page).cast();
            mprotect(pages, length, MprotectFlags::READ | MprotectFlags::WRITE)
                .map_err(|_| Unsupported::Full)?;
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.base.as_ptr().add(start), code.len());
            mprotect(pages, length, MprotectFlags::READ | MprotectFlags::EXEC)
                .map_err(|_| Unsupported::Full)?;
        }
        self.used = end.next_multiple_of(ALIGN);
        // SAFETY: start <= SIZE.
        Ok(unsafe { self.base.add(start) })
    }

    /// Forgets all code. The caller must not run what was pushed before.
    pub fn clear(&mut self) {
        self.used = 0;
    }
}

impl Drop for CodeBuffer {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing points into it any more. Failure could only leak it.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), Self::SIZE) };
    }
}
