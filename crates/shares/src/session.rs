//! A guest's use of a share, from INIT on.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, fstatvfs, syncfs};
use rustix::io::Errno;

use crate::fuse::{self, Answer, Args, Header, IN_HEADER, OUT_HEADER, init, op};
use crate::nodes::{Handle, Handles, Node, Nodes};
use crate::{Error, Share, lock};

/// The request cannot be understood at all, or its answer has no room: the driver is broken.
#[derive(Debug)]
pub struct Broken;

/// What a guest has of a share. A new machine has a new one.
#[derive(Debug)]
pub struct Session {
    pub(crate) share: Arc<Share>,
    pub(crate) nodes: Mutex<Nodes>,
    pub(crate) handles: Mutex<Handles>,
    /// As many as there have been requests at once.
    buffers: Mutex<Vec<Buffers>>,
}

#[derive(Debug, Default)]
struct Buffers {
    body: Vec<u8>,
    answer: Answer,
}

/// Where requests are that need more than a header for their answer.
pub(crate) struct Request<'a> {
    pub node: u64,
    pub args: Args<'a>,
    /// Bytes that the answer may have after its header.
    pub room: usize,
}

impl Session {
    /// A session in which nothing has happened yet.
    ///
    /// # Errors
    /// The host gives no descriptor.
    pub fn new(share: Arc<Share>) -> Result<Self, Error> {
        let nodes = fresh(&share).map_err(|source| Error::Open { path: "again".into(), source })?;
        Ok(Self { share, nodes: Mutex::new(nodes), handles: Mutex::default(), buffers: Mutex::default() })
    }

    /// Forgets all that the guest had open.
    pub fn reset(&self) {
        // Without a descriptor there is nothing to be had, not even the root.
        *lock(&self.nodes) = fresh(&self.share).unwrap_or_default();
        *lock(&self.handles) = Handles::default();
    }

    /// Serves a request of `len` bytes, whose answer may have `room`. Gives the bytes of the answer; some requests have none.
    ///
    /// # Errors
    /// The request cannot be read, or there is no room for its answer.
    pub fn serve(
        &self,
        mut request: impl Read,
        len: usize,
        mut answer: impl Write,
        room: usize,
    ) -> Result<usize, Broken> {
        let len = len.checked_sub(IN_HEADER).filter(|&len| len <= fuse::MOST_BODY).ok_or(Broken)?;
        let mut header = [0; IN_HEADER];
        request.read_exact(&mut header).map_err(|_| Broken)?;
        let header = Header::read(&header);
        let mut buffers = lock(&self.buffers).pop().unwrap_or_default();
        if buffers.body.len() < len {
            buffers.body.resize(len, 0);
        }
        let Buffers { body, answer: made } = &mut buffers;
        let body = &mut body[..len];
        request.read_exact(body).map_err(|_| Broken)?;
        let mut args = Args(body);
        let bytes = match header.opcode {
            op::FORGET | op::BATCH_FORGET | op::INTERRUPT => {
                self.forget(&header, &mut args);
                0
            }
            _ => {
                let room = room.checked_sub(OUT_HEADER).ok_or(Broken)?;
                made.clear();
                let mut request = Request { node: header.node, args, room };
                let result = self.dispatch(header.opcode, &mut request, made);
                let made = made.finish(header.unique, result);
                if made.len() > room + OUT_HEADER {
                    return Err(Broken);
                }
                answer.write_all(made).map_err(|_| Broken)?;
                made.len()
            }
        };
        lock(&self.buffers).push(buffers);
        Ok(bytes)
    }

    fn dispatch(&self, opcode: u32, r: &mut Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        if self.share.is_read_only() && changes(opcode) {
            return Err(Errno::ROFS);
        }
        match opcode {
            op::INIT => self.init(r, out),
            op::DESTROY => {
                self.reset();
                Ok(())
            }
            op::STATFS => self.statfs(r, out),
            op::SYNCFS => {
                let node = self.node(r.node)?;
                syncfs(self.share.reopen(&node.fd, OFlags::RDONLY | OFlags::DIRECTORY)?)
            }
            op::LOOKUP => self.lookup(r, out),
            op::GETATTR => self.getattr(r, out),
            op::SETATTR => self.setattr(r, out),
            op::READLINK => self.readlink(r, out),
            op::SYMLINK => self.symlink(r, out),
            op::MKNOD => self.mknod(r, out),
            op::MKDIR => self.mkdir(r, out),
            op::UNLINK => self.unlink(r, false),
            op::RMDIR => self.unlink(r, true),
            op::RENAME => self.rename(r, false),
            op::RENAME2 => self.rename(r, true),
            op::LINK => self.link(r, out),
            op::OPEN => self.open(r, out),
            op::CREATE => self.create(r, out),
            op::READ => self.read(r, out),
            op::WRITE => self.write(r, out),
            op::FSYNC | op::FSYNCDIR => self.fsync(r),
            op::FALLOCATE => self.fallocate(r),
            op::LSEEK => self.lseek(r, out),
            op::COPY_FILE_RANGE => self.copy_file_range(r, out),
            op::OPENDIR => self.opendir(r, out),
            op::READDIR => self.readdir(r, false, out),
            op::READDIRPLUS => self.readdir(r, true, out),
            op::RELEASE | op::RELEASEDIR => {
                lock(&self.handles).remove(r.args.u64()?);
                Ok(())
            }
            // The guest's kernel asks no more, and does without: extended attributes, locks, and what closing should tell.
            _ => Err(Errno::NOSYS),
        }
    }

