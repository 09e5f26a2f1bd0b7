//! Processes that are measured: a monitor (QEMU or Lodge) with a guest in it, or a program on the host. All of them talk
//! by lines on their standard input and output, which for a guest is its console.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;

/// How long a guest may take to start.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// What the default guest prints when its userspace has started.
pub const READY: &str = "Lodge: Linux";

/// What QEMU is called here, and which accelerator it then uses.
pub const QEMU: [(&str, &str); 2] = [("tcg", "tcg"), ("qemu-kvm", "kvm")];
/// Whether that is an engine of QEMU's.
pub fn is_qemu(engine: &str) -> bool {
    QEMU.iter().any(|(name, _)| *name == engine)
}

/// What guest RAM is called among a process's mappings: Lodge's and QEMU's.
const GUEST_RAM: [&str; 2] = ["memfd:lodge-guest", "memfd:memory-backend-memfd"];

/// Which programs are compared.
#[derive(Debug, Clone, clap::Args)]
pub struct Programs {
    /// The `lodge` to measure, if not the one beside this program
    #[arg(long)]
    lodge: Option<PathBuf>,
    /// The QEMU to compare with
    #[arg(long, default_value = "qemu-system-x86_64")]
    pub qemu: PathBuf,
    /// Virtual processors
    #[arg(long, default_value_t = 1)]
    pub cpus: u32,
    /// The suite that the guest's kernel is from, such as trixie, if not the host's own
    #[arg(long)]
    suite: Option<String>,
}

/// A guest of the user's own.
#[derive(Debug, Clone, clap::Args)]
pub struct Own {
    /// The kernel to boot, instead of the default guest's
    #[arg(long, requires = "initrd", value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Its initial RAM disk
    #[arg(long, requires = "kernel", value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Its command line
    #[arg(long, default_value = "console=ttyS0")]
    cmdline: String,
}

impl Own {
    /// It, or the guest that `lodge run` starts, of an architecture by Debian's name.
    ///
    /// # Errors
    /// That cannot be fetched.
    pub fn guest(&self, programs: &Programs, arch: &str) -> Result<images::Guest> {
        let (Some(kernel), Some(initrd)) = (self.kernel.clone(), self.initrd.clone()) else {
            return programs.guest(arch);
        };
        let (cmdline, description) = (self.cmdline.clone(), kernel.display().to_string());
        Ok(images::Guest { kernel, initrd, cmdline, release: String::new(), description, cached: true })
    }
}

impl Programs {
    /// The `lodge` to measure.
    ///
    /// # Errors
    /// This program does not know where it is.
    pub fn lodge(&self) -> Result<PathBuf> {
        match &self.lodge {
            Some(path) => Ok(path.clone()),
            None => sibling("lodge"),
        }
    }

    /// Prints what is compared, and how busy the host is with other things, which figures suffer from.
    pub fn introduce(&self, guest: &str, mib: u32) {
        let output = Command::new(&self.qemu).arg("--version").output();
        let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
        println!("guest: {guest}; {} CPUs, {mib} MiB", self.cpus);
        println!("against: {}", text.lines().next().unwrap_or("no QEMU"));
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let cores = thread::available_parallelism().map_or(1, usize::from);
        println!("host: {cores} CPUs, load before {}", load.split(' ').next().unwrap_or("unknown"));
    }

    /// The guest: the one that `lodge run` starts, of an architecture by Debian's name.
    ///
    /// # Errors
    /// It cannot be fetched.
    pub fn guest(&self, arch: &str) -> Result<images::Guest> {
        let options =
            images::Options { arch: arch.into(), suite: self.suite.clone(), ..images::Options::default() };
        Ok(images::default_guest(&options, &mut images::Silent)?)
    }
}

/// The machine that all monitors run: the same kernel, RAM disk, memory and processors.
#[derive(Debug, Clone)]
pub struct Setup {
    /// What runs it.
    pub programs: Programs,
    /// A bzImage.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
    /// The kernel's command line.
    pub cmdline: String,
    /// What Lodge's network card is connected to. QEMU has none unless one is added.
    pub network: &'static str,
}

impl Setup {
    /// The command that runs the machine: with QEMU's translator for `tcg`, QEMU's KVM for `qemu-kvm`, else with that engine
    /// of Lodge's.
    ///
    /// # Errors
    /// This program does not know where it is.
    pub fn command(&self, engine: &str) -> Result<Command> {
        let cpus = self.programs.cpus.to_string();
        let mut command;
        let qemu = QEMU.iter().find(|(name, _)| *name == engine);
        if let Some((_, accelerator)) = qemu {
            command = Command::new(&self.programs.qemu);
            command.args("-machine q35,memory-backend=ram -cpu max -m 512 -nodefaults -no-reboot".split(' '));
            // As Lodge has it: under a name, by which it can be left out when memory is measured.
            command.args("-object memory-backend-memfd,id=ram,size=512M -accel".split(' ')).arg(accelerator);
            command.args("-display none -monitor none -serial stdio -smp".split(' ')).arg(cpus);
            command.arg("-append");
        } else {
            command = Command::new(self.programs.lodge()?);
            command.args(["run", "--engine", engine, "--memory", "512M", "--no-reboot", "--cpus"]).arg(cpus);
            command.args(["--network", self.network]);
            command.arg("--cmdline");
        }
        command.arg(&self.cmdline);
        for (option, file) in [("kernel", &self.kernel), ("initrd", &self.initrd)] {
            let dashes = if qemu.is_some() { "-" } else { "--" };
            command.arg(format!("{dashes}{option}")).arg(file);
        }
        Ok(command)
    }
}

