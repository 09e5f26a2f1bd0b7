//! What a Debian system of ours consists of.

use std::fmt::Write as _;
use std::io::{self, Write};

use images::tree::Tree;

/// Packages beside the essential and the required ones.
pub(crate) const PACKAGES: &[&str] = &[
    "apt",
    "bash-completion",
    "ca-certificates",
    "dbus",
    "debian-archive-keyring",
    "e2fsprogs",
    // Not the packages that install themselves: of those there can be only one, for BIOS or for UEFI.
    "grub-efi-amd64-bin",
    "grub-pc-bin",
    "grub2-common",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "libpam-systemd",
    "linux-image-cloud-amd64",
    "login",
    "nano",
    "netbase",
    "openssh-server",
    "passwd",
    "procps",
    "sudo",
    "systemd-resolved",
    "systemd-sysv",
    "tzdata",
    "udev",
    // Rather than usrmerge, which has to do with older systems and would bring all of perl.
    "?usr-is-merged",
    "zstd",
    // For our own initial RAM disk.
    BUSYBOX,
];
/// Not installed.
pub const BUSYBOX: &str = "busybox-static";

/// Files of ours, with their modes.
const FILES: [(&str, u32, &str); 12] = [
    ("usr/lib/lodge/configure", 0o755, include_str!("guest/configure.sh")),
    ("usr/lib/lodge/seed", 0o755, include_str!("guest/seed.sh")),
    ("usr/lib/systemd/system/lodge-seed.service", 0o644, include_str!("guest/seed.service")),
    ("etc/systemd/system/serial-getty@ttyS0.service.d/lodge.conf", 0o644, include_str!("guest/getty.conf")),
    ("etc/systemd/network/80-dhcp.network", 0o644, include_str!("guest/network.conf")),
    (
        "etc/systemd/system/systemd-networkd-wait-online.service.d/lodge.conf",
        0o644,
        "# Services that want a network would wait two minutes where there is no card.\n\
         [Unit]\nConditionPathExistsGlob=/sys/class/net/e*\n",
    ),
    (
        "etc/fstab",
        0o644,
        "LABEL=lodge-root / ext4 defaults,errors=remount-ro 0 1\n\
         LABEL=EFI /boot/efi vfat umask=0077,noauto,x-systemd.automount,x-systemd.idle-timeout=60 0 0\n",
    ),
    ("etc/default/grub", 0o644, include_str!("guest/grub.conf")),
    ("etc/hostname", 0o644, "debian\n"),
    (
        "etc/hosts",
        0o644,
        "127.0.0.1 localhost\n127.0.1.1 debian\n\n::1 localhost ip6-localhost ip6-loopback\n\
         ff02::1 ip6-allnodes\nff02::2 ip6-allrouters\n",
    ),
    ("etc/default/locale", 0o644, "LANG=C.UTF-8\n"),
    ("etc/initramfs-tools/conf.d/resume", 0o644, "RESUME=none\n"),
];

/// A release of Debian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// Debian 12.
    Bookworm,
    /// Debian 13.
    Trixie,
}

impl Release {
    /// The release that `debian` stands for, or `debian:WHICH`.
    pub fn parse(which: Option<&str>) -> Option<Self> {
        Some(match which {
            None | Some("13" | "trixie") => Self::Trixie,
            Some("12" | "bookworm") => Self::Bookworm,
            Some(_) => return None,
        })
    }

    /// Its number.
    pub fn number(self) -> u32 {
        match self {
            Self::Bookworm => 12,
            Self::Trixie => 13,
        }
    }

    /// Its name in the archive.
    pub fn suite(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }

    /// Where its packages come from.
    pub(crate) fn options(self, options: &images::Options) -> images::Options {
        images::Options { suite: Some(self.suite().into()), arch: "amd64".into(), ..options.clone() }
    }
}

/// Adds our files to a system's tree. `sources` are URI and suite of its archives.
pub(crate) fn add_files(tree: &mut Tree<impl Write>, sources: &[(String, String)]) -> io::Result<()> {
    for (path, mode, text) in FILES {
        tree.parents(path)?;
        tree.file(path, mode, text.as_bytes())?;
    }
    let mut list = String::new();
    for (uri, suite) in sources.iter().filter(|(uri, _)| is_public(uri)) {
        let _ = writeln!(
            list,
            "Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: main\n\
             Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        );
    }
    tree.parents("etc/apt/sources.list.d/")?;
    tree.file("etc/apt/sources.list.d/debian.sources", 0o644, list.as_bytes())
}

/// Whether a guest may know of an archive: it is on the network, and the address tells no password.
fn is_public(uri: &str) -> bool {
    (uri.starts_with("http://") || uri.starts_with("https://")) && !uri.contains('@')
}

/// All that the result depends on beside the packages: another text here makes another base.
pub(crate) fn text() -> String {
    let own = [include_str!("guest/builder.sh"), include_str!("guest/init.sh")];
    let files = FILES.iter().map(|(path, mode, text)| format!("{path} {mode:o} {text}"));
    own.iter().map(|text| (*text).to_owned()).chain(files).chain([PACKAGES.join(" ")]).collect()
}
