//! Debian packages: an `ar` archive of `debian-binary`, `control.tar.*` and `data.tar.*` (deb(5)).
//!
//! Whatever a package says, it gets bounded memory: of its files only those asked for are kept, each with a size limit.

use std::io::{self, BufReader, Read};

/// No file that we take out of a package is larger (kernels have some 15 MB).
const LARGEST_FILE: u64 = 256 << 20;
/// No `control.tar` is larger (the kernels' have some 100 KB), packed or not.
const LARGEST_CONTROL: u64 = 16 << 20;
/// No package unpacks to more (the largest kernel packages have 500 MB).
const LARGEST_PACKAGE: u64 = 4 << 30;
/// No kernel module unpacks to more.
const LARGEST_MODULE: u64 = 64 << 20;
/// Longest path, as in Linux.
const LONGEST_PATH: u64 = 4096;
/// The most memory that unpacking xz may take; `xz -9` takes 65 MB.
const XZ_MEMORY_KIB: u32 = 256 << 10;

/// Why a package cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DebError {
    /// It is no package, or a damaged one.
    #[error("it is not a sound Debian package: {0}")]
    Malformed(&'static str),
    /// A file in it is larger than anything we would take out.
    #[error("its file {path} claims to have {size} bytes, which is too much")]
    TooLarge {
        /// The path in the package.
        path: String,
        /// The stated size.
        size: u64,
    },
    /// Reading or unpacking failed.
    #[error("it cannot be unpacked: {0}")]
    Io(#[from] io::Error),
}

/// What to do with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Keep it.
    Take,
    /// Go on without it.
    Skip,
    /// Keep it and read no further.
    TakeAndStop,
}

/// A regular file taken out of a package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DebFile {
    /// Its path without a leading `/` or `./`, such as `boot/vmlinuz-6.1.0-50-cloud-amd64`.
    pub path: String,
    /// Its permission bits.
    pub mode: u32,
    /// What is in it.
    pub data: Vec<u8>,
}

impl DebFile {
    /// The kernel module in it, unpacked: some packages have them compressed.
    pub fn module(&self) -> Result<Vec<u8>, DebError> {
        let mut bytes = Vec::new();
        decompress(&self.path, &self.data[..], LARGEST_MODULE)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// A package, opened.
pub struct Deb<R> {
    data: R,
    compression: Compression,
    /// `control.tar`, as it is in the package.
    control: (Compression, Vec<u8>),
}

/// One thing in a package's tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its path without a leading `/` or `./`; empty for the root directory.
    pub path: String,
    /// What it is.
    pub kind: Kind,
    /// Its permission bits.
    pub mode: u32,
    /// The owner's number.
    pub uid: u64,
    /// The group's number.
    pub gid: u64,
    /// When it was changed, in seconds since 1970.
    pub mtime: u64,
    /// Bytes in it, if it is a file.
    pub size: u64,
}

/// The kinds of things in a package's tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link, and what it says.
    Symlink(String),
    /// Another name of the file with this path.
    Link(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Xz,
    Zstd,
}

impl Compression {
    fn of(name: &str) -> Option<Self> {
        Some(match name.rsplit('.').next()? {
            "gz" => Self::Gzip,
            "xz" => Self::Xz,
            "zst" => Self::Zstd,
            _ => return None,
        })
    }

    /// That of a member of a package, by its name.
    fn of_member(name: &str, plain: &str) -> Result<Self, DebError> {
        let compression = if name == plain { Some(Self::None) } else { Self::of(name) };
        compression.ok_or(DebError::Malformed("its compression is not known"))
    }

    fn reader<'a>(self, input: impl Read + 'a) -> Result<Box<dyn Read + 'a>, DebError> {
        Ok(match self {
            Self::None => Box::new(input),
            Self::Gzip => Box::new(flate2::read::MultiGzDecoder::new(input)),
            Self::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(input, true, XZ_MEMORY_KIB)),
            Self::Zstd => {
                let decoder = ruzstd::decoding::StreamingDecoder::new(BufReader::new(input));
                Box::new(decoder.map_err(|_| DebError::Malformed("its zstd data have no valid beginning"))?)
            }
        })
    }
}

/// A reader of what is in a file, by the ending of its name: `.gz`, `.xz`, `.zst`; plain if it has another.
/// Gives at most `limit` bytes. Kernel modules come compressed in this way from Linux 6.12 on.
pub fn decompress<'a>(name: &str, input: impl Read + 'a, limit: u64) -> Result<Box<dyn Read + 'a>, DebError> {
    Ok(Box::new(Compression::of(name).unwrap_or(Compression::None).reader(input)?.take(limit)))
}

