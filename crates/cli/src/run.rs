//! `lodge run`: a guest with its console on this terminal.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;
use systems::Start;
use vm::control::{Status, Subject};
use vm::{Boot, Choice, Config, Console, End, Model, Vm};

use crate::args::{Cpu, Engine, MemorySize, Run, Terminal};
use crate::config;
use crate::console::{self, Ask, Raw};
use crate::disk::Disk;
use crate::progress::Bars;
use crate::report::{Help, Usage};
use crate::{network, running, system};

/// Exit statuses that are not the debug-exit port's, which are odd: see `args::EXIT_STATUS`.
mod status {
    pub const HOST: u8 = 4;
    pub const GUEST: u8 = 6;
    pub const TIMEOUT: u8 = 124;
    pub const STOPPED: u8 = 130;
}

/// Starts the guest, and waits for its end.
pub fn run(args: &Run) -> anyhow::Result<ExitCode> {
    let begun = Instant::now();
    network::check(args)?;
    let mut config = configure(args)?;
    let (name, control) = running::take_name(args, &config.name)?;
    config.name = name;
    config.nics = Arc::new(network::open(args, &config.name, config.cpus)?);
    let prepared = begun.elapsed();
    let console = Arc::new(match args.console {
        Terminal::Serial => Console::new(Box::new(std::io::stdout())),
        Terminal::Virtio => Console::with_virtio(Box::new(std::io::stdout())),
    });
    let mut vm = Vm::new(&config, &console)?;

    let viewers = crate::screen::serve(args, &config)?;

    // From here on the terminal may be raw: it is put back on every way out, panics included.
    let raw = Raw::new();
    let _restore = raw.clone().map(RestoreOnDrop);
    if raw.is_some() {
        let hook = std::panic::take_hook();
        let terminal = raw.clone();
        std::panic::set_hook(Box::new(move |info| {
            terminal.iter().for_each(Raw::restore);
            hook(info);
        }));
        eprint!("{}\r\n", console::HINT);
    }
    let power = vm.power().clone();
    watch_signals(&power, &console)?;
    if let Some(control) = &control {
        control.serve(subject(&config, &vm, &console)).context("the host gives no thread")?;
    }
    // Boot menus take any key as a wish to choose, the end of input included.
    let tell_end = matches!(config.boot, Boot::Kernel { .. });
    read_input(raw.is_some(), tell_end, &console, &power)?;
    let gdb = args.gdb.map(listen).transpose()?;
    if let (Some(listener), Some(address)) = (&gdb, args.gdb) {
        eprint!("Waiting for gdb; in gdb: target remote {address}\r\n");
        vm.debug(listener.try_clone().context("the host gives no socket")?)?;
    }

    let deadline = args.timeout.map(|t| begun + t);
    let mut end = vm.run(deadline);
    while resets(end.as_ref(), &config) && !args.no_reboot {
        drop(vm);
        power.clear();
        vm = Vm::restart(&config, &console, &power)?;
        if let Some(listener) = &gdb {
            vm.debug(listener.try_clone().context("the host gives no socket")?)?;
        }
        end = vm.run(deadline);
    }
    if let Some(file) = &args.screenshot {
        crate::screen::save(&config.screen, file)?;
    }
    drop(viewers);
    let report = vm.stop();
    // What the guest has not asked to be flushed is not lost either when it ends.
    let flushed = config.disks.flush();
    if let Boot::Firmware(vm::Firmware { variables: Some(variables), .. }) = &config.boot {
        variables.flush().context("cannot keep the UEFI variables")?;
    }
    console.flush();
    raw.iter().for_each(Raw::restore);
    if args.stats {
        print_stats(&report, prepared, begun.elapsed());
    }
    flushed?;
    Ok(finish(end.as_ref(), args))
}

/// What other commands can ask about.
fn subject(config: &Config, vm: &Vm, console: &Arc<Console>) -> Subject {
    let status = Status {
        name: config.name.clone(),
        engine: vm.engine().into(),
        cpus: config.cpus,
        memory: config.memory,
        pid: std::process::id(),
        seconds: 0,
    };
    Subject {
        status,
        console: console.clone(),
        sockets: config.sockets.clone(),
        power: vm.power().clone(),
        balloon: config.balloon.clone(),
        plugs: config.plugs.clone(),
        screen: config.screen.clone(),
        disks: config.disks.clone(),
        nics: config.nics.clone(),
    }
}

