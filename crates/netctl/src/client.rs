use std::io::{self, BufRead, BufReader, ErrorKind, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::{Answer, LONGEST_ANSWER, LONGEST_REQUEST, MOST_QUEUES, Request};

/// How long the helper may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why the helper did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("the network helper does not run: nobody listens at {}", .0.display())]
    Absent(PathBuf),
    #[error("the network helper at {} cannot be reached: {}", .0.display(), .1)]
    Unreachable(PathBuf, io::Error),
    #[error("the network helper went away: {0}")]
    Gone(#[from] io::Error),
    #[error(
        "the network helper answers with what this version of Lodge does not know; they must be of the same version"
    )]
    Unknown,
    #[error("more than a MiB is asked of the network helper at once; declare fewer networks in one file")]
    TooLong,
    #[error("{why}")]
    Refused { why: String, help: Option<String> },
}

/// A connection to the helper.
#[derive(Debug)]
pub struct Client(UnixStream);

impl Client {
    /// Connects to the helper that listens at `path`: see [`crate::socket`].
    ///
    /// # Errors
    /// Nobody listens there, or not to us.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let stream = UnixStream::connect(path).map_err(|error| match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => Error::Absent(path.into()),
            _ => Error::Unreachable(path.into(), error),
        })?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self(stream))
    }

    /// Has something done.
    ///
    /// # Errors
    /// It was not; [`Answer::Refused`] is one of them.
    pub fn ask(&mut self, request: &Request) -> Result<(Answer, Vec<OwnedFd>), Error> {
        let mut line = serde_json::to_vec(request).map_err(io::Error::from)?;
        line.push(b'\n');
        if line.len() > LONGEST_REQUEST {
            return Err(Error::TooLong);
        }
        self.0.write_all(&line)?;
        // Descriptors come with the first byte.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_QUEUES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut first = [0];
        let flags = RecvFlags::CMSG_CLOEXEC;
        recvmsg(&self.0, &mut [IoSliceMut::new(&mut first)], &mut control, flags).map_err(io::Error::from)?;
        let descriptors = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        let descriptors = descriptors.flatten().collect();
        // An answer is one line, and nothing follows before the next request.
        let rest = BufReader::new(&self.0);
        let mut answer = first.to_vec();
        rest.take(LONGEST_ANSWER as u64).read_until(b'\n', &mut answer)?;
        if !answer.ends_with(b"\n") {
            return Err(io::Error::from(ErrorKind::UnexpectedEof).into());
        }
        match serde_json::from_slice(&answer).map_err(|_| Error::Unknown)? {
            Answer::Refused { why, help } => Err(Error::Refused { why, help }),
            answer => Ok((answer, descriptors)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_may_be_longer_than_requests() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let notes = vec!["all is well".repeat(100); 2000];
        let answer = serde_json::to_string(&Answer::Done(notes.clone())).unwrap() + "\n";
        assert!(answer.len() > LONGEST_REQUEST);
        let helper = std::thread::spawn(move || {
            BufReader::new(&theirs).read_line(&mut String::new()).unwrap();
            (&theirs).write_all(answer.as_bytes()).unwrap();
        });
        let mut client = Client(ours);
        assert_eq!(client.ask(&Request::List).unwrap().0, Answer::Done(notes));
        helper.join().unwrap();
        let network = "n".repeat(LONGEST_REQUEST);
        assert!(matches!(client.ask(&Request::Leases { network }), Err(Error::TooLong)));
    }
}
