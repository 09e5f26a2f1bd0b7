//! Connections to the guest's own ports.

use std::fs::File;
use std::io::{self, BufReader};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpStream};

use exec::FromAgent;

use crate::socket::shutdown;

/// Connects the stream to a port of the loopback.
pub fn connect(port: u16, mut from: BufReader<File>, stream: &File) -> io::Result<()> {
    let connected = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
        .or_else(|error| TcpStream::connect((Ipv6Addr::LOCALHOST, port)).map_err(|_| error));
    let tcp = match connected {
        Ok(tcp) => tcp,
        Err(error) => {
            return FromAgent::Failed(1, format!("port {port} of the guest: {error}")).send(&mut &*stream);
        }
    };
    // Failing costs speed only.
    let _ = tcp.set_nodelay(true);
    FromAgent::Started.send(&mut &*stream)?;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // A side that has gone ends the other: what matters is that it ends.
            let _ = io::copy(&mut from, &mut &tcp);
            let _ = tcp.shutdown(Shutdown::Write);
        });
        let _ = io::copy(&mut &tcp, &mut &*stream);
        shutdown(stream, Shutdown::Write);
    });
    Ok(())
}
