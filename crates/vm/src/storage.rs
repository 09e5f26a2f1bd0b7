//! A VM's disks, which outlive its machine's resets, and come and go while the guest runs.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use devices::pci::{Address, Full, Function, HotPlug};
use devices::{nvme, virtio};
use machine::{Machine, Memory};
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::config::{Disk, DiskBus};

/// How long a guest that takes part has to take note of a disk.
const NOTICING: Duration = Duration::from_secs(4);
/// How often who waits for the guest looks whether the machine is still the same.
const LOOK: Duration = Duration::from_millis(100);
/// How long what is under way on a disk may take when it goes.
const CLOSING: Duration = Duration::from_secs(5);

/// Why a disk did not come or go.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Refusal {
    #[error(transparent)]
    Image(#[from] disks::Error),
    #[error("the SATA controller's disks come and go with the machine; give the disk bus=virtio or bus=nvme")]
    Sata,
    #[error("another disk has the serial number {0}; give this one another with serial=")]
    Serial(String),
    #[error("{0}; detach a disk or network card first")]
    Full(Full),
    #[error("no disk is called {0}; `lodge disk ls` shows their serial numbers and paths")]
    Unknown(String),
    #[error("{0} disks are called {1}; name one by its serial number")]
    Many(usize, String),
    #[error("no network card is called {0}; `lodge nic ls` shows their numbers and addresses")]
    NoCard(String),
    #[error("{0}")]
    Network(String),
    #[error("it is being detached already; wait for that")]
    Leaving,
    #[error(
        "the guest's system takes no part in hot-plug: it has not started yet, or has no ACPI; use --force if it has no use for the device"
    )]
    NoListener,
    #[error(
        "the guest has not given it up within {0} s, and may do so later; see that nothing there uses it (unmount a disk), or use --force, by which the guest loses what it has not written"
    )]
    Kept(f64),
    #[error(
        "the disk was detached, but what was written last could not be flushed: {0}; look after the image"
    )]
    Flush(disks::Error),
    #[error("the host gives no thread: {0}; it may be short of memory")]
    Host(std::io::Error),
}

/// A disk to be opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewDisk {
    /// Where the image is: absolute, for the VM's process has a working directory of its own.
    pub path: PathBuf,
    /// How to open it.
    pub options: disks::Options,
    /// Its serial number; one is chosen if absent.
    pub serial: Option<String>,
    /// What connects it.
    pub bus: DiskBus,
}

/// How a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskState {
    /// The guest has it.
    Attached,
    /// It is there, but the guest has not taken note of it: it will when it starts next.
    Unnoticed,
    /// The guest is asked to give it up.
    Leaving,
    /// The guest has given it up by itself; it comes back when the machine is reset.
    Ejected,
}

/// A disk, as users see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its serial number.
    pub serial: String,
    /// Where the image is.
    pub path: PathBuf,
    /// The image's format.
    pub format: String,
    /// Bytes.
    pub size: u64,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// What connects it.
    pub bus: DiskBus,
    /// Where on the PCI bus.
    pub address: Option<String>,
    /// How it is.
    pub state: DiskState,
}

/// A VM's disks.
#[derive(Debug, Default)]
pub struct Disks(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    disks: Vec<Attached>,
    machine: Option<Slots>,
}

#[derive(Debug)]
struct Attached {
    disk: Disk,
    /// Where it was last, and is to be again after a reset.
    at: Option<Address>,
    leaving: bool,
}

/// Where devices are plugged in, for as long as the machine is there.
pub(crate) struct Slots {
    hotplug: Weak<HotPlug>,
    machine: Weak<Machine>,
    cpus: u32,
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Slots")
    }
}

/// The place of a disk in a machine.
type Place = (Arc<HotPlug>, Address);

impl From<Vec<Disk>> for Disks {
    fn from(disks: Vec<Disk>) -> Self {
        let disks = disks.into_iter().map(|disk| Attached { disk, at: None, leaving: false }).collect();
        Self(Mutex::new(State { disks, machine: None }))
    }
}

/// The controller of a disk that has one of its own.
pub(crate) fn controller(disk: &Disk, memory: &Memory, cpus: u32) -> std::io::Result<Arc<dyn Function>> {
    let image = disk.image.clone();
    let blk = |image| virtio::blk::Blk::new(image, &disk.serial, cpus);
    Ok(match disk.bus {
        // A queue for each vCPU.
        DiskBus::Nvme => nvme::Nvme::new(image, &disk.serial, cpus, memory.clone())?,
        DiskBus::VirtioPacked => virtio::Pci::new(Arc::new(blk(image).packed()), memory.clone())?,
        DiskBus::Virtio | DiskBus::Sata => virtio::Pci::new(Arc::new(blk(image)), memory.clone())?,
    })
}

