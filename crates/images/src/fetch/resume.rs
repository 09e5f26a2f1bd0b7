//! Getting a large file of which nothing is known beforehand, in as many pieces as it takes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Ask, FetchError, Fetcher, restart};
use crate::error::Error;
use crate::progress::Progress;

/// What is remembered of a file beside it while it is fetched.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Begun {
    /// Which version of it was begun, as the server calls it.
    version: Option<String>,
    /// Its whole size.
    size: Option<u64>,
}

impl Fetcher {
    /// Gets `url` into `path`, going on with what is there already if the server still has the same version. The file is whole if
    /// the server said how large it is, and else as whole as the connection's end can tell.
    pub fn resume(&self, url: &str, path: &Path, progress: &mut dyn Progress) -> Result<File, Error> {
        let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = options.map_err(Error::cache(path))?;
        let notes = path.with_extension("begun");
        let mut farthest = file.metadata().map_err(Error::cache(path))?.len();
        let mut failures = 0;
        progress.advance(farthest);
        loop {
            let result = self.go_on(url, &mut file, path, &notes, &mut farthest, progress);
            match result {
                Ok(()) => {
                    let _ = fs::remove_file(&notes);
                    file.seek(SeekFrom::Start(0)).map_err(Error::cache(path))?;
                    return Ok(file);
                }
                Err((Error::Fetch(error), further)) if error.is_passing() => {
                    failures = if further { 0 } else { failures + 1 };
                    if failures >= self.tries {
                        return Err(error.into());
                    }
                    std::thread::sleep(self.pause * failures);
                }
                Err((error, _)) => return Err(error),
            }
        }
    }

    /// One attempt. On failure also says whether it got further than any before.
    fn go_on(
        &self,
        url: &str,
        file: &mut File,
        path: &Path,
        notes: &PathBuf,
        farthest: &mut u64,
        progress: &mut dyn Progress,
    ) -> Result<(), (Error, bool)> {
        let cache = |error| (Error::cache(path)(error), false);
        let begun: Begun =
            fs::read(notes).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        let mut at = file.seek(SeekFrom::End(0)).map_err(cache)?;
        if at > 0 && begun.size == Some(at) {
            return Ok(());
        }
        // Without a version nobody could tell what the beginning belongs to.
        if begun.version.is_none() {
            at = restart(file, path).map_err(|error| (error, false))?;
        }
        let stream =
            match self.open(url, &Ask { offset: at, version: begun.version.as_deref(), accept: None }) {
                Err(error @ FetchError::Status { status: 416, .. }) => {
                    restart(file, path).map_err(|error| (error, false))?;
                    return Err((error.into(), false));
                }
                other => other.map_err(|error| (error.into(), false))?,
            };
        let now = Begun { version: stream.version.clone(), size: stream.size };
        if stream.offset != 0 && (stream.offset != at || begun != now) {
            restart(file, path).map_err(|error| (error, false))?;
            return Err((FetchError::Changed { url: url.to_owned() }.into(), false));
        }
        if stream.offset == 0 {
            at = restart(file, path).map_err(|error| (error, false))?;
            let text = serde_json::to_vec(&now).unwrap_or_default();
            fs::write(notes, text).map_err(|error| (Error::cache(notes)(error), false))?;
        }
        if let Some(size) = now.size {
            progress.total(size);
        }
        copy(url, stream.reader, file, path, (at, now.size), farthest, progress)
    }
}

/// Appends all that the server gives to the `at` bytes that are there.
fn copy(
    url: &str,
    mut from: Box<dyn Read>,
    file: &mut File,
    path: &Path,
    (mut at, size): (u64, Option<u64>),
    farthest: &mut u64,
    progress: &mut dyn Progress,
) -> Result<(), (Error, bool)> {
    let mut further = false;
    let broken = |reason: String| FetchError::Connection { url: url.to_owned(), reason }.into();
    let mut buffer = vec![0; 256 << 10];
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) if size.is_none_or(|size| size == at) => return Ok(()),
            Ok(0) => {
                let size = size.unwrap_or_default();
                return Err((broken(format!("the connection ended after {at} of {size} bytes")), further));
            }
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err((broken(error.to_string()), further)),
        };
        file.write_all(&buffer[..read]).map_err(|error| (Error::cache(path)(error), further))?;
        at += read as u64;
        if at > *farthest {
            progress.advance(at - *farthest);
            (*farthest, further) = (at, true);
        }
    }
}