impl<R: Read> Deb<io::Take<R>> {
    /// Opens the package that `input` gives, up to the beginning of its data.
    pub fn new(mut input: R) -> Result<Self, DebError> {
        let mut magic = [0; 8];
        input.read_exact(&mut magic).map_err(|_| DebError::Malformed("it is too short"))?;
        if &magic != b"!<arch>\n" {
            return Err(DebError::Malformed("it is no ar archive"));
        }
        let mut control = (Compression::None, Vec::new());
        // Three members in a sound package; a few more may come before the data.
        for _ in 0..16 {
            let mut header = [0; 60];
            input.read_exact(&mut header).map_err(|_| DebError::Malformed("it has no data.tar"))?;
            let (name, size) = member(&header)?;
            if name.starts_with("data.tar") {
                let compression = Compression::of_member(&name, "data.tar")?;
                return Ok(Self { data: input.take(size), compression, control });
            }
            let padded = size.saturating_add(size % 2);
            if name.starts_with("control.tar") {
                if size > LARGEST_CONTROL {
                    return Err(DebError::TooLarge { path: name, size });
                }
                control.0 = Compression::of_member(&name, "control.tar")?;
                input.by_ref().take(padded).read_to_end(&mut control.1)?;
                if control.1.len() as u64 != padded {
                    return Err(DebError::Malformed("it ends too early"));
                }
                control.1.truncate(size as usize);
                continue;
            }
            let skipped = io::copy(&mut input.by_ref().take(padded), &mut io::sink())?;
            if skipped != padded {
                return Err(DebError::Malformed("it ends too early"));
            }
        }
        Err(DebError::Malformed("it has no data.tar"))
    }

    /// The regular files that `choose` takes, by path. Links and other kinds are never offered.
    pub fn files(self, mut choose: impl FnMut(&str) -> Choice) -> Result<Vec<DebFile>, DebError> {
        let mut found = Vec::new();
        self.walk(|entry, data| {
            let choice = if entry.kind == Kind::File { choose(&entry.path) } else { Choice::Skip };
            if choice != Choice::Skip {
                found.push(take(entry, data)?);
            }
            Ok(choice != Choice::TakeAndStop)
        })?;
        Ok(found)
    }

    /// The files that dpkg keeps of the package: `control`, maintainer scripts and lists.
    pub fn control(&self) -> Result<Vec<DebFile>, DebError> {
        let mut found = Vec::new();
        walk(self.control.0.reader(&self.control.1[..])?.take(LARGEST_CONTROL), |entry, data| {
            if entry.kind == Kind::File {
                found.push(take(entry, data)?);
            }
            Ok(true)
        })?;
        Ok(found)
    }

    /// Shows everything in the package's tree to `visit`, in its order, each file with what is in it, until that says `false`.
    pub fn walk(
        self,
        visit: impl FnMut(&Entry, &mut dyn Read) -> Result<bool, DebError>,
    ) -> Result<(), DebError> {
        walk(self.compression.reader(BufReader::new(self.data))?.take(LARGEST_PACKAGE), visit)
    }
}

/// A file with all that is in it.
fn take(entry: &Entry, data: &mut dyn Read) -> Result<DebFile, DebError> {
    if entry.size > LARGEST_FILE {
        return Err(DebError::TooLarge { path: entry.path.clone(), size: entry.size });
    }
    let mut bytes = Vec::new();
    data.read_to_end(&mut bytes)?;
    if bytes.len() as u64 != entry.size {
        return Err(DebError::Malformed("it ends too early"));
    }
    Ok(DebFile { path: entry.path.clone(), mode: entry.mode, data: bytes })
}

