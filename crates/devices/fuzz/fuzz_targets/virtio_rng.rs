//! The virtio entropy device.
#![no_main]

use std::sync::Arc;

use devices::virtio::rng::Rng;
use libfuzzer_sys::fuzz_target;
use lodge_devices_fuzz::virtio::{Input, fuzz};

fuzz_target!(|input: Input| fuzz(Arc::new(Rng::new().expect("random bytes")), input));
