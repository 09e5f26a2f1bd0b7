//! Locks on image files: nobody writes what another has open.
//!
//! Two kinds on every file. `flock` is what copies of Lodge tell each other by. QEMU and its tools lock single bytes by open file
//! description instead (`block/file-posix.c`): a byte from 100 on for each thing that the holder does, one from 200 on for each
//! thing that nobody else may do. We hold these as QEMU would, and look at the others'.

use std::fs::{File, TryLockError};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK, SEEK_SET, c_int, flock};

use crate::Error;

/// Where QEMU's bytes begin: what the holder does, and what nobody else may.
const DOES: i64 = 100;
const FORBIDS: i64 = 200;
/// What can be done (`BLK_PERM_…`): read, write, resize.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// The files on which we hold locks; to be dropped last, for then they are unlocked.
///
/// Closing a file would not do: a child that another thread has just forked has it open too, until it runs its program.
#[derive(Debug, Default)]
pub struct Locks(Vec<File>);

impl Drop for Locks {
    fn drop(&mut self) {
        for file in &self.0 {
            let _ = file.unlock();
            let _ = byte(file, F_UNLCK, 0, 0);
        }
    }
}

impl Locks {
    /// How many files there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Locks a file: to write it alone, or to read it along with others.
    pub fn lock(&mut self, file: &File, path: &Path, write: bool) -> Result<(), Error> {
        match if write { file.try_lock() } else { file.try_lock_shared() } {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::InUse { path: path.to_owned(), write }),
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", path, error)),
        }
        self.0.push(file.try_clone().map_err(|error| Error::io("lock", path, error))?);
        match lock_as_qemu(file, write) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::InUse { path: path.to_owned(), write }),
            // File systems without such locks: there are none of QEMU's either.
            Err(Errno::EINVAL | Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
            Err(error) => Err(Error::io("lock", path, error.into())),
        }
    }
}

/// Takes QEMU's locks; `false` if somebody else's are in the way. First ours, then a look: of two who do so at once, at least one
/// sees the other.
fn lock_as_qemu(file: &File, write: bool) -> Result<bool, Errno> {
    let does: &[i64] = if write { &[READ, WRITE, RESIZE] } else { &[READ] };
    let forbids = [WRITE, RESIZE];
    let ours = does.iter().map(|what| DOES + what).chain(forbids.map(|what| FORBIDS + what));
    for at in ours {
        match byte(file, F_RDLCK, at, 1) {
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(false),
            other => other?,
        }
    }
    let theirs = does.iter().map(|what| FORBIDS + what).chain(forbids.map(|what| DOES + what));
    for at in theirs {
        let mut lock = range(F_WRLCK, at, 1);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
        if c_int::from(lock.l_type) != F_UNLCK {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Locks or unlocks bytes from `at` on; a `len` of 0 is all of them.
fn byte(file: &File, kind: c_int, at: i64, len: i64) -> Result<(), Errno> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&range(kind, at, len))).map(drop)
}

fn range(kind: c_int, at: i64, len: i64) -> flock {
    flock { l_type: kind as i16, l_whence: SEEK_SET as i16, l_start: at, l_len: len, l_pid: 0 }
}