/// Something that cargo built beside this program.
///
/// # Errors
/// This program does not know where it is.
pub fn sibling(name: &str) -> Result<PathBuf> {
    Ok(std::env::current_exe().context("this program has no path")?.with_file_name(name))
}

/// A process that is measured; it ends with this value.
pub struct Running {
    child: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    errors: Option<thread::JoinHandle<String>>,
    /// The output that has not been looked at.
    text: String,
    /// Of its own, and of those that work for it.
    clocks: Vec<ClockId>,
    begun: Instant,
}

/// A moment in the life of a process.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// Since its start.
    pub wall: Duration,
    /// Processor time, of all of its threads, on behalf of it in the kernel too.
    pub cpu: Duration,
}

fn clock_of(child: &Child) -> Result<ClockId> {
    clock_getcpuclockid(Pid::from_raw(child.id().cast_signed()))
        .context("the host has no clock for the process")
}

impl Running {
    /// Starts it.
    ///
    /// # Errors
    /// There is no such program.
    pub fn start(command: &mut Command) -> Result<Self> {
        let begun = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?;
        let (sender, output) = channel();
        let mut stdout = child.stdout.take().context("it is piped")?;
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = stdout.read(&mut buffer) {
                if sender.send(buffer[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        let mut stderr = child.stderr.take().context("it is piped")?;
        let errors = thread::spawn(move || {
            let mut bytes = Vec::new();
            // What could be read is what there is to tell.
            let _ = stderr.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        });
        let input = child.stdin.take().context("it is piped")?;
        let clocks = vec![clock_of(&child)?];
        Ok(Self { child, input, output, errors: Some(errors), text: String::new(), clocks, begun })
    }

    /// Counts the processor time of another process, which works for this one, as its own.
    ///
    /// # Errors
    /// It has ended.
    pub fn count(&mut self, other: &Child) -> Result<()> {
        self.clocks.push(clock_of(other)?);
        Ok(())
    }

    /// Waits for a line of output that contains `mark`; gives what follows the mark, and when the first of it came.
    ///
    /// # Errors
    /// It ended, or did not print that in time: with the last of what it said.
    pub fn line(&mut self, mark: &str, patience: Duration) -> Result<(String, Moment)> {
        let end = Instant::now() + patience;
        let mut came = None;
        loop {
            if let Some(at) = self.text.find(mark) {
                // The end of a line costs processor time too, and is not what was to be measured.
                let now = self.now()?;
                let came = *came.get_or_insert(now);
                if let Some(length) = self.text[at..].find('\n') {
                    let line = self.text[at + mark.len()..at + length].trim().to_owned();
                    self.text.drain(..=at + length);
                    return Ok((line, came));
                }
            }
            match self.output.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.text.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no {mark:?} within {} s{}", patience.as_secs(), self.last_words())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let _ = self.child.kill();
                    let errors = self.errors.take().and_then(|e| e.join().ok()).unwrap_or_default();
                    let first = errors.lines().next().unwrap_or("it ended");
                    bail!("{first}{}", self.last_words())
                }
            }
        }
    }

    fn last_words(&self) -> String {
        let lines: Vec<&str> = self.text.lines().collect();
        lines[lines.len().saturating_sub(5)..]
            .iter()
            .map(|line| format!("\n    {}", line.trim_end()))
            .collect()
    }

    /// Types a line into it.
    ///
    /// # Errors
    /// It has ended.
    pub fn say(&mut self, line: &str) -> Result<()> {
        self.input.write_all(format!("{line}\n").as_bytes()).context("it takes no more input")
    }

    /// How long it has run.
    ///
    /// # Errors
    /// It has been waited for.
    pub fn now(&self) -> Result<Moment> {
        let wall = self.begun.elapsed();
        let times = self.clocks.iter().map(|clock| clock.now().map(Duration::from));
        let cpu = times.sum::<Result<_, _>>().context("the process has no clock any more")?;
        Ok(Moment { wall, cpu })
    }

    /// How much memory it uses beside guest RAM, page tables included, in MiB (proc_pid_smaps(5)). What is
    /// mapped twice counts once.
    pub fn memory(&self) -> f64 {
        let file =
            |name| std::fs::read_to_string(format!("/proc/{}/{name}", self.child.id())).unwrap_or_default();
        let kib =
            |line: &str, name| line.strip_prefix(name)?.trim().trim_end_matches(" kB").parse::<f64>().ok();
        let mut guest_ram = false;
        let mut sum: f64 = file("status").lines().filter_map(|line| kib(line, "VmPTE:")).sum();
        for line in file("smaps").lines() {
            // A mapping's first line begins with its address, the others with a name in capitals.
            if !line.starts_with(|c: char| c.is_ascii_uppercase()) {
                guest_ram = GUEST_RAM.iter().any(|name| line.contains(name));
            } else if !guest_ram {
                sum += kib(line, "Pss:").unwrap_or(0.0);
            }
        }
        sum / 1024.0
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The middle of them.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
