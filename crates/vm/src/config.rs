//! What a VM is made from.

use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

pub use devices::flash::Contents as Variables;
pub use devices::net::{Guest, Header, Link, Mac};
pub use devices::virtio::balloon::Target as Balloon;
pub use devices::virtio::mem::Target as Plugs;
pub use devices::virtio::vsock::Hub as Sockets;
use serde::{Deserialize, Serialize};
use x86::cpuid::Model;

use crate::nics::Nics;
use crate::port::Limits;
use crate::storage::Disks;

/// Which technique runs the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The fastest that works here.
    #[default]
    Auto,
    /// The host's KVM.
    Kvm,
    /// The interpreter.
    Interpret,
    /// Binary rewriting.
    Translate,
}

/// What the guest starts with.
#[derive(Clone, Debug)]
pub enum Boot {
    /// A kernel, loaded for it.
    Kernel {
        /// Linux bzImage, ELF with a PVH note, or multiboot.
        kernel: PathBuf,
        /// Initial RAM disks, which are unpacked in turn, or multiboot modules.
        initrd: Vec<PathBuf>,
        /// Command line.
        cmdline: String,
    },
    /// Firmware, which starts at the reset vector.
    Firmware(Firmware),
}

/// Firmware, and what it keeps.
#[derive(Clone, Debug)]
pub struct Firmware {
    /// The code, which ends at 4 GiB.
    pub code: PathBuf,
    /// The flash chip below the code, in which UEFI has its variables. It stays as it is through resets.
    pub variables: Option<Arc<Variables>>,
    /// A BIOS's own display driver: the VGA BIOS.
    pub vga: Option<PathBuf>,
    /// Where messages for its developers go.
    pub log: Option<Arc<File>>,
}

/// What shows the guest's screen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Display {
    /// Nothing: the guest has its serial console alone.
    #[default]
    None,
    /// A VGA with a linear frame buffer, which every system knows.
    Vga,
    /// virtio-gpu, and virtio keyboard and tablet: for systems that know that they are guests. BIOS does not.
    Virtio,
}

/// What connects a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskBus {
    /// virtio-blk: the fastest, for guests that know that they are guests.
    #[default]
    Virtio,
    /// virtio-blk with packed rings, where the guest's driver knows them.
    VirtioPacked,
    /// An NVMe controller of its own, which systems of the last ten years know.
    Nvme,
    /// A SATA controller, which every system knows.
    Sata,
}

/// A disk of the guest's. It stays open through resets.
#[derive(Clone, Debug)]
pub struct Disk {
    /// What it holds.
    pub image: Arc<disks::Disk>,
    /// The serial number, of which the guest sees 20 bytes.
    pub serial: String,
    /// What it is connected to.
    pub bus: DiskBus,
}

/// Which network card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NicModel {
    /// virtio-net, with a pair of queues for each vCPU.
    #[default]
    Virtio,
    /// Intel's 82540EM, for systems without virtio.
    E1000,
}

/// A network card of the guest's. Its cable stays through resets.
#[derive(Clone)]
pub struct Nic {
    /// Its Ethernet address.
    pub mac: Mac,
    /// Which it is.
    pub model: NicModel,
    /// What its cable leads to.
    pub link: Arc<dyn Link>,
    /// How users call that.
    pub network: String,
    /// How much may go through.
    pub limits: Limits,
    /// The cable is in from the start.
    pub plugged: bool,
}

impl fmt::Debug for Nic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nic").field("mac", &self.mac).field("model", &self.model).finish_non_exhaustive()
    }
}

/// A directory of the host that the guest may use, by virtio-fs. It stays open through resets.
#[derive(Clone, Debug)]
pub struct Share {
    /// The directory.
    pub directory: Arc<shares::Share>,
    /// What the guest mounts: 1 to 36 bytes.
    pub tag: String,
}

/// A VM's configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// What to call it.
    pub name: String,
    /// What runs it.
    pub engine: Choice,
    /// Processor model; the best that the host has if absent: v3, else v2.
    pub model: Option<Model>,
    /// The reference engine checks every block of the translate engine.
    pub lockstep: bool,
    /// Virtual processors, 1 to 255.
    pub cpus: u32,
    /// Bytes of RAM; a multiple of 1 MiB.
    pub memory: u64,
    /// What it starts with.
    pub boot: Boot,
    /// Disks, in the order in which the guest finds them. They may come and go while it runs.
    pub disks: Arc<Disks>,
    /// Network cards, which may come and go while it runs.
    pub nics: Arc<Nics>,
    /// What is in its CD-ROM drives, which are SATA's.
    pub cdroms: Vec<Arc<disks::Disk>>,
    /// Directories of the host.
    pub shares: Vec<Share>,
    /// Its sockets, by which the host's programs reach the guest's. They stay through resets; their streams end.
    pub sockets: Arc<Sockets>,
    /// How much of its memory the guest is to have, which may change while it runs.
    pub balloon: Arc<Balloon>,
    /// Memory beside that which it starts with, as much as there is room for: what of it the guest is to have may change while it
    /// runs.
    pub plugs: Arc<Plugs>,
    /// What shows the guest's screen.
    pub display: Display,
    /// Who looks at the screen and types; it outlives resets.
    pub screen: Arc<screens::Screen>,
    /// Whether the guest has the debug-exit port 0xf4.
    pub debug_exit: bool,
    /// Where the translate engine writes down what it makes of guest code.
    pub trace: Option<PathBuf>,
}

impl Config {
    /// A VM with one processor, `memory` bytes of RAM and a serial console, and nothing else.
    pub fn new(name: &str, engine: Choice, memory: u64, boot: Boot) -> Self {
        Self {
            name: name.into(),
            engine,
            model: None,
            lockstep: false,
            cpus: 1,
            memory,
            boot,
            disks: Arc::default(),
            nics: Arc::default(),
            cdroms: Vec::new(),
            shares: Vec::new(),
            sockets: Arc::default(),
            balloon: Arc::default(),
            plugs: Arc::default(),
            display: Display::None,
            screen: screens::Screen::new(),
            debug_exit: false,
            trace: None,
        }
    }
}
