//! Virtio over PCI (virtio 1.2, section 4.1): the modern interface, with MSI-X.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;

use machine::EventFd;
use memory::Memory;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{VIRTIO_F_ANY_LAYOUT, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::Device;
use super::queue::{Owner, Vring};
use super::ring::{Queue, QueueState};
use crate::pci::{Bar, Config, Function, Id};
use crate::{Saved, join, lock};

const VENDOR: u16 = 0x1af4;
/// Device identifiers of modern devices start here.
const FIRST_DEVICE: u16 = 0x1040;
const SUBSYSTEM: u16 = 0x1100;

/// The BAR's layout: 4 KiB each for common configuration, ISR, device configuration and notifications.
const PART: u64 = 0x1000;
const NOTIFY: u64 = 3 * PART;
const PARTS: [(u8, u64); 4] = [(1, 0), (3, PART), (4, 2 * PART), (2, NOTIFY)];
const NOTIFY_MULTIPLIER: u32 = 4;
/// Capability: access to the BAR through configuration space, which firmware uses.
const CAP_PCI_CONFIG: u8 = 5;
const CAP_VENDOR: u8 = 9;
const CAP_NOTIFY: u8 = 2;

const NO_VECTOR: u16 = 0xffff;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Device status (section 2.1).
mod status {
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 0x40;
}

/// Registers of common configuration (4.1.4.3).
mod common {
    pub const DEVICE_SELECT: u64 = 0;
    pub const DEVICE_FEATURES: u64 = 4;
    pub const DRIVER_SELECT: u64 = 8;
    pub const DRIVER_FEATURES: u64 = 0xc;
    pub const CONFIG_VECTOR: u64 = 0x10;
    pub const QUEUES: u64 = 0x12;
    pub const STATUS: u64 = 0x14;
    pub const GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY: u64 = 0x1e;
    pub const QUEUE_RINGS: u64 = 0x20;
    pub const QUEUE_RINGS_END: u64 = 0x38;
}

/// The transport's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    device_select: u32,
    driver_select: u32,
    /// Features that the driver accepted.
    features: u64,
    status: u8,
    queue_select: u16,
    vectors: Vec<u16>,
}

impl Registers {
    fn new(queues: usize) -> Self {
        Self {
            device_select: 0,
            driver_select: 0,
            features: 0,
            status: 0,
            queue_select: 0,
            vectors: vec![NO_VECTOR; queues],
        }
    }
}

/// A device's state as its transport knows it. Its configuration space is saved with the PCI host's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    registers: Registers,
    isr: u8,
    config_vector: u16,
    generation: u8,
    queues: Vec<QueueState>,
}

/// A virtio device as a PCI function.
pub struct Pci {
    /// There until it is dropped.
    inner: Option<Arc<Inner>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Inner {
    device: Arc<dyn Device>,
    config: Config,
    memory: Memory,
    registers: Mutex<Registers>,
    /// The driver has the device running: what the queues' threads look at.
    running: AtomicBool,
    isr: AtomicU8,
    /// Where the configuration's interrupt goes, and how often it changed: apart from the registers, so that [`Wires`] wait for
    /// nobody.
    config_vector: AtomicU16,
    generation: AtomicU8,
    queues: Vec<Arc<Vring>>,
    /// Where the capability for access through configuration space is.
    window: usize,
}

impl fmt::Debug for Pci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner().fmt(f)
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("virtio::Pci").field("kind", &self.device.kind()).finish_non_exhaustive()
    }
}

impl Pci {
    fn inner(&self) -> &Arc<Inner> {
        self.inner.as_ref().expect("there until it is dropped")
    }

    /// A function for `device`, which works in `memory`.
    ///
    /// # Errors
    /// The host gives no thread, or no event.
    pub fn new(device: Arc<dyn Device>, memory: Memory) -> std::io::Result<Arc<Self>> {
        let (config, window) = configuration(&*device);
        let queues: Vec<_> = device
            .queues()
            .iter()
            .map(|&size| Vring::new(size).map(Arc::new))
            .collect::<std::io::Result<_>>()?;
        let inner = Arc::new(Inner {
            config,
            window,
            memory: memory.clone(),
            registers: Mutex::new(Registers::new(queues.len())),
            running: AtomicBool::new(false),
            isr: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            generation: AtomicU8::new(0),
            queues,
            device,
        });
        inner.device.connect(Wires(Arc::downgrade(&inner)));
        let this = Arc::new(Self { inner: Some(inner.clone()), threads: Mutex::default() });
        for (n, queue) in inner.queues.iter().enumerate() {
            let owner: Arc<dyn Owner> = Arc::new(Back(Arc::downgrade(&inner)));
            let threads = queue.start(n, &inner.device, &memory, &owner)?;
            lock(&this.threads).extend(threads);
        }
        Ok(this)
    }

