//! A guest's kernel by hand, well-behaved and not.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;

use crate::fuse::op;
use crate::{Session, Share};

const ROOT: u64 = 1;
const O_RDWR: u32 = 2;
const O_EXCL: u32 = 0o200;
const O_TRUNC: u32 = 0o1000;
const ROOM: usize = (1 << 20) + 16;

struct Guest {
    dir: tempfile::TempDir,
    session: Session,
}

/// A request's body.
#[derive(Default)]
struct Body(Vec<u8>);

impl Body {
    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.0.extend(bytes.as_ref());
        self
    }

    fn name(self, name: impl AsRef<[u8]>) -> Self {
        self.bytes(name).bytes([0])
    }
}

fn body() -> Body {
    Body::default()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

impl Guest {
    fn new(read_only: bool) -> Self {
        Self::limited(read_only, 1000)
    }

    fn limited(read_only: bool, most_files: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut share = Share::open(dir.path(), read_only).unwrap();
        share.limit(most_files);
        let this = Self { dir, session: Session::new(Arc::new(share)).unwrap() };
        let answer = this.ask(op::INIT, 0, body().u32(7).u32(38).u32(1 << 17).u32(u32::MAX)).unwrap();
        assert_eq!((u32_at(&answer, 0), answer.len()), (7, 64));
        this
    }

    fn host(&self, name: impl AsRef<Path>) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn ask(&self, opcode: u32, node: u64, body: Body) -> Result<Vec<u8>, Errno> {
        let mut request = Vec::new();
        request.extend((40 + body.0.len() as u32).to_le_bytes());
        request.extend(opcode.to_le_bytes());
        request.extend(77u64.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend([0; 16]);
        request.extend(&body.0);
        let mut answer = Vec::new();
        let len = self.session.serve(&request[..], request.len(), &mut answer, ROOM).unwrap();
        assert_eq!(len, answer.len());
        if len == 0 {
            return Ok(answer);
        }
        assert_eq!((u32_at(&answer, 0) as usize, u64_at(&answer, 8)), (len, 77));
        match u32_at(&answer, 4) as i32 {
            0 => Ok(answer.split_off(16)),
            error => {
                assert_eq!(len, 16);
                Err(Errno::from_raw_os_error(-error))
            }
        }
    }

    fn lookup(&self, parent: u64, name: impl AsRef<[u8]>) -> Result<u64, Errno> {
        self.ask(op::LOOKUP, parent, body().name(name)).map(|answer| u64_at(&answer, 0))
    }

    /// Node and handle.
    fn create(&self, name: &str, flags: u32, mode: u32) -> Result<(u64, u64), Errno> {
        let answer = self.ask(op::CREATE, ROOT, body().u32(flags).u32(mode).u32(0).u32(0).name(name))?;
        Ok((u64_at(&answer, 0), u64_at(&answer, 128)))
    }

    fn open(&self, node: u64, flags: u32) -> Result<u64, Errno> {
        self.ask(op::OPEN, node, body().u32(flags).u32(0)).map(|answer| u64_at(&answer, 0))
    }

    fn read(&self, handle: u64, at: u64, size: u32) -> Result<Vec<u8>, Errno> {
        self.ask(op::READ, ROOT, body().u64(handle).u64(at).u32(size).u32(0).u64(0).u64(0))
    }

    fn write(&self, handle: u64, at: u64, bytes: &[u8]) -> Result<u32, Errno> {
        let head = body().u64(handle).u64(at).u32(bytes.len() as u32).u32(0).u64(0).u64(0);
        self.ask(op::WRITE, ROOT, head.bytes(bytes)).map(|answer| u32_at(&answer, 0))
    }

    fn set_mode(&self, node: u64, mode: u32) -> Result<u32, Errno> {
        let head = body().u32(1).u32(0).bytes([0; 60]).u32(mode).bytes([0; 16]);
        self.ask(op::SETATTR, node, head).map(|answer| u32_at(&answer, 16 + 60))
    }

    fn set_size(&self, node: u64, size: u64) -> Result<Vec<u8>, Errno> {
        self.ask(op::SETATTR, node, body().u32(8).u32(0).u64(0).u64(size).bytes([0; 64]))
    }

    /// All names of a directory, listed in pieces of `size` bytes.
    fn list(&self, node: u64, opcode: u32, size: u32) -> Vec<Vec<u8>> {
        let handle = u64_at(&self.ask(op::OPENDIR, node, body().u64(0)).unwrap(), 0);
        let (mut names, mut position) = (Vec::new(), 0);
        let before = if opcode == op::READDIRPLUS { 128 } else { 0 };
        loop {
            let piece = body().u64(handle).u64(position).u32(size).u32(0).u64(0).u64(0);
            let answer = self.ask(opcode, node, piece).unwrap();
            assert!(answer.len() <= size as usize);
            if answer.is_empty() {
                self.ask(op::RELEASEDIR, node, body().u64(handle).u64(0).u64(0)).unwrap();
                return names;
            }
            let mut rest = &answer[..];
            while !rest.is_empty() {
                let entry = &rest[before..];
                position = u64_at(entry, 8);
                let len = u32_at(entry, 16) as usize;
                names.push(entry[24..24 + len].to_vec());
                rest = &entry[(24 + len).next_multiple_of(8)..];
            }
        }
    }
}

#[test]
fn host_and_guest_see_each_others_files() {
    let guest = Guest::new(false);
    fs::write(guest.host("from-host"), "hello").unwrap();
    let node = guest.lookup(ROOT, "from-host").unwrap();
    let handle = guest.open(node, 0).unwrap();
    assert_eq!(guest.read(handle, 1, 100).unwrap(), b"ello");
    assert_eq!(guest.write(handle, 0, b"x"), Err(Errno::BADF), "it is open for reading");

    let (node, handle) = guest.create("from-guest", O_RDWR, 0o100_666).unwrap();
    assert_eq!(guest.write(handle, 3, b"abc").unwrap(), 3);
    guest.ask(op::FSYNC, node, body().u64(handle).u64(0)).unwrap();
    assert_eq!(fs::read(guest.host("from-guest")).unwrap(), b"\0\0\0abc");
    let metadata = fs::metadata(guest.host("from-guest")).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o666, "the guest has its own umask");
    assert_eq!(metadata.uid(), rustix::process::geteuid().as_raw());
    let attributes = guest.ask(op::GETATTR, node, body().u64(0).u64(0)).unwrap();
    assert_eq!((u64_at(&attributes, 16 + 8), u32_at(&attributes, 16 + 68)), (6, 0), "its size, and root's");

    assert_eq!(guest.create("from-host", O_RDWR | O_EXCL, 0o644), Err(Errno::EXIST));
    let (_, handle) = guest.create("from-host", O_RDWR | O_TRUNC, 0o644).unwrap();
    assert_eq!(guest.read(handle, 0, 9).unwrap(), b"");
    assert_eq!(guest.lookup(ROOT, "nothing"), Err(Errno::NOENT));
}

#[test]
fn nothing_leads_out_of_the_directory() {
    let guest = Guest::new(false);
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    symlink(outside.path(), guest.host("out")).unwrap();
    symlink(outside.path().join("secret"), guest.host("file")).unwrap();
    fs::create_dir(guest.host("dir")).unwrap();
    for name in ["..", ".", "", "dir/..", "/", "../secret"] {
        assert_eq!(guest.lookup(ROOT, name), Err(Errno::INVAL), "{name:?}");
        assert_eq!(guest.ask(op::MKDIR, ROOT, body().u64(0o755).name(name)).unwrap_err(), Errno::INVAL);
        let rename = body().u64(ROOT).name("dir").name(name);
        assert_eq!(guest.ask(op::RENAME, ROOT, rename).unwrap_err(), Errno::INVAL);
    }
    // Links are links: what they point at is looked up by the guest, in its own tree.
    let (out, file) = (guest.lookup(ROOT, "out").unwrap(), guest.lookup(ROOT, "file").unwrap());
    assert_eq!(guest.ask(op::READLINK, out, body()).unwrap(), outside.path().as_os_str().as_bytes());
    assert_eq!(guest.lookup(out, "secret"), Err(Errno::NOTDIR));
    assert_eq!(guest.ask(op::OPENDIR, out, body().u64(0)), Err(Errno::NOTDIR));
    for flags in [0, 1, O_RDWR, O_TRUNC] {
        assert_eq!(guest.open(file, flags), Err(Errno::NXIO));
    }
    assert!(guest.create("file", O_RDWR | O_TRUNC, 0o644).is_err());
    assert!(guest.set_size(file, 0).is_err() && guest.set_mode(file, 0o777).is_err());
    assert_eq!(fs::read(outside.path().join("secret")).unwrap(), b"secret");
    // A directory that becomes a link while the guest holds it stays the directory.
    let dir = guest.lookup(ROOT, "dir").unwrap();
    fs::rename(guest.host("dir"), guest.host("moved")).unwrap();
    symlink(outside.path(), guest.host("dir")).unwrap();
    assert_eq!(guest.lookup(dir, "secret"), Err(Errno::NOENT));
    guest.ask(op::SYMLINK, ROOT, body().name("new").name("/etc/passwd")).unwrap();
    assert_eq!(fs::read_link(guest.host("new")).unwrap(), Path::new("/etc/passwd"));
}

#[test]
fn no_rights_are_given_away_and_nothing_waits() {
    let guest = Guest::new(false);
    for (kind, error) in [(0o060_644, Errno::PERM), (0o020_666, Errno::PERM), (0o104_755, Errno::PERM)] {
        let mknod = body().u32(kind).u32(0x0801).u64(0).name("x");
        assert_eq!(guest.ask(op::MKNOD, ROOT, mknod), Err(error), "{kind:o}");
    }
    assert_eq!(guest.create("x", O_RDWR, 0o104_755), Err(Errno::PERM));
    let (node, _) = guest.create("x", O_RDWR, 0o100_755).unwrap();
    assert_eq!(guest.set_mode(node, 0o4755), Err(Errno::PERM));
    assert_eq!(guest.set_mode(node, 0o2755), Err(Errno::PERM));
    assert_eq!(guest.set_mode(node, 0o700).unwrap() & 0o7777, 0o700);
    let mknod = body().u32(0o010_644).u32(0).u64(0).name("pipe");
    let pipe = u64_at(&guest.ask(op::MKNOD, ROOT, mknod).unwrap(), 0);
    assert_eq!(guest.open(pipe, 0), Err(Errno::NXIO), "a pipe is not opened on the host");
    assert_eq!(guest.create("pipe", 1, 0o644), Err(Errno::NXIO));
}

#[test]
fn a_share_for_reading_refuses_every_change() {
    let guest = Guest::new(true);
    fs::write(guest.host("file"), "here").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(node, 0).unwrap();
    assert_eq!(guest.read(handle, 0, 10).unwrap(), b"here");
    let refused: [(u32, Body); 10] = [
        (op::CREATE, body().u32(O_RDWR).u32(0o644).u64(0).name("new")),
        (op::MKDIR, body().u64(0o755).name("new")),
        (op::MKNOD, body().u32(0o100_644).u32(0).u64(0).name("new")),
        (op::SYMLINK, body().name("new").name("file")),
        (op::LINK, body().u64(node).name("new")),
        (op::UNLINK, body().name("file")),
        (op::RENAME, body().u64(ROOT).name("file").name("new")),
        (op::RENAME2, body().u64(ROOT).u64(0).name("file").name("new")),
        (op::WRITE, body().u64(handle).u64(0).u32(1).u32(0).u64(0).u64(0).bytes("x")),
        (op::FALLOCATE, body().u64(handle).u64(0).u64(100).u64(0)),
    ];
    for (opcode, body) in refused {
        assert_eq!(guest.ask(opcode, ROOT, body), Err(Errno::ROFS), "{opcode}");
    }
    for flags in [1, 2, O_TRUNC] {
        assert_eq!(guest.open(node, flags), Err(Errno::ROFS));
    }
    assert_eq!(guest.set_size(node, 0), Err(Errno::ROFS));
    assert_eq!(guest.set_mode(node, 0o777), Err(Errno::ROFS));
    let names: Vec<_> =
        fs::read_dir(guest.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!((names, fs::read(guest.host("file")).unwrap()), (vec!["file".into()], b"here".to_vec()));
}

#[test]
fn a_file_is_the_same_under_all_its_names_and_under_none() {
    let guest = Guest::new(false);
    let (node, handle) = guest.create("a", O_RDWR, 0o644).unwrap();
    guest.write(handle, 0, b"text").unwrap();
    assert_eq!(u64_at(&guest.ask(op::LINK, ROOT, body().u64(node).name("b")).unwrap(), 0), node);
    assert_eq!(guest.lookup(ROOT, "b").unwrap(), node);
    guest.ask(op::RENAME, ROOT, body().u64(ROOT).name("b").name("c")).unwrap();
    guest.ask(op::UNLINK, ROOT, body().name("a")).unwrap();
    guest.ask(op::UNLINK, ROOT, body().name("c")).unwrap();
    assert_eq!(guest.read(handle, 0, 9).unwrap(), b"text");
    guest.set_size(node, 2).unwrap();
    let again = guest.open(node, 0).unwrap();
    assert_eq!(guest.read(again, 0, 9).unwrap(), b"te", "it can be opened without a name");
    // Known by creating, linking and looking up: three times.
    guest.ask(op::FORGET, node, body().u64(2)).unwrap();
    assert!(guest.open(node, 0).is_ok());
    guest.ask(op::FORGET, node, body().u64(1)).unwrap();
    assert_eq!(guest.open(node, 0), Err(Errno::STALE));
    guest.ask(op::RELEASE, node, body().u64(handle).u64(0).u64(0)).unwrap();
    assert_eq!(guest.read(handle, 0, 1), Err(Errno::BADF));
    // Exchanging, and not replacing.
    fs::write(guest.host("x"), "x").unwrap();
    fs::write(guest.host("y"), "y").unwrap();
    let rename = |flags| guest.ask(op::RENAME2, ROOT, body().u64(ROOT).u32(flags).u32(0).name("x").name("y"));
    assert_eq!(rename(1), Err(Errno::EXIST));
    rename(2).unwrap();
    assert_eq!(fs::read(guest.host("x")).unwrap(), b"y");
    assert_eq!(rename(4), Err(Errno::INVAL), "a whiteout is a device node");
}

#[test]
fn names_are_bytes_and_lists_are_whole() {
    let guest = Guest::limited(false, 100_000);
    let odd = b"odd \xff\xfe\nname";
    fs::write(guest.host(OsStr::from_bytes(odd)), "").unwrap();
    assert!(guest.lookup(ROOT, odd).is_ok());
    assert_eq!(guest.lookup(ROOT, [b'x'; 256]), Err(Errno::NAMETOOLONG));
    for n in 0..10_000 {
        fs::write(guest.host(format!("file-{n}")), "").unwrap();
    }
    for (opcode, size) in [(op::READDIR, 4096), (op::READDIRPLUS, 4096), (op::READDIRPLUS, 1 << 20)] {
        let mut names = guest.list(ROOT, opcode, size);
        assert_eq!(names.len(), 10_003);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 10_003, "each once");
        assert!(names.iter().any(|name| name == odd));
    }
}

#[test]
fn large_and_sparse_files() {
    const FAR: u64 = 5 << 30;
    let guest = Guest::new(false);
    let (node, handle) = guest.create("large", O_RDWR, 0o644).unwrap();
    assert_eq!(guest.write(handle, FAR, &vec![7; 1 << 20]).unwrap(), 1 << 20);
    assert_eq!(guest.read(handle, FAR - 1, 3).unwrap(), [0, 7, 7]);
    let metadata = fs::metadata(guest.host("large")).unwrap();
    assert_eq!(metadata.len(), FAR + (1 << 20));
    assert!(metadata.blocks() * 512 < 1 << 22, "it has a hole");
    let seek = |at: u64, whence: u32| {
        guest.ask(op::LSEEK, node, body().u64(handle).u64(at).u32(whence).u32(0)).map(|a| u64_at(&a, 0))
    };
    assert_eq!((seek(0, 3), seek(0, 4), seek(FAR, 4)), (Ok(FAR), Ok(0), Ok(FAR + (1 << 20))));
    let (_, other) = guest.create("copy", O_RDWR, 0o644).unwrap();
    let copy = body().u64(handle).u64(FAR).u64(node).u64(other).u64(8).u64(1000).u64(0);
    assert_eq!(u32_at(&guest.ask(op::COPY_FILE_RANGE, node, copy).unwrap(), 0), 1000);
    assert_eq!(fs::metadata(guest.host("copy")).unwrap().len(), 1008);
    assert!(guest.write(handle, u64::MAX, b"x").is_err() && guest.read(handle, u64::MAX, 1).is_err());
}

#[test]
fn what_a_guest_may_hold_is_bounded() {
    let guest = Guest::limited(false, 20);
    for n in 0..30 {
        fs::write(guest.host(n.to_string()), "").unwrap();
    }
    let known = (0..30).filter(|n| guest.lookup(ROOT, n.to_string()).is_ok()).count();
    assert_eq!(known, 19, "and the root");
    assert_eq!(guest.list(ROOT, op::READDIRPLUS, 4096).len(), 32, "lists are whole all the same");
    let node = guest.lookup(ROOT, "0").unwrap();
    let open = (0..30).filter(|_| guest.open(node, 0).is_ok()).count();
    assert_eq!(open, 10);
    guest.session.reset();
    assert_eq!(guest.open(node, 0), Err(Errno::STALE), "a reset forgets all");
    assert!(guest.lookup(ROOT, "29").is_ok());
}

#[test]
fn nonsense_is_refused() {
    let guest = Guest::new(false);
    let mut state = std::process::id().wrapping_mul(2_654_435_761) | 1;
    println!("seed {state}");
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    for _ in 0..100_000 {
        let body: Vec<u8> =
            (0..next() % 64).map(|_| if next() % 2 == 0 { 0 } else { next() as u8 % 8 }).collect();
        // SYNCFS would be slow.
        let opcode = next() % 50;
        // Only that there is an answer.
        let _ = guest.ask(opcode, u64::from(next() % 4), Body(body));
    }
    for (len, room) in [(0, 100), (39, 100), (40, 15), (3 << 20, 100)] {
        let request = vec![1; len];
        assert!(guest.session.serve(&request[..], len, Vec::new(), room).is_err(), "{len} {room}");
    }
}
