//! The VMs that run: their names, and what can be asked of them.

use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::HumanBytes;
use vm::control::{Client, Request, Server, Status, Taken};

use crate::args::{Ls, Memory, Run, Stop};
use crate::console::{self, Ask, Raw};
use crate::host::{print, table};
use crate::report::{Help, Usage};

/// Where the sockets of running VMs are.
pub fn directory() -> anyhow::Result<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    match (variable("LODGE_RUNTIME_DIR"), variable("XDG_RUNTIME_DIR")) {
        (Some(dir), _) => Ok(dir),
        (None, Some(base)) => Ok(base.join("lodge")),
        (None, None) => Ok(systems::data_dir()?.join("run")),
    }
}

/// Takes the VM's name: the one that was given, or the image's with a number if that is taken. Without one, for a host that refuses
/// the socket, the VM runs all the same.
pub fn take_name(args: &Run, fallback: &str) -> anyhow::Result<(String, Option<Server>)> {
    let dir = directory()?;
    if let Some(name) = &args.name {
        if name.contains('/') {
            return Err(no_name(name));
        }
        return match Server::bind(&dir, name) {
            Ok(server) => Ok((name.clone(), Some(server))),
            Err(error @ Taken::Name(_)) => Err(Usage(error.to_string()).into()),
            Err(error @ Taken::Host(..)) => Ok((name.clone(), told(&error))),
        };
    }
    let image = args.image.as_deref().unwrap_or(fallback);
    let stem = image.rsplit('/').next().unwrap_or(image);
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let stem: String = stem.chars().map(|c| if is_plain(c) { c } else { '-' }).take(48).collect();
    let names = std::iter::once(stem.clone()).chain((2..).map(|n| format!("{stem}-{n}")));
    for name in names {
        match Server::bind(&dir, &name) {
            Ok(server) => return Ok((name, Some(server))),
            Err(Taken::Name(_)) => {}
            Err(error @ Taken::Host(..)) => return Ok((name, told(&error))),
        }
    }
    unreachable!("there are names without end")
}

fn no_name(name: &str) -> anyhow::Error {
    Usage(format!("\"{name}\" is no name for a virtual machine; use letters, digits, `-`, `_` and `.`"))
        .into()
}

fn told(error: &Taken) -> Option<Server> {
    eprintln!("lodge: other commands cannot reach this virtual machine: {error}");
    None
}

/// Connects to the VM `name`.
pub fn connect(name: &str) -> anyhow::Result<Client> {
    if name.contains('/') {
        return Err(no_name(name));
    }
    let path = directory()?.join(format!("{name}.sock"));
    Client::connect(&path).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            anyhow::Error::new(Usage(format!("no virtual machine called {name} is running")))
                .context(Help("`lodge ls` lists those that run".into()))
        }
        _ => anyhow::Error::new(error).context(format!("cannot connect to {}", path.display())),
    })
}

/// `lodge ls`.
pub fn ls(args: &Ls) -> anyhow::Result<()> {
    let mut all = statuses()?;
    all.sort_by(|a, b| a.name.cmp(&b.name));
    if args.json {
        return print(&serde_json::to_string_pretty(&all)?);
    }
    if all.is_empty() {
        return print("No virtual machine is running; `lodge run` starts one.");
    }
    let mut table = table(&["name", "engine", "cpus", "memory", "up for", "process"]);
    for Status { name, engine, cpus, memory, pid, seconds } in all {
        let memory = HumanBytes(memory).to_string();
        table.add_row([name, engine, cpus.to_string(), memory, up(seconds), pid.to_string()]);
    }
    print(&table.to_string())
}

fn up(seconds: u64) -> String {
    match (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s} s"),
        (0, 0, m, s) => format!("{m} min {s} s"),
        (0, h, m, _) => format!("{h} h {m} min"),
        (d, h, ..) => format!("{d} d {h} h"),
    }
}

/// Of all that answer.
fn statuses() -> anyhow::Result<Vec<Status>> {
    let dir = directory()?;
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot look into {}", dir.display())),
    };
    let sockets = entries.flatten().map(|entry| entry.path());
    let sockets = sockets.filter(|path| path.extension().is_some_and(|extension| extension == "sock"));
    // One that does not answer is ending, or was killed.
    Ok(sockets.filter_map(|path| Client::connect(&path).ok()?.status().ok()).collect())
}

/// How long a system that is starting may take no notice of its power button.
const PRESS_AGAIN: Duration = Duration::from_secs(10);

