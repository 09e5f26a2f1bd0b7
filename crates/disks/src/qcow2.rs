//! The qcow2 header, as far as it must be known before `imago` may allocate by it.
//!
//! Source: QEMU's documentation, docs/interop/qcow2.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::chain::Image;
use crate::{Error, Format};

/// The limits that QEMU has too: tables of 32 MiB and 8 MiB.
const MAX_L1_ENTRIES: u64 = (32 << 20) / 8;
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// Where the size of the disk is in the header, its incompatible features, and what compresses clusters.
const SIZE_AT: usize = 24;
const FEATURES_AT: usize = 72;
const COMPRESSION_AT: usize = 104;
const ZSTD: u64 = 1 << 3;

/// A byte of a file that is shown as another.
#[derive(Debug)]
pub struct Mask {
    at: u64,
    pub real: u8,
    pub shown: u8,
}

impl Mask {
    /// Puts `byte` at its place in what is read or written at `offset`.
    pub fn put(&self, bytes: &mut [u8], offset: u64, byte: u8) {
        let at = self.at.checked_sub(offset).and_then(|at| bytes.get_mut(usize::try_from(at).ok()?));
        if let Some(at) = at {
            *at = byte;
        }
    }
}

/// What an overlay says of the image below it.
#[derive(Debug, PartialEq, Eq)]
pub struct Backing {
    /// As it names it: not yet resolved.
    pub name: PathBuf,
    pub format: Option<Format>,
}

/// What a header says.
#[derive(Debug, PartialEq, Eq)]
pub struct Header {
    pub backing: Option<Backing>,
    /// Where in the file the table of the cluster tables is.
    pub l1: Range<u64>,
    /// The size of the disk.
    pub size: u64,
    /// Whether compressed clusters are zstd's.
    pub zstd: bool,
    counts: Counts,
}

impl Header {
    /// The size of a cluster: its logarithm.
    pub fn cluster_bits(&self) -> u32 {
        self.counts.cluster_bits
    }

    /// What to show instead of the header of an image with zstd: one without, whose disk ends with its last cluster. For to write up
    /// to an end inside it, `imago` would unpack that cluster itself.
    pub fn masks(&self) -> Vec<Mask> {
        if !self.zstd {
            return Vec::new();
        }
        let whole = self.size.next_multiple_of(1 << self.cluster_bits());
        let size = (SIZE_AT..).zip(self.size.to_be_bytes()).zip(whole.to_be_bytes());
        let (real, shown) = (ZSTD.to_be_bytes(), [0; 8]);
        let features = (FEATURES_AT..).zip(real).zip(shown);
        size.chain(features).map(|((at, real), shown)| Mask { at: at as u64, real, shown }).collect()
    }
}

/// How often each cluster is used.
#[derive(Debug, PartialEq, Eq)]
struct Counts {
    /// Where in the file the table of the blocks of counts is.
    table: Range<u64>,
    cluster_bits: u32,
    /// Bits of a count: its logarithm.
    width_log2: u32,
}

/// Checks an image's header.
pub fn check(image: &Image) -> Result<Header, Error> {
    // The header, its extensions and the backing file's name are in the first cluster, which has 2 MiB at most.
    let mut first = vec![0; image.len.min(2 << 20) as usize];
    image.file.read_exact_at(&mut first, 0).map_err(|error| Error::io("read", &image.path, error))?;
    parse(&first, image.len, &image.path)
}

/// The entries of a table.
pub fn entries(table: &[u8]) -> impl Iterator<Item = u64> {
    table.chunks_exact(8).map(|entry| u64::from_be_bytes(entry.try_into().unwrap_or_default()))
}

/// Where the count of a cluster is: one of `1 << width_log2` bits.
pub struct Place {
    /// The number of its block in the table of these blocks.
    pub block: u64,
    /// Its first byte in the block.
    pub at: u64,
    /// Its bytes: a big-endian number, or a part of one byte that begins at its lowest bit.
    pub len: usize,
    /// The bits of each byte that are its own.
    mask: u8,
    /// The lowest of them.
    one: u8,
}

