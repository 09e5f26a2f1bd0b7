//! What the host and the agent in a guest say to each other, over one stream for each thing that is to be done.
//!
//! Messages are a byte for the kind, four for the length (little-endian), and so many bytes. The host begins, with
//! [`ToAgent::Run`] or [`ToAgent::Connect`]; the agent answers with [`FromAgent::Started`] or [`FromAgent::Failed`]. After `Connect`
//! the stream carries the connection's bytes; after `Run` messages go on until [`FromAgent::Ended`].
//!
//! The agent takes input only as far as it has told ([`WINDOW`]), so that signals never wait behind input that the command does
//! not read.
#![forbid(unsafe_code)]

use std::io::{self, ErrorKind, Read, Write};

/// The port that the agent listens at. It is below 1024, so only root of the guest can be there.
pub const PORT: u32 = 842;
/// Bytes of input that may be under way: sent, and not yet told to be taken by [`FromAgent::Taken`].
pub const WINDOW: usize = 256 << 10;
/// Bytes of input or output in one message at most.
pub const PIECE: usize = 32 << 10;
/// Bytes of a message at most: Linux's limit for a command's arguments and environment.
const LONGEST: usize = 2 << 20;

/// A terminal, as the command shall see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terminal {
    /// `TERM`.
    pub name: Vec<u8>,
    /// Its rows and columns.
    pub size: (u16, u16),
}

/// A command to run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// The program, looked for in the `PATH`, and its arguments; the user's log-in shell if there is none.
    pub command: Vec<Vec<u8>>,
    /// Variables, `NAME=VALUE`, beside those that a log-in sets.
    pub environment: Vec<Vec<u8>>,
    /// Where; the user's home if absent.
    pub directory: Option<Vec<u8>>,
    /// Who runs it; root if absent.
    pub user: Option<Vec<u8>>,
    /// Its terminal; without one it has pipes.
    pub terminal: Option<Terminal>,
}

/// What the host says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToAgent {
    /// Run a command.
    Run(Run),
    /// Connect to a TCP port of the guest's loopback.
    Connect(u16),
    /// Input of the command.
    Input(Vec<u8>),
    /// The end of its input.
    InputEnd,
    /// Its terminal has so many rows and columns now.
    Resize(u16, u16),
    /// A signal for the command, by Linux's number.
    Signal(i32),
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With a status.
    Status(u8),
    /// By a signal.
    Signal(u8),
}

/// What the agent says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromAgent {
    /// The command runs, or the connection is made.
    Started,
    /// It does not, with the status that a shell would give for it, and why.
    Failed(u8, String),
    /// So many bytes of input have been taken.
    Taken(u32),
    /// From the command's output, or terminal.
    Output(Vec<u8>),
    /// From its error output.
    Errors(Vec<u8>),
    /// It has ended. Nothing follows.
    Ended(End),
}

impl ToAgent {
    /// Sends it.
    ///
    /// # Errors
    /// The stream's, or the message is too long.
    pub fn send(&self, to: &mut impl Write) -> io::Result<()> {
        let number = |n: u16| n.to_le_bytes();
        match self {
            Self::Run(run) => send(to, 1, &run.to_bytes()),
            Self::Connect(port) => send(to, 2, &number(*port)),
            Self::Input(bytes) => send(to, 3, bytes),
            Self::InputEnd => send(to, 4, &[]),
            Self::Resize(rows, columns) => send(to, 5, &[number(*rows), number(*columns)].concat()),
            Self::Signal(signal) => send(to, 6, &signal.to_le_bytes()),
        }
    }

    /// Receives one; none at the stream's end.
    ///
    /// # Errors
    /// The stream's, or what comes is no message.
    pub fn receive(from: &mut impl Read) -> io::Result<Option<Self>> {
        let Some((kind, bytes)) = receive(from)? else { return Ok(None) };
        let mut fields = Fields(&bytes);
        let message = match kind {
            1 => Self::Run(Run::from_fields(&mut fields)?),
            2 => Self::Connect(fields.u16()?),
            3 => return Ok(Some(Self::Input(bytes))),
            4 => Self::InputEnd,
            5 => Self::Resize(fields.u16()?, fields.u16()?),
            6 => Self::Signal(i32::from_le_bytes(fields.take()?)),
            _ => return Err(nonsense()),
        };
        fields.end()?;
        Ok(Some(message))
    }
}

impl FromAgent {
    /// Sends it.
    ///
    /// # Errors
    /// The stream's.
    pub fn send(&self, to: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Started => send(to, 1, &[]),
            Self::Failed(status, why) => send(to, 2, &[&[*status], why.as_bytes()].concat()),
            Self::Taken(bytes) => send(to, 3, &bytes.to_le_bytes()),
            Self::Output(bytes) => send(to, 4, bytes),
            Self::Errors(bytes) => send(to, 5, bytes),
            Self::Ended(End::Status(status)) => send(to, 6, &[0, *status]),
            Self::Ended(End::Signal(signal)) => send(to, 6, &[1, *signal]),
        }
    }

    /// Receives one; none at the stream's end.
    ///
    /// # Errors
    /// The stream's, or what comes is no message.
    pub fn receive(from: &mut impl Read) -> io::Result<Option<Self>> {
        let Some((kind, bytes)) = receive(from)? else { return Ok(None) };
        let message = match (kind, &bytes[..]) {
            (1, []) => Self::Started,
            (2, [status, why @ ..]) => Self::Failed(*status, String::from_utf8_lossy(why).into_owned()),
            (3, count) => Self::Taken(u32::from_le_bytes(count.try_into().map_err(|_| nonsense())?)),
            (4, _) => Self::Output(bytes),
            (5, _) => Self::Errors(bytes),
            (6, [0, status]) => Self::Ended(End::Status(*status)),
            (6, [1, signal]) => Self::Ended(End::Signal(*signal)),
            _ => return Err(nonsense()),
        };
        Ok(Some(message))
    }
}

