//! virtio devices as stock kernels use them.

use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use images::Options;
use lodge_tests::{Scratch, default_guest, lodge, start_typing, start_with};

const PATIENCE: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

fn available(suite: Option<&str>) -> bool {
    let options = Options { suite: suite.map(Into::into), ..Options::default() };
    default_guest(&options).is_some()
}

#[test]
fn the_terminal_can_be_a_virtio_console() {
    for (image, suite) in [("tiny", None), ("tiny:trixie", Some("trixie"))] {
        if !available(suite) {
            continue;
        }
        let mut command = Command::new(lodge());
        command.args(["run", image, "--console", "virtio", "--no-reboot"]);
        let input = "tty; echo to the other >/dev/ttyS0; seq 1 20000 | md5sum; seq 1 20000\n";
        let done = start_with(&mut command, input).wait(PATIENCE).expect(0);
        let lines: Vec<_> = done.out.lines().collect();
        assert!(lines.contains(&"/dev/hvc0") && !lines.contains(&"to the other"), "{}", done.out);
        let first = lines.iter().position(|line| *line == "1").expect("numbers");
        let numbers = (1..=20000).map(|n: u32| n.to_string());
        assert!(lines[first..].iter().zip(numbers).all(|(line, n)| *line == n), "{}", done.out);
    }
}

/// The command, with VMs of the test's own.
fn command(scratch: &Scratch, args: &[&str]) -> Command {
    let mut command = Command::new(lodge());
    command.args(args).env("LODGE_RUNTIME_DIR", scratch.path());
    command
}

/// What `lodge memory one` says, with these arguments: bytes by name.
fn memory(scratch: &Scratch, more: &[&str]) -> impl Fn(&str) -> u64 + use<> {
    let args = [&["memory", "one", "--json"], more].concat();
    let told = start_with(&mut command(scratch, &args), "").wait(PATIENCE).expect(0).out;
    let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
    move |what| told[what].as_u64().unwrap_or_else(|| panic!("{what}: {told}"))
}

/// Asks until it is so.
#[track_caller]
fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !reached() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(300));
    }
}

#[test]
fn memory_that_a_guest_frees_is_the_hosts_again() {
    if !available(None) {
        return;
    }
    let scratch = Scratch::new("balloon");
    let command = |args: &[&str]| command(&scratch, args);
    let memory = |more: &[&str]| memory(&scratch, more);
    let run = ["run", "--engine", "translate", "--name", "one", "--memory", "512M", "--stats"];
    let (vm, mut keyboard) = start_typing(&mut command(&run));
    vm.line("built-in commands", PATIENCE);
    until("the guest has its driver", || {
        start_with(&mut command(&["memory", "one", "512M"]), "").wait(PATIENCE).code() == 0
    });
    // Pages that the guest frees are reported.
    keyboard
        .write_all(
            b"mount -o remount,size=90% /tmp; dd if=/dev/zero of=/tmp/file bs=1M count=250; echo fi''lled\n",
        )
        .unwrap();
    vm.line("filled", PATIENCE);
    let full = memory(&[]);
    assert!(full("held") > 300 * MIB && full("free") < 200 * MIB, "{} {}", full("held"), full("free"));
    keyboard.write_all(b"rm /tmp/file\n").unwrap();
    until("most of it is the host's", || memory(&[])("held") < full("held") - 220 * MIB);
    // The balloon takes what the guest does not need, and gives it back.
    assert_eq!(memory(&["256M"])("target"), 256 * MIB);
    until("the guest has less", || memory(&[])("has") == 256 * MIB);
    assert_eq!(memory(&["512M"])("target"), 512 * MIB);
    until("the guest has all", || memory(&[])("has") == 512 * MIB);
    let more = start_with(&mut command(&["memory", "one", "1G"]), "").wait(PATIENCE).expect(2).err;
    assert!(more.contains("was started for"), "{more}");
    keyboard.write_all(b"poweroff -f\n").unwrap();
    let stats = vm.wait(PATIENCE).expect(0).err;
    assert!(stats.contains("host memory held"), "{stats}");
}

/// virtio-mem: above what it started with the guest plugs memory, and gives it back.
#[test]
fn a_guest_grows_and_shrinks() {
    if !available(None) {
        return;
    }
    let scratch = Scratch::new("mem");
    let command = |args: &[&str]| command(&scratch, args);
    let memory = |more: &[&str]| memory(&scratch, more);
    let run = ["run", "--engine", "translate", "--name", "one", "--memory", "512M,max=1536M"];
    let (vm, mut keyboard) = start_typing(&mut command(&run));
    vm.line("built-in commands", PATIENCE);
    let mut ask = |text: &str, answer: &str| {
        keyboard.write_all(text.as_bytes()).unwrap();
        vm.line(answer, PATIENCE)
    };
    // MiB in all, as the guest says.
    let mut total = || {
        let command = "echo $(awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo) M''iB\n";
        let line = ask(command, " MiB");
        line.split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or_else(|| panic!("{line}"))
    };
    let begun = total();
    assert!((400..512).contains(&begun), "{begun} MiB");
    until("the guest has its driver", || {
        start_with(&mut command(&["memory", "one", "1G"]), "").wait(PATIENCE).code() == 0
    });
    until("the guest has more", || memory(&[])("has") == 1024 * MIB);
    until("the guest knows it", || total() == begun + 512);
    // What was plugged can be used: more than it began with.
    ask(
        "mount -o remount,size=90% /tmp; dd if=/dev/zero of=/tmp/file bs=1M count=600; echo fi''lled\n",
        "filled",
    );
    let full = memory(&[]);
    assert!(full("held") > 600 * MIB && full("max") == 1536 * MIB, "{} {}", full("held"), full("max"));
    ask("rm /tmp/file; echo rem''oved\n", "removed");
    assert_eq!(memory(&["512M"])("target"), 512 * MIB);
    until("the guest has given it back", || memory(&[])("has") == 512 * MIB);
    assert!(memory(&[])("held") < 560 * MIB, "the host has it");
    let more = start_with(&mut command(&["memory", "one", "2G"]), "").wait(PATIENCE).expect(2).err;
    assert!(more.contains("was started for"), "{more}");
    keyboard.write_all(b"poweroff -f\n").unwrap();
    vm.wait(PATIENCE).expect(0);
}
