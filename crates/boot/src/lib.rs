//! What puts a guest in memory, and the state that its boot processor starts with: Linux, PVH, multiboot, firmware; and the
//! tables by which a guest finds its devices.
#![forbid(unsafe_code)]

pub mod acpi;
mod elf;
mod error;
mod linux;
mod map;
mod multiboot;
mod place;
mod pvh;
pub mod smbios;
mod start;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use machine::cpu::State;
use memory::{Kind, Memory};

pub use error::Error;
pub use map::ram_for_firmware;

/// Where things lie in low memory when there is no firmware to put them anywhere.
pub(crate) mod at {
    /// In the BIOS data area: the segment of the extended one, and KiB of conventional memory.
    pub const BDA_EBDA: u64 = 0x40e;
    /// See [`BDA_EBDA`].
    pub const BDA_LOW_KIB: u64 = 0x413;
    /// The descriptor table that guests start with.
    pub const GDT: u64 = 0x500;
    /// PVH's or multiboot's information, 4 KiB at the most.
    pub const INFO: u64 = 0x6000;
    /// Linux' zero page.
    pub const ZERO_PAGE: u64 = 0x7000;
    /// Page tables: six pages.
    pub const PAGE_TABLES: u64 = 0x9000;
    /// Command lines of kernel and modules.
    pub const CMDLINE: u64 = 0x2_0000;
    /// First address after the space for command lines.
    pub const CMDLINE_END: u64 = 0x3_0000;
    /// Extended BIOS data area: reserved.
    pub const EBDA: u64 = 0x9_fc00;
    /// ACPI tables, up to 0xf0000.
    pub const ACPI: u64 = 0xe_0000;
    /// SMBIOS entry point and tables.
    pub const SMBIOS: u64 = 0xf_0000;
    /// Where conventional memory ends and extended memory begins.
    pub const HIGH: u64 = 0x10_0000;
}

/// What to load.
#[derive(Clone, Debug)]
pub struct Kernel<'a> {
    /// Linux bzImage, ELF with a PVH note, or multiboot.
    pub kernel: &'a Path,
    /// Initial RAM disk, or modules.
    pub initrd: &'a [PathBuf],
    /// Command line.
    pub cmdline: &'a str,
    /// Where the ACPI tables' root pointer is.
    pub rsdp: u64,
}

/// Loads a kernel; the state of the boot processor that starts it.
///
/// # Errors
/// A file cannot be read, is of no kind that is known, is damaged, or does not fit into memory.
pub fn load(memory: &Memory, what: &Kernel<'_>) -> Result<State, Error> {
    let file = Image::open(what.kernel)?;
    let head = file.head()?;
    if head.get(0x202..0x206) == Some(b"HdrS") {
        return linux::load(memory, &file, what);
    }
    if head.starts_with(b"\x7fELF") {
        let elf = elf::Elf::read(&file)?;
        return match (elf.pvh_entry, multiboot::find(&head)) {
            (Some(entry), _) => pvh::load(memory, &file, &elf, entry, what),
            (None, Some(header)) => multiboot::load(memory, &file, &header, Some(&elf), what),
            (None, None) => Err(file.error("an ELF file with neither a PVH note nor a multiboot header; of a Linux kernel, give the bzImage (vmlinuz)")),
        };
    }
    if let Some(header) = multiboot::find(&head) {
        return multiboot::load(memory, &file, &header, None, what);
    }
    Err(file.error(match head.get(..4) {
        Some([0x1f, 0x8b, ..]) => "compressed with gzip; decompress it first (gunzip)",
        Some([0x28, 0xb5, 0x2f, 0xfd]) => "compressed with zstd; decompress it first (unzstd)",
        Some([0xfd, b'7', b'z', b'X']) => "compressed with xz; decompress it first (unxz)",
        Some([b'Q', b'F', b'I', 0xfb]) => "a qcow2 disk image; give it as the guest, or with --disk",
        _ => "no kernel that Lodge knows; give a Linux bzImage (vmlinuz), an ELF with a PVH note, or a multiboot kernel",
    }))
}

