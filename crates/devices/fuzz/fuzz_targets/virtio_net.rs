//! The virtio network device at a cable that brings all frames back.
#![no_main]

use std::sync::{Arc, OnceLock};

use devices::virtio::net::{Guest, Header, Link, Net, Options};
use libfuzzer_sys::fuzz_target;
use lodge_devices_fuzz::memory;
use lodge_devices_fuzz::virtio::{Input, fuzz_with};

#[derive(Default)]
struct Mirror(OnceLock<Guest>);

impl Link for Mirror {
    fn offloads(&self) -> bool {
        true
    }

    fn connect(&self, guest: Guest) {
        let _ = self.0.set(guest);
    }

    fn send(&self, header: &Header, frame: &[u8]) {
        // What the device lets through makes sense to it.
        assert_eq!(Header::parse(&header.bytes(), frame.len()), Some(*header));
        if let Some(guest) = self.0.get() {
            guest.deliver(header, frame);
        }
    }
}

fuzz_target!(|input: Input| {
    let link = Arc::new(Mirror::default());
    let options = Options { mac: [2, 0, 0, 0, 0, 1], mtu: 1500, pairs: 2 };
    let device = Arc::new(Net::new(options, link.clone()));
    fuzz_with(device, memory(), input, |n| {
        if let Some(guest) = link.0.get() {
            match n & 7 {
                0 => guest.set_up(n & 8 == 0),
                1 => {
                    let _ = guest.deliver(&Header::default(), &[n; 60]);
                }
                _ => {}
            }
        }
    });
});
