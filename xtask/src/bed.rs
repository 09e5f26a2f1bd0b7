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
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use images::cpio::Cpio;
use images::{Options, Silent, Source};

use crate::sh;

/// Modules by name, in the order in which they are loaded.
const MODULES: [&str; 3] = ["irqbypass", "kvm", "kvm-amd"];
/// What begins a line that is for us.
const MARK: &str = "@@nested";
/// EPYC has SVM. Three things QEMU 7.2 does not do for an SVM guest as a processor does: SMAP, SMEP, and to tell KVM of the
/// guest's XSETBV, so that the guest's AVX state would be lost.
///
/// One processor, for QEMU's SVM is not right with two (what `--trace` showed, and QEMU's source):
/// - With a thread for each, a guest's second processor that did nothing but PAUSE took a page fault at the fetch of an
///   instruction that it had just executed, with no event injected and its page tables as before: a triple fault, once in
///   some 2,000 rounds.
/// - With turns on one thread, interrupts arrive twice: VMRUN with an event leaves QEMU's `exception_index` set, and when
///   another thread asks the processor to look around (as each turn does) before the next #VMEXIT, the same interrupt is
///   delivered again, whatever RFLAGS.IF. Guests lose their stacks: a stock kernel panics in its interrupt's entry.
///
/// A lone processor is asked to look around only for interrupts of its own, which end the SVM guest first. Guests with two
/// vCPUs run all the same: the outer kernel has a thread for each.
const QEMU: [&str; 12] = [
    "-machine",
    "q35",
    "-accel",
    "tcg",
    "-cpu",
    "EPYC,-smap,-smep,-xsave",
    "-smp",
    "1",
    "-m",
    "2G",
    "-nodefaults",
    "-no-reboot",
];
/// How long the bed may take to boot, and to end a job whose time is over.
const BOOT: Duration = Duration::from_secs(180);
const GRACE: Duration = Duration::from_secs(60);

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
    /// Files that are its NVMe disks, for reading.
    drives: Vec<PathBuf>,
    trace: bool,
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
            image.file(&format!("modules/{name}.ko"), 0o644, &file.module()?);
        }
        Ok(Self {
            kernel: files[0].stored.clone(),
            image,
            libraries: BTreeSet::new(),
            drives: Vec::new(),
            trace: false,
        })
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

    /// Puts a program's or script's `text` into the bed as `to`.
    pub fn text(&mut self, to: &str, text: &str) -> &mut Self {
        self.image.file(to, 0o755, text.as_bytes());
        self
    }

    /// Lets the bed read the file `from`, of whole sectors, as its next disk: /dev/nvme0n1 is the first.
    pub fn drive(&mut self, from: &Path) -> &mut Self {
        self.drives.push(from.to_owned());
        self
    }

    /// Has the outer kernel trace its KVM, and a job that ends with the wrong status show the end of that.
    pub fn trace(&mut self) {
        self.trace = true;
    }

    /// Boots the bed and runs `jobs`. What it says is copied to our standard output when `verbose`.
    ///
    /// The outer kernel ends a job whose time is over. If it does not, it is not Lodge that hangs but that kernel or QEMU
    /// (no process of a user can stop a kernel): then the bed says so, and is booted once more for the jobs that are left.
    pub fn run(&self, jobs: &[Job], verbose: bool) -> Result<Vec<Outcome>> {
        let mut done = Vec::new();
        let mut again = true;
        loop {
            let left = &jobs[done.len()..];
            let (console, hung) = self.boot(left, verbose)?;
            let outcomes = outcomes(&console, left.len());
            if !hung {
                done.extend(outcomes);
                return Ok(done);
            }
            done.extend(outcomes.into_iter().take_while(|outcome| outcome.status.is_some()));
            let job = jobs.get(done.len()).map_or("power-off", |job| &job.name);
            let (at, lines) = (console.len().saturating_sub(2000), console.lines().count());
            let end = &console[console.ceil_char_boundary(at)..];
            println!(
                "the outer machine of the nested bed hung in {job:?}, after {lines} lines, the last of them:\n{end}"
            );
            if done.len() == jobs.len() {
                return Ok(done);
            }
            if !again {
                bail!("the outer machine of the nested bed hung twice");
            }
            println!("booting it again, once, for {} jobs that are left", jobs.len() - done.len());
            again = false;
        }
    }

    /// One boot: what the console said, and whether it had to be ended.
    fn boot(&self, jobs: &[Job], verbose: bool) -> Result<(String, bool)> {
        let mut image = self.image.clone();
        image.file("init", 0o755, init(jobs, self.trace).as_bytes());
        let dir = sh::target_dir();
        fs::create_dir_all(&dir)?;
        let initrd = dir.join(format!("bed-{}.cpio", std::process::id()));
        fs::write(&initrd, image.finish()).with_context(|| format!("cannot write {}", initrd.display()))?;
        let result = console(self, &initrd, jobs, verbose);
        let _ = fs::remove_file(&initrd);
        result
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Process 1 of the bed.
fn init(jobs: &[Job], trace: bool) -> String {
    let mut script = String::from(
        "#!/bin/busybox sh\nexport PATH=/bin:/usr/bin HOME=/root\nbusybox mount -t proc proc /proc\n\
         busybox mount -t sysfs sys /sys\nbusybox mount -t devtmpfs dev /dev\nbusybox --install -s /bin\n\
         mount -t tmpfs tmp /tmp\n",
    );
    for name in MODULES {
        script += &format!("insmod /modules/{name}.ko\n");
    }
    if trace {
        script += "mount -t tracefs trace /sys/kernel/tracing; cd /sys/kernel/tracing\n\
                   echo 4096 >buffer_size_kb; echo 1 >events/kvm/enable; cd /\n";
    }
    for (n, job) in jobs.iter().enumerate() {
        let command = job.command.replace('\'', r"'\''");
        script += &format!("echo '{MARK} begin {n}'\n");
        script += &format!("timeout {} sh -c '{command}' </dev/null 2>&1\n", job.limit);
        script += "s=$?\n";
        if trace {
            let trace = "/sys/kernel/tracing/trace";
            script += &format!("[ $s = {} ] || tail -n 2000 {trace}; echo >{trace}\n", job.status);
        }
        script += &format!("echo; echo \"{MARK} end {n} $s\"\n");
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

/// Boots, and gives back what the serial console said until QEMU ended, or had to be ended since it stood still.
fn console(bed: &Bed, initrd: &Path, jobs: &[Job], verbose: bool) -> Result<(String, bool)> {
    let mut command = Command::new("qemu-system-x86_64");
    for (n, path) in bed.drives.iter().enumerate() {
        let path = path.display().to_string().replace(',', ",,");
        let drive = format!("file={path},if=none,id=drive{n},format=raw,readonly=on,file.locking=off");
        command.args(["-drive", &drive, "-device", &format!("nvme,serial={n},drive=drive{n}")]);
    }
    let child = command
        .args(QEMU)
        .args(["-display", "none", "-serial", "stdio"])
        // Files of a ramfs count as files when memory is measured, those of a tmpfs as shared memory.
        .args(["-append", "console=ttyS0 quiet panic=-1 rootfstype=ramfs", "-kernel"])
        .arg(&bed.kernel)
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
    let mut text = String::new();
    loop {
        match receive.recv_timeout(patience(&text, jobs)) {
            Ok(bytes) => {
                if verbose {
                    let _ = std::io::stdout().write_all(&bytes);
                    let _ = std::io::stdout().flush();
                }
                text.push_str(&String::from_utf8_lossy(&bytes).replace('\r', ""));
            }
            Err(RecvTimeoutError::Disconnected) => return Ok((text, false)),
            Err(RecvTimeoutError::Timeout) => return Ok((text, true)),
        }
    }
}

/// How long a bed that has said this may be silent.
fn patience(console: &str, jobs: &[Job]) -> Duration {
    let begun = console.rsplit(MARK).find_map(|text| text.strip_prefix(" begin ")?.split_whitespace().next());
    let job = begun.and_then(|n| jobs.get(n.parse::<usize>().ok()?));
    job.map_or(BOOT, |job| Duration::from_secs(job.limit.into()) + GRACE)
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

/// The shared libraries that a program of this host needs, the loader among them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    // What ldd does: the loader lists what it would load.
    let output = Command::new(program).env("LD_TRACE_LOADED_OBJECTS", "1").output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
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
    fn silence_is_measured_by_the_job_that_runs() {
        let jobs = [Job::new("", "", 5), Job::new("", "", 7)];
        let seconds = |console| patience(console, &jobs).as_secs();
        assert_eq!(seconds("[0.5] a kernel"), BOOT.as_secs());
        assert_eq!(seconds("@@nested begin 0\nhello"), 5 + GRACE.as_secs());
        assert_eq!(seconds("@@nested begin 0\n@@nested end 0 1\n@@nested begin 1\n"), 7 + GRACE.as_secs());
        assert_eq!(seconds("@@nested begin 1\n@@nested end 1 0\n"), 7 + GRACE.as_secs());
    }

    #[test]
    fn commands_are_quoted() {
        assert!(init(&[Job::new("", "echo 'a b'", 1)], false).contains(r"sh -c 'echo '\''a b'\'''"));
    }
}
