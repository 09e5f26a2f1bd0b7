//! `lodge-bench`: see `cargo xtask bench`.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};
use lodge_bench::{boot, cpu, fuzz};

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
    /// Time from the command to the guest's first line, beside QEMU's translator
    Boot(boot::Args),
    /// Workloads on the host, in QEMU and in Lodge: processor time and checksums
    Cpu(cpu::Args),
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Fuzz { cases, seed, filter, save } => run_fuzz(cases, seed, &filter, save),
        Command::Boot(args) => boot::run(&args),
        Command::Cpu(args) => cpu::run(&args),
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
