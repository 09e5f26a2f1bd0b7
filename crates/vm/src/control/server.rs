//! The VM's side.

use std::fs::{self, DirBuilder, File};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use machine::Power;
use machine::power::End;
use screens::{Key, Screen};

use super::{Answer, LONGEST_LINE, Memory, PATIENCE, Request, Status, seconds};
use crate::config::{Balloon, Plugs, Sockets};
use crate::console::{Console, View};
use crate::nics::Nics;
use crate::storage::{Disks, Refusal};

/// How long a guest may take to answer: less than clients wait.
const GUEST_PATIENCE: Duration = Duration::from_secs(5);
/// How long it has to tell of its memory.
const TELLING: Duration = Duration::from_secs(1);
/// Connections at a time.
const MOST_CLIENTS: usize = 256;

/// Why a VM cannot be reached by a name.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Taken {
    #[error(
        "a virtual machine called {0} is running; choose another name with --name, or see it with `lodge console {0}`"
    )]
    Name(String),
    #[error("cannot listen at {}: {}", .0.display(), .1)]
    Host(PathBuf, io::Error),
}

/// Listens until it is dropped.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    listener: UnixListener,
}

/// What requests are about: it outlives the machine's resets.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Subject {
    pub status: Status,
    pub console: Arc<Console>,
    pub sockets: Arc<Sockets>,
    pub power: Power,
    pub balloon: Arc<Balloon>,
    pub plugs: Arc<Plugs>,
    pub screen: Arc<Screen>,
    pub disks: Arc<Disks>,
    pub nics: Arc<Nics>,
}

#[derive(Debug)]
struct Vm {
    of: Subject,
    begun: Instant,
    clients: AtomicUsize,
}

impl Server {
    /// Takes the name: from now on nobody else gets it. Clients wait until [`Server::serve`].
    ///
    /// # Errors
    /// A VM of that name runs, or the host refuses.
    pub fn bind(dir: &Path, name: &str) -> Result<Self, Taken> {
        let path = dir.join(format!("{name}.sock"));
        let refused = |error| Taken::Host(path.clone(), error);
        // Only the user may look in.
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(refused)?;
        // Held while we look who is there: two VMs may start at the same time.
        let lock = File::open(dir).map_err(refused)?;
        lock.lock().map_err(refused)?;
        match through_directory(&path, |short| UnixStream::connect(short)) {
            Ok(_) => return Err(Taken::Name(name.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Left by a process that was killed.
            Err(_) if fs::symlink_metadata(&path).is_ok_and(|file| file.file_type().is_socket()) => {
                fs::remove_file(&path).map_err(refused)?;
            }
            Err(error) => return Err(refused(error)),
        }
        let listener = through_directory(&path, |short| UnixListener::bind(short)).map_err(refused)?;
        Ok(Self { path, listener })
    }

    /// Answers requests about this VM from now on, on threads of its own.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn serve(&self, of: Subject) -> io::Result<()> {
        let listener = self.listener.try_clone()?;
        let vm = Arc::new(Vm { of, begun: Instant::now(), clients: AtomicUsize::new(0) });
        std::thread::Builder::new().name("control".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                let vm = vm.clone();
                if vm.clients.fetch_add(1, Ordering::SeqCst) >= MOST_CLIENTS {
                    vm.clients.fetch_sub(1, Ordering::SeqCst);
                    continue;
                }
                // A client that gets no thread sees its connection closed.
                let _ = std::thread::Builder::new().name("control client".into()).spawn(move || {
                    // A client that has gone has gone.
                    let _ = vm.answer(stream);
                    vm.clients.fetch_sub(1, Ordering::SeqCst);
                });
            }
        })?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The next of that name removes it otherwise.
        let _ = fs::remove_file(&self.path);
    }
}

