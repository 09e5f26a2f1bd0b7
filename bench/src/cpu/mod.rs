//! The benchmark program `guests/work` on the host, in QEMU and in Lodge, side by side.
//!
//! All of them run at once, and wait; each in turn is told over its console to run one workload, so that a busy moment of
//! the host meets all alike. What counts is the host's processor time: for the program on the host its own (its
//! children's included), for a monitor the whole process's, from the order to the first byte of the answer.

mod table;

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::monitor::{self, Programs, Running, Setup};
use crate::rates::{self, Guest};

/// `lodge-bench cpu`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to measure: `native` is the host, `tcg` is QEMU's translator, the others are engines of Lodge's
    #[arg(long, value_delimiter = ',', default_value = "native,tcg,translate")]
    engine: Vec<String>,
    /// Only these workloads, or categories of them
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    only: Vec<String>,
    /// How often; the medians count
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// How large the workloads are, in percent of 50 to 100 ms on the host
    #[arg(long, default_value_t = 100, value_name = "PERCENT")]
    size: u64,
    /// Seconds that a workload may take
    #[arg(long, default_value_t = 120)]
    patience: u64,
    /// Write every single figure into this file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The benchmark program, if not the one that cargo built beside this one
    #[arg(long, value_name = "FILE")]
    work: Option<PathBuf>,
    #[command(flatten)]
    programs: Programs,
}

/// One run of a workload.
#[derive(Debug, Clone, serde::Serialize)]
struct Sample {
    /// Host processor time, nanoseconds.
    cpu: u64,
    /// Time on the host's clock, nanoseconds.
    wall: u64,
    /// Processor time and time on its own clock, as the program saw them: nanoseconds.
    seen: [u64; 2],
    iterations: u64,
    checksum: String,
}

/// All that was measured of one engine.
#[derive(Debug, Default, serde::Serialize)]
struct Column {
    /// Host processor time until the first line of userspace, seconds; and on the clock.
    boot: Option<[f64; 2]>,
    /// What memory it uses at the end, MiB: see [`Running::memory`].
    memory: f64,
    samples: BTreeMap<String, Vec<Sample>>,
    /// What went wrong, by workload.
    failures: BTreeMap<String, String>,
}

/// A workload: its name and its category.
type Workload = (String, String);

