//! Reads and writes of a virtual disk, in QEMU and in Lodge, side by side: the same kernel, the same image, the same program.
//!
//! Both go through the host's page cache. Each pattern runs for the same time in each monitor by turns; what counts is how much
//! was done in it, by the guest's clock, and the monitor's processor time for each request.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use images::cpio::Cpio;

use crate::monitor::{self, Own, Programs, QEMU, Running, Setup, median};

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

/// One run of a pattern.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// Bytes in a second, by the guest's clock.
    rate: f64,
    /// Bytes of a request.
    block: f64,
    /// The monitor's processor time for a request, microseconds.
    cpu: f64,
}

/// A monitor with its disk.
struct Place {
    engine: String,
    running: Running,
    samples: BTreeMap<&'static str, Vec<Sample>>,
}

/// Measures and prints the table.
///
/// # Errors
/// Something cannot be started, or a guest fails.
pub fn run(args: &Args) -> Result<()> {
    ensure!(!args.engine.is_empty() && args.millis > 0 && args.size > 0, "there is nothing to measure");
    let work = monitor::sibling("../x86_64-unknown-linux-gnu/release/work")?;
    let guest = args.own.guest(&args.programs, "amd64")?;
    // The kernel unpacks several archives one after the other.
    let mut image = std::fs::read(&guest.initrd)?;
    let program = std::fs::read(&work)
        .with_context(|| format!("cannot read {}; build it with `cargo xtask guests`", work.display()))?;
    let mut more = Cpio::new();
    more.file("bin/work", 0o755, &program);
    image.extend(more.finish());
    let mut initrd = tempfile::NamedTempFile::new()?;
    initrd.write_all(&image)?;
    let device = match args.bus {
        Bus::Virtio | Bus::VirtioPacked => "/dev/vda",
        Bus::Nvme => "/dev/nvme0n1",
    };
    let setup = Setup {
        programs: args.programs.clone(),
        kernel: guest.kernel,
        initrd: initrd.path().to_owned(),
        cmdline: format!("{} lodge.exec=\"work --disk {device}\"", guest.cmdline),
    };
    setup.programs.introduce(&guest.description, 512);
    println!("{:?}, {} MiB raw, {} ms each, medians of {}", args.bus, args.size, args.millis, args.rounds);
    let scratch = tempfile::tempdir()?;
    let mut places = Vec::new();
    for engine in &args.engine {
        let disk = scratch.path().join(engine);
        fill(&disk, args.size)?;
        places.push(Place::start(engine, &setup, args.bus, &disk)?);
    }
    for _ in 0..args.rounds {
        for pattern in PATTERNS {
            for place in &mut places {
                place.measure(pattern, args.millis)?;
            }
        }
    }
    print(&places);
    Ok(())
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
    if QEMU.iter().any(|(name, _)| *name == engine) {
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

impl Place {
    fn start(engine: &str, setup: &Setup, bus: Bus, disk: &Path) -> Result<Self> {
        let mut command = setup.command(engine)?;
        connect(&mut command, engine, bus, disk);
        let mut running = Running::start(&mut command)?;
        running.line("@@work ready", monitor::PATIENCE)?;
        Ok(Self { engine: engine.into(), running, samples: BTreeMap::new() })
    }

    fn measure(&mut self, pattern: &'static str, millis: u64) -> Result<()> {
        let before = self.running.now()?;
        self.running.say(&format!("{pattern} {millis}"))?;
        let (line, after) =
            self.running.line("@@work ", Duration::from_millis(millis) + Duration::from_secs(60))?;
        let words: Vec<&str> = line.split(' ').collect();
        let number = |n: usize| words.get(n).and_then(|word| word.parse::<f64>().ok());
        let (Some(done), Some(wall), Some(block)) = (number(1), number(3), number(4)) else {
            anyhow::bail!("{pattern} on {}: {line}", self.engine);
        };
        let cpu = (after.cpu - before.cpu).as_secs_f64() * 1e6 / done;
        let sample = Sample { rate: done * block / (wall / 1e9), block, cpu };
        self.samples.entry(pattern).or_default().push(sample);
        Ok(())
    }

    fn median(&self, pattern: &str, of: fn(&Sample) -> f64) -> f64 {
        median(self.samples.get(pattern).into_iter().flatten().map(of))
    }
}

/// A row for each pattern: rates, processor times, and what they are in comparison with the first engine's.
fn print(places: &[Place]) {
    println!();
    let head: String = places
        .iter()
        .enumerate()
        .map(|(n, place)| {
            let compared = if n == 0 { String::new() } else { format!("{:>8}{:>8}", "rate×", "CPU×") };
            format!("{:>14}{:>12}{compared}", place.engine, "CPU µs")
        })
        .collect();
    println!("{:16}{head}", "");
    for pattern in PATTERNS {
        let cells: String = places
            .iter()
            .enumerate()
            .map(|(n, place)| {
                let (rate, cpu) = (place.median(pattern, |s| s.rate), place.median(pattern, |s| s.cpu));
                let shown = if place.median(pattern, |s| s.block) > 4096.0 {
                    format!("{:.0} MiB/s", rate / f64::from(1 << 20))
                } else {
                    format!("{:.0} IOPS", rate / 4096.0)
                };
                let first = &places[0];
                let compared = if n == 0 {
                    String::new()
                } else {
                    let faster = rate / first.median(pattern, |s| s.rate);
                    let cheaper = first.median(pattern, |s| s.cpu) / cpu;
                    format!("{faster:>8.2}{cheaper:>8.2}")
                };
                format!("{shown:>14}{cpu:>12.1}{compared}")
            })
            .collect();
        println!("{pattern:16}{cells}");
    }
    println!(
        "rate×, CPU×: how many times as much is done in a time, and with as much of the host's processor"
    );
}
