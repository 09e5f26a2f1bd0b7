//! The project's own chores, run as `cargo xtask …`.
#![forbid(unsafe_code)]

mod bed;
mod boots;
mod fuzz;
mod guests;
mod nested;
mod packages;
mod sh;
mod test;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's own chores")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run all that CI runs: formatting, lints, licences, tests
    Test(test::Args),
    /// Build the bare-metal guests that tests run, and the benchmark program
    Guests,
    /// Figures: cpu, disk, network, fuzz, sequences, boot, mips (see `cargo xtask bench help`)
    Bench {
        /// What to measure, and how
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Boot stock kernels many times in a row
    Boots(boots::Args),
    /// Fuzz devices, shares, and what reads kernels, packages and the archive's answers, guided by coverage
    Fuzz(fuzz::Args),
    /// Boot the nested bed, where KVM works on every host, and run Lodge in it
    Nested(nested::Args),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Test(args) => test::run(&args),
        Command::Bench { args } => bench(&args),
        Command::Guests => {
            println!("{}", guests::build()?.display());
            println!("{}", guests::build_work()?.display());
            Ok(())
        }
        Command::Boots(args) => boots::run(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Nested(args) => nested::run(&args),
    }
}

/// Builds what is measured, and measures it.
fn bench(args: &[String]) -> anyhow::Result<()> {
    if args.first().is_some_and(|a| a == "mips") {
        return sh::run(&mut sh::cargo(&[
            "run",
            "--quiet",
            "--release",
            "-p",
            "lodge-interpret",
            "--example",
            "mips",
        ]));
    }
    if args.first().is_some_and(|a| ["cpu", "disk", "network"].contains(&a.as_str())) {
        guests::build_work()?;
    }
    sh::run(&mut sh::cargo(&["build", "--quiet", "--release", "-p", "lodge", "-p", "lodge-netd"]))?;
    let mut command = sh::cargo(&["run", "--quiet", "--release", "-p", "lodge-bench", "--"]);
    sh::run(command.args(args))?;
    // Whoever names engines has said what is to be measured.
    let named = args.iter().any(|a| a.starts_with("--engine"));
    match args.first().map(String::as_str) {
        Some("boot") if !named => nested::bench_boot(&args[1..]),
        Some("disk") if !named => nested::bench_disk(&args[1..]),
        _ => Ok(()),
    }
}
