//! qcow2 images whose compressed clusters are zstd's, which `imago` (0.2.6) does not know.
//!
//! `imago` is shown a header that does not say so (see `file`), and works on everything else. What it may not do is read a compressed
//! cluster. So those are read here, and before a part of one is written it is made an ordinary cluster.
//!
//! A cluster's place is looked up in the file itself, in the table that was there when the image was opened. That is as good as
//! `imago`'s own: nobody makes compressed clusters while an image is in use, so an entry that still stands for one is as it was.

use std::fmt;
use std::io::{self, Read};

use imago::StorageExt;
use imago::format::drivers::{FormatDriverInstance, PreparedDataMapping, ShallowMapping};
use imago::format::{Format, PreallocateMode};
use imago::io_buffers::IoVectorMut;
use imago::qcow2::Qcow2;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

use crate::file::{File, OFFSET};
use crate::qcow2::{self, Header};

/// The bit of an entry that says that its cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// How far back the compressed data may look: the most that zstd's ordinary levels ask for.
const MAX_WINDOW: u64 = 8 << 20;

/// Such an image.
pub struct Zstd {
    image: Qcow2<File>,
    /// The same file, once more.
    file: File,
    /// Where the tables of clusters' places are.
    l1: Vec<u64>,
    cluster_bits: u32,
    /// The size of the disk, which `imago` believes to end with a cluster.
    size: u64,
}

impl Zstd {
    /// Wraps an image, whose file is `file` too.
    pub fn new(image: Qcow2<File>, file: File, header: &Header) -> io::Result<Zstd> {
        let mut bytes = vec![0; (header.l1.end - header.l1.start) as usize];
        file.read(&mut bytes[..], header.l1.start)?;
        let l1 = qcow2::entries(&bytes).map(|entry| entry & OFFSET).collect();
        Ok(Zstd { image, file, l1, cluster_bits: header.cluster_bits(), size: header.size })
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Where a compressed cluster is in the file, and in how many bytes at most.
    fn place(&self, cluster: u64) -> io::Result<(u64, u64)> {
        let per_table = self.cluster() / 8;
        let table = self.l1.get((cluster / per_table) as usize).copied().unwrap_or(0);
        let mut entry = [0; 8];
        if table != 0 {
            self.file.read(&mut entry[..], table + cluster % per_table * 8)?;
        }
        let entry = u64::from_be_bytes(entry);
        if entry & COMPRESSED == 0 {
            return Err(io::Error::other(format!("the tables about cluster {cluster} changed under us")));
        }
        let bits = 62 - (self.cluster_bits - 8);
        let at = entry & ((1 << bits) - 1) & 0x00ff_ffff_ffff_ffff;
        let sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1;
        Ok((at, sectors * 512 - at % 512))
    }

    fn read_cluster(&self, cluster: u64) -> io::Result<Vec<u8>> {
        let (at, length) = self.place(cluster)?;
        let mut packed = vec![0; length as usize];
        self.file.read(&mut packed[..], at)?;
        let mut bytes = vec![0; self.cluster() as usize];
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(MAX_WINDOW.max(self.cluster()));
        StreamingDecoder::new_with_decoder(&packed[..], decoder)
            .map_err(io::Error::other)?
            .read_exact(&mut bytes)
            .map_err(|error| {
                io::Error::other(format!("the compressed cluster at {at} is damaged: {error}"))
            })?;
        Ok(bytes)
    }

    /// Makes an ordinary cluster of a compressed one.
    fn unpack(&self, cluster: u64) -> io::Result<()> {
        let start = cluster << self.cluster_bits;
        let (ShallowMapping::Special { .. }, _) = self.image.get_mapping(start, 1)? else { return Ok(()) };
        let bytes = self.read_cluster(cluster)?;
        let mapping = self.image.prepare_data_mapping(start, self.cluster(), true)?;
        mapping.storage().write(&bytes[..], mapping.offset())?;
        self.image.commit_data_mapping(mapping)
    }
}

impl fmt::Debug for Zstd {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.image.fmt(to)
    }
}

impl fmt::Display for Zstd {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{}", self.image)
    }
}

// As in `file`: the trait says `unsafe` of methods whose callers have rules to keep. Discards, which are such, are left out: the
// space of what is discarded is not given back.
#[allow(unsafe_code)]
impl FormatDriverInstance for Zstd {
    type Storage = File;

    fn format(&self) -> Format {
        self.image.format()
    }

    unsafe fn probe(_: &File) -> io::Result<bool> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn zero_granularity(&self) -> Option<u64> {
        self.image.zero_granularity()
    }

    fn collect_storage_dependencies(&self) -> Vec<&File> {
        self.image.collect_storage_dependencies()
    }

    fn writable(&self) -> bool {
        self.image.writable()
    }

    fn get_mapping(&self, offset: u64, most: u64) -> io::Result<(ShallowMapping<'_, File>, u64)> {
        match self.size.checked_sub(offset) {
            None | Some(0) => self.image.get_mapping(self.image.size(), most),
            Some(left) => self.image.get_mapping(offset, most.min(left)).map(|(at, len)| (at, len.min(left))),
        }
    }

    fn prepare_data_mapping(
        &self,
        offset: u64,
        length: u64,
        overwrite: bool,
    ) -> io::Result<PreparedDataMapping<'_, File>> {
        let end = offset.saturating_add(length).min(self.size);
        let partial = |cluster: u64| {
            let start = cluster << self.cluster_bits;
            start < offset || start + self.cluster() > end
        };
        if offset < end {
            let (first, last) = (offset >> self.cluster_bits, (end - 1) >> self.cluster_bits);
            if !overwrite {
                (first..=last).try_for_each(|cluster| self.unpack(cluster))?;
            } else {
                [first, last].into_iter().filter(|&c| partial(c)).try_for_each(|c| self.unpack(c))?;
            }
        }
        self.image.prepare_data_mapping(offset, length, overwrite)
    }

    fn commit_data_mapping(&self, mapping: PreparedDataMapping<'_, File>) -> io::Result<()> {
        self.image.commit_data_mapping(mapping)
    }

    fn ensure_zero_mapping(&self, offset: u64, length: u64) -> io::Result<(u64, u64)> {
        self.image.ensure_zero_mapping(offset, length)
    }

    fn readv_special(&self, mut to: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        let mut all = Vec::with_capacity(to.len() as usize);
        while (all.len() as u64) < to.len() {
            let cluster = self.read_cluster(offset >> self.cluster_bits)?;
            let from = &cluster[(offset % self.cluster()) as usize..];
            let part = &from[..from.len().min(to.len() as usize - all.len())];
            all.extend_from_slice(part);
            offset += part.len() as u64;
        }
        to.copy_from_slice(&all);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.image.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.image.sync()
    }

    /// Nobody asks for that, nor for another size.
    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn resize_grow(&self, _: u64, _: PreallocateMode) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn resize_shrink(&mut self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