impl Vm {
    /// Answers one client to its end.
    fn answer(&self, stream: UnixStream) -> io::Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut from = BufReader::new(&stream);
        let mut line = Vec::new();
        (&mut from).take(LONGEST_LINE).read_until(b'\n', &mut line)?;
        let answer = match serde_json::from_slice(&line) {
            Ok(Request::Status) => {
                Answer::Status(Status { seconds: self.begun.elapsed().as_secs(), ..self.of.status.clone() })
            }
            Ok(Request::PowerButton) => {
                self.of.console.press_power_button();
                Answer::Done
            }
            Ok(Request::Stop) => {
                self.of.power.request(End::Stopped("`lodge stop`"));
                Answer::Done
            }
            Ok(Request::Socket { port }) => return self.connect(from, port),
            Ok(Request::Memory(target)) => self.memory(target),
            Ok(Request::AttachDisk(disk)) => match self.of.disks.attach(&disk) {
                Ok(disk) => Answer::Disks(vec![disk]),
                Err(refusal) => Answer::Refused(refusal.to_string()),
            },
            Ok(Request::DetachDisk { which, path, patience, force }) => {
                done(self.of.disks.detach(&which, path.as_deref(), seconds(patience), force))
            }
            Ok(Request::Disks) => Answer::Disks(self.of.disks.list()),
            Ok(Request::AttachNic(words)) => match self.of.nics.attach_as(&words) {
                Ok(nic) => Answer::Nics(vec![nic]),
                Err(refusal) => Answer::Refused(refusal.to_string()),
            },
            Ok(Request::DetachNic { which, patience, force }) => {
                done(self.of.nics.detach(&which, seconds(patience), force))
            }
            Ok(Request::PlugNic { which, plugged }) => done(self.of.nics.set_plugged(&which, plugged)),
            Ok(Request::Nics) => Answer::Nics(self.of.nics.list()),
            Ok(Request::Screenshot) => return self.picture(&stream),
            Ok(Request::Type(text)) => match self.of.screen.type_text(&text) {
                typed if typed == text.chars().count() => Answer::Done,
                typed => Answer::Refused(format!(
                    "after {typed} characters the guest took no more: it reads no keyboard, or a US keyboard has no such character"
                )),
            },
            Ok(Request::Press(keys)) => self.press(&keys),
            Ok(Request::Console) => return self.show_console(from),
            Ok(Request::Wait) => {
                say(&stream, &Answer::Stream)?;
                stream.set_read_timeout(None)?;
                // The process' end closes it, if the client does not.
                return io::copy(&mut from, &mut io::sink()).map(|_| ());
            }
            Err(_) => Answer::Refused(
                "the virtual machine does not know such a request; use the version of Lodge that started it"
                    .into(),
            ),
        };
        say(&stream, &answer)
    }

    /// Connects a client to a program of the guest's.
    fn connect(&self, mut from: BufReader<&UnixStream>, port: u32) -> io::Result<()> {
        let stream = *from.get_ref();
        let opened = self.of.sockets.begin(port).and_then(|guest| guest.wait(GUEST_PATIENCE).map(|()| guest));
        let guest = match opened {
            Ok(guest) => guest,
            Err(error) => return say(stream, &Answer::Refused(refusal(&error, port))),
        };
        say(stream, &Answer::Stream)?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // A client that breaks off has ended as well.
                let _ = io::copy(&mut from, &mut &guest);
                guest.end_writing();
            });
            let copied = io::copy(&mut &guest, &mut { stream }).map(|_| ());
            // The guest may still read.
            let how = match &copied {
                Ok(()) if !guest.is_over() => std::net::Shutdown::Write,
                _ => std::net::Shutdown::Both,
            };
            let _ = stream.shutdown(how);
            copied
        })
    }

    /// Below the memory that it started with the guest's balloon does it, above that what is plugged.
    fn memory(&self, target: Option<u64>) -> Answer {
        let size = self.of.status.memory;
        let (balloon, plugs) = (&self.of.balloon, &self.of.plugs);
        let max = size + plugs.room();
        if let Some(bytes) = target {
            if bytes > max {
                return Answer::Refused(
                    "that is more than the virtual machine was started for; `lodge run --memory SIZE,max=SIZE` makes room".into(),
                );
            }
            if bytes > size && !plugs.has_driver() {
                return Answer::Refused(
                    "the guest has no driver for memory that is plugged; Linux's is called virtio_mem".into(),
                );
            }
            // Just what it started with: either of them may have something to do, which the other does not hinder.
            let driven = balloon.has_driver() || bytes == size && plugs.has_driver();
            if bytes <= size && !driven {
                return Answer::Refused(
                    "the guest has no driver for its memory balloon; Linux's is called virtio_balloon".into(),
                );
            }
            balloon.set((bytes < size).then_some(bytes));
            plugs.set(bytes.saturating_sub(size));
        }
        let stats = balloon.stats(TELLING).unwrap_or_default();
        Answer::Memory(Memory {
            size,
            max,
            target: balloon.wanted().unwrap_or(size + plugs.requested()),
            has: size.saturating_sub(balloon.ballooned()) + plugs.plugged(),
            held: balloon.held(),
            free: stats.free,
            available: stats.available,
        })
    }

    fn picture(&self, stream: &UnixStream) -> io::Result<()> {
        if !self.of.screen.has_display() {
            let why = "this virtual machine has no display; give it one with `lodge run --display vga`";
            return say(stream, &Answer::Refused(why.into()));
        }
        say(stream, &Answer::Stream)?;
        self.of.screen.picture().png(stream)
    }

    fn press(&self, keys: &str) -> Answer {
        match Key::chord(keys) {
            Ok(keys) if self.of.screen.press(&keys) => Answer::Done,
            Ok(_) => Answer::Refused("the guest reads no keyboard".into()),
            Err(name) => Answer::Refused(format!(
                "no key is called \"{name}\"; there are a, 1, enter, esc, f1, ctrl, alt, delete … and chords such as ctrl-alt-delete"
            )),
        }
    }

    fn show_console(&self, mut from: BufReader<&UnixStream>) -> io::Result<()> {
        let stream = *from.get_ref();
        say(stream, &Answer::Stream)?;
        stream.set_read_timeout(None)?;
        // A user may look at what is shown for as long as they like.
        stream.set_write_timeout(None)?;
        let View { id, recent, news } = self.of.console.view();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut to = stream;
                let mut done = to.write_all(&recent);
                while let (Ok(()), Ok(bytes)) = (&done, news.recv()) {
                    done = to.write_all(&bytes);
                }
                // Ends the other direction, too.
                let _ = stream.shutdown(std::net::Shutdown::Both);
            });
            let mut buffer = [0; 4096];
            let typed = loop {
                match from.read(&mut buffer) {
                    Ok(0) => break Ok(()),
                    Ok(n) => self.of.console.push(&buffer[..n]),
                    Err(error) => break Err(error),
                }
            };
            self.of.console.end_view(id);
            let _ = stream.shutdown(std::net::Shutdown::Both);
            typed
        })
    }
}

fn done(done: Result<(), Refusal>) -> Answer {
    match done {
        Ok(()) => Answer::Done,
        Err(refusal) => Answer::Refused(refusal.to_string()),
    }
}

fn refusal(error: &io::Error, port: u32) -> String {
    match error.kind() {
        ErrorKind::ConnectionRefused => format!("nobody listens at port {port} of the guest's virtio socket"),
        ErrorKind::TimedOut => {
            "the guest does not answer by its virtio socket; does its system have the driver?".into()
        }
        _ => format!("no stream to port {port} of the guest: {error}"),
    }
}

fn say(mut stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Does something with a socket's path by a short name for its directory: the addresses of sockets have 107 bytes (unix(7)), paths
/// more.
pub(super) fn through_directory<T>(path: &Path, f: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let dir = File::open(dir)?;
    f(&Path::new(&format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name))
}
