//! What was fetched, kept: files named by their digests, and records of which belong to what.
//!
//! ```text
//! lock            held while something is fetched, so that two processes do not do it twice
//! partial/        downloads under way, by digest: an interrupted one goes on where it was
//! files/          <digest>-<name>: complete and never changed
//! records/        <key>.json: which files a package or a guest is made of
//! systems/        whole systems on disks, each a directory, made by the crate `systems`
//! ```
//!
//! Files and records appear by rename, whole and on disk, or not at all.

use std::fs::{self, File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

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

/// The record of a file that was made from another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// The SHA-256 of the other.
    pub from: String,
    /// The file.
    pub stored: Stored,
}

/// A directory of fetched things: the user's, which all processes share.
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

    /// Where whole systems are kept.
    pub fn systems(&self) -> PathBuf {
        self.dir.join("systems")
    }

    /// Where images are kept that were fetched as they are.
    pub fn images(&self) -> PathBuf {
        self.dir.join("images")
    }

    /// The record `key`, if there is a sound one.
    pub(crate) fn record<T: DeserializeOwned>(&self, key: &str) -> Option<T> {
        let mut bytes = Vec::new();
        let file = File::open(self.record_path(key)).ok()?;
        file.take(LARGEST_RECORD).read_to_end(&mut bytes).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// The sound records whose keys begin with `prefix`, by key.
    pub(crate) fn records<T: DeserializeOwned>(&self, prefix: &str) -> Vec<(String, T)> {
        let keys = self.list("records").filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some(name.strip_suffix(".json").filter(|key| key.starts_with(prefix))?.to_owned())
        });
        let mut keys: Vec<String> = keys.collect();
        keys.sort();
        keys.into_iter().filter_map(|key| Some((key.clone(), self.record(&key)?))).collect()
    }

    /// Removes the record `key`, and the file in it unless another record has it.
    pub(crate) fn forget(&self, key: &str, stored: &Stored, _lock: &Lock) -> Result<(), Error> {
        let path = self.record_path(key);
        fs::remove_file(&path).map_err(Error::cache(&path))?;
        let name = format!("\"{}\"", stored.file);
        let mut texts = self.list("records").filter_map(|entry| fs::read_to_string(entry.path()).ok());
        if !stored.file.contains('/') && !texts.any(|text| text.contains(&name)) {
            let path = self.dir.join("files").join(&stored.file);
            fs::remove_file(&path).map_err(Error::cache(&path))?;
        }
        Ok(())
    }

    /// The path of a stored file, if it is there and is what it was when it was stored.
    pub(crate) fn path(&self, stored: &Stored) -> Option<PathBuf> {
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
        for dir in ["partial", "files", "records", "systems", "images"] {
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
    pub(crate) fn partial(&self, sha256: &str, _lock: &Lock) -> PathBuf {
        self.dir.join("partial").join(sha256)
    }

    /// Keeps `bytes` as a file whose name ends in `name`.
    pub(crate) fn store(&self, name: &str, bytes: &[u8], _lock: &Lock) -> Result<Stored, Error> {
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
    pub(crate) fn set_record(&self, key: &str, record: &impl Serialize, lock: &Lock) -> Result<(), Error> {
        let path = self.record_path(key);
        let bytes = serde_json::to_vec_pretty(record).map_err(|error| Error::cache(&path)(error.into()))?;
        self.write(&path, &bytes)?;
        self.sweep(lock);
        Ok(())
    }

    fn record_path(&self, key: &str) -> PathBuf {
        self.dir.join("records").join(format!("{key}.json"))
    }

    /// What is in a directory of the cache.
    fn list(&self, dir: &str) -> impl Iterator<Item = fs::DirEntry> + use<> {
        fs::read_dir(self.dir.join(dir)).into_iter().flatten().flatten()
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

    /// Removes what is old and of no use: files in no record, of earlier versions or of processes that were killed, and
    /// records of what was made from a file that no package has any more. What cannot be removed stays.
    fn sweep(&self, _lock: &Lock) {
        let old = |entry: &fs::DirEntry| {
            let modified = entry.metadata().and_then(|data| data.modified());
            modified.is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age > KEEP_UNUSED))
        };
        let mut records: Vec<(fs::DirEntry, String)> = Vec::new();
        for entry in self.list("records") {
            match fs::read_to_string(entry.path()) {
                Ok(text) if !entry.file_name().to_string_lossy().starts_with('.') => {
                    records.push((entry, text))
                }
                _ if old(&entry) => drop(fs::remove_file(entry.path())),
                _ => {}
            }
        }
        let origin = |text: &str| Some(serde_json::from_str::<Made>(text).ok()?.from);
        let packages: Vec<String> =
            records.iter().map(|(_, text)| text.clone()).filter(|text| origin(text).is_none()).collect();
        records.retain(|(entry, text)| {
            let orphan = origin(text).is_some_and(|from| !packages.iter().any(|text| text.contains(&from)));
            !(orphan && old(entry) && fs::remove_file(entry.path()).is_ok())
        });
        for entry in ["partial", "files"].into_iter().flat_map(|dir| self.list(dir)) {
            let name = format!("\"{}\"", entry.file_name().to_string_lossy());
            if old(&entry) && !records.iter().any(|(_, text)| text.contains(&name)) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    use crate::progress::Silent;

    /// Makes everything in the cache look as if it had been there for long.
    fn age(cache: &Cache) {
        let long_ago = SystemTime::now() - 2 * KEEP_UNUSED;
        for dir in ["partial", "files", "records"] {
            for entry in fs::read_dir(cache.dir.join(dir)).unwrap() {
                File::options()
                    .write(true)
                    .open(entry.unwrap().path())
                    .unwrap()
                    .set_modified(long_ago)
                    .unwrap();
            }
        }
    }

    #[test]
    fn what_nobody_needs_goes_after_a_while_and_the_rest_stays() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(Some(dir.path())).unwrap();
        let lock = cache.lock(&mut Silent).unwrap();
        let kernel = cache.store("vmlinuz", b"one", &lock).unwrap();
        cache.set_record("package", &kernel, &lock).unwrap();
        let stored = cache.store("vmlinux", b"one, unpacked", &lock).unwrap();
        cache
            .set_record("made", &Made { from: kernel.sha256.clone(), stored: stored.clone() }, &lock)
            .unwrap();
        fs::write(cache.partial("0123", &lock), b"half").unwrap();
        fs::write(dir.path().join("files/.new-x"), b"half").unwrap();
        // All of it is new: a process that was killed may have a successor that goes on.
        cache.sweep(&lock);
        assert!(cache.partial("0123", &lock).exists());
        age(&cache);
        cache.sweep(&lock);
        assert!(!cache.partial("0123", &lock).exists() && !dir.path().join("files/.new-x").exists());
        assert!(cache.path(&kernel).is_some() && cache.path(&stored).is_some());
        // A new kernel takes the old one's place, and what was made of that goes too.
        let newer = cache.store("vmlinuz", b"two", &lock).unwrap();
        cache.set_record("package", &newer, &lock).unwrap();
        assert!(cache.path(&kernel).is_none() && cache.path(&stored).is_none());
        assert!(cache.path(&newer).is_some() && cache.record::<Made>("made").is_none());
    }
}
