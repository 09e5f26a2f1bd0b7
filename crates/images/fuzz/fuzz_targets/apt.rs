//! The configuration of the host's apt.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| images::fuzzing::apt(&String::from_utf8_lossy(data)));
