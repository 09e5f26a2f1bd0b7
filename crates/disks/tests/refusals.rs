//! What is refused, and how.

mod common;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};

use common::*;
use disks::{Disk, Error, Format, Options, create};
use rand::Rng;

#[test]
fn read_only_disks_and_ends_of_disks() {
    let folder = tempfile::tempdir().unwrap();
    for format in [Format::Raw, Format::Qcow2] {
        let path = folder.path().join(format.to_string());
        create(&path, format, MIB, None).unwrap();
        let before = fs::read(&path).unwrap();
        let disk = Disk::open(&path, &read_only()).unwrap();
        assert!(disk.is_read_only());
        disk.flush().unwrap();
        for refused in
            [disk.write(0, &[1]), disk.discard(0, 512), disk.write_zeroes(0, 512, false), disk.write(0, &[])]
        {
            assert!(matches!(refused, Err(Error::ReadOnly { .. })));
        }
        drop(disk);
        assert!(fs::read(&path).unwrap() == before);

        let disk = open(&path);
        for (at, len) in [(MIB, 1), (MIB - 1, 2), (u64::MAX, 1), (u64::MAX, 0), (1 << 63, 512)] {
            let mut bytes = vec![0; len as usize];
            for refused in [
                disk.read(at, &mut bytes),
                disk.write(at, &bytes),
                disk.discard(at, len),
                disk.write_zeroes(at, len, true),
                disk.write_zeroes(0, u64::MAX, false),
                disk.discard(1, u64::MAX),
            ] {
                assert!(matches!(refused, Err(Error::OutOfRange { .. })), "{at} {len}");
            }
        }
        disk.read(MIB, &mut []).unwrap();
        disk.write(MIB - 1, &[7]).unwrap();
    }
}

#[test]
fn two_cannot_write_one_image() {
    let folder = tempfile::tempdir().unwrap();
    let (base, one, two) = (folder.path().join("base"), folder.path().join("one"), folder.path().join("two"));
    create(&base, Format::Qcow2, MIB, None).unwrap();
    create(&one, Format::Qcow2, 0, Some(&base)).unwrap();
    create(&two, Format::Qcow2, 0, Some(&base)).unwrap();
    let in_use = |opened: Result<Disk, Error>| {
        let error = opened.unwrap_err();
        assert!(matches!(error, Error::InUse { .. }), "{error}");
        error.to_string()
    };
    // Overlays share a base, which nobody can write meanwhile.
    let disks = (open(&one), open(&two));
    let message = in_use(Disk::open(&base, &Options::default()));
    assert!(message.contains("base") && message.contains("stop the virtual machine"), "{message}");
    in_use(Disk::open(&one, &Options::default()));
    in_use(Disk::open(&one, &read_only()));
    drop(disks);
    let writer = open(&base);
    in_use(Disk::open(&one, &Options::default()));
    drop(writer);
    let _readers = (Disk::open(&base, &read_only()).unwrap(), Disk::open(&base, &read_only()).unwrap());
    in_use(Disk::open(&base, &Options::default()));
}

/// QEMU's tools keep off what Lodge has open, and Lodge off what they have.
#[test]
fn locks_are_seen_by_qemu_and_the_other_way_round() {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};
    if !qemu_img_is_here() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (base, disk) = (folder.path().join("base"), folder.path().join("disk"));
    create(&base, Format::Qcow2, MIB, None).unwrap();
    create(&disk, Format::Qcow2, 0, Some(&base)).unwrap();
    let qemu = |what: &str| {
        let mut command = Command::new("qemu-io");
        command.current_dir(folder.path()).args(what.split(' '));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let ours = open(&disk);
    for (name, fine) in [
        ("-f qcow2 disk", false),
        ("-r -f qcow2 disk", false),
        ("-f qcow2 base", false),
        ("-r -f qcow2 base", true),
    ] {
        let done = qemu(&format!("-c quit {name}")).wait_with_output().unwrap();
        assert_eq!(done.status.success(), fine, "{name}: {done:?}");
    }
    drop(ours);
    for (name, write, read) in [("-f qcow2 disk", false, false), ("-r -f qcow2 disk", false, true)] {
        let mut theirs = qemu(name);
        let mut output = BufReader::new(theirs.stdout.take().unwrap());
        // It answers when it has the image open.
        theirs.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        output.read_line(&mut String::new()).unwrap();
        assert_eq!(Disk::open(&disk, &Options::default()).is_ok(), write, "{name}");
        let opened = Disk::open(&disk, &read_only());
        assert!(opened.is_ok() == read, "{name}: {opened:?}");
        drop(opened);
        drop(theirs.stdin.take());
        theirs.wait().unwrap();
    }
    open(&disk);
}