    /// Does all that there is to do, so that a fuzzer's input always does the same.
    #[cfg(fuzzing)]
    pub fn drain(&self) {
        let inner = self.inner();
        let back = Back(Arc::downgrade(inner));
        for (n, queue) in inner.queues.iter().enumerate() {
            if queue.work(n, &*inner.device, &inner.memory, &back).is_err() {
                back.broken();
            }
        }
    }

    /// Its registers.
    pub fn state(&self) -> Saved<PciState> {
        let registers = lock(&self.inner().registers).clone();
        let queues = self.inner().queues.iter().zip(&registers.vectors);
        let queues = queues.map(|(q, &vector)| q.quiet(|q| q.state(vector))).collect();
        Saved::V1(PciState {
            registers,
            isr: self.inner().isr.load(Ordering::SeqCst),
            config_vector: self.inner().config_vector.load(Ordering::SeqCst),
            generation: self.inner().generation.load(Ordering::SeqCst),
            queues,
        })
    }

    /// Restores its registers.
    pub fn set_state(&self, state: &Saved<PciState>) {
        let Saved::V1(state) = state;
        let inner = self.inner();
        inner.running.store(false, Ordering::SeqCst);
        let mut registers = lock(&inner.registers);
        let offered = inner.offered();
        *registers = Registers { vectors: registers.vectors.clone(), ..state.registers.clone() };
        registers.features &= offered;
        for (n, (queue, from)) in inner.queues.iter().zip(&state.queues).enumerate() {
            registers.vectors[n] = from.vector;
            queue.quiet(|q| q.set_state(from, &inner.memory, registers.features));
        }
        inner.isr.store(state.isr, Ordering::SeqCst);
        inner.config_vector.store(state.config_vector, Ordering::SeqCst);
        inner.generation.store(state.generation, Ordering::SeqCst);
        inner.device.set_features(registers.features);
        inner.run_if_ready(&registers);
        drop(registers);
        inner.queues.iter().for_each(|q| q.kick());
    }
}

impl Drop for Pci {
    fn drop(&mut self) {
        self.inner().queues.iter().for_each(|q| q.stop());
        join(&self.threads);
        // Who uses its wires holds it for a moment, perhaps with a lock that the device wants at its end: it ends here.
        let mut inner = self.inner.take();
        while let Some(Err(shared)) = inner.map(Arc::try_unwrap) {
            std::thread::yield_now();
            inner = Some(shared);
        }
    }
}

