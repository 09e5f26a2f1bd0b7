//! Sockets, and a thread for each viewer.

use std::fmt;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tungstenite::WebSocket;
use tungstenite::handshake::server::{Request, Response};
use tungstenite::http::{HeaderMap, HeaderValue, StatusCode};
use tungstenite::protocol::WebSocketConfig;

use super::session::{Gone, Session};
use super::wire::LONGEST;
use crate::Screen;

/// Viewers at once.
const VIEWERS: usize = 16;
/// How long a browser has to say that it is one, before others are greeted.
const SNIFF: Duration = Duration::from_millis(150);
/// How long a viewer may take to get in.
const GREETING: Duration = Duration::from_secs(30);
/// How long it may take nothing off us.
const STALLED: Duration = Duration::from_secs(20);
/// How often the screen is looked at: from soon after a change, to when nothing happens.
const LOOKS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(80));
/// How long a wrong password is thought about.
const DOUBT: Duration = Duration::from_secs(1);
/// Ports that are tried where none is named.
const PORTS: std::ops::Range<u16> = 5900..6000;

/// Where viewers connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// An IP address, and a port or the first one from 5900 that is free.
    Tcp(IpAddr, Option<u16>),
    /// A Unix socket.
    Unix(PathBuf),
}

impl Default for Address {
    fn default() -> Self {
        Self::Tcp(Ipv4Addr::LOCALHOST.into(), None)
    }
}

impl FromStr for Address {
    type Err = String;

    /// An IP address, a port, both, or the path of a Unix socket, which has a slash.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('/') {
            return Ok(Self::Unix(text.into()));
        }
        let both = text.parse().map(|at: SocketAddr| Self::Tcp(at.ip(), Some(at.port())));
        both.or_else(|_| text.parse().map(|ip| Self::Tcp(ip, None)))
            .or_else(|_| text.parse().map(|port| Self::Tcp(Ipv4Addr::LOCALHOST.into(), Some(port))))
            .map_err(|_| {
                "give an IP address, a port, both as 127.0.0.1:5901, or the path of a Unix socket".into()
            })
    }
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Anybody could connect.
    #[error("at {0}, everybody in the network could see and use the screen: viewers there need a password")]
    Open(IpAddr),
    /// An empty password.
    #[error("the password for viewers is empty")]
    Empty,
    /// The host refuses.
    #[error("viewers cannot connect at {0}: {1}")]
    Listen(String, std::io::Error),
    /// All ports are taken.
    #[error("all ports from 5900 to 5999 are taken")]
    Ports,
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// A running server; it ends when this is dropped.
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    at: String,
}

struct Shared {
    listener: Listener,
    screen: Arc<Screen>,
    name: String,
    password: Option<Vec<u8>>,
    viewers: AtomicUsize,
    ends: AtomicBool,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("at", &self.at).finish_non_exhaustive()
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.at)
    }
}

impl Server {
    /// Shows `screen` to viewers at `address`, which are told that it is called `name` and need the password if there is one.
    ///
    /// # Errors
    /// The address is taken, or open to everybody.
    pub fn start(
        address: &Address,
        screen: Arc<Screen>,
        name: &str,
        password: Option<&[u8]>,
    ) -> Result<Self, Error> {
        if password.is_some_and(<[u8]>::is_empty) {
            return Err(Error::Empty);
        }
        let (listener, at) = listen(address, password.is_some())?;
        let shared = Arc::new(Shared {
            listener,
            screen,
            name: name.to_owned(),
            password: password.map(<[u8]>::to_vec),
            viewers: AtomicUsize::new(0),
            ends: AtomicBool::new(false),
        });
        let ours = shared.clone();
        let spawned = std::thread::Builder::new().name("vnc".into()).spawn(move || accept(&ours));
        let thread = spawned.map_err(|error| Error::Listen(at.clone(), error))?;
        Ok(Self { shared, thread: Some(thread), at })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::SeqCst);
        let fd = match &self.shared.listener {
            Listener::Tcp(listener) => listener.as_fd(),
            Listener::Unix(listener, path) => {
                // Somebody may have removed it.
                let _ = fs::remove_file(path);
                listener.as_fd()
            }
        };
        wake(fd);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// Ends the `accept` that waits at a listening socket.
fn wake(listener: BorrowedFd<'_>) {
    // On Linux this works for listening sockets; were it to fail, there would be nobody to wake.
    let _ = rustix::net::shutdown(listener, rustix::net::Shutdown::Both);
}

fn listen(address: &Address, guarded: bool) -> Result<(Listener, String), Error> {
    match address {
        Address::Unix(path) => {
            let failed = |error| Error::Listen(path.display().to_string(), error);
            // What a server left that was killed.
            if UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
                fs::remove_file(path).map_err(failed)?;
            }
            let listener = UnixListener::bind(path).map_err(failed)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
            Ok((Listener::Unix(listener, path.clone()), path.display().to_string()))
        }
        Address::Tcp(ip, _) if !ip.is_loopback() && !guarded => Err(Error::Open(*ip)),
        Address::Tcp(ip, Some(port)) => {
            let at = SocketAddr::new(*ip, *port);
            bind(at).map_err(|error| Error::Listen(at.to_string(), error))
        }
        Address::Tcp(ip, None) => {
            for port in PORTS {
                let at = SocketAddr::new(*ip, port);
                match bind(at) {
                    Err(error) if error.kind() == ErrorKind::AddrInUse => {}
                    other => return other.map_err(|error| Error::Listen(at.to_string(), error)),
                }
            }
            Err(Error::Ports)
        }
    }
}

