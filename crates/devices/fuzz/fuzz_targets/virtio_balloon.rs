//! The virtio balloon, while the host wants more and less, and asks.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use devices::virtio::balloon::{Balloon, Target};
use libfuzzer_sys::fuzz_target;
use lodge_devices_fuzz::memory;
use lodge_devices_fuzz::virtio::{Input, fuzz_with};

fuzz_target!(|input: Input| {
    let (memory, target) = (memory(), Arc::new(Target::default()));
    let device = Arc::new(Balloon::new(memory.clone(), target.clone()));
    fuzz_with(device, memory, input, |n| match n & 3 {
        0 => target.set(Some(u64::from(n) << 13)),
        1 => {
            let _ = target.stats(Duration::ZERO);
        }
        _ => {}
    });
    assert_eq!(target.ballooned(), 0, "forgotten by the reset");
});
