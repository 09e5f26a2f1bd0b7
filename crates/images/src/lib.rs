//! Where guest systems come from: the Debian archive, initial RAM disks.
//!
//! The default guest is a distribution's own kernel with busybox in an initial RAM disk made here. Both come from the
//! archive that the host's apt configuration names, checked as apt does: the index's OpenPGP signature against the
//! host's keyring, then every file's SHA-256. They are kept in a cache, so that a second start needs no network.
//!
//! ```no_run
//! let options = images::Options::default();
//! let guest = images::default_guest(&options, &mut images::Silent)?;
//! println!("{}: {}", guest.description, guest.kernel.display());
//! # Ok::<(), images::Error>(())
//! ```
#![forbid(unsafe_code)]

pub mod apt;
mod archive;
mod bundle;
mod cache;
mod catalogue;
pub mod cpio;
pub mod deb;
mod deb822;
mod error;
mod fetch;
mod firmware;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod guest;
pub mod kernel;
mod more;
pub mod oci;
mod openpgp;
mod packages;
mod progress;
mod pull;
mod release;
mod resolve;
mod source;
pub mod tree;

use std::path::PathBuf;
use std::time::Duration;

pub use bundle::Bundle;
pub use cache::{Cache, Lock};
pub use catalogue::{Catalogue, CatalogueError, Entry, is_name};
pub use error::Error;
pub use fetch::{FetchError, sha256};
pub use firmware::{Firmware, FirmwareFiles, firmware};
pub use guest::{Guest, VIRTIO_MODULES, default_guest, initramfs, unpacked_kernel};
pub use more::more_packages;
pub use openpgp::SignatureError;
pub use progress::{Progress, Silent};
pub use pull::{Check, PullError, Pulled, pull};
pub use source::{PackageFile, PackageFiles, Source};

/// Which guest, and where from. The default is what `lodge run` starts without any option.
#[derive(Debug, Clone)]
pub struct Options {
    /// The archive's URL, in place of the one that apt is configured for.
    pub mirror: Option<String>,
    /// The suite, such as `trixie`; the host's own if absent.
    pub suite: Option<String>,
    /// Debian's name of the guest's architecture: `amd64` or `i386`.
    pub arch: String,
    /// The kernel's package, such as `linux-image-686`; one fit for a virtual machine if absent.
    pub kernel: Option<String>,
    /// The keyring that the archive is checked with, in place of the host's.
    pub keyring: Option<PathBuf>,
    /// The cache; the user's usual one if absent (`LODGE_CACHE_DIR`, `XDG_CACHE_HOME`, `~/.cache`).
    pub cache_dir: Option<PathBuf>,
    /// Whether to ask the archive for newer versions although there is a guest in the cache.
    pub refresh: bool,
    /// Where the host's configuration is found: `/` but in tests.
    pub sysroot: PathBuf,
    /// How often a transfer is tried without getting further, and the pause after the first failure, if not the usual.
    pub patience: Option<(u32, Duration)>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            mirror: None,
            suite: None,
            arch: "amd64".to_owned(),
            kernel: None,
            keyring: None,
            cache_dir: None,
            refresh: false,
            sysroot: PathBuf::from("/"),
            patience: None,
        }
    }
}
