//! TCP with a peer outside of the machine, which does what a connection's first byte says: `o` takes bytes and tells how many, `i`
//! sends them without an end, `e` sends back what comes.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::sys::{check, cpu_time};

/// Bytes of a write, and of a read at most.
const BLOCK: usize = 128 << 10;

/// The peer's address, once it can be reached.
pub fn open(peer: &str) -> SocketAddr {
    let Ok(peer) = peer.parse() else {
        eprintln!("work: {peer} is no address and port");
        std::process::exit(1);
    };
    let patience = Instant::now() + Duration::from_secs(60);
    while let Err(error) = TcpStream::connect_timeout(&peer, Duration::from_secs(5)) {
        if Instant::now() > patience {
            eprintln!("work: cannot connect to {peer}: {error}");
            std::process::exit(1);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    peer
}

/// Does `order` for `time`; gives what is to be said: how often, processor time, time, bytes of each.
pub fn run(peer: SocketAddr, order: &str, time: Duration) -> Option<String> {
    let (cpu, begun) = (cpu_time(), Instant::now());
    let (done, block) = match order {
        "send" => (send(peer, time), BLOCK),
        "receive" => (receive(peer, time), BLOCK),
        "round-trips" => (round_trips(peer, time), 1),
        "connections" => (connections(peer, time), 1),
        _ => return None,
    };
    let (cpu, wall) = (cpu_time() - cpu, begun.elapsed());
    Some(format!("{order} {done} {} {} {block}", cpu.as_nanos(), wall.as_nanos()))
}

fn connect(peer: SocketAddr, what: u8) -> TcpStream {
    let connected = TcpStream::connect(peer).and_then(|mut stream| {
        stream.set_nodelay(true)?;
        stream.write_all(&[what])?;
        Ok(stream)
    });
    check(connected.is_ok(), "connect");
    connected.unwrap_or_else(|_| std::process::exit(1))
}

/// Blocks that have arrived.
fn send(peer: SocketAddr, time: Duration) -> u64 {
    let begun = Instant::now();
    let mut stream = connect(peer, b'o');
    let block = vec![1; BLOCK];
    while begun.elapsed() < time {
        check(stream.write_all(&block).is_ok(), "send");
    }
    check(stream.shutdown(Shutdown::Write).is_ok(), "shutdown");
    let mut count = String::new();
    check(stream.read_to_string(&mut count).is_ok(), "receive");
    count.trim().parse::<u64>().unwrap_or(0) / BLOCK as u64
}

fn receive(peer: SocketAddr, time: Duration) -> u64 {
    let begun = Instant::now();
    let mut stream = connect(peer, b'i');
    let mut block = vec![0; BLOCK];
    let mut count = 0;
    while begun.elapsed() < time {
        let n = stream.read(&mut block).unwrap_or(0);
        check(n > 0, "receive");
        count += n as u64;
    }
    count / BLOCK as u64
}

fn round_trips(peer: SocketAddr, time: Duration) -> u64 {
    let begun = Instant::now();
    let mut stream = connect(peer, b'e');
    let mut count = 0;
    while begun.elapsed() < time {
        exchange(&mut stream);
        count += 1;
    }
    count
}

fn connections(peer: SocketAddr, time: Duration) -> u64 {
    let begun = Instant::now();
    let mut count = 0;
    while begun.elapsed() < time {
        exchange(&mut connect(peer, b'e'));
        count += 1;
    }
    count
}

fn exchange(stream: &mut TcpStream) {
    let mut answer = [0];
    check(stream.write_all(b"?").and_then(|()| stream.read_exact(&mut answer)).is_ok(), "an exchange");
}
