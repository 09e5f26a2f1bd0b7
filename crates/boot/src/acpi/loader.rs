//! The tables as firmware takes them: bytes, and a list of commands that say where to put them and what to patch (QEMU's
//! table loader, `include/hw/acpi/bios-linker-loader.h` and `hw/acpi/bios-linker-loader.c` there; every number is
//! little-endian).

use super::Tables;

/// Names of the files that firmware reads.
pub const TABLES: &str = "etc/acpi/tables";
/// As above.
pub const RSDP: &str = "etc/acpi/rsdp";
/// The commands.
pub const LOADER: &str = "etc/table-loader";

/// The contents of [`TABLES`], [`RSDP`] and [`LOADER`].
#[derive(Clone, Debug)]
pub struct ForFirmware {
    /// All tables but the root pointer.
    pub tables: Vec<u8>,
    /// The root pointer.
    pub rsdp: Vec<u8>,
    /// What to do with them.
    pub loader: Vec<u8>,
}

const COMMAND: usize = 128;
const NAME: usize = 56;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
/// Anywhere in memory below 4 GiB, or in the last 64 KiB below 1 MiB.
const HIGH: u8 = 1;
const FSEG: u8 = 2;

#[derive(Default)]
struct Loader(Vec<u8>);

impl Loader {
    fn command(&mut self, command: u32, files: &[&str], rest: &[&[u8]]) {
        let start = self.0.len();
        self.0.extend(command.to_le_bytes());
        for file in files {
            let end = self.0.len() + NAME;
            self.0.extend(file.as_bytes());
            self.0.resize(end, 0);
        }
        rest.iter().for_each(|bytes| self.0.extend_from_slice(bytes));
        self.0.resize(start + COMMAND, 0);
    }

    fn allocate(&mut self, file: &str, align: u32, zone: u8) {
        self.command(ALLOCATE, &[file], &[&align.to_le_bytes(), &[zone]]);
    }

    /// Adds the address of `to` to the `width` bytes at `offset` of `file`.
    fn pointer(&mut self, file: &str, to: &str, offset: usize, width: usize) {
        self.command(ADD_POINTER, &[file, to], &[&(offset as u32).to_le_bytes(), &[width as u8]]);
    }

    /// Sets the byte at `at` so that the `len` bytes from `start` on add up to 0.
    fn checksum(&mut self, file: &str, at: usize, start: usize, len: usize) {
        let numbers = [at, start, len].map(|n| (n as u32).to_le_bytes());
        self.command(ADD_CHECKSUM, &[file], &[&numbers[0], &numbers[1], &numbers[2]]);
    }
}

impl Tables {
    /// The tables for firmware to place.
    pub fn for_firmware(self) -> ForFirmware {
        let mut loader = Loader::default();
        let align = self.0.iter().map(|blob| blob.align).max().unwrap_or(1);
        loader.allocate(TABLES, align as u32, HIGH);
        loader.allocate(RSDP, 16, FSEG);
        let mut starts: Vec<(&str, usize)> = Vec::new();
        let (mut tables, mut rsdp) = (Vec::new(), Vec::new());
        // Where each is within its file.
        for blob in &self.0 {
            let end: usize = tables.len();
            let start = if blob.name == "RSDP" { 0 } else { end.next_multiple_of(blob.align as usize) };
            starts.push((blob.name, start));
            if blob.name != "RSDP" {
                tables.resize(start + blob.bytes.len(), 0);
            }
        }
        let find = |name: &str| starts.iter().find(|(n, _)| *n == name).map_or(0, |(_, at)| *at);
        for mut blob in self.0 {
            let start = find(blob.name);
            let file = if blob.name == "RSDP" { RSDP } else { TABLES };
            for &(offset, width, to) in &blob.links {
                blob.bytes[offset..offset + width].copy_from_slice(&find(to).to_le_bytes()[..width]);
                loader.pointer(file, TABLES, start + offset, width);
            }
            let len = blob.bytes.len();
            match blob.name {
                "FACS" => {}
                "RSDP" => {
                    (blob.bytes[8], blob.bytes[32]) = (0, 0);
                    loader.checksum(file, 8, 0, 20);
                    loader.checksum(file, 32, 0, len);
                }
                _ => {
                    blob.bytes[9] = 0;
                    loader.checksum(file, start + 9, start, len);
                }
            }
            match file {
                RSDP => rsdp = blob.bytes,
                _ => tables[start..start + len].copy_from_slice(&blob.bytes),
            }
        }
        ForFirmware { tables, rsdp, loader: loader.0 }
    }
}
