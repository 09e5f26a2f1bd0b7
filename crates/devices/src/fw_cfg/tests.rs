use super::*;
use crate::testing::{Random, batter, through_json};

fn device() -> (Arc<FwCfg>, Memory) {
    let memory = Memory::new(2 << 20, 0x1_0000).unwrap();
    let device = FwCfg::new(memory.clone());
    device.set(key::NB_CPUS, &2u16.to_le_bytes());
    device.add_file("etc/b", b"bee".to_vec()).unwrap();
    device.add_file("etc/a", vec![7; 5000]).unwrap();
    device.add_writable_file("etc/w", vec![0; 8]).unwrap();
    (device, memory)
}

fn select(device: &FwCfg, key: u16, len: usize) -> Vec<u8> {
    device.write(0, 2, key.into());
    (0..len).map(|_| device.read(1, 1) as u8).collect()
}

/// Runs a descriptor at 0x1000 and returns what became of its control word.
fn dma(device: &FwCfg, memory: &Memory, control: u32, len: u32, address: u64) -> u32 {
    let mut descriptor = control.to_be_bytes().to_vec();
    descriptor.extend(len.to_be_bytes());
    descriptor.extend(address.to_be_bytes());
    memory.write(0x1000, &descriptor);
    device.write(4, 4, 0);
    device.write(8, 4, 0x1000_u32.swap_bytes().into());
    let mut out = [0; 4];
    memory.read(0x1000, &mut out);
    u32::from_be_bytes(out)
}

#[test]
fn keys_and_files_read_through_the_ports() {
    let (device, _) = device();
    assert_eq!(select(&device, key::SIGNATURE, 6), b"QEMU\0\0");
    assert_eq!(select(&device, key::ID, 4), [3, 0, 0, 0]);
    assert_eq!(select(&device, key::NB_CPUS, 2), [2, 0]);
    assert_eq!(device.read(4, 8), u64::from_le_bytes(*b"QEMU CFG"));
    let directory = select(&device, key::FILE_DIR, 4 + 64 * 3);
    assert_eq!(directory[..4], [0, 0, 0, 3]);
    let entries: Vec<_> = directory[4..].chunks(64).map(|e| (e[3] as usize, e[5], &e[8..13])).collect();
    assert_eq!(entries, [(5000 & 0xff, 0x20, &b"etc/a"[..]), (3, 0x21, b"etc/b"), (8, 0x22, b"etc/w")]);
    assert_eq!(select(&device, 0x21, 4), b"bee\0");
    assert!(matches!(device.add_file("etc/b", vec![]), Err(Error::Name(_))));
    assert!(matches!(device.add_file(&"x".repeat(56), vec![]), Err(Error::Name(_))));
}

#[test]
fn dma_reads_skips_and_writes() {
    let (device, memory) = device();
    memory.write(0x2000, &[1; 8192]);
    assert_eq!(dma(&device, &memory, 0x20 << 16 | dma::SELECT | dma::READ, 5004, 0x2000), 0);
    let mut out = vec![0; 5005];
    memory.read(0x2000, &mut out);
    assert!(out[..5000].iter().all(|&b| b == 7));
    assert_eq!(out[5000..], [0, 0, 0, 0, 1]);
    assert_eq!(dma(&device, &memory, 0x21 << 16 | dma::SELECT | dma::SKIP, 1, 0), 0);
    assert_eq!(dma(&device, &memory, dma::READ, 2, 0x2000), 0);
    memory.read(0x2000, &mut out[..2]);
    assert_eq!(out[..2], *b"ee");
    assert_eq!(dma(&device, &memory, 0x22 << 16 | dma::SELECT | dma::WRITE, 8, 0x2000), 0);
    assert_eq!(device.file("etc/w").unwrap()[..3], *b"ee\x07");
    let (other, _) = self::device();
    other.set_state(&through_json(&device.state()));
    assert_eq!(other.file("etc/w"), device.file("etc/w"));
}

#[test]
fn hostile_descriptors_fail() {
    let (device, memory) = device();
    for (control, len, address) in [
        (0x22 << 16 | dma::SELECT | dma::WRITE, 9, 0x2000),
        (0x21 << 16 | dma::SELECT | dma::WRITE, 1, 0x2000),
        (0x22 << 16 | dma::SELECT | dma::WRITE, 8, u64::MAX - 3),
        (0x20 << 16 | dma::SELECT | dma::READ, u32::MAX, 0x2000),
        (0x20 << 16 | dma::SELECT | dma::READ, 8, 0xffff_fff0),
        (0x20 << 16 | dma::SELECT | dma::READ, 8, u64::MAX - 3),
    ] {
        assert_eq!(
            dma(&device, &memory, control, len, address),
            dma::ERROR,
            "{control:#x} {len:#x} {address:#x}"
        );
    }
    device.write(4, 8, u64::MAX);
    device.write(4, 8, 0);
}

#[test]
fn a_hostile_guest_is_bounded() {
    let (device, memory) = device();
    batter(&*device, FW_CFG.len, 50_000, None);
    let mut random = Random::new();
    for _ in 0..2_000 {
        let (control, len) = (random.next() as u32, random.next() as u32 >> random.below(32));
        let address = random.next() >> random.below(64);
        dma(&device, &memory, control & 0x003f_001f, len, address);
    }
}
