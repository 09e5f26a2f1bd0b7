//! Messages: what is read from requests, and what is written into answers. All numbers are little-endian.

use std::ffi::CStr;

use rustix::io::Errno;

/// Bytes of a request's header, and of an answer's.
pub const IN_HEADER: usize = 40;
/// See [`IN_HEADER`].
pub const OUT_HEADER: usize = 16;
/// Bytes of data in one request at most.
pub const MOST_DATA: usize = 1 << 20;
/// Pages of that.
pub const MOST_PAGES: u16 = (MOST_DATA / 4096) as u16;
/// Bytes of a request after its header at most: data, and what describes it.
pub const MOST_BODY: usize = MOST_DATA + 4096;
/// The node of the shared directory.
pub const ROOT: u64 = 1;

/// Our version. Drivers of virtio-fs came with 7.31.
pub const MAJOR: u32 = 7;
/// See [`MAJOR`].
pub const MINOR: u32 = 38;
/// The least minor version that we speak.
pub const LEAST_MINOR: u32 = 31;

/// What is asked for.
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
}

/// What both sides can do, of which INIT tells.
pub mod init {
    pub const ASYNC_READ: u32 = 1;
    pub const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const MAX_PAGES: u32 = 1 << 22;
}

/// A request's header.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    pub opcode: u32,
    /// Its number, which the answer repeats.
    pub unique: u64,
    /// The file or directory that it is about.
    pub node: u64,
}

impl Header {
    /// Reads one. The length in it is not needed: the request's end is known.
    pub fn read(bytes: &[u8; IN_HEADER]) -> Self {
        let mut args = Args(&bytes[4..]);
        let (opcode, unique, node) = (args.u32(), args.u64(), args.u64());
        // All are there.
        Self {
            opcode: opcode.unwrap_or_default(),
            unique: unique.unwrap_or_default(),
            node: node.unwrap_or_default(),
        }
    }
}

/// What follows a request's header.
#[derive(Debug)]
pub struct Args<'a>(pub &'a [u8]);

impl<'a> Args<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*bytes)
    }

    pub fn u32(&mut self) -> Result<u32, Errno> {
        self.take().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, Errno> {
        self.take().map(u64::from_le_bytes)
    }

    /// Leaves out bytes.
    pub fn skip(&mut self, bytes: usize) -> Result<(), Errno> {
        self.0 = self.0.get(bytes..).ok_or(Errno::INVAL)?;
        Ok(())
    }

    /// Text of at most `longest` bytes.
    pub fn text(&mut self, longest: usize) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = &self.0[text.count_bytes() + 1..];
        if text.count_bytes() > longest { Err(Errno::NAMETOOLONG) } else { Ok(text) }
    }

    /// A name in a directory: not empty, without a slash, and neither `.` nor `..`.
    pub fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.text(255)?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            _ => Ok(name),
        }
    }
}

/// An answer under way. Its memory is kept for the next one.
#[derive(Debug, Default)]
pub struct Answer {
    bytes: Vec<u8>,
    len: usize,
}

impl Answer {
    /// Begins with room for the header.
    pub fn clear(&mut self) {
        self.len = 0;
        self.space(OUT_HEADER);
    }

    /// The next `n` bytes, whatever is in them.
    pub fn space(&mut self, n: usize) -> &mut [u8] {
        let at = self.len;
        self.len += n;
        if self.bytes.len() < self.len {
            self.bytes.resize(self.len, 0);
        }
        &mut self.bytes[at..self.len]
    }

    /// Bytes after the header.
    pub fn len(&self) -> usize {
        self.len - OUT_HEADER
    }

    /// Takes back all but `n` bytes after the header.
    pub fn truncate(&mut self, n: usize) {
        self.len = self.len.min(OUT_HEADER + n);
    }

    pub fn put(&mut self, bytes: &[u8]) {
        self.space(bytes.len()).copy_from_slice(bytes);
    }

    pub fn u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }

    pub fn zeroes(&mut self, n: usize) {
        self.space(n).fill(0);
    }

    /// The whole answer to the request `unique`; an error has no more than the header.
    pub fn finish(&mut self, unique: u64, result: Result<(), Errno>) -> &[u8] {
        let error = match result {
            Ok(()) => 0,
            Err(error) => {
                self.truncate(0);
                -error.raw_os_error()
            }
        };
        let len = self.len;
        self.bytes[..4].copy_from_slice(&(len as u32).to_le_bytes());
        self.bytes[4..8].copy_from_slice(&error.to_le_bytes());
        self.bytes[8..16].copy_from_slice(&unique.to_le_bytes());
        &self.bytes[..len]
    }
}
