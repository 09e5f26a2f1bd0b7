//! Getting a disk image by its URL: resumed where an earlier attempt was broken off, checked against a checksum, unpacked.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256, Sha512};

use crate::apt::AptConf;
use crate::cache::{Cache, Lock};
use crate::fetch::{FetchError, Fetcher, hexadecimal, sha256};
use crate::progress::Progress;
use crate::{Error, Options};

/// Bytes of a file of checksums: that of a whole mirror's directory is smaller.
const LARGEST_SUMS: u64 = 4 << 20;
/// Memory that unpacking may take, in KiB: `xz -9` needs 64 MiB.
const XZ_MEMORY_KIB: u32 = 256 << 10;
/// What is left out where an unpacked image is zero.
const HOLE: usize = 64 << 10;

/// Why an image could not be had; what a transfer can fail with is [`Error::Fetch`]'s.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The server does not have it.
    #[error("{url} does not exist; check the address, or correct it in the catalogue")]
    NotFound {
        /// What was asked for.
        url: String,
    },
    /// The server cannot be reached, or does not answer as it should.
    #[error(
        "{url} cannot be had: {reason}; check the network and the proxy settings, and try again: what has arrived is kept"
    )]
    Server {
        /// What was asked for.
        url: String,
        /// What happened.
        reason: String,
    },
    /// It was given another checksum than it has.
    #[error(
        "{url} is not what was expected: its checksum is {found}, and not {expected}; it was removed, so try again, and if that \
        does not help ask who published it"
    )]
    Wrong {
        /// What was fetched.
        url: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// There is no checksum beside it, and none was given.
    #[error(
        "there is no checksum for {url}; give the one that its publisher states with --sha256, or --unverified to do without"
    )]
    NoSum {
        /// What was to be fetched.
        url: String,
    },
    /// The file of checksums does not know it.
    #[error("{sums} has no checksum for {file}; correct the catalogue, or give one with --sha256")]
    NotListed {
        /// The file of checksums.
        sums: String,
        /// The image's name.
        file: String,
    },
    /// That is no checksum.
    #[error("\"{0}\" is no SHA-256; give 64 hexadecimal digits")]
    BadSum(String),
    /// The disk is full.
    #[error("there is no room for {url} in {}; make room and try again: what has arrived is kept", path.display())]
    Full {
        /// What was to be fetched.
        url: String,
        /// Where to.
        path: PathBuf,
    },
    /// It cannot be unpacked.
    #[error("{url} cannot be unpacked: {reason}; unpack it yourself and start the file")]
    Packed {
        /// What was fetched.
        url: String,
        /// What is wrong.
        reason: String,
    },
}

/// How an image is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// It has this SHA-256, in hexadecimal.
    Sha256(String),
    /// Its checksum is in this file.
    Sums(String),
    /// Its checksum is beside it: in `URL.sha256`, `URL.sha512`, or in `SHA256SUMS` or `SHA512SUMS` in its directory.
    Beside,
    /// Not at all.
    Unverified,
}

/// An image in the cache's work space.
#[derive(Debug)]
pub struct Pulled {
    /// It, for the caller to move away.
    pub path: PathBuf,
    /// The checksum that it was checked with, before it was unpacked.
    pub checksum: Option<String>,
}

/// Fetches the image at `url` into the cache's work space.
pub fn pull(
    url: &str,
    check: &Check,
    options: &Options,
    cache: &Cache,
    lock: &Lock,
    progress: &mut dyn Progress,
) -> Result<Pulled, Error> {
    let conf = AptConf::load(&options.sysroot);
    let fetcher = Fetcher::new(&conf);
    let fetcher = match options.patience {
        Some((tries, pause)) => fetcher.patience(tries, pause),
        None => fetcher,
    };
    let expected = expected(&fetcher, url, check)?;
    let path = cache.partial(&sha256(url.as_bytes()), lock);
    let mut resumed = path.exists();
    loop {
        progress.begin(&format!("fetching {}", file_name(url)), None);
        let fetched = fetcher.resume(url, &path, progress);
        progress.finish();
        let mut file = fetched.map_err(|error| told(error, url))?;
        let Some(expected) = &expected else { break };
        progress
            .begin(&format!("checking {}", file_name(url)), file.metadata().ok().map(|about| about.len()));
        let found = digest(&mut file, expected.len() == 128, progress).map_err(Error::cache(&path));
        progress.finish();
        let found = found?;
        if found == *expected {
            break;
        }
        fs::remove_file(&path).map_err(Error::cache(&path))?;
        // What was there before may have been of another version of it.
        if !std::mem::take(&mut resumed) {
            let expected = expected.clone();
            return Err(PullError::Wrong { url: url.to_owned(), expected, found }.into());
        }
    }
    let unpacked = unpack(&path, url, progress)?;
    Ok(Pulled { path: unpacked, checksum: expected })
}