impl Place {
    pub fn of(cluster: u64, cluster_bits: u32, width_log2: u32) -> Self {
        let in_block = 8u64 << cluster_bits >> width_log2;
        let (bit, width) = ((cluster % in_block) << width_log2, 1usize << width_log2);
        let (mask, shift) = if width < 8 { ((1u8 << width) - 1, bit % 8) } else { (0xff, 0) };
        Self {
            block: cluster / in_block,
            at: bit / 8,
            len: width.div_ceil(8),
            mask: mask << shift,
            one: 1 << shift,
        }
    }

    /// Whether the count in these bytes is 0.
    pub fn is_zero(&self, count: &[u8]) -> bool {
        count.iter().all(|byte| byte & self.mask == 0)
    }

    /// Makes a count of 0 one of 1.
    pub fn set_one(&self, count: &mut [u8]) {
        if let Some(last) = count.last_mut() {
            *last |= self.one;
        }
    }
}

/// Checks that an image that is to be written to counts the clusters of its own tables as used. Otherwise they would be given
/// away, the header first, and `imago` 0.2.6 may even call itself without end.
pub fn check_counts(image: &Image, header: &Header) -> Result<(), Error> {
    let Counts { table, cluster_bits, width_log2 } = &header.counts;
    let failed = |error| Error::io("read", &image.path, error);
    let uncounted =
        || Error::damaged(&image.path, "its tables are not counted as used; try qemu-img check -r all");
    let mut bytes = vec![0; (table.end - table.start) as usize];
    image.file.read_exact_at(&mut bytes, table.start).map_err(failed)?;
    let blocks: Vec<u64> = entries(&bytes).collect();
    let check = |cluster: u64| {
        let place = Place::of(cluster, *cluster_bits, *width_log2);
        let block = blocks.get(place.block as usize).copied().unwrap_or(0);
        let inside = block.checked_add(1 << cluster_bits).is_some_and(|end| end <= image.len);
        if block == 0 || !block.is_multiple_of(1 << cluster_bits) || !inside {
            return Err(uncounted());
        }
        let mut count = vec![0; place.len];
        image.file.read_exact_at(&mut count, block + place.at).map_err(failed)?;
        if place.is_zero(&count) { Err(uncounted()) } else { Ok(()) }
    };
    let clusters = |range: &Range<u64>| range.start >> cluster_bits..range.end.div_ceil(1 << cluster_bits);
    let tables = clusters(&(0..1)).chain(clusters(table)).chain(clusters(&header.l1));
    let own = blocks.iter().filter(|&&block| block != 0).map(|block| block >> cluster_bits);
    tables.chain(own).try_for_each(check)
}

