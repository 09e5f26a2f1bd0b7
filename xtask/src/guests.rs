//! Builds the bare-metal guests of `guests/bare`, and the programs of `guests/work`.

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
    "v8086",
    "debug",
    "time",
    "interrupts",
    "smp",
    "selfmod",
    "idiv",
    "garbage",
    "hostile",
    "multiboot.elf32",
    "display",
];

/// The exit status of a guest that passed, under QEMU's and Lodge's debug-exit device.
pub const PASSED: i32 = 1;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// `cargo build` of the workspace in `dir`.
fn cargo(dir: &str) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["build", "--quiet", "--manifest-path"]).arg(root().join(dir).join("Cargo.toml"));
    command.arg("--target-dir").arg(target());
    command
}

/// Builds the benchmark program, which runs on the host and needs nothing of a guest but a kernel, and `seat`; gives the former's path.
pub fn build_work() -> Result<PathBuf> {
    // With a target named, the flags are for the program alone, not for what builds it.
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let status = cargo("guests/work")
        .args(["--release", "--target", TARGET])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .status()
        .context("cannot start cargo")?;
    ensure!(status.success(), "the benchmark program in guests/work does not build");
    Ok(target().join(TARGET).join("release/work"))
}

/// Builds all bare-metal guests; gives the directory with their ELF files.
pub fn build() -> Result<PathBuf> {
    let status = cargo("guests/bare").args(["--profile", "guest"]).status().context("cannot start cargo")?;
    ensure!(status.success(), "the guests in guests/bare do not build");
    let dir = target().join("guest");
    // Multiboot 1 loaders want ELF32; without the note no loader takes it for PVH.
    let status = Command::new("objcopy")
        .args(["--output-target", "elf32-i386", "--remove-section", ".note.Xen"])
        .args([dir.join("multiboot"), dir.join("multiboot.elf32")])
        .status()
        .context("cannot start objcopy (Debian package binutils)")?;
    ensure!(status.success(), "objcopy cannot make the multiboot guest an ELF32 file");
    Ok(dir)
}
