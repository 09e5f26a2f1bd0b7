//! Images that were fetched as they are: distributions' cloud images, or any other.
//!
//! ```text
//! images/NAME/disk         the image: nobody writes to it, VMs lie over it
//! images/NAME/about.json   where it comes from, and how it is started
//! ```

use std::fs::{self, File, Permissions, TryLockError};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use disks::Disk;
use images::{Cache, Check, Entry, Firmware, Options, Progress};
use serde::{Deserialize, Serialize};

use crate::Error;

const ABOUT: &str = "about.json";
const DISK: &str = "disk";
const UNFINISHED: &str = ".new-";

/// An image in the cache, as it was fetched.
#[derive(Debug, Clone)]
pub struct Pulled {
    /// Its name.
    pub name: String,
    /// The file.
    pub disk: PathBuf,
    /// What else is known of it.
    pub about: AboutPulled,
    /// Bytes that it takes on the host.
    pub size: u64,
}

/// What is written down of an image that was fetched.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AboutPulled {
    /// What it is, for people.
    pub title: String,
    /// Where it was fetched from.
    pub url: String,
    /// The SHA-256 or SHA-512 that it was checked with, before it was unpacked.
    pub checksum: Option<String>,
    /// When it was fetched, in seconds since 1970.
    pub fetched: u64,
    /// `raw` or `qcow2`.
    pub format: String,
    /// The size of its disk, in bytes.
    pub disk_size: u64,
    /// What starts it.
    pub firmware: Firmware,
    /// Who is there to log in.
    pub user: Option<String>,
}

/// Fetches an image and keeps it under `name`, in place of what has that name already. It appears whole or not at all.
pub fn pull(
    name: &str,
    entry: &Entry,
    check: &Check,
    options: &Options,
    progress: &mut dyn Progress,
) -> Result<Pulled, Error> {
    if !images::is_name(name) {
        return Err(Error::ImageName(name.into()));
    }
    let cache = Cache::open(options.cache_dir.as_deref())?;
    let lock = cache.lock(progress)?;
    let dir = place(&cache, name);
    let fetched = images::pull(&entry.url, check, options, &cache, &lock, progress)?;
    let image = Disk::open_alone(&fetched.path).inspect_err(|_| {
        // It would be refused again.
        let _ = fs::remove_file(&fetched.path);
    })?;
    let about = AboutPulled {
        title: entry.title.clone(),
        url: entry.url.clone(),
        checksum: fetched.checksum,
        fetched: SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs(),
        format: image.format().to_string(),
        disk_size: image.size(),
        firmware: entry.firmware,
        user: entry.user.clone(),
    };
    drop(image);
    settle(&cache, &dir, &fetched.path, &about).map_err(Error::file(&dir))?;
    find(name, options)?.ok_or_else(|| Error::ImageName(name.into()))
}

/// Puts an image in its place.
fn settle(cache: &Cache, dir: &Path, image: &Path, about: &AboutPulled) -> std::io::Result<()> {
    clear(&cache.images());
    let work = tempfile::Builder::new().prefix(UNFINISHED).tempdir_in(cache.images())?;
    let disk = work.path().join(DISK);
    fs::rename(image, &disk)?;
    fs::set_permissions(&disk, Permissions::from_mode(0o444))?;
    fs::write(work.path().join(ABOUT), serde_json::to_vec_pretty(about)?)?;
    File::open(&disk)?.sync_all()?;
    File::open(work.path().join(ABOUT))?.sync_all()?;
    // VMs that use the old one have it open, or have a name of their own for it.
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => fs::rename(work.keep(), dir)?,
    }
    File::open(cache.images())?.sync_all()
}

/// Removes what interrupted attempts left. The cache's lock is to be held.
fn clear(images: &Path) {
    for entry in fs::read_dir(images).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            // What cannot be removed is in nobody's way.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn place(cache: &Cache, name: &str) -> PathBuf {
    cache.images().join(name)
}

/// The image called `name`, if it is in the cache.
pub fn find(name: &str, options: &Options) -> Result<Option<Pulled>, Error> {
    if !images::is_name(name) {
        return Ok(None);
    }
    Ok(read(&place(&Cache::open(options.cache_dir.as_deref())?, name), name))
}

fn read(dir: &Path, name: &str) -> Option<Pulled> {
    let about = serde_json::from_slice(&fs::read(dir.join(ABOUT)).ok()?).ok()?;
    let disk = dir.join(DISK);
    // Blocks are of 512 bytes, whatever the file system's are (stat(2)).
    let size = fs::metadata(&disk).ok()?.blocks() * 512;
    Some(Pulled { name: name.to_owned(), disk, about, size })
}

/// All in the cache, by name.
pub fn list(options: &Options) -> Result<Vec<Pulled>, Error> {
    let images = Cache::open(options.cache_dir.as_deref())?.images();
    let entries = fs::read_dir(&images).into_iter().flatten().flatten();
    let mut found: Vec<Pulled> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok().filter(|name| images::is_name(name))?;
            read(&entry.path(), &name)
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Removes an image; `false` if there is none of that name. VMs with names keep it for themselves.
pub fn remove(name: &str, options: &Options, progress: &mut dyn Progress) -> Result<bool, Error> {
    let Some(found) = find(name, options)? else { return Ok(false) };
    let _lock = Cache::open(options.cache_dir.as_deref())?.lock(progress)?;
    let file = File::open(&found.disk).map_err(Error::file(&found.disk))?;
    // Whoever has it open holds a lock on it.
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            return Err(disks::Error::InUse { path: found.disk, write: false }.into());
        }
        Err(TryLockError::Error(error)) => return Err(Error::file(&found.disk)(error)),
        Ok(()) => {}
    }
    let dir = found.disk.parent().unwrap_or(&found.disk);
    fs::remove_dir_all(dir).map_err(Error::file(dir))?;
    Ok(true)
}
