//! Frame information structures: how registers and completions travel between controller and device (Serial ATA 2.6,
//! section 10.3).

use crate::dma::{le16, le32};

/// Bits of the status register.
pub mod status {
    pub const ERROR: u8 = 1;
    /// What is not part of a set-device-bits FIS.
    pub const BUSY_AND_REQUEST: u8 = 0x88;
    pub const SEEK_DONE: u8 = 0x10;
    pub const READY: u8 = 0x40;
    pub const BUSY: u8 = 0x80;
}

/// Bits of the error register.
pub mod error {
    pub const ABORTED: u8 = 4;
    pub const NOT_FOUND: u8 = 0x10;
    pub const UNCORRECTABLE: u8 = 0x40;
}

const HOST_TO_DEVICE: u8 = 0x27;
const DEVICE_TO_HOST: u8 = 0x34;
const DEVICE_BITS: u8 = 0xa1;
const PIO_SETUP: u8 = 0x5f;
const INTERRUPT: u8 = 0x40;
const TO_HOST: u8 = 0x20;

/// A register FIS from the host: a command, or a new value of the control register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taskfile {
    /// It is a command.
    pub is_command: bool,
    pub command: u8,
    pub features: u16,
    /// All 48 bits of the LBA registers.
    pub lba: u64,
    pub device: u8,
    pub count: u16,
    pub control: u8,
}

impl Taskfile {
    /// Reads one, if it is one.
    pub fn parse(fis: &[u8; 20]) -> Option<Self> {
        (fis[0] == HOST_TO_DEVICE).then(|| Self {
            is_command: fis[1] & 0x80 != 0,
            command: fis[2],
            features: u16::from(fis[11]) << 8 | u16::from(fis[3]),
            lba: u64::from(le32(fis, 8) & 0xff_ffff) << 24 | u64::from(le32(fis, 4) & 0xff_ffff),
            device: fis[7],
            count: le16(fis, 12),
            control: fis[15],
        })
    }
}

/// How a command's data moved, which decides how its end is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// By DMA, to the device, or not at all.
    Plain,
    /// To the host by PIO, the last block being of so many bytes.
    PioIn(u16),
    /// The same, of a packet's data, after which its end is told.
    PacketIn(u16),
    /// Queued, with this tag.
    Queued(u8),
}

/// What a command came to: the device's registers, and how many bytes moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    pub status: u8,
    pub error: u8,
    pub lba: u64,
    pub device: u8,
    pub count: u16,
    pub kind: Kind,
    pub bytes: u64,
}

impl Done {
    pub fn failed(&self) -> bool {
        self.status & status::ERROR != 0
    }

    /// What the task file data register shows.
    pub fn task(&self) -> u32 {
        u32::from(self.error) << 8 | u32::from(self.status)
    }

    /// A register FIS to the host; `interrupt` if the host is to be told.
    pub fn registers(&self, interrupt: bool) -> [u8; 20] {
        let mut fis = [0; 20];
        fis[..4].copy_from_slice(&[
            DEVICE_TO_HOST,
            if interrupt { INTERRUPT } else { 0 },
            self.status,
            self.error,
        ]);
        self.place(&mut fis);
        fis
    }

    /// The PIO setup FIS before the last block of `bytes`.
    pub fn pio(&self, bytes: u16) -> [u8; 20] {
        let mut fis = [0; 20];
        let before = self.status | 8;
        fis[..4].copy_from_slice(&[PIO_SETUP, INTERRUPT | TO_HOST, before, self.error]);
        self.place(&mut fis);
        fis[15] = self.status;
        fis[16..18].copy_from_slice(&bytes.to_le_bytes());
        fis
    }

    fn place(&self, fis: &mut [u8; 20]) {
        let lba = self.lba.to_le_bytes();
        fis[4..7].copy_from_slice(&lba[..3]);
        fis[7] = self.device;
        fis[8..11].copy_from_slice(&lba[3..6]);
        fis[12..14].copy_from_slice(&self.count.to_le_bytes());
    }

    /// A set-device-bits FIS: the commands whose bits are in `tags` have ended.
    pub fn bits(&self, tags: u32) -> [u8; 8] {
        let mut fis = [0; 8];
        let status = self.status & !status::BUSY_AND_REQUEST;
        fis[..4].copy_from_slice(&[DEVICE_BITS, INTERRUPT, status, self.error]);
        fis[4..].copy_from_slice(&tags.to_le_bytes());
        fis
    }
}
