//! A guest that asks anything at all of a shared directory: it must come back from it, and nothing beside the directory may change.
#![no_main]

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::Arc;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use shares::{Session, Share};

/// Names that there are, or that must not be taken.
const NAMES: [&[u8]; 10] =
    [b"file", b"dir", b"out", b"secret", b"..", b".", b"a/b", b"new", b"\xff", b"pipe"];

#[derive(Arbitrary, Debug)]
enum Part {
    /// A number that is often that of a node, of a handle or of flags.
    Small(u8),
    Number(u64),
    Half(u32),
    Name(u8),
    Bytes(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Input {
    read_only: bool,
    requests: Vec<(u8, u8, Vec<Part>)>,
}

fuzz_target!(|input: Input| {
    let outside = tempfile::tempdir().expect("a directory");
    let inside = outside.path().join("inside");
    fs::create_dir(&inside).expect("a directory");
    fs::create_dir(inside.join("dir")).expect("a directory");
    fs::write(inside.join("file"), "text").expect("a file");
    fs::write(outside.path().join("secret"), "secret").expect("a file");
    symlink(outside.path(), inside.join("out")).expect("a link");
    symlink(outside.path().join("secret"), inside.join("secret")).expect("a link");
    let share = Share::open(&inside, input.read_only).expect("a share");
    let session = Session::new(Arc::new(share)).expect("a session");
    for (opcode, node, parts) in input.requests.into_iter().take(64) {
        let mut body = Vec::new();
        for part in parts.iter().take(16) {
            match part {
                Part::Small(n) => body.extend(u64::from(n & 15).to_le_bytes()),
                // No larger, for this fills the host's disk.
                Part::Number(n) => body.extend((n & 0xff_ffff).to_le_bytes()),
                Part::Half(n) => body.extend(n.to_le_bytes()),
                Part::Name(n) => {
                    body.extend(NAMES[usize::from(*n) % NAMES.len()]);
                    body.push(0);
                }
                Part::Bytes(bytes) => body.extend(bytes.iter().take(256)),
            }
        }
        // Not SYNCFS, which is slow and does nothing with its arguments.
        let opcode = u32::from(opcode) % 50;
        let mut request = (40 + body.len() as u32).to_le_bytes().to_vec();
        request.extend(opcode.to_le_bytes());
        request.extend(7u64.to_le_bytes());
        request.extend(u64::from(node % 8).to_le_bytes());
        request.extend([0; 16]);
        request.extend(&body);
        let mut answer = Vec::new();
        // Whether it makes sense to it is the session's affair.
        if let Ok(len) = session.serve(&request[..], request.len(), &mut answer, 0x1_0010) {
            assert_eq!(len, answer.len());
        }
        let found = answer.windows(6).any(|bytes| bytes == b"secret");
        // A link's target and a listing have the name in them.
        assert!(!found || !matches!(opcode, 15), "a file outside was read");
    }
    assert_eq!(fs::read(outside.path().join("secret")).expect("it is still there"), b"secret");
    let beside = fs::read_dir(outside.path()).expect("it is still there").count();
    assert_eq!(beside, 2, "nothing was made outside");
    if input.read_only {
        assert_eq!(fs::read(inside.join("file")).expect("it is still there"), b"text");
        assert_eq!(fs::read_dir(&inside).expect("it is still there").count(), 4);
    }
});