/// Turns what the transfer says into what it means here.
pub(crate) fn told(error: Error, url: &str) -> Error {
    let server = |reason: String| PullError::Server { url: url.to_owned(), reason }.into();
    match error {
        Error::Fetch(FetchError::NotFound { url }) => PullError::NotFound { url }.into(),
        Error::Fetch(FetchError::Status { status, .. }) => server(format!("the server says {status}")),
        Error::Fetch(FetchError::Connection { reason, .. }) => server(reason),
        Error::Fetch(FetchError::Redirect { to, .. }) => {
            server(format!("it leads to {to}, which is not followed"))
        }
        Error::Cache { path, source } if source.kind() == io::ErrorKind::StorageFull => {
            PullError::Full { url: url.to_owned(), path }.into()
        }
        other => other,
    }
}

/// The checksum that the image must have.
fn expected(fetcher: &Fetcher, url: &str, check: &Check) -> Result<Option<String>, Error> {
    let get =
        |url: &str| fetcher.small(url, LARGEST_SUMS).map(|text| String::from_utf8_lossy(&text).into_owned());
    let name = file_name(url);
    match check {
        Check::Unverified => Ok(None),
        Check::Sha256(sum) if is_sum(sum) && sum.len() == 64 => Ok(Some(sum.to_ascii_lowercase())),
        Check::Sha256(sum) => Err(PullError::BadSum(sum.clone()).into()),
        Check::Sums(sums) => {
            let text = get(sums).map_err(|error| told(error.into(), sums))?;
            let not_listed = || PullError::NotListed { sums: sums.clone(), file: name.to_owned() };
            Ok(Some(find(&text, name).ok_or_else(not_listed)?))
        }
        Check::Beside => {
            let folder = &url[..url.len() - name.len()];
            let places = [
                format!("{url}.sha256"),
                format!("{url}.sha512"),
                format!("{folder}SHA256SUMS"),
                format!("{folder}SHA512SUMS"),
            ];
            for place in places {
                match get(&place) {
                    Ok(text) => match find(&text, name) {
                        Some(sum) => return Ok(Some(sum)),
                        None => continue,
                    },
                    Err(
                        FetchError::NotFound { .. } | FetchError::Status { .. } | FetchError::TooLarge { .. },
                    ) => {}
                    Err(error) => return Err(told(error.into(), &place)),
                }
            }
            Err(PullError::NoSum { url: url.to_owned() }.into())
        }
    }
}

/// The last part of a URL's path.
fn file_name(url: &str) -> &str {
    url.rsplit('/').next().unwrap_or(url)
}

fn is_sum(text: &str) -> bool {
    matches!(text.len(), 64 | 128) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The checksum of `name` in a file of them: lines as sha256sum's (`SUM  NAME`), as BSD's (`SHA256 (NAME) = SUM`), or one sum alone.
fn find(text: &str, name: &str) -> Option<String> {
    let mut words = text.split_whitespace();
    if let (Some(sum), None) = (words.next(), words.next()) {
        return is_sum(sum).then(|| sum.to_ascii_lowercase());
    }
    let of_line = |line: &str| -> Option<String> {
        let sum = match line.split_once(" (") {
            Some(("SHA256" | "SHA512", rest)) => rest.strip_prefix(name)?.strip_prefix(") = ")?,
            _ => {
                let (sum, rest) = line.split_once(' ')?;
                let rest = rest.trim_start_matches([' ', '*']);
                (rest == name || rest.strip_prefix("./") == Some(name)).then_some(sum)?
            }
        };
        is_sum(sum.trim()).then(|| sum.trim().to_ascii_lowercase())
    };
    text.lines().find_map(|line| of_line(line.trim()))
}

fn digest(file: &mut File, long: bool, progress: &mut dyn Progress) -> io::Result<String> {
    fn all<D: Digest>(file: &mut File, progress: &mut dyn Progress) -> io::Result<String> {
        let (mut hash, mut buffer) = (D::new(), vec![0; 1 << 20]);
        file.seek(SeekFrom::Start(0))?;
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hexadecimal(&hash.finalize())),
                read => hash.update(&buffer[..read]),
            }
            progress.advance(buffer.len() as u64);
        }
    }
    if long { all::<Sha512>(file, progress) } else { all::<Sha256>(file, progress) }
}

