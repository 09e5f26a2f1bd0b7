//! The virtio keyboard and tablet, while somebody types and points.
#![no_main]

use std::sync::Arc;

use devices::virtio::input::{InputDevice, Kind};
use libfuzzer_sys::fuzz_target;
use lodge_devices_fuzz::memory;
use lodge_devices_fuzz::virtio::{Input, fuzz_with};
use screens::{Input as _, Key, Point};

fuzz_target!(|input: (bool, Input)| {
    let (tablet, input) = input;
    let device = Arc::new(InputDevice::new(if tablet { Kind::Tablet } else { Kind::Keyboard }));
    fuzz_with(device.clone(), memory(), input, |n| match n & 3 {
        0 => {
            device.key(Key((n >> 3).into()), n & 4 != 0);
        }
        1 => {
            let (x, y) = (u32::from(n) * 4, u32::from(n));
            device.point(Point { x, y, size: (1024, 768), buttons: (n >> 2).into() });
        }
        _ => {}
    });
});