fn listen(address: std::net::SocketAddr) -> anyhow::Result<std::net::TcpListener> {
    std::net::TcpListener::bind(address).with_context(|| {
        Usage(format!("cannot wait for gdb at {address}; choose another address with --gdb"))
    })
}

struct RestoreOnDrop(Raw);

impl Drop for RestoreOnDrop {
    fn drop(&mut self) {
        self.0.restore();
    }
}

/// Whether the machine starts again. As a PC, it does after a triple fault; but a kernel that was started without firmware expects
/// nothing of that kind, and its fault is better told.
fn resets(end: Option<&End>, config: &Config) -> bool {
    match end {
        Some(End::Reset) => true,
        Some(End::TripleFault) => matches!(config.boot, Boot::Firmware(_)),
        _ => false,
    }
}

/// Says how the guest ended where that is no power-off, and gives the status for it.
fn finish(end: Option<&End>, args: &Run) -> ExitCode {
    let (status, text) = match end {
        Some(End::PowerOff | End::Reset) => (0, None),
        Some(End::DebugExit(value)) => ((value << 1) as u8 | 1, None),
        Some(End::Panic) => {
            (status::GUEST, Some("the guest's kernel panicked; its last words are above".to_string()))
        }
        Some(End::TripleFault) => (
            status::GUEST,
            Some(
                "the guest stopped with a triple fault: its kernel could not handle an exception".to_string(),
            ),
        ),
        Some(End::Stopped(why)) => (status::STOPPED, Some(format!("ended by {why}"))),
        Some(End::Failed(what)) => (status::HOST, Some(what.clone())),
        None => {
            let seconds = args.timeout.unwrap_or_default().as_secs_f64();
            (status::TIMEOUT, Some(format!("the guest did not end within {seconds} s (--timeout)")))
        }
    };
    if let Some(text) = text {
        eprintln!("lodge: {text}");
    }
    ExitCode::from(status)
}

fn watch_signals(power: &vm::Power, console: &Arc<Console>) -> anyhow::Result<()> {
    let mut signals =
        Signals::new([SIGINT, SIGTERM, SIGHUP, SIGWINCH]).context("cannot watch for signals")?;
    let (power, console) = (power.clone(), console.clone());
    console::tell_size(&console);
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                if signal == SIGWINCH {
                    console::tell_size(&console);
                    continue;
                }
                power.request(End::Stopped(match signal {
                    SIGINT => "Ctrl-C",
                    SIGTERM => "SIGTERM",
                    _ => "SIGHUP: the terminal has gone",
                }));
            }
        })
        .context("the host gives no thread")?;
    Ok(())
}

fn read_input(raw: bool, tell_end: bool, console: &Arc<Console>, power: &vm::Power) -> anyhow::Result<()> {
    let (console, power) = (console.clone(), power.clone());
    std::thread::Builder::new()
        .name("input".into())
        .spawn(move || {
            console::pump(
                raw,
                tell_end,
                |bytes| console.push(bytes),
                |ask| match ask {
                    Ask::Quit => power.request(End::Stopped("the escape key")),
                    Ask::PowerButton => console.press_power_button(),
                },
            );
        })
        .context("the host gives no thread")?;
    Ok(())
}

