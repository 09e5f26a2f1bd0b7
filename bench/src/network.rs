//! TCP between a guest and its host through the network that needs no rights, in QEMU and in Lodge, side by side.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::thread;

use anyhow::{Result, ensure};

use crate::monitor::{self, Own, Programs};
use crate::rates::{self, Guest, Place};

/// What is measured: see `guests/work/src/net.rs`.
const PATTERNS: [&str; 4] = ["send", "receive", "round-trips", "connections"];
/// Where the host's loopback is, in both monitors.
const GATEWAY: &str = "10.0.2.2";
const NETWORK: &str = "user,net=10.0.2.0/24";

/// `lodge-bench network`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to measure: `tcg` is QEMU's translator, the others are engines of Lodge's. The first is what the others are compared
    /// with
    #[arg(long, value_delimiter = ',', default_value = "tcg,translate")]
    engine: Vec<String>,
    /// How often; the medians count
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Milliseconds for each pattern
    #[arg(long, default_value_t = 1000)]
    millis: u64,
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
    let listener = TcpListener::bind("127.0.0.1:0")?;
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
        &format!("--net {GATEWAY}:{port}"),
    )?;
    guest.setup.network = NETWORK;
    println!("user-mode network, {} ms each, medians of {}", args.millis, args.rounds);
    let mut places = Vec::new();
    for engine in &args.engine {
        let mut command = guest.setup.command(engine)?;
        connect(&mut command, engine);
        places.push(Place::start(engine, &mut command)?);
    }
    rates::compare(&mut places, &PATTERNS, args.rounds, args.millis)
}

/// Adds the network to a monitor's command.
fn connect(command: &mut Command, engine: &str) {
    if monitor::is_qemu(engine) {
        command.args(["-netdev", &format!("{NETWORK},id=net"), "-device"]);
        command.arg("virtio-net-pci,netdev=net,disable-legacy=on");
    } else {
        command.arg("--host-access");
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
