//! What a virtual disk is stored in: raw, qcow2 and VMDK images.
//!
//! [`Disk`] is an open image with everything below it, read and written by byte offset from as many threads as one likes; each
//! call blocks until the host has done it. Raw images are the host's file itself. For qcow2 (versions 2 and 3, backing chains,
//! compressed clusters) and VMDK (to read only) the library `imago` does the work; this crate finds the files of a chain, checks their
//! headers before `imago` allocates by them, locks them, and reads what `imago` does not know: clusters compressed by zstd, and
//! VMDK files that are not flat.
//!
//! # Locks
//!
//! Every file of a disk is locked: to write it alone, or to read it along with others. So two VMs can share a base image, and
//! neither can write what another has open. QEMU and its tools see the locks, and Lodge sees theirs.
//!
//! # What a flush promises
//!
//! When [`Disk::flush`] has returned, what was written before is on stable storage, with all that is needed to find it. An image
//! whose process is killed at any time is sound: whatever is referred to is counted. Clusters may leak, for they are counted
//! before they are used and given back after (`qemu-img check -r leaks` finds them). Where the host itself loses power, writes since
//! the last flush may have reached its disk in any order; then `qemu-img check -r all` is in place.
//!
//! # Formats that a guest could forge
//!
//! A guest owns every byte of a raw image, so it could write a qcow2 header there that names a file of the host as its backing
//! file, and read that file after the next start. So a raw image whose format was only detected refuses writes that would make it
//! look like another format (as QEMU does); name the format to allow them. A backing file whose format the overlay does not
//! record must be raw.
//!
//! An image made by a stranger may name any file of the host as its backing file, and a VM would hand that file's contents to the
//! guest. So images that are fetched are opened once by [`Disk::open_alone`], which refuses them if they name others. An image
//! that the user names is believed. Extents of a VMDK are taken from its own folder alone.

// Not `forbid`, for the signatures of a trait of imago's (see `file`).
#![deny(unsafe_code)]

mod chain;
mod create;
mod error;
mod file;
mod locks;
mod qcow2;
mod raw;
mod vmdk;
mod zstd;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

pub use create::create;
pub use error::Error;
use imago::Mapping;
use serde::{Deserialize, Serialize};

/// How an image stores its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// The bytes of the disk, nothing else: a file or a block device.
    Raw,
    /// QEMU's format, which grows as it is written and can lie over a base image.
    Qcow2,
    /// VMware's format; read only.
    Vmdk,
}

/// The longest magic number that [`Format::detect`] looks at, in bytes.
const MAGIC: usize = 21;

impl Format {
    /// The format that an image beginning with `head` is in; raw if it looks like nothing else.
    fn detect(head: &[u8; MAGIC]) -> Format {
        if head.starts_with(b"QFI\xfb") {
            Format::Qcow2
        } else if head.starts_with(vmdk::MAGIC) || head == b"# Disk DescriptorFile" {
            Format::Vmdk
        } else {
            Format::Raw
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
        })
    }
}

/// How to open an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Options {
    /// Its format; `None` detects it by the first bytes.
    pub format: Option<Format>,
    /// Never write to it, and let others read it meanwhile. VMDK images need this.
    pub read_only: bool,
    /// What becomes of what is written.
    pub cache: Cache,
    /// Only read the image, as others may meanwhile: what is written to the disk is kept beside it, and gone when it is dropped.
    pub throw_away: bool,
}

/// Where what is written may wait, in QEMU's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cache {
    /// In the host's cache, until it is flushed.
    #[default]
    Writeback,
    /// Nowhere: each write is flushed, by way of the host's cache.
    Writethrough,
    /// In the disk's own cache, until it is flushed: the host's is passed by (O_DIRECT).
    None,
    /// Nowhere: each write is flushed, and the host's cache passed by.
    Directsync,
    /// Wherever it likes: nothing is ever flushed. For what may be lost when the host stops.
    Unsafe,
}

impl Cache {
    /// All of them, by the words of the command line.
    pub const WORDS: [(&str, Cache); 5] = [
        ("writeback", Cache::Writeback),
        ("writethrough", Cache::Writethrough),
        ("none", Cache::None),
        ("directsync", Cache::Directsync),
        ("unsafe", Cache::Unsafe),
    ];

