//! What the controller tells of itself (NVMe 1.4, sections 5.14 and 5.15).

use disks::Disk;

use super::SECTOR;
use super::command::{MDTS, PAGE};
use super::registers::{EVENT_REQUESTS, MOST_ENTRIES, VERSION};

type Page = [u8; PAGE as usize];
const REVISION: &str = env!("CARGO_PKG_VERSION");

fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Text, padded with blanks.
fn text(page: &mut [u8], at: usize, len: usize, text: &str) {
    page[at..at + len].fill(b' ');
    let letters = text.bytes().map(|b| if (0x20..0x7f).contains(&b) { b } else { b'_' });
    page[at..at + len].iter_mut().zip(letters).for_each(|(to, from)| *to = from);
}

/// A number that is the same wherever the disk is: what its serial number comes to (FNV-1a), from a start of one's choice.
fn hash(serial: &str, start: u64) -> u64 {
    serial.bytes().fold(start, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// The namespace's names: NGUID and EUI-64.
fn names(serial: &str) -> ([u8; 16], [u8; 8]) {
    let (high, low) = (hash(serial, 0xcbf2_9ce4_8422_2325), hash(serial, 0x6c6f_6467_652d_6e76));
    ((u128::from(high) << 64 | u128::from(low)).to_be_bytes(), high.to_be_bytes())
}

/// The controller (figure 251).
pub fn controller(serial: &str) -> Page {
    let mut p = [0; PAGE as usize];
    put(&mut p, 0, &super::ID.vendor.to_le_bytes());
    put(&mut p, 2, &super::ID.subsystem.0.to_le_bytes());
    text(&mut p, 4, 20, serial);
    text(&mut p, 24, 40, "Lodge NVMe disk");
    text(&mut p, 64, 8, REVISION);
    p[77] = MDTS;
    put(&mut p, 80, &VERSION.to_le_bytes());
    // An I/O controller.
    p[111] = 1;
    // Aborts and event requests at most, less one; one firmware slot, for reading; log pages and power states less one.
    p[258] = 3;
    p[259] = EVENT_REQUESTS as u8 - 1;
    p[260] = 3;
    // Too warm, and far too warm, in kelvins.
    put(&mut p, 266, &343u16.to_le_bytes());
    put(&mut p, 268, &373u16.to_le_bytes());
    // Entries of 64 and 16 bytes.
    put(&mut p, 512, &[0x66, 0x44]);
    put(&mut p, 514, &(MOST_ENTRIES as u16).to_le_bytes());
    // Namespaces.
    p[516] = 1;
    // Data set management and write zeroes; a write cache, and flushes of all namespaces.
    p[520] = 0xc;
    p[525] = 7;
    let (guid, _) = names(serial);
    let hex: String = guid.iter().map(|byte| format!("{byte:02x}")).collect();
    let name = format!(
        "nqn.2014-08.org.nvmexpress:uuid:{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    );
    put(&mut p, 768, name.as_bytes());
    // The one power state: 25 W.
    put(&mut p, 2048, &2500u16.to_le_bytes());
    p
}

/// The one namespace (figure 249).
pub fn namespace(disk: &Disk, serial: &str) -> Page {
    let mut p = [0; PAGE as usize];
    let sectors = disk.size() / SECTOR;
    [0, 8, 16].into_iter().for_each(|at| put(&mut p, at, &sectors.to_le_bytes()));
    // Writing zeroes may deallocate.
    p[33] = 8;
    p[99] = disk.is_read_only().into();
    let (guid, eui) = names(serial);
    put(&mut p, 104, &guid);
    put(&mut p, 120, &eui);
    // The one format: sectors of 512 bytes.
    p[130] = SECTOR.trailing_zeros() as u8;
    p
}

/// Namespaces above `after`.
pub fn namespaces(after: u32) -> Page {
    let mut p = [0; PAGE as usize];
    p[0] = u8::from(after < 1);
    p
}

/// The namespace's names, as a list.
pub fn descriptors(serial: &str) -> Page {
    let mut p = [0; PAGE as usize];
    let (guid, eui) = names(serial);
    put(&mut p, 0, &[1, 8]);
    put(&mut p, 4, &eui);
    put(&mut p, 12, &[2, 16]);
    put(&mut p, 16, &guid);
    p
}

/// A log page: errors, of which there is none; health; firmware.
pub fn log_page(which: u8) -> Option<Vec<u8>> {
    let mut page = vec![0; 512];
    match which {
        1 => page.truncate(64),
        2 => {
            // Temperature in kelvins; spare blocks in per cent, and how few are too few.
            put(&mut page, 1, &300u16.to_le_bytes());
            put(&mut page, 3, &[100, 10]);
        }
        3 => {
            page[0] = 1;
            text(&mut page, 8, 8, REVISION);
        }
        _ => return None,
    }
    Some(page)
}