/// Unpacks what is packed, into a file beside it; gives the path of the result.
fn unpack(path: &Path, url: &str, progress: &mut dyn Progress) -> Result<PathBuf, Error> {
    let mut magic = [0; 6];
    let mut input = File::open(path).map_err(Error::cache(path))?;
    let read = input.read(&mut magic).and_then(|_| input.seek(SeekFrom::Start(0)));
    read.map_err(Error::cache(path))?;
    let packed = |reason: String| PullError::Packed { url: url.to_owned(), reason };
    let input = BufReader::new(input);
    let mut reader: Box<dyn Read> = match magic {
        [0x1f, 0x8b, ..] => Box::new(flate2::read::MultiGzDecoder::new(input)),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => {
            Box::new(lzma_rust2::XzReader::new_mem_limit(input, true, XZ_MEMORY_KIB))
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(input);
            Box::new(decoder.map_err(|error| packed(error.to_string()))?)
        }
        [b'B', b'Z', b'h', ..] => return Err(packed("it is packed by bzip2".to_owned()).into()),
        [b'P', b'K', 3, 4, ..] => return Err(packed("it is a ZIP archive".to_owned()).into()),
        _ => return Ok(path.to_owned()),
    };
    let to = path.with_extension("unpacked");
    let mut output = File::create(&to).map_err(Error::cache(&to))?;
    progress.begin(&format!("unpacking {}", file_name(url)), None);
    let (mut buffer, mut size) = (vec![0; HOLE], 0);
    let done = loop {
        let read = match fill(&mut reader, &mut buffer) {
            Ok(0) => break output.set_len(size).map_err(Error::cache(&to)),
            Ok(read) => read,
            Err(error) => break Err(packed(error.to_string()).into()),
        };
        let block = &buffer[..read];
        let written = if block.iter().all(|byte| *byte == 0) {
            output.seek(SeekFrom::Current(read as i64)).map(|_| ())
        } else {
            output.write_all(block)
        };
        if let Err(error) = written {
            break Err(told(Error::cache(&to)(error), url));
        }
        size += read as u64;
        progress.advance(read as u64);
    };
    progress.finish();
    match done {
        // What was packed is of no more use.
        Ok(()) => fs::remove_file(path).map(|()| to).map_err(Error::cache(path)),
        Err(error) => {
            let _ = fs::remove_file(&to);
            Err(error)
        }
    }
}

/// Reads until the buffer is full or the input ends.
fn fill(input: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut have = 0;
    while have < buffer.len() {
        match input.read(&mut buffer[have..]) {
            Ok(0) => break,
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(have)
}

#[cfg(test)]
mod tests {
    use super::find;

    #[test]
    fn checksums_are_found_in_all_forms() {
        let (a, b) = ("a".repeat(64), "B".repeat(128));
        assert_eq!(find(&format!("{a}\n"), "x.img"), Some(a.clone()));
        assert_eq!(find(&format!("{b}  y.img\n{a}  x.img\n"), "x.img"), Some(a.clone()));
        assert_eq!(find(&format!("{b} *x.img\n"), "x.img"), Some(b.to_lowercase()));
        assert_eq!(find(&format!("{a}  ./x.img\n{a}  y"), "x.img"), Some(a.clone()));
        let bsd =
            format!("-----BEGIN\n\n# x.img: 3 bytes\nSHA256 (y) = {b}\nSHA256 (x.img) = {a}\n-----END\n");
        assert_eq!(find(&bsd, "x.img"), Some(a.clone()));
        for text in ["", "x.img", &format!("{a}  xx.img\n{a} y\n"), &format!("{}  x.img\n", &a[1..])] {
            assert_eq!(find(text, "x.img"), None, "{text}");
        }
    }
}
