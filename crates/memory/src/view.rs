//! Pluggable memory as one piece of this process' address space, for an engine whose guest reaches memory through the host's
//! MMU (KVM), and for which a piece is a memory slot.
//!
//! Why one slot, and a mapping that changes beneath it: slots cannot be resized, so a slot for each run of plugged blocks would
//! vanish for an instant, under running vCPUs, whenever the run grows; and to take one away KVM forgets the guest's whole page
//! tables. A change of the mapping is one step to the vCPUs, and is over for all of them when it returns.
//!
//! Why the blocks that are not plugged are not just holes in the guest's file: whoever touches such a hole, if only to read,
//! gets a page for it, so the guest could have all of the room without having plugged any. They all show one *spare* block
//! instead. Thus nobody who touches what is not plugged ends the VM (some systems read there, and 5.15.6.2 of virtio 1.2 lets
//! those that do not accept VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE), and all such pages together take a block of host memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

use crate::ram::memfd;

/// The mapping.
pub(crate) struct View {
    base: NonNull<u8>,
    len: usize,
    block: usize,
    /// The guest's memory, and where in it the blocks are.
    file: File,
    offset: u64,
    /// What is shown where nothing is plugged: one block.
    spare: File,
}

// SAFETY: the mapping is shared memory that nothing here accesses; it is only given away by address.
unsafe impl Send for View {}
// SAFETY: as above; mmap is atomic between threads.
unsafe impl Sync for View {}

impl View {
    /// A view of `blocks` blocks of `block` bytes that are in `file` from `offset` on; it shows none of them yet.
    pub(crate) fn new(file: &File, offset: u64, block: u64, blocks: usize) -> io::Result<Self> {
        let spare = memfd(c"lodge-spare", block)?;
        let block = usize::try_from(block).map_err(io::Error::other)?;
        let len = block.checked_mul(blocks).ok_or(io::ErrorKind::OutOfMemory)?;
        let file = file.try_clone()?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        let view = Self { base, len, block, file, offset, spare };
        view.hide(0..blocks)?;
        Ok(view)
    }

    /// The address of its first byte.
    pub(crate) fn host(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Shows the guest's memory in these blocks.
    pub(crate) fn show(&self, blocks: Range<usize>) -> io::Result<()> {
        let at = self.offset + (blocks.start * self.block) as u64;
        self.map(blocks, &self.file, at)
    }

    /// Shows the spare block in each of these. Where that fails some are as they were.
    pub(crate) fn hide(&self, mut blocks: Range<usize>) -> io::Result<()> {
        blocks.try_for_each(|block| self.map(block..block + 1, &self.spare, 0))
    }

    fn map(&self, blocks: Range<usize>, file: &File, offset: u64) -> io::Result<()> {
        let (at, len) = (blocks.start * self.block, blocks.len() * self.block);
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        assert!(at + len <= self.len, "blocks that there are");
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: replaces a part of our own mapping, as just checked, to which nothing holds a Rust reference. The files are as
        // long as is mapped of them and never shrink.
        unsafe {
            let at = self.base.as_ptr().add(at).cast();
            if libc::mmap(at, len, prot, flags, file.as_raw_fd(), offset) == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            libc::madvise(at, len, libc::MADV_DONTDUMP);
        }
        Ok(())
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: our own mapping; engines that know its address hold the memory that it belongs to.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
