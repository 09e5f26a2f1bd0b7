//! Bases: systems that were made once, in the cache.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use images::{Bundle, Cache, Options, Progress};
use serde::{Deserialize, Serialize};

use crate::recipe::{self, Release};
use crate::{Error, build};

/// The kernel's command line. Without the self-tests of its cryptography, which take long where every instruction is executed by
/// software, and which only check that the kernel was built well.
const CMDLINE: &str = "root=LABEL=lodge-root rw console=ttyS0 quiet cryptomgr.notests";
/// What names a base that is being made.
const UNFINISHED: &str = ".new-";
/// What is written down of a base, in its directory.
const ABOUT: &str = "about.json";

/// A system that VMs start from. Nobody writes to its files.
#[derive(Debug, Clone)]
pub struct Base {
    /// The disk: a qcow2 image.
    pub disk: PathBuf,
    /// The kernel: a bzImage.
    pub kernel: PathBuf,
    /// The initial RAM disk for that: it finds the root file system by its label.
    pub initrd: PathBuf,
    /// The kernel's command line.
    pub cmdline: String,
    /// What it is, for people.
    pub description: String,
    /// Names and versions of the packages in it.
    pub packages: Vec<(String, String)>,
    /// Whether it was in the cache.
    pub cached: bool,
}

#[derive(Serialize, Deserialize)]
struct About {
    description: String,
    cmdline: String,
    /// Names and versions.
    packages: Vec<(String, String)>,
}

/// Gives the base of a release of Debian; makes it on `engine`, from the archive, if it is not in the cache.
///
/// It appears in the cache whole or not at all. An interrupted attempt leaves only what the next one goes on with or clears away.
pub fn debian(
    release: Release,
    options: &Options,
    engine: vm::Choice,
    progress: &mut dyn Progress,
) -> Result<Base, Error> {
    let options = release.options(options);
    let cache = Cache::open(options.cache_dir.as_deref())?;
    let Options { mirror, keyring, sysroot, .. } = &options;
    let what = format!("1 {mirror:?} {keyring:?} {sysroot:?} {CMDLINE} {}", recipe::text());
    let name = format!("debian-{}-{}", release.number(), &images::sha256(what.as_bytes())[..12]);
    let dir = cache.systems().join(name);
    if let Some(base) = read(&dir) {
        return Ok(base);
    }
    let lock = cache.lock(progress)?;
    // Another process may have made it while we waited.
    if let Some(base) = read(&dir) {
        return Ok(base);
    }
    clear(&cache.systems());
    let bundle = Bundle::fetch(&options, recipe::PACKAGES, &cache, &lock, progress)?;
    let work = tempfile::Builder::new().prefix(UNFINISHED).tempdir_in(cache.systems());
    let work = work.map_err(Error::file(cache.systems()))?;
    let release = build::build(&bundle, engine, work.path(), progress)?;
    let about = About {
        description: format!("{}, Linux {}", bundle.archive(), release),
        cmdline: CMDLINE.into(),
        packages: bundle.versions().map(|(name, version)| (name.to_owned(), version.to_owned())).collect(),
    };
    finish(work, &dir, &about).map_err(Error::file(&dir))?;
    bundle.remove();
    let damaged = || std::io::Error::other("what was just written there cannot be read");
    read(&dir).map(|base| Base { cached: false, ..base }).ok_or_else(damaged).map_err(Error::file(&dir))
}

/// Puts a base in its place.
fn finish(work: tempfile::TempDir, dir: &Path, about: &About) -> std::io::Result<()> {
    fs::write(work.path().join(ABOUT), serde_json::to_vec_pretty(about)?)?;
    for entry in fs::read_dir(work.path())? {
        File::open(entry?.path())?.sync_all()?;
    }
    // One that cannot be read, or it would not have been made again.
    let _ = fs::remove_dir_all(dir);
    fs::rename(work.keep(), dir)?;
    File::open(dir.parent().unwrap_or(dir))?.sync_all()
}

fn read(dir: &Path) -> Option<Base> {
    let about: About = serde_json::from_slice(&fs::read(dir.join(ABOUT)).ok()?).ok()?;
    let path = |name: &str| Some(dir.join(name)).filter(|path| path.is_file());
    Some(Base {
        disk: path(build::DISK)?,
        kernel: path(build::KERNEL)?,
        initrd: path(build::INITRD)?,
        cmdline: about.cmdline,
        description: about.description,
        packages: about.packages,
        cached: true,
    })
}

/// Removes what interrupted attempts left. The cache's lock is to be held.
fn clear(systems: &Path) {
    for entry in fs::read_dir(systems).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            // What cannot be removed is in nobody's way.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A base in the cache, as `lodge image` shows it.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Its name, such as `debian-13-9fb08792218f`.
    pub name: String,
    /// What it is, for people.
    pub description: String,
    /// Bytes that its files take on the host.
    pub size: u64,
    /// Names and versions of its packages.
    pub packages: Vec<(String, String)>,
}

/// The bases in the cache, by name.
pub fn list() -> Result<Vec<Listed>, Error> {
    let systems = Cache::open(None)?.systems();
    let mut found = Vec::new();
    for entry in fs::read_dir(&systems).into_iter().flatten().flatten() {
        let (name, dir) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
        let Some(about) = fs::read(dir.join(ABOUT)).ok().and_then(|text| serde_json::from_slice(&text).ok())
        else {
            continue;
        };
        let About { description, packages, .. } = about;
        let files = fs::read_dir(&dir).into_iter().flatten().flatten();
        // Blocks are of 512 bytes, whatever the file system's are (stat(2)).
        let size = files.filter_map(|file| Some(file.metadata().ok()?.blocks() * 512)).sum();
        found.push(Listed { name, description, size, packages });
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Removes a base from the cache; `false` if there is none of that name. VMs with names keep what they need of it.
pub fn remove(name: &str, progress: &mut dyn Progress) -> Result<bool, Error> {
    let cache = Cache::open(None)?;
    if !list()?.iter().any(|one| one.name == name) {
        return Ok(false);
    }
    let _lock = cache.lock(progress)?;
    let dir = cache.systems().join(name);
    // Whoever has it open for writing or reading holds a lock on it.
    drop(disks::Disk::open(&dir.join(build::DISK), &disks::Options::default())?);
    fs::remove_dir_all(&dir).map_err(Error::file(&dir))?;
    Ok(true)
}
