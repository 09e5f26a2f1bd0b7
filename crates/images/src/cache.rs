//! What was fetched, kept: files named by their digests, and records of which belong to what.
//!
//! ```text
//! lock            held while something is fetched, so that two processes do not do it twice
//! partial/        downloads under way, by digest: an interrupted one goes on where it was
//! files/          <digest>-<name>: complete and never changed
//! records/        <key>.json: which files a package or a guest is made of
//! ```
//!
//! Files and records appear by rename, whole and on disk, or not at all.

use std::fs::{self, File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::error::Error;
use crate::fetch::{sha256, sha256_of};
use crate::progress::Progress;

/// What is in nobody's record is removed after this time: a process may just be about to use it.
const KEEP_UNUSED: Duration = Duration::from_secs(24 * 3600);
/// Records are small; a larger one is not ours.
const LARGEST_RECORD: u64 = 1 << 20;

/// A file in the cache, as records name it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// Its name in `files/`.
    pub file: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its SHA-256, in hexadecimal.
    pub sha256: String,
}

/// A directory of fetched things.
#[derive(Debug, Clone)]
pub struct Cache {
    dir: PathBuf,
}

/// While this lives, no other process fetches into the same cache.
pub struct Lock {
    _file: File,
}

impl Cache {
    /// The cache in `dir`, or in the user's usual place: `$LODGE_CACHE_DIR`, else `lodge` in `$XDG_CACHE_HOME` or in
    /// `~/.cache`. Nothing is made until something is stored.
    pub fn open(dir: Option<&Path>) -> Result<Self, Error> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let absolute = |path: &PathBuf| path.is_absolute();
        let dir = dir
            .map(Path::to_owned)
            .or_else(|| variable("LODGE_CACHE_DIR"))
            .or_else(|| variable("XDG_CACHE_HOME").filter(absolute).map(|base| base.join("lodge")))
            .or_else(|| variable("HOME").map(|home| home.join(".cache/lodge")));
        Ok(Self { dir: dir.ok_or(Error::NoCacheDir)? })
    }

    /// The record `key`, if there is a sound one.
    pub fn record<T: DeserializeOwned>(&self, key: &str) -> Option<T> {
        let mut bytes = Vec::new();
        let file = File::open(self.record_path(key)).ok()?;
        file.take(LARGEST_RECORD).read_to_end(&mut bytes).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// The path of a stored file, if it is there and is what it was when it was stored.
    pub fn path(&self, stored: &Stored) -> Option<PathBuf> {
        if stored.file.contains('/') || stored.file.starts_with('.') {
            return None;
        }
        let path = self.dir.join("files").join(&stored.file);
        let mut file = File::open(&path).ok()?;
        let sound = file.metadata().ok()?.len() == stored.size && sha256_of(&mut file).ok()? == stored.sha256;
        sound.then_some(path)
    }

    /// Waits until no other process fetches into this cache.
    pub fn lock(&self, progress: &mut dyn Progress) -> Result<Lock, Error> {
        for dir in ["partial", "files", "records"] {
            let dir = self.dir.join(dir);
            fs::create_dir_all(&dir).map_err(Error::cache(&dir))?;
        }
        let path = self.dir.join("lock");
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::cache(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                progress.begin("waiting for another process to fetch", None);
                let locked = file.lock();
                progress.finish();
                locked.map_err(Error::cache(&path))?;
            }
            Err(TryLockError::Error(error)) => return Err(Error::cache(&path)(error)),
        }
        Ok(Lock { _file: file })
    }

    /// Where to download a file of this digest to. The lock is to be held.
    pub fn partial(&self, sha256: &str, _lock: &Lock) -> PathBuf {
        self.dir.join("partial").join(sha256)
    }

    /// Keeps `bytes` as a file whose name ends in `name`.
    pub fn store(&self, name: &str, bytes: &[u8], _lock: &Lock) -> Result<Stored, Error> {
        let sha256 = sha256(bytes);
        let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.+".contains(c) { c } else { '-' };
        let name: String = name.chars().map(plain).take(100).collect();
        let stored = Stored { file: format!("{}-{name}", &sha256[..16]), size: bytes.len() as u64, sha256 };
        if self.path(&stored).is_none() {
            self.write(&self.dir.join("files").join(&stored.file), bytes)?;
        }
        Ok(stored)
    }

    /// Writes the record `key`, and clears away what no record needs any more.
    pub fn set_record(&self, key: &str, record: &impl Serialize, lock: &Lock) -> Result<(), Error> {
        let path = self.record_path(key);
        let bytes = serde_json::to_vec_pretty(record).map_err(|error| Error::cache(&path)(error.into()))?;
        self.write(&path, &bytes)?;
        self.sweep(lock);
        Ok(())
    }

    fn record_path(&self, key: &str) -> PathBuf {
        self.dir.join("records").join(format!("{key}.json"))
    }

    /// Puts a whole file in place, or nothing.
    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), Error> {
        let parent = path.parent().unwrap_or(&self.dir);
        let attempt = || {
            let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(parent)?;
            file.write_all(bytes)?;
            file.as_file().sync_all()?;
            file.persist(path).map_err(|error| error.error)?;
            File::open(parent)?.sync_all()
        };
        attempt().map_err(Error::cache(path))
    }

    /// Removes files that are old and in no record: of earlier versions, or of processes that were killed. What cannot
    /// be removed stays.
    fn sweep(&self, _lock: &Lock) {
        let list = |dir: &str| fs::read_dir(self.dir.join(dir)).into_iter().flatten().flatten();
        let records: Vec<String> =
            list("records").filter_map(|entry| fs::read_to_string(entry.path()).ok()).collect();
        for entry in ["partial", "files", "records"].into_iter().flat_map(list) {
            let name = entry.file_name().to_string_lossy().into_owned();
            let modified =
                entry.metadata().and_then(|data| data.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            let old = modified.elapsed().is_ok_and(|age| age > KEEP_UNUSED);
            let used = name.ends_with(".json")
                || records.iter().any(|record| record.contains(&format!("\"{name}\"")));
            if old && !used {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}
