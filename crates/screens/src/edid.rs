//! What a monitor tells about itself (VESA E-EDID 1.4): drivers take their first mode from it.

/// Pixels of width and height that are offered by default.
pub const PREFERRED: (u32, u32) = (1024, 768);

/// The block of a monitor that likes `width` by `height` best (at most 4095 each), 60 times a second.
pub fn block(width: u32, height: u32) -> [u8; 128] {
    let (width, height) = (width.clamp(64, 4095), height.clamp(64, 4095));
    let mut edid = [0; 128];
    edid[..8].copy_from_slice(&[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
    // Vendor "LDG", three letters of 5 bits; product 1, serial number 0; week 0 of 2026; version 1.4.
    let vendor = b"LDG".iter().fold(0u16, |v, c| v << 5 | u16::from(c - b'@'));
    edid[8..10].copy_from_slice(&vendor.to_be_bytes());
    edid[10] = 1;
    edid[17..20].copy_from_slice(&[(2026 - 1990) as u8, 1, 4]);
    // Digital, 8 bits per colour; size unknown; gamma 2.2; RGB, sRGB, the first timing is the preferred one.
    edid[20..25].copy_from_slice(&[0xa0, 0, 0, 120, 0x06]);
    // sRGB's colours.
    edid[25..35].copy_from_slice(&[0xee, 0x91, 0xa3, 0x54, 0x4c, 0x99, 0x26, 0x0f, 0x50, 0x54]);
    // 640×480, 800×600 and 1024×768 at 60 Hz; then 1280×720 and 1280×1024, none else.
    edid[35..38].copy_from_slice(&[0x21, 0x08, 0]);
    edid[38..54].fill(1);
    edid[38..42].copy_from_slice(&[0x81, 0xc0, 0x81, 0x80]);
    edid[54..72].copy_from_slice(&timing(width, height));
    // The monitor's name, and its limits: 50 to 75 Hz, 30 to 160 kHz, 1200 MHz.
    edid[72..90].copy_from_slice(b"\0\0\0\xfc\0Lodge\n       ");
    edid[90..108].copy_from_slice(b"\0\0\0\xfd\0\x32\x4b\x1e\xa0\x78\x01\n      ");
    edid[108..126].copy_from_slice(b"\0\0\0\x10\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    edid[127] = edid.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    edid
}

/// A detailed timing (3.10.2) with short blanking.
fn timing(width: u32, height: u32) -> [u8; 18] {
    let (blank_x, blank_y) = (160, 30);
    let clock = (width + blank_x) * (height + blank_y) * 60 / 10_000;
    let clock = clock.min(0xffff) as u16;
    let high = |active: u32, blank: u32| (active >> 8 << 4 | blank >> 8) as u8;
    let [c0, c1] = clock.to_le_bytes();
    [
        c0,
        c1,
        width as u8,
        blank_x as u8,
        high(width, blank_x),
        height as u8,
        blank_y as u8,
        high(height, blank_y),
        48,   // horizontal front porch
        32,   // and sync
        0x36, // vertical: 3 and 6 lines
        0,
        0,
        0,
        0,
        0,
        0,
        0x1a, // digital separate sync, horizontal positive
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_right_and_the_size_can_be_read() {
        for (width, height) in [(1024, 768), (1920, 1080), (4095, 4095), (0, u32::MAX)] {
            let edid = block(width, height);
            assert_eq!(edid.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
            let t = &edid[54..];
            let told =
                (u32::from(t[4] >> 4) << 8 | u32::from(t[2]), u32::from(t[7] >> 4) << 8 | u32::from(t[5]));
            assert_eq!(told, (width.clamp(64, 4095), height.clamp(64, 4095)));
        }
    }
}
