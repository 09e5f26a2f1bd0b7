//! The nested bed: a whole PC with SVM, emulated by QEMU, whose Linux has a KVM that works, whatever the host has.
//!
//! The outer guest is Debian's cloud kernel with the KVM modules from its own package and a busybox, in an initial RAM
//! disk that also holds the programs to be tried, with the libraries that they need. Process 1 runs the jobs one after
//! the other, marks where each begins and ends on the serial console, and powers off: one boot, of some 10 seconds, serves
//! many jobs.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use images::cpio::Cpio;
use images::{Options, Silent, Source};

use crate::{guests, sh};

/// Modules by name, in the order in which they are loaded.
const MODULES: [&str; 3] = ["irqbypass", "kvm", "kvm-amd"];
/// What begins a line that is for us.
const MARK: &str = "@@nested";
/// EPYC has SVM. Three things QEMU 7.2 does not do for an SVM guest as a processor does: SMAP, SMEP, and to tell KVM of the
/// guest's XSETBV, so that the guest's AVX state would be lost.
const QEMU: [&str; 13] = [
    "-machine",
    "q35,accel=tcg",
    "-cpu",
    "EPYC,-smap,-smep,-xsave",
    "-smp",
    "2",
    "-m",
    "2G",
    "-nodefaults",
    "-no-reboot",
    "-display",
    "none",
    "-serial",
];

/// One command to be run in the bed.
#[derive(Debug, Clone)]
pub struct Job {
    /// What it is, in reports.
    pub name: String,
    /// For busybox's shell; the bed's files are in `/`.
    pub command: String,
    /// Seconds that it may take.
    pub limit: u32,
    /// The exit status that it has to end with.
    pub status: i32,
    /// What it has to write.
    pub expect: Vec<String>,
    /// Checks by name that may fail, in a job that writes `FAIL NAME: …` for each that does; if no other does, it has
    /// passed, whatever its status.
    pub known: &'static [&'static str],
}

impl Job {
    /// A job.
    pub fn new(name: &str, command: impl Into<String>, limit: u32) -> Self {
        Self { name: name.into(), command: command.into(), limit, status: 0, expect: Vec::new(), known: &[] }
    }

    /// The same, which also has to write `text`.
    pub fn expecting(mut self, text: &str) -> Self {
        self.expect.push(text.into());
        self
    }
}

/// What became of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Its exit status; `None` if the bed ended before it did. A job that took too long has 143.
    pub status: Option<i32>,
    /// What it wrote, standard output and error together.
    pub output: String,
}

/// The bed before it boots.
pub struct Bed {
    kernel: PathBuf,
    image: Cpio,
    /// Those of this host that are in it.
    libraries: BTreeSet<String>,
}

impl Bed {
    /// Gets kernel, modules and busybox from the distribution's archive, or the cache.
    pub fn new() -> Result<Self> {
        let options = Options::default();
        let mut source = Source::new(&options)?;
        let mut patterns = vec!["boot/vmlinuz-*".to_owned()];
        patterns.extend(MODULES.map(|name| format!("*/{name}.ko*")));
        let patterns: Vec<_> = patterns.iter().map(String::as_str).collect();
        let files =
            source.files(&["linux-image-cloud-amd64", "linux-image-amd64"], &patterns, &mut Silent)?.files;
        let busybox = source.files(&["busybox-static"], &["*bin/busybox"], &mut Silent)?.files;
        let mut image = Cpio::new();
        for dir in ["bin", "dev", "proc", "sys", "tmp", "root"] {
            image.dir(dir, 0o755);
        }
        image.device("dev/console", 0o600, 5, 1);
        image.file("bin/busybox", 0o755, &read(&busybox[0].stored)?);
        for (name, file) in MODULES.iter().zip(&files[1..]) {
            let packed = read(&file.stored)?;
            let mut module = Vec::new();
            images::deb::decompress(&file.path, packed.as_slice(), 64 << 20)?.read_to_end(&mut module)?;
            image.file(&format!("modules/{name}.ko"), 0o644, &module);
        }
        Ok(Self { kernel: files[0].stored.clone(), image, libraries: BTreeSet::new() })
    }