/// Whether `path` is a disk to start from, not a kernel to load: an image in a disk's format, or with a boot sector.
///
/// # Errors
/// It cannot be read.
pub fn is_disk(path: &Path) -> Result<bool, Error> {
    let file = File::open(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let mut head = [0; 1024];
    let n = file.read_at(&mut head, 0).map_err(|source| Error::Read { path: path.into(), source })?;
    let head = &head[..n];
    let is = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    // A kernel's first sector ends as a boot sector does.
    let kernel = is(0x202, b"HdrS") || is(0, b"\x7fELF");
    let image = is(0, b"QFI\xfb") || is(0, b"KDMV") || is(0, b"# Disk DescriptorFile");
    Ok(!kernel && (image || is(510, &[0x55, 0xaa]) || is(512, b"EFI PART")))
}

/// Puts firmware where the reset vector is, and its last 128 KiB below 1 MiB, as a PC's chipset shows it.
///
/// # Errors
/// The file cannot be read, or there is no ROM of its size (see [`rom_size`]) in `memory`.
pub fn load_firmware(memory: &Memory, path: &Path) -> Result<(), Error> {
    let file = Image::open(path)?;
    let rom = memory.regions().iter().find(|r| r.kind == Kind::Rom).filter(|r| r.size >= file.len);
    let rom = rom.ok_or_else(|| file.error("larger than the space for firmware"))?;
    let bytes = file.read(0, file.len)?;
    memory.write(rom.offset + rom.size - file.len, &bytes);
    let tail = &bytes[bytes.len().saturating_sub(0x2_0000)..];
    place::bytes(memory, at::HIGH - tail.len() as u64, tail)
}

/// The ROM that firmware in `path` needs: its size, rounded up to pages.
///
/// # Errors
/// The file cannot be read, or is no firmware: those are up to 16 MiB.
pub fn rom_size(path: &Path) -> Result<u64, Error> {
    let file = Image::open(path)?;
    if !(16..=16 << 20).contains(&file.len) {
        return Err(file.error("no firmware: that is between 16 bytes and 16 MiB"));
    }
    Ok(file.len.next_multiple_of(memory::PAGE_SIZE))
}

/// A file that is being loaded.
pub(crate) struct Image {
    file: File,
    path: PathBuf,
    /// Bytes.
    pub len: u64,
}

impl Image {
    pub fn open(path: &Path) -> Result<Self, Error> {
        let open = || {
            let file = File::open(path)?;
            let meta = file.metadata()?;
            if !meta.is_file() {
                return Err(std::io::Error::other("not a regular file"));
            }
            Ok((file, meta.len()))
        };
        let (file, len) = open().map_err(|source| Error::Read { path: path.into(), source })?;
        Ok(Self { file, path: path.into(), len })
    }

    /// `what` is wrong with it.
    pub fn error(&self, what: &'static str) -> Error {
        Error::Format { path: self.path.clone(), what }
    }

    /// It does not fit into memory.
    pub fn too_large(&self) -> Error {
        Error::TooLarge { path: self.path.clone() }
    }

    /// The first 64 KiB, or all of it.
    pub fn head(&self) -> Result<Vec<u8>, Error> {
        self.read(0, self.len.min(0x1_0000))
    }

    /// `len` bytes at `offset`; never more than the file has.
    pub fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, Error> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(self.error("truncated: it ends before what its header says"));
        }
        let mut bytes = vec![0; len as usize];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(|source| Error::Read { path: self.path.clone(), source })?;
        Ok(bytes)
    }

    /// Copies `len` bytes at `offset` of the file to `gpa`, piece by piece.
    pub fn copy(&self, offset: u64, len: u64, memory: &Memory, gpa: u64) -> Result<(), Error> {
        // Small enough to come from a heap that is there anyway: one of 1 MiB would stay with the process for good.
        const PIECE: u64 = 1 << 16;
        let mut done = 0;
        while done < len {
            let n = PIECE.min(len - done);
            let bytes = self.read(offset.saturating_add(done), n)?;
            place::bytes(memory, gpa.saturating_add(done), &bytes).map_err(|_| self.too_large())?;
            done += n;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
