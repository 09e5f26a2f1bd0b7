//! How long a guest takes to start.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// `lodge-bench boot`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The `lodge` to measure
    #[arg(long, default_value = "target/release/lodge")]
    lodge: PathBuf,
    /// How often; the median counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

/// What the default guest prints when its userspace has started.
const READY: &[u8] = b"Lodge: Linux";
const PATIENCE: Duration = Duration::from_secs(300);

/// One start: seconds until the first line of userspace, seconds of processor time until then, and what is resident then
/// beside shared memory, in MiB. Lodge's guest RAM is shared memory, so for it that is the monitor itself; QEMU's is not.
struct Start {
    wall: f64,
    cpu: f64,
    resident: f64,
}

/// Measures, side by side in one run, and prints ratios.
///
/// # Errors
/// A guest does not start.
pub fn run(args: &Args) -> Result<()> {
    let guest = images::default_guest(&images::Options::default(), &mut images::Silent)?;
    println!("{}; medians of {}", guest.description, args.rounds);
    let (kernel, initrd) = (guest.kernel.display().to_string(), guest.initrd.display().to_string());
    let lodge = || {
        let mut command = Command::new(&args.lodge);
        command.args([
            "run",
            "--engine",
            "interpret",
            "--kernel",
            &kernel,
            "--initrd",
            &initrd,
            "--cmdline",
            &guest.cmdline,
        ]);
        command
    };
    let qemu = || {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(
            "-machine q35,accel=tcg -m 512 -display none -serial stdio -monitor none -nodefaults".split(' '),
        );
        command.args(["-kernel", &kernel, "-initrd", &initrd, "-append", &guest.cmdline]);
        command
    };
    let mut rows: Vec<(&str, Vec<Start>)> = vec![("lodge interpret", Vec::new()), ("qemu tcg", Vec::new())];
    for _ in 0..args.rounds {
        // In turns, so that a busy moment of the machine meets all alike.
        rows[0].1.push(start(&mut lodge())?);
        rows[1].1.push(start(&mut qemu())?);
    }
    let medians: Vec<(f64, f64)> = rows
        .iter()
        .map(|(_, s)| (median(s.iter().map(|s| s.wall)), median(s.iter().map(|s| s.cpu))))
        .collect();
    let (wall, cpu) = medians[1];
    println!("{:18} {:>8} {:>8} {:>12} {:>12}", "", "wall s", "CPU s", "wall/qemu", "CPU/qemu");
    for ((name, _), (w, c)) in rows.iter().zip(&medians) {
        println!("{name:18} {w:8.2} {c:8.2} {:12.2} {:12.2}", w / wall, c / cpu);
    }
    let resident = median(rows[0].1.iter().map(|s| s.resident));
    println!("lodge's resident memory less guest RAM: {resident:.1} MiB");
    Ok(())
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn start(command: &mut Command) -> Result<Start> {
    let begun = Instant::now();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    let mut out = child.stdout.take().context("its output is piped")?;
    let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
    let found = loop {
        let n = out.read(&mut buffer)?;
        seen.extend_from_slice(&buffer[..n]);
        if seen.windows(READY.len()).any(|w| w == READY) {
            break true;
        }
        if n == 0 || begun.elapsed() > PATIENCE {
            break false;
        }
    };
    let wall = begun.elapsed().as_secs_f64();
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
    let _ = child.kill();
    child.wait()?;
    if !found {
        bail!("the guest did not start:\n{}", String::from_utf8_lossy(&seen));
    }
    // utime and stime, in clock ticks of 10 ms (proc(5)).
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
    let ticks = |n: usize| fields.get(n).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    let kib = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or("");
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0)
    };
    let resident = (kib("RssAnon:") + kib("RssFile:")) / 1024.0;
    Ok(Start { wall, cpu: (ticks(11) + ticks(12)) / 100.0, resident })
}
