//! What goes wrong is told in one line with a way out, and by the documented exit status.

use std::process::Command;
use std::time::Duration;

use lodge_tests::{Done, Scratch, lodge, run, start_with};

/// Fails unless `done` told one error with a way out.
#[track_caller]
fn one_error(done: Done, code: i32, what: &str) {
    let done = done.expect(code);
    let lines: Vec<&str> = done.err.lines().collect();
    assert!(lines.len() <= 2 && lines[0].starts_with("error: "), "{}", done.err);
    assert!(lines[0].contains(what), "{} does not say {what:?}", lines[0]);
    assert!(!done.err.contains("panicked"), "{}", done.err);
}

#[test]
fn files_that_are_no_kernels() {
    let scratch = Scratch::new("no-kernels");
    for (name, bytes, what) in [
        ("empty", &b""[..], "no kernel that Lodge knows"),
        ("text", b"#!/bin/sh\necho hello\n", "no kernel that Lodge knows"),
        ("gzip", b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "compressed with gzip"),
        ("elf", b"\x7fELF\x02\x01\x01\x00\x00\x00", "damaged ELF file"),
    ] {
        let path = scratch.file(name, bytes);
        one_error(run(&["run".as_ref(), "--kernel".as_ref(), path.as_os_str()], ""), 4, what);
    }
    one_error(run(&["run", "--kernel", "/nonexistent/vmlinuz"], ""), 4, "cannot read");
    one_error(run(&["run", "nonsense"], ""), 2, "no image called nonsense");
}

#[test]
fn a_truncated_kernel() {
    let Some(guest) = lodge_tests::cached_guest() else { return };
    let scratch = Scratch::new("truncated");
    let bytes = std::fs::read(&guest.kernel).unwrap();
    for len in [0x210, 0x1000, 0x4000] {
        let path = scratch.file("vmlinuz", &bytes[..len]);
        let done = run(&["run".as_ref(), "--engine".as_ref(), "interpret".as_ref(), path.as_os_str()], "");
        // What is cut short in its compressed part can only be found out by the guest.
        if len < 0x4000 {
            one_error(done, 4, "vmlinuz");
        }
    }
}

#[test]
fn sizes_and_counts_that_cannot_be() {
    for (args, what) in [
        (["--memory", "0"], "too little memory"),
        (["--memory", "900T"], "this host has"),
        (["--memory", "4194305"], "no whole number of MiB"),
        (["--cpus", "0"], "1 to 255 processors"),
        (["--cpus", "256"], "1 to 255 processors"),
    ] {
        let mut all = vec!["run", "--kernel", "/etc/hostname"];
        all.extend(args);
        one_error(run(&all, ""), 2, what);
    }
    assert_eq!(run(&["run", "--memory", "lots"], "").code(), 2);
    assert_eq!(run(&["run", "--engine", "steam"], "").code(), 2);
    assert_eq!(run(&["walk"], "").code(), 2);
}

#[test]
fn caches_and_archives_that_are_not_there() {
    let scratch = Scratch::new("caches");
    let with_cache = |cache: &str, args: &[&str]| {
        let mut command = Command::new(lodge());
        command.args(args).env("LODGE_CACHE_DIR", cache);
        start_with(&mut command, "").wait(Duration::from_secs(60))
    };
    one_error(with_cache("/proc/nowhere", &["run"]), 4, "/proc/nowhere");
    let empty = scratch.path().join("empty");
    let mirror = "file:///nonexistent/debian";
    one_error(with_cache(&empty.display().to_string(), &["run", "--mirror", mirror]), 4, mirror);
    let left =
        std::fs::read_dir(&empty).map(|d| d.flatten().filter(|e| e.path().is_file()).count()).unwrap_or(0);
    assert!(left <= 1, "nothing but the lock file is left in the cache");
}

#[test]
fn a_configuration_file_with_a_mistake() {
    let scratch = Scratch::new("config");
    let path = scratch.file("config.toml", b"cpus = 2\nmemery = \"1G\"\n");
    let mut command = Command::new(lodge());
    command.args(["run"]).env("LODGE_CONFIG", &path);
    one_error(start_with(&mut command, "").wait(Duration::from_secs(10)), 2, "line 2");
}

#[test]
fn an_engine_that_the_host_lacks() {
    let table = run(&["host", "--json"], "").expect(0).out;
    if !table.contains("\"usable\": false") {
        println!("skipped: every engine can be used here");
        return;
    }
    one_error(
        run(&["run", "--engine", "kvm", "--kernel", "/etc/hostname"], ""),
        4,
        "the engine kvm cannot be used here",
    );
}

#[test]
fn completions_and_man_pages_are_made() {
    let scratch = Scratch::new("man");
    assert!(run(&["completions", "bash"], "").expect(0).out.contains("--memory"));
    run(&["man".as_ref(), scratch.path().as_os_str()], "").expect(0);
    let page = std::fs::read_to_string(scratch.path().join("lodge-run.1")).unwrap();
    assert!(page.contains("Exit status") && page.contains("Examples"));
}
