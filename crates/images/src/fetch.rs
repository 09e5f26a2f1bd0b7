//! Getting files from archives, over HTTP, HTTPS or from a directory (`file:`): bounded, resumed where the connection
//! breaks, and checked against what the signed index says.

mod forward;
mod http;
mod proxy;
mod resume;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::apt::AptConf;
use crate::error::Error;
use crate::progress::Progress;
use crate::release::Expected;
use http::Ask;
pub use proxy::Proxies;

/// Why a file could not be had.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The archive has no such file.
    #[error("{url} does not exist; check the mirror and the suite")]
    NotFound {
        /// What was asked for.
        url: String,
    },
    /// The server refuses, or fails.
    #[error(
        "{url} cannot be had: the server says {status}; try again later, or choose another mirror with --mirror URL"
    )]
    Status {
        /// What was asked for.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// The server cannot be reached, or the connection breaks each time.
    #[error(
        "{url} cannot be had: {reason}; check the network and the proxy settings, or choose another mirror with \
         --mirror URL"
    )]
    Connection {
        /// What was asked for.
        url: String,
        /// What the system or the library says.
        reason: String,
    },
    /// The server sends us somewhere that we do not go: in circles, from HTTPS to HTTP, or to another kind of URL.
    #[error("{url} leads to {to}, which is not followed; choose another mirror with --mirror URL")]
    Redirect {
        /// What was asked for.
        url: String,
        /// Where it leads.
        to: String,
    },
    /// The file goes on after the size that the index states, or after what is sensible.
    #[error(
        "{url} is larger than the {limit} bytes that are expected; choose another mirror with --mirror URL"
    )]
    TooLarge {
        /// What was asked for.
        url: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// The file has another size than the signed index states.
    #[error(
        "{url} has {size} bytes and not the {expected} of the signed index, as when a mirror is being updated; try again \
         later, or choose another mirror with --mirror URL"
    )]
    WrongSize {
        /// What was asked for.
        url: String,
        /// What the server has.
        size: u64,
        /// What the index states.
        expected: u64,
    },
    /// The file is not the one that the signed index describes.
    #[error(
        "{url} is damaged: its SHA-256 is not the one in the signed index; try again, or choose another mirror with \
         --mirror URL"
    )]
    Corrupt {
        /// What was asked for.
        url: String,
    },
    /// The server has another version than the one that was begun.
    #[error("{url} changes while it is fetched; try again later")]
    Changed {
        /// What was asked for.
        url: String,
    },
    /// Not a URL that we can read.
    #[error("{url} is not a URL of the kind http://, https:// or file:; correct it")]
    BadUrl {
        /// What was given.
        url: String,
    },
}

impl FetchError {
    /// Whether another try may help.
    fn is_passing(&self) -> bool {
        match self {
            Self::Connection { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 416 | 429 | 500..=599),
            Self::Changed { .. } => true,
            _ => false,
        }
    }
}

/// A file being read, from `offset` on, and its whole size where that is known.
struct Stream {
    reader: Box<dyn Read>,
    offset: u64,
    size: Option<u64>,
    /// What tells this version of the file from others: a strong ETag, or a date (RFC 9110, section 8.8).
    version: Option<String>,
}

/// Gets files.
pub struct Fetcher {
    http: http::Client,
    /// How often one file is tried without getting any further.
    tries: u32,
    /// How long to wait after the first failure; longer after each one more.
    pause: Duration,
}

impl Fetcher {
    /// A fetcher that goes through the proxies of the host's configuration.
    pub fn new(conf: &AptConf) -> Self {
        let variable = |name: &str| std::env::var(name).ok();
        Self {
            http: http::Client::new(Proxies::new(conf, variable), conf),
            tries: 4,
            pause: Duration::from_millis(500),
        }
    }

    /// Gets a small file, of at most `limit` bytes, whole.
    pub fn small(&self, url: &str, limit: u64) -> Result<Vec<u8>, FetchError> {
        self.small_as(url, limit, None)
    }

    /// The same, in one of the forms that `accept` names.
    pub fn small_as(&self, url: &str, limit: u64, accept: Option<&str>) -> Result<Vec<u8>, FetchError> {
        let attempt = || {
            let mut bytes = Vec::new();
            let read = self
                .open(url, &Ask { accept, ..Ask::default() })?
                .reader
                .take(limit + 1)
                .read_to_end(&mut bytes);
            read.map_err(|error| FetchError::Connection { url: url.to_owned(), reason: error.to_string() })?;
            match bytes.len() as u64 > limit {
                true => Err(FetchError::TooLarge { url: url.to_owned(), limit }),
                false => Ok(bytes),
            }
        };
        let mut failures = 0;
        loop {
            match attempt() {
                Err(error) if error.is_passing() && failures + 1 < self.tries => {
                    failures += 1;
                    std::thread::sleep(self.pause * failures);
                }
                result => return result,
            }
        }
    }