impl Disks {
    /// Those that are there now, in the order in which they came.
    pub fn all(&self) -> Vec<Disk> {
        self.state().disks.iter().map(|attached| attached.disk.clone()).collect()
    }

    /// Makes sure that what was written lasts.
    ///
    /// # Errors
    /// The host cannot.
    pub fn flush(&self) -> Result<(), disks::Error> {
        self.all().iter().try_for_each(|disk| disk.image.flush())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Plugs all into a new machine, but those of SATA, which are given back with the others' places.
    pub(crate) fn plug(
        &self,
        hotplug: &Arc<HotPlug>,
        machine: &Arc<Machine>,
        cpus: u32,
    ) -> Result<Vec<(Disk, Option<Address>)>, Error> {
        let mut state = self.state();
        // Who has been asked to give up a disk need not be asked any more.
        state.disks.retain(|attached| !attached.leaving);
        for attached in state.disks.iter_mut().filter(|attached| attached.disk.bus != DiskBus::Sata) {
            let function = controller(&attached.disk, &machine.memory, cpus)
                .map_err(|source| Error::Host { what: "a thread for a device", source })?;
            attached.at = Some(hotplug.plug(attached.at, function)?);
        }
        state.machine = Some(Slots::new(hotplug, machine, cpus));
        Ok(state.disks.iter().map(|attached| (attached.disk.clone(), attached.at)).collect())
    }

    /// Opens a disk's image, and gives it to the guest.
    ///
    /// # Errors
    /// It cannot be opened, or there is no room for it.
    pub fn attach(&self, new: &NewDisk) -> Result<DiskStatus, Refusal> {
        if new.bus == DiskBus::Sata {
            return Err(Refusal::Sata);
        }
        let image = Arc::new(disks::Disk::open(&new.path, &new.options)?);
        let mut state = self.state();
        let taken = |serial: &String| state.disks.iter().any(|other| other.disk.serial == *serial);
        let serial = match &new.serial {
            Some(serial) if taken(serial) => return Err(Refusal::Serial(serial.clone())),
            Some(serial) => serial.clone(),
            None => (0..).map(|n| format!("lodge-{n}")).find(|serial| !taken(serial)).unwrap_or_default(),
        };
        let disk = Disk { image, serial: serial.clone(), bus: new.bus };
        // Between two machines it waits for the next.
        let (mut at, mut place) = (None, None);
        if let Some((hotplug, machine, cpus)) = state.machine.as_ref().and_then(Slots::now) {
            let function = controller(&disk, &machine.memory, cpus).map_err(Refusal::Host)?;
            at = Some(hotplug.insert(function).map_err(Refusal::Full)?);
            place = at.map(|at| (hotplug, at));
        }
        state.disks.push(Attached { disk, at, leaving: false });
        drop(state);
        if let Some((hotplug, at)) = place
            && hotplug.has_listener()
        {
            hotplug.wait_noticed(at, NOTICING);
        }
        self.list().into_iter().find(|disk| disk.serial == serial).ok_or(Refusal::Unknown(serial))
    }

    /// Asks the guest to give up a disk, waits until it has, and closes the image. `force` does not ask. The disk is named by its
    /// serial number or path; `path` is the same as an absolute path, if there is such a file.
    ///
    /// # Errors
    /// There is no such disk, or the guest does not give it up.
    pub fn detach(
        &self,
        which: &str,
        path: Option<&Path>,
        patience: Duration,
        force: bool,
    ) -> Result<(), Refusal> {
        let (image, place) = self.begin_detaching(which, path)?;
        let given_up = match &place {
            Some((hotplug, at)) if !force => ask(hotplug, *at, patience, || !self.has(&image)),
            _ => Ok(()),
        };
        let mut state = self.state();
        let here = |attached: &Attached| Arc::ptr_eq(&attached.disk.image, &image);
        // None: a new machine has come without it.
        let attached = state.disks.iter_mut().find(|attached| here(attached));
        if let (Err(refusal), Some(attached)) = (given_up, attached) {
            attached.leaving = false;
            return Err(refusal);
        }
        state.disks.retain(|attached| !here(attached));
        drop(state);
        // Its threads end here, not on a vCPU's.
        if let Some((hotplug, at)) = place {
            drop(hotplug.remove(at));
        }
        close(image)
    }

    /// Finds a disk, and says that it leaves: its image, and where it is.
    fn begin_detaching(
        &self,
        which: &str,
        path: Option<&Path>,
    ) -> Result<(Arc<disks::Disk>, Option<Place>), Refusal> {
        let mut state = self.state();
        let has_path = |disk: &Disk| {
            let absolute = || disk.image.path().canonicalize().ok();
            disk.image.path() == Path::new(which) || path.is_some() && path == absolute().as_deref()
        };
        let all = || state.disks.iter().enumerate();
        let mut found: Vec<_> = all().filter(|(_, a)| a.disk.serial == which).map(|(n, _)| n).collect();
        if found.is_empty() {
            found = all().filter(|(_, a)| has_path(&a.disk)).map(|(n, _)| n).collect();
        }
        let hotplug = state.machine.as_ref().and_then(Slots::hotplug);
        let attached = match found[..] {
            [one] => &mut state.disks[one],
            [] => return Err(Refusal::Unknown(which.into())),
            _ => return Err(Refusal::Many(found.len(), which.into())),
        };
        if attached.disk.bus == DiskBus::Sata {
            return Err(Refusal::Sata);
        }
        if std::mem::replace(&mut attached.leaving, true) {
            return Err(Refusal::Leaving);
        }
        Ok((attached.disk.image.clone(), hotplug.zip(attached.at)))
    }

    fn has(&self, image: &Arc<disks::Disk>) -> bool {
        self.state().disks.iter().any(|other| Arc::ptr_eq(&other.disk.image, image))
    }

    /// What there is.
    pub fn list(&self) -> Vec<DiskStatus> {
        let state = self.state();
        let hotplug = state.machine.as_ref().and_then(Slots::hotplug);
        let how = |attached: &Attached| match (&hotplug, attached.at) {
            _ if attached.leaving => DiskState::Leaving,
            (Some(hotplug), Some(at)) if hotplug.is_ejected(at) => DiskState::Ejected,
            (Some(hotplug), Some(at)) if !hotplug.wait_noticed(at, Duration::ZERO) => DiskState::Unnoticed,
            _ => DiskState::Attached,
        };
        let status = |attached: &Attached| {
            let Attached { disk, at, .. } = attached;
            DiskStatus {
                serial: disk.serial.clone(),
                path: disk.image.path().into(),
                format: disk.image.format().to_string(),
                size: disk.image.size(),
                read_only: disk.image.is_read_only(),
                bus: disk.bus,
                address: at.map(|at| format!("{at:?}")),
                state: how(attached),
            }
        };
        state.disks.iter().map(status).collect()
    }
}

impl Slots {
    pub(crate) fn new(hotplug: &Arc<HotPlug>, machine: &Arc<Machine>, cpus: u32) -> Self {
        Self { hotplug: Arc::downgrade(hotplug), machine: Arc::downgrade(machine), cpus }
    }

