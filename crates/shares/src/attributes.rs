//! What is known of a file beside its contents.

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, chmodat,
    chownat, fstat, ftruncate, utimensat,
};
use rustix::io::Errno;

use crate::fuse::Answer;
use crate::lock;
use crate::nodes::{Handle, Node};
use crate::session::{Request, Session};

/// Seconds for which the guest may rely on a name and on attributes.
const VALID: u64 = 1;
/// The set-user-ID and set-group-ID bits.
pub(crate) const SET_ID: u32 = 0o6000;

/// What SETATTR is to set.
mod set {
    pub const MODE: u32 = 1;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const HANDLE: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
}

impl Session {
    pub(crate) fn getattr(&self, r: &mut Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        let stat = fstat(&self.node(r.node)?.fd)?;
        self.put_attributes(&stat, out);
        Ok(())
    }

    pub(crate) fn setattr(&self, r: &mut Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        let args = &mut r.args;
        let valid = args.u32()?;
        args.skip(4)?;
        let (handle, size, _lock) = (args.u64()?, args.u64()?, args.u64()?);
        let seconds = [args.u64()?, args.u64()?, args.u64()?];
        let nanoseconds = [args.u32()?, args.u32()?, args.u32()?];
        let (mode, _) = (args.u32()?, args.u32()?);
        let (uid, gid) = (args.u32()?, args.u32()?);

        let node = self.node(r.node)?;
        if valid & set::MODE != 0 {
            self.set_mode(&node, mode)?;
        }
        if valid & (set::UID | set::GID) != 0 {
            let asked = |bit, id| (valid & bit != 0).then_some(id);
            let (uid, gid) = self.share.meant(asked(set::UID, uid), asked(set::GID, gid))?;
            chownat(&node.fd, c"", uid.map(Uid::from_raw), gid.map(Gid::from_raw), AtFlags::EMPTY_PATH)?;
        }
        if valid & set::SIZE != 0 {
            let handle = if valid & set::HANDLE != 0 { Some(self.handle(handle)?) } else { None };
            match handle.as_deref() {
                Some(Handle::File(file)) => ftruncate(file, size)?,
                _ if node.kind == FileType::RegularFile => {
                    ftruncate(self.share.reopen(&node.fd, OFlags::WRONLY | OFlags::NONBLOCK)?, size)?;
                }
                _ => return Err(Errno::INVAL),
            }
        }
        let time = |n: usize, bit, now| {
            let (tv_sec, tv_nsec) = match () {
                () if valid & now != 0 => (0, UTIME_NOW),
                () if valid & bit == 0 => (0, UTIME_OMIT),
                () if nanoseconds[n] >= 1_000_000_000 => return Err(Errno::INVAL),
                () => (seconds[n] as i64, nanoseconds[n].into()),
            };
            Ok(Timespec { tv_sec, tv_nsec })
        };
        if valid & (set::ATIME | set::MTIME | set::ATIME_NOW | set::MTIME_NOW) != 0 {
            let times = Timestamps {
                last_access: time(0, set::ATIME, set::ATIME_NOW)?,
                last_modification: time(1, set::MTIME, set::MTIME_NOW)?,
            };
            utimensat(&node.fd, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        let stat = fstat(&node.fd)?;
        self.put_attributes(&stat, out);
        Ok(())
    }

    fn set_mode(&self, node: &Node, mode: u32) -> Result<(), Errno> {
        let mode = mode & 0o7777;
        match node.kind {
            FileType::Symlink => return Err(Errno::OPNOTSUPP),
            FileType::Directory => {}
            // Bits that are there already may stay.
            _ if mode & SET_ID & !fstat(&node.fd)?.st_mode != 0 => return Err(Errno::PERM),
            _ => {}
        }
        let (descriptors, number) = self.share.path_of(&node.fd);
        chmodat(descriptors, number, Mode::from_raw_mode(mode), AtFlags::empty())
    }

    /// Answers with attributes, and how long they can be relied on.
    fn put_attributes(&self, stat: &Stat, out: &mut Answer) {
        out.u64(VALID);
        out.zeroes(8);
        self.put_bare(stat, out);
    }

    /// Answers with a node that is handed out.
    pub(crate) fn put_entry(&self, node: u64, stat: &Stat, out: &mut Answer) {
        out.u64(node);
        // The generation: numbers of nodes are not used again.
        out.u64(0);
        out.u64(VALID);
        out.u64(VALID);
        out.zeroes(8);
        self.put_bare(stat, out);
    }

    fn put_bare(&self, stat: &Stat, out: &mut Answer) {
        let inode = lock(&self.nodes).inode(stat);
        let (uid, gid) = self.share.shown(stat.st_uid, stat.st_gid);
        for value in [inode, stat.st_size as u64, stat.st_blocks as u64] {
            out.u64(value);
        }
        for seconds in [stat.st_atime, stat.st_mtime, stat.st_ctime] {
            out.u64(seconds as u64);
        }
        for nanoseconds in [stat.st_atime_nsec, stat.st_mtime_nsec, stat.st_ctime_nsec] {
            out.u32(nanoseconds as u32);
        }
        // In the protocol, numbers of devices are 32 bits wide in the form of Linux's 20 and 12.
        for value in
            [stat.st_mode, stat.st_nlink as u32, uid, gid, stat.st_rdev as u32, stat.st_blksize as u32, 0]
        {
            out.u32(value);
        }
    }
}