fn parse(first: &[u8], len: u64, path: &Path) -> Result<Header, Error> {
    let damaged = |what: &str| Error::damaged(path, what);
    let u32_at = |at: usize| Some(u32::from_be_bytes(first.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let field = |at| u32_at(at).ok_or_else(|| damaged("its header is cut short"));
    let field64 = |at| Ok::<u64, Error>((u64::from(field(at)?) << 32) | u64::from(field(at + 4)?));

    if field(0)? != u32::from_be_bytes(*b"QFI\xfb") {
        return Err(damaged("it is not a qcow2 image"));
    }
    let version = field(4)?;
    if !(2..=3).contains(&version) {
        return Err(Error::unsupported(
            path,
            format!("version {version} of qcow2; convert it with qemu-img convert"),
        ));
    }
    let cluster_bits = field(20)?;
    if !(9..=21).contains(&cluster_bits) {
        return Err(damaged("its cluster size is not between 512 bytes and 2 MiB"));
    }
    let cluster = 1u64 << cluster_bits;
    if field(32)? != 0 {
        return Err(Error::unsupported(path, "encryption inside qcow2; convert it with qemu-img convert"));
    }
    // A table must be aligned, not be the header, and be there.
    let table = |offset: u64, bytes: u64, what: &str| match offset.checked_add(bytes) {
        Some(end) if offset >= cluster && offset.is_multiple_of(cluster) && end <= len => Ok(()),
        _ => Err(damaged(&format!("its {what} is not inside the file"))),
    };
    let (size, l1_entries) = (field64(SIZE_AT)?, u64::from(field(36)?));
    if size > i64::MAX as u64
        || l1_entries > MAX_L1_ENTRIES
        || l1_entries < size.div_ceil(cluster * cluster / 8)
    {
        return Err(damaged("the size of its disk and of its cluster table do not fit"));
    }
    let l1 = field64(40)?;
    if l1_entries > 0 {
        table(l1, l1_entries * 8, "cluster table")?;
    }
    let l1 = l1..l1.saturating_add(l1_entries * 8);
    let refcounts = u64::from(field(56)?) * cluster;
    if refcounts > MAX_REFCOUNT_TABLE.max(cluster) {
        return Err(damaged("its reference count table is too large"));
    }
    let counts_at = field64(48)?;
    table(counts_at, refcounts.max(8), "reference count table")?;
    let mut counts = Counts {
        table: counts_at..counts_at + refcounts,
        cluster_bits,
        // Of version 2 all are 16 bits wide.
        width_log2: 4,
    };

    let (mut extensions, mut zstd) = (None, false);
    if version == 3 {
        let features = field64(FEATURES_AT)?;
        check_features(features, path)?;
        let header = u64::from(field(100)?);
        zstd = features & ZSTD != 0;
        let kind = first.get(COMPRESSION_AT).filter(|_| header > COMPRESSION_AT as u64).copied().unwrap_or(0);
        if kind != u8::from(zstd) {
            return Err(Error::unsupported(
                path,
                format!("compression of the kind {kind}; convert it with qemu-img convert -O qcow2"),
            ));
        }
        if field(96)? > 6 || !(104..=cluster).contains(&header) {
            return Err(damaged("its header has impossible values"));
        }
        counts.width_log2 = field(96)?;
        extensions = Some(header as usize);
    }

    let name_at = field64(8)?;
    if name_at == 0 {
        return Ok(Header { backing: None, l1, size, zstd, counts });
    }
    let name = usize::try_from(name_at)
        .ok()
        .zip(usize::try_from(field(16)?).ok().filter(|len| (1..=1023).contains(len)))
        .and_then(|(at, len)| first.get(at..at.checked_add(len)?))
        .and_then(|name| std::str::from_utf8(name).ok())
        .filter(|name| !name.contains('\0'))
        .ok_or_else(|| damaged("the name of its backing file is not in its header"))?;
    if name.starts_with("json:") || name.contains("://") {
        return Err(Error::unsupported(path, format!("a backing file that is not a file ({name})")));
    }

    // Extensions are a type, a length, and data padded to 8 bytes; type 0 is the last.
    let mut format = None;
    while let Some(at) = extensions {
        let (kind, length) = (field(at)?, field(at + 4)? as usize);
        let data = first.get(at + 8..).and_then(|rest| rest.get(..length));
        let data = data.ok_or_else(|| damaged("its header extensions are cut short"))?;
        if kind == BACKING_FORMAT {
            format = Some(match data {
                b"raw" => Format::Raw,
                b"qcow2" => Format::Qcow2,
                b"vmdk" => Format::Vmdk,
                other => {
                    let other = String::from_utf8_lossy(other);
                    return Err(Error::unsupported(
                        path,
                        format!("a backing file of the format {other:?}; convert it to qcow2"),
                    ));
                }
            });
        }
        extensions = (kind != 0).then(|| at + 8 + length.next_multiple_of(8));
    }
    Ok(Header { backing: Some(Backing { name: name.into(), format }), l1, size, zstd, counts })
}

/// Refuses what an image demands of those who open it, and `imago` does not know, with a way out for each.
fn check_features(incompatible: u64, path: &Path) -> Result<(), Error> {
    let convert =
        |what| Err(Error::unsupported(path, format!("{what}; convert it with qemu-img convert -O qcow2")));
    match incompatible & !ZSTD {
        0 => Ok(()),
        bits if bits & 0b11 != 0 => Err(Error::damaged(
            path,
            "it was not closed properly, and must be repaired with qemu-img check -r all",
        )),
        bits if bits & 1 << 2 != 0 => convert("an external data file".to_owned()),
        bits if bits & 1 << 4 != 0 => convert("extended L2 entries".to_owned()),
        bits => convert(format!("the unknown features {bits:#x} of qcow2")),
    }
}
