//! ELF files, of 32 and 64 bits: what is to be loaded, and the PVH entry.

use memory::Memory;
use object::elf::{FileHeader32, FileHeader64, PT_LOAD, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, FileKind};

use crate::{Error, Image, at};

/// XEN_ELFNOTE_PHYS32_ENTRY (Xen, public/elfnote.h).
const PHYS32_ENTRY: u32 = 18;
/// Kernels have a handful.
const MAX_SEGMENTS: usize = 64;

/// One piece to load.
#[derive(Clone, Copy, Debug)]
struct Segment {
    offset: u64,
    file_size: u64,
    gpa: u64,
    size: u64,
}

/// What matters of an ELF file.
#[derive(Debug)]
pub struct Elf {
    /// Entry point.
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
        let mut elf = Self { entry: header.e_entry(endian).into(), pvh_entry: None, segments: Vec::new() };
        for ph in headers.iter().take(MAX_SEGMENTS) {
            match ph.p_type(endian) {
                PT_LOAD => elf.segments.push(Segment {
                    offset: ph.p_offset(endian).into(),
                    file_size: ph.p_filesz(endian).into(),
                    gpa: ph.p_paddr(endian).into(),
                    size: ph.p_memsz(endian).into(),
                }),
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
        let mut end = at::HIGH;
        for s in self.segments.iter().filter(|s| s.size > 0) {
            if s.gpa < at::HIGH {
                return Err(image.error("linked below 1 MiB, where Lodge keeps tables; link it higher"));
            }
            let last = s.gpa.checked_add(s.size).ok_or_else(|| image.error("a damaged ELF file"))?;
            let room =
                memory.region(s.gpa).is_some_and(|r| last <= r.gpa + r.size && r.kind == memory::Kind::Ram);
            if !room {
                return Err(image.too_large());
            }
            // What follows the file's bytes is zero: memory is fresh.
            image.copy(s.offset, s.file_size.min(s.size), memory, s.gpa)?;
            end = end.max(last);
        }
        Ok(end)
    }
}
