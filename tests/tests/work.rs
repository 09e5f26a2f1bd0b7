//! The benchmark program computes in a guest what it computes on the host.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use images::{Options, cpio::Cpio};
use lodge_tests::{Scratch, default_guest, lodge, start_with, target};

/// Checksums by workload, of a program's or a guest's output.
fn checksums(output: &str) -> BTreeMap<String, String> {
    let lines = output.lines().filter_map(|line| line.strip_prefix("@@work "));
    lines
        .filter_map(|line| Some((line.split(' ').next()?.into(), line.split(' ').next_back()?.into())))
        .collect()
}

/// Runs all workloads, at a hundredth of their size, in a guest with two processors.
fn same_as_on_the_host(engine: &str) {
    let Some(guest) = default_guest(&Options::default()) else { return };
    let program = target().join("x86_64-unknown-linux-gnu/release/work");
    assert!(program.exists(), "{} is missing: build it with `cargo xtask guests`", program.display());
    let host = Command::new(&program).args(["--size", "1"]).output().expect("the program starts");
    let expected = checksums(&String::from_utf8_lossy(&host.stdout));
    assert!(expected.len() > 25, "{expected:?}");

    // The kernel unpacks several archives one after the other.
    let mut initrd = std::fs::read(&guest.initrd).expect("the default guest can be read");
    let mut more = Cpio::new();
    more.file("bin/work", 0o755, &std::fs::read(&program).expect("the program can be read"));
    initrd.extend(more.finish());
    let scratch = Scratch::new(&format!("work-{engine}"));
    let initrd = scratch.file("initrd", &initrd);
    let mut command = Command::new(lodge());
    command.args(["run", "--engine", engine, "--cpus", "2", "--no-reboot", "--cmdline"]);
    command.arg(format!("{} lodge.exec=\"work --size 1\"", guest.cmdline));
    command.arg("--kernel").arg(&guest.kernel).arg("--initrd").arg(initrd);
    let done = start_with(&mut command, "").wait(Duration::from_secs(400)).expect(0);
    assert_eq!(checksums(&done.out), expected, "{}", done.out);
}

#[test]
fn every_workload_on_the_reference_engine() {
    same_as_on_the_host("interpret");
}

#[test]
fn every_workload_translated() {
    same_as_on_the_host("translate");
}
