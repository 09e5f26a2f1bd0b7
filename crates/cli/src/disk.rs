//! `--disk` and `--cdrom`: what to open, and how; and `lodge disk`, for VMs that run.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use disks::{Cache, Format, Options};
use indicatif::HumanBytes;
use vm::DiskBus;
use vm::control::{DiskState, DiskStatus, NewDisk, Request};

use crate::args::DiskCommand as Command;
use crate::host::{print, table};
use crate::running::connect;

/// How long a guest has to give up a disk.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is said of a disk on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    path: PathBuf,
    options: Options,
    serial: Option<String>,
    bus: DiskBus,
}

impl Disk {
    /// A disk of which no more is said than where it is.
    pub fn at(path: PathBuf) -> Self {
        Self { path, options: Options::default(), serial: None, bus: DiskBus::default() }
    }

    /// A disk to start from: one in a format that cannot be written is written beside it.
    pub fn to_start_from(path: &Path) -> Result<Self, disks::Error> {
        let mut disk = Self::at(path.into());
        disk.options.throw_away = disks::format(path)? == Format::Vmdk;
        if disk.options.throw_away {
            eprintln!(
                "lodge: {} is only read: what the guest writes is thrown away (`qemu-img convert -O qcow2` makes an image that keeps it)",
                path.display()
            );
        }
        Ok(disk)
    }
}

/// Reads `PATH[,format=FORMAT][,readonly][,throwaway][,cache=CACHE][,serial=TEXT][,bus=BUS]`; `,,` is a comma of the path's.
pub fn parse(text: &str) -> Result<Disk, String> {
    let mut parts = split(text).into_iter();
    let path = parts.next().filter(|path| !path.is_empty()).ok_or("give the path of an image")?;
    let mut disk = Disk::at(path.into());
    for part in parts {
        match part.split_once('=') {
            None if part == "readonly" => disk.options.read_only = true,
            None if part == "throwaway" => disk.options.throw_away = true,
            Some(("serial", serial)) => disk.serial = Some(serial.to_owned()),
            Some(("format", "raw")) => disk.options.format = Some(Format::Raw),
            Some(("format", "qcow2")) => disk.options.format = Some(Format::Qcow2),
            Some(("format", "vmdk")) => disk.options.format = Some(Format::Vmdk),
            Some(("cache", word)) => disk.options.cache = cache(word)?,
            Some(("bus", "virtio")) => disk.bus = DiskBus::Virtio,
            Some(("bus", "virtio-packed")) => disk.bus = DiskBus::VirtioPacked,
            Some(("bus", "nvme")) => disk.bus = DiskBus::Nvme,
            Some(("bus", "sata")) => disk.bus = DiskBus::Sata,
            Some(("bus", other)) => {
                return Err(format!("\"{other}\" is no bus; there are virtio, virtio-packed, nvme and sata"));
            }
            Some(("format", other)) => {
                return Err(format!("\"{other}\" is no format; there are raw, qcow2 and vmdk"));
            }
            _ => {
                return Err(format!(
                    "\"{part}\" is not known of disks; there are format=, readonly, throwaway, cache=, serial= and bus="
                ));
            }
        }
    }
    Ok(disk)
}

fn cache(word: &str) -> Result<Cache, String> {
    let known = Cache::WORDS.iter().find(|(known, _)| *known == word);
    known.map(|&(_, cache)| cache).ok_or_else(|| {
        let words = Cache::WORDS.map(|(word, _)| word).join(", ");
        format!("\"{word}\" is no way to cache; there are {words}")
    })
}

/// The parts between single commas.
pub fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        let last = parts.len() - 1;
        match letter {
            ',' if letters.next_if_eq(&',').is_some() => parts[last].push(','),
            ',' => parts.push(String::new()),
            _ => parts[last].push(letter),
        }
    }
    parts
}