    /// Gets a file of known size and digest into `path`, going on with what is there already from an earlier try.
    /// Gives the complete, checked file, at its beginning.
    pub fn download(
        &self,
        url: &str,
        expected: &Expected,
        path: &Path,
        progress: &mut dyn Progress,
    ) -> Result<File, Error> {
        let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = options.map_err(Error::cache(path))?;
        let found = file.metadata().map_err(Error::cache(path))?.len();
        // Something of another size is of no use, and neither is a remainder that turns out not to fit.
        let mut old = if found > expected.size { restart(&mut file, path)? } else { found };
        let mut farthest = old;
        let mut failures = 0;
        progress.advance(old);
        loop {
            let mut target = Target { file: &mut file, path, url, size: expected.size, farthest, progress };
            let result = self.append(&mut target);
            let length = file.metadata().map_err(Error::cache(path))?.len();
            match result {
                Ok(()) if sha256_of(&mut file).map_err(Error::cache(path))? == expected.sha256 => {
                    file.seek(SeekFrom::Start(0)).map_err(Error::cache(path))?;
                    return Ok(file);
                }
                Ok(()) if old > 0 => old = restart(&mut file, path)?,
                Ok(()) => {
                    restart(&mut file, path)?;
                    return Err(FetchError::Corrupt { url: url.to_owned() }.into());
                }
                Err(Error::Fetch(error)) if error.is_passing() => {
                    failures = if length > farthest { 0 } else { failures + 1 };
                    if failures >= self.tries {
                        return Err(error.into());
                    }
                    std::thread::sleep(self.pause * failures);
                }
                Err(error) => return Err(error),
            }
            farthest = farthest.max(length);
        }
    }

    /// Appends what is missing; breaks off where the connection does.
    fn append(&self, target: &mut Target) -> Result<(), Error> {
        let Target { file, path, url, size, farthest, progress } = target;
        let (path, url, size): (&Path, &str, u64) = (path, url, *size);
        let mut at = file.seek(SeekFrom::End(0)).map_err(Error::cache(path))?;
        if at == size && size > 0 {
            return Ok(());
        }
        let mut stream = self.open(url, &Ask { offset: at, ..Ask::default() })?;
        if let Some(other) = stream.size.filter(|other| *other != size) {
            restart(file, path)?;
            return Err(FetchError::WrongSize { url: url.to_owned(), size: other, expected: size }.into());
        }
        if stream.offset != at {
            at = restart(file, path)?;
        }
        let broken = |reason: String| FetchError::Connection { url: url.to_owned(), reason };
        let mut buffer = vec![0; 64 << 10];
        loop {
            let read = match stream.reader.read(&mut buffer) {
                Ok(0) if at == size => return Ok(()),
                Ok(0) => {
                    return Err(broken(format!("the connection ended after {at} of {size} bytes")).into());
                }
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(broken(error.to_string()).into()),
            };
            if read as u64 > size - at {
                restart(file, path)?;
                return Err(FetchError::TooLarge { url: url.to_owned(), limit: size }.into());
            }
            file.write_all(&buffer[..read]).map_err(Error::cache(path))?;
            at += read as u64;
            progress.advance(at.saturating_sub((*farthest).max(at - read as u64)));
        }
    }

    /// Opens `url` where it is asked for, or at its beginning where the server cannot do otherwise.
    fn open(&self, url: &str, ask: &Ask) -> Result<Stream, FetchError> {
        if let Some(path) = url.strip_prefix("file:") {
            return open_local(url, path, ask.offset);
        }
        if url.starts_with("http://") || url.starts_with("https://") {
            return self.http.get(url, ask);
        }
        Err(FetchError::BadUrl { url: url.to_owned() })
    }

    /// Sets how often and at what intervals a failed transfer is tried again.
    #[doc(hidden)]
    pub fn patience(mut self, tries: u32, pause: Duration) -> Self {
        (self.tries, self.pause) = (tries, pause);
        self
    }
}

/// Where a download goes.
struct Target<'a> {
    file: &'a mut File,
    path: &'a Path,
    url: &'a str,
    size: u64,
    /// How many bytes the watcher was told of.
    farthest: u64,
    progress: &'a mut dyn Progress,
}

fn restart(file: &mut File, path: &Path) -> Result<u64, Error> {
    if file.metadata().is_ok_and(|about| about.len() == 0) {
        return file.seek(SeekFrom::Start(0)).map_err(Error::cache(path));
    }
    file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).map_err(Error::cache(path))
}

fn open_local(url: &str, path: &str, offset: u64) -> Result<Stream, FetchError> {
    // `file:/path`, `file:///path`, and `file://localhost/path`.
    let path = path.strip_prefix("//").map_or(path, |rest| rest.strip_prefix("localhost").unwrap_or(rest));
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => FetchError::NotFound { url: url.to_owned() },
        _ => FetchError::Connection { url: url.to_owned(), reason: error.to_string() },
    };
    let mut file = File::open(PathBuf::from(path)).map_err(failed)?;
    let about = file.metadata().map_err(failed)?;
    file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    let version = about.modified().map(|time| format!("{time:?}")).ok();
    Ok(Stream { reader: Box::new(file), offset, size: Some(about.len()), version })
}

/// The SHA-256 of all that `input` gives from its beginning, in hexadecimal.
pub(crate) fn sha256_of(input: &mut (impl Read + Seek)) -> io::Result<String> {
    input.seek(SeekFrom::Start(0))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match input.read(&mut buffer)? {
            0 => return Ok(hexadecimal(&hash.finalize())),
            read => hash.update(&buffer[..read]),
        }
    }
}

/// The SHA-256 of `bytes`, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
