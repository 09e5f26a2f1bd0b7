//! ELF files, of 32 and 64 bits: what is to be loaded, and the PVH entry.

use memory::{Kind, Memory};
use object::elf::{FileHeader32, FileHeader64, PT_LOAD, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, FileKind};

use crate::{Error, Image, at};

/// XEN_ELFNOTE_PHYS32_ENTRY (Xen, public/elfnote.h).
const PHYS32_ENTRY: u32 = 18;
/// Kernels have a handful.
const MAX_SEGMENTS: usize = 64;

/// A piece of a file, and where it is to be in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    pub offset: u64,
    pub file_size: u64,
    pub gpa: u64,
    /// In memory: what follows the file's bytes is zero.
    pub size: u64,
}

impl Segment {
    /// Copies it to guest memory, which is fresh. Returns the first address after it.
    pub fn load(&self, image: &Image, memory: &Memory) -> Result<u64, Error> {
        if self.gpa < at::HIGH {
            return Err(image.error("linked below 1 MiB, where Lodge keeps tables; link it higher"));
        }
        let end =
            self.gpa.checked_add(self.size).ok_or_else(|| image.error("damaged: a part of it has no end"))?;
        let region = memory.region(self.gpa).filter(|r| r.kind == Kind::Ram && end <= r.gpa + r.size);
        region.ok_or_else(|| image.too_large())?;
        image.copy(self.offset, self.file_size.min(self.size), memory, self.gpa)?;
        Ok(end)
    }
}

/// What matters of an ELF file.
#[derive(Debug)]
pub struct Elf {
    /// Entry point, physical: some kernels give the virtual one.
    pub entry: u64,
    /// Entry point for PVH: 32-bit, paging off.
    pub pvh_entry: Option<u64>,
    segments: Vec<Segment>,
}

impl Elf {
    pub fn read(image: &Image) -> Result<Self, Error> {
        // Headers and notes of kernels lie anywhere in the file.
        if image.len > 1 << 30 {
            return Err(image.error("larger than any kernel"));
        }
        let data = image.read(0, image.len)?;
        let parsed = match FileKind::parse(&*data) {
            Ok(FileKind::Elf32) => Self::parse::<FileHeader32<Endianness>>(&data),
            Ok(FileKind::Elf64) => Self::parse::<FileHeader64<Endianness>>(&data),
            _ => None,
        };
        parsed.ok_or_else(|| image.error("a damaged ELF file"))
    }

    fn parse<H: FileHeader<Endian = Endianness>>(data: &[u8]) -> Option<Self> {
        let header = H::parse(data).ok()?;
        let endian = header.endian().ok().filter(|e| *e == Endianness::Little)?;
        let headers = header.program_headers(endian, data).ok()?;
        let virtual_entry: u64 = header.e_entry(endian).into();
        let mut elf = Self { entry: virtual_entry, pvh_entry: None, segments: Vec::new() };
        for ph in headers.iter().take(MAX_SEGMENTS) {
            match ph.p_type(endian) {
                PT_LOAD => {
                    let (gpa, size) = (ph.p_paddr(endian).into(), ph.p_memsz(endian).into());
                    if let Some(inside) =
                        virtual_entry.checked_sub(ph.p_vaddr(endian).into()).filter(|&i| i < size)
                    {
                        elf.entry = gpa.checked_add(inside)?;
                    }
                    let (offset, file_size) = (ph.p_offset(endian).into(), ph.p_filesz(endian).into());
                    elf.segments.push(Segment { offset, file_size, gpa, size });
                }
                PT_NOTE => elf.pvh_entry = elf.pvh_entry.or(Self::pvh::<H>(ph, endian, data)),
                _ => {}
            }
        }
        Some(elf)
    }

    fn pvh<H: FileHeader<Endian = Endianness>>(
        ph: &H::ProgramHeader,
        endian: Endianness,
        data: &[u8],
    ) -> Option<u64> {
        let mut notes = ph.notes(endian, data).ok()??;
        while let Ok(Some(note)) = notes.next() {
            if note.name() == b"Xen" && note.n_type(endian) == PHYS32_ENTRY {
                let entry = note.desc().get(..4)?.try_into().ok()?;
                return Some(u32::from_le_bytes(entry).into());
            }
        }
        None
    }

    /// Copies all segments to guest memory. Returns the first address after them.
    pub fn load(&self, image: &Image, memory: &Memory) -> Result<u64, Error> {
        let mut loaded = self.segments.iter().filter(|s| s.size > 0).map(|s| s.load(image, memory));
        loaded.try_fold(at::HIGH, |end, last| Ok(end.max(last?)))
    }
}