    pub(crate) fn hotplug(&self) -> Option<Arc<HotPlug>> {
        self.now().map(|(hotplug, ..)| hotplug)
    }

    pub(crate) fn now(&self) -> Option<(Arc<HotPlug>, Arc<Machine>, u32)> {
        Some((self.hotplug.upgrade()?, self.machine.upgrade()?, self.cpus))
    }
}

/// Asks the guest until it has given up the device at `at`, or a new machine has come without it: until it is `gone`.
pub(crate) fn ask(
    hotplug: &HotPlug,
    at: Address,
    patience: Duration,
    gone: impl Fn() -> bool,
) -> Result<(), Refusal> {
    if hotplug.is_ejected(at) {
        return Ok(());
    }
    if !hotplug.has_listener() {
        return Err(Refusal::NoListener);
    }
    hotplug.ask(at);
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        if hotplug.wait_ejected(at, LOOK) || gone() {
            return Ok(());
        }
    }
    hotplug.withdraw(at);
    Err(Refusal::Kept(patience.as_secs_f64()))
}

/// Closes an image when what is under way on it has ended, so that others can open it.
fn close(mut image: Arc<disks::Disk>) -> Result<(), Refusal> {
    let flushed = image.flush().map_err(Refusal::Flush);
    let deadline = Instant::now() + CLOSING;
    // A vCPU that is at its registers holds the device for a moment.
    while let Err(shared) = Arc::try_unwrap(image) {
        if Instant::now() > deadline {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
        image = shared;
    }
    flushed
}