#[test]
fn a_guest_cannot_forge_a_header() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    create(&path, Format::Raw, MIB, None).unwrap();
    let disk = open(&path);
    for magic in [&b"QFI\xfb\0\0\0\x03"[..], b"KDMV", b"# Disk DescriptorFile\n"] {
        assert!(matches!(disk.write(0, magic), Err(Error::Forged { .. })));
        // In pieces, the last piece first.
        disk.write(2, &magic[2..]).unwrap();
        disk.write(1, &magic[1..2]).unwrap();
        assert!(matches!(disk.write(0, &magic[..1]), Err(Error::Forged { .. })));
        disk.write_zeroes(0, 512, false).unwrap();
    }
    disk.write(512, b"QFI\xfb").unwrap();
    drop(disk);
    assert_eq!(open(&path).format(), Format::Raw);
    let disk = Disk::open(&path, &given(Format::Raw)).unwrap();
    disk.write(0, b"QFI\xfb").unwrap();
}

#[test]
fn nothing_is_left_of_what_cannot_be_created() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let missing = folder.path().join("missing");
    for size in [0, 511, 513, 1 << 61, u64::MAX] {
        assert!(matches!(create(&path, Format::Qcow2, size, None), Err(Error::Size { .. })));
    }
    assert!(matches!(create(&path, Format::Vmdk, MIB, None), Err(Error::Unsupported { .. })));
    assert!(matches!(create(&path, Format::Raw, MIB, Some(&missing)), Err(Error::Unsupported { .. })));
    assert!(matches!(create(&path, Format::Qcow2, MIB, Some(&missing)), Err(Error::Io { .. })));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    fs::write(&path, "precious").unwrap();
    assert!(matches!(create(&path, Format::Raw, MIB, None), Err(Error::Io { .. })));
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn chains_that_loop_or_are_too_long() {
    let folder = tempfile::tempdir().unwrap();
    let image = |number: usize| folder.path().join(format!("image{number:02}"));
    create(&image(0), Format::Raw, MIB, None).unwrap();
    for number in 1..16 {
        create(&image(number), Format::Qcow2, 0, Some(&image(number - 1))).unwrap();
    }
    assert!(contents(&open(&image(15))).iter().all(|byte| *byte == 0));
    create(&image(16), Format::Qcow2, 0, Some(&image(15))).unwrap();
    let error = Disk::open(&image(16), &Options::default()).unwrap_err();
    assert!(matches!(error, Error::Chain { what: "more than 16 images", .. }), "{error}");
    // Now image 1 says that it lies over itself.
    let bytes = fs::read(image(2)).unwrap();
    fs::write(image(1), bytes).unwrap();
    let error = Disk::open(&image(3), &Options::default()).unwrap_err();
    assert!(matches!(error, Error::Chain { what: "itself", .. }), "{error}");
}

#[test]
fn a_backing_file_of_unrecorded_format_must_be_raw() {
    let folder = tempfile::tempdir().unwrap();
    let (base, overlay) = (folder.path().join("base"), folder.path().join("overlay"));
    create(&base, Format::Qcow2, MIB, None).unwrap();
    create(&overlay, Format::Qcow2, 0, Some(&base)).unwrap();
    open(&overlay);
    let mut bytes = fs::read(&overlay).unwrap();
    let at = bytes.windows(4).position(|four| four == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    bytes[at] ^= 0xff; // now an extension that nobody knows
    fs::write(&overlay, bytes).unwrap();
    let error = Disk::open(&overlay, &Options::default()).unwrap_err();
    assert!(matches!(error, Error::BackingFormat { .. }), "{error}");
}

#[test]
fn hostile_headers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    create(&path, Format::Qcow2, MIB, None).unwrap();
    let good = fs::read(&path).unwrap();
    let open = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        Disk::open(&path, &given(Format::Qcow2))
    };
    open(&good).unwrap();
    for len in (0..200).chain([65536, 65537, 3 * 65536]) {
        assert!(
            matches!(open(&good[..len]), Err(Error::Damaged { .. } | Error::Io { .. })),
            "cut to {len} bytes"
        );
    }
    // The field's place in the header, and a value that it must not have.
    for (at, value) in [
        (0, "00000000"),
        (4, "00000001"),
        (4, "00000004"),
        (8, "ffffffffffffffff"),
        (8, "0000000000010000"),
        (20, "00000008"),
        (20, "00000016"),
        (20, "ffffffff"),
        (24, "ffffffffffffffff"),
        (24, "7fffffffffffffff"),
        (24, "0000100000000000"),
        (32, "00000001"),
        (36, "ffffffff"),
        (36, "00000000"),
        (36, "00400000"),
        (40, "0000000000000000"),
        (40, "0000000000010001"),
        (40, "ffffffffffff0000"),
        (48, "0000000000000000"),
        (48, "ffffffffffff0000"),
        (56, "ffffffff"),
        (72, "0000000000000001"),
        (72, "0000000000000002"),
        (72, "8000000000000000"),
        (96, "00000007"),
        (96, "ffffffff"),
        (100, "00000000"),
        (100, "ffffffff"),
    ] {
        let mut bytes = good.clone();
        for (index, digits) in value.as_bytes().chunks(2).enumerate() {
            bytes[at + index] = u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap();
        }
        let opened = open(&bytes);
        assert!(
            matches!(opened, Err(Error::Damaged { .. } | Error::Unsupported { .. })),
            "{value} at {at}: {opened:?}"
        );
    }
}