fn bind(at: SocketAddr) -> std::io::Result<(Listener, String)> {
    let listener = TcpListener::bind(at)?;
    let at = listener.local_addr()?.to_string();
    Ok((Listener::Tcp(listener), at))
}

fn accept(shared: &Arc<Shared>) {
    loop {
        let link = match &shared.listener {
            Listener::Tcp(listener) => listener.accept().map(|(stream, _)| Link::Tcp(stream)),
            Listener::Unix(listener, _) => listener.accept().map(|(stream, _)| Link::Unix(stream)),
        };
        if shared.ends.load(Ordering::SeqCst) {
            return;
        }
        let Ok(link) = link else {
            // No more files, or the connection went away again.
            std::thread::sleep(Duration::from_millis(50));
            continue;
        };
        if shared.viewers.fetch_add(1, Ordering::SeqCst) >= VIEWERS {
            shared.viewers.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        let ours = shared.clone();
        let spawned = std::thread::Builder::new().name("vnc viewer".into()).spawn(move || {
            // Whoever went away, or cannot be talked to, is gone; others are not concerned.
            let _ = show(&ours, link);
            ours.viewers.fetch_sub(1, Ordering::SeqCst);
        });
        if spawned.is_err() {
            shared.viewers.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// Serves a viewer until it goes.
fn show(shared: &Shared, link: Link) -> std::io::Result<()> {
    let mut link = link.open(shared.password.is_some())?;
    let mut session = Session::new(shared.screen.clone(), &shared.name, shared.password.as_deref());
    let (begun, mut wait) = (Instant::now(), LOOKS.0);
    while !shared.ends.load(Ordering::SeqCst) && (session.running() || begun.elapsed() < GREETING) {
        let output = session.output();
        if !output.is_empty() {
            wait = LOOKS.0;
            link.send(&output)?;
        }
        if let Some(bytes) = link.receive(wait)? {
            wait = LOOKS.0;
            if let Err(gone) = session.receive(&bytes) {
                if gone == Gone::Password {
                    std::thread::sleep(DOUBT);
                }
                return link.send(&session.output());
            }
        } else {
            wait = (wait * 2).min(LOOKS.1);
        }
        session.update();
    }
    Ok(())
}

/// A viewer's connection.
enum Link {
    Tcp(TcpStream),
    Unix(UnixStream),
    Web(Box<WebSocket<TcpStream>>),
}

impl Link {
    /// Finds out whether a browser is there, and sets the limits.
    #[allow(clippy::result_large_err)] // It is the library's.
    fn open(self, guarded: bool) -> std::io::Result<Self> {
        let stream = match self {
            Self::Unix(stream) => {
                stream.set_write_timeout(Some(STALLED))?;
                return Ok(Self::Unix(stream));
            }
            Self::Tcp(stream) => stream,
            web => return Ok(web),
        };
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(STALLED))?;
        stream.set_read_timeout(Some(SNIFF))?;
        // Browsers speak first, viewers of VNC wait for the server.
        let mut first = [0; 4];
        match stream.peek(&mut first) {
            Ok(4) if &first == b"GET " => {}
            _ => return Ok(Self::Tcp(stream)),
        }
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let limits = WebSocketConfig::default().max_message_size(Some(LONGEST)).max_frame_size(Some(LONGEST));
        let check =
            move |request: &Request, response: Response| welcome(request.headers(), guarded, response);
        tungstenite::accept_hdr_with_config(stream, check, Some(limits))
            .map(|socket| Self::Web(Box::new(socket)))
            .map_err(std::io::Error::other)
    }

    /// What has come, if anything does within `wait`.
    fn receive(&mut self, wait: Duration) -> std::io::Result<Option<Vec<u8>>> {
        let mut buffer = vec![0; 4096];
        let read = match self {
            Self::Tcp(stream) => stream.set_read_timeout(Some(wait)).and_then(|()| stream.read(&mut buffer)),
            Self::Unix(stream) => stream.set_read_timeout(Some(wait)).and_then(|()| stream.read(&mut buffer)),
            Self::Web(socket) => {
                socket.get_mut().set_read_timeout(Some(wait))?;
                return match socket.read() {
                    Ok(message) => Ok(Some(message.into_data().to_vec())),
                    Err(tungstenite::Error::Io(error)) => nothing_yet(error),
                    Err(other) => Err(std::io::Error::other(other)),
                };
            }
        };
        match read {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                buffer.truncate(count);
                Ok(Some(buffer))
            }
            Err(error) => nothing_yet(error),
        }
    }

    fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.write_all(bytes),
            Self::Unix(stream) => stream.write_all(bytes),
            Self::Web(socket) => {
                socket.send(tungstenite::Message::binary(bytes.to_vec())).map_err(std::io::Error::other)
            }
        }
    }
}

