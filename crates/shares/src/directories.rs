//! Names: looking them up, listing them, making, moving and removing what they stand for.

use std::ffi::CStr;
use std::sync::{Arc, Mutex};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RawDir, RenameFlags, SeekFrom, chmodat, linkat, mkdirat, mknodat,
    openat, readlinkat, renameat_with, seek, symlinkat, unlinkat,
};
use rustix::io::Errno;

use crate::attributes::SET_ID;
use crate::fuse::{Answer, MOST_DATA, ROOT};
use crate::lock;
use crate::nodes::{Handle, Node};
use crate::session::{Request, Session};

/// Bytes of a link's target at most: Linux's PATH_MAX.
const LONGEST_TARGET: usize = 4095;
/// Bytes of the host's listing that are read at once.
const LISTING: usize = 32 << 10;
/// Bytes of a name in a listing before the name, and of what a listing with attributes has before that.
const ENTRY: usize = 24;
const ATTRIBUTES: usize = 128;

impl Session {
    pub(crate) fn lookup(&self, r: &mut Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        let name = r.args.name()?;
        self.answer_with(&*self.directory(r.node)?, name, out)
    }

    /// Answers with the node of what is called `name` in `parent`.
    fn answer_with(&self, parent: &Node, name: &CStr, out: &mut Answer) -> Result<(), Errno> {
        let (node, stat) = self.enter(parent, name)?;
        self.put_entry(node, &stat, out);
        Ok(())
    }

    pub(crate) fn readlink(&self, r: &mut Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        let target = readlinkat(&self.node(r.node)?.fd, c"", Vec::new())?;
        out.put(&target.as_bytes()[..target.as_bytes().len().min(r.room)]);
        Ok(())
    }

    pub(crate) fn symlink(&self, r: &mut Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        let (name, target) = (r.args.name()?, r.args.text(LONGEST_TARGET)?);
        let parent = self.directory(r.node)?;
        symlinkat(target, &parent.fd, name)?;
        self.answer_with(&parent, name, out)
    }

    pub(crate) fn mknod(&self, r: &mut Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        let mode = r.args.u32()?;
        r.args.skip(12)?;
        let name = r.args.name()?;
        let parent = self.directory(r.node)?;
        let kind = FileType::from_raw_mode(mode);
        if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) || mode & SET_ID != 0 {
            return Err(Errno::PERM);
        }
        mknodat(&parent.fd, name, kind, Mode::from_raw_mode(mode & 0o1777), 0)?;
        self.made(&parent, name, mode, out)
    }

    pub(crate) fn mkdir(&self, r: &mut Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        let (mode, _umask) = (r.args.u32()?, r.args.u32()?);
        let name = r.args.name()?;
        let parent = self.directory(r.node)?;
        mkdirat(&parent.fd, name, Mode::from_raw_mode(mode & 0o1777))?;
        self.made(&parent, name, mode, out)
    }

    /// Answers with what was made now. Its mode is the guest's wish, of which the host's umask may have taken away.
    fn made(&self, parent: &Node, name: &CStr, mode: u32, out: &mut Answer) -> Result<(), Errno> {
        let (number, mut stat) = self.enter(parent, name)?;
        let missing = mode & 0o1777 & !stat.st_mode;
        if missing != 0
            && let Ok(node) = self.node(number)
            && node.kind != FileType::Symlink
        {
            let (descriptors, path) = self.share.path_of(&node.fd);
            let mode = stat.st_mode & 0o7777 | missing;
            // The guest sees what it got.
            let _ = chmodat(descriptors, path, Mode::from_raw_mode(mode), AtFlags::empty());
            stat = rustix::fs::fstat(&node.fd)?;
        }
        self.put_entry(number, &stat, out);
        Ok(())
    }

    pub(crate) fn unlink(&self, r: &mut Request<'_>, directory: bool) -> Result<(), Errno> {
        let name = r.args.name()?;
        let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        unlinkat(&self.directory(r.node)?.fd, name, flags)
    }

    pub(crate) fn rename(&self, r: &mut Request<'_>, with_flags: bool) -> Result<(), Errno> {
        let to = r.args.u64()?;
        let mut flags = RenameFlags::empty();
        if with_flags {
            flags = RenameFlags::from_bits(r.args.u32()?).ok_or(Errno::INVAL)?;
            r.args.skip(4)?;
        }
        // A "whiteout" is a device node.
        if flags.contains(RenameFlags::WHITEOUT) {
            return Err(Errno::INVAL);
        }
        let (old, new) = (r.args.name()?, r.args.name()?);
        renameat_with(&self.directory(r.node)?.fd, old, &self.directory(to)?.fd, new, flags)
    }

    pub(crate) fn link(&self, r: &mut Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        let node = self.node(r.args.u64()?)?;
        let name = r.args.name()?;
        let parent = self.directory(r.node)?;
        // The link that is followed is the kernel's own, to the file that is held.
        let (descriptors, number) = self.share.path_of(&node.fd);
        linkat(descriptors, number, &parent.fd, name, AtFlags::SYMLINK_FOLLOW)?;
        self.answer_with(&parent, name, out)
    }

    pub(crate) fn opendir(&self, r: &mut Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        let node = self.directory(r.node)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let listing = openat(&node.fd, c".", flags, Mode::empty())?;
        out.u64(self.add_handle(Handle::Directory(node, Mutex::new(listing)))?);
        out.zeroes(8);
        Ok(())
    }

    /// Lists a directory from a position on; `plus` looks up every name at once.
    pub(crate) fn readdir(&self, r: &mut Request<'_>, plus: bool, out: &mut Answer) -> Result<(), Errno> {
        let (handle, position, size) = (r.args.u64()?, r.args.u64()?, r.args.u32()?);
        let room = (size as usize).min(r.room).min(MOST_DATA);
        let handle = self.handle(handle)?;
        let Handle::Directory(node, listing) = &*handle else { return Err(Errno::NOTDIR) };
        let listing = lock(listing);
        seek(&*listing, SeekFrom::Start(position))?;
        let mut buffer = Vec::with_capacity(room.clamp(1024, LISTING));
        let mut entries = RawDir::new(&*listing, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                // What there is already can be given.
                Err(_) if out.len() > 0 => break,
                Err(error) => return Err(error),
            };
            let name = entry.file_name();
            let len = name.count_bytes();
            let padded = (ENTRY + len).next_multiple_of(8);
            if out.len() + padded + if plus { ATTRIBUTES } else { 0 } > room {
                break;
            }
            if plus {
                self.put_listed(node, name, out);
            }
            out.u64(if name == c".." { ROOT } else { entry.ino() });
            out.u64(entry.next_entry_cookie());
            out.u32(len as u32);
            out.u32(kind(entry.file_type()));
            out.put(name.to_bytes());
            out.zeroes(padded - ENTRY - len);
        }
        Ok(())
    }

    /// Attributes of a name in a listing; where they cannot be had, the guest asks again.
    fn put_listed(&self, parent: &Arc<Node>, name: &CStr, out: &mut Answer) {
        let dots = name == c"." || name == c"..";
        match if dots { Err(Errno::INVAL) } else { self.enter(parent, name) } {
            Ok((number, stat)) => self.put_entry(number, &stat, out),
            Err(_) => out.zeroes(ATTRIBUTES),
        }
    }
}

/// The kind of a file as listings have it.
fn kind(kind: FileType) -> u32 {
    match kind {
        FileType::Unknown => 0,
        kind => kind.as_raw_mode() >> 12,
    }
}
