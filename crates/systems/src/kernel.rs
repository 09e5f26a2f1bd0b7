//! What a VM's own disk tells, where the system on it is ours: which kernel it has, and whether its first start is over.
//!
//! After an upgrade the kernel is another than the one beside the disk, and the modules on the disk are for it.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use disks::Disk;
use ext4_view::{Ext4, Ext4Read, Metadata};
use gpt::GptConfig;
use gpt::disk::LogicalBlockSize::Lb512;
use gpt::partition_types::LINUX_FS;

use crate::Error;
use crate::build::{INITRD, KERNEL};

/// What the disk's owner is believed: bytes of a kernel, and of an initial RAM disk.
const LARGEST: [u64; 2] = [64 << 20, 512 << 20];

/// Takes over the kernel and the initial RAM disk that the system on `disk` would be started with (its links `/vmlinuz` and
/// `/initrd.img`, which Debian's packages keep) into the VM's directory, if it is another kernel than is there.
///
/// Where the disk cannot be read in this way, since its owner has made something else of it, the VM starts as before.
pub fn follow(dir: &Path, disk: &Arc<Disk>) -> Result<(), Error> {
    let [kernel, initrd] = [KERNEL, INITRD].map(|name| dir.join(name));
    let Some(system) = root(disk) else { return Ok(()) };
    let Ok(about) = system.metadata("/vmlinuz") else { return Ok(()) };
    let modified = modified(&about);
    let ours = fs::metadata(&kernel).map_err(Error::file(&kernel))?;
    if ours.len() == about.len() && modified.is_some() && ours.modified().ok() == modified {
        return Ok(());
    }
    let Some(theirs) = read(&system, "/vmlinuz", LARGEST[0]) else { return Ok(()) };
    if fs::read(&kernel).map_err(Error::file(&kernel))? == theirs {
        // By its date the next start knows it without reading it. Where that cannot be set, it is read again.
        let _ = File::open(&kernel).and_then(|file| modified.map_or(Ok(()), |time| file.set_modified(time)));
        return Ok(());
    }
    let Some(ramdisk) = read(&system, "/initrd.img", LARGEST[1]) else { return Ok(()) };
    // The kernel last: by it the next start knows that this is done.
    for (path, bytes) in [(&initrd, ramdisk), (&kernel, theirs)] {
        let put = || -> io::Result<()> {
            let mut new = tempfile::Builder::new().prefix(".new-").tempfile_in(dir)?;
            new.write_all(&bytes)?;
            modified.map_or(Ok(()), |time| new.as_file().set_modified(time))?;
            new.as_file().sync_all()?;
            new.persist(path)?;
            Ok(())
        };
        put().map_err(Error::file(path))?;
    }
    Ok(())
}

/// Whether the first start of the machine `id` is over: its system writes that down when it has done all that the seed asks for.
pub fn has_started(disk: &Arc<Disk>, id: &str) -> bool {
    const LONGEST: u64 = 256;
    let done = root(disk).and_then(|system| read(&system, "/var/lib/lodge/instance-id", LONGEST));
    done.is_some_and(|done| done.trim_ascii() == id.as_bytes())
}

fn modified(about: &Metadata) -> Option<SystemTime> {
    let time = about.modified();
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(time.seconds().try_into().ok()?, time.nanoseconds()))
}

/// The root file system: the last one in a partition.
fn root(disk: &Arc<Disk>) -> Option<Ext4> {
    let reader = Reader { disk: disk.clone(), start: 0, at: 0 };
    let table = GptConfig::new().logical_block_size(Lb512).open_from_device(reader).ok()?;
    let parts = table.partitions().values().filter(|part| part.part_type_guid == LINUX_FS);
    let start = parts.map(|part| part.first_lba).max()?.checked_mul(512)?;
    Ext4::load(Box::new(Reader { disk: disk.clone(), start, at: 0 })).ok()
}

/// A file of no more than `most` bytes.
fn read(system: &Ext4, path: &str, most: u64) -> Option<Vec<u8>> {
    let about = system.metadata(path).ok()?;
    (about.len() <= most).then(|| system.read(path).ok()).flatten()
}

/// A disk from `start` on, to read.
#[derive(Debug)]
struct Reader {
    disk: Arc<Disk>,
    start: u64,
    at: u64,
}

impl Ext4Read for Reader {
    fn read(&mut self, at: u64, to: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.disk.read(self.start.saturating_add(at), to)?)
    }
}

impl Read for Reader {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let len = (to.len() as u64).min(self.disk.size().saturating_sub(self.at)) as usize;
        self.disk.read(self.at, &mut to[..len]).map_err(io::Error::other)?;
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Reader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.disk.size().checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// The library asks for it, and does not use it on a table that is only read.
impl Write for Reader {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
