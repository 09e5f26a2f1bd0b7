//! Keyrings, and OpenPGP signatures.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| images::fuzzing::signature(data));
