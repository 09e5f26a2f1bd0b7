//! What a hostile guest does to every device, while its queues' threads run: it comes back from a reset.

use std::sync::{Arc, OnceLock};

use memory::{Memory, PLUG_ALIGN};
use vm_memory::{Bytes, GuestAddress};

use crate::testing::Random;
use crate::virtio::Device;
use crate::virtio::balloon::{Balloon, Target};
use crate::virtio::blk::Blk;
use crate::virtio::console::{Console, Port};
use crate::virtio::gpu::Gpu;
use crate::virtio::input::{InputDevice, Kind};
use crate::virtio::mem::{self, Mem};
use crate::virtio::net::{Guest, Header, Link, Net, Options};
use crate::virtio::rng::Rng;
use crate::virtio::testing::Driver;
use crate::virtio::vsock::{Hub, Vsock};

/// Brings every frame back.
#[derive(Default)]
struct Mirror(OnceLock<Guest>);

impl Link for Mirror {
    fn connect(&self, guest: Guest) {
        let _ = self.0.set(guest);
    }
    fn send(&self, header: &Header, frame: &[u8]) {
        self.0.get().map(|guest| guest.deliver(header, frame));
    }
}

fn devices(memory: &Memory) -> Vec<Arc<dyn Device>> {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let options = disks::Options { format: Some(disks::Format::Raw), ..Default::default() };
    let disk = Arc::new(disks::Disk::open(file.path(), &options).unwrap());
    let ports = ["console", "agent"].map(Port::new);
    let cable = Options { mac: [2, 0, 0, 0, 0, 1], mtu: 1500, pairs: 2 };
    let pluggable = Arc::new(mem::Target::new(PLUG_ALIGN));
    pluggable.set(PLUG_ALIGN / 2);
    vec![
        Arc::new(Blk::new(disk, "test", 2)),
        Arc::new(Rng::new().unwrap()),
        Arc::new(Console::new(&ports)),
        Arc::new(Balloon::new(memory.clone(), Arc::new(Target::default()))),
        Arc::new(Mem::new(memory.pluggable().unwrap(), pluggable)),
        Arc::new(Net::new(cable, Arc::new(Mirror::default()))),
        Arc::new(Vsock::new(Arc::new(Hub::default()))),
        Arc::new(Gpu::new(memory.clone())),
        Arc::new(InputDevice::new(Kind::Keyboard)),
        Arc::new(InputDevice::new(Kind::Tablet)),
    ]
}

#[test]
fn every_device_comes_back_from_a_reset() {
    const RAM: u64 = 32 << 20;
    let (memory, []) = Memory::with_pluggable(RAM, 0, [], PLUG_ALIGN).unwrap();
    let mut random = Random::new();
    for device in devices(&memory) {
        let (kind, queues) = (device.kind(), device.queues().len() as u64);
        let offered = device.features();
        let mut d = Driver::with(device, offered, memory.clone());
        for round in 0..60 {
            for _ in 0..random.below(20) {
                let queue = random.below(queues) as usize;
                // Often in memory and short, but for the rings and what the test says.
                let address = [random.below(0x8_0000), RAM - random.below(9000), random.next()];
                let len = [random.below(64), random.below(9000), random.next() & 0xffff_ffff];
                let mut piece = |flags| {
                    let (at, n) = (random.below(7) as usize / 3, random.below(7) as usize / 3);
                    let bytes: Vec<u8> = (0..32).map(|_| random.below(5) as u8).collect();
                    // Where there is no memory nothing is put.
                    let _ = memory.guest().write(&bytes, GuestAddress(address[at]));
                    (address[at], len[n] as usize, flags)
                };
                let pieces = vec![piece(0), piece(2)];
                match random.below(8) {
                    0 => d.offer_pieces(queue, pieces[..1].to_vec()),
                    1 => d.offer_pieces(queue, pieces[1..].to_vec()),
                    2 => d.set_config(random.below(80), 4, random.next() & 0xffff_ffff),
                    _ => d.offer_pieces(queue, pieces),
                }
                if d.needs_reset() {
                    break;
                }
            }
            d.start(if random.below(2) == 0 { offered } else { 0 });
            assert!(!d.needs_reset(), "device {kind}, round {round}");
        }
    }
}
