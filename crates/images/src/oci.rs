//! OCI images as guests: fetched from a registry, their layers put together to an initial RAM disk, their command run in it.
//!
//! Sources: the OCI distribution, image and image layout specifications, version 1.1.

mod registry;
mod root;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cache::{Cache, Stored};
use crate::cpio::Cpio;
use crate::fetch::sha256;
use crate::guest::network_ramdisk;
use crate::progress::Progress;
use crate::{Error, Options, Source, default_guest};
pub use registry::{Config, Reference};
pub use root::Root;

/// Where Lodge's own files are in the guest.
const OURS: &str = ".lodge";
/// What the keys of the cache's records begin with.
const RECORDS: &str = "oci-";
const INIT: &str = include_str!("guest/oci.sh");

/// Why an OCI image cannot be had or used; what a transfer can fail with is [`Error::Fetch`]'s.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// That names no image.
    #[error("\"{0}\" names no OCI image; give oci:REGISTRY/NAME:TAG, or docker:NAME for Docker Hub's")]
    Reference(String),
    /// The registry does not have it, or does not give it away.
    #[error(
        "there is no {0} to be had; check its name and tag, and whether the registry gives it without a log-in"
    )]
    NotFound(String),
    /// The registry's answer is not what it must be.
    #[error("{image} cannot be used: {reason}; ask who published it")]
    Malformed {
        /// The image.
        image: String,
        /// What is wrong with it.
        reason: String,
    },
    /// It is for other machines.
    #[error("{0} is not for linux/amd64; choose another tag")]
    Platform(String),
    /// It does not fit in memory.
    #[error(
        "{image} has more than {limit} bytes unpacked, and an OCI image is unpacked into the guest's memory; choose a smaller one"
    )]
    TooLarge {
        /// The image.
        image: String,
        /// In bytes.
        limit: u64,
    },
    /// It has no command.
    #[error("{image} has no program {program:?} to run; choose another image")]
    NoProgram {
        /// The image.
        image: String,
        /// What it wants to run.
        program: String,
    },
}

/// A guest that runs an OCI image's command.
#[derive(Debug, Clone)]
pub struct OciGuest {
    /// The kernel: the default guest's.
    pub kernel: PathBuf,
    /// The image's root file system, and what it needs for the network, as initial RAM disks.
    pub initrd: Vec<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// What it is, for people.
    pub description: String,
    /// Whether all of it was in the cache.
    pub cached: bool,
}

/// An image in the cache.
#[derive(Debug, Clone, Serialize)]
pub struct Kept {
    /// Its name.
    pub name: String,
    /// The digest of its manifest.
    pub manifest: String,
    /// Bytes that it takes.
    pub size: u64,
}