    /// Puts the program `from` into the bed as `to`, with the libraries that it needs.
    pub fn program(&mut self, to: &str, from: &Path) -> Result<&mut Self> {
        for library in libraries(from)? {
            let path = library.to_string_lossy().into_owned();
            if self.libraries.insert(path.clone()) {
                self.file(&path, &library)?;
            }
        }
        self.file(to, from)
    }

    /// Puts the file `from` into the bed as `to`, executable.
    pub fn file(&mut self, to: &str, from: &Path) -> Result<&mut Self> {
        self.image.file(to, 0o755, &read(from)?);
        Ok(self)
    }

    /// Boots the bed and runs `jobs`, at most for `limit`. What it says is copied to our standard output when `verbose`.
    pub fn run(mut self, jobs: &[Job], limit: Duration, verbose: bool) -> Result<Vec<Outcome>> {
        self.image.file("init", 0o755, init(jobs).as_bytes());
        let dir = target_dir();
        fs::create_dir_all(&dir)?;
        let initrd = dir.join(format!("bed-{}.cpio", std::process::id()));
        fs::write(&initrd, self.image.finish())
            .with_context(|| format!("cannot write {}", initrd.display()))?;
        let text = boot(&self.kernel, &initrd, limit, verbose);
        let _ = fs::remove_file(&initrd);
        Ok(outcomes(&text?, jobs.len()))
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Process 1 of the bed.
fn init(jobs: &[Job]) -> String {
    let mut script = String::from(
        "#!/bin/busybox sh\nexport PATH=/bin HOME=/root\nbusybox mount -t proc proc /proc\n\
         busybox mount -t sysfs sys /sys\nbusybox mount -t devtmpfs dev /dev\nbusybox --install -s /bin\n\
         mount -t tmpfs tmp /tmp\n",
    );
    for name in MODULES {
        script += &format!("insmod /modules/{name}.ko\n");
    }
    for (n, job) in jobs.iter().enumerate() {
        let command = job.command.replace('\'', r"'\''");
        script += &format!("echo '{MARK} begin {n}'\n");
        script += &format!("timeout {} sh -c '{command}' </dev/null 2>&1\n", job.limit);
        script += &format!("s=$?; echo; echo \"{MARK} end {n} $s\"\n");
    }
    script + "poweroff -f\n"
}

/// Ends QEMU whatever happens.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots, and gives back what the serial console said.
fn boot(kernel: &Path, initrd: &Path, limit: Duration, verbose: bool) -> Result<String> {
    let child = Command::new("qemu-system-x86_64")
        .args(QEMU)
        .args(["stdio", "-append", "console=ttyS0 quiet panic=-1", "-kernel"])
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start qemu-system-x86_64; install the package qemu-system-x86")?;
    let mut machine = Machine(child);
    let mut console = machine.0.stdout.take().context("no console")?;
    let (send, receive) = mpsc::channel::<Vec<u8>>();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = console.read(&mut buffer) {
            if send.send(buffer[..n].to_vec()).is_err() {
                return;
            }
        }
    });
    let end = Instant::now() + limit;
    let mut text = Vec::new();
    // Until QEMU has ended, or the time has.
    while let Ok(bytes) = receive.recv_timeout(end.saturating_duration_since(Instant::now())) {
        if verbose {
            let _ = std::io::stdout().write_all(&bytes);
            let _ = std::io::stdout().flush();
        }
        text.extend(bytes);
    }
    Ok(String::from_utf8_lossy(&text).replace('\r', ""))
}

