//! Everything that can go wrong on the way to a guest, each with what to do about it.

use std::io;
use std::path::PathBuf;

use crate::catalogue::CatalogueError;
use crate::deb::DebError;
use crate::fetch::FetchError;
use crate::kernel::UnpackError;
use crate::oci::OciError;
use crate::openpgp::SignatureError;
use crate::pull::PullError;

/// Why there is no guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither a mirror was named nor does apt know one.
    #[error(
        "this host has no apt configuration that names a Debian or Ubuntu archive; name a mirror with --mirror URL or \
         in the configuration file"
    )]
    NoArchive,
    /// Archives are configured, but none is Debian's or Ubuntu's main one.
    #[error(
        "none of the {tried} archives in the apt configuration is the main archive of Debian or Ubuntu; name a mirror \
         with --mirror URL"
    )]
    NoMainArchive {
        /// How many were looked at.
        tried: usize,
    },
    /// Something could not be downloaded.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// An image could not be had.
    #[error(transparent)]
    Pull(#[from] PullError),
    /// An OCI image cannot be had or used.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// The catalogue of images cannot be used.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// The archive's index is not signed by a key that this host trusts.
    #[error(
        "the archive {url} cannot be trusted, because {source}; check the mirror, and that the keyring is up to date \
         (package debian-archive-keyring or ubuntu-keyring)"
    )]
    Signature {
        /// What was checked.
        url: String,
        /// What is wrong with it.
        source: SignatureError,
    },
    /// There is no keyring to check the archive with.
    #[error(
        "there is no keyring to check {url} with; install the package debian-archive-keyring (or ubuntu-keyring), or \
         name a keyring"
    )]
    NoKeyring {
        /// What was to be checked.
        url: String,
    },
    /// The archive's index is too old or from the future.
    #[error(
        "the archive {url} {problem}; check this host's clock, or choose a mirror that is kept up to date"
    )]
    Date {
        /// The index.
        url: String,
        /// What is wrong with its date.
        problem: &'static str,
    },
    /// The archive's index is signed but does not say what it must.
    #[error("the archive {url} {problem}; choose another mirror or suite")]
    Archive {
        /// The archive.
        url: String,
        /// What is wrong.
        problem: String,
    },
    /// No such package.
    #[error(
        "the archive {archive} has no package {package} for {arch}; choose another suite, architecture or package"
    )]
    NoPackage {
        /// Which archive.
        archive: String,
        /// Which package.
        package: String,
        /// For which architecture.
        arch: String,
    },
    /// The packages of a system do not fit together.
    #[error(
        "the archive {archive} is not whole: {package} needs {needs}, which is not in it; choose another mirror or suite"
    )]
    Unmet {
        /// Which archive.
        archive: String,
        /// Which package, or `the system`.
        package: String,
        /// What it needs.
        needs: String,
    },
    /// A package does not have a file that was asked for.
    #[error("the package {package} has no file {file}; choose another kernel package")]
    NoFile {
        /// Which package.
        package: String,
        /// A path or pattern.
        file: String,
    },
    /// A package is damaged.
    #[error("the package {package} cannot be used: {source}")]
    Package {
        /// Which package.
        package: String,
        /// What is wrong with it.
        source: DebError,
    },
    /// A file of the user's cannot be read.
    #[error("cannot read {}: {source}; check the path and its permissions", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// There is no ELF kernel to take out of an image.
    #[error("cannot unpack {}: {source}; start it as it is", path.display())]
    Kernel {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        source: UnpackError,
    },
    /// There is nowhere to keep a cache.
    #[error("no directory for the cache is known; set HOME, XDG_CACHE_HOME or LODGE_CACHE_DIR")]
    NoCacheDir,
    /// The cache cannot be used.
    #[error(
        "cannot use the cache at {}: {source}; make room or allow writing there, or set LODGE_CACHE_DIR to another \
         directory",
        path.display()
    )]
    Cache {
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

impl Error {
    /// Turns what the system says of `path` in the cache into an error.
    pub(crate) fn cache(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Cache { path, source }
    }
}
