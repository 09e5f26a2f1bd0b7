//! Directories of the host that a guest may use: a server for the FUSE protocol (Linux, `include/uapi/linux/fuse.h`), version
//! 7.31 and later, which virtio-fs carries.
//!
//! The guest is hostile: it must never leave the directory. Everything is opened by a single name relative to a descriptor of a
//! directory, never by a path; names are checked; symbolic links are handed to the guest as they are, and never followed here.
//! Only regular files and directories are opened: pipes, sockets and device nodes are the guest's kernel's own. What the guest
//! makes belongs to the user who runs this, never gets the set-user-ID or set-group-ID bits (which would give others that
//! user's rights), and is never a device node.
//!
//! Owners are shown as in a user namespace: what belongs to the user who runs this is root's in the guest, and everything else is
//! nobody's. (Where that user is root, owners are shown as they are.) The guest's kernel checks permissions by what is shown, the
//! host's by the user who runs this.
//!
//! Nothing is cached for longer than a second, so that host and guest see each other's changes. Locks are the guest's own.
#![forbid(unsafe_code)]

mod attributes;
mod directories;
mod files;
mod fuse;
mod nodes;
mod session;
mod share;
#[cfg(test)]
mod tests;

use std::sync::{Mutex, MutexGuard};

pub use session::{Broken, Session};
pub use share::{Error, Share};

/// Locks; a thread that panicked with the lock leaves the table as it was then.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
