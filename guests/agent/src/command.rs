//! One command: its user, its terminal or pipes, and what goes through them.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, ErrorKind, PipeReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};

use exec::{End, FromAgent, PIECE, Run, Terminal, ToAgent};

use crate::socket::{check, shutdown};
use crate::users::{self, User};

/// Milliseconds for which output may still be on its way through a terminal after the command's end.
const AFTERWARDS: i32 = 300;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What ends a terminal's input.
const END_OF_INPUT: u8 = 4;

/// Where messages go to the host, whole.
type Host = Arc<Mutex<File>>;

fn tell(host: &Host, message: &FromAgent) -> io::Result<()> {
    message.send(&mut *host.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Runs a command to its end.
pub fn run(run: &Run, mut from: BufReader<File>, stream: &File) -> io::Result<()> {
    let host: Host = Arc::new(Mutex::new(stream.try_clone()?));
    let (mut child, terminal) = match start(run) {
        Ok(started) => started,
        Err(failed) => return tell(&host, &failed),
    };
    tell(&host, &FromAgent::Started)?;
    let pid = child.id() as libc::pid_t;

    let input: Option<File> = match &terminal {
        Some(terminal) => Some(terminal.try_clone()?),
        None => child.stdin.take().map(|pipe| OwnedFd::from(pipe).into()),
    };
    let (typed, to_type) = channel();
    if let Some(input) = input {
        let (host, is_terminal) = (host.clone(), terminal.is_some());
        std::thread::spawn(move || write_input(input, is_terminal, &to_type, &host));
    }
    // Closed when the command has ended.
    let (over, until_over) = io::pipe()?;
    let outputs: [(Option<File>, fn(Vec<u8>) -> FromAgent, i32); 2] = match &terminal {
        Some(terminal) => {
            [(Some(terminal.try_clone()?), FromAgent::Output, AFTERWARDS), (None, FromAgent::Errors, 0)]
        }
        None => [
            (child.stdout.take().map(|pipe| OwnedFd::from(pipe).into()), FromAgent::Output, 0),
            (child.stderr.take().map(|pipe| OwnedFd::from(pipe).into()), FromAgent::Errors, 0),
        ],
    };
    let mut readers = Vec::new();
    for (output, message, afterwards) in outputs {
        let (Some(output), host, over) = (output, host.clone(), over.try_clone()?) else { continue };
        readers.push(std::thread::spawn(move || read_output(output, &host, message, &over, afterwards)));
    }
    let closing = stream.try_clone()?;
    let waiting = std::thread::spawn(move || {
        let status = child.wait();
        drop(until_over);
        // They do not panic.
        readers.into_iter().for_each(|reader| drop(reader.join()));
        // If the host has gone it knows.
        let _ = tell(&host, &FromAgent::Ended(end(status)));
        shutdown(&closing, Shutdown::Both);
    });
    let ended = loop {
        match ToAgent::receive(&mut from) {
            // Its writer has gone with the command.
            Ok(Some(ToAgent::Input(bytes))) => drop(typed.send(Some(bytes))),
            Ok(Some(ToAgent::InputEnd)) => drop(typed.send(None)),
            Ok(Some(ToAgent::Resize(rows, columns))) => {
                terminal.iter().for_each(|terminal| resize(terminal, (rows, columns)));
            }
            Ok(Some(ToAgent::Signal(signal))) => kill(pid, signal),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => break waiting.is_finished(),
        }
    };
    if !ended {
        // The host has gone, as one hangs up. Of a command that has ended meanwhile nobody is left.
        kill(pid, libc::SIGHUP);
        kill(pid, libc::SIGCONT);
    }
    drop(typed);
    // It has told all that there was to tell.
    let _ = waiting.join();
    Ok(())
}

/// Signals the command and what it has started: its session's first group.
fn kill(pid: libc::pid_t, signal: i32) {
    // SAFETY: it takes numbers. It fails where there is nobody any more.
    unsafe { libc::kill(-pid, signal) };
}

fn end(status: io::Result<ExitStatus>) -> End {
    match status {
        Ok(status) => match status.code() {
            Some(code) => End::Status(code as u8),
            None => End::Signal(status.signal().unwrap_or(libc::SIGKILL) as u8),
        },
        Err(_) => End::Signal(libc::SIGKILL as u8),
    }
}

/// Starts the command; its terminal, if it has one.
fn start(run: &Run) -> Result<(Child, Option<File>), FromAgent> {
    let failed = |status: u8| move |error: io::Error| FromAgent::Failed(status, error.to_string());
    let user = users::find(run.user.as_deref()).map_err(failed(1))?.ok_or_else(|| {
        let name = String::from_utf8_lossy(run.user.as_deref().unwrap_or(b"root")).into_owned();
        FromAgent::Failed(1, format!("the guest has no user {name}"))
    })?;
    let mut command = prepare(run, &user);
    let (terminal, other) = match &run.terminal {
        Some(terminal) => {
            open_terminal(terminal).map(|(ours, its)| (Some(ours), Some(its))).map_err(failed(1))?
        }
        None => (None, None),
    };
    match &other {
        Some(other) => {
            let end = || other.try_clone().map(Stdio::from).map_err(failed(1));
            command.stdin(end()?).stdout(end()?).stderr(end()?);
        }
        None => {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        }
    }
    become_user(&mut command, user, other.is_some());
    let name = command.get_program().to_string_lossy().into_owned();
    let child = command.spawn().map_err(|error| match error.kind() {
        ErrorKind::NotFound => FromAgent::Failed(127, format!("cannot run {name}: it is not there")),
        ErrorKind::PermissionDenied => {
            FromAgent::Failed(126, format!("cannot run {name}: it is not permitted"))
        }
        _ => FromAgent::Failed(126, format!("cannot run {name}: {error}")),
    })?;
    Ok((child, terminal))
}

/// The command with its environment.
fn prepare(run: &Run, user: &User) -> Command {
    let os = |bytes: &[u8]| std::ffi::OsString::from_vec(bytes.to_vec());
    let mut command = match run.command.split_first() {
        Some((program, arguments)) => {
            let mut command = Command::new(os(program));
            command.args(arguments.iter().map(|argument| os(argument)));
            command
        }
        None => {
            // By a dash before its name a shell knows that it is the log-in's.
            let shell = user.shell.rsplit(|&b| b == b'/').next().unwrap_or_default();
            let mut command = Command::new(os(&user.shell));
            command.arg0(os(&[b"-", shell].concat()));
            command
        }
    };
    command.env_clear().env("PATH", PATH).env("HOME", os(&user.home)).env("SHELL", os(&user.shell));
    command.env("USER", os(&user.name)).env("LOGNAME", os(&user.name));
    if let Some(terminal) = &run.terminal {
        command.env("TERM", os(&terminal.name));
    }
    for variable in &run.environment {
        let at = variable.iter().position(|&b| b == b'=').unwrap_or(variable.len());
        let value = variable.get(at + 1..).unwrap_or_default();
        command.env(os(&variable[..at]), os(value));
    }
    match &run.directory {
        Some(directory) => {
            command.current_dir(os(directory));
        }
        None if std::path::Path::new(OsStr::from_bytes(&user.home)).is_dir() => {
            command.current_dir(os(&user.home));
        }
        None => {
            command.current_dir("/");
        }
    }
    command
}

/// Has the command's process be the user's, in a session of its own.
fn become_user(command: &mut Command, user: User, with_terminal: bool) {
    let User { uid, gid, groups, .. } = user;
    let prepare = move || {
        // SAFETY: system calls alone, whose arguments are numbers and a list that lives here.
        unsafe {
            // What started us may have had us ignore some. Those that cannot be set stay as they are.
            for signal in 1..=libc::SIGRTMAX() {
                libc::signal(signal, libc::SIG_DFL);
            }
            check(libc::setsid())?;
            if with_terminal {
                check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            }
            check(libc::setgroups(groups.len(), groups.as_ptr()))?;
            check(libc::setgid(gid))?;
            check(libc::setuid(uid))?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec it makes system calls only, and allocates nothing.
    unsafe { command.pre_exec(prepare) };
}

/// A new terminal: our end and the command's.
fn open_terminal(terminal: &Terminal) -> io::Result<(File, File)> {
    // SAFETY: it takes numbers; what it gives is ours alone.
    let ours = unsafe {
        File::from_raw_fd(check(libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC))?)
    };
    // SAFETY: it takes a number.
    check(unsafe { libc::unlockpt(ours.as_raw_fd()) })?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: it takes numbers; what it gives is ours alone.
    let its = unsafe { File::from_raw_fd(check(libc::ioctl(ours.as_raw_fd(), libc::TIOCGPTPEER, flags))?) };
    resize(&ours, terminal.size);
    Ok((ours, its))
}

fn resize(terminal: &File, (rows, columns): (u16, u16)) {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the structure lives until it returns. A terminal that has gone needs no size.
    unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
}

/// Writes what comes, until its end. What the command does not want is taken all the same.
fn write_input(mut input: File, is_terminal: bool, from: &Receiver<Option<Vec<u8>>>, host: &Host) {
    let mut wanted = true;
    while let Ok(Some(bytes)) = from.recv() {
        wanted = wanted && input.write_all(&bytes).is_ok();
        if tell(host, &FromAgent::Taken(bytes.len() as u32)).is_err() {
            return;
        }
    }
    if is_terminal {
        // A terminal that has gone needs none.
        let _ = input.write_all(&[END_OF_INPUT]);
    }
}

/// Sends what comes, until its end; or until the command is over and nothing more comes for so many milliseconds, for what it has
/// started may live on with its output.
fn read_output(
    mut output: File,
    host: &Host,
    message: fn(Vec<u8>) -> FromAgent,
    over: &PipeReader,
    afterwards: i32,
) {
    let mut buffer = vec![0; PIECE];
    let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut polled = [poll(output.as_raw_fd()), poll(over.as_raw_fd())];
    loop {
        let (len, timeout) = if polled[1].revents != 0 { (1, afterwards) } else { (2, -1) };
        // SAFETY: there are so many, which live until it returns.
        match check(unsafe { libc::poll(polled.as_mut_ptr(), len, timeout) }) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) | Ok(0) => return,
            Ok(_) if polled[0].revents == 0 => continue,
            Ok(_) => {}
        }
        match output.read(&mut buffer) {
            Ok(n @ 1..) if tell(host, &message(buffer[..n].to_vec())).is_ok() => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // A terminal ends with an error.
            _ => return,
        }
    }
}
