//! SMBIOS 3.0 tables (DSP0134): what dmidecode shows.

use memory::{HOLE_END, Kind, Memory};

use crate::{Error, at, map, place};

/// Puts the entry point and the tables where kernels look for them.
pub fn place(memory: &Memory, cpus: u32) -> Result<(), Error> {
    let tables = tables(memory, cpus);
    let start = at::SMBIOS + 0x20;
    place::bytes(memory, at::SMBIOS, &entry(&tables, start))?;
    place::bytes(memory, start, &tables)
}

/// The tables for firmware to place, and an entry point to go with them.
pub fn for_firmware(memory: &Memory, cpus: u32) -> (Vec<u8>, Vec<u8>) {
    let tables = tables(memory, cpus);
    let entry = entry(&tables, 0);
    (tables, entry)
}

/// The entry point of `tables` at `start` (DSP0134, 5.2.2).
fn entry(tables: &[u8], start: u64) -> Vec<u8> {
    let mut entry = vec![0; 24];
    entry[..5].copy_from_slice(b"_SM3_");
    (entry[6], entry[7], entry[8], entry[10]) = (24, 3, 2, 1);
    entry[12..16].copy_from_slice(&(tables.len() as u32).to_le_bytes());
    entry[16..24].copy_from_slice(&start.to_le_bytes());
    entry[5] = entry.iter().fold(0u8, |s, b| s.wrapping_sub(*b));
    entry
}

/// One structure: type, handle, formatted bytes after the header, strings.
fn structure(out: &mut Vec<u8>, kind: u8, handle: u16, formatted: &[u8], strings: &[&str]) {
    out.extend_from_slice(&[kind, formatted.len() as u8 + 4]);
    out.extend_from_slice(&handle.to_le_bytes());
    out.extend_from_slice(formatted);
    for string in strings {
        out.extend_from_slice(string.as_bytes());
        out.push(0);
    }
    out.extend_from_slice(if strings.is_empty() { &[0, 0] } else { &[0] });
}

fn tables(memory: &Memory, cpus: u32) -> Vec<u8> {
    let mut out = Vec::new();
    let version = env!("CARGO_PKG_VERSION");
    let mib = (memory.ram_size() >> 20).min(0x7fff_ffff) as u32;
    // BIOS: a virtual machine (extension byte 2, bit 4).
    let bios = [1, 2, 0, 0xe0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0x14, 0, 0, 0xff, 0xff];
    structure(&mut out, 0, 0, &bios, &["Lodge", version]);
    let mut system = [0; 23];
    system[..4].copy_from_slice(&[1, 2, 3, 0]);
    system[20] = 6; // woken by the power switch
    structure(&mut out, 1, 0x100, &system, &["Lodge", "Virtual machine", version]);
    structure(&mut out, 3, 0x300, &[1, 1, 0, 0, 0, 3, 3, 3, 2, 0, 0, 0, 0, 0, 1, 0, 0], &["Lodge"]);
    let mut processor = [0; 38];
    (processor[0], processor[1], processor[2], processor[3]) = (1, 3, 1, 2);
    processor[20] = 0x41; // populated, enabled
    processor[21] = 1;
    processor[22..28].fill(0xff); // caches: not told
    let count = cpus.min(255) as u8;
    (processor[31], processor[32], processor[33]) = (count, count, count);
    structure(&mut out, 4, 0x400, &processor, &["CPU 0", "Lodge"]);
    let kib = mib.saturating_mul(1024).min(0x8000_0000);
    let mut array = [0; 19];
    (array[0], array[1], array[2]) = (1, 3, 3); // system memory without error correction
    array[3..7].copy_from_slice(&kib.to_le_bytes());
    array[7..9].copy_from_slice(&0xfffeu16.to_le_bytes());
    array[9] = 1;
    structure(&mut out, 16, 0x1000, &array, &[]);
    let mut module = [0; 30];
    module[..2].copy_from_slice(&0x1000u16.to_le_bytes());
    module[2..8].copy_from_slice(&[0xfe, 0xff, 64, 0, 64, 0]);
    let size = if mib < 0x7fff { mib as u16 } else { 0x7fff };
    module[8..10].copy_from_slice(&size.to_le_bytes());
    (module[10], module[12], module[14]) = (9, 1, 7);
    module[24..28].copy_from_slice(&mib.to_le_bytes());
    structure(&mut out, 17, 0x1100, &module, &["DIMM 0"]);
    let ram = memory.regions().iter().filter(|r| r.kind == Kind::Ram && r.gpa >= HOLE_END);
    let above = ram.map(|r| (r.gpa, r.gpa + r.size));
    for (n, (start, end)) in std::iter::once((0, map::low_end(memory))).chain(above).enumerate() {
        let mut mapped = [0; 27];
        // In KiB up to 4 TiB, else in bytes.
        if end <= 1 << 42 {
            mapped[..4].copy_from_slice(&((start >> 10) as u32).to_le_bytes());
            mapped[4..8].copy_from_slice(&((end >> 10) as u32 - 1).to_le_bytes());
        } else {
            mapped[..8].fill(0xff);
            mapped[11..19].copy_from_slice(&start.to_le_bytes());
            mapped[19..].copy_from_slice(&(end - 1).to_le_bytes());
        }
        mapped[8..10].copy_from_slice(&0x1000u16.to_le_bytes());
        mapped[10] = 1;
        structure(&mut out, 19, 0x1300 + n as u16, &mapped, &[]);
    }
    structure(&mut out, 127, 0x7f00, &[], &[]);
    out
}
