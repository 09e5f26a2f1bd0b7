//! The agent in a guest: runs commands for the host, and connects it to ports of the guest's loopback.
//!
//! Only the host is served. What it asks for is root's to do: the host owns the machine anyway.

mod command;
mod forward;
mod socket;
mod users;

use std::fs::File;
use std::io::BufReader;

use exec::{FromAgent, ToAgent};

fn main() {
    let listener = match socket::listen(exec::PORT) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("lodge-agent: cannot listen: {error}");
            std::process::exit(1);
        }
    };
    loop {
        match socket::accept(&listener) {
            Ok(Some(stream)) => {
                // Without a thread the host sees its stream closed.
                let _ = std::thread::Builder::new().stack_size(256 << 10).spawn(move || serve(stream));
            }
            Ok(None) => {}
            // The next one may find more room.
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(100)),
        }
    }
}

/// Does what the host asks for on one stream.
fn serve(stream: File) {
    let Ok(reading) = stream.try_clone() else { return };
    let mut from = BufReader::new(reading);
    // Where the host has gone, nobody is to be told.
    let _ = match ToAgent::receive(&mut from) {
        Ok(Some(ToAgent::Run(run))) => command::run(&run, from, &stream),
        Ok(Some(ToAgent::Connect(port))) => forward::connect(port, from, &stream),
        Ok(Some(_)) => FromAgent::Failed(1, "it does not begin so".into()).send(&mut &stream),
        Ok(None) => Ok(()),
        Err(error) => FromAgent::Failed(1, error.to_string()).send(&mut &stream),
    };
}
