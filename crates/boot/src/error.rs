//! Why a guest could not be loaded.

use std::path::PathBuf;

/// Each message is one sentence: what happened; what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host does not give the file.
    #[error("cannot read {}: {source}", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it has to be.
    #[error("{}: {what}", .path.display())]
    Format {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// The file and memory do not go together.
    #[error("{} does not fit into the guest's memory; give it more with --memory", .path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
    },
    /// Command lines have a limit.
    #[error(
        "the command line has {len} characters and this kernel takes {max} at the most; shorten --cmdline"
    )]
    Cmdline {
        /// Bytes.
        len: usize,
        /// Bytes.
        max: usize,
    },
    /// Something of ours lies outside the guest's memory.
    #[error("the guest's memory has no room at {0:#x}; give it more with --memory")]
    NoMemory(u64),
}
