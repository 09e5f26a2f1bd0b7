//! Makes a system on a disk, in a VM of its own.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use disks::{Disk, Format, Options};
use images::cpio::Cpio;
use images::deb::{Choice, DebFile};
use images::tree::Tree;
use images::{Bundle, Progress};
use vm::{Boot, Config, Console, End, Vm};

use crate::{Error, layout, recipe};

const BUILDER: &str = include_str!("guest/builder.sh");
const INIT: &str = include_str!("guest/init.sh");
/// The size of a base's disk in bytes: what a VM's overlay starts with.
const SIZE: u64 = 10 << 30;
/// The builder's memory in bytes.
const MEMORY: u64 = 1 << 30;
/// Nothing takes that long, however slow the host.
const PATIENCE: Duration = Duration::from_secs(4 * 3600);
/// Lines of the console that are kept for the case that it fails.
const TAIL: usize = 25;
/// What `mke2fs` needs: packages by the beginnings of their names, and the files' names up to the version.
const MKE2FS: [(&str, &str); 6] = [
    ("libc6", "libc.so.6"),
    ("libext2fs2", "libext2fs.so.2"),
    ("libext2fs2", "libe2p.so.2"),
    ("libcom-err2", "libcom_err.so.2"),
    ("libblkid1", "libblkid.so.1"),
    ("libuuid1", "libuuid.so.1"),
];

/// The disk, the kernel and its initial RAM disk, in the directory where they are made.
pub const DISK: &str = "disk.qcow2";
/// The kernel.
pub const KERNEL: &str = "vmlinuz";
/// Its initial RAM disk.
pub const INITRD: &str = "initrd.img";

/// Makes the system of these packages in `dir`; gives the kernel's release.
pub fn build(
    bundle: &Bundle,
    engine: vm::Choice,
    dir: &Path,
    progress: &mut dyn Progress,
) -> Result<String, Error> {
    let store = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        std::fs::write(&path, bytes).map_err(Error::file(&path)).map(|()| path)
    };
    progress.begin("taking out the kernel", None);
    let parts = Parts::take(bundle);
    progress.finish();
    let parts = parts?;
    let kernel = store(KERNEL, &parts.kernel.data)?;
    store(INITRD, &parts.initrd()?.finish())?;
    let builder = store("builder.img", &parts.builder(bundle)?.finish())?;
    let tree = dir.join("tree.tar");
    write_tree(bundle, &tree, progress)?;

    let disk = dir.join(DISK);
    disks::create(&disk, Format::Qcow2, SIZE, None)?;
    let target = Arc::new(Disk::open(&disk, &Options { format: Some(Format::Qcow2), ..Default::default() })?);
    layout::write(&target, &disk)?;
    let source =
        Disk::open(&tree, &Options { format: Some(Format::Raw), read_only: true, ..Default::default() })?;
    let disk_of = |image: &Arc<Disk>, serial: &str| vm::Disk {
        image: image.clone(),
        serial: serial.into(),
        bus: vm::DiskBus::Virtio,
    };
    let boot = Boot::Kernel {
        kernel: kernel.clone(),
        initrd: vec![builder.clone()],
        cmdline: format!(
            "console=ttyS0 quiet cryptomgr.notests panic=-1 mitigations=off lodge.root={}",
            layout::ROOT
        ),
    };
    let config = Config {
        cpus: 2,
        disks: Arc::new(vec![disk_of(&target, "target"), disk_of(&Arc::new(source), "tree")].into()),
        ..Config::new("builder", engine, MEMORY, boot)
    };
    run(&config, progress)?;
    target.flush()?;
    for path in [&tree, &builder] {
        std::fs::remove_file(path).map_err(Error::file(path))?;
    }
    Ok(parts.release)
}

/// Writes everything that is in the system, as a tar archive.
fn write_tree(bundle: &Bundle, path: &Path, progress: &mut dyn Progress) -> Result<(), Error> {
    let file = File::create(path).map_err(Error::file(path))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let mut tree = Tree::new(BufWriter::with_capacity(1 << 20, file), now).map_err(Error::file(path))?;
    bundle.unpack(&mut tree, |name| name == recipe::BUSYBOX, progress)?;
    recipe::add_files(&mut tree, bundle.sources())
        .and_then(|()| tree.finish()?.flush())
        .map_err(Error::file(path))
}

