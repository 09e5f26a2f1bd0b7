//! The virtio GPU, while somebody looks and wants other sizes.
#![no_main]

use std::sync::Arc;

use devices::virtio::gpu::Gpu;
use libfuzzer_sys::fuzz_target;
use lodge_devices_fuzz::memory;
use lodge_devices_fuzz::virtio::{Input, fuzz_with};
use screens::{Picture, Source};

fuzz_target!(|input: Input| {
    let memory = memory();
    let gpu = Arc::new(Gpu::new(memory.clone()));
    let mut picture = Picture::default();
    fuzz_with(gpu.clone(), memory, input, |n| match n & 3 {
        0 => gpu.draw(&mut picture),
        1 => {
            gpu.cursor();
        }
        2 => {
            gpu.resize(u32::from(n) << 5, u32::from(n) << 3);
        }
        _ => {}
    });
});
