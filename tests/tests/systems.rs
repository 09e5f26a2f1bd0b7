//! Systems that are not the default guest's Linux start as they come: from Debian's packages, unmodified.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command};
use std::time::Duration;

use images::{Options, PackageFile, Silent, Source};
use lodge_tests::{Running, Scratch, cached_guest, lodge, start_typing};
use rustix::process::Signal;

const PATIENCE: Duration = Duration::from_secs(300);

/// Files of a package; says why not if the archive has none.
fn package(name: &str, files: &[&str]) -> Option<Vec<PackageFile>> {
    // What is downloaded is checked, and stays in the cache.
    let found = Source::new(&Options { suite: Some("bookworm".into()), ..Options::default() })
        .and_then(|mut source| source.files(&[name], files, &mut Silent));
    match found {
        Ok(found) => Some(found.files),
        Err(error) => {
            println!("skipped: {name}: {error}");
            None
        }
    }
}

fn unpack(scratch: &Scratch, name: &str, file: &PackageFile) -> PathBuf {
    let mut bytes = Vec::new();
    let compressed = File::open(&file.stored).expect("the cache can be read");
    flate2::read::GzDecoder::new(compressed).read_to_end(&mut bytes).expect("the package's file is sound");
    scratch.file(name, &bytes)
}

fn start(args: &[&str]) -> (Running, ChildStdin) {
    let mut command = Command::new(lodge());
    command.args(["run", "--engine", "translate", "--memory", "1G", "--no-reboot"]).args(args);
    start_typing(&mut command)
}

/// Runs until the lines have come, one after the other; then ends it.
#[track_caller]
fn says(args: &[&str], lines: &[&str]) {
    let (running, _keyboard) = start(args);
    for line in lines {
        running.line(line, PATIENCE);
    }
    running.signal(Signal::TERM);
    running.wait(PATIENCE).expect(130);
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn xen_starts_a_stock_kernel_as_its_first_domain() {
    let Some(guest) = cached_guest() else { return };
    let Some(files) = package("xen-hypervisor-4.17-amd64", &["boot/xen-4.17-amd64.gz"]) else { return };
    let scratch = Scratch::new("xen");
    let xen = unpack(&scratch, "xen", &files[0]);
    says(
        &[
            "--kernel",
            &text(&xen),
            "--cmdline",
            "com1=115200,8n1 console=com1",
            "--initrd",
            &format!("{} console=hvc0 earlyprintk=xen", guest.kernel.display()),
            "--initrd",
            &text(&guest.initrd),
        ],
        &["(XEN) Xen version 4.17", "Xen version: 4.17", "Run /init as init process"],
    );
}

#[test]
fn gnu_mach_counts_its_memory() {
    let Some(files) = package("gnumach-image-1.8-486", &["boot/gnumach-1.8-486.gz"]) else { return };
    let scratch = Scratch::new("mach");
    let kernel = unpack(&scratch, "gnumach", &files[0]);
    // It has no servers to start, and says so.
    says(
        &["--kernel", &text(&kernel), "--cmdline", "console=com0"],
        &["GNU Mach 1.8", "vm_page: DMA32", "RTC time is", "No bootstrap code loaded"],
    );
}

#[test]
fn u_boot_is_firmware_too() {
    let Some(files) = package("u-boot-qemu", &["usr/lib/u-boot/qemu-x86_64/u-boot.rom"]) else { return };
    says(
        &["--firmware", &text(&files[0].stored)],
        &["U-Boot SPL", "Jumping to 64-bit U-Boot", "DRAM:  1 GiB", "Model: QEMU x86"],
    );
}

#[test]
fn the_debian_installer_asks_for_the_language() {
    let installer = "usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64";
    let [kernel, initrd] = ["linux", "initrd.gz"].map(|file| format!("{installer}/{file}"));
    let Some(files) = package("debian-installer-12-netboot-amd64", &[&kernel, &initrd]) else { return };
    let [kernel, initrd] = [0, 1].map(|n| text(&files[n].stored));
    // What it draws is no lines.
    let (running, _keyboard) =
        start(&["--kernel", &kernel, "--initrd", &initrd, "--cmdline", "console=ttyS0"]);
    running.sees("Select a language", PATIENCE);
    running.signal(Signal::TERM);
    running.wait(PATIENCE).expect(130);
}
