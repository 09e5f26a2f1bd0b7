//! The bare-metal guests of `guests/bare` pass on both software engines, and the same under QEMU. (On KVM: `cargo xtask nested`.)

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use lodge_tests::{lodge, start, start_with};

/// What a guest that passed writes to the debug-exit port is 0, which is status 1.
const PASSED: i32 = 1;
const PATIENCE: Duration = Duration::from_secs(200);

fn guest(name: &str) -> PathBuf {
    let target = lodge_tests::target();
    let path = target.join("guest").join(name);
    assert!(path.exists(), "{} is missing: `cargo xtask guests` builds it", path.display());
    path
}

/// Runs a guest on an engine of software.
#[track_caller]
fn passes_on(engine: &str, name: &str, cpus: &str) {
    passes_with(&["run", "--engine", engine, "--cpus", cpus], name);
}

#[track_caller]
fn passes_with(args: &[&str], name: &str) {
    let path = guest(name);
    let mut args: Vec<String> = args.iter().map(|&a| a.into()).collect();
    args.extend(["--memory", "128M", "--debug-exit", "--no-reboot", "--kernel"].map(Into::into));
    args.push(path.display().to_string());
    let done = start(&args, "").wait(PATIENCE).expect(PASSED);
    assert!(!done.out.lines().any(|l| l.starts_with("FAIL")), "{}", done.out);
}

/// Runs a guest on the software engines, and its checks under QEMU, where that is.
#[track_caller]
fn passes(name: &str) {
    for engine in ["interpret", "translate"] {
        passes_on(engine, name, "2");
    }
    let path = guest(name);
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        println!("skipped under QEMU: it is not installed");
        return;
    }
    let mut qemu = Command::new("timeout");
    qemu.args(["--kill-after=5", "150", "qemu-system-x86_64"])
        .args("-machine q35,accel=tcg -cpu max -smp 2 -m 128 -no-reboot -display none".split(' '))
        .args("-serial stdio -monitor none -device isa-debug-exit,iobase=0xf4,iosize=4 -kernel".split(' '))
        .arg(path);
    start_with(&mut qemu, "").wait(PATIENCE).expect(PASSED);
}

macro_rules! suites {
    ($($test:ident = $name:literal;)*) => {
        $(#[test]
        fn $test() {
            passes($name);
        })*
    };
}

suites! {
    hello = "hello";
    faults = "faults";
    descriptors = "descriptors";
    virtual_8086_mode_and_16_bit_tasks = "v8086";
    debug = "debug";
    time = "time";
    interrupts = "interrupts";
    smp = "smp";
    self_modifying_code = "selfmod";
    smallest_integer_by_minus_one = "idiv";
    hostile = "hostile";
    garbage_in_every_register = "garbage";
    multiboot = "multiboot.elf32";
}

#[test]
fn a_frame_buffer_is_memory() {
    for args in
        [&["--engine", "interpret"][..], &["--engine", "translate"], &["--engine", "translate", "--lockstep"]]
    {
        let cpus = if args.contains(&"--lockstep") { "1" } else { "2" };
        passes_with(&[&["run", "--display", "vga", "--cpus", cpus], args].concat(), "display");
    }
}

/// The two engines side by side, block by block. Whole kernels: `cargo xtask boots --cpus 1 --timeout 900 -- --lockstep`.
#[test]
fn lockstep_finds_no_difference() {
    let guests = [
        "hello",
        "faults",
        "descriptors",
        "debug",
        "time",
        "interrupts",
        "selfmod",
        "hostile",
        "multiboot.elf32",
    ];
    for name in guests {
        passes_with(&["run", "--engine", "translate", "--lockstep"], name);
    }
}

#[test]
fn smp_with_more_processors() {
    for cpus in ["3", "4"] {
        passes_on("translate", "smp", cpus);
    }
}

#[test]
fn a_triple_fault_ends_the_run() {
    for engine in ["interpret", "translate"] {
        let mut command = Command::new(lodge());
        command.args(["run", "--engine", engine, "--kernel"]).arg(guest("triplefault"));
        start_with(&mut command, "").wait(PATIENCE).expect(6);
    }
}
