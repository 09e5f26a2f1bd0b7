//! What the fuzz targets share.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::OnceLock;

use memory::Memory;
use rustix::fs::{MemfdFlags, memfd_create};

/// Loads `data` as a kernel into 64 MiB of memory, with itself as initial RAM disk. Whatever comes is fine but a panic.
pub fn load(data: &[u8]) {
    static MEMORY: OnceLock<Memory> = OnceLock::new();
    let memory = MEMORY.get_or_init(|| Memory::new(64 << 20, 0).expect("64 MiB"));
    let mut file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).expect("a memfd"));
    file.write_all(data).expect("room in the memfd");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let initrd = [path.clone()];
    let _ = boot::load(memory, &boot::Kernel { kernel: &path, initrd: &initrd, cmdline: "quiet", rsdp: 0xe_0000 });
}

/// Loads `data` with `magic` put in at `at`, so that the fuzzer need not find it.
pub fn load_with(data: &[u8], at: usize, magic: &[u8]) {
    let mut data = data.to_vec();
    data.resize(data.len().max(at + magic.len()), 0);
    data[at..at + magic.len()].copy_from_slice(magic);
    load(&data);
}
