//! What the tests share.
#![allow(dead_code, missing_docs)] // each test program uses some of it

use std::path::Path;
use std::process::Command;

use disks::{Disk, Format, Options};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

pub const MIB: u64 = 1 << 20;

pub fn open(path: &Path) -> Disk {
    Disk::open(path, &Options::default()).unwrap()
}

pub fn read_only() -> Options {
    Options { read_only: true, ..Default::default() }
}

pub fn given(format: Format) -> Options {
    Options { format: Some(format), ..Default::default() }
}

pub fn contents(disk: &Disk) -> Vec<u8> {
    let mut all = vec![0xee; disk.size() as usize];
    disk.read(0, &mut all).unwrap();
    all
}

/// Whether there is a qemu-img; says so if not.
pub fn qemu_img_is_here() -> bool {
    let here = Command::new("qemu-img").arg("--version").output().is_ok();
    if !here {
        eprintln!("skipped what needs qemu-img: it is not installed (package qemu-utils)");
    }
    here
}

/// Runs qemu-img in a folder; it must succeed.
pub fn qemu_img(folder: &Path, arguments: &str) {
    let done =
        Command::new("qemu-img").current_dir(folder).args(arguments.split_whitespace()).output().unwrap();
    assert!(done.status.success(), "qemu-img {arguments}: {done:?}");
}

/// A generator whose seed a failed test shows.
pub fn random(seed: u64) -> StdRng {
    let seed = std::env::var("SEED").map_or(seed, |seed| seed.parse().unwrap());
    eprintln!("SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// Does random operations on a disk and on `model`, and compares what it reads.
pub fn exercise(disk: &Disk, model: &mut [u8], random: &mut StdRng, times: usize) {
    let size = model.len() as u64;
    for _ in 0..times {
        let most = if random.gen_ratio(1, 20) { MIB } else { 16384 };
        let unit = if random.gen_ratio(1, 3) { 1 } else { 512 };
        let len = random.gen_range(0..=most) / unit * unit;
        let at = random.gen_range(0..=size - len) / unit * unit;
        let place = at as usize..(at + len) as usize;
        match random.gen_range(0..10) {
            0..4 => {
                random.fill_bytes(&mut model[place.clone()]);
                disk.write(at, &model[place]).unwrap();
            }
            4..7 => {
                let mut read = vec![0; len as usize];
                disk.read(at, &mut read).unwrap();
                assert!(read == model[place], "{len} bytes at {at} differ");
            }
            7 => {
                disk.discard(at, len).unwrap();
                let mut read = vec![0; len as usize];
                disk.read(at, &mut read).unwrap();
                assert!(read.iter().zip(&model[place.clone()]).all(|(new, old)| *new == 0 || new == old));
                model[place].copy_from_slice(&read);
            }
            8 => {
                disk.write_zeroes(at, len, random.r#gen()).unwrap();
                model[place].fill(0);
            }
            _ if random.gen_ratio(1, 10) => disk.flush().unwrap(),
            _ => {}
        }
    }
}
