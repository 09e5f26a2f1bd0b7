//! `cargo xtask fuzz`: libFuzzer on the stable compiler, without cargo-fuzz. What it needs of LLVM (coverage counters and traced
//! comparisons) are stable flags; only the sanitizers want a nightly one, and our parsers have no `unsafe` for these to watch.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::sh;

/// `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which targets; all if none is named
    targets: Vec<String>,
    /// How long each
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
    /// Run one input instead, such as one that crashed
    #[arg(long, value_name = "FILE", conflicts_with = "seconds")]
    input: Option<PathBuf>,
}

/// Crates with fuzz targets.
const CRATES: [&str; 8] = [
    "crates/boot/fuzz",
    "crates/devices/fuzz",
    "crates/disks/fuzz",
    "crates/images/fuzz",
    "crates/lan/fuzz",
    "crates/networks/fuzz",
    "crates/screens/fuzz",
    "crates/shares/fuzz",
];

/// Where libFuzzer's counters come from (its `-fsanitize=fuzzer`), and what a test build checks, too.
const FLAGS: [&str; 9] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "-Cdebug-assertions",
    "-Coverflow-checks",
];

/// With a target named, the flags are for the programs alone, not for what builds them.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the targets and runs one after the other; an error if one finds something.
pub fn run(args: &Args) -> Result<()> {
    let known = known()?;
    let asked = |name: &str| args.targets.is_empty() || args.targets.iter().any(|t| t == name);
    if let Some(unknown) = args.targets.iter().find(|t| !known.iter().any(|(_, name)| name == *t)) {
        let names: Vec<&str> = known.iter().map(|(_, name)| name.as_str()).collect();
        bail!("there is no fuzz target {unknown:?}; there are {}", names.join(", "));
    }
    let mut failed = Vec::new();
    for (dir, name) in known.iter().filter(|(_, name)| asked(name)) {
        let program = build(dir, name)?;
        if fuzz(args, &program, dir, name).is_err() {
            failed.push(name.as_str());
        }
    }
    ensure!(failed.is_empty(), "something was found by {}", failed.join(", "));
    Ok(())
}

/// All targets: the crate's directory and the name.
fn known() -> Result<Vec<(&'static str, String)>> {
    let mut all = Vec::new();
    for dir in CRATES {
        for entry in fs::read_dir(sh::root().join(dir).join("fuzz_targets"))? {
            let path = entry?.path();
            let name = path.file_stem().context("a target has a name")?;
            all.push((dir, name.to_string_lossy().into_owned()));
        }
    }
    all.sort();
    Ok(all)
}

fn build(dir: &str, name: &str) -> Result<PathBuf> {
    let target = sh::target_dir().join("fuzz");
    let mut command = sh::cargo(&["build", "--quiet", "--release", "--target", TARGET, "--bin", name]);
    command.arg("--manifest-path").arg(sh::root().join(dir).join("Cargo.toml"));
    sh::run(command.arg("--target-dir").arg(&target).env("RUSTFLAGS", FLAGS.join(" ")))?;
    Ok(target.join(TARGET).join("release").join(name))
}

fn fuzz(args: &Args, program: &Path, dir: &str, name: &str) -> Result<()> {
    let place = |kind: &str| -> Result<PathBuf> {
        let path = sh::target_dir().join("fuzz").join(kind).join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    };
    println!("fuzzing {name}");
    let options = ["-verbosity=0", "-print_funcs=0", "-print_final_stats=1", "-timeout=20"];
    let mut command = sh::command(&program.display().to_string(), &options);
    command.arg(format!("-artifact_prefix={}/", place("artifacts")?.display()));
    match &args.input {
        // Relative to where the user is.
        Some(input) => command.arg(std::path::absolute(input)?),
        None => command.arg(format!("-max_total_time={}", args.seconds)).arg(place("corpus")?),
    };
    // What it could hardly guess.
    let seeds = sh::root().join(dir).join("seeds").join(name);
    if args.input.is_none() && seeds.exists() {
        command.arg(place("seeds").and_then(|to| grow(&seeds, to))?);
    }
    sh::run(&mut command)
}

/// Puts the seeds in `from` into `to`, those in hexadecimal as what they stand for.
fn grow(from: &Path, to: PathBuf) -> Result<PathBuf> {
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        let text = fs::read(&path)?;
        let bytes = match path.extension().is_some_and(|end| end == "hex") {
            true => from_hex(&String::from_utf8(text)?).with_context(|| format!("in {}", path.display()))?,
            false => text,
        };
        fs::write(to.join(path.file_stem().context("a seed without a name")?), bytes)?;
    }
    Ok(to)
}

/// Bytes from lines of `OFFSET: BYTES`, all in hexadecimal. What is left out is zero; the last offset is the length.
fn from_hex(text: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for line in text.lines() {
        let (at, digits) = line.split_once(':').context("a line without an offset")?;
        bytes.resize(usize::from_str_radix(at, 16)?, 0);
        for pair in digits.trim().as_bytes().chunks(2) {
            bytes.push(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #[test]
    fn hexadecimal_seeds() {
        assert_eq!(super::from_hex("1: ff01\n5:\n").unwrap(), [0, 255, 1, 0, 0]);
        assert!(super::from_hex("1: fg\n").is_err());
    }
}
