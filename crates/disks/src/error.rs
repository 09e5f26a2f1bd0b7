//! What can go wrong with an image.

use std::io;
use std::path::{Path, PathBuf};

use crate::Format;

/// What can go wrong with an image; each message says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host failed us.
    #[error("cannot {what} the disk image {}: {source}", path.display())]
    Io {
        /// What we wanted to do, a verb.
        what: &'static str,
        /// The image.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Another VM holds a lock on the image.
    #[error("the disk image {} is in use; stop the virtual machine that uses it, or put an overlay over it for each{}",
        path.display(), if *write { ", or open it read-only if the other only reads it" } else { "" })]
    InUse {
        /// The image.
        path: PathBuf,
        /// Whether we wanted to write it.
        write: bool,
    },
    /// The image contradicts itself.
    #[error("the disk image {} is damaged: {what}; try qemu-img check, or a copy of it", path.display())]
    Damaged {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The image needs something that we do not do.
    #[error("the disk image {} needs what Lodge does not do: {what}", path.display())]
    Unsupported {
        /// The image.
        path: PathBuf,
        /// What it needs, and a way out.
        what: String,
    },
    /// The images lie over one another in a loop, or too many of them.
    #[error("the disk image {} has {what} below it; merge them with qemu-img rebase or qemu-img convert", path.display())]
    Chain {
        /// The image at which we stopped.
        path: PathBuf,
        /// What is wrong with its chain.
        what: &'static str,
    },
    /// The overlay does not say what its backing file is, and it does not look raw.
    #[error("the disk image {} does not record the format of its backing file, which looks like {format}; if it is, say so with \
        qemu-img rebase -u -F {format} -b {} {}", path.display(), backing.display(), path.display())]
    BackingFormat {
        /// The overlay.
        path: PathBuf,
        /// Its backing file, as it names it.
        backing: PathBuf,
        /// What the backing file looks like.
        format: Format,
    },
    /// An image from elsewhere names a file of this host.
    #[error("the disk image {} lies over {}, and could so read files of this host; if you trust it, name its file instead of \
        pulling it", path.display(), other.display())]
    NotAlone {
        /// The image.
        path: PathBuf,
        /// What it names.
        other: PathBuf,
    },
    /// A write to a disk that was opened read-only.
    #[error("the disk image {} is open read-only; open it for writing, or put an overlay over it", path.display())]
    ReadOnly {
        /// The image.
        path: PathBuf,
    },
    /// An access that is not wholly inside the disk.
    #[error("{len} bytes at {offset} are not inside a disk of {size} bytes; stay below its size")]
    OutOfRange {
        /// Where the access begins.
        offset: u64,
        /// How many bytes it wants.
        len: u64,
        /// The size of the disk.
        size: u64,
    },
    /// A write that would make a raw image, whose format was only detected, look like another format.
    #[error("refused to write a {format} header to the start of {}, whose format was not given; say that it is raw to allow it",
        path.display())]
    Forged {
        /// The image.
        path: PathBuf,
        /// What it would look like.
        format: Format,
    },
    /// A disk cannot be that large, or that small.
    #[error("a disk cannot have {size} bytes; use a multiple of 512, from 512 bytes to 1 EiB")]
    Size {
        /// What was asked for.
        size: u64,
    },
}

impl Error {
    pub(crate) fn io(what: &'static str, path: &Path, source: io::Error) -> Error {
        Error::Io { what, path: path.to_owned(), source }
    }

    pub(crate) fn damaged(path: &Path, what: impl Into<String>) -> Error {
        Error::Damaged { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn unsupported(path: &Path, what: impl Into<String>) -> Error {
        Error::Unsupported { path: path.to_owned(), what: what.into() }
    }
}
