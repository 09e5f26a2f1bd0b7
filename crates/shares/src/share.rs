//! The directory itself.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, PROC_SUPER_MAGIC, ResolveFlags, fstatfs, openat, openat2};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getegid, geteuid, getrlimit, setrlimit};

/// What can go wrong before a guest is there; each message says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory cannot be opened.
    #[error("cannot share the directory {}: {source}", path.display())]
    Open {
        /// The directory.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Without it no file can be opened once more.
    #[error("cannot share directories without /proc; mount it")]
    Proc,
}

/// How one name is looked up below a directory.
const BENEATH: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS).union(ResolveFlags::NO_SYMLINKS);
/// Descriptors that are left to everything else.
const OTHER_FILES: u64 = 512;
/// Files and directories that a guest may know of at once, where the host gives as many descriptors.
const MOST_FILES: u64 = 1 << 18;

/// A directory that guests may use. It outlives resets of the machine.
#[derive(Debug)]
pub struct Share {
    root: OwnedFd,
    /// `/proc/self/fd`: by which a file that is held is opened for reading or writing.
    descriptors: OwnedFd,
    read_only: bool,
    /// Who runs this.
    owner: (u32, u32),
    most_files: usize,
}

impl Share {
    /// The directory at `path`. Raises the process's limit of open files as far as it may.
    ///
    /// # Errors
    /// It is no directory, or not accessible; or there is no `/proc`.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let failed = |source: Errno| Error::Open { path: path.to_owned(), source: source.into() };
        let root = openat(CWD, path, flags, Mode::empty()).map_err(failed)?;
        // A name that cannot be listed would be a surprise later.
        openat(&root, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(failed)?;
        let descriptors = openat(CWD, c"/proc/self/fd", flags, Mode::empty()).map_err(|_| Error::Proc)?;
        if !fstatfs(&descriptors).is_ok_and(|fs| fs.f_type == PROC_SUPER_MAGIC) {
            return Err(Error::Proc);
        }
        let owner = (geteuid().as_raw(), getegid().as_raw());
        Ok(Self { root, descriptors, read_only, owner, most_files: raise_limit() })
    }

    /// Whether guests may only read.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Files and directories that a guest may know of at once, and half as many that it may have open.
    pub(crate) fn most_files(&self) -> usize {
        self.most_files
    }

    /// Has guests hold no more than so many.
    #[cfg(test)]
    pub(crate) fn limit(&mut self, most_files: usize) {
        self.most_files = most_files;
    }

    /// Another descriptor of the directory.
    pub(crate) fn root(&self) -> io::Result<OwnedFd> {
        self.root.try_clone()
    }

    /// Opens what is called `name` in the directory `parent`; never through a link.
    pub(crate) fn open_beneath(
        parent: &OwnedFd,
        name: &std::ffi::CStr,
        flags: OFlags,
        mode: Mode,
    ) -> Result<OwnedFd, Errno> {
        openat2(parent, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, mode, BENEATH)
    }

    /// Opens once more what is held by `file`: a regular file or a directory, or anything with `OFlags::PATH`.
    pub(crate) fn reopen(&self, file: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        let (descriptors, number) = self.path_of(file);
        openat(descriptors, number, flags | OFlags::CLOEXEC, Mode::empty())
    }

    /// The path of what is held by `file`, which is a link that the kernel follows to the file itself.
    pub(crate) fn path_of(&self, file: &OwnedFd) -> (&OwnedFd, String) {
        (&self.descriptors, file.as_raw_fd().to_string())
    }

    /// An owner and a group as the guest sees them.
    pub(crate) fn shown(&self, uid: u32, gid: u32) -> (u32, u32) {
        const NOBODY: u32 = 65534;
        let show = |id, own| match id {
            id if self.owner.0 == 0 => id,
            id if id == own => 0,
            _ => NOBODY,
        };
        (show(uid, self.owner.0), show(gid, self.owner.1))
    }

    /// The host's number for an owner and a group of the guest's, as far as there is one.
    pub(crate) fn meant(
        &self,
        uid: Option<u32>,
        gid: Option<u32>,
    ) -> Result<(Option<u32>, Option<u32>), Errno> {
        let mean = |id: Option<u32>, own| match id {
            Some(0) => Ok(Some(own)),
            Some(id) if self.owner.0 != 0 || id == u32::MAX => Err(Errno::PERM),
            id => Ok(id),
        };
        Ok((mean(uid, self.owner.0)?, mean(gid, self.owner.1)?))
    }
}

/// Raises the limit of open files as far as it goes; how many a guest may have.
fn raise_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    // Where that is refused, it is as it was.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let all = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    (all.saturating_sub(OTHER_FILES) / 2).clamp(64, MOST_FILES) as usize
}
