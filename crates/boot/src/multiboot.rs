//! Multiboot 1 (Multiboot Specification 0.6.96).

use std::path::{Path, PathBuf};

use machine::cpu::State;
use memory::Memory;
use x86::gpr;

use crate::elf::{Elf, Segment};
use crate::{Error, Image, Kernel, at, map, place, start};

const MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// Header flags that must be understood: page-aligned modules, memory information, video mode (ignored).
const KNOWN: u32 = 0x0007;
/// Header flag: addresses follow.
const HAS_ADDRESSES: u32 = 1 << 16;
/// Modules that fit into the information page.
const MAX_MODULES: usize = 16;

/// What the kernel asks for.
pub struct Header {
    flags: u32,
    /// For files that are no ELF, or lie about it: what to load (its size being 0 stands for all) and where to start.
    addresses: Option<(Segment, u64)>,
}

/// The header in a file's first 8 KiB, if there is one.
pub fn find(head: &[u8]) -> Option<Header> {
    let words: Vec<u32> =
        head.chunks_exact(4).take(2048).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
    let is_header = |w: &[u32]| w[0] == MAGIC && w[0].wrapping_add(w[1]).wrapping_add(w[2]) == 0;
    let at = words.windows(3).position(is_header)?;
    let flags = words[at + 1];
    let addresses = if flags & HAS_ADDRESSES != 0 {
        Some(addresses(at as u64 * 4, words.get(at + 3..at + 8)?)?)
    } else {
        None
    };
    Some(Header { flags, addresses })
}

/// From the five words header_addr, load_addr, load_end_addr, bss_end_addr and entry_addr of the header at `offset`.
fn addresses(offset: u64, words: &[u32]) -> Option<(Segment, u64)> {
    let [header, start, load_end, bss_end, entry] = *words else { return None };
    let [header, start, load_end, bss_end] = [header, start, load_end, bss_end].map(u64::from);
    let offset = offset.checked_sub(header.checked_sub(start)?)?;
    let file_size = if load_end == 0 { 0 } else { load_end.checked_sub(start)? };
    let size = file_size.max(bss_end.saturating_sub(start));
    Some((Segment { offset, file_size, gpa: start, size }, entry.into()))
}

/// Copies the kernel into memory. Returns its entry point, and the first address after it.
fn load_kernel(
    memory: &Memory,
    image: &Image,
    header: &Header,
    elf: Option<&Elf>,
) -> Result<(u64, u64), Error> {
    match (header.addresses, elf) {
        (Some((mut segment, entry)), _) => {
            if segment.file_size == 0 {
                segment.file_size = image.len.saturating_sub(segment.offset);
                segment.size = segment.size.max(segment.file_size);
            }
            Ok((entry, segment.load(image, memory)?))
        }
        (None, Some(elf)) => Ok((elf.entry, elf.load(image, memory)?)),
        (None, None) => {
            Err(image.error("a multiboot header that does not say where to load, in a file that is no ELF"))
        }
    }
}

/// A module in guest memory.
pub struct Module {
    pub start: u64,
    pub len: u64,
    name: String,
}

/// A module's file, and what follows it on its command line: `FILE ARGUMENTS`, unless there is a file of that whole name.
fn with_arguments(path: &Path) -> (PathBuf, String) {
    let text = path.to_string_lossy();
    match text.find(' ') {
        Some(at) if !path.exists() => (PathBuf::from(&text[..at]), text[at..].to_owned()),
        _ => (path.to_owned(), String::new()),
    }
}

/// Loads all of `what.initrd`, above `floor`.
pub fn modules(memory: &Memory, what: &Kernel<'_>, floor: u64) -> Result<Vec<Module>, Error> {
    let mut limit = u64::MAX;
    let mut loaded = Vec::new();
    for path in what.initrd {
        let (path, arguments) = with_arguments(path);
        let image = Image::open(&path)?;
        if loaded.len() == MAX_MODULES {
            return Err(image.error("one module too many: up to 16 can be given"));
        }
        let start = place::high(memory, image.len, limit, floor).ok_or_else(|| image.too_large())?;
        image.copy(0, image.len, memory, start)?;
        limit = start;
        // The guest has no business with the host's folders.
        let name = path.file_name().unwrap_or_default().to_string_lossy() + arguments.as_str();
        let name = name.into_owned();
        loaded.push(Module { start, len: image.len, name });
    }
    Ok(loaded)
}

pub fn load(
    memory: &Memory,
    image: &Image,
    header: &Header,
    elf: Option<&Elf>,
    what: &Kernel<'_>,
) -> Result<State, Error> {
    if header.flags & 0xffff & !KNOWN != 0 {
        return Err(image.error("a multiboot kernel that requires features which Lodge does not have"));
    }
    let (entry, end) = load_kernel(memory, image, header, elf)?;
    let modules = modules(memory, what, end)?;

    let mut strings = place::cmdline(memory, at::CMDLINE, what.cmdline, usize::MAX)?;
    let list_at = at::INFO + 128;
    let mut list = Vec::new();
    for module in &modules {
        for word in [module.start, module.start + module.len, strings, 0] {
            list.extend_from_slice(&(word as u32).to_le_bytes());
        }
        strings = place::cmdline(memory, strings, &module.name, usize::MAX)?;
    }
    let loader = strings;
    place::cmdline(memory, loader, "Lodge", usize::MAX)?;
    let map_at = list_at + list.len() as u64;
    let mut table = Vec::new();
    for range in map::ranges(memory) {
        table.extend_from_slice(&20u32.to_le_bytes());
        table.extend_from_slice(&range.start.to_le_bytes());
        table.extend_from_slice(&range.size.to_le_bytes());
        table.extend_from_slice(&(range.kind as u32).to_le_bytes());
    }

    let mut info = [0u32; 30];
    info[0] = 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9; // memory, command line, modules, map, loader's name
    (info[1], info[2]) = (640 - 1, ((map::low_end(memory) - at::HIGH) >> 10) as u32);
    info[4] = at::CMDLINE as u32;
    (info[5], info[6]) = (modules.len() as u32, list_at as u32);
    (info[11], info[12]) = (table.len() as u32, map_at as u32);
    info[16] = loader as u32;
    let bytes: Vec<u8> = info.iter().flat_map(|w| w.to_le_bytes()).collect();
    place::bytes(memory, at::INFO, &bytes)?;
    place::bytes(memory, list_at, &list)?;
    place::bytes(memory, map_at, &table)?;
    // Kernels of that age look for the end of conventional memory in the BIOS data area: Xen puts code below it.
    place::bytes(memory, at::BDA_EBDA, &((at::EBDA >> 4) as u16).to_le_bytes())?;
    place::bytes(memory, at::BDA_LOW_KIB, &((at::EBDA >> 10) as u16).to_le_bytes())?;

    let mut state = start::protected(memory, entry)?;
    state.gpr[gpr::RAX] = LOADER_MAGIC;
    state.gpr[gpr::RBX] = at::INFO;
    Ok(state)
}
