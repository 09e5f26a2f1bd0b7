//! What one VM has of a system: an overlay over the base's disk, and its seed.
//!
//! A VM with a name has a directory, with all that it needs: it outlives the cache.
//!
//! ```text
//! vms/NAME/base.qcow2, vmlinuz, initrd.img   the base's, as further names of its files; the latter two the disk's own after an upgrade
//! vms/NAME/base.img                          or that of an image that was fetched
//! vms/NAME/disk.qcow2                        the overlay: all that the VM has written
//! vms/NAME/seed.img                          name, user, keys; made anew at every start, for shares and our agent
//! vms/NAME/packages.tar                      packages to be installed, until the first start is over
//! vms/NAME/vm.json                           what else is to be known
//! ```

use std::fs::{self, File};
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use disks::{Disk, Format, Options};
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::base::Base;
use crate::build::{INITRD, KERNEL};
use crate::kernel;
use crate::packages::Packages;
use crate::pulled::Pulled;
use crate::seed::{self, Form, Settings, is_name};

/// What makes a directory that of a VM with a system of ours.
const ABOUT: &str = "vm.json";
const OVERLAY: &str = "disk.qcow2";
const SEED: &str = "seed.img";
/// The base's disk.
const BASE: &str = "base.qcow2";
/// An image that was fetched.
const IMAGE: &str = "base.img";
/// Packages that were fetched.
const PACKAGES: &str = "packages.tar";

/// A VM's part of a system, ready to start.
#[derive(Debug)]
pub struct Instance {
    /// What it starts with.
    pub start: Start,
    /// Its disks: the system's, and the seed.
    pub disks: Vec<vm::Disk>,
    /// One more, with the packages that it is to install: the last of all, for it is not there at later starts.
    pub packages: Option<vm::Disk>,
    /// Its name in the network.
    pub hostname: String,
}

/// What a VM starts with.
#[derive(Debug)]
pub enum Start {
    /// A kernel beside its disk.
    Kernel(vm::Boot),
    /// What is on its disk, by such firmware.
    Firmware(images::Firmware),
}

/// What a VM is made from.
#[derive(Debug, Clone, Copy)]
pub enum Origin<'a> {
    /// A system that Lodge made, and packages beside its own.
    Base(&'a Base, Option<&'a Packages>),
    /// An image that was fetched.
    Pulled(&'a Pulled),
}

