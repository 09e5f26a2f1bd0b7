//! Disks that start by themselves: GRUB, which loads the default guest's kernel and initial RAM disk from a FAT file system.

use std::path::{Path, PathBuf};
use std::process::Command;

use images::cpio::Cpio;

use crate::Scratch;

/// Which firmware starts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A partition table, with GRUB before the first partition.
    Bios,
    /// A FAT file system with `EFI/BOOT/BOOTX64.EFI`.
    Uefi,
}

const SIZE: u64 = 64 << 20;
/// Where the partition begins.
const PARTITION: u64 = 1 << 20;
/// What the menu shows.
pub const ENTRY: &str = "Lodge's tiny guest";

/// A raw image. In the guest, `script` runs in place of the shell; `modules` are in `/lib/extra`, by their names.
pub fn disk(scratch: &Scratch, kind: Kind, script: &str, modules: &[(&str, Vec<u8>)]) -> Option<PathBuf> {
    let guest = crate::cached_guest()?;
    let mut extra = Cpio::new();
    extra.file("etc/test", 0o755, format!("#!/bin/sh\n{script}").as_bytes());
    for (name, bytes) in modules {
        extra.file(&format!("lib/extra/{name}"), 0o644, bytes);
    }
    // The kernel takes archives one after the other.
    let mut initrd = std::fs::read(&guest.initrd).expect("the cache can be read");
    initrd.resize(initrd.len().next_multiple_of(512), 0);
    initrd.extend(extra.finish());
    let initrd = scratch.file("initrd", &initrd);
    let menu = format!(
        "set timeout=1\nmenuentry \"{ENTRY}\" {{\n\
         linux /vmlinuz {} panic=-1 lodge.exec=/etc/test\ninitrd /initrd\n}}\n",
        guest.cmdline
    );
    let menu = scratch.file("grub.cfg", menu.as_bytes());
    let grub = grub(scratch, kind);
    let mut files =
        vec![(menu.as_path(), "/grub/grub.cfg"), (guest.kernel.as_path(), "/vmlinuz"), (&initrd, "/initrd")];
    let image = scratch.path().join("disk.img");
    match kind {
        Kind::Bios => boot_sectors(&image, &grub),
        Kind::Uefi => {
            std::fs::File::create(&image).and_then(|file| file.set_len(SIZE)).expect("a sparse file");
            files.push((&grub, "/EFI/BOOT/BOOTX64.EFI"));
        }
    }
    fill(&image, kind, &files);
    Some(image)
}

#[track_caller]
fn run(command: &mut Command) {
    let done = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// GRUB with what it needs to read its menu and the rest.
fn grub(scratch: &Scratch, kind: Kind) -> PathBuf {
    let out = scratch.path().join("grub");
    let early = "search --file /grub/grub.cfg --set=root\nset prefix=($root)/grub\n";
    let early = scratch.file("early.cfg", early.as_bytes());
    let (format, own) = match kind {
        Kind::Bios => ("i386-pc", "biosdisk"),
        Kind::Uefi => ("x86_64-efi", "part_gpt"),
    };
    let modules = ["part_msdos", "fat", "search", "search_fs_file", "linux", "normal", "echo", "boot"];
    run(Command::new("grub-mkimage")
        .args(["-O", format, "-p", "/grub", "-c"])
        .arg(early)
        .arg("-o")
        .arg(&out)
        .args(modules)
        .arg(own));
    out
}

/// The boot sector with one partition, and GRUB behind it, where its first sector looks for the rest.
fn boot_sectors(image: &Path, grub: &Path) {
    let boot = std::fs::read("/usr/lib/grub/i386-pc/boot.img").expect("package grub-pc-bin is installed");
    let mut bytes = boot[..446].to_vec();
    let (start, len) = (PARTITION / 512, (SIZE - PARTITION) / 512);
    bytes.extend([0x80, 0, 2, 0, 0x0c, 0xff, 0xff, 0xff]);
    bytes.extend((start as u32).to_le_bytes());
    bytes.extend((len as u32).to_le_bytes());
    bytes.resize(510, 0);
    bytes.extend([0x55, 0xaa]);
    bytes.extend(std::fs::read(grub).expect("just made"));
    assert!(bytes.len() as u64 <= PARTITION);
    bytes.resize(SIZE as usize, 0);
    std::fs::write(image, bytes).expect("a temporary file can be written");
}

/// Makes the file system, and puts `files` into it.
fn fill(image: &Path, kind: Kind, files: &[(&Path, &str)]) {
    let start = if kind == Kind::Bios { PARTITION } else { 0 };
    let at = format!("{}@@{start}", image.display());
    let sectors = ((SIZE - start) / 512).to_string();
    run(Command::new("mformat").args(["-i", &at, "-F", "-h", "16", "-s", "63", "-T", &sectors, "::"]));
    run(Command::new("mmd").args(["-i", &at, "::/grub", "::/EFI", "::/EFI/BOOT"]));
    for (from, to) in files {
        run(Command::new("mcopy").args(["-i", &at]).arg(from).arg(format!("::{to}")));
    }
}