/// `lodge stop`.
pub fn stop(args: &Stop) -> anyhow::Result<ExitCode> {
    // Before it is told, or it might be gone already.
    let (mut end, handle) = connect(&args.name)?.stream(&Request::Wait)?;
    let request = if args.force { Request::Stop } else { Request::PowerButton };
    let deadline = args.timeout.map(|timeout| Instant::now() + timeout);
    loop {
        match connect(&args.name).and_then(|client| Ok(client.tell(&request)?)) {
            // It ends at this moment.
            Err(_) if has_ended(&mut end, &handle, PRESS_AGAIN)? => return Ok(ExitCode::SUCCESS),
            told => told?,
        }
        let left =
            deadline.map_or(PRESS_AGAIN, |deadline| deadline.saturating_duration_since(Instant::now()));
        if has_ended(&mut end, &handle, left.min(PRESS_AGAIN))? {
            return Ok(ExitCode::SUCCESS);
        }
        if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            let seconds = args.timeout.unwrap_or_default().as_secs_f64();
            return Err(anyhow::Error::new(Usage(format!("{} still runs after {seconds} s", args.name)))
                .context(Help("wait longer with --timeout, or end it at once with --force".into())));
        }
    }
}

/// Whether the VM at the other end is gone, after a while at most.
fn has_ended(end: &mut impl Read, handle: &UnixStream, patience: Duration) -> anyhow::Result<bool> {
    // No time at all is no timeout.
    let patience = patience.max(Duration::from_millis(1));
    handle.set_read_timeout(Some(patience)).context("cannot wait for the end")?;
    // However the connection ends: its process is at the other end.
    Ok(!matches!(end.read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock))
}

/// `lodge memory`.
pub fn memory(args: &Memory) -> anyhow::Result<()> {
    let before = connect(&args.name)?.memory(None)?;
    if args.size.is_some_and(|wanted| wanted > before.max) {
        let most = HumanBytes(before.max);
        return Err(anyhow::Error::new(Usage(format!("{} was started for {most} of memory", args.name)))
            .context(Help(
                "ask for no more than that, or start it again with --memory SIZE,max=SIZE".into(),
            )));
    }
    let memory = connect(&args.name)?.memory(args.size)?;
    if args.json {
        return print(&serde_json::to_string_pretty(&memory)?);
    }
    let told = |bytes: Option<u64>| bytes.map_or("unknown".into(), |bytes| HumanBytes(bytes).to_string());
    let mut table =
        table(&["started with", "at most", "is to have", "has", "free", "available", "host memory"]);
    let [size, max, target, has, held] =
        [memory.size, memory.max, memory.target, memory.has, memory.held].map(|bytes| told(Some(bytes)));
    table.add_row([size, max, target, has, told(memory.free), told(memory.available), held]);
    print(&table.to_string())
}

/// `lodge console`.
pub fn console(name: &str) -> anyhow::Result<ExitCode> {
    let (mut from, to) = connect(name)?.stream(&Request::Console)?;
    let to = Arc::new(to);
    let raw = Raw::new();
    let is_terminal = raw.is_some();
    if is_terminal {
        eprint!("{}\r\n", console::LOOK_HINT);
    }
    let (input, vm) = (to.clone(), name.to_owned());
    std::thread::Builder::new()
        .name("input".into())
        .spawn(move || {
            let close = || {
                // Closed already if the VM has ended.
                let _ = input.shutdown(std::net::Shutdown::Write);
            };
            // What cannot be sent has nobody to take it: the VM has ended.
            let send = |bytes: &[u8]| drop((&*input).write_all(bytes));
            console::pump(is_terminal, false, send, |ask| match ask {
                Ask::Quit => close(),
                Ask::PowerButton => {
                    let _ = connect(&vm).map(|client| client.tell(&Request::PowerButton));
                }
            });
            // The guest has a moment to answer what a pipe told it.
            std::thread::sleep(Duration::from_secs(1));
            close();
        })
        .context("the host gives no thread")?;
    let mut out = std::io::stdout();
    let mut buffer = [0; 4096];
    let shown = loop {
        match from.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(n) => {
                if let Err(error) = out.write_all(&buffer[..n]).and_then(|()| out.flush()) {
                    break Err(error);
                }
            }
            Err(error) => break Err(error),
        }
    };
    raw.iter().for_each(Raw::restore);
    if std::io::stderr().is_terminal() {
        eprintln!();
    }
    match shown {
        Err(error) if error.kind() != ErrorKind::BrokenPipe && error.kind() != ErrorKind::ConnectionReset => {
            Err(error).context("cannot show the console")
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_for_people() {
        assert_eq!(up(7), "7 s");
        assert_eq!(up(67), "1 min 7 s");
        assert_eq!(up(3 * 3600 + 65), "3 h 1 min");
        assert_eq!(up(2 * 86400 + 3600), "2 d 1 h");
    }
}