/// Measures and prints the table.
///
/// # Errors
/// Something cannot be started, or an engine fails or gives another checksum than the others; then after all else is
/// done.
pub fn run(args: &Args) -> Result<()> {
    let work = args.work.clone().map_or_else(rates::work, Ok)?;
    let workloads = workloads(&work, &args.only)?;
    let guest = args.programs.guest("amd64")?;
    let guest = Guest::new(guest, &args.programs, &work, "work --serve")?;
    println!("size {} %, medians of {}", args.size, args.rounds);
    let mut places: Vec<Place> = Vec::new();
    for engine in &args.engine {
        match Place::start(engine, &guest.setup, &work) {
            Ok(place) => places.push(place),
            Err(error) => println!("{engine}: skipped: {error:#}"),
        }
    }
    for round in 1..=args.rounds {
        for (name, _) in &workloads {
            progress(&format!("round {round} of {}: {name}", args.rounds));
            for place in &mut places {
                place.measure(name, args);
            }
        }
    }
    progress("");
    let columns: Vec<(String, Column)> = places.into_iter().map(Place::finish).collect();
    if let Some(path) = &args.json {
        let all: BTreeMap<_, _> = columns.iter().map(|(engine, column)| (engine, column)).collect();
        std::fs::write(path, serde_json::to_string_pretty(&all)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    table::print(&workloads, &columns);
    table::print_engines(&columns, args.programs.cpus);
    let errors = table::errors(&workloads, &columns);
    errors.iter().for_each(|error| println!("error: {error}"));
    ensure!(errors.is_empty(), "errors: {}", errors.len());
    Ok(())
}

/// Tells who watches.
fn progress(text: &str) {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K{text}");
    }
}

/// What the program can do, less what was not asked for.
fn workloads(work: &std::path::Path, only: &[String]) -> Result<Vec<Workload>> {
    let output = Command::new(work)
        .arg("--list")
        .output()
        .with_context(|| format!("cannot start {}; build it with `cargo xtask guests`", work.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let all: Vec<Workload> =
        text.lines().filter_map(|l| l.split_once(' ')).map(|(n, c)| (n.into(), c.into())).collect();
    for name in only {
        ensure!(
            all.iter().any(|(n, c)| n == name || c == name),
            "there is no workload {name}, only:\n{text}"
        );
    }
    Ok(all.into_iter().filter(|(n, c)| only.is_empty() || only.contains(n) || only.contains(c)).collect())
}

/// One engine with the program running in it.
struct Place<'a> {
    engine: String,
    setup: &'a Setup,
    work: &'a std::path::Path,
    /// Or why it runs no more.
    running: Result<Running, String>,
    column: Column,
}

impl<'a> Place<'a> {
    fn start(engine: &str, setup: &'a Setup, work: &'a std::path::Path) -> Result<Self> {
        let mut column = Column::default();
        let running = Ok(boot(engine, setup, work, &mut column)?);
        Ok(Self { engine: engine.into(), setup, work, running, column })
    }

    /// Runs a workload, if it has not failed before; where it does, the guest is started anew for the others.
    fn measure(&mut self, name: &str, args: &Args) {
        if self.column.failures.contains_key(name) {
            return;
        }
        match self.sample(name, args) {
            Ok(Some(sample)) => self.column.samples.entry(name.into()).or_default().push(sample),
            Ok(None) => {}
            Err(error) => {
                self.column.failures.insert(name.into(), format!("{error:#}"));
                if self.running.is_ok() {
                    let again = boot(&self.engine, self.setup, self.work, &mut self.column);
                    self.running = again.map_err(|error| format!("it did not start again: {error:#}"));
                }
            }
        }
    }

    /// One run of a workload; none where the machine lacks what it needs.
    fn sample(&mut self, name: &str, args: &Args) -> Result<Option<Sample>> {
        let running = self.running.as_mut().map_err(|why| anyhow!("{why}"))?;
        let before = running.now()?;
        running.say(&format!("{name} {}", args.size))?;
        let (line, after) = running.line("@@work ", Duration::from_secs(args.patience))?;
        let mut words = line.split(' ');
        ensure!(words.next() == Some(name), "the answer is to another order: {line}");
        if words.clone().next() == Some("absent") {
            return Ok(None);
        }
        let mut number =
            || words.next().and_then(|w| w.parse::<u64>().ok()).context("an answer cannot be read");
        let (iterations, seen) = (number()?, [number()?, number()?]);
        let checksum = words.next().context("an answer has no checksum")?.to_owned();
        let spent = |of: fn(&monitor::Moment) -> Duration| (of(&after) - of(&before)).as_nanos() as u64;
        // On the host it knows best: its children are not its own process.
        let cpu = if self.engine == "native" { seen[0] } else { spent(|m| m.cpu) };
        Ok(Some(Sample { cpu, wall: spent(|m| m.wall), seen, iterations, checksum }))
    }

    fn finish(mut self) -> (String, Column) {
        self.column.memory = self.running.as_ref().map_or(f64::NAN, Running::memory);
        (self.engine, self.column)
    }
}

/// Starts the program, in a guest or on the host, and waits until it takes orders.
fn boot(engine: &str, setup: &Setup, work: &std::path::Path, column: &mut Column) -> Result<Running> {
    let mut running;
    if engine == "native" {
        // On as many processors as the guests have.
        let cpus = setup.programs.cpus.to_string();
        running = Running::start(Command::new(work).args(["--cpus", &cpus, "--serve"]))?;
    } else {
        running = Running::start(&mut setup.command(engine)?)?;
        let (_, moment) = running.line(monitor::READY, monitor::PATIENCE)?;
        column.boot.get_or_insert([moment.cpu, moment.wall].map(|t| t.as_secs_f64()));
    }
    running.line("@@work ready", monitor::PATIENCE)?;
    Ok(running)
}
