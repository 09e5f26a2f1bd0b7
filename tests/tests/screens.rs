//! Screens: what guests show is seen by VNC and in pictures, and what is typed there reaches them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use lodge_tests::bootable::{self, ENTRY, Kind};
use lodge_tests::screen::{Picture, RAW, Viewer, ZLIB};
use lodge_tests::{Running, Scratch, lodge, start_typing, start_with, target};

const PATIENCE: Duration = Duration::from_secs(120);

/// A VM called `vm` with a screen.
struct Bed {
    scratch: Scratch,
    vm: Option<(Running, std::process::ChildStdin)>,
}

impl Bed {
    fn start(scratch: Scratch, args: &[&str]) -> Self {
        let mut bed = Self { scratch, vm: None };
        let mut command = bed.command(&["run", "--name", "vm", "--vnc"]);
        command.arg(bed.socket()).args(args).env("LODGE_DATA_DIR", bed.scratch.path());
        bed.vm = Some(start_typing(&mut command));
        let patience = Instant::now() + PATIENCE;
        while !start_with(&mut bed.command(&["ls", "--json"]), "")
            .wait(PATIENCE)
            .expect(0)
            .out
            .contains("\"vm\"")
        {
            assert!(Instant::now() < patience, "it never ran");
            std::thread::sleep(Duration::from_millis(50));
        }
        bed
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(lodge());
        command.env("LODGE_RUNTIME_DIR", self.scratch.path()).args(args);
        command
    }

    fn socket(&self) -> PathBuf {
        self.scratch.path().join("vnc")
    }

    fn vm(&self) -> &Running {
        &self.vm.as_ref().expect("it was started").0
    }

    fn ask(&self, args: &[&str]) {
        start_with(&mut self.command(args), "").wait(PATIENCE).expect(0);
    }

    fn screenshot(&self) -> Picture {
        let file = self.scratch.path().join("screen.png");
        self.ask(&["screenshot", "vm", file.to_str().expect("a plain name")]);
        Picture::read(&file)
    }