impl Origin<'_> {
    fn disk(&self) -> &Path {
        match self {
            Origin::Base(base, _) => &base.disk,
            Origin::Pulled(image) => &image.disk,
        }
    }

    /// Its files, and what a VM with a name calls them: its disk first.
    fn files(&self) -> Vec<(&Path, &'static str)> {
        match self {
            Origin::Base(base, _) => {
                vec![(&base.disk, BASE), (&base.kernel, KERNEL), (&base.initrd, INITRD)]
            }
            Origin::Pulled(image) => vec![(&image.disk, IMAGE)],
        }
    }

    fn packages(&self) -> Option<&Path> {
        match self {
            Origin::Base(_, packages) => packages.map(Packages::path),
            Origin::Pulled(_) => None,
        }
    }

    fn form(&self) -> Form {
        match self {
            Origin::Base(..) => Form::Script,
            Origin::Pulled(_) => Form::CloudConfig,
        }
    }

    fn hostname(&self) -> &str {
        match self {
            Origin::Base(..) => "debian",
            Origin::Pulled(image) => image.name.split([':', '.']).next().unwrap_or_default(),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct About {
    /// systemd's machine ID, and cloud-init's instance ID.
    id: String,
    hostname: String,
    /// The kernel's command line, where there is a kernel beside the disk.
    cmdline: String,
    /// What starts the disk, where there is none.
    #[serde(default)]
    firmware: Option<images::Firmware>,
}

/// Where VMs are kept: `$LODGE_DATA_DIR`, else `lodge` in `$XDG_DATA_HOME` or in `~/.local/share`.
pub fn data_dir() -> Result<PathBuf, Error> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let absolute = |path: &PathBuf| path.is_absolute();
    variable("LODGE_DATA_DIR")
        .or_else(|| variable("XDG_DATA_HOME").filter(absolute).map(|base| base.join("lodge")))
        .or_else(|| variable("HOME").map(|home| home.join(".local/share/lodge")))
        .ok_or(Error::NoDataDir)
}

impl Instance {
    /// A VM that is thrown away at its end: nothing of it has a name on the host, so nothing can stay behind. It mounts `shares`.
    pub fn throw_away(origin: Origin<'_>, settings: &Settings, shares: &[String]) -> Result<Self, Error> {
        settings.check()?;
        let vms = vms()?;
        let dir = tempfile::Builder::new().prefix(".new-").tempdir_in(&vms).map_err(Error::file(&vms))?;
        let overlay = dir.path().join(OVERLAY);
        disks::create(&overlay, Format::Qcow2, 0, Some(origin.disk()))?;
        let about = About::new(settings, origin.hostname(), origin)?;
        write_seed(dir.path(), settings, origin, &about)?;
        let disks = open(dir.path(), shares)?;
        let packages = origin.packages().map(open_packages).transpose()?;
        let start = match origin {
            Origin::Base(base, _) => Start::Kernel(boot(&base.kernel, &base.initrd, &about)),
            Origin::Pulled(image) => Start::Firmware(image.about.firmware),
        };
        // The disks are open; from here on they have no names.
        let path = dir.path().to_owned();
        dir.close().map_err(Error::file(path))?;
        Ok(Self { start, disks, packages, hostname: about.hostname })
    }

    /// The VM `name`, if it was made. It mounts `shares`.
    pub fn find(name: &str, shares: &[String]) -> Result<Option<Self>, Error> {
        if !is_name(name, 63) {
            return Ok(None);
        }
        let dir = data_dir()?.join("vms").join(name);
        let damaged = |reason: String| Error::Damaged { name: name.into(), path: dir.clone(), reason };
        let text = match fs::read(dir.join(ABOUT)) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(damaged(format!("{ABOUT}: {error}"))),
        };
        let about: About =
            serde_json::from_slice(&text).map_err(|error| damaged(format!("{ABOUT}: {error}")))?;
        let disks = open(&dir, shares)?;
        let start = match about.firmware {
            Some(firmware) => Start::Firmware(firmware),
            None => Start::Kernel(boot(&dir.join(KERNEL), &dir.join(INITRD), &about)),
        };
        let packages = dir.join(PACKAGES);
        if packages.exists() && kernel::has_started(&disks[0].image, &about.id) {
            fs::remove_file(&packages).map_err(Error::file(&packages))?;
        }
        let packages = packages.exists().then(|| open_packages(&packages)).transpose()?;
        Ok(Some(Self { start, disks, packages, hostname: about.hostname }))
    }

    /// The VM `name`, made now. It appears whole or not at all. It mounts `shares`.
    pub fn create(
        name: &str,
        origin: Origin<'_>,
        settings: &Settings,
        shares: &[String],
    ) -> Result<Self, Error> {
        settings.check()?;
        if !is_name(name, 63) {
            return Err(Error::Name(name.into()));
        }
        let vms = vms()?;
        let dir = vms.join(name);
        let work = tempfile::Builder::new().prefix(".new-").tempdir_in(&vms).map_err(Error::file(&vms))?;
        let place = |from: &Path, name: &str| {
            let to = work.path().join(name);
            // Another name for the same file, or a copy where the cache is on another file system.
            fs::hard_link(from, &to).or_else(|_| fs::copy(from, &to).map(|_| ())).map_err(Error::file(to))
        };
        let files = origin.files();
        let packages = origin.packages().map(|path| (path, PACKAGES));
        files.iter().chain(&packages).try_for_each(|(from, name)| place(from, name))?;
        let below = work.path().join(files[0].1);
        disks::create(&work.path().join(OVERLAY), Format::Qcow2, 0, Some(&below))?;
        let about = About::new(settings, name, origin)?;
        write_seed(work.path(), settings, origin, &about)?;
        let text = serde_json::to_vec_pretty(&about).map_err(|error| Error::file(&dir)(error.into()))?;
        fs::write(work.path().join(ABOUT), text).map_err(Error::file(&dir))?;
        settle(work, &dir).map_err(Error::file(&dir))?;
        Self::find(name, shares)?.ok_or(Error::Name(name.into()))
    }

    /// Takes over the kernel that is on the disk by now, after an upgrade of the system: before a start without firmware.
    pub fn follow_kernel(&self) -> Result<(), Error> {
        match &self.start {
            Start::Kernel(vm::Boot::Kernel { kernel, .. }) => {
                kernel::follow(kernel.parent().unwrap_or(kernel), &self.disks[0].image)
            }
            _ => Ok(()),
        }
    }
}