/// Whatever the tables say: errors or wrong bytes, but no panic, and no more memory than the limits allow.
#[test]
fn hostile_tables() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    create(&path, Format::Qcow2, 4 * MIB, None).unwrap();
    let disk = open(&path);
    for at in (0..4 * MIB).step_by(150_000) {
        disk.write(at, &[1; 5000]).unwrap();
    }
    disk.flush().unwrap();
    drop(disk);
    let good = fs::read(&path).unwrap();
    let filled: Vec<usize> =
        (0..good.len()).filter(|at| good[*at] != 0 && good[*at] != 1).chain(0..112).collect();
    let mut random = random(30);
    let mut opened = 0;
    for round in 0..500 {
        let mut bytes = good.clone();
        for _ in 0..random.gen_range(1..6) {
            let at = filled[random.gen_range(0..filled.len())] + random.gen_range(0..8);
            bytes[at] = if random.r#gen() { random.r#gen() } else { 1 << random.gen_range(0..8) };
        }
        fs::write(&path, &bytes).unwrap();
        let used = catch_unwind(AssertUnwindSafe(|| {
            let Ok(disk) = Disk::open(&path, &given(Format::Qcow2)) else { return false };
            let size = disk.size().min(4 * MIB);
            let mut block = vec![0; 70_000.min(size as usize)];
            for at in (0..=size - block.len() as u64).step_by(100_000) {
                let _ = disk.read(at, &mut block);
                let _ = disk.write(at, &block[..block.len().min(3000)]);
                let _ = disk.discard(at, block.len() as u64);
                let _ = disk.write_zeroes(at, 100.min(size), false);
            }
            if round % 16 == 0 {
                let _ = disk.flush();
            }
            true
        }));
        opened += usize::from(used.unwrap_or_else(|_| panic!("round {round} panicked")));
    }
    assert!((100..500).contains(&opened), "{opened} of 500 opened");
}

#[test]
fn hostile_vmdk_descriptors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    fs::write(folder.path().join("part"), vec![7; 2048]).unwrap();
    let good =
        b"# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentFlat\"\n\
        RW 3 FLAT \"part\" 1\nRW 2 ZERO\nRDONLY 1 FLAT \"part\" 0\n";
    let open = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        Disk::open(&path, &Options { format: Some(Format::Vmdk), read_only: true, ..Default::default() })
    };
    let disk = open(good).unwrap();
    assert!(contents(&disk) == [vec![7; 1536], vec![0; 1024], vec![7; 512]].concat());
    drop(disk);
    let mut random = random(40);
    for round in 0..3000 {
        let mut bytes = good.to_vec();
        for _ in 0..random.gen_range(1..4) {
            let at = random.gen_range(22..bytes.len());
            match random.gen_range(0..3) {
                0 => bytes[at] = b"0123456789\"\n= \0-"[random.gen_range(0..16)],
                1 => bytes.splice(at..at, std::iter::repeat_n(b'9', random.gen_range(1..20))).for_each(drop),
                _ => bytes.truncate(at),
            }
            if bytes.len() < 30 {
                break;
            }
        }
        let used = catch_unwind(AssertUnwindSafe(|| {
            let Ok(disk) = open(&bytes) else { return };
            let mut block = vec![0; disk.size().min(8192) as usize];
            let _ = disk.read(0, &mut block);
            let _ = disk.read(disk.size() - block.len() as u64, &mut block);
        }));
        used.unwrap_or_else(|_| panic!("round {round} panicked: {}", String::from_utf8_lossy(&bytes)));
    }
    // A whole folder of parts is too many.
    let many: String = (0..300).map(|_| "RW 1 FLAT \"part\" 0\n").collect();
    let error = open(format!("# Disk DescriptorFile\nversion=1\n{many}").as_bytes()).unwrap_err().to_string();
    assert!(error.contains("more than 256 parts"), "{error}");
}
