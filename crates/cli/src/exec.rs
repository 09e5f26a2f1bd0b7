//! `lodge exec`, `lodge ssh` and `lodge forward`: what the agent in a guest does for us.

use std::ffi::OsString;
use std::io::{BufReader, ErrorKind, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ::exec::{End, FromAgent, PIECE, Run, Terminal, ToAgent, WINDOW};
use anyhow::Context;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;
use vm::control::{Refused, Request};

use crate::args::{Exec, Forward, Ssh};
use crate::console::Raw;
use crate::report::{Help, Usage};
use crate::running;

/// How long a guest may take to start its agent.
const STARTING: Duration = Duration::from_secs(60);
/// What a shell adds to a signal's number for a status.
const BY_SIGNAL: u8 = 128;

type Streams = (BufReader<UnixStream>, UnixStream);

/// A stream to the agent of the VM `name`, as soon as there is one, and its answer to `request`.
fn ask(name: &str, request: &ToAgent) -> anyhow::Result<(Streams, FromAgent)> {
    let begun = Instant::now();
    loop {
        match attempt(name, request)? {
            Ok(answered) => return Ok(answered),
            Err(_) if begun.elapsed() < STARTING => std::thread::sleep(Duration::from_millis(100)),
            Err(why) => {
                let what = format!("the guest {name} does not answer: {why}");
                let help = "Lodge's agent runs in `tiny` and `debian` guests (64-bit ones); see `lodge console` whether it started";
                return Err(anyhow::Error::new(Usage(what)).context(Help(help.into())));
            }
        }
    }
}

/// The same, if it is there now; else why not.
fn attempt(name: &str, request: &ToAgent) -> anyhow::Result<Result<(Streams, FromAgent), String>> {
    let (mut from, mut to) = match running::connect(name)?.stream(&Request::Socket { port: ::exec::PORT }) {
        Ok(streams) => streams,
        Err(Refused::Told(why)) => return Ok(Err(why)),
        Err(error) => return Err(error.into()),
    };
    request.send(&mut to).context("cannot ask the guest")?;
    // A guest that resets now ends the stream.
    match FromAgent::receive(&mut from) {
        Ok(Some(answer)) => Ok(Ok(((from, to), answer))),
        Ok(None) | Err(_) => Ok(Err("its agent went away".into())),
    }
}

/// `lodge exec`.
pub fn exec(args: &Exec) -> anyhow::Result<ExitCode> {
    let bytes = |text: &OsString| text.clone().into_vec();
    // A shell is for somebody who types.
    let wants_terminal = args.terminal || args.command.is_empty() && std::io::stdin().is_terminal();
    let name = std::env::var_os("TERM").unwrap_or_else(|| "dumb".into()).into_vec();
    let run = Run {
        command: args.command.iter().map(bytes).collect(),
        environment: args.env.iter().map(bytes).collect(),
        directory: args.workdir.as_ref().map(bytes),
        user: args.user.as_ref().map(|user| user.clone().into_bytes()),
        terminal: wants_terminal.then(|| Terminal { name, size: size() }),
    };
    let ((mut from, to), answer) = ask(&args.name, &ToAgent::Run(run))?;
    match answer {
        FromAgent::Started => {}
        FromAgent::Failed(status, why) => {
            eprintln!("error: {why}");
            return Ok(ExitCode::from(status));
        }
        _ => anyhow::bail!("the guest's agent answers with what this version of Lodge does not know"),
    }
    let raw = if wants_terminal { Raw::new() } else { None };
    let to_agent = Arc::new(Mutex::new(to));
    let window = Arc::new((Mutex::new(WINDOW), Condvar::new()));
    pass_signals(&to_agent, wants_terminal)?;
    pass_input(&to_agent, &window)?;
    let ended = show(&mut from, &window);
    raw.iter().for_each(Raw::restore);
    match ended? {
        Some(End::Status(status)) => Ok(ExitCode::from(status)),
        Some(End::Signal(signal)) => Ok(ExitCode::from(BY_SIGNAL.wrapping_add(signal))),
        None => Err(anyhow::anyhow!("the guest ended before the command did")),
    }
}

/// Shows what the command writes, to its end.
fn show(from: &mut BufReader<UnixStream>, window: &(Mutex<usize>, Condvar)) -> anyhow::Result<Option<End>> {
    let written = |result: std::io::Result<()>| match result {
        // `| head`: the command gets a signal when we go.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        result => result.map(|()| true).context("cannot write what the command writes"),
    };
    loop {
        let goes_on = match FromAgent::receive(from) {
            Ok(Some(FromAgent::Output(bytes))) => {
                let mut out = std::io::stdout().lock();
                written(out.write_all(&bytes).and_then(|()| out.flush()))?
            }
            Ok(Some(FromAgent::Errors(bytes))) => written(std::io::stderr().write_all(&bytes))?,
            Ok(Some(FromAgent::Taken(bytes))) => {
                *window.0.lock().unwrap_or_else(PoisonError::into_inner) += bytes as usize;
                window.1.notify_all();
                true
            }
            Ok(Some(FromAgent::Ended(end))) => return Ok(Some(end)),
            Ok(Some(_)) => true,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == ErrorKind::InvalidData => return Err(error.into()),
            Err(_) => return Ok(None),
        };
        if !goes_on {
            return Ok(Some(End::Signal(rustix::process::Signal::PIPE.as_raw() as u8)));
        }
    }
}

/// Sends our input, as far as the agent takes it.
fn pass_input(to: &Arc<Mutex<UnixStream>>, window: &Arc<(Mutex<usize>, Condvar)>) -> anyhow::Result<()> {
    let (to, window) = (to.clone(), window.clone());
    let send = move |message: &ToAgent| message.send(&mut *to.lock().unwrap_or_else(PoisonError::into_inner));
    let pump = move || {
        let mut buffer = vec![0; PIECE];
        loop {
            let mut room = window.0.lock().unwrap_or_else(PoisonError::into_inner);
            while *room == 0 {
                room = window.1.wait(room).unwrap_or_else(PoisonError::into_inner);
            }
            let most = PIECE.min(*room);
            drop(room);
            let sent = match std::io::stdin().lock().read(&mut buffer[..most]) {
                Ok(n @ 1..) => {
                    *window.0.lock().unwrap_or_else(PoisonError::into_inner) -= n;
                    send(&ToAgent::Input(buffer[..n].to_vec()))
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Ok(_) | Err(_) => return send(&ToAgent::InputEnd),
            };
            // The command has ended.
            sent?;
        }
    };
    std::thread::Builder::new()
        .name("input".into())
        // Who could not be told has gone.
        .spawn(move || drop(pump()))
        .context("the host gives no thread")?;
    Ok(())
}

/// Sends signals on to the command, and its terminal's changes of size.
fn pass_signals(to: &Arc<Mutex<UnixStream>>, has_terminal: bool) -> anyhow::Result<()> {
    let mut signals =
        Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH]).context("cannot watch for signals")?;
    let to = to.clone();
    let pass = move || {
        for signal in signals.forever() {
            let message = match signal {
                SIGWINCH if !has_terminal => continue,
                SIGWINCH => {
                    let (rows, columns) = size();
                    ToAgent::Resize(rows, columns)
                }
                signal => ToAgent::Signal(signal),
            };
            if message.send(&mut *to.lock().unwrap_or_else(PoisonError::into_inner)).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(pass).context("the host gives no thread")?;
    Ok(())
}

/// Rows and columns of our terminal.
fn size() -> (u16, u16) {
    let size = rustix::termios::tcgetwinsize(rustix::stdio::stdout());
    let size = size.or_else(|_| rustix::termios::tcgetwinsize(rustix::stdio::stdin()));
    size.map_or((24, 80), |size| (size.ws_row, size.ws_col))
}

/// `lodge forward`.
pub fn forward(args: &Forward) -> anyhow::Result<ExitCode> {
    let begun = Instant::now();
    let (mut from, to) = loop {
        match ask(&args.name, &ToAgent::Connect(args.port))? {
            (_, FromAgent::Failed(_, why)) if args.wait.is_none_or(|patience| begun.elapsed() > patience) => {
                return Err(anyhow::anyhow!("cannot connect to {why}"));
            }
            (_, FromAgent::Failed(..)) => std::thread::sleep(Duration::from_millis(300)),
            (streams, _) => break streams,
        }
    };
    std::thread::Builder::new()
        .name("input".into())
        .spawn(move || {
            // Either side may end it.
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut &to);
            let _ = to.shutdown(Shutdown::Write);
        })
        .context("the host gives no thread")?;
    let mut out = std::io::stdout().lock();
    let mut buffer = vec![0; PIECE];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(ExitCode::SUCCESS),
            Ok(n) => match out.write_all(&buffer[..n]).and_then(|()| out.flush()) {
                Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
                written => written.context("cannot write what the guest sends")?,
            },
            Err(error) => return Err(error).context("the connection to the guest broke off"),
        }
    }
}

