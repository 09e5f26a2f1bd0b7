//! The default guest: a kernel and busybox.

use std::path::{Path, PathBuf};

use crate::Options;
use crate::cpio::Cpio;
use crate::error::Error;
use crate::fetch::sha256;
use crate::kernel::{self, UnpackError};
use crate::progress::Progress;
use crate::source::{PackageFile, PackageFiles, Source};

/// What the guest runs first, what process 1 goes by after that, and what it starts.
const INIT: &str = include_str!("guest/init.sh");
const INITTAB: &str = include_str!("guest/inittab");
const SESSION: &str = include_str!("guest/session.sh");
const DHCP: &str = include_str!("guest/dhcp.sh");
/// The kernel's command line. Without the self-tests of its cryptography, which take half of the start where every
/// instruction is executed by software, and which a system that keeps no secrets can do without.
const CMDLINE: &str = "console=ttyS0 quiet cryptomgr.notests";
/// Drivers of virtio disks, in the order in which they are loaded. Kernels may have them built in.
pub const VIRTIO_MODULES: [&str; 6] =
    ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"];
/// Drivers: what their folder is called, the module without which the others are of no use, and the modules in the
/// order in which they are loaded. Kernels may have them built in.
const DRIVERS: [(&str, &str, &[&str]); 11] = [
    (
        "virtio",
        "virtio_pci",
        &["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"],
    ),
    ("blk", "virtio_blk", &["virtio_blk"]),
    ("fs", "virtiofs", &["fuse", "virtiofs"]),
    (
        "vsock",
        "vmw_vsock_virtio_transport",
        &["vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport"],
    ),
    ("console", "virtio_console", &["virtio_console"]),
    ("balloon", "virtio_balloon", &["virtio_balloon"]),
    ("mem", "virtio_mem", &["virtio_mem"]),
    ("net", "virtio_net", &["failover", "net_failover", "virtio_net"]),
    ("e1000", "e1000", &["e1000"]),
    (
        "sata",
        "ahci",
        &[
            "scsi_common",
            "scsi_mod",
            "libata",
            "libahci",
            "ahci",
            "crct10dif_common",
            "crct10dif_generic",
            "crc-t10dif",
            "crc64",
            "crc64-rocksoft",
            "t10-pi",
            "sd_mod",
            "cdrom",
            "sr_mod",
            "isofs",
        ],
    ),
    (
        "nvme",
        "nvme",
        &[
            "crct10dif_common",
            "crct10dif_generic",
            "crc-t10dif",
            "crc64",
            "crc64-rocksoft",
            "t10-pi",
            "nvme-auth",
            "nvme-core",
            "nvme",
        ],
    ),
];
/// Kernels fit for a virtual machine, best first, by architecture: Debian's, then Ubuntu's.
const KERNELS: [(&str, &[&str]); 2] = [
    (
        "amd64",
        &["linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64", "linux-image-generic"],
    ),
    ("i386", &["linux-image-686", "linux-image-686-pae", "linux-image-virtual", "linux-image-generic"]),
];

/// A guest that can be started.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The kernel: a bzImage.
    pub kernel: PathBuf,
    /// The initial RAM disk: an uncompressed cpio archive.
    pub initrd: PathBuf,
    /// The kernel's command line.
    pub cmdline: String,
    /// The kernel's release, as `uname -r` says it.
    pub release: String,
    /// What it is, for people: distribution, kernel, versions.
    pub description: String,
    /// Whether all of it was in the cache.
    pub cached: bool,
}

/// Gives the default guest, from the cache or, the first time, from the archive.
///
/// On the kernel's command line, `lodge.exec="COMMAND"` makes it run a command in place of the shell, print
/// `Lodge: the command ended with status N.` and power off.
pub fn default_guest(options: &Options, progress: &mut dyn Progress) -> Result<Guest, Error> {
    let mut source = Source::new(options)?;
    let kernel = kernel_files(&mut source, options, progress)?;
    let busybox = source.files(&["busybox-static"], &["*bin/busybox"], progress)?;
    let cached = kernel.cached && busybox.cached;
    let (image, program) = (first(&kernel)?, first(&busybox)?);
    let agent = if options.arch == "amd64" { agent::PROGRAM } else { &[] };
    let initrd = stored_initramfs(&mut source, program, &kernel.files[1..], agent, progress)?;
    let release = image.path.trim_start_matches("boot/vmlinuz-").to_owned();
    let description =
        format!("{}, Linux {release} ({}), busybox {}", kernel.archive, kernel.version, busybox.version);
    let cmdline = CMDLINE.to_owned();
    Ok(Guest { kernel: image.stored.clone(), initrd, cmdline, release, description, cached })
}

/// The kernel and its modules.
fn kernel_files(
    source: &mut Source,
    options: &Options,
    progress: &mut dyn Progress,
) -> Result<PackageFiles, Error> {
    let patterns: Vec<String> = std::iter::once("boot/vmlinuz-*".to_owned())
        .chain(modules().map(|name| format!("?*/{name}.ko*")))
        .collect();
    let patterns: Vec<&str> = patterns.iter().map(String::as_str).collect();
    if let Some(package) = &options.kernel {
        return source.files(&[package], &patterns, progress);
    }
    let known = KERNELS.iter().find(|(arch, _)| *arch == options.arch);
    source.files(known.map_or(KERNELS[0].1, |(_, known)| known), &patterns, progress)
}

