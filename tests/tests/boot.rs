//! Stock Debian kernels boot to userspace and power off, by the engines that need nothing of the host.

use std::process::Command;
use std::time::Duration;

use images::Options;
use lodge_tests::{Done, default_guest, lodge, run, start_with};

const INTERPRET: [&str; 3] = ["run", "--engine", "interpret"];
/// Boots take seconds; on a machine that is busy with other tests, longer.
const PATIENCE: Duration = Duration::from_secs(240);

/// Boots on each of the software engines.
fn boot(image: &[&str], input: &str) -> [Done; 2] {
    ["interpret", "translate"].map(|engine| {
        let mut command = Command::new(lodge());
        command.args(["run", "--engine", engine]).args(image);
        start_with(&mut command, input).wait(PATIENCE).expect(0)
    })
}

fn available(suite: Option<&str>, arch: &str) -> bool {
    let options = Options { suite: suite.map(Into::into), arch: arch.into(), ..Options::default() };
    default_guest(&options).is_some()
}

#[test]
fn a_shell_on_one_processor_needs_no_network_the_second_time() {
    if !available(None, "amd64") {
        return;
    }
    let mut command = Command::new(lodge());
    // A proxy where nobody listens: whoever asks the network fails.
    command
        .args(INTERPRET)
        .arg("--stats")
        .env("http_proxy", "http://127.0.0.1:1")
        .env("https_proxy", "http://127.0.0.1:1");
    let commands =
        "echo sum $((6 * 7)); cat /proc/mounts; cat /sys/devices/system/clocksource/*/current_clocksource\n";
    let done = start_with(&mut command, commands).wait(PATIENCE).expect(0);
    assert!(done.out.contains("sum 42"), "{}", done.out);
    assert!(done.out.contains("kvm-clock"), "the paravirtual clock is picked: {}", done.out);
    assert!(done.err.contains("vCPU 0: instructions"), "{}", done.err);
}

#[test]
fn two_processors() {
    if !available(None, "amd64") {
        return;
    }
    for done in boot(&["--cpus", "2"], "nproc; grep -c ^processor /proc/cpuinfo\n") {
        assert_eq!(done.out.lines().filter(|l| *l == "2").count(), 2, "{}", done.out);
    }
}

#[test]
fn four_processors_translated() {
    if !available(None, "amd64") {
        return;
    }
    let mut command = Command::new(lodge());
    command.args(["run", "--engine", "translate", "--cpus", "4", "--stats"]);
    let done = start_with(&mut command, "nproc\n").wait(PATIENCE).expect(0);
    assert!(done.out.lines().any(|l| l == "4"), "{}", done.out);
    assert!(done.err.contains("vCPU 3: blocks translated"), "{}", done.err);
}

#[test]
fn a_newer_kernel() {
    if available(Some("trixie"), "amd64") {
        for done in boot(&["tiny:trixie", "--cpus", "2"], "uname -r; nproc\n") {
            assert!(done.out.contains("\n6.12."), "{}", done.out);
        }
    }
}

#[test]
fn a_32_bit_kernel() {
    if available(None, "i386") {
        for done in boot(&["tiny:i386"], "uname -m\n") {
            assert!(done.out.contains("\ni686"), "{}", done.out);
        }
    }
}

#[test]
fn a_panic_is_told_by_the_status() {
    if !available(None, "amd64") {
        return;
    }
    let args = [&INTERPRET[..], &["--cmdline", "rdinit=/nonexistent init=/nonexistent"]].concat();
    let done = run(&args, "").expect(6);
    assert!(done.err.contains("panicked"), "{}", done.err);
}

#[test]
fn a_reboot_starts_again() {
    if !available(None, "amd64") {
        return;
    }
    let args = [&INTERPRET[..], &["--no-reboot"]].concat();
    run(&args, "reboot\n").expect(0);
    let mut command = Command::new(lodge());
    command.args(INTERPRET);
    let running = start_with(&mut command, "reboot\n");
    running.line("Type \"poweroff\"", PATIENCE);
    running.line("Type \"poweroff\"", PATIENCE);
    running.wait(PATIENCE).expect(0);
}
