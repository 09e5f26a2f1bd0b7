//! Files' contents.

use rustix::fs::{
    FallocateFlags, FileType, Mode, OFlags, SeekFrom, copy_file_range, fallocate, fchmod, fdatasync, fstat,
    fsync, seek,
};
use rustix::io::{Errno, pread, pwrite};

use crate::attributes::SET_ID;
use crate::fuse::{Answer, MOST_DATA};
use crate::nodes::{Handle, Node};
use crate::session::{Request, Session};
use crate::{Share, lock};

/// Bytes that one request copies at most; the guest asks again.
const MOST_COPIED: u64 = 64 << 20;
/// Of FSYNC's flags: only the data.
const ONLY_DATA: u32 = 1;
/// Of LSEEK.
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

/// How the host's file is opened where the guest opens it with `flags`. Nothing waits: no terminal, no pipe, no lease.
fn open_flags(flags: u32) -> Result<OFlags, Errno> {
    let asked = OFlags::from_bits_retain(flags);
    let kept = asked & (OFlags::RWMODE | OFlags::APPEND | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC);
    // The third way of access is none that Linux documents.
    if kept & OFlags::RWMODE == OFlags::RWMODE {
        return Err(Errno::INVAL);
    }
    Ok(kept | OFlags::NONBLOCK | OFlags::NOCTTY)
}

impl Session {
    pub(crate) fn open(&self, r: &mut Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        let flags = open_flags(r.args.u32()?)?;
        self.open_node(&*self.node(r.node)?, flags, out)
    }

    fn open_node(&self, node: &Node, flags: OFlags, out: &mut Answer) -> Result<(), Errno> {
        if node.kind != FileType::RegularFile {
            return Err(Errno::NXIO);
        }
        if self.share.is_read_only()
            && (flags & OFlags::RWMODE != OFlags::RDONLY || flags.contains(OFlags::TRUNC))
        {
            return Err(Errno::ROFS);
        }
        let file = self.share.reopen(&node.fd, flags)?;
        self.put_handle(Handle::File(file), out)
    }

    fn put_handle(&self, handle: Handle, out: &mut Answer) -> Result<(), Errno> {
        out.u64(self.add_handle(handle)?);
        out.zeroes(8);
        Ok(())
    }

    /// Makes a file and opens it; opens what is there already, unless that is not wanted.
    pub(crate) fn create(&self, r: &mut Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        let (asked, mode) = (r.args.u32()?, r.args.u32()?);
        r.args.skip(8)?;
        let name = r.args.name()?;
        let parent = self.directory(r.node)?;
        let flags = open_flags(asked)?;
        if mode & SET_ID != 0 {
            return Err(Errno::PERM);
        }
        let mode = Mode::from_raw_mode(mode & 0o1777);
        let create = flags | OFlags::CREATE | OFlags::EXCL;
        match Share::open_beneath(&parent.fd, name, create, mode) {
            Ok(file) => {
                // The host's umask may have taken away of it.
                if Mode::from_raw_mode(fstat(&file)?.st_mode & 0o1777) != mode {
                    fchmod(&file, mode)?;
                }
                let (node, stat) = self.hand_out(self.share.reopen(&file, OFlags::PATH)?)?;
                self.put_entry(node, &stat, out);
                self.put_handle(Handle::File(file), out)
            }
            Err(Errno::EXIST) if !OFlags::from_bits_retain(asked).contains(OFlags::EXCL) => {
                let (number, stat) = self.enter(&parent, name)?;
                let node = self.node(number)?;
                self.put_entry(number, &stat, out);
                self.open_node(&node, flags, out).inspect_err(|_| lock(&self.nodes).forget(number, 1))
            }
            Err(error) => Err(error),
        }
    }

    pub(crate) fn read(&self, r: &mut Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        let (handle, at, size) = (r.args.u64()?, r.args.u64()?, r.args.u32()?);
        let size = (size as usize).min(r.room).min(MOST_DATA);
        let handle = self.handle(handle)?;
        let Handle::File(file) = &*handle else { return Err(Errno::ISDIR) };
        let mut done = 0;
        let bytes = out.space(size);
        while done < size {
            match pread(file, &mut bytes[done..], at.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
            }
        }
        out.truncate(done);
        Ok(())
    }

    pub(crate) fn write(&self, r: &mut Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        let (handle, at, size) = (r.args.u64()?, r.args.u64()?, r.args.u32()?);
        r.args.skip(20)?;
        let bytes = r.args.0.get(..size as usize).ok_or(Errno::INVAL)?;
        let handle = self.handle(handle)?;
        let Handle::File(file) = &*handle else { return Err(Errno::ISDIR) };
        let mut done = 0;
        while done < bytes.len() {
            match pwrite(file, &bytes[done..], at.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
            }
        }
        out.u32(done as u32);
        out.u32(0);
        Ok(())
    }

    /// All that was written is on the host's disk afterwards.
    pub(crate) fn fsync(&self, r: &mut Request<'_>) -> Result<(), Errno> {
        let (handle, flags) = (r.args.u64()?, r.args.u32()?);
        match &*self.handle(handle)? {
            Handle::File(file) if flags & ONLY_DATA != 0 => fdatasync(file),
            Handle::File(file) => fsync(file),
            Handle::Directory(_, directory) => fsync(&*lock(directory)),
        }
    }

    pub(crate) fn fallocate(&self, r: &mut Request<'_>) -> Result<(), Errno> {
        let (handle, at, len, mode) = (r.args.u64()?, r.args.u64()?, r.args.u64()?, r.args.u32()?);
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        match &*self.handle(handle)? {
            Handle::File(file) => fallocate(file, mode, at, len),
            Handle::Directory(..) => Err(Errno::ISDIR),
        }
    }

    /// Finds data and holes. The position that the host's file gets by it is used by nobody.
    pub(crate) fn lseek(&self, r: &mut Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        let (handle, at, whence) = (r.args.u64()?, r.args.u64()?, r.args.u32()?);
        let handle = self.handle(handle)?;
        let Handle::File(file) = &*handle else { return Err(Errno::ISDIR) };
        let to = match whence {
            SEEK_DATA => SeekFrom::Data(at),
            SEEK_HOLE => SeekFrom::Hole(at),
            _ => return Err(Errno::INVAL),
        };
        out.u64(seek(file, to)?);
        Ok(())
    }

    pub(crate) fn copy_file_range(&self, r: &mut Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        let (from, mut from_at, _node) = (r.args.u64()?, r.args.u64()?, r.args.u64()?);
        let (to, mut to_at, len) = (r.args.u64()?, r.args.u64()?, r.args.u64()?);
        let (from, to) = (self.handle(from)?, self.handle(to)?);
        let (Handle::File(from), Handle::File(to)) = (&*from, &*to) else { return Err(Errno::ISDIR) };
        let len = len.min(MOST_COPIED) as usize;
        let copied = copy_file_range(from, Some(&mut from_at), to, Some(&mut to_at), len)?;
        out.u32(copied as u32);
        out.u32(0);
        Ok(())
    }
}
