//! The system packages that tests and benchmarks need.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Result, bail};

use crate::sh;

/// Debian packages, with a program or a file of each that tells whether it is there.
const PACKAGES: [(&str, &str); 14] = [
    ("qemu-system-x86", "qemu-system-x86_64"),
    ("qemu-utils", "qemu-img"),
    ("gdb", "gdb"),
    ("binutils", "objcopy"),
    ("grub-common", "grub-mkimage"),
    ("grub-pc-bin", "/usr/lib/grub/i386-pc/boot.img"),
    ("grub-efi-amd64-bin", "/usr/lib/grub/x86_64-efi/linux.mod"),
    ("mtools", "mcopy"),
    ("memtest86+", "/usr/lib/memtest86+/memtest86+x64.iso"),
    ("docker-registry", "docker-registry"),
    ("openssh-client", "/usr/bin/ssh"),
    ("iproute2", "/sbin/ip"),
    ("nftables", "/usr/sbin/nft"),
    ("iptables", "/usr/sbin/iptables-nft"),
];

/// Cargo tools: name, and which versions will do where it is missing.
const TOOLS: [(&str, &str); 2] = [("nextest", "^0.9"), ("deny", "^0.20")];

/// Installs what is missing when run as root, and names it when not.
pub fn ensure() -> Result<()> {
    let missing: Vec<&str> = PACKAGES
        .iter()
        .filter(|(_, what)| match what.starts_with('/') {
            true => !Path::new(what).exists(),
            false => !sh::have(what, &["--version"]),
        })
        .map(|(package, _)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    let root = sh::command("id", &["-u"]).output().is_ok_and(|o| o.stdout.starts_with(b"0\n"));
    if !root {
        bail!("these packages are missing; install them with: sudo apt-get install {list}");
    }
    println!("installing {list}");
    let apt = |args: &[&str]| {
        let mut command = sh::command("apt-get", args);
        command.env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null());
        sh::run(&mut command)
    };
    apt(&["-qq", "update"])?;
    let mut install = vec!["-qq", "install", "-y", "--no-install-recommends"];
    install.extend(missing);
    apt(&install)
}

/// Installs the cargo tools that are missing.
pub fn ensure_tools() -> Result<()> {
    for (tool, version) in TOOLS {
        if sh::have("cargo", &[tool, "--version"]) {
            continue;
        }
        println!("installing cargo-{tool}");
        let name = format!("cargo-{tool}");
        // Built for the host, in a place of its own: flags of ours do not belong in it.
        sh::run(
            sh::cargo(&["install", "--quiet", "--locked", &name, "--version", version])
                .env_remove("RUSTFLAGS"),
        )?;
    }
    Ok(())
}
