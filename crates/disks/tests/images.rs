//! Disks keep what is written to them, and QEMU reads the same.

mod common;

use std::fs;
use std::path::Path;

use common::*;
use disks::{Cache, Disk, Error, Format, Options, create};

/// Exercises an image, closing it now and then, and lets QEMU check it and compare it to a raw file of the same content.
fn agrees_with_qemu(folder: &Path, name: &str, mut model: Vec<u8>, seed: u64) {
    let mut random = random(seed);
    let path = folder.join(name);
    let format = open(&path).format();
    for _ in 0..4 {
        let disk = Disk::open(&path, &given(format)).unwrap();
        exercise(&disk, &mut model, &mut random, 800);
        disk.flush().unwrap();
        assert!(contents(&disk) == model);
    }
    assert!(contents(&Disk::open(&path, &read_only()).unwrap()) == model);
    fs::write(folder.join("twin"), &model).unwrap();
    if qemu_img_is_here() {
        if format == Format::Qcow2 {
            qemu_img(folder, &format!("check -f qcow2 {name}"));
        }
        qemu_img(folder, &format!("compare -f {format} -F raw {name} twin"));
    }
}

#[test]
fn raw_and_qcow2_keep_their_contents() {
    for (format, seed) in [(Format::Raw, 1), (Format::Qcow2, 2)] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        create(&path, format, 8 * MIB, None).unwrap();
        let disk = open(&path);
        assert_eq!((disk.format(), disk.size(), disk.is_read_only()), (format, 8 * MIB, false));
        drop(disk);
        agrees_with_qemu(folder.path(), "disk", vec![0; 8 * MIB as usize], seed);
    }
}

#[test]
fn an_overlay_shows_its_base_and_leaves_it_alone() {
    for (format, seed) in [(Format::Raw, 3), (Format::Qcow2, 4)] {
        let folder = tempfile::tempdir().unwrap();
        let (base, overlay) = (folder.path().join("base"), folder.path().join("overlay"));
        create(&base, format, 3 * MIB, None).unwrap();
        let disk = Disk::open(&base, &given(format)).unwrap();
        let mut model = contents(&disk);
        exercise(&disk, &mut model, &mut random(seed), 300);
        drop(disk);
        let before = fs::read(&base).unwrap();
        create(&overlay, Format::Qcow2, 8 * MIB, Some(&base)).unwrap();
        // The name is relative to the overlay: both can move.
        let moved = folder.path().join("moved");
        fs::create_dir(&moved).unwrap();
        fs::rename(&base, moved.join("base")).unwrap();
        fs::rename(&overlay, moved.join("overlay")).unwrap();
        model.resize(8 * MIB as usize, 0);
        assert!(contents(&open(&moved.join("overlay"))) == model);
        agrees_with_qemu(&moved, "overlay", model, seed + 10);
        assert!(fs::read(moved.join("base")).unwrap() == before);
    }
}