    fn direct(self) -> bool {
        matches!(self, Cache::None | Cache::Directsync)
    }

    fn through(self) -> bool {
        matches!(self, Cache::Writethrough | Cache::Directsync)
    }
}

/// An open disk image. Dropping it unlocks its files; what was not flushed then is the host's to write back.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    format: Format,
    size: u64,
    read_only: bool,
    cache: Cache,
    store: Store,
    _locks: locks::Locks,
}

#[derive(Debug)]
enum Store {
    Raw(raw::Raw),
    /// Requests share the lock; what may make, move or drop clusters under another request holds it alone.
    Layered(Box<RwLock<chain::Layer>>),
}

/// Writes; what needs new clusters holds the lock alone. For `imago` writes its tables to disk, for a flush or to make room, in two
/// steps: the counts of clusters, then what refers to them. No cluster may be counted and referred to between these.
fn write_layered(layer: &RwLock<chain::Layer>, offset: u64, from: &[u8]) -> std::io::Result<()> {
    let shared = held(layer.read());
    let mut at = offset;
    let end = offset + from.len() as u64;
    while at < end {
        match shared.get_mapping(at, end - at)? {
            (Mapping::Raw { writable: true, .. }, len @ 1..) => at += len,
            _ => {
                drop(shared);
                return held(layer.write()).write(from, offset);
            }
        }
    }
    shared.write(from, offset)
}

/// What a [`RwLock`] of ours gives, whether or not somebody panicked with it: nothing of ours is half done inside.
fn held<T>(guard: Result<T, PoisonError<T>>) -> T {
    guard.unwrap_or_else(PoisonError::into_inner)
}

/// The format of the image at `path`, by its first bytes.
pub fn format(path: &Path) -> Result<Format, Error> {
    let head = std::fs::File::open(path).and_then(|file| raw::head(&file));
    Ok(Format::detect(&head.map_err(|error| Error::io("open", path, error))?))
}

impl Disk {
    /// Opens the image at `path`, and with it the images it lies over.
    ///
    /// Fails if a file cannot be opened or is locked by another VM, if a header is damaged or asks for what we do not do, and if
    /// the chain loops or has more than 16 images.
    pub fn open(path: &Path, options: &Options) -> Result<Disk, Error> {
        let write = !options.read_only && !options.throw_away;
        let mut chain = chain::Chain::default();
        chain.direct = options.cache.direct();
        let image = chain::Image::open(path, options.format, write, &mut chain.locks)?;
        let format = image.format;
        if format == Format::Vmdk && write {
            return Err(Error::unsupported(
                path,
                "writing VMDK images; open it read-only or to be thrown away, or convert it with qemu-img convert",
            ));
        }
        let (size, store) = if options.throw_away && !options.read_only {
            let layer = chain::over(chain::open(image, false, &mut chain)?)
                .map_err(|error| Error::io("keep what is written to", path, error))?;
            (layer.size(), Store::Layered(Box::new(RwLock::new(layer))))
        } else if format == Format::Raw {
            let direct = chain.direct.then(|| chain::past_cache(&image, write)).transpose()?;
            (image.len, Store::Raw(raw::Raw::new(image.file, options.format.is_none(), direct)))
        } else {
            let layer = chain::open(image, write, &mut chain)?;
            (layer.size(), Store::Layered(Box::new(RwLock::new(layer))))
        };
        Ok(Disk {
            path: path.to_owned(),
            format,
            size,
            read_only: options.read_only,
            // What is thrown away need not last.
            cache: if options.throw_away { Cache::Unsafe } else { options.cache },
            store,
            _locks: chain.locks,
        })
    }

    /// Opens an image of a stranger's to read it: one that names another file, whose contents it could so get hold of, is refused.
    pub fn open_alone(path: &Path) -> Result<Disk, Error> {
        let mut chain = chain::Chain::default();
        let image = chain::Image::open(path, None, false, &mut chain.locks)?;
        let other = match image.format {
            Format::Raw => None,
            Format::Qcow2 => qcow2::check(&image)?.backing.map(|backing| backing.name),
            Format::Vmdk if vmdk::is_sparse(&image.file).unwrap_or(false) => None,
            Format::Vmdk => Some("other files, as VMDK images do that have a descriptor of their own".into()),
        };
        match other {
            Some(other) => Err(Error::NotAlone { path: path.to_owned(), other }),
            None => {
                let format = Some(image.format);
                Disk::open(path, &Options { format, read_only: true, ..Options::default() })
            }
        }
    }

