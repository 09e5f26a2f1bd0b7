//! Disks as stock kernels use them: what a guest writes is in the image, on either side of a reset.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use images::Options;
use lodge_tests::{Done, Scratch, default_guest, lodge, start_typing, start_with};
use sha2::Digest;

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
    let path = raw.display().to_string().replace(',', ",,");
    let guests = [("tiny", None, "virtio"), ("tiny:trixie", Some("trixie"), "virtio-packed")];
    for (n, (image, suite, bus)) in guests.into_iter().enumerate() {
        if !available(suite) {
            continue;
        }
        let at = 8 + n;
        let argument = format!("{path},serial=abc,bus={bus}");
        let input = format!(
            "echo packed $(cut -c 35 /sys/block/vda/device/features); cat /sys/block/vda/serial; echo; cat /sys/block/vda/size\n\
             echo lodge | dd of=/dev/vda seek={at} conv=fsync 2>/dev/null\n\
             dd if=/dev/zero of=/dev/vda bs=1M seek=1 count=31 conv=fsync 2>&1; blkdiscard /dev/vda -o 16777216\n"
        );
        let done = with_disk(image, &argument, &input);
        let lines: Vec<_> = done.out.lines().collect();
        assert!(lines.contains(&"abc") && lines.contains(&"65536"), "{}", done.out);
        assert!(lines.contains(&format!("packed {n}").as_str()), "{}", done.out);
        assert_eq!(sector(&raw, at), b"lodge\n", "{}", done.out);
    }
}

#[test]
fn disks_work_on_the_reference_engine() {
    if !available(None) {
        return;
    }
    let scratch = Scratch::new("disk-interpret");
    let raw = scratch.path().join("disk.img");
    std::fs::File::create(&raw).unwrap().set_len(SIZE).unwrap();
    let mut command = Command::new(lodge());
    command
        .args(["run", "tiny", "--engine", "interpret", "--disk"])
        .arg(format!("{},serial=abc", raw.display()));
    let input = "cat /sys/block/vda/serial; echo; echo lodge | dd of=/dev/vda seek=8 conv=fsync 2>/dev/null\n\
                 dd if=/dev/vda of=/dev/vda bs=64k count=64 seek=64 conv=fsync 2>/dev/null\n";
    let done = start_with(&mut command, input).wait(PATIENCE).expect(0);
    assert!(done.out.lines().any(|line| line == "abc"), "{}", done.out);
    for at in [8, 8 + 64 * 128] {
        assert_eq!(sector(&raw, at), b"lodge\n", "{}", done.out);
    }
}

/// Debian's general kernels, for the cloud kernels have no driver for SATA: 6.1 for i386, and 6.12.
fn general_kernels() -> impl Iterator<Item = images::Guest> {
    let amd64 = Options {
        suite: Some("trixie".into()),
        kernel: Some("linux-image-amd64".into()),
        ..Options::default()
    };
    let i386 = Options { arch: "i386".into(), ..Options::default() };
    [i386, amd64].into_iter().filter_map(|options| default_guest(&options))
}

/// What reads, writes, flushes and discards the disk `name` in a guest: prints its size, and writes "lodge" to sector `at`.
fn exercise(name: &str, at: usize) -> String {
    format!(
        "i=0; while ! [ -b /dev/{name} ] && [ $i -lt 300 ]; do sleep 0.1; i=$((i + 1)); done\n\
         cat /sys/block/{name}/size; dd if=/dev/{name} skip=4 count=1 2>/dev/null | head -c 6; echo\n\
         echo lodge | dd of=/dev/{name} seek={at} conv=fsync 2>/dev/null\n\
         dd if=/dev/zero of=/dev/{name} bs=1M seek=1 count=15 conv=fsync 2>&1; blkdiscard /dev/{name} -o 16777216\n"
    )
}

/// The disk for it: something in sector 4, and in all that is overwritten or discarded.
fn exercised() -> Vec<u8> {
    let mut image = vec![0xee; SIZE as usize];
    image[4 * 512..][..6].copy_from_slice(b"before");
    image
}

/// What the guest was to do to the disk is in the image.
fn check_exercise(raw: &Path, at: usize, done: &Done) {
    for line in ["65536", "before"] {
        assert!(done.out.lines().any(|l| l == line), "{line}: {}", done.out);
    }
    let image = std::fs::read(raw).unwrap();
    assert_eq!(&image[512 * at..][..6], b"lodge\n", "{}", done.out);
    assert_eq!(image[(1 << 20) - 1], 0xee);
    assert!(image[1 << 20..].iter().all(|&b| b == 0), "zeroes were written, or made: {}", done.out);
}