#[test]
fn images_that_qemu_made() {
    if !qemu_img_is_here() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let model: Vec<u8> = (0..4 * MIB).map(|at| (at >> 9) as u8).collect();
    fs::write(folder.join("raw"), &model).unwrap();
    qemu_img(folder, "convert -f raw -O qcow2 -c raw compressed");
    agrees_with_qemu(folder, "compressed", model.clone(), 20);
    qemu_img(folder, "convert -f raw -O qcow2 -o compat=0.10,cluster_size=4096 raw old");
    agrees_with_qemu(folder, "old", model.clone(), 21);
    qemu_img(folder, "convert -f raw -O qcow2 -o refcount_bits=1,cluster_size=512 raw small");
    agrees_with_qemu(folder, "small", model.clone(), 22);
    qemu_img(folder, "convert -f raw -O qcow2 raw snapshot");
    qemu_img(folder, "snapshot -c one snapshot");
    agrees_with_qemu(folder, "snapshot", model.clone(), 23);
    qemu_img(folder, "snapshot -a one snapshot");
    qemu_img(folder, "compare -f qcow2 -F raw snapshot raw");

    // Bitmaps of what changed would be wrong after a write that they miss: they are marked so.
    qemu_img(folder, "convert -f raw -O qcow2 raw bitmaps");
    qemu_img(folder, "bitmap --add bitmaps one");
    open(&folder.join("bitmaps")).write(0, &[1]).unwrap();
    let about = fs::read(folder.join("bitmaps")).unwrap();
    assert_eq!(about[88..96], [0; 8], "no automatically cleared feature is left");

    qemu_img(folder, "convert -f raw -O vmdk -o subformat=monolithicFlat raw flat.vmdk");
    let flat = folder.join("flat.vmdk");
    assert!(matches!(Disk::open(&flat, &Options::default()), Err(Error::Unsupported { .. })));
    let disk = Disk::open(&flat, &read_only()).unwrap();
    assert_eq!(disk.format(), Format::Vmdk);
    assert!(contents(&disk) == model);
    let text = fs::read_to_string(&flat).unwrap().replace("flat-flat.vmdk", "../flat-flat.vmdk");
    fs::write(folder.join("outside.vmdk"), text).unwrap();
    let error = Disk::open(&folder.join("outside.vmdk"), &read_only()).unwrap_err().to_string();
    assert!(error.contains("outside its own folder"), "{error}");

    qemu_img(folder, "convert -f raw -O vmdk -o subformat=twoGbMaxExtentSparse raw split.vmdk");
    qemu_img(folder, "create -f qcow2 -o extended_l2=on extended 1M");
    qemu_img(folder, "create -f qcow2 -o data_file=data external 1M");
    for (name, says) in [("split.vmdk", "SPARSE"), ("extended", "extended L2"), ("external", "external")] {
        let error = Disk::open(&folder.join(name), &read_only()).unwrap_err().to_string();
        assert!(error.contains(says), "{name}: {error}");
    }
}

#[test]
fn what_is_written_to_be_thrown_away_is_seen_by_nobody_else() {
    for format in [Format::Raw, Format::Qcow2] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        create(&path, format, 3 * MIB, None).unwrap();
        let mut model = vec![7; 3 * MIB as usize];
        Disk::open(&path, &given(format)).unwrap().write(0, &model).unwrap();
        let before = fs::read(&path).unwrap();
        let options = Options { throw_away: true, ..given(format) };
        let (one, two) = (Disk::open(&path, &options).unwrap(), Disk::open(&path, &options).unwrap());
        exercise(&one, &mut model, &mut random(50), 300);
        assert!(contents(&one) == model && contents(&two) == vec![7; 3 * MIB as usize]);
        assert!(matches!(Disk::open(&path, &given(format)), Err(Error::InUse { .. })));
        drop((one, two));
        assert!(fs::read(&path).unwrap() == before);
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }
}

/// Sectors of a few kinds, some of them zero, and a disk whose end is not a cluster's.
fn some_sectors() -> Vec<u8> {
    let sectors = 4 * MIB / 512 + 3;
    let kind = |sector: u64| if sector / 300 % 3 == 1 { 0 } else { sector };
    (0..sectors).flat_map(|sector| kind(sector).to_le_bytes().repeat(64)).collect()
}

#[test]
fn clusters_that_zstd_compressed_are_read_and_written() {
    if !qemu_img_is_here() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let model = some_sectors();
    fs::write(folder.join("raw"), &model).unwrap();
    for (cluster, seed) in [(65536, 30), (4096, 31), (2 << 20, 32)] {
        let options = format!("compression_type=zstd,cluster_size={cluster}");
        qemu_img(folder, &format!("convert -f raw -O qcow2 -c -o {options} raw zstd"));
        agrees_with_qemu(folder, "zstd", model.clone(), seed);
        // As a base, and copied with its counts shared by a snapshot.
        qemu_img(folder, &format!("convert -f raw -O qcow2 -c -o {options} raw base"));
        create(&folder.join("over"), Format::Qcow2, 0, Some(&folder.join("base"))).unwrap();
        agrees_with_qemu(folder, "over", model.clone(), seed);
        qemu_img(folder, "snapshot -c one base");
        agrees_with_qemu(folder, "base", model.clone(), seed);
        qemu_img(folder, "snapshot -a one base");
        qemu_img(folder, "compare -f qcow2 -F raw base raw");
        fs::remove_file(folder.join("over")).unwrap();
    }
}