/// Everything that the command line, the configuration file and the defaults say.
fn configure(args: &Run) -> anyhow::Result<Config> {
    let file = config::Config::read()?;
    let engine = match args.engine.or(file.engine).unwrap_or_default() {
        Engine::Auto => Choice::Auto,
        Engine::Kvm => Choice::Kvm,
        Engine::Interpret => Choice::Interpret,
        Engine::Translate => Choice::Translate,
    };
    let system = system::instance(args, file.mirror.as_deref(), engine)?;
    let whole = system.is_some();
    let disk = boot_disk(args, whole)?;
    let (start, own) = system.map(|system| (system.start, (system.disks, system.packages))).unzip();
    let mut boot = match (start, &args.firmware, &disk) {
        (Some(Start::Kernel(boot)), None, _) => boot,
        (None, None, None) => kernel(args, file.mirror.as_deref())?,
        (start, ..) => {
            let known = match start {
                Some(Start::Firmware(known)) => Some(known),
                _ => None,
            };
            Boot::Firmware(crate::firmware::open(args, known, args.mirror.clone().or(file.mirror))?)
        }
    };
    let (mut disks, packages) = own.unwrap_or_default();
    let memory = match (args.memory, &file.memory) {
        (Some(memory), _) => memory,
        (None, Some(text)) => crate::args::parse_memory(text)
            .map_err(|e| Usage(format!("the configuration file's memory, \"{text}\", is no size: {e}")))?,
        (None, None) => {
            let size = if whole { 1 << 30 } else { room_for(&boot) };
            MemorySize { size, max: size }
        }
    };
    // Who is given memory wants to use it. As movable memory it can be taken back, but the kernel itself cannot use it: Linux 5.15
    // and later see to it that there is not more of it than thrice the rest. Older ones pass the second over; those that
    // have no virtio-mem, both.
    if let (true, Boot::Kernel { cmdline, .. }) = (memory.max > memory.size, &mut boot)
        && !cmdline.contains("memhp_default_state=")
    {
        cmdline.push_str(" memhp_default_state=online memory_hotplug.online_policy=auto-movable");
    }
    if let (Terminal::Virtio, Boot::Kernel { cmdline, .. }) = (args.console, &mut boot)
        && !cmdline.contains("console=hvc")
    {
        cmdline.push_str(" console=hvc0");
    }
    let firmware = matches!(boot, Boot::Firmware(_));
    disks.extend(crate::disk::open(disk.iter().chain(&args.disk))?);
    disks.extend(packages);
    let name = args.name.clone().unwrap_or_else(|| name_of(&boot));
    Ok(Config {
        nics: Arc::default(),
        name,
        engine,
        model: args.cpu.map(|cpu| match cpu {
            Cpu::V2 => Model::V2,
            Cpu::V3 => Model::V3,
            Cpu::Host => Model::Host,
        }),
        lockstep: args.lockstep,
        cpus: args.cpus.or(file.cpus).unwrap_or(1),
        memory: memory.size,
        boot,
        disks: Arc::new(disks.into()),
        cdroms: crate::disk::open_cds(&args.cdrom)?,
        shares: crate::share::open(&args.share)?,
        sockets: Arc::default(),
        balloon: Arc::default(),
        plugs: Arc::new(vm::Plugs::new(memory.max - memory.size)),
        display: crate::screen::display(args, firmware),
        screen: screens::Screen::new(),
        debug_exit: args.debug_exit,
        trace: args.trace.clone(),
    })
}

fn name_of(boot: &Boot) -> String {
    let path = match boot {
        Boot::Kernel { kernel, .. } => kernel,
        Boot::Firmware(firmware) => &firmware.code,
    };
    path.file_name().map_or_else(|| "guest".into(), |n| n.to_string_lossy().into_owned())
}

/// The default memory of a guest: more where its root file system is unpacked into that.
fn room_for(boot: &Boot) -> u64 {
    let initrd: u64 = match boot {
        Boot::Kernel { initrd, .. } => {
            initrd.iter().filter_map(|path| Some(path.metadata().ok()?.len())).sum()
        }
        Boot::Firmware(_) => 0,
    };
    // It is there packed and unpacked at the same time, and wants room to work.
    (512u64 << 20).max((3 * initrd + (256 << 20)).next_multiple_of(1 << 20))
}

/// The guest, if it is a disk to boot from; none where it is a whole system.
fn boot_disk(args: &Run, is_system: bool) -> anyhow::Result<Option<Disk>> {
    let path = args.image.as_deref().map(Path::new).filter(|path| path.exists() && !path.is_dir());
    let disk = match path {
        Some(path) if vm::is_disk(path)? => Some(Disk::to_start_from(path)?),
        _ => None,
    };
    if let (None, Some(_), Some(image)) = (&disk, &args.firmware, &args.image)
        && !is_system
    {
        return Err(anyhow::Error::new(Usage(format!("--firmware starts disks, and {image} is none")))
            .context(Help("leave --firmware away, or name a disk image".into())));
    }
    if (disk.is_some() || args.firmware.is_some()) && (!args.initrd.is_empty() || args.cmdline.is_some()) {
        return Err(anyhow::Error::new(Usage("a disk's own boot loader loads its kernel".into()))
            .context(Help("leave --initrd and --cmdline away, or start the kernel with --kernel".into())));
    }
    Ok(disk)
}