/// What a command of ours in the guest writes.
fn output(name: &str, command: &[&str]) -> anyhow::Result<Vec<u8>> {
    let command = command.iter().map(|word| word.as_bytes().to_vec()).collect();
    let ((mut from, to), answer) = ask(name, &ToAgent::Run(Run { command, ..Run::default() }))?;
    if let FromAgent::Failed(_, why) = answer {
        return Err(anyhow::anyhow!(why));
    }
    ToAgent::InputEnd.send(&mut &to).context("cannot ask the guest")?;
    let mut all = Vec::new();
    loop {
        match FromAgent::receive(&mut from).context("cannot hear the guest")? {
            Some(FromAgent::Output(bytes)) if all.len() < 1 << 20 => all.extend(bytes),
            Some(FromAgent::Ended(End::Status(0))) => return Ok(all),
            Some(FromAgent::Ended(_)) | None => anyhow::bail!("the guest has none"),
            Some(_) => {}
        }
    }
}

/// `lodge ssh`: the host's own ssh, through the agent, to a guest whose keys it knows from the agent.
pub fn ssh(args: &Ssh) -> anyhow::Result<ExitCode> {
    let keys = output(&args.name, &["sh", "-c", "cat /etc/ssh/ssh_host_*_key.pub"])
        .with_context(|| format!("cannot get the SSH host keys of {}", args.name))?;
    let known: String = String::from_utf8_lossy(&keys)
        .lines()
        .filter(|line| line.split(' ').count() >= 2 && !line.contains(|c: char| c.is_control()))
        .map(|line| format!("{} {line}\n", args.name))
        .collect();
    let path = running::directory()?.join(format!("{}.known_hosts", args.name));
    std::fs::write(&path, known).with_context(|| format!("cannot write {}", path.display()))?;
    let own = std::env::current_exe().context("cannot find this program")?;
    let quote = |text: &str| format!("'{}'", text.replace('\'', "'\\''"));
    let proxy = format!("{} forward {} 22 --wait 60", quote(&own.to_string_lossy()), quote(&args.name))
        .replace('%', "%%");
    let mut ssh = Command::new("ssh");
    ssh.args(["-o", &format!("ProxyCommand={proxy}"), "-o", "StrictHostKeyChecking=yes"]);
    ssh.args([
        "-o",
        &format!("UserKnownHostsFile=\"{}\"", path.display()),
        "-o",
        "GlobalKnownHostsFile=/dev/null",
    ]);
    ssh.args(["-o", &format!("HostKeyAlias={}", args.name), "-l", &args.user]);
    // The name is one that no configuration of the user's is meant for.
    ssh.arg(format!("{}.lodge", args.name)).args(&args.command);
    use std::os::unix::process::CommandExt;
    let error = ssh.exec();
    Err(anyhow::Error::new(error).context("cannot run ssh"))
        .context(Help("install an SSH client, such as Debian's openssh-client".into()))
}