/// The configuration space, and where the capability for access through it is.
fn configuration(device: &dyn Device) -> (Config, usize) {
    let mut config = Config::new(Id {
        vendor: VENDOR,
        device: FIRST_DEVICE + device.kind(),
        revision: 1,
        class: device.class(),
        subsystem: (VENDOR, SUBSYSTEM),
    });
    config.use_intx();
    let bar = config.add_bar(Bar::Memory32(PART as u32 * PARTS.len() as u32)) as u8;
    let capability = |kind: u8, offset: u64, extra: &[u8]| {
        let len = 16 + extra.len() as u8;
        let mut body = vec![len, kind, bar, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((PART as u32).to_le_bytes());
        body.extend(extra);
        body
    };
    for (kind, offset) in PARTS {
        let extra = if kind == CAP_NOTIFY { &NOTIFY_MULTIPLIER.to_le_bytes()[..] } else { &[] };
        config.add_capability(CAP_VENDOR, &capability(kind, offset, extra));
    }
    let window = config.add_capability(CAP_VENDOR, &capability(CAP_PCI_CONFIG, 0, &[0; 4]));
    // The BAR's number, offset, length and data are the driver's to write.
    config.allow(window + 4, &[0xff, 0, 0, 0]);
    config.allow(window + 8, &[0xff; 12]);
    config.add_msix(device.queues().len() as u16 + 1);
    (config, window)
}

impl Function for Pci {
    fn config(&self) -> &Config {
        &self.inner().config
    }

    fn read_bar(&self, bar: usize, offset: u64, size: u8) -> u64 {
        if bar == 0 { self.inner().read(offset, size) } else { 0 }
    }

    fn write_bar(&self, bar: usize, offset: u64, size: u8, value: u64) {
        if bar == 0 {
            self.inner().write(offset, size, value);
        }
    }

    fn doorbells(&self, bar: usize) -> Vec<(u64, Arc<EventFd>)> {
        let places = (NOTIFY..).step_by(NOTIFY_MULTIPLIER as usize);
        let queues = self.inner().queues.iter().filter(|_| bar == 0);
        places.zip(queues.map(|queue| queue.event().clone())).collect()
    }

    fn config_read(&self, offset: u8) {
        let inner = self.inner();
        if let Some((at, size)) = inner.through_config(offset) {
            let value = self.read_bar(0, at, size).to_le_bytes();
            inner.config.set(inner.window + 16, &value[..4]);
        }
    }

    fn config_written(&self, offset: u8) {
        let inner = self.inner();
        if let Some((at, size)) = inner.through_config(offset) {
            let value = u32::from_le_bytes(inner.config.get(inner.window + 16));
            let mask = u32::MAX >> (32 - 8 * u32::from(size));
            self.write_bar(0, at, size, u64::from(value & mask));
        }
    }
}

impl Inner {
    fn offered(&self) -> u64 {
        let transport =
            [VIRTIO_F_VERSION_1, VIRTIO_F_ANY_LAYOUT, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC];
        let packed = self.device.packed_rings().then_some(VIRTIO_F_RING_PACKED);
        transport.into_iter().chain(packed).fold(self.device.features(), |all, bit| all | 1 << bit)
    }

    /// Where in the BAR an access to the window at `offset` of configuration space goes, and its size.
    fn through_config(&self, offset: u8) -> Option<(u64, u8)> {
        let data = self.window + 16;
        if usize::from(offset) & !3 != data {
            return None;
        }
        let [bar] = self.config.get::<1>(self.window + 4);
        let at = u32::from_le_bytes(self.config.get(self.window + 8));
        let len = u32::from_le_bytes(self.config.get(self.window + 12));
        (bar == 0 && matches!(len, 1 | 2 | 4) && at.is_multiple_of(len)).then_some((at.into(), len as u8))
    }

    fn read(&self, offset: u64, size: u8) -> u64 {
        match offset / PART {
            0 => self.read_common(offset, size),
            1 if offset == PART => {
                let isr = self.isr.swap(0, Ordering::SeqCst);
                self.config.set_intx(false);
                isr.into()
            }
            2 => {
                let bytes = self.device.config();
                crate::read_bytes(offset - 2 * PART, size, |at| bytes.get(at as usize).copied().unwrap_or(0))
            }
            _ => 0,
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        match offset / PART {
            0 => self.write_common(offset, size, value),
            2 => self.device.write_config(offset - 2 * PART, size, value),
            3 => {
                if let Some(queue) =
                    self.queues.get(((offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER)) as usize)
                {
                    queue.kick();
                }
            }
            _ => {}
        }
    }

    fn read_common(&self, offset: u64, size: u8) -> u64 {
        let r = lock(&self.registers);
        let half =
            |features: u64, select: u32| if select < 2 { features >> (32 * select) & 0xffff_ffff } else { 0 };
        let n = usize::from(r.queue_select);
        let queue = self.queues.get(n);
        match offset {
            common::DEVICE_SELECT => r.device_select.into(),
            common::DEVICE_FEATURES => half(self.offered(), r.device_select),
            common::DRIVER_SELECT => r.driver_select.into(),
            common::DRIVER_FEATURES => half(r.features, r.driver_select),
            common::CONFIG_VECTOR => self.config_vector.load(Ordering::SeqCst).into(),
            common::QUEUES => self.queues.len() as u64,
            common::STATUS => r.status.into(),
            common::GENERATION => self.generation.load(Ordering::SeqCst).into(),
            common::QUEUE_SELECT => r.queue_select.into(),
            common::QUEUE_SIZE => queue.map_or(0, |q| q.with(|q| q.size()).into()),
            common::QUEUE_VECTOR => r.vectors.get(n).copied().unwrap_or(NO_VECTOR).into(),
            common::QUEUE_ENABLE => queue.map_or(0, |q| q.with(|q| q.is_enabled()).into()),
            common::QUEUE_NOTIFY => n as u64,
            common::QUEUE_RINGS..common::QUEUE_RINGS_END => {
                let rings = queue.map_or([0; 3], |q| q.with(|q| *q.rings()));
                let at = offset - common::QUEUE_RINGS;
                let ring = rings[(at / 8) as usize] >> (8 * (at % 8));
                if size >= 8 { ring } else { ring & ((1 << (8 * size)) - 1) }
            }
            _ => 0,
        }
    }

    fn write_common(&self, offset: u64, size: u8, value: u64) {
        let mut r = lock(&self.registers);
        let n = usize::from(r.queue_select);
        match offset {
            common::DEVICE_SELECT => r.device_select = value as u32,
            common::DRIVER_SELECT => r.driver_select = value as u32,
            common::DRIVER_FEATURES if r.status & status::FEATURES_OK == 0 && r.driver_select < 2 => {
                let shift = 32 * r.driver_select;
                let mask = 0xffff_ffff << shift;
                r.features = r.features & !mask | value << shift & mask;
            }
            common::CONFIG_VECTOR => self.config_vector.store(self.vector(value), Ordering::SeqCst),
            common::STATUS => self.set_status(&mut r, value as u8),
            common::QUEUE_SELECT => r.queue_select = value as u16,
            common::QUEUE_VECTOR if n < r.vectors.len() => r.vectors[n] = self.vector(value),
            _ => {
                let Some(queue) = self.queues.get(n) else { return };
                let features = r.features;
                queue.with(|q| self.write_queue(q, offset, size, value, features));
            }
        }
    }

    fn write_queue(&self, q: &mut Queue, offset: u64, size: u8, value: u64, features: u64) {
        // A queue that is enabled keeps its place.
        if q.is_enabled() {
            return;
        }
        match offset {
            common::QUEUE_SIZE => q.set_size(value as u16),
            common::QUEUE_ENABLE if value == 1 => q.enable(&self.memory, features),
            common::QUEUE_RINGS..common::QUEUE_RINGS_END if size >= 4 && offset.is_multiple_of(4) => {
                let at = offset - common::QUEUE_RINGS;
                let ring = &mut q.rings()[(at / 8) as usize];
                *ring = match (at % 8, size) {
                    (0, 8) => value,
                    (0, _) => *ring & !0xffff_ffff | value & 0xffff_ffff,
                    _ => *ring & 0xffff_ffff | value << 32,
                };
            }
            _ => {}
        }
    }

    /// A vector that the driver may choose.
    fn vector(&self, value: u64) -> u16 {
        if value <= self.queues.len() as u64 { value as u16 } else { NO_VECTOR }
    }

    fn set_status(&self, r: &mut Registers, value: u8) {
        if value == 0 {
            self.running.store(false, Ordering::SeqCst);
            // Whoever serves a request finishes it first.
            self.queues.iter().for_each(|q| q.quiet(|q| q.reset()));
            *r = Registers::new(self.queues.len());
            self.isr.store(0, Ordering::SeqCst);
            self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
            self.config.set_intx(false);
            self.device.reset();
            return;
        }
        let mut value = value;
        let accepted = r.features & !self.offered() == 0 && r.features >> VIRTIO_F_VERSION_1 & 1 == 1;
        if r.status & status::FEATURES_OK == 0 && !accepted {
            value &= !status::FEATURES_OK;
        }
        if value & !r.status & status::FEATURES_OK != 0 {
            self.device.set_features(r.features);
        }
        r.status |= value;
        self.run_if_ready(r);
        self.queues.iter().for_each(|q| q.kick());
    }

    fn run_if_ready(&self, r: &Registers) {
        let both = status::FEATURES_OK | status::DRIVER_OK;
        let ready = r.status & (both | status::NEEDS_RESET) == both;
        self.running.store(ready, Ordering::SeqCst);
    }

    fn interrupt(&self, vector: u16, isr: u8) {
        if self.config.msix_enabled() {
            if vector != NO_VECTOR {
                self.config.notify(vector);
            }
        } else {
            self.isr.fetch_or(isr, Ordering::SeqCst);
            self.config.set_intx(true);
        }
    }
}

/// How a device speaks first. Any thread may, with any lock of the device's held; nothing happens once the device has gone, or
/// while its driver is not there.
#[derive(Clone, Debug, Default)]
pub struct Wires(Weak<Inner>);

impl Wires {
    /// Looks at queue `queue` again: the device has become ready for a request.
    pub fn kick(&self, queue: usize) {
        if let Some(inner) = self.0.upgrade()
            && let Some(queue) = inner.queues.get(queue)
        {
            queue.kick();
        }
    }

    /// Tells the driver that the configuration has changed.
    pub fn config_changed(&self) {
        let Some(inner) = self.0.upgrade() else { return };
        inner.generation.fetch_add(1, Ordering::SeqCst);
        if inner.running.load(Ordering::SeqCst) {
            inner.interrupt(inner.config_vector.load(Ordering::SeqCst), ISR_CONFIG);
        }
    }
}

/// The queues' threads know the device only weakly, for it ends them.
struct Back(Weak<Inner>);

impl Owner for Back {
    fn is_running(&self) -> bool {
        self.0
            .upgrade()
            .is_some_and(|inner| inner.running.load(Ordering::SeqCst) && inner.config.bus_master())
    }

    fn served(&self, n: usize) {
        if let Some(inner) = self.0.upgrade() {
            let vector = lock(&inner.registers).vectors.get(n).copied().unwrap_or(NO_VECTOR);
            inner.interrupt(vector, ISR_QUEUE);
        }
    }

    fn broken(&self) {
        let Some(inner) = self.0.upgrade() else { return };
        {
            let mut r = lock(&inner.registers);
            // It may have been reset meanwhile.
            if !inner.running.swap(false, Ordering::SeqCst) {
                return;
            }
            r.status |= status::NEEDS_RESET;
        }
        inner.interrupt(inner.config_vector.load(Ordering::SeqCst), ISR_CONFIG);
    }
}