/// Files that are needed before there is a file system.
struct Parts {
    release: String,
    kernel: DebFile,
    modules: Vec<DebFile>,
    busybox: DebFile,
}

impl Parts {
    fn take(bundle: &Bundle) -> Result<Self, Error> {
        let name = |path: &str| path.rsplit('/').next().unwrap_or(path).to_owned();
        let module = |path: &str| {
            let name = name(path);
            images::VIRTIO_MODULES
                .iter()
                .position(|module| name.split_once(".ko").is_some_and(|(n, _)| n == *module))
        };
        let mut modules = bundle.files("linux-image-6", |path| {
            let wanted = path.starts_with("boot/vmlinuz-") || module(path).is_some();
            if wanted { Choice::Take } else { Choice::Skip }
        })?;
        let missing = |file: &str| images::Error::NoFile { package: "linux-image".into(), file: file.into() };
        let kernel = modules.iter().position(|file| file.path.starts_with("boot/"));
        let kernel = modules.swap_remove(kernel.ok_or_else(|| missing("boot/vmlinuz-*"))?);
        modules.sort_by_key(|file| module(&file.path));
        let release = kernel.path.trim_start_matches("boot/vmlinuz-").to_owned();
        Ok(Self {
            release,
            kernel,
            modules,
            busybox: file(bundle, recipe::BUSYBOX, |path| name(path) == "busybox")?,
        })
    }

    /// What every initial RAM disk of ours begins with.
    fn image(&self, init: &str) -> Result<Cpio, Error> {
        let mut image = Cpio::new();
        for dir in ["bin", "dev", "etc", "proc", "root", "sbin", "sys", "lib/modules", "usr/bin", "usr/sbin"]
        {
            image.dir(dir, 0o755);
        }
        image.device("dev/console", 0o600, 5, 1);
        image.file("bin/busybox", 0o755, &self.busybox.data).file("init", 0o755, init.as_bytes());
        for (n, module) in self.modules.iter().enumerate() {
            // By number, for they are loaded in this order.
            image.file(&format!("lib/modules/{n:02}.ko"), 0o644, &module.module()?);
        }
        Ok(image)
    }

    /// Starts the system where no boot loader does.
    fn initrd(&self) -> Result<Cpio, Error> {
        // A shell by that name, for the script's.
        let mut image = self.image(INIT)?;
        image.symlink("bin/sh", "busybox");
        Ok(image)
    }

    /// Makes the system.
    fn builder(&self, bundle: &Bundle) -> Result<Cpio, Error> {
        let mut image = self.image(BUILDER)?;
        let named = |wanted: &'static str| move |path: &str| path.rsplit('/').next() == Some(wanted);
        let program = file(bundle, "e2fsprogs", named("mke2fs"))?;
        image.file("usr/lib/mke2fs", 0o755, &program.data);
        image.file(
            "etc/mke2fs.conf",
            0o644,
            &file(bundle, "e2fsprogs", |path| path == "etc/mke2fs.conf")?.data,
        );
        let loader = file(bundle, "libc6", |path| path.ends_with("/ld-linux-x86-64.so.2"))?;
        image.file("lib64/ld-linux-x86-64.so.2", 0o755, &loader.data);
        for (package, name) in MKE2FS {
            let library = file(bundle, package, |path| {
                let last = path.rsplit('/').next().unwrap_or_default();
                last.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
            })?;
            image.file(&format!("lib/{name}"), 0o755, &library.data);
        }
        Ok(image)
    }
}

/// The first file of a package whose path passes.
fn file(bundle: &Bundle, package: &str, wanted: impl Fn(&str) -> bool) -> Result<DebFile, Error> {
    let choose = |path: &str| if wanted(path) { Choice::TakeAndStop } else { Choice::Skip };
    let missing =
        || images::Error::NoFile { package: package.to_owned(), file: "that the builder needs".into() };
    Ok(bundle.files(package, choose)?.pop().ok_or_else(missing)?)
}

/// What the builder's VM tells.
enum News {
    Line(String),
    Ended(Result<Option<End>, vm::Error>),
}

