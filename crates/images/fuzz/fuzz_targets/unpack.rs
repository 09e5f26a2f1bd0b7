//! The packed kernel in a bzImage.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // The setup header, with all of the data as the payload.
    let mut image = vec![0; 0x400];
    image[0x1f1] = 1;
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
    image[0x24c..0x250].copy_from_slice(&(data.len() as u32).to_le_bytes());
    image.extend_from_slice(data);
    let _ = images::kernel::unpack(&image);
});
