//! TCP between a guest and its host, in QEMU and in Lodge, side by side: through the network that needs no rights, or over TAP devices on a
//! bridge.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::monitor::{self, Own, Programs};
use crate::rates::{self, Guest, Place};

/// What is measured: see `guests/work/src/net.rs`.
const PATTERNS: [&str; 4] = ["send", "receive", "round-trips", "connections"];
/// Where the host's loopback is, in both monitors.
const GATEWAY: &str = "10.0.2.2";
const NETWORK: &str = "user,net=10.0.2.0/24";
/// The host on its bridge, in a network namespace of this program's own.
const HOST: &str = "10.0.3.1";
const ON_BRIDGE: &str = "bridge=br0,mac=52:4c:00:00:00:03,ip=10.0.3.3";
/// Says that this program is in that namespace.
const INSIDE: &str = "LODGE_BENCH_INSIDE";
const BRIDGE: &str = "ip link set lo up; ip link add br0 type bridge; ip addr add 10.0.3.1/24 dev br0; ip link set br0 up; \
                      ip tuntap add qtap mode tap vnet_hdr; ip link set qtap master br0 up";
/// What a guest does there before it begins: the last byte of its card's address is that of its own.
const ADDRESS: &str = "ip addr add 10.0.3.$((0x$(cut -d: -f6 /sys/class/net/eth0/address)))/24 dev eth0; ";

/// QEMU's card.
const CARD: &str = "virtio-net-pci,netdev=net,disable-legacy=on";
/// What QEMU may have for its network instead of its own, and how an engine of QEMU's is called that has it.
const PASST: &str = "passt";
const WITH_PASST: &str = "+passt";

/// Where a service's directory has its socket.
const SOCKET: &str = "socket";
/// How long the network helper, or passt, may take to start.
const PATIENCE: Duration = Duration::from_secs(10);

/// `lodge-bench network`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to measure: `tcg` is QEMU's translator, `tcg+passt` the same with passt for its network (not Debian 12's, which never ends
    /// a connection that one side has ended); the others are engines of Lodge's. The first is what the others are compared with
    #[arg(long, value_delimiter = ',', default_value = "tcg,translate")]
    engine: Vec<String>,
    /// How often; the medians count
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Milliseconds for each pattern
    #[arg(long, default_value_t = 1000)]
    millis: u64,
    /// Over TAP devices on a bridge, in a network namespace; needs root
    #[arg(long)]
    tap: bool,
    #[command(flatten)]
    own: Own,
    #[command(flatten)]
    programs: Programs,
}

/// Measures and prints the table.
///
/// # Errors
/// Something cannot be started, or a guest fails.
pub fn run(args: &Args) -> Result<()> {
    ensure!(!args.engine.is_empty() && args.millis > 0, "there is nothing to measure");
    if args.tap && std::env::var_os(INSIDE).is_none() {
        let mut inside = Command::new("unshare");
        inside.args(["--net", "--mount", "--"]).args(std::env::args_os()).env(INSIDE, "1");
        ensure!(inside.status()?.success(), "the measurement in a network namespace failed; it needs root");
        return Ok(());
    }
    let helper = args.tap.then(Service::helper).transpose()?;
    let (host, prepare) = if args.tap { (HOST, ADDRESS) } else { (GATEWAY, "") };
    let listener = TcpListener::bind(if args.tap { "0.0.0.0:0" } else { "127.0.0.1:0" })?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A guest that goes away ends its connections.
            thread::spawn(move || serve(stream));
        }
    });
    let mut guest = Guest::new(
        args.own.guest(&args.programs, "amd64")?,
        &args.programs,
        &rates::work()?,
        &format!("{prepare}work --net {host}:{port}"),
    )?;
    guest.setup.network = if args.tap { ON_BRIDGE } else { NETWORK };
    let kind = if args.tap { "TAP devices on a bridge" } else { "user-mode network" };
    println!("{kind}, {} ms each, medians of {}", args.millis, args.rounds);
    let mut places = Vec::new();
    let mut passts = Vec::new();
    for engine in &args.engine {
        let monitor = engine.strip_suffix(WITH_PASST);
        let mut command = guest.setup.command(monitor.unwrap_or(engine))?;
        if monitor.is_none() {
            connect(&mut command, engine, helper.as_ref());
            places.push(Place::start(engine, &mut command)?);
            continue;
        }
        ensure!(
            !args.tap && monitor.is_some_and(monitor::is_qemu),
            "passt is for QEMU, and for no TAP device"
        );
        let passt = Service::passt()?;
        let socket = passt.socket();
        command.args([
            "-netdev",
            &format!("stream,id=net,server=off,addr.type=unix,addr.path={}", socket.display()),
        ]);
        command.args(["-device", CARD]);
        let mut place = Place::start(engine, &mut command)?;
        place.count(&passt.process)?;
        places.push(place);
        passts.push(passt);
    }
    rates::compare(&mut places, &PATTERNS, args.rounds, args.millis)
}

