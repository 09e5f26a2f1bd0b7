//! Multiboot kernels that are no ELF: a header with a good sum at the start.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let flags = 1 << 16 | u32::from(data.first().copied().unwrap_or(0)) & 7;
    let words = [0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002 + flags)];
    let header: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    lodge_boot_fuzz::load_with(data, 0, &header);
});
