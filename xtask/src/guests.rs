//! Builds the bare-metal guests of `guests/bare`.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

/// Guests that count their checks and end by themselves with status 1 (`0` to the debug-exit port).
pub const SUITES: &[&str] = &[
    "hello",
    "faults",
    "descriptors",
    "debug",
    "time",
    "interrupts",
    "smp",
    "selfmod",
    "idiv",
    "garbage",
    "multiboot.elf32",
];

/// The exit status of a guest that passed, under QEMU's and Lodge's debug-exit device.
pub const PASSED: i32 = 1;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Builds all guests; gives the directory with their ELF files.
pub fn build() -> Result<PathBuf> {
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let status = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--quiet", "--profile", "guest", "--manifest-path"])
        .arg(root().join("guests/bare/Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        .status()
        .context("cannot start cargo")?;
    ensure!(status.success(), "the guests in guests/bare do not build");
    let dir = target.join("guest");
    // Multiboot 1 loaders want ELF32; without the note no loader takes it for PVH.
    let status = Command::new("objcopy")
        .args(["--output-target", "elf32-i386", "--remove-section", ".note.Xen"])
        .args([dir.join("multiboot"), dir.join("multiboot.elf32")])
        .status()
        .context("cannot start objcopy (Debian package binutils)")?;
    ensure!(status.success(), "objcopy cannot make the multiboot guest an ELF32 file");
    Ok(dir)
}