/// What a guest with files of its own needs for its network card, as one more initial RAM disk: in `dir`, which has a busybox, drivers in
/// the order in which they are loaded, and what udhcpc calls.
pub(crate) fn network_ramdisk(
    options: &Options,
    dir: &str,
    progress: &mut dyn Progress,
) -> Result<PathBuf, Error> {
    let mut source = Source::new(options)?;
    let kernel = kernel_files(&mut source, options, progress)?;
    let mut image = Cpio::new();
    image.dir(dir, 0o755).dir(&format!("{dir}/net"), 0o755);
    let script = DHCP.replace("/bin/busybox", &format!("/{dir}/busybox"));
    image.file(&format!("{dir}/dhcp"), 0o755, script.as_bytes());
    let wanted = drivers(&kernel.files[1..]).filter(|(kind, _)| ["virtio", "net", "e1000"].contains(kind));
    for (n, module) in wanted.flat_map(|(_, modules)| modules).enumerate() {
        image.file(&format!("{dir}/net/{n:02}.ko"), 0o644, &module.module()?);
    }
    let (image, from) = (image.finish(), &first(&kernel)?.sha256);
    let key = format!("network-{}-{}", &from[..12], &sha256(&image)[..12]);
    match source.stored(&key) {
        Some(path) => Ok(path),
        None => source.store(&key, from, "network.cpio", &image, progress),
    }
}

/// The ELF kernel in the bzImage `image`, from the cache or unpacked and kept there: see [`kernel`].
pub fn unpacked_kernel(
    options: &Options,
    image: &Path,
    progress: &mut dyn Progress,
) -> Result<PathBuf, Error> {
    let mut source = Source::new(options)?;
    let failed = |source: UnpackError| Error::Kernel { path: image.to_owned(), source };
    let bytes = std::fs::read(image).map_err(|source| Error::File { path: image.to_owned(), source })?;
    let from = sha256(&bytes);
    let key = format!("vmlinux-{}", &from[..12]);
    if let Some(path) = source.stored(&key) {
        return Ok(path);
    }
    progress.begin("unpacking the kernel", None);
    let unpacked = kernel::unpack(&bytes);
    progress.finish();
    source.store(&key, &from, "vmlinux", &unpacked.map_err(failed)?, progress)
}

/// The initial RAM disk of the default guest, around a statically linked busybox. More can be added to it.
pub fn initramfs(busybox: &[u8]) -> Cpio {
    let mut image = Cpio::new();
    for dir in
        ["bin", "dev", "etc", "proc", "root", "sbin", "sys", "lib/modules", "tmp", "usr/bin", "usr/sbin"]
    {
        image.dir(dir, 0o755);
    }
    // The kernel opens it for process 1, before that can mount anything.
    image.device("dev/console", 0o600, 5, 1);
    image.file("bin/busybox", 0o755, busybox).file("init", 0o755, INIT.as_bytes());
    image.file("etc/inittab", 0o644, INITTAB.as_bytes()).file("etc/session", 0o755, SESSION.as_bytes());
    image.file("etc/dhcp", 0o755, DHCP.as_bytes());
    image.file("etc/passwd", 0o644, b"root::0:0:root:/root:/bin/sh\n").file(
        "etc/group",
        0o644,
        b"root:x:0:\n",
    );
    image
}

/// The names of all modules, each once.
fn modules() -> impl Iterator<Item = &'static str> {
    let all: std::collections::BTreeSet<_> =
        DRIVERS.iter().flat_map(|(_, _, names)| names.iter().copied()).collect();
    all.into_iter()
}

/// The modules of each folder.
fn drivers(modules: &[PackageFile]) -> impl Iterator<Item = (&'static str, Vec<&PackageFile>)> {
    let find = |name: &&str| modules.iter().find(|m| m.path.contains(&format!("/{name}.ko")));
    DRIVERS.iter().filter_map(move |(kind, driver, names)| {
        find(driver)?;
        Some((*kind, names.iter().filter_map(find).collect()))
    })
}

fn first(files: &PackageFiles) -> Result<&PackageFile, Error> {
    let missing = || Error::NoFile { package: files.package.clone(), file: "that was asked for".to_owned() };
    files.files.first().ok_or_else(missing)
}

/// The initial RAM disk as a file in the cache, made anew where busybox or our part of it has changed.
fn stored_initramfs(
    source: &mut Source,
    busybox: &PackageFile,
    modules: &[PackageFile],
    agent: &[u8],
    progress: &mut dyn Progress,
) -> Result<PathBuf, Error> {
    let mut ours = sha256(&initramfs(&[]).finish());
    ours += &sha256(agent);
    modules.iter().for_each(|module| ours += &module.sha256);
    let key = format!("initramfs-{}-{}", &busybox.sha256[..12], &sha256(ours.as_bytes())[..12]);
    if let Some(path) = source.stored(&key) {
        return Ok(path);
    }
    let program = std::fs::read(&busybox.stored).map_err(Error::cache(&busybox.stored))?;
    let mut image = initramfs(&program);
    if !agent.is_empty() {
        image.file("sbin/lodge-agent", 0o755, agent);
    }
    for (kind, modules) in drivers(modules) {
        image.dir(&format!("lib/modules/{kind}"), 0o755);
        for (n, module) in modules.into_iter().enumerate() {
            // By number, for they are loaded in this order.
            image.file(&format!("lib/modules/{kind}/{n:02}.ko"), 0o644, &module.module()?);
        }
    }
    source.store(&key, &busybox.sha256, "initramfs.cpio", &image.finish(), progress)
}
