//! A benchmark that runs the same on the host and inside a guest: see `cargo xtask bench cpu`.
//!
//! `work [--cpus N] [--size PERCENT] [--rounds N] NAME…` runs workloads (all of them without a name), `work --list` prints
//! their names and categories, and `work --serve` takes `NAME PERCENT` lines from its standard input. A workload's result is one line:
//!
//! ```text
//! @@work NAME ITERATIONS CPU-NANOSECONDS WALL-NANOSECONDS CHECKSUM
//! ```
//!
//! or `@@work NAME absent WHY`. The processor time is this process's and that of the children that it has waited for. The
//! checksum depends on the iterations alone, on no machine.
//!
//! `work --disk DEVICE` takes lines for a block device instead, for `cargo xtask bench disk`: `seq-read-1 1000` reads in sequence
//! for a second, one request at a time; the answer has the bytes of a request in place of a checksum. `work --net ADDRESS:PORT` does the
//! same with a peer there, for `cargo xtask bench network`.

mod disk;
mod float;
mod integer;
mod jit;
mod net;
mod parallel;
mod sys;
mod system;
mod tool;

use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

/// A workload: its category, its name, how many iterations make 50 to 100 ms on a processor of 2021, and what they do,
/// which gives a checksum.
type Workload = (&'static str, &'static str, u64, fn(u64) -> u64);

const WORKLOADS: &[Workload] = &[
    ("integer", "hash", 250, integer::hash),
    ("integer", "hashmap", 50, integer::hashmap),
    ("integer", "sort", 20, integer::sort),
    ("integer", "compress", 150, integer::compress),
    ("integer", "interpreter", 15, integer::interpreter),
    ("integer", "tree", 40, integer::tree),
    ("integer", "recursion", 80, integer::recursion),
    ("integer", "chase", 2_500_000, integer::chase),
    ("integer", "copy", 1_200, integer::copy),
    ("integer", "strings", 150, integer::strings),
    ("float", "matrix", 180, float::matrix),
    ("float", "nbody", 700_000, float::nbody),
    ("float", "avx2-integer", 40_000, float::avx2_integer),
    ("float", "avx2-float", 40_000, float::avx2_float),
    ("system", "syscall", 300_000, system::syscall),
    ("system", "signal", 15_000, system::signal),
    ("system", "pipe", 10_000, system::pipe),
    ("system", "futex", 10_000, system::futex),
    ("system", "fault", 200, system::fault),
    ("system", "mmap", 15_000, system::mmap),
    ("system", "fork", 300, system::fork),
    ("system", "exec", 100, system::exec),
    ("system", "file", 3_000, system::file),
    ("jit", "jit-make", 300_000, jit::make),
    ("jit", "jit-run", 40_000_000, jit::run),
    ("jit", "jit-beside", 20_000_000, jit::beside),
    ("smp", "atomics", 10_000_000, parallel::atomics),
    ("smp", "sum-1", 4_000, parallel::sum_1),
    ("smp", "sum-2", 2_000, parallel::sum_2),
];

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (mut size, mut rounds, mut names) = (100, 1, Vec::new());
    let mut serve = false;
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|n| n.parse::<u64>().ok()).filter(|n| *n > 0);
        let ok = match argument.as_str() {
            // What `exec` starts.
            "--exit" => return,
            "--list" => return WORKLOADS.iter().for_each(|w| println!("{} {}", w.1, w.0)),
            "--disk" | "--net" => match arguments.next() {
                Some(at) => return serve_at(&argument, &at),
                None => false,
            },
            "--serve" => {
                serve = true;
                true
            }
            "--cpus" => number().is_some_and(sys::keep_to_cpus),
            "--size" => number().map(|n| size = n).is_some(),
            "--rounds" => number().map(|n| rounds = n).is_some(),
            name if find(name).is_some() => {
                names.extend(find(name));
                true
            }
            _ => false,
        };
        if !ok {
            eprintln!(
                "work: {argument}: give names of workloads, see --list, or --cpus, --size or --rounds with a number"
            );
            std::process::exit(2);
        }
    }
    if serve {
        return take_orders();
    }
    if names.is_empty() {
        names.extend(WORKLOADS);
    }
    for _ in 0..rounds {
        names.iter().for_each(|workload| measure(workload, size));
    }
}

fn find(name: &str) -> Option<&'static Workload> {
    WORKLOADS.iter().find(|workload| workload.1 == name)
}

/// Runs what is asked for on standard input, until that ends.
fn take_orders() {
    sys::terminal_without_echo();
    say("ready");
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let (name, size) = line.split_once(' ').unwrap_or((&line, "100"));
        match (find(name), size.trim().parse()) {
            (Some(workload), Ok(size @ 1..)) => measure(workload, size),
            _ => say(&format!("{name} absent no such workload")),
        }
    }
}

/// Takes orders for a disk or a peer, once it is there.
fn serve_at(kind: &str, at: &str) {
    sys::terminal_without_echo();
    if kind == "--disk" {
        let device = disk::open(at);
        take_timed_orders(|order, time| disk::run(&device, order, time));
    } else {
        let peer = net::open(at);
        take_timed_orders(|order, time| net::run(peer, order, time));
    }
}

/// Does what is asked for on standard input: `ORDER MILLISECONDS`, see [`disk`] and [`net`].
fn take_timed_orders(run: impl Fn(&str, Duration) -> Option<String>) {
    say("ready");
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let order = line.split_once(' ').and_then(|(order, time)| Some((order, time.trim().parse().ok()?)));
        match order.and_then(|(order, time)| run(order, Duration::from_millis(time))) {
            Some(answer) => say(&answer),
            None => say(&format!("{line} absent no such order")),
        }
    }
}

/// Runs a workload at `size` percent of its iterations.
fn measure(&(_, name, iterations, run): &Workload, size: u64) {
    if name.starts_with("avx2") && !is_x86_feature_detected!("avx2") {
        return say(&format!("{name} absent the processor has no AVX2"));
    }
    let iterations = (iterations.saturating_mul(size) / 100).max(1);
    let (cpu, wall) = (sys::cpu_time(), Instant::now());
    let sum = run(iterations);
    let (cpu, wall) = (sys::cpu_time() - cpu, wall.elapsed());
    say(&format!("{name} {iterations} {} {} {sum:016x}", cpu.as_nanos(), wall.as_nanos()));
}

/// Writes a line for whoever measures, at once.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    // Nobody is left to tell that nobody listens.
    let _ = out.write_all(format!("@@work {text}\n").as_bytes()).and_then(|()| out.flush());
}
