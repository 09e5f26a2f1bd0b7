//! A disk image of a stranger's, qcow2 or VMDK: opened, read, and written if it can be.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use disks::{Disk, Options};
use libfuzzer_sys::fuzz_target;

/// A folder with the image, a raw file that it may lie over or consist of, and nothing else.
static PLACE: LazyLock<PathBuf> = LazyLock::new(|| {
    // In memory: it is written millions of times.
    let place = tempfile::tempdir_in("/dev/shm").expect("a temporary folder").keep();
    std::fs::write(place.join("base"), vec![7; 8192]).expect("a temporary file");
    place
});

fuzz_target!(|data: &[u8]| {
    let path = PLACE.join("image");
    std::fs::write(&path, data).expect("a temporary file");
    let _ = Disk::open_alone(&path);
    for read_only in [true, false] {
        let Ok(disk) = Disk::open(&path, &Options { read_only, ..Default::default() }) else { continue };
        let size = disk.size();
        let mut block = [0; 4096];
        let len = size.min(4096);
        for at in [0, size / 3, size - len] {
            let block = &mut block[..len.min(size - at) as usize];
            let _ = disk.read(at, block);
            if !read_only {
                let _ = disk.write(at, block);
                let _ = disk.discard(at, len.min(size - at));
                let _ = disk.write_zeroes(at, 100.min(size - at), false);
            }
        }
        let _ = disk.flush();
    }
    // What the image has become may be far larger than its beginning, and sparse.
    let _ = std::fs::remove_file(&path);
});