#[test]
fn sata_disks_and_cds_serve_kernels_without_virtio() {
    let scratch = Scratch::new("sata");
    // Not whole blocks of 2048 bytes: the last one is filled up.
    let bytes: Vec<u8> = (0..3_000_320u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let cd = scratch.file("cd.iso", &bytes);
    let sum = sha2::Sha256::digest(&bytes);
    let sum: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
    for (n, guest) in general_kernels().enumerate() {
        let raw = scratch.file("disk.img", &exercised());
        let mut command = Command::new(lodge());
        command.args(["run", "--engine", "translate", "--memory", "1G", "--cmdline", &guest.cmdline]);
        command.arg("--kernel").arg(&guest.kernel).arg("--initrd").arg(&guest.initrd);
        command.arg("--disk").arg(format!("{},bus=sata,serial=abc", raw.display())).arg("--cdrom").arg(&cd);
        let input = exercise("sda", 8 + n)
            + "tail -c +5 /sys/block/sda/device/vpd_pg80 | tr -d ' '; echo\n\
               head -c 3000320 /dev/sr0 | sha256sum\n";
        let done = start_with(&mut command, &input).wait(PATIENCE).expect(0);
        check_exercise(&raw, 8 + n, &done);
        for line in ["abc", &format!("{sum}  -")] {
            assert!(done.out.lines().any(|l| l == line), "{line}: {}\n{}", guest.description, done.out);
        }
    }
}

#[test]
fn nvme_disks_serve_cloud_kernels() {
    let scratch = Scratch::new("nvme");
    for (n, (image, suite, cpus)) in
        [("tiny", None, "1"), ("tiny:trixie", Some("trixie"), "2")].into_iter().enumerate()
    {
        if !available(suite) {
            continue;
        }
        let raw = scratch.file("disk.img", &exercised());
        let disk = format!("{},bus=nvme,serial=abc", raw.display());
        let mut command = Command::new(lodge());
        command.args(["run", image, "--engine", "translate", "--cpus", cpus, "--disk", &disk]);
        let input = exercise("nvme0n1", 8 + n)
            + "cat /sys/block/nvme0n1/device/serial; cat /sys/block/nvme0n1/device/queue_count\n";
        let done = start_with(&mut command, &input).wait(PATIENCE).expect(0);
        check_exercise(&raw, 8 + n, &done);
        assert!(done.out.lines().any(|l| l.trim() == "abc"), "{}", done.out);
        assert!(done.out.lines().any(|l| l == (2 + n).to_string()), "a queue for each vCPU: {}", done.out);
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

/// The VM's process is killed while the guest writes: what the guest was told is on the disk is in the image, and that is sound.
#[test]
fn what_a_guest_flushed_outlives_its_vm() {
    if !available(None) {
        return;
    }
    const BLOCKS: u64 = SIZE / 4096;
    let scratch = Scratch::new("disk-kill");
    let path = scratch.path().join("a.qcow2");
    disks::create(&path, disks::Format::Qcow2, SIZE, None).unwrap();
    let place = |n: u64| n * 1237 % BLOCKS;
    let mut n = 0;
    for round in 1..=4 {
        // Every block another number, repeated, in an order that jumps about in the image.
        let input = format!(
            "n={n}; while :; do n=$((n + 1)); yes $n | head -c 4096 | \
             dd of=/dev/vda bs=4096 seek=$((n * 1237 % {BLOCKS})) conv=fsync 2>/dev/null; echo flushed $n.; done\n"
        );
        let mut command = Command::new(lodge());
        command.args(["run", "tiny", "--disk"]).arg(&path);
        let (mut running, mut stdin) = start_typing(&mut command);
        stdin.write_all(input.as_bytes()).unwrap();
        running.line(&format!("flushed {}.", n + 40 * round), PATIENCE);
        running.child.kill().unwrap();
        let done = running.wait(PATIENCE);
        let told = done
            .out
            .lines()
            .filter_map(|line| line.strip_prefix("flushed ")?.strip_suffix('.')?.parse().ok());
        n = told.max().unwrap();
        assert!(n < BLOCKS);
        let check = Command::new("qemu-img").args(["check", "-q"]).arg(&path).output().unwrap();
        // 3 says that clusters leaked, and that nothing else is wrong (qemu-img(1)).
        assert!(matches!(check.status.code(), Some(0 | 3)), "{check:?}");
        let options = disks::Options { read_only: true, ..Default::default() };
        let image = disks::Disk::open(&path, &options).unwrap();
        for n in 1..=n {
            let mut block = [0; 4096];
            image.read(place(n) * 4096, &mut block).unwrap();
            let expected: Vec<u8> = format!("{n}\n").bytes().cycle().take(4096).collect();
            assert!(block[..] == expected, "block {n} of {}", place(n));
        }
    }
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
        (format!("{},bus=ide", there.display()), 2, "ide"),
    ] {
        let mut command = Command::new(lodge());
        command.args(["run", "--kernel", "/dev/null", "--disk", &disk]);
        let done = start_with(&mut command, "").wait(PATIENCE).expect(status);
        assert!(done.err.contains(part), "{}", done.err);
    }
    drop(locked);
}

#[test]
fn disks_come_and_go_while_the_guest_runs() {
    let guests = [("tiny", None, "2"), ("tiny:trixie", Some("trixie"), "1")];
    for (image, _, cpus) in guests.into_iter().filter(|guest| available(guest.1)) {
        plug_and_unplug(image, cpus);
    }
}

fn plug_and_unplug(image: &str, cpus: &str) {
    let scratch = Scratch::new("hot-plug");
    let [first, second] = ["first.img", "second.img"].map(|name| {
        let mut bytes = vec![0; 4 << 20];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        scratch.file(name, &bytes)
    });
    let command = |args: &[&str]| {
        let mut command = Command::new(lodge());
        command.args(args).env("LODGE_RUNTIME_DIR", scratch.path());
        command
    };
    let ask = |args: &[&str]| start_with(&mut command(args), "").wait(PATIENCE);
    let run = ["run", image, "--engine", "translate", "--name", "one", "--cpus", cpus];
    let (vm, mut keyboard) = start_typing(&mut command(&run));
    let mut types = |text: &str, answer: &str| {
        keyboard.write_all(text.as_bytes()).unwrap();
        vm.line(answer, PATIENCE);
    };
    let appears = |name: &str| {
        format!(
            "until [ -b /dev/{name} ]; do sleep 0.1; done; echo saw $(head -c 10 /dev/{name} | tr -d '\\0')\n"
        )
    };
    // The terminal shows what is typed, too: an answer must be none of that.
    let goes = |name: &str| format!("while [ -b /dev/{name} ]; do sleep 0.1; done; echo {name} $((6 * 7))\n");
    vm.line("built-in commands", PATIENCE);

    let disk = format!("{},format=raw", first.display());
    let told = ask(&["disk", "attach", "one", &disk]).expect(0);
    assert!(told.out.contains("attached as lodge-0") && told.err.is_empty(), "{}{}", told.out, told.err);
    types(&appears("vda"), "saw first.img");
    let again = ask(&["disk", "attach", "one", &disk]).expect(4).err;
    assert!(again.contains("in use"), "{again}");
    ask(&["disk", "attach", "one", &format!("{},format=raw,bus=nvme,serial=second", second.display())])
        .expect(0);
    types(&appears("nvme0n1"), "saw second.img");
    types("echo written | dd of=/dev/nvme0n1 seek=4 2>/dev/null; echo wrote $((6 * 7))\n", "wrote 42");
    let listed = ask(&["disk", "ls", "one", "--json"]).expect(0).out;
    assert_eq!(listed.matches("\"attached\"").count(), 2, "{listed}");

    // The guest gives it up; its image is closed, with all that was written.
    ask(&["disk", "detach", "one", "second"]).expect(0);
    types(&goes("nvme0n1"), "nvme0n1 42");
    let closed = disks::Disk::open(&second, &disks::Options::default()).unwrap();
    let mut sector = [0; 7];
    closed.read(4 * 512, &mut sector).unwrap();
    assert_eq!(&sector, b"written");
    drop(closed);

    // The other is there again after a reset, and a guest that has not started takes no part.
    keyboard.write_all(b"reboot -f\n").unwrap();
    vm.line("built-in commands", PATIENCE);
    let mut types = |text: &str, answer: &str| {
        keyboard.write_all(text.as_bytes()).unwrap();
        vm.line(answer, PATIENCE);
    };
    types(&appears("vda"), "saw first.img");
    let unknown = ask(&["disk", "detach", "one", "second"]).expect(4).err;
    assert!(unknown.contains("no disk is called second"), "{unknown}");
    ask(&["disk", "detach", "one", "--force", &first.display().to_string()]).expect(0);
    assert!(ask(&["disk", "ls", "one"]).expect(0).out.contains("has no disks"));
    drop(disks::Disk::open(&first, &disks::Options::default()).unwrap());
    ask(&["stop", "one", "--force"]).expect(0);
    vm.wait(PATIENCE).expect(130);
}