/// Runs the builder to its end.
fn run(config: &Config, progress: &mut dyn Progress) -> Result<(), Error> {
    let (sender, news) = channel();
    let lines = Lines { line: Vec::new(), to: sender.clone() };
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let console = Arc::new(Console::new(Box::new(lines)));
            let ended = Vm::new(config, &console).map(|mut vm| {
                let end = vm.run(Some(Instant::now() + PATIENCE));
                vm.stop();
                console.flush();
                end
            });
            // Nobody listens only if there was a panic.
            let _ = sender.send(News::Ended(ended));
        });
        let mut watch = Watch { step: "starting".into(), tail: VecDeque::new(), done: false };
        progress.begin("starting a virtual machine", None);
        let ended = loop {
            match news.recv() {
                Ok(News::Line(line)) => watch.line(line, progress),
                Ok(News::Ended(ended)) => break ended,
                Err(_) => break Ok(None),
            }
        };
        progress.finish();
        match ended? {
            Some(End::PowerOff) if watch.done => Ok(()),
            end => {
                let end = format!("lodge: the machine ended ({end:?})");
                let tail: Vec<_> =
                    watch.tail.into_iter().chain([end]).map(|line| format!("  | {line}")).collect();
                Err(Error::Build { step: watch.step, tail: tail.join("\n") })
            }
        }
    })
}

/// What is known of the builder's work.
struct Watch {
    step: String,
    tail: VecDeque<String>,
    done: bool,
}

impl Watch {
    fn line(&mut self, line: String, progress: &mut dyn Progress) {
        let told = line.strip_prefix("@lodge ").map(|told| told.split_once(' ').unwrap_or((told, "")));
        match told {
            Some(("step", what)) => {
                progress.finish();
                progress.begin(what, None);
                self.step = what.to_owned();
            }
            Some(("steps", rest)) => {
                let (count, what) = rest.split_once(' ').unwrap_or(("0", rest));
                progress.finish();
                progress.begin_count(what, count.parse().unwrap_or(0));
                self.step = what.to_owned();
            }
            Some(("done", _)) => self.done = true,
            // dpkg(1), --status-fd.
            None if line.starts_with("processing: configure: ") => progress.advance(1),
            None if line.starts_with("status: ") || line.starts_with("processing: ") => {}
            _ => {
                if self.tail.len() == TAIL {
                    self.tail.pop_front();
                }
                self.tail.push_back(line);
            }
        }
    }
}

/// Takes the console's output line by line.
struct Lines {
    line: Vec<u8>,
    to: Sender<News>,
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            match byte {
                b'\n' => {
                    let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
                    // Nobody listens only if there was a panic.
                    let _ = self.to.send(News::Line(line));
                }
                b'\r' => {}
                // A line of any length takes no more than this.
                _ if self.line.len() < 4096 => self.line.push(byte),
                _ => {}
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Steps(Vec<String>);

    impl Progress for Steps {
        fn begin(&mut self, what: &str, total: Option<u64>) {
            self.0.push(format!("{what} {total:?}"));
        }
        fn advance(&mut self, n: u64) {
            self.0.push(format!("+{n}"));
        }
        fn finish(&mut self) {}
    }

    #[test]
    fn the_console_tells_how_far_it_is_and_its_end_is_kept() {
        let (to, news) = channel();
        let mut lines = Lines { line: Vec::new(), to };
        let mut said =
            String::from("@lodge step one thing\r\n@lodge steps 7 other things\nprocessing: configure: a\n");
        (0..100).for_each(|n| said += &format!("line {n}\n"));
        // In pieces, and with a line that never ends.
        for piece in said.as_bytes().chunks(7).chain([&[b'x'; 100_000][..]]) {
            lines.write_all(piece).unwrap();
        }
        assert!(lines.line.len() <= 4096);
        drop(lines);
        let mut watch = Watch { step: String::new(), tail: VecDeque::new(), done: false };
        let mut steps = Steps::default();
        for one in news {
            match one {
                News::Line(line) => watch.line(line, &mut steps),
                News::Ended(_) => unreachable!(),
            }
        }
        assert_eq!(steps.0, ["one thing None", "other things Some(7)", "+1"]);
        assert_eq!((watch.step.as_str(), watch.done), ("other things", false));
        assert_eq!(watch.tail.len(), TAIL);
        assert_eq!(watch.tail.back().map(String::as_str), Some("line 99"));
        watch.line("@lodge done".into(), &mut steps);
        assert!(watch.done);
    }
}
