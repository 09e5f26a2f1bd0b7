//! Initial RAM disks: the `newc` form of cpio (Linux: `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! ```
//! let mut image = images::cpio::Cpio::new();
//! image.dir("dev", 0o755).device("dev/console", 0o600, 5, 1).file("init", 0o755, b"#!/bin/sh\n");
//! let bytes: Vec<u8> = image.finish();
//! ```

use std::collections::BTreeSet;
use std::io::Write;

const DIRECTORY: u32 = 0o040000;
const CHARACTER_DEVICE: u32 = 0o020000;
const REGULAR: u32 = 0o100000;
const SYMLINK: u32 = 0o120000;
/// The bits of a mode that are permissions, set-user-ID, set-group-ID and sticky.
const PERMISSIONS: u32 = 0o7777;

/// What a general entry says beside its path and its mode.
#[derive(Debug, Clone, Copy)]
pub struct Inode {
    /// User and group.
    pub owner: (u32, u32),
    /// Of a device: major and minor number.
    pub device: (u32, u32),
    /// How many names the file has. Those after the first come without its contents.
    pub links: u32,
    /// The number of the file that this is another name of.
    pub number: Option<u32>,
}

impl Default for Inode {
    fn default() -> Self {
        Self { owner: (0, 0), device: (0, 0), links: 1, number: None }
    }
}

/// Builds an archive entry by entry; everything belongs to root and bears no time, so equal input gives equal bytes.
///
/// Paths are relative to the root directory of the guest (a leading `/` is dropped). Missing parent directories are
/// made with mode 0755, once.
#[derive(Debug, Default, Clone)]
pub struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
    directories: BTreeSet<String>,
}

impl Cpio {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory. Adding one again changes nothing.
    pub fn dir(&mut self, path: &str, mode: u32) -> &mut Self {
        let path = self.parents(path);
        if !path.is_empty() && self.directories.insert(path.clone()) {
            self.entry(&path, DIRECTORY | (mode & PERMISSIONS), (0, 0), &[]);
        }
        self
    }

    /// Adds a regular file with `contents` (less than 4 GiB, a limit of the format: what is beyond is cut off).
    pub fn file(&mut self, path: &str, mode: u32, contents: &[u8]) -> &mut Self {
        let path = self.parents(path);
        self.entry(&path, REGULAR | (mode & PERMISSIONS), (0, 0), contents);
        self
    }

    /// Adds a symbolic link at `path` that points to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        let path = self.parents(path);
        self.entry(&path, SYMLINK | 0o777, (0, 0), target.as_bytes());
        self
    }

    /// Adds a character device node.
    pub fn device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> &mut Self {
        let path = self.parents(path);
        self.entry(&path, CHARACTER_DEVICE | (mode & PERMISSIONS), (major, minor), &[]);
        self
    }

    /// Adds an entry of any kind: `mode` has the type's bits, too. Gives the number of the file.
    pub fn inode(&mut self, path: &str, mode: u32, inode: Inode, contents: &[u8]) -> u32 {
        let path = self.parents(path);
        if mode & 0o170000 == DIRECTORY {
            self.directories.insert(path.clone());
        }
        self.general(&path, mode, inode, contents)
    }

    /// The archive's bytes, uncompressed: what costs a guest the least to unpack.
    pub fn finish(mut self) -> Vec<u8> {
        self.entries = 0; // The trailer has no inode of its own.
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    /// The archive's bytes, compressed with gzip.
    pub fn finish_gzip(self) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        // Writing to a vector cannot fail.
        out.write_all(&self.finish()).and_then(|()| out.finish()).unwrap_or_default()
    }

    /// Adds the parent directories that are missing, and gives the path back in its plain form.
    fn parents(&mut self, path: &str) -> String {
        let path = path.trim_matches('/');
        for (at, _) in path.match_indices('/') {
            if self.directories.insert(path[..at].to_owned()) {
                self.entry(&path[..at], DIRECTORY | 0o755, (0, 0), &[]);
            }
        }
        path.to_owned()
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.general(path, mode, Inode { device, ..Inode::default() }, data);
    }

    fn general(&mut self, path: &str, mode: u32, inode: Inode, data: &[u8]) -> u32 {
        let data = &data[..data.len().min(u32::MAX as usize)];
        let Inode { owner: (uid, gid), device: (major, minor), links, number } = inode;
        let number = number.unwrap_or(self.entries);
        self.entries = self.entries.wrapping_add(1);
        let links = if mode & 0o170000 == DIRECTORY { 2 } else { links };
        let name_size = path.len() as u32 + 1;
        self.bytes.extend_from_slice(b"070701");
        // inode, mode, uid, gid, links, mtime, size, device (major, minor), node (major, minor), name size, checksum
        let size = data.len() as u32;
        for field in [number, mode, uid, gid, links, 0, size, 0, 0, major, minor, name_size, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
        number
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive back: (name, mode, data).
    fn entries(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut at = 0;
        let mut found = Vec::new();
        loop {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |n: usize| {
                let from = at + 6 + n * 8;
                u32::from_str_radix(std::str::from_utf8(&bytes[from..from + 8]).unwrap(), 16).unwrap()
                    as usize
            };
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = String::from_utf8(bytes[at + 110..at + 110 + name_size - 1].to_vec()).unwrap();
            assert_eq!(bytes[at + 110 + name_size - 1], 0);
            let data = (at + 110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                return found;
            }
            found.push((name, mode as u32, bytes[data..data + size].to_vec()));
            at = (data + size).next_multiple_of(4);
        }
    }

    #[test]
    fn entries_come_back_as_written_and_parents_are_made_once() {
        let mut image = Cpio::new();
        image.file("/bin/a", 0o755, b"12345").symlink("bin/b", "a").device("dev/console", 0o600, 5, 1);
        image.dir("bin", 0o700).dir("proc", 0o555);
        let bytes = image.finish();
        assert_eq!(bytes.len() % 512, 0);
        let expected = [
            ("bin", 0o040755, &b""[..]),
            ("bin/a", 0o100755, b"12345"),
            ("bin/b", 0o120777, b"a"),
            ("dev", 0o040755, b""),
            ("dev/console", 0o020600, b""),
            ("proc", 0o040555, b""),
        ];
        let found = entries(&bytes);
        assert_eq!(found.len(), expected.len());
        for ((name, mode, data), wanted) in found.iter().zip(expected) {
            assert_eq!((name.as_str(), *mode, &data[..]), wanted);
        }
    }

    #[test]
    fn gzip_holds_the_same_archive() {
        let mut image = Cpio::new();
        image.file("init", 0o755, &[7; 100_000]);
        let mut plain = Vec::new();
        let packed = image.clone().finish_gzip();
        std::io::copy(&mut flate2::read::GzDecoder::new(&packed[..]), &mut plain).unwrap();
        assert!(packed.len() < 1000);
        assert_eq!(plain, image.finish());
    }
}
