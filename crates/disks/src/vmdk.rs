//! Sparse VMDK images, as VirtualBox, VMware and OVA files have them, shown as the bytes of their disk.
//!
//! Such a file has the disk in grains: a directory of tables of the places of grains, where 0 stands for a grain that was never
//! written. Stream-optimized files have their grains deflated, each behind a marker, and often the directory at their end.
//!
//! Source: VMware's Virtual Disk Format 5.0, "Hosted Sparse Extents" and "Stream-Optimized Compressed Sparse Extents".

use std::fs::File;
use std::io::{self, Read};

use flate2::read::ZlibDecoder;
use imago::file::File as HostFile;
use imago::{Storage, StorageExt};

use crate::chain::Image;
use crate::{Error, raw};

pub const MAGIC: &[u8] = b"KDMV";
const SECTOR: u64 = 512;
/// Flags of a header.
const COMPRESSED: u32 = 1 << 16;
/// The directory is at the end of the file, and so is a header that knows where.
const AT_END: u64 = u64::MAX;
/// A place of a grain that stands for zeroes.
const ZEROES: u64 = 1;
/// What we believe a header: a directory of 64 MiB (of 8 TiB of disk, with grains of 64 KiB), a descriptor of 64 KiB.
const MAX_TABLES: u64 = 16 << 20;
const MAX_DESCRIPTOR: u64 = 64 << 10;

/// Whether a VMDK is such a file; else it is a descriptor of others.
pub fn is_sparse(file: &File) -> io::Result<bool> {
    Ok(raw::head(file)?.starts_with(MAGIC))
}

/// Where everything is in such a file.
#[derive(Debug)]
pub struct Sparse {
    /// In bytes, as is every length here.
    pub size: u64,
    grain: u64,
    grains_per_table: u64,
    /// Where the tables are, in sectors.
    directory: Vec<u32>,
    compressed: bool,
}

/// What of a header is needed.
struct Header {
    flags: u32,
    capacity: u64,
    grain: u64,
    descriptor: (u64, u64),
    grains_per_table: u32,
    directory: u64,
    compression: u16,
}

impl Header {
    fn parse(bytes: &[u8; 79]) -> Option<Header> {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap_or_default());
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
        let header = Header {
            flags: u32_at(8),
            capacity: u64_at(12),
            grain: u64_at(20),
            descriptor: (u64_at(28), u64_at(36)),
            grains_per_table: u32_at(44),
            directory: u64_at(56),
            compression: u16::from_le_bytes([bytes[77], bytes[78]]),
        };
        (bytes.starts_with(MAGIC) && (1..=3).contains(&u32_at(4))).then_some(header)
    }
}

impl Sparse {
    /// Reads the header and the directory.
    pub fn open(image: &Image, host: &HostFile) -> Result<Sparse, Error> {
        let failed = |error| Error::io("read", &image.path, error);
        let damaged = |what: &str| Error::damaged(&image.path, what);
        let header = |at: u64| {
            let mut bytes = [0; 79];
            host.read(&mut bytes[..], at).map_err(failed)?;
            Header::parse(&bytes).ok_or_else(|| damaged("it has no sparse VMDK's header"))
        };
        let mut found = header(0)?;
        if found.directory == AT_END {
            // The last sectors are a marker, the header, and the end's marker.
            found = header(image.len.saturating_sub(2 * SECTOR))?;
        }
        let inside = |sector: u64, bytes: u64| {
            let at = sector.checked_mul(SECTOR)?;
            at.checked_add(bytes).filter(|&end| end <= image.len).map(|_| at)
        };
        let size = found.capacity.checked_mul(SECTOR).filter(|&size| size <= i64::MAX as u64);
        let grain = Some(found.grain).filter(|&grain| grain.is_power_of_two() && (1..=2048).contains(&grain));
        let (Some(size), Some(grain), 1..=4096) =
            (size, grain.map(|grain| grain * SECTOR), found.grains_per_table)
        else {
            return Err(damaged("the size of its disk, its grains or its tables is impossible"));
        };
        let compressed = found.flags & COMPRESSED != 0;
        if found.compression > 1 || compressed != (found.compression == 1) {
            return Err(Error::unsupported(
                &image.path,
                "an unknown compression of VMDK; convert it with qemu-img convert -O qcow2",
            ));
        }
        let (at, length) = (found.descriptor.0, found.descriptor.1.saturating_mul(SECTOR));
        if at != 0 && length <= MAX_DESCRIPTOR {
            let at = inside(at, length).ok_or_else(|| damaged("its descriptor is not inside the file"))?;
            let mut text = vec![0; length as usize];
            host.read(&mut text[..], at).map_err(failed)?;
            if has_parent(&String::from_utf8_lossy(&text)) {
                return Err(Error::unsupported(
                    &image.path,
                    "a snapshot of another VMDK; convert it with qemu-img convert -O qcow2",
                ));
            }
        }
        let grains_per_table = u64::from(found.grains_per_table);
        let tables = size.div_ceil(grain * grains_per_table);
        let directory = inside(found.directory, tables.saturating_mul(4)).filter(|_| tables <= MAX_TABLES);
        let directory = directory.ok_or_else(|| damaged("its grain directory is not inside the file"))?;
        let mut bytes = vec![0; tables as usize * 4];
        host.read(&mut bytes[..], directory).map_err(failed)?;
        let directory =
            bytes.chunks_exact(4).map(|entry| u32::from_le_bytes(entry.try_into().unwrap_or_default()));
        Ok(Sparse { size, grain, grains_per_table, directory: directory.collect(), compressed })
    }

