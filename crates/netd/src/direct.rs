//! MacVTap: a card that sits directly on a link of the host's.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use netctl::Direct;
use rtnetlink::packet_route::link::MacVtapMode;
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, major, makedev, minor, mknodat, open};

use crate::links::Link;
use crate::{Context, Error, Result};

/// The kernel's word for it.
pub fn mode(mode: Direct) -> MacVtapMode {
    match mode {
        Direct::Bridge => MacVtapMode::Bridge,
        Direct::Vepa => MacVtapMode::Vepa,
        Direct::Private => MacVtapMode::Private,
        Direct::Passthru => MacVtapMode::Passthrough,
    }
}

/// Opens the character device of a MacVTap, so many times. `runtime`: where its node may be for a moment if `/dev` has none.
///
/// # Errors
/// The host does not tell which it is, or it cannot be opened.
pub fn open_queues(link: &Link, queues: usize, runtime: &Path) -> Result<Vec<OwnedFd>> {
    let device = device(link)?;
    let name = format!("tap{}", link.index);
    let usual = Path::new("/dev").join(&name);
    // A node of this name may be that of a link in another network namespace.
    let is_it = fs::metadata(&usual).is_ok_and(|found| {
        use std::os::unix::fs::MetadataExt;
        found.file_type().is_char_device() && found.rdev() == device
    });
    if is_it {
        return open_all(&usual, queues, device);
    }
    let own = runtime.join(name);
    let _ = fs::remove_file(&own);
    let made = mknodat(CWD, &own, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, device);
    made.context(|| {
        format!("the device of {} ({}:{}) cannot be made", link.name, major(device), minor(device))
    })?;
    let opened = open_all(&own, queues, device);
    let _ = fs::remove_file(&own);
    opened
}

fn open_all(path: &Path, queues: usize, device: u64) -> Result<Vec<OwnedFd>> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let open = || {
        let file =
            open(path, flags, Mode::empty()).context(|| format!("{} cannot be opened", path.display()))?;
        let found = fstat(&file).context(|| format!("{} is strange", path.display()))?;
        (found.st_rdev == device)
            .then_some(file)
            .ok_or_else(|| Error::new(format!("{} is something else", path.display())))
    };
    (0..queues).map(|_| open()).collect()
}

/// The number of its device. The kernel tells it in sysfs only, which shows the links of the network namespace that it was mounted in.
fn device(link: &Link) -> Result<u64> {
    let directory = Path::new("/sys/class/net").join(&link.name);
    let read = |name: &str| fs::read_to_string(directory.join(name)).map(|text| text.trim().to_owned());
    let elsewhere = || {
        Error::new(format!("/sys does not show {}, as if it were another network namespace's", link.name))
            .help("mount it there: mount -t sysfs sysfs /sys")
    };
    if read("ifindex").ok().and_then(|text| text.parse().ok()) != Some(link.index) {
        return Err(elsewhere());
    }
    let number =
        read(&format!("tap{}/dev", link.index)).or_else(|_| read(&format!("macvtap/tap{}/dev", link.index)));
    let number = number.map_err(|_| elsewhere())?;
    let parts =
        number.split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    parts.map(|(major, minor)| makedev(major, minor)).ok_or_else(elsewhere)
}
