//! What devices tell of themselves: IDENTIFY DEVICE (ATA8-ACS, 7.16) and IDENTIFY PACKET DEVICE (7.17).

use super::ata::{AtaState, MULTIPLE, SECTOR, TRIM_BLOCKS, checksum};

/// The version of the "firmware".
pub const REVISION: &str = env!("CARGO_PKG_VERSION");

struct Words([u8; 512]);

impl Words {
    fn set(&mut self, word: usize, value: u16) {
        self.0[2 * word..2 * word + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// A number over several words.
    fn number(&mut self, word: usize, words: usize, value: u64) {
        self.0[2 * word..2 * (word + words)].copy_from_slice(&value.to_le_bytes()[..2 * words]);
    }

    /// Text, padded with blanks, the first letter of each pair in the high byte.
    fn text(&mut self, word: usize, words: usize, text: &str) {
        let mut letters = text.bytes().map(|b| if (0x20..0x7f).contains(&b) { b } else { b'_' });
        for n in word..word + words {
            let mut letter = || u16::from(letters.next().unwrap_or(b' '));
            let (high, low) = (letter(), letter());
            self.set(n, high << 8 | low);
        }
    }

    /// What disks and CD drives have in common.
    fn common(serial: &str, model: &str) -> Self {
        let mut w = Self([0; 512]);
        w.text(10, 10, serial);
        w.text(23, 4, REVISION);
        w.text(27, 20, model);
        // DMA, LBA, IORDY.
        w.set(49, 0xb00);
        // Words 64 to 70 and 88 hold.
        w.set(53, 6);
        // Multi-word DMA and PIO modes; cycles of 120 ns.
        w.set(63, 7);
        w.set(64, 3);
        (65..=68).for_each(|word| w.set(word, 120));
        // 1.5, 3 and 6 Gbit/s.
        w.set(76, 0xe);
        // ATA-4 to ATA8-ACS.
        w.set(80, 0x1f0);
        // Ultra DMA modes 0 to 6.
        w.set(88, 0x7f);
        w
    }

    fn finish(mut self) -> [u8; 512] {
        self.0[510] = 0xa5;
        self.0[511] = checksum(&self.0[..511]);
        self.0
    }
}

/// Of a disk of so many sectors.
pub fn disk(sectors: u64, serial: &str, state: &AtaState) -> [u8; 512] {
    let mut w = Words::common(serial, "Lodge SATA disk");
    w.set(0, 0x40);
    // Geometry, for those who look at it: 16 heads, 63 sectors.
    w.set(1, (sectors / (16 * 63)).min(16383) as u16);
    w.set(3, 16);
    w.set(6, 63);
    w.set(47, 0x8000 | u16::from(MULTIPLE));
    if state.multiple > 0 {
        w.set(59, 0x100 | u16::from(state.multiple));
    }
    w.number(60, 2, sectors.min(0xfff_ffff));
    // 32 queued commands; NCQ.
    w.set(75, 31);
    w.set(76, 0x10e);
    // Supported: SMART, power management, write cache, look-ahead, NOP; 48-bit addresses, flushes; logs, name, FUA.
    let supported = [0x4069, 0x7400, 0x4160];
    let off = |bit: u16, on: bool| if on { 0 } else { bit };
    let enabled =
        supported[0] & !off(1, state.smart) & !off(0x20, state.write_cache) & !off(0x40, state.look_ahead);
    (82..).zip(supported).for_each(|(word, value)| w.set(word, value));
    (85..).zip([enabled, 0x3400, supported[2]]).for_each(|(word, value)| w.set(word, value));
    if state.mode & 0x40 != 0 {
        w.set(88, 0x7f | 0x100 << (state.mode & 7).min(6));
    }
    w.number(100, 4, sectors);
    w.set(105, TRIM_BLOCKS);
    w.set(106, 0x4000);
    // A name that is the same wherever the disk is: NAA 5, and what its serial number comes to.
    let name = serial
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let name = 5 << 60 | name >> 4;
    (0..4).for_each(|n| w.set(108 + n, (name >> (48 - 16 * n)) as u16));
    // TRIM; no platters turn; SATA 2.6.
    w.set(169, 1);
    w.set(217, 1);
    w.set(222, 0x101f);
    debug_assert_eq!(SECTOR, 512);
    w.finish()
}

/// Of a CD drive.
pub fn cd(serial: &str) -> [u8; 512] {
    let mut w = Words::common(serial, "Lodge CD-ROM");
    // ATAPI, CD-ROM, removable, packets of 12 bytes, which it takes within 50 µs.
    w.set(0, 0x85c0);
    // NOP, DEVICE RESET, power management, PACKET.
    w.set(82, 0x4218);
    w.set(83, 0x4000);
    w.set(84, 0x4000);
    w.set(85, 0x4218);
    w.set(87, 0x4000);
    w.set(88, 0x207f);
    w.set(222, 0x101f);
    w.finish()
}
