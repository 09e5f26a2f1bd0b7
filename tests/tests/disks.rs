//! Disks as stock kernels use them: what a guest writes is in the image, on either side of a reset.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use images::Options;
use lodge_tests::{Done, Scratch, default_guest, lodge, start_with};

const PATIENCE: Duration = Duration::from_secs(240);
const SIZE: u64 = 32 << 20;

fn available(suite: Option<&str>) -> bool {
    let options = Options { suite: suite.map(Into::into), ..Options::default() };
    default_guest(&options).is_some()
}

fn with_disk(image: &str, disk: &str, input: &str) -> Done {
    let mut command = Command::new(lodge());
    command.args(["run", image, "--disk", disk]);
    start_with(&mut command, input).wait(PATIENCE).expect(0)
}

fn sector(path: &Path, n: usize) -> Vec<u8> {
    std::fs::read(path).unwrap()[512 * n..][..6].to_vec()
}

#[test]
fn what_a_guest_writes_is_in_the_image() {
    let scratch = Scratch::new("disk");
    let raw = scratch.path().join("with,comma.img");
    std::fs::File::create(&raw).unwrap().set_len(SIZE).unwrap();
    let argument = format!("{},serial=abc", raw.display().to_string().replace(',', ",,"));
    for (n, (image, suite)) in [("tiny", None), ("tiny:trixie", Some("trixie"))].into_iter().enumerate() {
        if !available(suite) {
            continue;
        }
        let at = 8 + n;
        let input = format!(
            "cat /sys/block/vda/serial; echo; cat /sys/block/vda/size\n\
             echo lodge | dd of=/dev/vda seek={at} conv=fsync 2>/dev/null\n\
             dd if=/dev/zero of=/dev/vda bs=1M seek=1 count=31 conv=fsync 2>&1; blkdiscard /dev/vda -o 16777216\n"
        );
        let done = with_disk(image, &argument, &input);
        let lines: Vec<_> = done.out.lines().collect();
        assert!(lines.contains(&"abc") && lines.contains(&"65536"), "{}", done.out);
        assert_eq!(sector(&raw, at), b"lodge\n", "{}", done.out);
    }
}

#[test]
fn a_disk_outlives_resets_and_may_be_for_reading_only() {
    if !available(None) {
        return;
    }
    let scratch = Scratch::new("disk-reset");
    let path = scratch.path().join("a.qcow2");
    disks::create(&path, disks::Format::Qcow2, SIZE, None).unwrap();
    // Once around: the second time it finds what it wrote the first time.
    let input = "if dd if=/dev/vda skip=9 count=1 2>/dev/null | grep -q again; then echo found it; poweroff -f; fi\n\
                 echo again | dd of=/dev/vda seek=9 conv=fsync 2>/dev/null; reboot -f\n";
    let exec = input.trim_end().replace('\n', "; ");
    let mut command = Command::new(lodge());
    command
        .args(["run", "tiny", "--timeout", "120", "--disk"])
        .arg(&path)
        .args(["--cmdline", &format!("lodge.exec=\"{exec}\"")]);
    let done = start_with(&mut command, "").wait(PATIENCE).expect(0);
    assert!(done.out.contains("found it"), "{}", done.out);
    // Written, and not flushed by the guest, before it ends.
    with_disk("tiny", &path.display().to_string(), "echo late | dd of=/dev/vda seek=7 2>/dev/null\n");
    let image = disks::Disk::open(&path, &disks::Options { read_only: true, ..Default::default() }).unwrap();
    let mut late = [0; 4];
    image.read(7 * 512, &mut late).unwrap();
    assert_eq!(&late, b"late");
    drop(image);
    let before = std::fs::read(&path).unwrap();
    let argument = format!("{},readonly", path.display());
    let done = with_disk("tiny", &argument, "cat /sys/block/vda/ro; echo x | dd of=/dev/vda 2>&1\n");
    assert!(done.out.contains("\n1\n"), "{}", done.out);
    assert!(std::fs::read(&path).unwrap() == before, "nothing was written");
}

#[test]
fn mistakes_are_told() {
    let scratch = Scratch::new("disk-errors");
    let there = scratch.file("there.img", &[0; 4096]);
    let locked = disks::Disk::open(&there, &disks::Options::default()).unwrap();
    for (disk, status, part) in [
        (scratch.path().join("none.img").display().to_string(), 4, "none.img"),
        (there.display().to_string(), 4, "there.img"),
        (format!("{},format=iso", there.display()), 2, "iso"),
    ] {
        let mut command = Command::new(lodge());
        command.args(["run", "--kernel", "/dev/null", "--disk", &disk]);
        let done = start_with(&mut command, "").wait(PATIENCE).expect(status);
        assert!(done.err.contains(part), "{}", done.err);
    }
    drop(locked);
}
