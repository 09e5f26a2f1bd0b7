//! `--disk` and `--cdrom`: what to open, and how.

use std::path::PathBuf;
use std::sync::Arc;

use disks::{Cache, Format, Options};
use vm::DiskBus;

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
}

/// Reads `PATH[,format=FORMAT][,readonly][,cache=CACHE][,serial=TEXT][,bus=BUS]`; `,,` is a comma of the path's.
pub fn parse(text: &str) -> Result<Disk, String> {
    let mut parts = split(text).into_iter();
    let path = parts.next().filter(|path| !path.is_empty()).ok_or("give the path of an image")?;
    let mut disk = Disk::at(path.into());
    for part in parts {
        match part.split_once('=') {
            None if part == "readonly" => disk.options.read_only = true,
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
                    "\"{part}\" is not known of disks; there are format=, readonly, cache=, serial= and bus="
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
        let options = Options { format: Some(Format::Qcow2), read_only: true, cache: Cache::Unsafe };
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
