//! `--firmware`: which, and where a VM's UEFI variables are kept.

use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use vm::{Firmware, Variables};

use crate::args::Run;
use crate::progress::Bars;
use crate::report::{Help, Usage};

/// What is said of firmware on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// One of Debian's packages.
    Known(images::Firmware),
    /// A file, as it is.
    File(PathBuf),
}

/// Reads `bios`, `uefi` or a path.
pub fn parse(text: &str) -> Result<Which, String> {
    Ok(match text {
        "" => return Err("give bios, uefi or a file".into()),
        "bios" => Which::Known(images::Firmware::Bios),
        "uefi" => Which::Known(images::Firmware::Uefi),
        path => Which::File(path.into()),
    })
}

/// Reads `bios` or `uefi`.
pub fn parse_known(text: &str) -> Result<images::Firmware, String> {
    match parse(text) {
        Ok(Which::Known(known)) => Ok(known),
        _ => Err("give bios or uefi".into()),
    }
}

/// Gets the firmware, and its variables if it has any.
/// `known` is what the image itself wants, if it is known.
pub fn open(args: &Run, known: Option<images::Firmware>, mirror: Option<String>) -> anyhow::Result<Firmware> {
    let which = args.firmware.clone().unwrap_or(Which::Known(known.unwrap_or_default()));
    let (code, template, vga) = match which {
        Which::File(path) => (path, None, None),
        Which::Known(known) => {
            let options = images::Options { mirror, ..images::Options::default() };
            let files = images::firmware(&options, known, &mut Bars::default())?;
            (files.code, files.variables, files.vga)
        }
    };
    let variables = template.map(|template| variables(&template, args.name.as_deref())).transpose()?;
    let log = args.firmware_log.as_deref().map(|path| {
        let file = File::create(path);
        file.with_context(|| Usage(format!("cannot write the firmware's messages to {}", path.display())))
    });
    Ok(Firmware { code, variables, vga, log: log.transpose()?.map(Arc::new) })
}

/// The variables of the VM called `name`, made from the template at its first start; one without a name has them in memory.
fn variables(template: &Path, name: Option<&str>) -> anyhow::Result<Arc<Variables>> {
    let fresh = fs::read(template).with_context(|| format!("cannot read {}", template.display()))?;
    let Some(name) = name else { return Ok(Variables::in_memory(fresh)) };
    let directory = directory(name)?;
    let path = directory.join("uefi-variables.fd");
    let failed = || Help(format!("the UEFI variables of {name} are kept there; another --name has its own"));
    fs::create_dir_all(&directory)
        .and_then(|()| if path.exists() { Ok(()) } else { put(&path, &fresh) })
        .with_context(|| format!("cannot write {}", path.display()))
        .with_context(failed)?;
    let open = File::options().read(true).write(true).open(&path);
    let file = open.with_context(|| format!("cannot open {}", path.display())).with_context(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(Usage(format!("a virtual machine called {name} is running")))
                .context(Help("give this one another --name".into()));
        }
        Err(TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("cannot lock {}", path.display()));
        }
    }
    let size = file.metadata().map_or(0, |data| data.len());
    anyhow::ensure!(
        size == fresh.len() as u64,
        "{} has {size} bytes and this firmware's variables {}; remove it, and the VM starts with new ones",
        path.display(),
        fresh.len()
    );
    Variables::in_file(file).with_context(|| format!("cannot read {}", path.display())).with_context(failed)
}

/// Puts a file there whole or not at all.
fn put(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let new = path.with_extension(format!("new-{}", std::process::id()));
    let written = File::create(&new).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)
    });
    if written.is_err() {
        // It is of no use.
        let _ = fs::remove_file(&new);
    }
    written
}

/// What belongs to the VM called `name`.
fn directory(name: &str) -> anyhow::Result<PathBuf> {
    if !systems::is_name(name, 63) {
        return Err(Usage(systems::Error::Name(name.into()).to_string()).into());
    }
    Ok(systems::data_dir()?.join("vms").join(name))
}