impl About {
    fn new(settings: &Settings, name: &str, origin: Origin<'_>) -> Result<Self, Error> {
        let (cmdline, firmware) = match origin {
            Origin::Base(base, _) => (base.cmdline.clone(), None),
            Origin::Pulled(image) => (String::new(), Some(image.about.firmware)),
        };
        Ok(Self {
            id: random_id()?,
            hostname: settings.hostname.clone().unwrap_or_else(|| name.replace('_', "-")),
            cmdline,
            firmware,
        })
    }
}

/// Puts what is ready in its place.
fn settle(work: tempfile::TempDir, dir: &Path) -> std::io::Result<()> {
    match fs::rename(work.path(), dir) {
        // Its UEFI variables are there already. What makes it a VM comes last.
        Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty && !dir.join(ABOUT).exists() => {
            let names = [BASE, KERNEL, INITRD, IMAGE, OVERLAY, SEED, PACKAGES, ABOUT];
            let mut there = names.into_iter().filter(|name| work.path().join(name).exists());
            there.try_for_each(|name| fs::rename(work.path().join(name), dir.join(name)))
        }
        renamed => renamed.map(|()| drop(work.keep())),
    }
}

/// The directory of all VMs.
pub(crate) fn vms() -> Result<PathBuf, Error> {
    let dir = data_dir()?.join("vms");
    fs::create_dir_all(&dir).map_err(Error::file(&dir))?;
    Ok(dir)
}

/// An ID in systemd's form: a UUID of version 4, in hexadecimal without dashes (machine-id(5)).
fn random_id() -> Result<String, Error> {
    const SOURCE: &str = "/dev/urandom";
    let mut bytes = [0; 16];
    File::open(SOURCE).and_then(|mut file| file.read_exact(&mut bytes)).map_err(Error::file(SOURCE))?;
    bytes[6] = bytes[6] & 0x0F | 0x40;
    bytes[8] = bytes[8] & 0x3F | 0x80;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn write_seed(dir: &Path, settings: &Settings, origin: Origin<'_>, about: &About) -> Result<(), Error> {
    let path = dir.join(SEED);
    let install = origin.packages().is_some();
    let first = seed::first_start(settings, origin.form(), install, &about.id, &about.hostname);
    fs::write(&path, seed::make(&first).map_err(Error::file(&path))?).map_err(Error::file(&path))
}

/// Makes the seed anew for this start.
fn renew_seed(dir: &Path, shares: &[String]) -> std::io::Result<()> {
    let path = dir.join(SEED);
    let mut files = seed::read(Cursor::new(fs::read(&path)?))?;
    files.extend(seed::every_start(shares));
    let mut new = tempfile::Builder::new().prefix(".seed-").tempfile_in(dir)?;
    new.write_all(&seed::make(&files)?)?;
    new.persist(&path)?;
    Ok(())
}

fn open(dir: &Path, shares: &[String]) -> Result<Vec<vm::Disk>, Error> {
    let path = |name| dir.join(name);
    // From here on nobody else has the VM.
    let overlay = open_disk(&path(OVERLAY), "disk", Format::Qcow2, false)?;
    renew_seed(dir, shares).map_err(Error::file(path(SEED)))?;
    Ok(vec![overlay, open_disk(&path(SEED), "seed", Format::Raw, true)?])
}

/// By this serial number the guest finds them.
fn open_packages(path: &Path) -> Result<vm::Disk, Error> {
    open_disk(path, "packages", Format::Raw, true)
}

fn open_disk(path: &Path, serial: &str, format: Format, read_only: bool) -> Result<vm::Disk, Error> {
    let image = Disk::open(path, &Options { format: Some(format), read_only, ..Default::default() })?;
    Ok(vm::Disk { image: Arc::new(image), serial: serial.into(), bus: vm::DiskBus::Virtio })
}

fn boot(kernel: &Path, initrd: &Path, about: &About) -> vm::Boot {
    vm::Boot::Kernel {
        kernel: kernel.to_owned(),
        initrd: vec![initrd.to_owned()],
        cmdline: format!("{} systemd.machine_id={}", about.cmdline, about.id),
    }
}
