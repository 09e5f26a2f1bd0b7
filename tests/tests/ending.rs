//! However the guest behaves, whoever wants it to end gets that; and gdb gets in.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lodge_tests::{Scratch, lodge, run, start};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

const PATIENCE: Duration = Duration::from_secs(60);

/// Firmware that executes `code` (16-bit) from the reset vector on, and spins.
fn firmware(scratch: &Scratch, code: &[u8]) -> std::path::PathBuf {
    let mut rom = vec![0xf4; 0x1_0000];
    rom[0x100..0x100 + code.len()].copy_from_slice(code);
    // jmp f000:0100
    rom[0xfff0..0xfff5].copy_from_slice(&[0xea, 0x00, 0x01, 0x00, 0xf0]);
    scratch.file("rom", &rom)
}

/// cli; jmp $
const SPIN: &[u8] = &[0xfa, 0xeb, 0xfe];

fn firmware_args(rom: &std::path::Path) -> Vec<String> {
    ["run", "--engine", "interpret", "--memory", "16M", "--firmware"]
        .iter()
        .map(ToString::to_string)
        .chain([rom.display().to_string()])
        .collect()
}

#[test]
fn signals_end_a_guest_that_listens_to_nothing() {
    let scratch = Scratch::new("spin");
    let args = firmware_args(&firmware(&scratch, SPIN));
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let running = start(&args, "");
        // The signal must find the handler: it is there once the guest runs, which its CPU time tells.
        wait_for_cpu_time(running.child.id());
        running.signal(signal);
        running.wait(PATIENCE).expect(130);
    }
}

fn wait_for_cpu_time(pid: u32) {
    let begun = Instant::now();
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let ticks: u64 =
            stat.rsplit(") ").next().and_then(|s| s.split(' ').nth(11)?.parse().ok()).unwrap_or(0);
        if ticks >= 5 {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "the guest does not run");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_time_limit_holds() {
    let scratch = Scratch::new("timeout");
    let mut args = firmware_args(&firmware(&scratch, SPIN));
    args.extend(["--timeout".into(), "0.5".into()]);
    run(&args, "").expect(124);
}

/// mov dx, 0x3f8; mov al, '\n'; out dx, al; jmp $-1
const CHATTER: &[u8] = &[0xba, 0xf8, 0x03, 0xb0, b'\n', 0xee, 0xeb, 0xfd];

#[test]
fn a_guest_whose_output_nobody_reads_ends() {
    let scratch = Scratch::new("head");
    let mut args = firmware_args(&firmware(&scratch, CHATTER));
    args.extend(["--timeout".into(), "60".into()]);
    let mut child = Command::new(lodge())
        .args(&args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0]).unwrap();
    drop(out);
    let done = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(130), "{err}");
    assert!(err.contains("its reader has gone"), "{err}");
}

#[test]
fn output_that_cannot_be_written_is_the_hosts_failure() {
    let scratch = Scratch::new("full");
    let mut args = firmware_args(&firmware(&scratch, CHATTER));
    args.extend(["--timeout".into(), "60".into()]);
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let done = Command::new(lodge()).args(&args).stdin(Stdio::null()).stdout(full).output().unwrap();
    let err = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(4), "{err}");
    assert!(err.contains("cannot be written"), "{err}");
}

#[test]
fn debug_exit_and_triple_fault_give_their_statuses() {
    let scratch = Scratch::new("exits");
    // mov al, 21; out 0xf4, al; jmp $
    let mut args = firmware_args(&firmware(&scratch, &[0xb0, 21, 0xe6, 0xf4, 0xeb, 0xfe]));
    args.push("--debug-exit".into());
    run(&args, "").expect(43);
    // lidt [cs:0x120] with a limit of 0, ud2
    let mut code = vec![0x2e, 0x0f, 0x01, 0x1e, 0x20, 0x01, 0x0f, 0x0b];
    code.resize(0x26, 0);
    let mut args = firmware_args(&firmware(&scratch, &code));
    args.push("--no-reboot".into());
    let done = run(&args, "").expect(6);
    assert!(done.err.contains("triple fault"), "{}", done.err);
}

#[test]
fn the_escape_key_works_on_a_terminal() {
    let scratch = Scratch::new("escape");
    let args = firmware_args(&firmware(&scratch, SPIN));
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let terminal = std::fs::OpenOptions::new().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    let before = rustix::termios::tcgetattr(&terminal).unwrap();
    let mut child = Command::new(lodge())
        .args(&args)
        .stdin(terminal.try_clone().unwrap())
        .stdout(Stdio::null())
        .stderr(terminal.try_clone().unwrap())
        .spawn()
        .unwrap();
    let mut keys = std::fs::File::from(master);
    // The hint comes when the terminal is raw.
    let mut seen = String::new();
    let mut buffer = [0; 512];
    while !seen.contains("Ctrl-]") {
        let n = keys.read(&mut buffer).unwrap();
        seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    keys.write_all(b"\x1dq").unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130), "{seen}");
    let after = rustix::termios::tcgetattr(&terminal).unwrap();
    assert_eq!(before.local_modes, after.local_modes, "the terminal is as it was");
}

#[test]
fn gdb_sees_and_steers_the_guest() {
    if Command::new("gdb").arg("--version").output().is_err() {
        println!("skipped: there is no gdb here");
        return;
    }
    let scratch = Scratch::new("gdb");
    // mov ax, 0x1234; inc ax; mov [0x500], ax; jmp $-4
    let rom = firmware(&scratch, &[0xb8, 0x34, 0x12, 0x40, 0xa3, 0x00, 0x05, 0xeb, 0xfa]);
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let mut args = firmware_args(&rom);
    args.extend(["--gdb".into(), format!("127.0.0.1:{port}"), "--timeout".into(), "60".into()]);
    let running = start(&args, "");
    // Real mode: gdb is told linear addresses.
    let script = [
        "set architecture i386:x86-64".into(),
        "set tcp connect-timeout 30".into(),
        format!("target remote 127.0.0.1:{port}"),
        "printf \"at %x\\n\", $rip".into(),
        "stepi".into(),
        "stepi".into(),
        "printf \"ax %x\\n\", $rax & 0xffff".into(),
        "hbreak *0xf0107".into(),
        "continue".into(),
        "continue".into(),
        "printf \"ax then %x\\n\", $rax & 0xffff".into(),
        "x/1xh 0x500".into(),
        "delete".into(),
        "set var $rax = 0x7776".into(),
        "watch *(short *)0x500".into(),
        "continue".into(),
        "x/1xh 0x500".into(),
        "kill".into(),
    ];
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch"]);
    for command in &script {
        gdb.args(["-ex", command]);
    }
    let out = gdb.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    running.signal(Signal::TERM);
    running.wait(PATIENCE).expect(130);
    for expected in ["at fff0", "ax 1234", "ax then 1236", "0x1236", "0x7777"] {
        assert!(
            text.contains(expected),
            "no {expected:?} in:\n{text}\n{}",
            String::from_utf8_lossy(&out.stderr)
        );
    }
}
