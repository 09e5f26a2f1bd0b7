//! The disk's layout: a GUID partition table with room for GRUB's core (BIOS boot), an EFI system partition, and the root file
//! system last, so that it can grow with the disk (UEFI specification 2.10, chapter 5).

use std::collections::BTreeMap;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use disks::Disk;
use fatfs::FormatVolumeOptions;
use gpt::disk::LogicalBlockSize::Lb512;
use gpt::mbr::ProtectiveMBR;
use gpt::{GptConfig, GptError, partition_types as kind};

use crate::Error;

/// The root file system's partition, as the builder's kernel calls it.
pub const ROOT: &str = "/dev/vda3";
const SECTOR: u64 = 512;
const MIB: u64 = 1 << 20;
/// The secondary table, at the disk's end: 32 sectors of entries, and the header.
const SECONDARY: u64 = 33 * SECTOR;
const BIOS_BOOT: u64 = 3 * MIB;
const ESP: u64 = 64 * MIB;

/// Writes partition table and EFI system partition to an empty disk.
pub fn write(disk: &Disk, path: &Path) -> Result<(), Error> {
    let wrong = |reason: String| Error::Layout { path: path.to_owned(), reason };
    // Made in a sparse file first, for the library wants a file.
    let mut table = tempfile::tempfile().map_err(Error::file(std::env::temp_dir()))?;
    table.set_len(disk.size()).map_err(Error::file(std::env::temp_dir()))?;
    let esp = partition(&mut table).map_err(|error| wrong(error.to_string()))?;
    for (start, len) in [(0, MIB), (disk.size() - SECONDARY, SECONDARY)] {
        let mut bytes = vec![0; len as usize];
        let read = table.seek(SeekFrom::Start(start)).and_then(|_| table.read_exact(&mut bytes));
        read.map_err(Error::file(std::env::temp_dir()))?;
        disk.write(start, &bytes)?;
    }
    let mut fat = Cursor::new(vec![0; ESP as usize]);
    let options = FormatVolumeOptions::new().volume_label(*b"EFI        ");
    fatfs::format_volume(&mut fat, options).map_err(|error| wrong(error.to_string()))?;
    for (at, bytes) in fat.get_ref().chunks(1 << 16).enumerate() {
        if bytes.iter().any(|byte| *byte != 0) {
            disk.write(esp + ((at as u64) << 16), bytes)?;
        }
    }
    Ok(())
}

/// Writes both partition tables; where the EFI system partition begins, in bytes.
fn partition(mut device: impl gpt::DiskDevice) -> Result<u64, GptError> {
    let size = device.seek(SeekFrom::End(0)).map_err(GptError::Io)?;
    let sectors = u32::try_from(size / SECTOR - 1).unwrap_or(u32::MAX);
    ProtectiveMBR::with_lb_size(sectors).overwrite_lba0(&mut device).map_err(|error| match error {
        gpt::mbr::MBRError::Io(error) => GptError::Io(error),
        _ => GptError::NotEnoughSpace,
    })?;
    let config = GptConfig::new().writable(true).logical_block_size(Lb512);
    let mut table = config.create_from_device(device, None)?;
    table.update_partitions(BTreeMap::new())?;
    let aligned = Some(MIB / SECTOR);
    table.add_partition("bios", BIOS_BOOT, kind::BIOS, 0, aligned)?;
    let esp = table.add_partition("esp", ESP, kind::EFI, 0, aligned)?;
    let esp = table.partitions()[&esp].first_lba * SECTOR;
    let rest = table.find_free_sectors().iter().map(|(_, len)| *len).max().unwrap_or_default();
    let rest = (rest * SECTOR / MIB) * MIB;
    table.add_partition("root", rest, kind::LINUX_FS, 0, aligned)?;
    table.write()?;
    Ok(esp)
}

#[cfg(test)]
mod tests {
    use super::*;
    use disks::{Format, Options};

    #[test]
    fn the_tables_and_the_efi_system_partition_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        let size = 128 * MIB;
        disks::create(&path, Format::Raw, size, None).unwrap();
        let disk = Disk::open(&path, &Options { format: Some(Format::Raw), ..Default::default() }).unwrap();
        write(&disk, &path).unwrap();
        drop(disk);
        // Both tables have to be sound.
        let table = GptConfig::new().only_valid_headers(true).open(&path).unwrap();
        assert!(table.primary_header().is_ok() && table.backup_header().is_ok());
        let parts: Vec<_> = table.partitions().values().filter(|part| part.is_used()).collect();
        let kinds: Vec<_> = parts.iter().map(|part| part.part_type_guid.clone()).collect();
        assert_eq!(kinds, [kind::BIOS, kind::EFI, kind::LINUX_FS]);
        for pair in parts.windows(2) {
            assert!(pair[0].last_lba < pair[1].first_lba && pair[1].first_lba % 2048 == 0, "{parts:?}");
        }
        assert!(parts[2].last_lba * SECTOR > size - 2 * MIB, "the root file system has the rest");
        let bytes = std::fs::read(&path).unwrap();
        let esp = &bytes[(parts[1].first_lba * SECTOR) as usize..][..ESP as usize];
        let volume = fatfs::FileSystem::new(Cursor::new(esp.to_vec()), fatfs::FsOptions::new()).unwrap();
        assert_eq!(volume.volume_label(), "EFI");
    }
}
