//! Firmware for virtual PCs: SeaBIOS and OVMF, in Debian's packages.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::Options;
use crate::error::Error;
use crate::progress::Progress;
use crate::source::Source;

/// Which firmware.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// SeaBIOS, a BIOS.
    #[default]
    Bios,
    /// OVMF, a UEFI.
    Uefi,
}

/// Firmware's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirmwareFiles {
    /// What the processor starts with.
    pub code: PathBuf,
    /// Of UEFI: its variables as they are in the beginning.
    pub variables: Option<PathBuf>,
    /// Of BIOS: its driver of the display.
    pub vga: Option<PathBuf>,
}

impl Firmware {
    /// The package, and the files in it.
    fn package(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::Bios => {
                ("seabios", &["usr/share/seabios/bios-256k.bin", "usr/share/seabios/vgabios-stdvga.bin"])
            }
            Self::Uefi => ("ovmf", &["usr/share/OVMF/OVMF_CODE_4M.fd", "usr/share/OVMF/OVMF_VARS_4M.fd"]),
        }
    }
}

/// Gives firmware's files: those of the host, if its package is installed, else from the cache or the archive.
pub fn firmware(
    options: &Options,
    which: Firmware,
    progress: &mut dyn Progress,
) -> Result<FirmwareFiles, Error> {
    let (package, names) = which.package();
    let installed: Vec<PathBuf> = names.iter().map(|name| options.sysroot.join(name)).collect();
    let mut files = if installed.iter().all(|path| path.is_file()) {
        installed
    } else {
        let found = Source::new(options)?.files(&[package], names, progress)?;
        found.files.into_iter().map(|file| file.stored).collect()
    }
    .into_iter();
    let missing = || Error::NoFile { package: package.to_owned(), file: names[0].to_owned() };
    let code = files.next().ok_or_else(missing)?;
    let second = files.next();
    Ok(match which {
        Firmware::Bios => FirmwareFiles { code, variables: None, vga: second },
        Firmware::Uefi => FirmwareFiles { code, variables: second, vga: None },
    })
}