/// Reads a tar archive of a package.
fn walk(
    unpacked: impl Read,
    mut visit: impl FnMut(&Entry, &mut dyn Read) -> Result<bool, DebError>,
) -> Result<(), DebError> {
    let mut archive = tar::Archive::new(unpacked);
    let (mut long_name, mut long_link): (Option<Vec<u8>>, Option<Vec<u8>>) = (None, None);
    // Raw entries: the library would read extended names of any length into memory.
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        if kind.is_gnu_longname() || kind.is_gnu_longlink() || kind.is_pax_local_extensions() {
            let mut bytes = Vec::new();
            if entry.size() <= 4 * LONGEST_PATH {
                entry.read_to_end(&mut bytes)?;
            }
            if kind.is_pax_local_extensions() {
                long_name = pax(&bytes, b"path=").or(long_name);
                long_link = pax(&bytes, b"linkpath=").or(long_link);
                continue;
            }
            bytes.retain(|byte| *byte != 0);
            *(if kind.is_gnu_longname() { &mut long_name } else { &mut long_link }) = Some(bytes);
            continue;
        }
        let name = long_name.take().unwrap_or_else(|| entry.path_bytes().into_owned());
        let link = long_link.take().or_else(|| Some(entry.link_name_bytes()?.into_owned()));
        let kind = match kind {
            kind if kind.is_file() => Kind::File,
            kind if kind.is_dir() => Kind::Directory,
            kind if kind.is_symlink() => Kind::Symlink(utf8(&link.unwrap_or_default())?.to_owned()),
            kind if kind.is_hard_link() => Kind::Link(inside(&link.unwrap_or_default())?),
            _ => continue,
        };
        let header = entry.header();
        let one = Entry {
            path: inside(&name)?,
            kind,
            mode: header.mode().unwrap_or(0o644) & 0o7777,
            uid: header.uid().unwrap_or(0),
            gid: header.gid().unwrap_or(0),
            mtime: header.mtime().unwrap_or(0),
            size: entry.size(),
        };
        if !visit(&one, &mut entry)? {
            break;
        }
    }
    Ok(())
}

/// Name and size of an ar member.
fn member(header: &[u8; 60]) -> Result<(String, u64), DebError> {
    const WRONG: DebError = DebError::Malformed("an ar header is wrong");
    let text = std::str::from_utf8(header).map_err(|_| WRONG)?;
    if !text.ends_with("`\n") {
        return Err(WRONG);
    }
    let name = text.get(..16).ok_or(WRONG)?.trim_end().trim_end_matches('/').to_owned();
    let size = text.get(48..58).and_then(|size| size.trim_end().parse().ok()).ok_or(WRONG)?;
    Ok((name, size))
}

/// The value of a `key=` in a pax extended header: records of `LENGTH key=value\n`.
fn pax(records: &[u8], key: &[u8]) -> Option<Vec<u8>> {
    let value = records.split(|byte| *byte == b'\n').find_map(|record| {
        let after = &record[record.iter().position(|byte| *byte == b' ')? + 1..];
        after.strip_prefix(key)
    });
    value.map(<[u8]>::to_vec)
}

fn utf8(text: &[u8]) -> Result<&str, DebError> {
    let text = std::str::from_utf8(text).map_err(|_| DebError::Malformed("a path is not UTF-8"))?;
    if text.contains('\0') { Err(DebError::Malformed("a path has a zero byte")) } else { Ok(text) }
}

