//! Reads and writes of a virtual disk, in QEMU and in Lodge, side by side: the same kernel, the same image, the same program.
//!
//! Both go through the host's page cache. Each pattern runs for the same time in each monitor by turns; what counts is how much
//! was done in it, by the guest's clock, and the monitor's processor time for each request.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use crate::monitor::{self, Own, Programs};
use crate::rates::{self, Guest, Place};

/// What is measured: see `guests/work/src/disk.rs`.
const PATTERNS: [&str; 8] = [
    "seq-read-1",
    "seq-read-32",
    "seq-write-1",
    "seq-write-32",
    "rand-read-1",
    "rand-read-32",
    "rand-write-1",
    "rand-write-32",
];

/// What connects the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Bus {
    /// virtio-blk
    Virtio,
    /// virtio-blk with packed rings
    VirtioPacked,
    /// NVMe
    Nvme,
}

/// `lodge-bench disk`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to measure: `tcg` is QEMU's translator, the others are engines of Lodge's. The first is what the others are compared
    /// with
    #[arg(long, value_delimiter = ',', default_value = "tcg,translate")]
    engine: Vec<String>,
    /// How the disk is connected
    #[arg(long, value_enum, default_value = "virtio")]
    bus: Bus,
    /// How often; the medians count
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Milliseconds for each pattern
    #[arg(long, default_value_t = 1000)]
    millis: u64,
    /// MiB of the image
    #[arg(long, default_value_t = 256)]
    size: u64,
    #[command(flatten)]
    own: Own,
    #[command(flatten)]
    programs: Programs,
}

/// Measures and prints the table.
///
/// # Errors
/// Something cannot be started, or a guest fails.
pub fn run(args: &Args) -> Result<()> {
    ensure!(!args.engine.is_empty() && args.millis > 0 && args.size > 0, "there is nothing to measure");
    let device = match args.bus {
        Bus::Virtio | Bus::VirtioPacked => "/dev/vda",
        Bus::Nvme => "/dev/nvme0n1",
    };
    let guest = Guest::new(
        args.own.guest(&args.programs, "amd64")?,
        &args.programs,
        &rates::work()?,
        &format!("work --disk {device}"),
    )?;
    println!("{:?}, {} MiB raw, {} ms each, medians of {}", args.bus, args.size, args.millis, args.rounds);
    let scratch = tempfile::tempdir()?;
    let mut places = Vec::new();
    for engine in &args.engine {
        let disk = scratch.path().join(engine);
        fill(&disk, args.size)?;
        let mut command = guest.setup.command(engine)?;
        connect(&mut command, engine, args.bus, &disk);
        places.push(Place::start(engine, &mut command)?);
    }
    rates::compare(&mut places, &PATTERNS, args.rounds, args.millis)
}

/// An image without holes.
fn fill(path: &PathBuf, mib: u64) -> Result<()> {
    let mut file = std::fs::File::create(path)?;
    let block: Vec<u8> = (0..1u32 << 20).map(|n| (n.wrapping_mul(0x9e37_79b1) >> 24) as u8).collect();
    (0..mib).try_for_each(|_| file.write_all(&block))?;
    Ok(file.sync_all()?)
}

/// Adds the disk to a monitor's command.
fn connect(command: &mut Command, engine: &str, bus: Bus, disk: &Path) {
    let path = disk.display();
    if monitor::is_qemu(engine) {
        command
            .arg("-drive")
            .arg(format!("file={path},if=none,id=disk,format=raw,cache=writeback,discard=unmap"));
        command.arg("-device").arg(match bus {
            Bus::Virtio => "virtio-blk-pci,drive=disk,disable-legacy=on",
            Bus::VirtioPacked => "virtio-blk-pci,drive=disk,disable-legacy=on,packed=on",
            Bus::Nvme => "nvme,drive=disk,serial=bench",
        });
    } else {
        let bus = match bus {
            Bus::Virtio => "virtio",
            Bus::VirtioPacked => "virtio-packed",
            Bus::Nvme => "nvme",
        };
        command.arg("--disk").arg(format!("{path},format=raw,bus={bus}"));
    }
}
