//! How long a whole Debian takes from the command to its log-in prompt: `lodge run debian` beside QEMU's translator with the same
//! disk, and the same kernel or firmware.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use systems::{Base, Release};

use crate::monitor::{self, Programs, Running, median};

/// What a system's console says at its first log-in.
const PROMPT: &str = " login: ";

/// `lodge-bench start`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to measure: `tcg` is QEMU's translator, the others are engines of Lodge's
    #[arg(long, value_delimiter = ',', default_value = "tcg,translate")]
    engine: Vec<String>,
    /// The release: 12 or 13
    #[arg(long, default_value = "13")]
    release: String,
    /// Start GRUB by firmware: `bios` or `uefi`
    #[arg(long)]
    firmware: Option<String>,
    /// How often; the medians count
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    #[command(flatten)]
    programs: Programs,
}

/// Measures, side by side in one run, and prints ratios.
///
/// # Errors
/// The system cannot be made, or does not start.
pub fn run(args: &Args) -> Result<()> {
    let release = Release::parse(Some(&args.release)).context("there are releases 12 and 13")?;
    let base = systems::debian(release, &images::Options::default(), vm::Choice::Auto, &mut images::Silent)?;
    args.programs.introduce(&base.description, 1024);
    println!("medians of {}", args.rounds);
    let mut rows: Vec<(&str, Vec<(f64, f64)>)> =
        args.engine.iter().map(|e| (e.as_str(), Vec::new())).collect();
    for _ in 0..args.rounds {
        for (engine, starts) in &mut rows {
            starts.push(start(args, engine, &base)?);
        }
    }
    let qemu = rows.iter().find(|(engine, _)| *engine == "tcg").map(|(_, starts)| middle(starts));
    println!("{:12} {:>8} {:>8} {:>9} {:>9}", "", "wall s", "CPU s", "wall×", "CPU×");
    for (engine, starts) in &rows {
        let (wall, cpu) = middle(starts);
        let (qemu_wall, qemu_cpu) = qemu.unwrap_or((f64::NAN, f64::NAN));
        println!("{engine:12} {wall:8.2} {cpu:8.2} {:9.2} {:9.2}", qemu_wall / wall, qemu_cpu / cpu);
    }
    println!(
        "wall×, CPU×: how many times faster than QEMU's translator, and with how much less of the processor"
    );
    Ok(())
}

fn middle(starts: &[(f64, f64)]) -> (f64, f64) {
    (median(starts.iter().map(|s| s.0)), median(starts.iter().map(|s| s.1)))
}

/// Seconds, and seconds of processor time, until the prompt.
fn start(args: &Args, engine: &str, base: &Base) -> Result<(f64, f64)> {
    let scratch = tempfile::tempdir()?;
    let mut command = if engine == "tcg" {
        qemu(args, base, scratch.path())?
    } else {
        let mut command = Command::new(args.programs.lodge()?);
        command.arg("run").arg(format!("debian:{}", args.release)).args(["--engine", engine]);
        command.args(["--network", "none", "--cpus"]);
        command.arg(args.programs.cpus.to_string()).env("LODGE_DATA_DIR", scratch.path());
        command.args(args.firmware.iter().flat_map(|firmware| ["--firmware", firmware]));
        command
    };
    let mut running = Running::start(&mut command)?;
    let (_, moment) = running.line(PROMPT, monitor::PATIENCE)?;
    Ok((moment.wall.as_secs_f64(), moment.cpu.as_secs_f64()))
}

/// QEMU with the same machine. It has no seed, so its system has a little less to do.
fn qemu(args: &Args, base: &Base, scratch: &Path) -> Result<Command> {
    let overlay = scratch.join("disk.qcow2");
    disks::create(&overlay, disks::Format::Qcow2, 0, Some(&base.disk))?;
    let mut command = Command::new(&args.programs.qemu);
    command
        .args("-machine q35 -accel tcg -cpu max -m 1024 -nodefaults -display none -serial stdio".split(' '));
    command.args(["-smp", &args.programs.cpus.to_string(), "-device", "virtio-rng-pci", "-drive"]);
    command.arg(format!("file={},if=virtio,format=qcow2,discard=unmap", overlay.display()));
    match args.firmware.as_deref() {
        None => {
            command.arg("-kernel").arg(&base.kernel).arg("-initrd").arg(&base.initrd);
            command.args(["-append", &base.cmdline]);
        }
        Some("bios") => {}
        Some(name) => {
            ensure!(name == "uefi", "firmware is bios or uefi");
            let files =
                images::firmware(&images::Options::default(), images::Firmware::Uefi, &mut images::Silent)?;
            let variables: PathBuf = scratch.join("variables");
            std::fs::copy(files.variables.context("OVMF has variables")?, &variables)?;
            for (path, read_only) in [(&files.code, "on"), (&variables, "off")] {
                let path = path.display();
                command.arg("-drive").arg(format!("if=pflash,format=raw,readonly={read_only},file={path}"));
            }
        }
    }
    Ok(command)
}