    /// Waits for text on the screen.
    #[track_caller]
    fn until(&self, what: &str) -> String {
        let patience = Instant::now() + PATIENCE;
        loop {
            // Before the first text mode, and in between, there may be another.
            let picture = self.screenshot();
            let text = if picture.has_text() { picture.text() } else { String::new() };
            if picture.has_text() && picture.shows(what) {
                return text;
            }
            assert!(Instant::now() < patience, "{what:?} was never on the screen; there is:\n{text}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Waits for a picture of which something holds.
    #[track_caller]
    fn until_picture(&self, what: &str, holds: impl Fn(&Picture) -> bool) -> Picture {
        let patience = Instant::now() + PATIENCE;
        loop {
            let picture = self.screenshot();
            if holds(&picture) {
                return picture;
            }
            assert!(Instant::now() < patience, "it was never so that {what}");
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    fn end(mut self) {
        self.ask(&["stop", "vm", "--force"]);
        let (vm, _) = self.vm.take().expect("it was started");
        vm.wait(PATIENCE).expect(130);
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if let Some((vm, _)) = &mut self.vm {
            // A test that failed.
            let _ = vm.child.kill();
        }
    }
}

/// memtest86+ from its CD.
fn memtest(firmware: &str, memory: &str) -> Option<Bed> {
    let iso = "/usr/lib/memtest86+/memtest86+x64.iso";
    if !Path::new(iso).exists() {
        println!("skipped: the package memtest86+ is not installed");
        return None;
    }
    let args = ["--engine", "translate", "--firmware", firmware, "--memory", memory, "--cdrom", iso];
    Some(Bed::start(Scratch::new(&format!("memtest-{firmware}")), &args))
}

/// Lets memtest86+ finish a pass of all its tests but the last, which waits minutes for bits to fade.
#[track_caller]
fn passes(bed: &Bed) {
    bed.until("Status: Testing");
    for (key, answer) in [("f1", "Settings:"), ("f1", "Test Selection:"), ("f2", "Enter")] {
        bed.ask(&["key", "vm", key]);
        bed.until(answer);
    }
    bed.ask(&["type", "vm", "10\n"]);
    bed.until("*.********.");
    bed.ask(&["key", "vm", "f10"]);
    bed.until("Settings:");
    bed.ask(&["key", "vm", "f10"]);
    let text = bed.until("Status: Pass");
    assert!(bed.screenshot().shows("Errors: 0"), "{text}");
}

#[test]
fn memtest_passes_by_uefi() {
    let Some(bed) = memtest("uefi", "64M") else { return };
    passes(&bed);
    bed.end();
}

#[test]
fn memtest_is_seen_and_hears_keys_and_passes() {
    let Some(bed) = memtest("bios", "32M") else { return };
    let text = bed.until("Status: Testing");
    assert!(text.contains("Memtest86+ v"), "{text}");
    assert!(!text.contains("Settings:"), "{text}");
    // By VNC, in two encodings; something is always changing, so parts that do not are compared.
    let mut viewers = [RAW, ZLIB].map(|encoding| Viewer::connect(&bed.socket(), encoding));
    let [plain, compressed] = viewers.each_mut().map(|viewer| viewer.look().clone());
    assert!(plain.text().contains("<F1> Configuration"), "{}", plain.text());
    let lines = |picture: &Picture| picture.pixels[720 * 16 * 10..].to_vec();
    assert!(lines(&plain) == lines(&compressed) && lines(&plain) == lines(&bed.screenshot()));
    // F1, and in its menu F10, by name.
    viewers[0].press(0xffbe);
    let settings = bed.until("Settings:");
    assert!(settings.contains("<F1>  Test selection"), "{settings}");
    assert!(viewers[1].look().text().contains("Settings:"));
    bed.ask(&["key", "vm", "f10"]);
    let patience = Instant::now() + PATIENCE;
    while bed.screenshot().text().contains("Settings:") {
        assert!(Instant::now() < patience, "the menu never went");
    }
    passes(&bed);
    bed.end();
}

#[test]
fn a_menu_is_on_both_consoles_and_linux_finds_keyboard_and_mouse() {
    let scratch = Scratch::new("keyboard");
    let script = "cat /proc/bus/input/devices | grep -e Name -e Handlers\n\
                  read line </dev/tty1; echo \"typed: $line\"\n";
    let Some(disk) = bootable::disk(&scratch, Kind::Bios, script, &[]) else { return };
    let bed = Bed::start(scratch, &[disk.to_str().expect("a plain name")]);
    bed.until(ENTRY);
    // Any key stops the clock, Enter starts what is chosen.
    bed.ask(&["key", "vm", "down", "enter"]);
    bed.vm().line("AT Translated Set 2 keyboard", PATIENCE);
    bed.ask(&["type", "vm", "Hello, World! {42}\n"]);
    bed.vm().line("typed: Hello, World! {42}", PATIENCE);
    let mut bed = bed;
    let (vm, _keyboard) = bed.vm.take().expect("it was started");
    let done = vm.wait(PATIENCE).expect(0);
    assert!(done.text().contains(ENTRY), "the menu was on the serial port, too: {}", done.out);
}

/// The rows of pixels of what the installer's list has chosen, which is red.
fn chosen(picture: &Picture) -> Option<std::ops::Range<usize>> {
    const RED: u32 = 0xaa_0000;
    let is_red = |row: &[u32]| row.iter().filter(|pixel| **pixel == RED).count() > 200;
    let red: Vec<_> = picture.pixels.chunks(picture.width).map(is_red).collect();
    let start = red.iter().position(|red| *red)?;
    Some(start..red.iter().rposition(|red| *red)? + 1)
}

/// debian-installer's kernel drives the display (bochs-drm, or virtio-gpu) and the keyboard (atkbd, or virtio-input): its list of
/// languages is seen, and goes down by a line. What the list says is tested on the serial port.
#[track_caller]
fn the_installer_asks_on(display: &str) -> Option<Bed> {
    let installer = "usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64";
    let files = ["linux", "initrd.gz"].map(|file| format!("{installer}/{file}"));
    let options = images::Options { suite: Some("bookworm".into()), ..images::Options::default() };
    let found = images::Source::new(&options).and_then(|mut source| {
        let files = files.each_ref().map(String::as_str);
        source.files(&["debian-installer-12-netboot-amd64"], &files, &mut images::Silent)
    });
    let files = match found {
        Ok(found) => found.files,
        Err(error) => {
            println!("skipped: {error}");
            return None;
        }
    };
    let [kernel, initrd] = [0, 1].map(|n: usize| files[n].stored.to_str().expect("a plain name"));
    let args = ["--engine", "translate", "--display", display, "--memory", "1G", "--kernel", kernel];
    let bed = Bed::start(
        Scratch::new(&format!("installer-{display}")),
        &[&args[..], &["--initrd", initrd]].concat(),
    );
    let english = bed.until_picture("a line of the list is red", |picture| chosen(picture).is_some());
    assert_eq!(english.size(), (1024, 768), "what the monitor prefers");
    let english = chosen(&english).expect("as just seen");
    bed.ask(&["key", "vm", "down"]);
    let below = english.start + 16..english.end + 16;
    bed.until_picture("the next line is", |picture| chosen(picture).as_ref() == Some(&below));
    Some(bed)
}

#[test]
fn the_debian_installer_is_seen_by_vga() {
    if let Some(bed) = the_installer_asks_on("vga") {
        bed.end();
    }
}

/// And its console takes the size that a viewer wants.
#[test]
fn the_debian_installer_is_seen_by_virtio() {
    let Some(bed) = the_installer_asks_on("virtio") else { return };
    let mut viewer = Viewer::connect(&bed.socket(), ZLIB);
    viewer.look();
    viewer.resize(800, 600);
    bed.until_picture("it has 800 by 600 pixels", |picture| picture.size() == (800, 600));
    bed.end();
}

/// Debian's kernel for all PCs, with drivers of screens and mice, and `seat` (`guests/work`); in it runs `script`.
fn with_drivers(scratch: Scratch, display: &str, script: &str) -> Option<Bed> {
    const DRIVERS: [&str; 8] = [
        "virtio_dma_buf",
        "drm",
        "drm_kms_helper",
        "drm_shmem_helper",
        "virtio-gpu",
        "virtio_input",
        "evdev",
        "psmouse",
    ];
    let options = images::Options { suite: Some("trixie".into()), ..images::Options::default() };
    let patterns = DRIVERS.map(|name| format!("*/{name}.ko*"));
    let patterns: Vec<&str> =
        ["boot/vmlinuz-*"].into_iter().chain(patterns.iter().map(String::as_str)).collect();
    let found = images::Source::new(&options).and_then(|mut source| {
        let kernel = source.files(&["linux-image-amd64"], &patterns, &mut images::Silent)?;
        let busybox = source.files(&["busybox-static"], &["*bin/busybox"], &mut images::Silent)?;
        Ok((kernel.files, busybox.files))
    });
    let (kernel, busybox) = match found {
        Ok(found) => found,
        Err(error) => {
            println!("skipped: {error}");
            return None;
        }
    };
    let seat = target().join("x86_64-unknown-linux-gnu/release/seat");
    assert!(seat.exists(), "{} is missing: build it with `cargo xtask guests`", seat.display());
    let mut initrd = images::initramfs(&std::fs::read(&busybox[0].stored).expect("the cache can be read"));
    initrd.file("bin/seat", 0o755, &std::fs::read(&seat).expect("it can be read"));
    initrd.dir("lib/drivers", 0o755);
    for (n, module) in kernel[1..].iter().enumerate() {
        initrd.file(&format!("lib/drivers/{n}.ko"), 0o644, &module.module().expect("a module"));
    }
    let load = "for module in /lib/drivers/*; do insmod $module; done";
    initrd.file("etc/test", 0o755, format!("#!/bin/sh\n{load}\n{script}").as_bytes());
    let initrd = scratch.file("initrd", &initrd.finish());
    let args = ["--engine", "translate", "--display", display, "--kernel"];
    let [kernel, initrd] = [&kernel[0].stored, &initrd].map(|path| path.to_str().expect("a plain name"));
    let cmdline = "console=ttyS0 quiet cryptomgr.notests panic=-1 lodge.exec=/etc/test";
    let more = [kernel, "--initrd", initrd, "--cmdline", cmdline];
    Some(Bed::start(scratch, &[&args[..], &more].concat()))
}

/// What a viewer does with its mouse reaches a PS/2 mouse's driver.
#[test]
fn linux_hears_a_ps2_mouse_and_its_wheel() {
    let script = "until grep -q Mouse /proc/bus/input/devices; do sleep 0.1; done\n\
                  seat events /dev/input/$(grep -A 4 Mouse /proc/bus/input/devices | grep -o 'event[0-9]*')\n";
    let Some(bed) = with_drivers(Scratch::new("mouse"), "vga", script) else { return };
    bed.vm().line("listening", PATIENCE);
    let mut viewer = Viewer::connect(&bed.socket(), RAW);
    // Where the viewer's mouse comes in is nowhere for a mouse that tells of moves only.
    viewer.point(100, 100, 0);
    // Moves (type 2) to the right and up, the left button (0x110), and the wheel (8) up and down.
    let done: [(u16, u16, u8, &[&str]); 6] = [
        (130, 60, 0, &["2 0 30", "2 1 -40"]),
        (130, 60, 1, &["1 272 1"]),
        (130, 60, 0, &["1 272 0"]),
        (130, 60, 8, &["2 8 1"]),
        (130, 60, 0, &[]),
        (130, 60, 16, &["2 8 -1"]),
    ];
    for (x, y, buttons, events) in done {
        viewer.point(x, y, buttons);
        for event in events {
            assert_eq!(bed.vm().line(event, PATIENCE), *event);
        }
    }
    bed.end();
}

/// The display adapter's cursor is the viewer's, and what is typed reaches a shell by virtio-input.
#[test]
fn linux_has_a_cursor_of_its_own_and_a_keyboard_by_virtio() {
    let script = "until [ -e /dev/dri/card0 ]; do sleep 0.1; done\nseat cursor /dev/dri/card0 &\n\
                  setsid -c sh -i </dev/tty1 >/dev/tty1 2>&1\n";
    let Some(bed) = with_drivers(Scratch::new("cursor"), "virtio", script) else { return };
    bed.vm().line("the cursor is shown", PATIENCE);
    let mut viewer = Viewer::connect(&bed.socket(), ZLIB);
    viewer.look();
    let cursor = viewer.cursor.expect("the guest has one");
    assert_eq!((cursor.picture.size(), cursor.hot), ((64, 64), (7, 9)));
    let at =
        |x: usize, y: usize| (cursor.picture.pixels[y * 64 + x], cursor.mask[y * 8 + x / 8] << (x % 8) >> 7);
    assert_eq!([at(0, 0), at(15, 15)], [(0x12_3456, 1); 2]);
    assert_eq!([at(16, 0).1, at(0, 16).1, at(63, 63).1], [0; 3]);
    bed.ask(&["type", "vm", "echo \"It's $((6 * 7)) <by> {virtio}|~\" >/dev/ttyS0\n"]);
    bed.vm().line("It's 42 <by> {virtio}|~", PATIENCE);
    bed.end();
}

/// Pixels that are not black.
fn lit(picture: &Picture) -> usize {
    picture.pixels.iter().filter(|pixel| **pixel != 0).count()
}

#[test]
fn uefi_shows_itself_by_virtio() {
    let scratch = Scratch::new("virtio-screen");
    let disk = scratch.file("disk", &[0; 1 << 20]);
    let args = ["--firmware", "uefi", "--display", "virtio", "--memory", "256M", "--disk"];
    let bed = Bed::start(scratch, &[&args[..], &[disk.to_str().expect("a plain name")]].concat());
    let patience = Instant::now() + PATIENCE;
    // The shell counts seconds before it asks: it does when nothing has changed for longer, in the mode that the monitor prefers.
    let (mut seen, mut since) = (bed.screenshot(), Instant::now());
    while since.elapsed() < Duration::from_secs(3) || lit(&seen) == 0 {
        assert!(Instant::now() < patience, "the shell never asks; {} pixels of text", lit(&seen));
        std::thread::sleep(Duration::from_millis(200));
        let now = bed.screenshot();
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
    }
    assert_eq!(seen.size(), (1024, 768));
    bed.ask(&["type", "vm", "echo WWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWW\n"]);
    let patience = Instant::now() + PATIENCE;
    while lit(&bed.screenshot()) < lit(&seen) + 1000 {
        assert!(Instant::now() < patience, "what was typed is not on the screen");
    }
    bed.end();
}

#[test]
fn mistakes_are_told() {
    let scratch = Scratch::new("screens-errors");
    let empty = scratch.file("password", b"\n");
    let empty = empty.to_str().expect("a plain name");
    for (args, part) in [
        (&["run", "--vnc", "0.0.0.0"][..], "need a password"),
        (&["run", "--vnc", "here"][..], "give an IP address"),
        (&["run", "--vnc", "127.0.0.1", "--vnc-password-file", empty][..], "is empty"),
        (&["run", "--vnc-password-file", "x"][..], "--vnc"),
    ] {
        let mut command = Command::new(lodge());
        command.env("LODGE_RUNTIME_DIR", scratch.path()).args(args);
        let done = start_with(&mut command, "").wait(PATIENCE).expect(2);
        assert!(done.err.contains(part), "{}", done.err);
    }
}
