//! What was flushed is in the image, whenever the process that writes it is killed.
//!
//! A child writes; its operations follow from a seed, so that the parent knows them. The child tells of each flush that has
//! returned. After `kill -9` every sector must be what it was at the last flush that was told of, or what a later operation
//! made it; qcow2 images must be sound (clusters may leak: they are counted before they are used, so that a kill can never
//! leave one that is used and not counted; `qemu-img check -r leaks` gives them back).

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::*;
use disks::{Disk, Format, create};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SIZE: u64 = 16 * MIB;
const SECTOR: u64 = 512;
const SECTORS: usize = (SIZE / SECTOR) as usize;
/// Threads that write at once. Each has every second run of eight sectors for itself: they share clusters, not sectors.
const THREADS: u64 = 2;
const RUN: u64 = 8;

/// One thing that a thread of the child does.
enum Act {
    /// Each sector is filled with this, repeated; 0 makes zeroes (in one of several ways).
    Write(u64),
    Zero(bool),
    Discard,
    Flush,
}

/// What a thread does, in order: the act, the first sector and the number of them.
fn acts(seed: u64, thread: u64) -> impl Iterator<Item = (Act, u64, u64)> {
    let mut random = StdRng::seed_from_u64(seed ^ (thread << 56));
    (1..).map(move |n: u64| {
        let run = random.gen_range(0..SECTORS as u64 / RUN / THREADS) * THREADS + thread;
        let first = random.gen_range(0..RUN);
        let len = random.gen_range(1..=RUN - first);
        let tag = (n << 8) | (thread + 1) | (seed << 32);
        let act = match random.gen_range(0..24) {
            0..16 => Act::Write(tag),
            16..18 => Act::Zero(random.r#gen()),
            18..20 => Act::Discard,
            _ => Act::Flush,
        };
        (act, run * RUN + first, len)
    })
}

fn sector(tag: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    bytes.chunks_exact_mut(8).for_each(|eight| eight.copy_from_slice(&tag.to_le_bytes()));
    bytes
}

/// The child: writes until it is killed.
#[test]
#[ignore = "what the other test starts and kills"]
fn child() {
    let (Ok(path), Ok(seed)) = (std::env::var("KILLS_DISK"), std::env::var("KILLS_SEED")) else { return };
    let seed: u64 = seed.parse().unwrap();
    let disk = &open(Path::new(&path));
    std::thread::scope(|threads| {
        for thread in 0..THREADS {
            threads.spawn(move || {
                for (n, (act, first, len)) in acts(seed, thread).enumerate() {
                    let (at, bytes) = (first * SECTOR, len * SECTOR);
                    match act {
                        Act::Write(tag) => disk.write(at, &sector(tag).repeat(len as usize)).unwrap(),
                        Act::Zero(unmap) => disk.write_zeroes(at, bytes, unmap).unwrap(),
                        Act::Discard => disk.discard(at, bytes).unwrap(),
                        Act::Flush => {
                            disk.flush().unwrap();
                            // In one piece, as pipes do it for short writes.
                            std::io::stderr()
                                .write_all(format!("flushed {thread} {n}\n").as_bytes())
                                .unwrap();
                        }
                    }
                }
            });
        }
    });
}

/// Lets a child write and kills it after a while; gives the last act of each thread that was flushed.
fn write_and_kill(path: &Path, seed: u64, after: Duration) -> [usize; THREADS as usize] {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "child", "--nocapture"])
        .env("KILLS_DISK", path)
        .env("KILLS_SEED", seed.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap());
    let reader = std::thread::spawn(move || {
        let (mut flushed, mut told) = ([0; THREADS as usize], 0);
        for line in lines.lines() {
            let line = line.unwrap();
            // The last line may be cut short: it would be a flush that was not told of.
            let Some(rest) = line.strip_prefix("flushed ") else { panic!("the child says {line:?}") };
            let (thread, n) = rest.split_once(' ').unwrap();
            flushed[thread.parse::<usize>().unwrap()] = n.parse::<usize>().unwrap();
            told += 1;
        }
        (flushed, told)
    });
    std::thread::sleep(after);
    let begun = Instant::now();
    child.kill().unwrap();
    child.wait().unwrap();
    let (flushed, told) = reader.join().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20));
    eprintln!("killed after {after:?}, {told} flushes");
    flushed
}