/// The path in its plain form, if it stays inside the root directory.
fn inside(name: &[u8]) -> Result<String, DebError> {
    let name = utf8(name)?;
    let parts: Vec<&str> = name.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") {
        return Err(DebError::Malformed("a path leads out of it"));
    }
    Ok(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ar(data: &[u8], stated: u64) -> Vec<u8> {
        let mut bytes = b"!<arch>\n".to_vec();
        for (name, data, size) in [("debian-binary", &b"2.0\n"[..], 4), ("data.tar", data, stated)] {
            let header = format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{size:<10}`\n", 0, 0, 0, 100644);
            bytes.extend_from_slice(header.as_bytes());
            bytes.extend_from_slice(data);
        }
        bytes
    }

    /// A tar entry as it is written, sound or not: name, kind, stated size, data.
    fn entry(name: &str, kind: u8, size: u64, data: &[u8]) -> Vec<u8> {
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(0o755);
        header.set_size(size);
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    }

    fn files(tar: &[u8]) -> Result<Vec<DebFile>, DebError> {
        Deb::new(&ar(tar, tar.len() as u64)[..])?.files(|_| Choice::Take)
    }

    #[test]
    fn files_come_out_with_long_names_and_without_links() {
        let long = "d/".repeat(100) + "file";
        let pax = format!("{} path=./pax/name\n", 19);
        let tar = [
            entry("./a", b'0', 3, b"abc"),
            entry("././@LongLink", b'L', long.len() as u64 + 1, format!("{long}\0").as_bytes()),
            entry("short", b'0', 1, b"x"),
            entry("x", b'x', pax.len() as u64, pax.as_bytes()),
            entry("short", b'0', 1, b"y"),
            entry("./link", b'2', 0, b""),
            entry("./dir/", b'5', 0, b""),
        ]
        .concat();
        let found = files(&tar).unwrap();
        let names: Vec<_> = found.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(names, ["a", &long, "pax/name"]);
        assert_eq!((found[0].mode, &found[0].data[..]), (0o755, &b"abc"[..]));
    }

    #[test]
    fn the_whole_tree_can_be_walked() {
        let link = |name: &str, kind: u8, to: &str| {
            let mut bytes = entry(name, kind, 0, b"");
            bytes[157..157 + to.len()].copy_from_slice(to.as_bytes());
            let sum: u32 = bytes[..512].iter().map(|b| u32::from(*b)).sum::<u32>()
                - bytes[148..156].iter().map(|b| u32::from(*b)).sum::<u32>()
                + 8 * 32;
            bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            bytes
        };
        let tar = [
            entry("./", b'5', 0, b""),
            entry("./a", b'0', 3, b"abc"),
            link("./b", b'1', "./a"),
            link("./c", b'2', "../x"),
            entry("./fifo", b'6', 0, b""),
        ]
        .concat();
        let mut seen = Vec::new();
        let deb = ar(&tar, tar.len() as u64);
        let deb = Deb::new(&deb[..]).unwrap();
        deb.walk(|entry, data| {
            let mut text = String::new();
            data.read_to_string(&mut text)?;
            seen.push((entry.path.clone(), entry.kind.clone(), text));
            Ok(true)
        })
        .unwrap();
        let expected = [
            ("", Kind::Directory, ""),
            ("a", Kind::File, "abc"),
            ("b", Kind::Link("a".into()), ""),
            ("c", Kind::Symlink("../x".into()), ""),
        ];
        assert_eq!(seen, expected.map(|(path, kind, data)| (path.to_owned(), kind, data.to_owned())));
        let tar = link("./b", b'1', "../a");
        assert!(files(&tar).is_err(), "a hard link that leads out");
    }

    #[test]
    fn paths_that_lead_out_are_refused() {
        for path in ["../etc/passwd", "a/../../b", "./..", ".."] {
            assert!(matches!(files(&entry(path, b'0', 1, b"x")), Err(DebError::Malformed(_))), "{path}");
        }
        // An absolute path means one below the root, as for dpkg.
        assert_eq!(files(&entry("/etc/passwd", b'0', 1, b"x")).unwrap()[0].path, "etc/passwd");
    }

    #[test]
    fn huge_sizes_take_no_memory() {
        let huge = entry("./vmlinuz", b'0', 7 << 40, b"x");
        assert!(matches!(files(&huge), Err(DebError::TooLarge { size, .. }) if size == 7 << 40));
        // Within the limit, but not there.
        assert!(files(&entry("./vmlinuz", b'0', 200 << 20, b"x")).is_err());
        let name = entry("././@LongLink", b'L', 2 << 30, b"x");
        assert!(files(&[name, entry("a", b'0', 1, b"x")].concat()).is_err());
    }

    #[test]
    fn damage_is_an_error_or_harmless_but_never_a_panic() {
        let tar = [entry("./a", b'0', 3, b"abc"), entry("./b", b'0', 600, &[7; 600])].concat();
        let sound = ar(&tar, tar.len() as u64);
        for length in 0..sound.len() {
            if let Ok(deb) = Deb::new(&sound[..length]) {
                let _ = deb.files(|_| Choice::Take);
            }
        }
        for at in 0..sound.len() {
            for value in [0, b' ', b'9', 0x80, 0xFF] {
                let mut bytes = sound.clone();
                bytes[at] = value;
                if let Ok(deb) = Deb::new(&bytes[..]) {
                    let _ = deb.files(|_| Choice::Take);
                }
            }
        }
        for bytes in [&b"!<arch>\n"[..], b"", b"\x7fELF", b"!<arch>\n\n"] {
            assert!(Deb::new(bytes).is_err());
        }
    }

    #[test]
    fn each_compression_is_undone_within_the_limit() {
        use std::io::Write;
        let text = vec![b'a'; 100_000];
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&text).unwrap();
        let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
        xz.write_all(&text).unwrap();
        let zstd = ruzstd::encoding::compress_to_vec(&text[..], ruzstd::encoding::CompressionLevel::Fastest);
        for (name, packed) in
            [("a.gz", gz.finish().unwrap()), ("a.xz", xz.finish().unwrap()), ("a.zst", zstd)]
        {
            for limit in [1000, 1 << 20] {
                let mut out = Vec::new();
                decompress(name, &packed[..], limit).unwrap().read_to_end(&mut out).unwrap();
                assert_eq!(out.len() as u64, limit.min(100_000), "{name}");
                assert!(out.iter().all(|byte| *byte == b'a'));
            }
            let mut out = Vec::new();
            let broken = decompress(name, &packed[..packed.len() / 2], 1 << 20);
            assert!(broken.and_then(|mut broken| Ok(broken.read_to_end(&mut out)?)).is_err(), "{name}");
        }
    }
}
