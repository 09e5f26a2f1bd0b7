//! How much is done in a time, and with how much of the host's processor: programs that take orders in guests, several monitors by turns.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result};
use images::cpio::Cpio;

use crate::monitor::{self, Programs, Running, Setup, median};

/// The program, as `cargo xtask guests` builds it.
///
/// # Errors
/// This program does not know where it is.
pub fn work() -> Result<PathBuf> {
    monitor::sibling("../x86_64-unknown-linux-gnu/release/work")
}

/// A guest that runs a command of its shell's, of which `work` is one.
pub struct Guest {
    /// What all monitors run.
    pub setup: Setup,
    _initrd: tempfile::NamedTempFile,
}

impl Guest {
    /// Makes it, and says what it is.
    ///
    /// # Errors
    /// Something of it is missing.
    pub fn new(guest: images::Guest, programs: &Programs, work: &Path, exec: &str) -> Result<Self> {
        // The kernel unpacks several archives one after the other.
        let mut image = std::fs::read(&guest.initrd)?;
        let program = std::fs::read(work)
            .with_context(|| format!("cannot read {}; build it with `cargo xtask guests`", work.display()))?;
        let mut more = Cpio::new();
        more.file("bin/work", 0o755, &program);
        image.extend(more.finish());
        let mut initrd = tempfile::NamedTempFile::new()?;
        initrd.write_all(&image)?;
        let setup = Setup {
            programs: programs.clone(),
            kernel: guest.kernel,
            initrd: initrd.path().to_owned(),
            cmdline: format!("{} lodge.exec=\"{exec}\"", guest.cmdline),
            network: "none",
        };
        programs.introduce(&guest.description, 512);
        Ok(Self { setup, _initrd: initrd })
    }
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

/// A monitor with its guest.
pub struct Place {
    engine: String,
    running: Running,
    samples: BTreeMap<&'static str, Vec<Sample>>,
}

impl Place {
    /// Starts a monitor.
    ///
    /// # Errors
    /// Its guest does not start the program.
    pub fn start(engine: &str, command: &mut Command) -> Result<Self> {
        let mut running = Running::start(command)?;
        running.line("@@work ready", monitor::PATIENCE)?;
        Ok(Self { engine: engine.into(), running, samples: BTreeMap::new() })
    }

    /// Counts the processor time of another process, which works for the monitor, as its own.
    ///
    /// # Errors
    /// It has ended.
    pub fn count(&mut self, other: &Child) -> Result<()> {
        self.running.count(other)
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

/// Measures every pattern in each place by turns, so often, and prints a row for each: rates, processor times, and what they are in
/// comparison with the first place's.
///
/// # Errors
/// A guest fails.
pub fn compare(places: &mut [Place], patterns: &[&'static str], rounds: usize, millis: u64) -> Result<()> {
    for _ in 0..rounds {
        for pattern in patterns {
            for place in &mut *places {
                place.measure(pattern, millis)?;
            }
        }
    }
    print(places, patterns);
    Ok(())
}

fn print(places: &[Place], patterns: &[&'static str]) {
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
    for pattern in patterns {
        let cells: String = places
            .iter()
            .enumerate()
            .map(|(n, place)| {
                let (rate, cpu) = (place.median(pattern, |s| s.rate), place.median(pattern, |s| s.cpu));
                let block = place.median(pattern, |s| s.block);
                let shown = if block > 4096.0 {
                    format!("{:.0} MiB/s", rate / f64::from(1 << 20))
                } else {
                    format!("{:.0} /s", rate / block)
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
