//! The virtio console with a second port, while the host types, opens and closes.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use devices::virtio::console::{Console, Port};
use libfuzzer_sys::fuzz_target;
use lodge_devices_fuzz::memory;
use lodge_devices_fuzz::virtio::{Input, fuzz_with};

fuzz_target!(|input: Input| {
    let ports = [Port::new("console"), Port::new("agent")];
    let device = Arc::new(Console::new(&ports));
    fuzz_with(device, memory(), input, |n| {
        let port = &ports[usize::from(n & 1)];
        match n >> 1 & 3 {
            0 => {
                let _ = port.write(&[n; 100], Duration::ZERO);
            }
            1 => port.set_open(n & 8 != 0),
            2 => port.resize(n.into(), 25),
            _ => {}
        }
    });
    assert!(ports.iter().all(|port| !port.is_open()), "closed by the reset");
});
