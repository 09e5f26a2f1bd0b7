//! `Release` files and indices of packages.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| images::fuzzing::index(data));