    fn init(&self, r: &mut Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        let (major, minor) = (r.args.u32()?, r.args.u32()?);
        if major < fuse::MAJOR || major == fuse::MAJOR && minor < fuse::LEAST_MINOR {
            return Err(Errno::PROTO);
        }
        out.u32(fuse::MAJOR);
        out.u32(fuse::MINOR);
        if major > fuse::MAJOR {
            // It begins again with our version.
            out.zeroes(56);
            return Ok(());
        }
        let (readahead, offered) = (r.args.u32()?, r.args.u32()?);
        let wanted = init::ASYNC_READ
            | init::ATOMIC_O_TRUNC
            | init::BIG_WRITES
            | init::AUTO_INVAL_DATA
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES;
        self.reset();
        out.u32(readahead);
        out.u32(offered & wanted);
        // Requests in the background, at most and when there are many: the kernel's defaults.
        out.u32(0);
        out.u32(fuse::MOST_DATA as u32);
        // Times have nanoseconds.
        out.u32(1);
        out.put(&fuse::MOST_PAGES.to_le_bytes());
        out.zeroes(34);
        Ok(())
    }

    fn forget(&self, header: &Header, args: &mut Args<'_>) {
        let mut nodes = lock(&self.nodes);
        match header.opcode {
            op::FORGET => nodes.forget(header.node, args.u64().unwrap_or_default()),
            op::BATCH_FORGET => {
                let count = args.u32().unwrap_or_default();
                // What is missing ends it.
                let _ = args.u32();
                for _ in 0..count {
                    let (Ok(node), Ok(times)) = (args.u64(), args.u64()) else { break };
                    nodes.forget(node, times);
                }
            }
            _ => {}
        }
    }

    fn statfs(&self, r: &Request<'_>, out: &mut Answer) -> Result<(), Errno> {
        let fs = fstatvfs(&self.node(r.node)?.fd)?;
        for value in [fs.f_blocks, fs.f_bfree, fs.f_bavail, fs.f_files, fs.f_ffree] {
            out.u64(value);
        }
        out.u32(fs.f_bsize as u32);
        out.u32(fs.f_namemax as u32);
        out.u32(fs.f_frsize as u32);
        out.zeroes(28);
        Ok(())
    }

    pub(crate) fn node(&self, number: u64) -> Result<Arc<Node>, Errno> {
        lock(&self.nodes).get(number)
    }

    /// A node that is a directory.
    pub(crate) fn directory(&self, number: u64) -> Result<Arc<Node>, Errno> {
        let node = self.node(number)?;
        if node.kind == FileType::Directory { Ok(node) } else { Err(Errno::NOTDIR) }
    }

    pub(crate) fn handle(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        lock(&self.handles).get(number)
    }

    pub(crate) fn add_handle(&self, handle: Handle) -> Result<u64, Errno> {
        lock(&self.handles).insert(handle, self.share.most_files() / 2)
    }

    /// Hands out what is called `name` in `parent`: its node, and what it is.
    pub(crate) fn enter(&self, parent: &Node, name: &std::ffi::CStr) -> Result<(u64, Stat), Errno> {
        self.hand_out(Share::open_beneath(&parent.fd, name, OFlags::PATH, Mode::empty())?)
    }

    /// Hands out what is held by a descriptor that gives no access.
    pub(crate) fn hand_out(&self, fd: OwnedFd) -> Result<(u64, Stat), Errno> {
        let stat = fstat(&fd)?;
        let node = lock(&self.nodes).hand_out(fd, &stat, self.share.most_files())?;
        Ok((node, stat))
    }
}

/// Only the shared directory.
fn fresh(share: &Share) -> std::io::Result<Nodes> {
    let root = share.root()?;
    let stat = fstat(&root)?;
    Ok(Nodes::new(root, &stat))
}

/// Whether a request is one that changes something. Opening says so by its flags.
fn changes(opcode: u32) -> bool {
    matches!(
        opcode,
        op::SETATTR
            | op::SYMLINK
            | op::MKNOD
            | op::MKDIR
            | op::UNLINK
            | op::RMDIR
            | op::RENAME
            | op::RENAME2
            | op::LINK
            | op::CREATE
            | op::WRITE
            | op::FALLOCATE
            | op::COPY_FILE_RANGE
    )
}
