//! Debian packages: ar, tar, and the compressions of their data.
#![no_main]

use images::deb::{Choice, Deb};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&kind, data)) = data.split_first() else { return };
    // A sound ar archive around the data, so that the fuzzer need not find it; or all of it as it comes.
    let ending = match kind % 5 {
        0 => "",
        1 => ".gz",
        2 => ".xz",
        3 => ".zst",
        _ => return read(data),
    };
    let (name, size) = (format!("data.tar{ending}"), data.len());
    let mut bytes = format!("!<arch>\n{name:<48}{size:<10}`\n").into_bytes();
    bytes.extend_from_slice(data);
    read(&bytes);
});

fn read(bytes: &[u8]) {
    let choose = |path: &str| if path.len() % 2 == 0 { Choice::Skip } else { Choice::TakeAndStop };
    let _ = Deb::new(bytes).and_then(|deb| deb.files(choose));
}