/// Opens them.
pub fn open<'a>(disks: impl IntoIterator<Item = &'a Disk>) -> Result<Vec<vm::Disk>, disks::Error> {
    let open = |(n, disk): (usize, &Disk)| {
        let serial = disk.serial.clone().unwrap_or_else(|| format!("lodge-{n}"));
        let image = Arc::new(disks::Disk::open(&disk.path, &disk.options)?);
        Ok(vm::Disk { image, serial, bus: disk.bus })
    };
    disks.into_iter().enumerate().map(open).collect()
}

/// `lodge disk`.
pub fn disk(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Attach { name, disk } => attach(name, disk),
        Command::Detach { name, disk, timeout, force } => {
            if *force {
                eprintln!("lodge: the guest is not asked, and loses what it has not written to {disk}");
            }
            let path = Path::new(disk).canonicalize().ok();
            let (which, force) = (disk.clone(), *force);
            let patience = timeout.unwrap_or(PATIENCE).as_secs_f64();
            Ok(connect(name)?.tell(&Request::DetachDisk { which, path, patience, force })?)
        }
        Command::Ls { name, json } => {
            let disks = connect(name)?.disks(&Request::Disks)?;
            if *json {
                return print(&serde_json::to_string_pretty(&disks)?);
            }
            list(&disks)
        }
    }
}

fn attach(name: &str, disk: &Disk) -> anyhow::Result<()> {
    let Disk { path, options, serial, bus } = disk.clone();
    let path = std::path::absolute(&path).with_context(|| format!("cannot find {}", path.display()))?;
    let new = NewDisk { path, options, serial, bus };
    let disks = connect(name)?.disks(&Request::AttachDisk(new))?;
    for disk in &disks {
        print(&format!("{} is attached as {}", disk.path.display(), disk.serial))?;
        if disk.state != DiskState::Attached {
            eprintln!(
                "lodge: the guest has not taken note of it: it will when its system starts, if that knows hot-plug by ACPI"
            );
        }
    }
    Ok(())
}

fn list(disks: &[DiskStatus]) -> anyhow::Result<()> {
    if disks.is_empty() {
        return print("The virtual machine has no disks; `lodge disk attach` gives it one.");
    }
    let mut table = table(&["serial", "bus", "size", "format", "state", "path"]);
    for disk in disks {
        // As the command line names it.
        let bus = serde_json::to_value(disk.bus)?;
        let state = match disk.state {
            DiskState::Attached if disk.read_only => "attached, readonly",
            DiskState::Attached => "attached",
            DiskState::Unnoticed => "not noticed",
            DiskState::Leaving => "leaving",
            DiskState::Ejected => "ejected by the guest",
        };
        let [serial, format, size] = [&disk.serial, &disk.format, &HumanBytes(disk.size).to_string()];
        table.add_row([
            serial.as_str(),
            bus.as_str().unwrap_or_default(),
            size,
            format,
            state,
            &disk.path.display().to_string(),
        ]);
    }
    print(&table.to_string())
}

/// Opens what is in CD-ROM drives: images as they are on a CD, which others may read, too.
pub fn open_cds(paths: &[PathBuf]) -> Result<Vec<Arc<disks::Disk>>, disks::Error> {
    let options = Options { format: Some(Format::Raw), read_only: true, ..Default::default() };
    let open = |path: &PathBuf| Ok(Arc::new(disks::Disk::open(path, &options)?));
    paths.iter().map(open).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_follow_the_path() {
        let disk = parse("a,,b.img,readonly,format=qcow2,cache=unsafe,serial=x=y,bus=sata").unwrap();
        let serial = Some("x=y".to_owned());
        let options =
            Options { format: Some(Format::Qcow2), read_only: true, cache: Cache::Unsafe, throw_away: false };
        let expected = Disk { path: "a,b.img".into(), options, serial, bus: DiskBus::Sata };
        assert_eq!(disk, expected);
    }

    #[test]
    fn what_is_not_known_is_named() {
        for (text, part) in [
            ("", "path"),
            ("a,rw", "\"rw\""),
            ("a,format=iso", "\"iso\""),
            ("a,bus=ide", "\"ide\""),
            ("a,cache=all", "writethrough"),
            (",readonly", "path"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