    /// Fills `to` with the disk's bytes from `offset` on, zeroes where the disk has none.
    pub fn read(&self, host: &HostFile, mut offset: u64, mut to: &mut [u8]) -> io::Result<()> {
        let mut whole = Vec::new();
        while !to.is_empty() {
            let inside = offset % self.grain;
            let (part, rest) = to.split_at_mut((self.grain - inside).min(to.len() as u64) as usize);
            match self.place(host, offset / self.grain)? {
                None => part.fill(0),
                Some(at) if !self.compressed => host.read(&mut *part, at + inside)?,
                Some(at) => {
                    self.inflate(host, at, &mut whole)?;
                    part.copy_from_slice(&whole[inside as usize..][..part.len()]);
                }
            }
            offset += part.len() as u64;
            to = rest;
        }
        Ok(())
    }

    /// Where in the file a grain is.
    fn place(&self, host: &HostFile, grain: u64) -> io::Result<Option<u64>> {
        let table = self.directory.get((grain / self.grains_per_table) as usize).copied().unwrap_or(0);
        if table == 0 {
            return Ok(None);
        }
        let mut entry = [0; 4];
        host.read(&mut entry[..], u64::from(table) * SECTOR + grain % self.grains_per_table * 4)?;
        let sector = u64::from(u32::from_le_bytes(entry));
        Ok((sector > ZEROES).then_some(sector * SECTOR))
    }

    /// A marker (the grain's first sector, and the bytes that follow), and the deflated grain.
    fn inflate(&self, host: &HostFile, at: u64, to: &mut Vec<u8>) -> io::Result<()> {
        let mut marker = [0; 12];
        host.read(&mut marker[..], at)?;
        let length = u64::from(u32::from_le_bytes([marker[8], marker[9], marker[10], marker[11]]));
        // Deflate makes hardly more of what it cannot make less of.
        if length > self.grain * 2 || at + 12 + length > host.size()? {
            return Err(io::Error::other(format!("the compressed grain at {at} is not inside the file")));
        }
        let mut packed = vec![0; length as usize];
        host.read(&mut packed[..], at + 12)?;
        to.clear();
        ZlibDecoder::new(&packed[..]).take(self.grain).read_to_end(to)?;
        // The last one of a disk may be shorter.
        to.resize(self.grain as usize, 0);
        Ok(())
    }
}

/// Whether a descriptor says that the disk lies over another.
fn has_parent(descriptor: &str) -> bool {
    let parent = descriptor.lines().find_map(|line| line.trim().strip_prefix("parentCID"));
    let parent = parent.and_then(|rest| rest.trim_start().strip_prefix('='));
    parent.is_some_and(|id| !id.trim().eq_ignore_ascii_case("ffffffff"))
}
