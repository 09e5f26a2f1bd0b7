//! `lodge-bench`: see `cargo xtask bench`.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};
use lodge_bench::{boot, cpu, disk, fuzz, network, sequences, start};

#[derive(Parser)]
#[command(about = "Every published figure comes from here")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The interpreter against the real processor, on random user-mode instructions
    Fuzz {
        /// How many cases
        #[arg(long, default_value_t = 5_000_000)]
        cases: u64,
        /// Where the random numbers start
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Only forms with this in their name
        #[arg(long, default_value = "")]
        filter: String,
        /// Write the first mismatch of each form into this directory
        #[arg(long, value_name = "DIR")]
        save: Option<PathBuf>,
    },
    /// The translate engine against the interpreter, on random programs
    Sequences {
        /// How many cases
        #[arg(long, default_value_t = 1_000_000)]
        cases: u64,
        /// The first case's number
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Write cases that differ into this directory
        #[arg(long, value_name = "DIR")]
        save: Option<PathBuf>,
        /// Show what the reference engine does with the case in a file
        #[arg(long, value_name = "FILE")]
        follow: Option<PathBuf>,
    },
    /// Time from the command to the guest's first line, beside QEMU's translator
    Boot(boot::Args),
    /// Workloads on the host, in QEMU and in Lodge: processor time and checksums
    Cpu(cpu::Args),
    /// Time from `lodge run debian` to its log-in prompt, beside QEMU's translator
    Start(start::Args),
    /// Reads and writes of a virtual disk, beside QEMU's translator
    Disk(disk::Args),
    /// TCP through the network that needs no rights, beside QEMU's
    Network(network::Args),
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Fuzz { cases, seed, filter, save } => run_fuzz(cases, seed, &filter, save),
        Command::Sequences { follow: Some(path), .. } => follow(&path),
        Command::Sequences { cases, seed, save, .. } => run_sequences(cases, seed, save),
        Command::Boot(args) => boot::run(&args),
        Command::Cpu(args) => cpu::run(&args),
        Command::Start(args) => start::run(&args),
        Command::Disk(args) => disk::run(&args),
        Command::Network(args) => network::run(&args),
    }
}

fn run_fuzz(cases: u64, seed: u64, filter: &str, save: Option<PathBuf>) -> Result<()> {
    let mut next = 0;
    let summary = fuzz::run(cases, seed, filter, |done| {
        if done >= next {
            eprintln!("{done} of {cases} cases");
            next = done + cases / 20 + 1;
        }
    })?;
    for (n, (form, (count, what, case))) in summary.mismatches.iter().enumerate() {
        println!("{form}: {count} times, first: {what}");
        if let Some(directory) = &save {
            std::fs::create_dir_all(directory)?;
            let name = form.split('/').nth(1).unwrap_or("case");
            std::fs::write(directory.join(format!("{name}-{n}.txt")), format!("# {form}: {what}\n{case}"))?;
        }
    }
    println!(
        "seed {seed}: {} cases of {} forms, {} of them exceptions; {} forms with mismatches",
        summary.cases,
        summary.forms,
        summary.faults,
        summary.mismatches.len()
    );
    anyhow::ensure!(summary.mismatches.is_empty(), "the interpreter differs from the processor");
    Ok(())
}

fn run_sequences(cases: u64, seed: u64, save: Option<PathBuf>) -> Result<()> {
    if let Some(directory) = &save {
        std::fs::create_dir_all(directory)?;
    }
    let start = std::time::Instant::now();
    let (mut next, mut told) = (0, 0);
    let summary = sequences::run(cases, seed, |s| {
        if s.cases >= next {
            let rate = s.cases as f64 / start.elapsed().as_secs_f64();
            eprintln!("{} of {cases} cases, {rate:.0} a second, {} differ", s.cases, s.failures.len());
            next = s.cases + (cases / 20).clamp(1, 50_000);
        }
        for (seed, case, what) in &s.failures[told..] {
            let text = format!("# seed {seed}: {}\n{}", what.join("; "), sequences::describe(case));
            println!("{text}");
            let path = save.as_ref().map(|directory| directory.join(format!("{seed}.txt")));
            if let Some(Err(e)) = path.map(|path| std::fs::write(path, text)) {
                eprintln!("cannot save the case: {e}");
            }
        }
        told = s.failures.len();
    })?;
    println!(
        "seeds {seed} to {}: {} cases, {} endless, {} undefined, {} stale, {} differ",
        seed + summary.cases,
        summary.cases,
        summary.endless,
        summary.undefined,
        summary.stale,
        summary.failures.len()
    );
    anyhow::ensure!(summary.failures.is_empty(), "the translate engine differs from the interpreter");
    Ok(())
}

fn follow(path: &std::path::Path) -> Result<()> {
    let case = sequences::Case::parse(&std::fs::read_to_string(path)?).map_err(anyhow::Error::msg)?;
    let mut pair = sequences::Pair::new()?;
    sequences::follow(&mut pair, &case, |line| println!("{line}"))?;
    println!("{:?}", sequences::check(&mut pair, &case));
    Ok(())
}