/// What each sector may hold now, told by tag.
struct Model(Vec<Vec<u64>>);

impl Model {
    /// After a child that was killed.
    fn apply(&mut self, seed: u64, flushed: [usize; THREADS as usize]) {
        for thread in 0..THREADS {
            let flushed = flushed[thread as usize];
            for (n, (act, first, len)) in acts(seed, thread).enumerate() {
                let known = n < flushed;
                for sector in &mut self.0[first as usize..(first + len) as usize] {
                    match act {
                        Act::Write(_) | Act::Zero(_) if known => sector.clear(),
                        _ => {}
                    }
                    match act {
                        Act::Write(tag) => sector.push(tag),
                        Act::Zero(_) | Act::Discard => sector.push(0),
                        Act::Flush => {}
                    }
                }
                // The flush after the last that was told of may have been the last thing that happened.
                if n > flushed && matches!(act, Act::Flush) {
                    break;
                }
            }
        }
    }

    /// Compares a disk with it; from then on its sectors are what they are.
    fn check(&mut self, disk: &Disk) {
        for (n, (bytes, may)) in contents(disk).chunks(SECTOR as usize).zip(&mut self.0).enumerate() {
            let tag = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            assert!(bytes == sector(tag), "sector {n} is torn");
            assert!(may.contains(&tag), "sector {n} holds {tag:#x}, and not one of {may:x?}");
            *may = vec![tag];
        }
    }
}

/// Makes a new image of one kind or another, with what it holds.
fn fresh(folder: &Path, random: &mut StdRng) -> Model {
    let disk = folder.join("disk");
    let _ = std::fs::remove_file(&disk);
    let mut model = vec![vec![0]; SECTORS];
    let base = folder.join("base");
    let on_base = random.r#gen::<bool>();
    if on_base {
        let _ = std::fs::remove_file(&base);
        create(&base, Format::Qcow2, SIZE / 2, None).unwrap();
        let disk = open(&base);
        for n in (0..SECTORS / 2).filter(|n| n % 100 < 60) {
            let tag = (n as u64) << 8 | 0xff;
            disk.write(n as u64 * SECTOR, &sector(tag)).unwrap();
            model[n] = vec![tag];
        }
        disk.flush().unwrap();
    }
    if qemu_img_is_here() && random.r#gen() {
        let cluster = [512, 4096, 65536, 2 << 20][random.gen_range(0..4)];
        let bits = [1, 16, 64][random.gen_range(0..3)];
        let base = if on_base { "-F qcow2 -b base" } else { "" };
        let options = format!("cluster_size={cluster},refcount_bits={bits}");
        qemu_img(folder, &format!("create -q -f qcow2 -o {options} {base} disk {SIZE}"));
        eprintln!("{options} {base}");
    } else {
        create(&disk, Format::Qcow2, SIZE, on_base.then_some(&base)).unwrap();
    }
    Model(model)
}

fn is_sound(folder: &Path) {
    let check = ["check", "-q", "-f", "qcow2", "disk"];
    let done = Command::new("qemu-img").current_dir(folder).args(check).output().unwrap();
    // 3 says that clusters leaked, and that nothing else is wrong (qemu-img(1)).
    assert!(matches!(done.status.code(), Some(0 | 3)), "{done:?}");
}

/// `KILLS` says how often; 200 times if it does not.
#[test]
fn nothing_flushed_is_lost_when_the_writer_is_killed() {
    let times: usize = std::env::var("KILLS").map_or(200, |times| times.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut random = random(std::process::id().into());
    let mut model = fresh(folder, &mut random);
    for n in 1..=times {
        let seed = random.r#gen::<u32>().into();
        let after = Duration::from_micros(random.gen_range(3_000..80_000));
        let flushed = write_and_kill(&folder.join("disk"), seed, after);
        if qemu_img_is_here() {
            is_sound(folder);
        }
        model.apply(seed, flushed);
        // What the next ones find is what a machine finds after a failure, leaks and all.
        model.check(&open(&folder.join("disk")));
        if n % 10 == 0 {
            model = fresh(folder, &mut random);
        }
    }
}
