//! Commands in a guest that runs, without a network.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use images::Options;
use lodge_tests::{Done, Scratch, default_guest, lodge, start_typing, start_with};

const PATIENCE: Duration = Duration::from_secs(120);

/// A guest that runs, called `one`, until it is dropped.
struct Guest {
    scratch: Scratch,
    vm: Option<lodge_tests::Running>,
    _keyboard: std::process::ChildStdin,
}

impl Guest {
    fn start(image: &str, suite: Option<&str>) -> Option<Self> {
        default_guest(&Options { suite: suite.map(Into::into), ..Options::default() })?;
        let scratch = Scratch::new(&format!("exec-{}", image.replace(':', "-")));
        let mut command = Command::new(lodge());
        command.args(["run", image, "--engine", "translate", "--name", "one"]);
        let (vm, keyboard) = start_typing(command.env("LODGE_RUNTIME_DIR", scratch.path()));
        let this = Self { scratch, vm: Some(vm), _keyboard: keyboard };
        // It has its name before the guest starts.
        let end = Instant::now() + PATIENCE;
        while !this.scratch.path().join("one.sock").exists() {
            assert!(Instant::now() < end, "the machine does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(this)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(lodge());
        command.args(args).env("LODGE_RUNTIME_DIR", self.scratch.path());
        command
    }

    #[track_caller]
    fn exec(&self, args: &[&str], input: &str) -> Done {
        start_with(&mut self.command(&[&["exec", "one"], args].concat()), input).wait(PATIENCE)
    }

    fn end(mut self) {
        start_with(&mut self.command(&["stop", "one", "--force"]), "").wait(PATIENCE).expect(0);
        self.vm.take().unwrap().wait(PATIENCE).expect(130);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(vm) = &mut self.vm {
            // Where the test failed.
            let _ = vm.child.kill();
        }
    }
}

#[test]
fn commands_run_as_if_they_were_here() {
    let Some(guest) = Guest::start("tiny", None) else { return };
    // At once: it waits for the guest to be up.
    let done = guest.exec(&["--", "sh", "-c", "echo out; echo err >&2; exit 7"], "").expect(7);
    assert_eq!((&done.out[..], done.err.trim()), ("out\n", "err"));
    let words =
        ["-e", "A=b c", "-w", "/tmp", "--", "sh", "-c", "echo \"$A|$1|$PWD|$USER|$HOME\"", "sh", "x  y"];
    assert_eq!(guest.exec(&words, "").expect(0).out, "b c|x  y|/tmp|root|/root\n");
    assert!(guest.exec(&["--", "no-such-command"], "").expect(127).err.contains("no-such-command"));
    assert!(guest.exec(&["-u", "nobody-here", "--", "id"], "").expect(1).err.contains("no user nobody-here"));
    guest.exec(&["--", "sh", "-c", "kill -9 $$"], "").expect(128 + 9);
    // Whoever the command has started may live on.
    let done = guest.exec(&["--", "sh", "-c", "sleep 1000 & echo started"], "").expect(0);
    assert_eq!(done.out, "started\n");
    // A terminal has a size, and echoes.
    let done = guest
        .exec(&["-t", "--", "sh", "-c", "tty; stty size; read line; echo got $line"], "typed\n")
        .expect(0);
    assert!(done.out.contains("/dev/pts/") && done.out.contains("24 80"), "{}", done.out);
    assert!(done.out.contains("typed\n") && done.out.contains("got typed"), "{}", done.out);
    // A signal to us is one to the command.
    let mut command = guest.command(&[
        "exec",
        "one",
        "--",
        "sh",
        "-c",
        "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.1; done",
    ]);
    let (running, _keyboard) = start_typing(&mut command);
    running.line("ready", PATIENCE);
    running.signal(rustix::process::Signal::INT);
    assert!(running.wait(PATIENCE).expect(3).out.contains("caught"));
    // Nobody listens at a port.
    let done = start_with(&mut guest.command(&["forward", "one", "80"]), "").wait(PATIENCE);
    assert!(done.code() != 0 && done.err.contains("port 80"), "{}", done.err);
    guest.end();
}

#[test]
fn much_goes_both_ways_by_many_at_once() {
    let Some(guest) = Guest::start("tiny:trixie", Some("trixie")) else { return };
    guest.exec(&["--", "true"], "").expect(0);
    let mut state = std::process::id() | 1;
    println!("seed {state}");
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    })
    .take(4 << 20)
    .collect();
    // What comes back is what was sent, though it is read late.
    let mut child = guest
        .command(&["exec", "one", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let sent = bytes.clone();
    let writer = std::thread::spawn(move || input.write_all(&sent).unwrap());
    let mut received = Vec::new();
    output.read_to_end(&mut received).unwrap();
    writer.join().unwrap();
    assert!(child.wait().unwrap().success());
    assert!(received == bytes, "{} bytes of {}", received.len(), bytes.len());
    // Input that nobody reads.
    let text = "x".repeat(1 << 20);
    guest.exec(&["--", "true"], &text).expect(0);
    // Twenty at a time.
    let script = "head -c 100000 /dev/zero | tr '\\0' $0; exit $1";
    let all: Vec<_> = (0..20)
        .map(|n| {
            let args =
                ["exec", "one", "--", "sh", "-c", script, &char::from(b'a' + n).to_string(), &n.to_string()];
            (n, start_with(&mut guest.command(&args), ""))
        })
        .collect();
    for (n, running) in all {
        let done = running.wait(PATIENCE).expect(n.into());
        assert_eq!(done.out, char::from(b'a' + n).to_string().repeat(100_000));
    }
    // A reset ends what runs, and the next one has an agent, too.
    let (running, _keyboard) =
        start_typing(&mut guest.command(&["exec", "one", "--", "sh", "-c", "reboot -f; sleep 1000"]));
    let done = running.wait(PATIENCE);
    assert!(done.code() != 0 && done.err.contains("the guest ended"), "{}", done.err);
    guest.exec(&["--", "true"], "").expect(0);
    guest.end();
}
