//! ELF files: PVH or multiboot.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| lodge_boot_fuzz::load_with(data, 0, b"\x7fELF"));