/// Reads the marks out of what the console said.
fn outcomes(console: &str, jobs: usize) -> Vec<Outcome> {
    let mut found: HashMap<usize, Outcome> = HashMap::new();
    let mut current = None;
    for line in console.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        match words.as_slice() {
            [mark, "begin", n] if *mark == MARK => {
                current = n.parse().ok();
                if let Some(n) = current {
                    found.insert(n, Outcome { status: None, output: String::new() });
                }
            }
            [mark, "end", n, status] if *mark == MARK => {
                if let Some(outcome) = n.parse().ok().and_then(|n: usize| found.get_mut(&n)) {
                    outcome.status = status.parse().ok();
                }
                current = None;
            }
            _ => {
                if let Some(outcome) = current.and_then(|n: usize| found.get_mut(&n)) {
                    outcome.output.push_str(line);
                    outcome.output.push('\n');
                }
            }
        }
    }
    (0..jobs).map(|n| found.remove(&n).unwrap_or(Outcome { status: None, output: String::new() })).collect()
}

/// Where the bed's image lies while it runs.
fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| sh::root().join("target"), PathBuf::from)
}

/// Builds with cargo what `args` say; the executables' paths.
pub fn build(args: &[&str]) -> Result<Vec<PathBuf>> {
    let output = sh::cargo(args)
        .args(["--quiet", "--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    ensure!(output.status.success(), "cargo {} failed: {}", args.join(" "), output.status);
    let found: Vec<_> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| Some(PathBuf::from(message.get("executable")?.as_str()?)))
        .collect();
    ensure!(!found.is_empty(), "cargo {} built no program", args.join(" "));
    Ok(found)
}

/// The shared libraries that a program of this host needs, the loader among them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    // What ldd does: the loader lists what it would load.
    let output = Command::new(program).env("LD_TRACE_LOADED_OBJECTS", "1").output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

/// `cargo xtask nested`: what the KVM engine must be able to do, on a KVM that works.
pub fn run(verbose: bool, boots: u32) -> Result<()> {
    let mut bed = Bed::new()?;
    let guest = images::default_guest(&Options::default(), &mut Silent)?;
    let lodge = build(&["build", "--release", "-p", "lodge"])?;
    let tiny = build(&["test", "--no-run", "-p", "lodge-kvm", "--test", "guests"])?;
    bed.program("lodge", &lodge[0])?.program("tiny", &tiny[0])?;
    bed.file("vmlinuz", &guest.kernel)?.file("initrd", &guest.initrd)?;
    let mut jobs = vec![
        Job::new("lodge host finds KVM usable", "/lodge host --json", 20).expecting("ran a trial guest"),
        Job::new("tiny guests", "/tiny --test-threads 1", 60),
    ];
    let bare = guests::build()?;
    // How a kernel is loaded is the same on every engine, and tested where it is faster.
    for name in guests::SUITES.iter().filter(|name| !name.starts_with("multiboot")) {
        bed.file(&format!("bare/{name}"), &bare.join(name))?;
        jobs.push(suite(name));
    }
    for _ in 0..boots {
        jobs.extend([1, 2].map(linux));
    }
    let limit = Duration::from_secs(60 + jobs.iter().map(|job| u64::from(job.limit)).sum::<u64>());
    report(&jobs, &bed.run(&jobs, limit, verbose)?)
}

/// Runs one of the bare-metal guests, which tells by its exit status whether it passed. It knows what QEMU's translator
/// gets wrong, but has to be told that it runs on it.
fn suite(name: &str) -> Job {
    let command = format!(
        "/lodge run --engine kvm --cpus 2 --memory 128M --debug-exit --no-reboot --timeout 50 --cmdline on-tcg \
         --kernel /bare/{name}"
    );
    // KVM serves port accesses without a look at the guest's I/O breakpoints.
    let known: &[&str] = if name == "debug" { &["OUT", "IN from the second of two ports"] } else { &[] };
    Job { status: guests::PASSED, known, ..Job::new(&format!("bare-metal guest {name}"), command, 60) }
}

/// Boots the default guest's stock kernel to userspace, looks around there, and powers off.
fn linux(cpus: u32) -> Job {
    // The brackets keep the command line, which is in the log, from matching.
    let look = "cat /proc/interrupts; ! dmesg | grep -e WARNIN[G]: -e BU[G]: -e Oop[s]";
    let cmdline = format!("console=ttyS0 quiet lodge.exec=\"{look}\"");
    Job::new(
        &format!("a stock kernel, {cpus} vCPUs, to userspace and power-off"),
        format!(
            "/lodge run --engine kvm --cpus {cpus} --memory 256M --kernel /vmlinuz --initrd /initrd --stats \
             --timeout 80 --cmdline '{cmdline}'"
        ),
        90,
    )
    .expecting(&format!(", {cpus} CPUs, "))
    .expecting("the command ended with status 0")
}

/// Prints a line per job, and what those that failed wrote.
fn report(jobs: &[Job], outcomes: &[Outcome]) -> Result<()> {
    let mut failed = 0;
    for (job, outcome) in jobs.iter().zip(outcomes) {
        match why_failed(job, outcome) {
            None => println!("ok      {}", job.name),
            Some(why) => {
                failed += 1;
                println!("FAILED  {}: {why}: {}\n{}", job.name, job.command, outcome.output);
            }
        }
    }
    if failed > 0 {
        bail!("{failed} of {} jobs failed in the nested bed", jobs.len());
    }
    Ok(())
}

fn why_failed(job: &Job, outcome: &Outcome) -> Option<String> {
    let failed = |line: &str| Some(line.strip_prefix("FAIL ")?.split(':').next()?.to_owned());
    let mut failures = outcome.output.lines().filter_map(failed).peekable();
    let only_known = failures.peek().is_some() && failures.all(|name| job.known.contains(&name.as_str()));
    match outcome.status {
        Some(status) if status == job.status || only_known => {}
        Some(143) => return Some(format!("it took more than {} s", job.limit)),
        Some(status) => return Some(format!("status {status}")),
        None => return Some("it did not end".into()),
    }
    let missing = job.expect.iter().find(|text| !outcome.output.contains(*text))?;
    Some(format!("it did not write {missing:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_read_and_guests_noise_is_kept_apart() {
        let console =
            "noise\n@@nested begin 0\nhello\n@@nested end x\n\n@@nested end 0 3\nmore\n@@nested begin 1\nhal";
        let got = outcomes(console, 3);
        assert_eq!(got[0], Outcome { status: Some(3), output: "hello\n@@nested end x\n\n".into() });
        assert_eq!(got[1], Outcome { status: None, output: "hal\n".into() });
        assert_eq!(got[2], Outcome { status: None, output: String::new() });
    }

    #[test]
    fn jobs_fail_by_status_and_by_what_they_write() {
        let job = Job::new("", "", 1).expecting("hello");
        let outcome = |status, output: &str| Outcome { status, output: output.into() };
        assert_eq!(why_failed(&job, &outcome(Some(0), "say hello\n")), None);
        assert!(why_failed(&job, &outcome(Some(0), "bye")).is_some());
        assert!(why_failed(&job, &outcome(Some(1), "hello")).is_some());
        assert!(why_failed(&job, &outcome(None, "hello")).is_some());
        let job = Job { known: &["OUT"], ..Job::new("", "", 1) };
        assert_eq!(why_failed(&job, &outcome(Some(3), "ok IN\nFAIL OUT: expected 1 got 2\n")), None);
        assert!(why_failed(&job, &outcome(Some(3), "FAIL OUT: x\nFAIL IN: y\n")).is_some());
        assert!(why_failed(&job, &outcome(Some(3), "ok OUT\n")).is_some());
    }

    #[test]
    fn commands_are_quoted() {
        assert!(init(&[Job::new("", "echo 'a b'", 1)]).contains(r"sh -c 'echo '\''a b'\'''"));
    }
}
