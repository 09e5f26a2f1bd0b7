//! Running the `lodge` command as users do. `cargo xtask test` builds it; by hand: `cargo build --release` first.
#![forbid(unsafe_code)]

pub mod bootable;
pub mod namespaces;
pub mod screen;
pub mod world;

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The release build of the command.
pub fn lodge() -> PathBuf {
    if let Some(path) = std::env::var_os("LODGE_BIN") {
        return path.into();
    }
    let path = target().join("release/lodge");
    assert!(path.exists(), "{} is missing: build it with `cargo build --release`", path.display());
    path
}

/// Where cargo builds.
pub fn target() -> PathBuf {
    // …/target/debug/deps/test-hash
    let test = std::env::current_exe().expect("a test has a path");
    test.ancestors().nth(3).expect("a test is in target/PROFILE/deps").into()
}

/// A directory of the test's own, removed at its end.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes it; `name` is the test's.
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("lodge-test-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary directory can be made");
        Self(path)
    }

    /// A file in it.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).expect("a temporary file can be written");
        path
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What stays behind is in the temporary directory.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What a run of the command left.
#[derive(Debug)]
pub struct Done {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Done {
    /// The exit status.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// The output as a terminal's user reads it, without control sequences.
    pub fn text(&self) -> String {
        let mut parts = self.out.split('\x1b');
        let first = parts.next().unwrap_or_default().to_owned();
        parts.fold(first, |text, part| {
            let rest = match part.strip_prefix('[') {
                Some(rest) => rest.trim_start_matches(|c: char| !c.is_ascii_alphabetic()),
                None => part,
            };
            text + rest.get(1..).unwrap_or_default()
        })
    }

    /// Fails unless the status is `code`.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "output:\n{}\nerrors:\n{}", self.out, self.err);
        self
    }
}

/// The command, running.
pub struct Running {
    /// The process.
    pub child: Child,
    reader: std::thread::JoinHandle<String>,
    errors: std::thread::JoinHandle<()>,
    /// What it has written to its standard error.
    err: Arc<Mutex<Vec<u8>>>,
    lines: std::sync::mpsc::Receiver<String>,
    pieces: std::sync::mpsc::Receiver<Vec<u8>>,
}

fn shown(bytes: &Mutex<Vec<u8>>) -> String {
    String::from_utf8_lossy(&bytes.lock().unwrap()).into_owned()
}

/// Starts `lodge` with `args`, and `input` typed into it.
pub fn start<S: AsRef<OsStr>>(args: &[S], input: &str) -> Running {
    start_with(Command::new(lodge()).args(args), input)
}

/// Starts a command, and types `input` into it, which ends there.
pub fn start_with(command: &mut Command, input: &str) -> Running {
    let (running, mut stdin) = start_typing(command);
    // A guest that ends early closes the pipe.
    let _ = stdin.write_all(input.as_bytes());
    running
}

/// Starts a command that is typed into as it goes; its input ends when that is dropped.
pub fn start_typing(command: &mut Command) -> (Running, ChildStdin) {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("lodge starts");
    let stdin = child.stdin.take().expect("piped");
    let mut stdout = child.stdout.take().expect("piped");
    let (sender, lines) = std::sync::mpsc::channel();
    let (piece, pieces) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let (mut all, mut buffer, mut told) = (Vec::new(), [0; 4096], 0);
        while let Ok(n @ 1..) = stdout.read(&mut buffer) {
            all.extend_from_slice(&buffer[..n]);
            // Nobody listens any more when the test only waits for the end.
            let _ = piece.send(buffer[..n].to_vec());
            while let Some(end) = all[told..].iter().position(|&b| b == b'\n') {
                let _ = sender.send(String::from_utf8_lossy(&all[told..told + end]).trim_end().to_string());
                told += end + 1;
            }
            // A root shell's prompt stands for a line: it has no end until something is typed. Busybox asks for the
            // cursor's place behind it.
            let tail = &all[told..];
            if tail.strip_suffix(b"\x1b[6n").unwrap_or(tail).ends_with(b"# ") {
                let _ = sender.send(String::from_utf8_lossy(&all[told..]).into_owned());
                told = all.len();
            }
        }
        String::from_utf8_lossy(&all).replace('\r', "")
    });
    let mut stderr = child.stderr.take().expect("piped");
    let err = Arc::new(Mutex::new(Vec::new()));
    let written = err.clone();
    let errors = std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = stderr.read(&mut buffer) {
            written.lock().unwrap().extend_from_slice(&buffer[..n]);
        }
    });
    (Running { child, reader, errors, err, lines, pieces }, stdin)
}

impl Running {
    /// Waits for a line of output that contains `text`.
    #[track_caller]
    pub fn line(&self, text: &str, patience: Duration) -> String {
        let end = Instant::now() + patience;
        let mut seen = Vec::new();
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => seen.push(line),
                Err(e) => {
                    panic!(
                        "no line with {text:?} ({e}); there was:\n{}\n{}",
                        seen.join("\n"),
                        shown(&self.err)
                    )
                }
            }
        }
    }

    /// Waits for output that contains `text`, in lines or not.
    #[track_caller]
    pub fn sees(&self, text: &str, patience: Duration) {
        let end = Instant::now() + patience;
        let mut seen = Vec::new();
        while !seen.windows(text.len()).any(|part| part == text.as_bytes()) {
            match self.pieces.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(piece) => seen.extend(piece),
                Err(e) => panic!("no {text:?} ({e}); there was:\n{}", String::from_utf8_lossy(&seen)),
            }
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("our own child can be signalled");
    }

    /// Waits for the end, at most so long; then it is killed and the test fails.
    #[track_caller]
    pub fn wait(mut self, patience: Duration) -> Done {
        let end = Instant::now() + patience;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our own child can be waited for") {
                break status;
            }
            if Instant::now() > end {
                self.child.kill().expect("our own child can be killed");
                let _ = self.child.wait();
                panic!(
                    "it did not end in {patience:?}; output so far:\n{}\n{}",
                    self.reader.join().unwrap_or_default(),
                    shown(&self.err)
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let out = self.reader.join().expect("the reader does not panic");
        self.errors.join().expect("the reader does not panic");
        let err = shown(&self.err);
        Done { status, out, err }
    }
}

/// Runs `lodge` with `args` and `input` to its end, within two minutes.
#[track_caller]
pub fn run<S: AsRef<OsStr>>(args: &[S], input: &str) -> Done {
    start(args, input).wait(Duration::from_secs(120))
}

/// The default guest, if it can be had here; says why not otherwise.
pub fn cached_guest() -> Option<images::Guest> {
    default_guest(&images::Options::default())
}

/// A guest of `options`, if it can be had here; says why not otherwise.
pub fn default_guest(options: &images::Options) -> Option<images::Guest> {
    match images::default_guest(options, &mut images::Silent) {
        Ok(guest) => Some(guest),
        Err(e) => {
            println!("skipped: {e}");
            None
        }
    }
}
