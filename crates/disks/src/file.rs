//! The files of images, as `imago` sees them: it reads and writes through here.
//!
//! This is where an order is kept that `imago` (0.2.6) does not keep. A cluster must be counted on disk before anything on disk
//! refers to it: an image whose process was killed in between would give that cluster away a second time. `imago` keeps to that
//! for data, but it writes a new cluster table's place into the table of these tables (L1) at once, while the count waits in its
//! cache. So whoever writes L1 through here counts what it refers to first.
//!
//! This is also where a file can be shown as what it is not: a header without what `imago` does not know and this crate does (see
//! `zstd`), or a sparse VMDK as the bytes of its disk (see `vmdk`).

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use imago::file::File as HostFile;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageExt, StorageOpenOptions};

use crate::qcow2::{self, Mask, Place};
use crate::vmdk::Sparse;

/// The bits of a table's entry that are an offset.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The bytes that may be masked are below.
const HEADER: u64 = 104;

/// An image's file.
#[derive(Debug)]
pub struct File {
    host: HostFile,
    shown: Shown,
    helper: CommonStorageHelper,
}

/// How a file is shown.
#[derive(Debug)]
pub enum Shown {
    /// As it is.
    Whole,
    /// As a qcow2 image,
    Qcow2 {
        /// whose L1 table is here, if it is written,
        l1: Option<Range<u64>>,
        /// with these bytes other than they are.
        masks: Vec<Mask>,
    },
    /// As the disk in it, to read.
    Sparse(Sparse),
}

impl File {
    pub fn new(host: HostFile, shown: Shown) -> File {
        File { host, shown, helper: CommonStorageHelper::default() }
    }

    /// Counts the clusters that these entries of the L1 table, about to be written at `offset`, refer to.
    fn count_tables(&self, entries: &IoVector<'_>, offset: u64, l1: &Range<u64>) -> io::Result<()> {
        let mut bytes = vec![0; entries.len() as usize];
        entries.copy_into_slice(&mut bytes);
        let first = l1.start.saturating_sub(offset).min(bytes.len() as u64) as usize;
        for entry in qcow2::entries(&bytes[first..]).take(((l1.end - l1.start) / 8) as usize) {
            let table = entry & OFFSET;
            if table != 0 {
                self.count(table)?;
            }
        }
        Ok(())
    }

    /// Sees to it that the cluster at `offset` is counted on disk, at least once. What `imago` writes later is no less.
    fn count(&self, offset: u64) -> io::Result<()> {
        let mut header = [0; 104];
        self.host.read(&mut header[..], 0)?;
        let field = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap_or_default());
        let cluster_bits = field(20).clamp(9, 21);
        // Of version 2 all are 16 bits wide.
        let width_log2 = if field(4) >= 3 { field(96).min(6) } else { 4 };
        let place = Place::of(offset >> cluster_bits, cluster_bits, width_log2);
        let table = u64::from(field(48)) << 32 | u64::from(field(52));
        let mut entry = [0; 8];
        self.host.read(&mut entry[..], table.saturating_add(place.block * 8))?;
        let block = u64::from_be_bytes(entry) & !0x1ff;
        if block == 0 {
            // `imago` writes that at once.
            return Err(io::Error::other("a cluster was allocated that no reference count block is for"));
        }
        let at = block.saturating_add(place.at);
        let mut count = vec![0; place.len];
        self.host.read(&mut count[..], at)?;
        if place.is_zero(&count) {
            place.set_one(&mut count);
            self.host.write(&count[..], at)?;
        }
        Ok(())
    }
}

impl fmt::Display for File {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.host.fmt(to)
    }
}

// The trait says `unsafe` of methods whose callers have rules to keep. Nothing in here is unsafe: what is asked is passed on by
// the library's safe methods.
#[allow(unsafe_code)]
impl Storage for File {
    fn open(options: StorageOpenOptions) -> io::Result<Self> {
        Ok(File::new(HostFile::open(options)?, Shown::Whole))
    }

    fn mem_align(&self) -> usize {
        self.host.mem_align()
    }

    fn req_align(&self) -> usize {
        self.host.req_align()
    }

    fn zero_align(&self) -> usize {
        self.host.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.host.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        match &self.shown {
            Shown::Sparse(disk) => Ok(disk.size),
            _ => self.host.size(),
        }
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        self.host.resolve_relative_path(relative)
    }

    fn get_filename(&self) -> Option<PathBuf> {
        self.host.get_filename()
    }

    unsafe fn pure_readv(&self, mut bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let masked =
            offset < HEADER && matches!(&self.shown, Shown::Qcow2 { masks, .. } if !masks.is_empty());
        if !masked && !matches!(self.shown, Shown::Sparse(_)) {
            return self.host.readv(bufv, offset);
        }
        let mut bytes = vec![0; bufv.len() as usize];
        match &self.shown {
            Shown::Sparse(disk) => disk.read(&self.host, offset, &mut bytes)?,
            _ => self.host.read(&mut bytes[..], offset)?,
        }
        if let Shown::Qcow2 { masks, .. } = &self.shown {
            masks.iter().for_each(|mask| mask.put(&mut bytes, offset, mask.shown));
        }
        bufv.copy_from_slice(&bytes);
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let Shown::Qcow2 { l1, masks } = &self.shown else { return self.host.writev(bufv, offset) };
        match l1 {
            Some(l1) if offset < l1.end && offset.saturating_add(bufv.len()) > l1.start => {
                self.count_tables(&bufv, offset, l1)?;
            }
            _ => {}
        }
        if offset >= HEADER || masks.is_empty() {
            return self.host.writev(bufv, offset);
        }
        let mut bytes = vec![0; bufv.len() as usize];
        bufv.copy_into_slice(&mut bytes);
        masks.iter().for_each(|mask| mask.put(&mut bytes, offset, mask.real));
        self.host.write(&bytes[..], offset)
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.host.write_zeroes(offset, length)
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.host.write_allocated_zeroes(offset, length)
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.host.discard(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        self.host.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.host.sync()
    }

    fn settle_writes(&self) -> io::Result<()> {
        self.host.settle_writes()
    }

    /// Nobody asks for that.
    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, new_size: u64, mode: PreallocateMode) -> io::Result<()> {
        self.host.resize(new_size, mode)
    }
}
