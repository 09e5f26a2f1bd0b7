//! The user's side.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::{Answer, DiskStatus, LONGEST_LINE, Memory, NicStatus, PATIENCE, Request, Status, seconds};

/// Why a VM did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Refused {
    #[error("the virtual machine's process does not answer: {0}")]
    Gone(#[from] io::Error),
    #[error(
        "the virtual machine's process answers with what this version of Lodge does not know; use the version that started it"
    )]
    Unknown,
    #[error("{0}")]
    Told(String),
}

/// A connection to a running VM, good for one request.
#[derive(Debug)]
pub struct Client(BufReader<UnixStream>);

impl Client {
    /// Connects to the VM that listens at `path`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        super::server::through_directory(path, |short| UnixStream::connect(short))
            .map(|s| Self(BufReader::new(s)))
    }

    fn ask(&mut self, request: &Request) -> Result<Answer, Refused> {
        let stream = self.0.get_ref();
        let guest = match request {
            Request::DetachDisk { patience, .. } | Request::DetachNic { patience, .. } => seconds(*patience),
            // The network helper may take its time.
            Request::AttachNic(_) => Duration::from_secs(30),
            _ => Duration::ZERO,
        };
        stream.set_read_timeout(Some(PATIENCE + guest))?;
        let mut line = serde_json::to_vec(request).map_err(io::Error::from)?;
        line.push(b'\n');
        (&*stream).write_all(&line)?;
        let mut answer = Vec::new();
        (&mut self.0).take(LONGEST_LINE).read_until(b'\n', &mut answer)?;
        if answer.is_empty() {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        match serde_json::from_slice(&answer).map_err(|_| Refused::Unknown)? {
            Answer::Refused(why) => Err(Refused::Told(why)),
            answer => Ok(answer),
        }
    }

    /// Has something done.
    ///
    /// # Errors
    /// It was not.
    pub fn tell(mut self, request: &Request) -> Result<(), Refused> {
        match self.ask(request)? {
            Answer::Done => Ok(()),
            _ => Err(Refused::Unknown),
        }
    }

    /// What the VM is.
    ///
    /// # Errors
    /// It does not say.
    pub fn status(mut self) -> Result<Status, Refused> {
        match self.ask(&Request::Status)? {
            Answer::Status(status) => Ok(status),
            _ => Err(Refused::Unknown),
        }
    }

    /// How much memory the guest has, and is to have if that is given.
    ///
    /// # Errors
    /// It does not say, or does not follow.
    pub fn memory(mut self, target: Option<u64>) -> Result<Memory, Refused> {
        match self.ask(&Request::Memory(target))? {
            Answer::Memory(memory) => Ok(Memory { max: memory.max.max(memory.size), ..memory }),
            _ => Err(Refused::Unknown),
        }
    }

    /// The disks: all, or the one that is attached by this.
    ///
    /// # Errors
    /// There is none, or it is not attached.
    pub fn disks(mut self, request: &Request) -> Result<Vec<DiskStatus>, Refused> {
        match self.ask(request)? {
            Answer::Disks(disks) => Ok(disks),
            _ => Err(Refused::Unknown),
        }
    }

    /// The network cards: all, or the one that is attached by this.
    ///
    /// # Errors
    /// There is none, or it is not attached.
    pub fn nics(mut self, request: &Request) -> Result<Vec<NicStatus>, Refused> {
        match self.ask(request)? {
            Answer::Nics(nics) => Ok(nics),
            _ => Err(Refused::Unknown),
        }
    }

    /// Asks for a stream of bytes. What the VM sends is to be read from the reader; the writer's other half is it.
    ///
    /// # Errors
    /// There is none.
    pub fn stream(mut self, request: &Request) -> Result<(BufReader<UnixStream>, UnixStream), Refused> {
        match self.ask(request)? {
            Answer::Stream => {
                self.0.get_ref().set_read_timeout(None)?;
                let other = self.0.get_ref().try_clone()?;
                Ok((self.0, other))
            }
            _ => Err(Refused::Unknown),
        }
    }
}