    /// Where the topmost image is, as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The size of the disk, in bytes; not always a multiple of a sector.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether every write is refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The format of the topmost image.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Fills `to` with the disk's bytes from `offset` on.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        self.check_range(offset, to.len() as u64)?;
        match &self.store {
            Store::Raw(raw) => raw.read(offset, to),
            Store::Layered(layer) => held(layer.read()).read(to, offset),
        }
        .map_err(|error| Error::io("read", &self.path, error))
    }

    /// Writes `from` at `offset`. It is durable after the next [`Disk::flush`].
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        self.check_write(offset, from.len() as u64)?;
        match &self.store {
            Store::Raw(raw) => match raw.write(offset, from) {
                Ok(Format::Raw) => Ok(()),
                Ok(forged) => return Err(Error::Forged { path: self.path.clone(), format: forged }),
                Err(error) => Err(error),
            },
            Store::Layered(layer) => write_layered(layer, offset, from),
        }
        .map_err(|error| Error::io("write", &self.path, error))?;
        self.written()
    }

    /// After each change: with some caches it must not wait.
    fn written(&self) -> Result<(), Error> {
        if self.cache.through() { self.flush() } else { Ok(()) }
    }

    /// Returns when everything written so far, data and metadata, is on stable storage ([`Cache::Unsafe`]: is with the host).
    pub fn flush(&self) -> Result<(), Error> {
        if self.read_only {
            return Ok(());
        }
        let sync = self.cache != Cache::Unsafe;
        match &self.store {
            Store::Raw(raw) if sync => raw.flush(),
            Store::Raw(_) => Ok(()),
            Store::Layered(layer) => {
                let layer = held(layer.read());
                layer.flush().and_then(|()| if sync { layer.sync() } else { Ok(()) })
            }
        }
        .map_err(|error| Error::io("flush", &self.path, error))
    }

    /// Says that the guest no longer needs these `len` bytes: they read as zero or as before, and their space on the host is freed
    /// where it can be.
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.check_write(offset, len)?;
        if self.is_tiny() {
            return self.write(offset, &vec![0; len as usize]);
        }
        match &self.store {
            Store::Raw(raw) => raw.discard(offset, len),
            Store::Layered(layer) => held(layer.write()).discard_to_zero(offset, len),
        }
        .or_else(|error| if error.kind() == std::io::ErrorKind::Unsupported { Ok(()) } else { Err(error) })
        .map_err(|error| Error::io("discard a part of", &self.path, error))?;
        self.written()
    }

    /// Whether the disk is smaller than the largest cluster: of one that is smaller than its own clusters `imago` 0.2.6 makes
    /// more zero than it is asked to.
    fn is_tiny(&self) -> bool {
        matches!(self.store, Store::Layered(_)) && self.size < 2 << 20
    }

    /// Makes these `len` bytes zero; with `may_unmap`, their space on the host may be freed.
    pub fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), Error> {
        self.check_write(offset, len)?;
        if self.is_tiny() {
            return self.write(offset, &vec![0; len as usize]);
        }
        // Zeroing a part of a cluster looks at the rest of it first, so no write may come in between: the lock is held alone.
        match &self.store {
            Store::Raw(raw) if may_unmap => raw.discard(offset, len),
            Store::Raw(raw) => raw.zero(offset, len),
            Store::Layered(layer) if may_unmap => held(layer.write()).discard_to_zero(offset, len),
            Store::Layered(layer) => held(layer.write()).write_zeroes(offset, len),
        }
        .or_else(|error| {
            if error.kind() != std::io::ErrorKind::Unsupported {
                return Err(Error::io("write zeroes to", &self.path, error));
            }
            let zeroes = [0; 1 << 16];
            (0..len).step_by(zeroes.len()).try_for_each(|done| {
                let step = (len - done).min(zeroes.len() as u64);
                self.write(offset + done, &zeroes[..step as usize])
            })
        })?;
        self.written()
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<(), Error> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(Error::OutOfRange { offset, len, size: self.size }),
        }
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<(), Error> {
        if self.read_only {
            return Err(Error::ReadOnly { path: self.path.clone() });
        }
        self.check_range(offset, len)
    }
}
