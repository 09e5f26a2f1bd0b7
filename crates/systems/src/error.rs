//! Why there is no system.

use std::io;
use std::path::PathBuf;

/// Each message is one sentence: what happened; what to do.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error(transparent)]
    Images(#[from] images::Error),
    #[error("the packages for the system cannot be read: {0}; try again, or choose another mirror")]
    Package(#[from] images::deb::DebError),
    #[error(transparent)]
    Disk(#[from] disks::Error),
    #[error(transparent)]
    Vm(#[from] vm::Error),
    #[error(
        "making the system failed while {step}; the console's last lines:\n{tail}\n; see whether they tell why, and try again"
    )]
    Build { step: String, tail: String },
    #[error("cannot use {}: {source}; make room or allow writing there", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("cannot lay out the disk {}: {reason}; this is a bug of Lodge, please report it", path.display())]
    Layout { path: PathBuf, reason: String },
    #[error("\"{0}\" is no name for a virtual machine; use letters, digits, - and _, at most 63")]
    Name(String),
    #[error("\"{0}\" is no name for an image; use letters, digits, -, _ and ., with at most one : in it")]
    ImageName(String),
    #[error("\"{0}\" is no name for a user; use small letters, digits, - and _, at most 32, a letter first")]
    User(String),
    #[error("\"{0}\" is no name for a package; use small letters, digits, +, - and ., at least 2")]
    PackageName(String),
    #[error(
        "the virtual machine {name} is there already, and what is said of its user, keys, packages and commands counts at its first \
         start only; start it without that, or remove {}", path.display()
    )]
    Settled { name: String, path: PathBuf },
    #[error("the virtual machine {name} in {} is damaged: {reason}; remove it", path.display())]
    Damaged { name: String, path: PathBuf, reason: String },
    #[error("no directory for virtual machines is known; set HOME, XDG_DATA_HOME or LODGE_DATA_DIR")]
    NoDataDir,
}

impl Error {
    /// Turns what the system says of `path` into an error.
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}
