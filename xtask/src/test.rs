//! `cargo xtask test`: all that CI runs.

use anyhow::Result;

use crate::{guests, nested, packages, sh};

#[derive(clap::Args)]
pub struct Args {
    /// Only tests whose name contains this
    filter: Option<String>,
    /// Leave out formatting, lints and licences
    #[arg(long)]
    quick: bool,
}

pub fn run(args: &Args) -> Result<()> {
    packages::ensure()?;
    packages::ensure_tools()?;
    if !args.quick {
        sh::run(&mut sh::cargo(&["fmt", "--all", "--check"]))?;
        sh::run(&mut sh::cargo(&[
            "clippy",
            "--quiet",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ]))?;
        sh::run(&mut sh::cargo(&["deny", "--log-level", "error", "check", "licenses", "bans", "sources"]))?;
    }
    guests::build()?;
    guests::build_work()?;
    // The end-to-end tests run the command as users have it.
    sh::run(&mut sh::cargo(&["build", "--quiet", "--release", "-p", "lodge", "-p", "lodge-netd"]))?;
    let mut nextest = vec!["nextest", "run", "--workspace", "--no-fail-fast"];
    nextest.extend(args.filter.as_deref());
    // KVM first, so that the tests' summary stands at the end.
    let kvm = if args.filter.is_none() { nested::run(&nested::Args::ALL) } else { Ok(()) };
    if let Err(error) = &kvm {
        println!("{error:#}");
    }
    sh::run(&mut sh::cargo(&nextest)).and(kvm)
}
