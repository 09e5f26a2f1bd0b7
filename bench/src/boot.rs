//! How long a guest takes to start.

use anyhow::Result;

use crate::monitor::{self, Own, Programs, QEMU, Running, Setup, median};

/// `lodge-bench boot`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to measure: `tcg` is QEMU's translator and `qemu-kvm` QEMU's KVM, the others are engines of Lodge's
    #[arg(long, value_delimiter = ',', default_value = "tcg,translate")]
    engine: Vec<String>,
    /// How often; the median counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// The guest's architecture, by Debian's name: amd64 or i386
    #[arg(long, default_value = "amd64")]
    arch: String,
    #[command(flatten)]
    own: Own,
    #[command(flatten)]
    programs: Programs,
}

/// One start: seconds until the first line of userspace, seconds of processor time until then, and MiB of memory beside guest RAM.
struct Start {
    wall: f64,
    cpu: f64,
    memory: f64,
}

/// Measures, side by side in one run, and prints ratios.
///
/// # Errors
/// A guest does not start.
pub fn run(args: &Args) -> Result<()> {
    let (setup, description) = setup(args)?;
    setup.programs.introduce(&description, 512);
    println!("medians of {}", args.rounds);
    let mut rows: Vec<(&str, Vec<Start>)> = args.engine.iter().map(|e| (e.as_str(), Vec::new())).collect();
    for _ in 0..args.rounds {
        // In turns, so that a busy moment of the machine meets all alike.
        for (engine, starts) in &mut rows {
            starts.push(start(&setup, engine)?);
        }
    }
    let middle = |starts: &[Start], what: fn(&Start) -> f64| median(starts.iter().map(what));
    let qemu = rows.iter().find(|(engine, _)| QEMU.iter().any(|(name, _)| engine == name));
    let base = |what| qemu.map_or(f64::NAN, |(_, starts)| middle(starts, what));
    println!(
        "{:12} {:>8} {:>8} {:>9} {:>9} {:>13}",
        "", "wall s", "CPU s", "wall/qemu", "CPU/qemu", "memory MiB"
    );
    for (engine, starts) in &rows {
        let (wall, cpu) = (middle(starts, |s| s.wall), middle(starts, |s| s.cpu));
        let (to_wall, to_cpu) = (wall / base(|s| s.wall), cpu / base(|s| s.cpu));
        let memory = middle(starts, |s| s.memory);
        println!("{engine:12} {wall:8.2} {cpu:8.2} {to_wall:9.2} {to_cpu:9.2} {memory:13.1}");
    }
    println!("memory is the monitor's own, without guest RAM");
    Ok(())
}

/// The machine to start, and what it is.
fn setup(args: &Args) -> Result<(Setup, String)> {
    let programs = args.programs.clone();
    let guest = args.own.guest(&programs, &args.arch)?;
    let images::Guest { kernel, initrd, cmdline, description, .. } = guest;
    let setup = Setup { programs, kernel, initrd, cmdline, network: "none" };
    Ok((setup, description))
}

fn start(setup: &Setup, engine: &str) -> Result<Start> {
    let mut running = Running::start(&mut setup.command(engine)?)?;
    let (_, moment) = running.line(monitor::READY, monitor::PATIENCE)?;
    let (wall, cpu) = (moment.wall.as_secs_f64(), moment.cpu.as_secs_f64());
    Ok(Start { wall, cpu, memory: running.memory() })
}