/// The images in the cache, by name.
pub fn list(options: &Options) -> Result<Vec<Kept>, Error> {
    let cache = Cache::open(options.cache_dir.as_deref())?;
    let kept = |(_, record): (_, Record)| Kept {
        name: record.image,
        manifest: record.manifest,
        size: record.stored.size,
    };
    let mut all: Vec<Kept> = cache.records(RECORDS).into_iter().map(kept).collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

/// Removes an image from the cache; false if it is not there.
pub fn remove(reference: &Reference, options: &Options, progress: &mut dyn Progress) -> Result<bool, Error> {
    let cache = Cache::open(options.cache_dir.as_deref())?;
    let lock = cache.lock(progress)?;
    let mut found = cache.records::<Record>(RECORDS);
    found.retain(|(_, record)| record.image == reference.to_string());
    for (key, record) in &found {
        cache.forget(key, &record.stored, &lock)?;
    }
    Ok(!found.is_empty())
}

/// What the cache remembers of an image.
#[derive(Serialize, Deserialize)]
struct Record {
    /// Its name.
    image: String,
    /// The digest of its manifest.
    manifest: String,
    stored: Stored,
}

/// Gives the guest for an image, from the cache or from its registry. The tag is looked up anew with `options.refresh` only.
///
/// The image's command is run as the image says (user, working directory, environment); when it has ended, the guest prints
/// `Lodge: the command ended with status N.` and powers off.
pub fn oci_guest(
    reference: &Reference,
    options: &Options,
    progress: &mut dyn Progress,
) -> Result<OciGuest, Error> {
    let guest = default_guest(options, progress)?;
    let busybox = Source::new(options)?.files(&["busybox-static"], &["*bin/busybox"], progress)?;
    let missing = || Error::NoFile { package: busybox.package.clone(), file: "bin/busybox".to_owned() };
    let busybox = busybox.files.first().ok_or_else(missing)?;
    let cache = Cache::open(options.cache_dir.as_deref())?;
    let what = format!("2 {reference} {} {INIT}", busybox.sha256);
    let key = format!("{RECORDS}{}", &sha256(what.as_bytes())[..24]);
    let find = || {
        let record: Record = cache.record(&key)?;
        Some((cache.path(&record.stored)?, record.manifest))
    };
    let mut cached = guest.cached;
    let found = find().filter(|_| !options.refresh);
    let (initrd, manifest) = match found {
        Some(found) => found,
        None => {
            cached = false;
            let lock = cache.lock(progress)?;
            let (root, config, manifest) = registry::fetch(reference, options, &cache, &lock, progress)?;
            let program = std::fs::read(&busybox.stored).map_err(Error::cache(&busybox.stored))?;
            let initrd = initramfs(reference, &root, &config, &program)?;
            let stored = cache.store("oci.cpio", &initrd, &lock)?;
            let path = cache.path(&stored).ok_or_else(|| {
                Error::cache("oci.cpio")(std::io::Error::other("what was just written there has changed"))
            })?;
            cache.set_record(
                &key,
                &Record { image: reference.to_string(), manifest: manifest.clone(), stored },
                &lock,
            )?;
            (path, manifest)
        }
    };
    Ok(OciGuest {
        kernel: guest.kernel,
        initrd: vec![initrd, network_ramdisk(options, OURS, progress)?],
        cmdline: format!("{} rdinit=/{OURS}/init panic=-1", guest.cmdline),
        description: format!(
            "{reference} ({}), Linux {}",
            &manifest[..manifest.len().min(19)],
            guest.release
        ),
        cached,
    })
}

/// The initial RAM disk: the image's files, and ours that run its command.
fn initramfs(reference: &Reference, root: &Root, config: &Config, busybox: &[u8]) -> Result<Vec<u8>, Error> {
    let command = config.command();
    let mut words = command.iter();
    let none =
        |program: &str| OciError::NoProgram { image: reference.to_string(), program: program.to_owned() };
    let name = words.next().ok_or_else(|| none(""))?;
    let program = root.program(name, config).ok_or_else(|| none(name))?;
    let (user, group) = root.user(&config.user).ok_or_else(|| none(&format!("user {}", config.user)))?;
    let mut script = INIT.to_owned();
    for entry in &config.env {
        // A name that is none is nothing that a shell could export.
        if let Some((name, value)) = entry.split_once('=').filter(|(name, _)| is_variable(name)) {
            script += &format!("export {name}={}\n", quote(value));
        }
    }
    let home = root.home(user).unwrap_or_else(|| "/".to_owned());
    script += &format!("export HOME=${{HOME:-{}}}\n", quote(&home));
    let dir = if config.working_dir.is_empty() { "/" } else { &config.working_dir };
    script += &format!("$b mkdir -p {0} && cd {0}\n", quote(dir));
    let arguments: Vec<String> = words.map(|word| quote(word)).collect();
    script += &format!(
        "$b setsid -c $b start-stop-daemon -S -q -c {user}:{group} -a {} -x {} -- {} <\"$tty\" >\"$tty\" 2>&1\n",
        quote(name),
        quote(&program),
        arguments.join(" ")
    );
    script += "echo \"Lodge: the command ended with status $?.\"\n$b sync\n$b poweroff -f\n";
    let mut image = Cpio::new();
    root.write(&mut image);
    image.device("dev/console", 0o600, 5, 1);
    image.file(&format!("{OURS}/busybox"), 0o755, busybox);
    image.file(&format!("{OURS}/init"), 0o755, script.as_bytes());
    Ok(image.finish())
}

fn is_variable(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    !name.is_empty() && name.chars().all(plain) && !name.starts_with(|c: char| c.is_ascii_digit())
}

/// A word for the shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}