#[test]
fn sparse_and_stream_optimized_vmdk_are_read() {
    if !qemu_img_is_here() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let model = some_sectors();
    fs::write(folder.join("raw"), &model).unwrap();
    for kind in ["monolithicSparse", "streamOptimized"] {
        let name = format!("{kind}.vmdk");
        qemu_img(folder, &format!("convert -f raw -O vmdk -o subformat={kind} raw {name}"));
        let disk = Disk::open(&folder.join(&name), &read_only()).unwrap();
        assert_eq!((disk.format(), disk.size()), (Format::Vmdk, model.len() as u64));
        assert!(contents(&disk) == model, "{kind}");
        let mut part = [0; 1500];
        disk.read(65536 * 5 - 700, &mut part).unwrap();
        assert!(part == model[65536 * 5 - 700..][..1500]);
        Disk::open_alone(&folder.join(&name)).unwrap();
    }
    qemu_img(folder, "create -f vmdk -F vmdk -b monolithicSparse.vmdk delta.vmdk");
    let error = Disk::open(&folder.join("delta.vmdk"), &read_only()).unwrap_err().to_string();
    assert!(error.contains("snapshot of another"), "{error}");
}

/// Every way to cache keeps what is written, in each format; those past the host's cache where the file system has that.
#[test]
fn caches_differ_in_when_not_in_what() {
    for (n, (word, cache)) in Cache::WORDS.into_iter().enumerate() {
        for format in [Format::Raw, Format::Qcow2] {
            let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let path = folder.path().join("disk");
            create(&path, format, 4 * MIB, None).unwrap();
            let disk = match Disk::open(&path, &Options { cache, ..given(format) }) {
                Err(Error::Io { source, .. }) if source.to_string().contains("past the host's cache") => {
                    println!("skipped {word}: {source}");
                    continue;
                }
                disk => disk.unwrap(),
            };
            let mut model = vec![0; 4 * MIB as usize];
            exercise(&disk, &mut model, &mut random(40 + n as u64), 300);
            assert!(contents(&disk) == model, "{word} {format}");
            if matches!(cache, Cache::Writethrough | Cache::Directsync) {
                // Without a flush, as after a kill.
                std::mem::forget(disk);
                let copy = folder.path().join("copy");
                fs::copy(&path, &copy).unwrap();
                let copy = Disk::open(&copy, &given(format)).unwrap();
                assert!(contents(&copy) == model, "{word} {format}");
            }
        }
    }
}

/// Threads write every fourth sector each, in the same clusters, while another zeroes its own: nobody's sectors get lost.
#[test]
fn threads_share_a_disk() {
    for format in [Format::Raw, Format::Qcow2] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        create(&path, format, 2 * MIB, None).unwrap();
        let disk = &open(&path);
        std::thread::scope(|threads| {
            for mine in 0..4u64 {
                threads.spawn(move || {
                    for at in (mine..2 * MIB / 512).step_by(4).map(|sector| sector * 512) {
                        disk.write(at, &[mine as u8 + 1; 512]).unwrap();
                        if mine == 3 {
                            disk.write_zeroes(at, 512, at & 2048 != 0).unwrap();
                        }
                        if at % 65536 == mine * 512 {
                            disk.flush().unwrap();
                        }
                    }
                });
            }
        });
        for (sector, bytes) in contents(disk).chunks(512).enumerate() {
            assert_eq!(bytes, [[1, 2, 3, 0][sector % 4]; 512], "{format} sector {sector}");
        }
    }
}

#[test]
fn of_a_disk_that_is_smaller_than_a_cluster_only_what_is_asked_becomes_zero() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.qcow2");
    disks::create(&path, Format::Qcow2, 8192, None).unwrap();
    let disk = Disk::open(&path, &Options { format: Some(Format::Qcow2), ..Default::default() }).unwrap();
    disk.write(0, &[7; 8192]).unwrap();
    disk.write_zeroes(512, 512, false).unwrap();
    disk.discard(2048, 512).unwrap();
    let mut bytes = [1; 8192];
    disk.read(0, &mut bytes).unwrap();
    for (at, byte) in bytes.iter().enumerate() {
        let zero = (512..1024).contains(&at) || (2048..2560).contains(&at);
        assert_eq!(*byte, if zero { 0 } else { 7 }, "at {at}");
    }
}
