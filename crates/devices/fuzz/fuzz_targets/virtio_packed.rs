//! The virtio disk by packed rings.
#![no_main]

use std::sync::Arc;

use devices::virtio::blk::Blk;
use libfuzzer_sys::fuzz_target;
use lodge_devices_fuzz::disk;
use lodge_devices_fuzz::virtio::{Input, fuzz};

fuzz_target!(|input: Input| fuzz(Arc::new(Blk::new(disk(), "fuzz", 1).packed()), input));