fn kernel(args: &Run, mirror: Option<&str>) -> anyhow::Result<Boot> {
    let image = args.image.as_deref().unwrap_or("tiny");
    let file = args.kernel.clone().or_else(|| Path::new(image).is_file().then(|| PathBuf::from(image)));
    if let Some(kernel) = file {
        let cmdline = args.cmdline.clone().unwrap_or_else(|| "console=ttyS0".into());
        return Ok(Boot::Kernel { kernel, initrd: args.initrd.clone(), cmdline });
    }
    let mut options = images::Options {
        mirror: args.mirror.clone().or_else(|| mirror.map(Into::into)),
        ..images::Options::default()
    };
    if let Some(reference) = images::oci::Reference::parse(image) {
        return oci(args, &reference.map_err(images::Error::from)?, &options);
    }
    match image.split_once(':') {
        None if image == "tiny" => {}
        Some(("tiny", "i386")) => options.arch = "i386".into(),
        Some(("tiny", suite))
            if suite.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') && !suite.is_empty() =>
        {
            options.suite = Some(suite.into());
        }
        _ if image.contains('/') => {
            return Err(anyhow::Error::new(Usage(format!("there is no file {image}")))
                .context(Help("name a disk image or a kernel file that exists, or `tiny`".into())));
        }
        _ => {
            return Err(anyhow::Error::new(Usage(format!("there is no image called {image}"))).context(
                Help(
                    "images are: debian, debian:12, debian:13, tiny, tiny:SUITE (such as tiny:trixie), tiny:i386, what \
                     `lodge image ls` and `lodge image catalogue` show, oci:REGISTRY/NAME:TAG, a disk image, or a kernel file"
                        .into(),
                ),
            ));
        }
    }
    let guest = images::default_guest(&options, &mut Bars::default())?;
    if std::io::stderr().is_terminal() || !guest.cached {
        eprintln!("{}", guest.description);
    }
    let mut cmdline = format!("{} panic=-1", guest.cmdline);
    if !args.share.is_empty() {
        let tags: Vec<&str> = args.share.iter().map(|share| share.tag.as_str()).collect();
        cmdline = format!("{cmdline} lodge.shares={}", tags.join(","));
    }
    if let Some(more) = &args.cmdline {
        cmdline = format!("{cmdline} {more}");
    }
    let initrd = if args.initrd.is_empty() { vec![guest.initrd] } else { args.initrd.clone() };
    Ok(Boot::Kernel { kernel: guest.kernel, initrd, cmdline })
}

/// An OCI image's command, in a guest of its own.
fn oci(args: &Run, reference: &images::oci::Reference, options: &images::Options) -> anyhow::Result<Boot> {
    let guest = images::oci::oci_guest(reference, options, &mut Bars::default())?;
    if std::io::stderr().is_terminal() || !guest.cached {
        eprintln!("{}", guest.description);
    }
    let mut cmdline = guest.cmdline;
    if let Some(more) = &args.cmdline {
        cmdline = format!("{cmdline} {more}");
    }
    Ok(Boot::Kernel { kernel: guest.kernel, initrd: guest.initrd, cmdline })
}

fn print_stats(report: &vm::Report, prepared: std::time::Duration, total: std::time::Duration) {
    let mut err = std::io::stderr().lock();
    let seconds = |d: std::time::Duration| format!("{:.3} s", d.as_secs_f64());
    let mut line = |what: &str, value: String| {
        // Statistics are not worth failing for.
        let _ = writeln!(err, "{what:>32}  {value}");
    };
    line("engine", report.engine.into());
    line("image ready after", seconds(prepared));
    for (phase, time) in &report.phases {
        line(phase, seconds(*time));
    }
    line("total", seconds(total));
    line("host memory held", format!("{:.1} MiB", report.held as f64 / f64::from(1 << 20)));
    for (index, cpu) in report.cpus.iter().enumerate() {
        if let Some(n) = cpu.instructions {
            line(&format!("vCPU {index}: instructions"), n.to_string());
        }
        for (what, n) in &cpu.counters {
            line(&format!("vCPU {index}: {what}"), n.to_string());
        }
        for (what, ns) in &cpu.times {
            line(&format!("vCPU {index}: {what}"), seconds(std::time::Duration::from_nanos(*ns)));
        }
    }
}
