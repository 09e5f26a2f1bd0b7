//! virtio-mem, while the host wants more and less.
#![no_main]

use std::sync::Arc;

use devices::virtio::mem::{Mem, Target};
use libfuzzer_sys::fuzz_target;
use lodge_devices_fuzz::MEMORY;
use lodge_devices_fuzz::virtio::{Input, fuzz_with};
use memory::{Memory, PLUG_ALIGN};

fuzz_target!(|input: Input| {
    let (memory, []) = Memory::with_pluggable(MEMORY, 0, [], PLUG_ALIGN).expect("2 MiB, and 128");
    let target = Arc::new(Target::new(PLUG_ALIGN));
    let device = Arc::new(Mem::new(memory.pluggable().expect("128 MiB"), target.clone()));
    fuzz_with(device, memory, input, |n| target.set(u64::from(n) << 19));
    assert!(target.plugged() <= target.room());
});
