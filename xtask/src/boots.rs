//! `cargo xtask boots`: stock kernels, many times in a row, for what fails once in a hundred boots.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::sh;

/// `cargo xtask boots`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The engine of Lodge's that they boot on
    #[arg(long, default_value = "translate", value_parser = ["translate", "interpret", "kvm"])]
    engine: String,
    /// How often each boots
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    times: u32,
    /// With how many virtual processors
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 2])]
    cpus: Vec<u32>,
    /// Which: Debian suites, and i386 for a 32-bit kernel
    #[arg(long, value_name = "NAME", value_delimiter = ',', default_values_t = ["bookworm", "trixie", "i386"].map(String::from))]
    kernel: Vec<String>,
    /// How many seconds one boot may take
    #[arg(long, value_name = "SECS", default_value_t = 240)]
    timeout: u64,
    /// More options of `lodge run`, after `--`
    #[arg(last = true)]
    options: Vec<String>,
}

/// What a kernel says on its console, whatever its log level, when something is wrong with it or its machine.
const COMPLAINTS: [&str; 4] = ["BUG: ", "Oops: ", "WARNING: ", "Call Trace:"];

/// Boots all of it, with a line for each kernel and number of processors.
pub fn run(args: &Args) -> Result<()> {
    let logs = sh::target_dir().join("boots");
    fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
    // A copy, so that all boots are of one build, whatever cargo does meanwhile.
    let lodge = logs.join(format!("lodge-{}", args.engine));
    fs::copy(sh::build(&["build", "--release", "-p", "lodge"])?, &lodge).context("cannot copy lodge")?;
    let mut failed = 0;
    for kernel in &args.kernel {
        for &cpus in &args.cpus {
            failed += boots(args, &lodge, &logs, kernel, cpus)?;
        }
    }
    ensure!(failed == 0, "{failed} boots failed");
    Ok(())
}

/// Boots one kernel as often as was asked; gives how often that failed.
fn boots(args: &Args, lodge: &Path, logs: &Path, kernel: &str, cpus: u32) -> Result<u32> {
    let mut times = Vec::new();
    for time in 1..=args.times {
        let log = logs.join(format!("{}-{kernel}-{cpus}-{time}.log", args.engine));
        let mut command = Command::new(lodge);
        command.args(["run", &format!("tiny:{kernel}"), "--engine", &args.engine, "--no-reboot"]);
        command.args(["--cpus", &cpus.to_string(), "--timeout", &args.timeout.to_string()]);
        command.args(&args.options);
        match boot(&mut command, cpus, args.timeout, &log)? {
            Ok(took) => {
                times.push(took.as_secs_f64());
                fs::remove_file(&log).with_context(|| format!("cannot remove {}", log.display()))?;
            }
            Err(why) => println!("{kernel} ×{cpus}: boot {time} {why}; its console is in {}", log.display()),
        }
    }
    times.sort_by(f64::total_cmp);
    let median = times.get(times.len() / 2).map(|s| format!(", median {s:.1} s")).unwrap_or_default();
    println!("{kernel} ×{cpus}: {} of {}{median}", times.len(), args.times);
    Ok(args.times - u32::try_from(times.len())?)
}

/// Boots once, to the shell and, as that reads nothing, to power-off; how long that took, or why it failed.
fn boot(command: &mut Command, cpus: u32, limit: u64, log: &Path) -> Result<Result<Duration, String>> {
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let errors = file.try_clone().context("cannot share the log")?;
    let begun = Instant::now();
    let mut child =
        command.stdin(Stdio::null()).stdout(file).stderr(errors).spawn().context("cannot start lodge")?;
    // Longer than its own limit, so that a guest that hangs is told from a Lodge that does.
    let end = begun + Duration::from_secs(limit + 20);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > end {
            child.kill()?;
            child.wait()?;
            return Ok(Err(format!("did not end {limit} s after its start, nor 20 s later")));
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let took = begun.elapsed();
    if status.code() == Some(2) {
        bail!("{}", fs::read_to_string(log).unwrap_or_default().trim());
    }
    let console = String::from_utf8_lossy(&fs::read(log)?).into_owned();
    Ok(match why_failed(&console, cpus) {
        _ if !status.success() => Err(format!("ended with {status}")),
        Some(why) => Err(why),
        None => Ok(took),
    })
}

/// What is wrong with the console of a boot that ended well.
fn why_failed(console: &str, cpus: u32) -> Option<String> {
    let Some(line) = console.lines().find(|line| line.contains("Lodge: Linux")) else {
        return Some("did not come to userspace".into());
    };
    if !line.contains(&format!(", {cpus} CPUs,")) {
        return Some(format!("came up as {line:?}"));
    }
    let complaint = console.lines().find(|line| COMPLAINTS.iter().any(|c| line.contains(c)))?;
    Some(format!("complained: {}", complaint.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boots_fail_by_what_is_on_the_console() {
        let good = "[    0.0] Linux version 6\nLodge: Linux 6, 2 CPUs, 400 MiB.\n";
        assert_eq!(why_failed(good, 2), None);
        assert!(why_failed(good, 3).is_some());
        assert!(why_failed("[    0.0] Linux version 6\n", 2).is_some());
        assert!(why_failed(&format!("{good}[ 1.0] BUG: soft lockup\n"), 2).is_some());
    }
}