impl Run {
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut text = |text: &[u8]| {
            bytes.extend((text.len() as u32).to_le_bytes());
            bytes.extend(text);
        };
        // What is absent is empty: no directory, user or terminal is called that.
        text(self.directory.as_deref().unwrap_or_default());
        text(self.user.as_deref().unwrap_or_default());
        match &self.terminal {
            None => text(b""),
            Some(Terminal { name, size: (rows, columns) }) => {
                text(&[&rows.to_le_bytes()[..], &columns.to_le_bytes()[..], name].concat());
            }
        }
        text(&(self.command.len() as u32).to_le_bytes());
        self.command.iter().chain(&self.environment).for_each(|word| text(word));
        bytes
    }

    fn from_fields(fields: &mut Fields<'_>) -> io::Result<Self> {
        let some = |text: Vec<u8>| (!text.is_empty()).then_some(text);
        let (directory, user, terminal) = (some(fields.text()?), some(fields.text()?), some(fields.text()?));
        let terminal = terminal.map(|bytes| {
            let mut fields = Fields(&bytes);
            let size = (fields.u16()?, fields.u16()?);
            Ok::<_, io::Error>(Terminal { name: fields.0.to_vec(), size })
        });
        let count = fields.text()?;
        let count = u32::from_le_bytes(count.try_into().map_err(|_| nonsense())?) as usize;
        let mut words = Vec::new();
        while !fields.0.is_empty() {
            words.push(fields.text()?);
        }
        if count > words.len() {
            return Err(nonsense());
        }
        let environment = words.split_off(count);
        Ok(Self { command: words, environment, directory, user, terminal: terminal.transpose()? })
    }
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or_else(nonsense)?;
        self.0 = rest;
        Ok(*bytes)
    }

    fn u16(&mut self) -> io::Result<u16> {
        self.take().map(u16::from_le_bytes)
    }

    fn text(&mut self) -> io::Result<Vec<u8>> {
        let len = u32::from_le_bytes(self.take()?) as usize;
        let (text, rest) = self.0.split_at_checked(len).ok_or_else(nonsense)?;
        self.0 = rest;
        Ok(text.to_vec())
    }

    fn end(&self) -> io::Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(nonsense()) }
    }
}

fn nonsense() -> io::Error {
    io::Error::new(ErrorKind::InvalidData, "the other side does not speak the agent's protocol")
}

fn send(to: &mut impl Write, kind: u8, bytes: &[u8]) -> io::Result<()> {
    if bytes.len() > LONGEST {
        return Err(io::Error::new(ErrorKind::InvalidInput, "the command is longer than 2 MiB"));
    }
    let mut message = Vec::with_capacity(5 + bytes.len());
    message.push(kind);
    message.extend((bytes.len() as u32).to_le_bytes());
    message.extend(bytes);
    to.write_all(&message)
}

/// One message, or the end between two.
fn receive(from: &mut impl Read) -> io::Result<Option<(u8, Vec<u8>)>> {
    let mut kind = [0];
    loop {
        match from.read(&mut kind) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let mut len = [0; 4];
    from.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len) as usize;
    if len > LONGEST {
        return Err(nonsense());
    }
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes)?;
    Ok(Some((kind[0], bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_received() {
        let word = |text: &str| text.as_bytes().to_vec();
        let run = Run {
            command: vec![word("sh"), word(""), vec![0xff]],
            environment: vec![word("A=b")],
            directory: Some(word("/tmp")),
            user: Some(word("ada")),
            terminal: Some(Terminal { name: word("xterm"), size: (24, 80) }),
        };
        let all = [
            ToAgent::Run(run),
            ToAgent::Run(Run::default()),
            ToAgent::Connect(22),
            ToAgent::Input(word("typed")),
            ToAgent::InputEnd,
            ToAgent::Resize(1, 2),
            ToAgent::Signal(-1),
        ];
        let mut stream = Vec::new();
        all.iter().for_each(|message| message.send(&mut stream).unwrap());
        let mut from = &stream[..];
        for message in &all {
            assert_eq!(ToAgent::receive(&mut from).unwrap().as_ref(), Some(message));
        }
        assert_eq!(ToAgent::receive(&mut from).unwrap(), None);
        let all = [
            FromAgent::Started,
            FromAgent::Failed(127, "no such command".into()),
            FromAgent::Taken(7),
            FromAgent::Output(word("out")),
            FromAgent::Errors(Vec::new()),
            FromAgent::Ended(End::Status(3)),
            FromAgent::Ended(End::Signal(9)),
        ];
        let mut stream = Vec::new();
        all.iter().for_each(|message| message.send(&mut stream).unwrap());
        let mut from = &stream[..];
        for message in &all {
            assert_eq!(FromAgent::receive(&mut from).unwrap().as_ref(), Some(message));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let long = [4, 0xff, 0xff, 0xff, 0x7f];
        for bytes in [&[9, 0, 0, 0, 0][..], &long, &[2, 1, 0, 0, 0, 7], &[1, 0], &[1, 4, 0, 0, 0, 9, 9, 9, 9]]
        {
            assert!(ToAgent::receive(&mut &bytes[..]).is_err(), "{bytes:?}");
        }
        for bytes in [&[9, 0, 0, 0, 0][..], &long, &[3, 1, 0, 0, 0, 7], &[6, 1, 0, 0, 0, 7], &[2, 0, 0, 0, 0]]
        {
            assert!(FromAgent::receive(&mut &bytes[..]).is_err(), "{bytes:?}");
        }
    }
}