/// A program that monitors find at a socket. It ends with its value.
struct Service {
    process: Child,
    directory: tempfile::TempDir,
}

impl Service {
    /// A bridge, and the network helper that connects guests to it.
    fn helper() -> Result<Self> {
        ensure!(
            Command::new("sh").args(["-ec", BRIDGE]).status()?.success(),
            "there is no bridge; is `ip` there?"
        );
        let directory = tempfile::tempdir()?;
        let mut command = Command::new(monitor::sibling("lodge-netd")?);
        for (option, name) in [("--state", "state"), ("--runtime", "run")] {
            command.arg(option).arg(directory.path().join(name));
        }
        Self::start(&mut command, directory, "the network helper does not start")
    }

    /// A user-mode network of somebody else's for one guest of QEMU's.
    fn passt() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        // Root's becomes nobody before it makes its socket.
        fs::set_permissions(directory.path(), Permissions::from_mode(0o777))?;
        let mut command = Command::new(PASST);
        // The guest's addresses are those of the others.
        command.args(["--foreground", "--quiet", "-a", "10.0.2.15", "-n", "24", "-g", GATEWAY]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self::start(
            &mut command,
            directory,
            "passt does not start; it needs a default route. --engine says what to measure without it",
        )
    }

    /// Starts it, and waits until its socket is there.
    fn start(command: &mut Command, directory: tempfile::TempDir, why_not: &str) -> Result<Self> {
        let socket = directory.path().join(SOCKET);
        let process = command.arg("--socket").arg(&socket).spawn();
        let process = process.with_context(|| format!("cannot start {:?}", command.get_program()))?;
        let mut service = Self { process, directory };
        let end = Instant::now() + PATIENCE;
        while !socket.exists() {
            ensure!(service.process.try_wait()?.is_none() && Instant::now() < end, "{why_not}");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(service)
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join(SOCKET)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Adds the network to a monitor's command.
fn connect(command: &mut Command, engine: &str, helper: Option<&Service>) {
    match (monitor::is_qemu(engine), helper) {
        (true, None) => {
            command.args(["-netdev", &format!("{NETWORK},id=net"), "-device", CARD]);
        }
        (true, Some(_)) => {
            command.args(["-netdev", "tap,id=net,ifname=qtap,script=no,downscript=no", "-device"]);
            command.arg(format!("{CARD},mac=52:4c:00:00:00:02"));
        }
        (false, None) => {
            command.arg("--host-access");
        }
        (false, Some(helper)) => {
            command.env("LODGE_NETD_SOCKET", helper.socket());
        }
    }
}

/// The other end of a connection.
fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    let mut block = vec![0; 128 << 10];
    stream.set_nodelay(true)?;
    stream.read_exact(&mut block[..1])?;
    match block[0] {
        b'i' => loop {
            stream.write_all(&block)?;
        },
        b'e' => loop {
            match stream.read(&mut block)? {
                0 => return Ok(()),
                n => stream.write_all(&block[..n])?,
            }
        },
        _ => {
            let mut count = 0;
            loop {
                match stream.read(&mut block)? {
                    0 => return writeln!(stream, "{count}"),
                    n => count += n,
                }
            }
        }
    }
}