fn nothing_yet(error: std::io::Error) -> std::io::Result<Option<Vec<u8>>> {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => Ok(None),
        _ => Err(error),
    }
}

type Refused = tungstenite::handshake::server::ErrorResponse;

/// Lets a browser in, unless its page comes from elsewhere: every page of the Web may connect to this host's own ports, and
/// without a password nothing else would stop it.
#[allow(clippy::result_large_err)] // It is the library's.
fn welcome(headers: &HeaderMap, guarded: bool, mut response: Response) -> Result<Response, Refused> {
    if !guarded && !from_here(headers.get("origin")) {
        let mut refused = Refused::new(Some("This page may not see the screen.".into()));
        *refused.status_mut() = StatusCode::FORBIDDEN;
        return Err(refused);
    }
    let offered =
        headers.get("sec-websocket-protocol").and_then(|value| value.to_str().ok()).unwrap_or_default();
    if offered.split(',').any(|protocol| protocol.trim() == "binary") {
        response.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static("binary"));
    }
    Ok(response)
}

/// Whether a page comes from this host, or it is no page that asks.
fn from_here(origin: Option<&HeaderValue>) -> bool {
    let Some(origin) = origin else { return true };
    let host = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, host)| host);
    let name = host.map(|host| match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    });
    matches!(name, Some("localhost" | "127.0.0.1" | "[::1]"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_of_this_host_get_in() {
        for (origin, here) in [
            ("http://localhost:8080", true),
            ("http://127.0.0.1", true),
            ("http://[::1]:6080", true),
            ("https://evil.example", false),
            ("http://localhost.evil.example", false),
            ("http://127.0.0.1.evil.example:80", false),
            ("null", false),
        ] {
            let value = HeaderValue::from_static(origin);
            assert_eq!(from_here(Some(&value)), here, "{origin}");
        }
        assert!(from_here(None));
    }

    #[test]
    fn addresses() {
        let localhost: IpAddr = Ipv4Addr::LOCALHOST.into();
        assert_eq!("5901".parse(), Ok(Address::Tcp(localhost, Some(5901))));
        assert_eq!("127.0.0.1:5901".parse(), Ok(Address::Tcp(localhost, Some(5901))));
        assert_eq!("127.0.0.1".parse(), Ok(Address::default()));
        assert_eq!("/run/x".parse(), Ok(Address::Unix("/run/x".into())));
        assert!("here".parse::<Address>().is_err());
        let open = Server::start(&"0.0.0.0".parse().unwrap(), Screen::new(), "x", None);
        assert!(matches!(open, Err(Error::Open(_))));
    }
}
