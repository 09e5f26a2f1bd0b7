//! A qcow2 image and its raw twin, under the same requests from several threads at once, stay equal.
//!
//! `cargo nextest run --release -p lodge-disks --test twins` with `TWINS=5000000` does five million requests instead of the
//! usual number; `SEED` chooses which.

mod common;

use std::path::Path;

use common::*;
use disks::{Disk, Format};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

const SIZE: u64 = 24 * MIB;
const THREADS: u64 = 4;
/// Requests of each thread between comparisons.
const ROUND: usize = 5_000;

/// What one thread does. The disk is dealt out in pieces of `piece` bytes, each thread getting every fourth: so requests of
/// threads meet in clusters and tables, but never in a byte, and there is only one right result.
fn exercise_pieces(disk: &Disk, twin: &Disk, thread: u64, piece: u64, random: &mut StdRng) {
    let (mut data, mut read) = (vec![0; piece as usize], vec![0; piece as usize]);
    for _ in 0..ROUND {
        let start = (random.gen_range(0..SIZE / piece / THREADS) * THREADS + thread) * piece;
        let unit = if piece > 512 && random.gen_ratio(2, 3) { 512 } else { 1 };
        let most = if random.gen_ratio(1, 50) { piece } else { piece.min(16384) };
        let len = random.gen_range(0..=most / unit) * unit;
        let at = start + random.gen_range(0..=(piece - len) / unit) * unit;
        let (data, read) = (&mut data[..len as usize], &mut read[..len as usize]);
        match random.gen_range(0..40) {
            0..18 => {
                random.fill_bytes(data);
                disk.write(at, data).unwrap();
                twin.write(at, data).unwrap();
            }
            18..32 => {
                disk.read(at, read).unwrap();
                twin.read(at, data).unwrap();
                assert!(read == data, "{len} bytes at {at} differ");
            }
            32..35 => {
                disk.discard(at, len).unwrap();
                disk.read(at, read).unwrap();
                twin.read(at, data).unwrap();
                assert!(
                    read.iter().zip(&*data).all(|(new, old)| *new == 0 || new == old),
                    "{len} bytes at {at}"
                );
                twin.write(at, read).unwrap();
            }
            35..39 => {
                disk.write_zeroes(at, len, random.r#gen()).unwrap();
                twin.write_zeroes(at, len, true).unwrap();
            }
            _ if random.gen_ratio(1, 40) => disk.flush().unwrap(),
            _ => {}
        }
    }
}

/// Makes the image `disk`: with some cluster size, and over up to eight others.
fn make(folder: &Path, random: &mut StdRng) -> String {
    let depth = random.gen_range(0..=8);
    let mut below = String::new();
    for level in 0..=depth {
        let name = if level == depth { "disk".to_owned() } else { format!("base{level}") };
        let cluster = [512, 4096, 16384, 65536, 1 << 20][random.gen_range(0..5)];
        let size = if level == depth { SIZE } else { random.gen_range(1..2 * SIZE / 512) * 512 };
        let bits = [1, 4, 8, 16, 32, 64][random.gen_range(0..6)];
        let over = if level == 0 { String::new() } else { format!("-F qcow2 -b base{}", level - 1) };
        let options = format!("cluster_size={cluster},refcount_bits={bits}");
        qemu_img(folder, &format!("create -q -f qcow2 -o {options} {over} {name} {size}"));
        below = format!("{below} {size}:{cluster}/{bits}");
        if level < depth {
            let disk = open(&folder.join(&name));
            let mut bytes = vec![0; 50_000];
            for _ in 0..100 {
                random.fill_bytes(&mut bytes);
                let at = random.gen_range(0..disk.size());
                let len = random.gen_range(0..=(disk.size() - at).min(50_000));
                disk.write(at, &bytes[..len as usize]).unwrap();
            }
            disk.flush().unwrap();
        }
    }
    below
}

#[test]
fn a_qcow2_image_and_its_raw_twin_stay_equal() {
    if !qemu_img_is_here() {
        return;
    }
    let wanted: usize = std::env::var("TWINS").map_or(200_000, |wanted| wanted.parse().unwrap());
    let mut random = random(std::process::id().into());
    let mut done = 0;
    while done < wanted {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        println!("{}", make(folder, &mut random));
        qemu_img(folder, "convert -f qcow2 -O raw disk twin");
        for _ in 0..2 {
            let disk = &open(&folder.join("disk"));
            let twin = &Disk::open(&folder.join("twin"), &given(Format::Raw)).unwrap();
            let piece = [512, 4096, 65536, 1 << 20][random.gen_range(0..4)];
            std::thread::scope(|threads| {
                for thread in 0..THREADS {
                    let mut random = StdRng::seed_from_u64(random.next_u64());
                    threads.spawn(move || exercise_pieces(disk, twin, thread, piece, &mut random));
                }
            });
            disk.flush().unwrap();
            assert!(contents(disk) == contents(twin));
            done += ROUND * THREADS as usize;
        }
        // Nothing wrong, and nothing leaked.
        qemu_img(folder, "check -q -f qcow2 disk");
        qemu_img(folder, "compare -q -f qcow2 -F raw disk twin");
    }
    println!("{done} requests");
}
