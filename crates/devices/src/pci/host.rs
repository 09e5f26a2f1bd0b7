//! The host bridge: who finds functions, and puts their BARs on the machine's buses.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, RwLock, Weak};

use machine::irq::{Line, Route};
use machine::{Bus, EventFd, Machine, Registers};
use serde::{Deserialize, Serialize};

use super::config::{Routes, command, reg};
use super::{Address, Bar, CONFIG, Config, ConfigState, ECAM, Function, Id};
use crate::{Saved, lock};

/// PCIEXBAR, where the memory-mapped configuration space is.
const PCIEXBAR: usize = 0x60;
/// Firmware's own: from here on the host bridge's registers can be written and read.
const SCRATCH: Range<usize> = 0x40..0x100;
/// BARs in 64 bits up to this size go below 4 GiB nevertheless, where a kernel without PAE reaches them.
const SMALL: u64 = 16 << 20;

/// Addresses that are given to BARs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Ports.
    pub io: Range<u64>,
    /// Memory below 4 GiB.
    pub low: Range<u64>,
    /// Memory above.
    pub high: Range<u64>,
}

impl Default for Windows {
    fn default() -> Self {
        Self { io: 0xc000..0x1_0000, low: 0xc000_0000..0xfec0_0000, high: 512 << 30..1024 << 30 }
    }
}

/// No more room: slots on the bus, or addresses in a window.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the PCI bus has no room for {0}; give the machine fewer or smaller devices")]
pub struct Full(pub(super) String);

/// The saved state of the bus: every function's configuration space, and the address register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostState {
    /// 0xcf8.
    pub address: u32,
    /// By function.
    pub functions: Vec<(Address, ConfigState)>,
}

struct Slot {
    function: Arc<dyn Function>,
    /// Where its BARs are on the buses; nothing any more when it has been unplugged.
    mapped: Mutex<Option<[Option<u64>; 6]>>,
}

type Lines = Box<dyn Fn(u8) -> Line + Send + Sync>;

/// Intel's Q35 host bridge with one bus.
pub struct Host {
    this: Weak<Self>,
    machine: Weak<Machine>,
    windows: Windows,
    slots: RwLock<BTreeMap<Address, Arc<Slot>>>,
    address: Mutex<u32>,
    /// Where the memory-mapped configuration space is on the bus.
    ecam: Mutex<Option<u64>>,
    lines: Lines,
    routes: Routes,
    control: Arc<dyn Registers>,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.slots.read().unwrap_or_else(|e| e.into_inner()).keys()).finish()
    }
}

/// The host bridge as a function on its own bus.
struct Bridge {
    config: Config,
    host: Weak<Host>,
}

impl Function for Bridge {
    fn config(&self) -> &Config {
        &self.config
    }

    fn config_written(&self, offset: u8) {
        if (PCIEXBAR as u8..PCIEXBAR as u8 + 8).contains(&offset)
            && let Some(host) = self.host.upgrade()
        {
            host.map_ecam(&self.config);
        }
    }
}

impl Host {
    /// Devices that come where there is room, a bit for each: all but the host bridge and the chipset's last.
    pub const PLUGGABLE: u32 = 0x7fff_fffe;

    /// A bridge of `machine` that gives BARs addresses in `windows`. `lines` makes a line to a PIRQ ([`super::Lpc::line`]),
    /// `routes` a way for the messages of a vector; `control` is the reset control register, whose port 0xcf9 lies among the bridge's.
    pub fn new(
        machine: Weak<Machine>,
        windows: Windows,
        lines: impl Fn(u8) -> Line + Send + Sync + 'static,
        routes: impl Fn() -> Box<dyn Route> + Send + Sync + 'static,
        control: Arc<dyn Registers>,
    ) -> Arc<Self> {
        let host = Arc::new_cyclic(|this| Self {
            this: this.clone(),
            machine,
            windows,
            slots: RwLock::default(),
            address: Mutex::new(0),
            ecam: Mutex::new(None),
            lines: Box::new(lines),
            routes: Arc::new(routes),
            control,
        });
        let mut config = Config::new(Id {
            vendor: 0x8086,
            device: 0x29c0,
            revision: 2,
            class: 0x06_0000,
            subsystem: (0x1af4, 0x1100),
        });
        config.allow(SCRATCH.start, &[0xff; SCRATCH.end - SCRATCH.start]);
        // Length 256 buses, enabled.
        config.put(PCIEXBAR, &(ECAM.start | 1).to_le_bytes());
        config.allow(PCIEXBAR, &0xf_f000_0007_u64.to_le_bytes());
        let bridge = Bridge { config, host: host.this.clone() };
        host.map_ecam(&bridge.config);
        host.connect(Address { device: 0, function: 0 }, Arc::new(bridge));
        host
    }

    /// Puts the configuration ports on the bus.
    ///
    /// # Errors
    /// Something else is there.
    pub fn insert(self: &Arc<Self>, ports: &Bus) -> Result<(), machine::bus::Overlap> {
        ports.insert(CONFIG.start, CONFIG.len, "PCI configuration", self.clone())
    }

    /// Plugs a function in, at an address or at the first free device.
    ///
    /// # Errors
    /// The address is taken, or there is none left.
    pub fn plug(&self, at: Option<Address>, function: Arc<dyn Function>) -> Result<Address, Full> {
        let taken = |at: &Address| self.slot(*at).is_some();
        let at = match at {
            Some(at) if taken(&at) => return Err(Full(format!("another function at {at:?}"))),
            Some(at) => at,
            None => (0..32)
                .filter(|device| Self::PLUGGABLE >> device & 1 == 1)
                .map(|device| Address { device, function: 0 })
                .find(|at| !taken(at))
                .ok_or_else(|| Full("one more device".into()))?,
        };
        self.connect(at, function);
        Ok(at)
    }

    /// Takes the functions of a device out, while the guest runs: it neither sees them any more, nor do they reach its memory.
    pub fn unplug(&self, device: u8) -> Vec<Arc<dyn Function>> {
        let mut slots = self.slots.write().unwrap_or_else(|e| e.into_inner());
        let at: Vec<_> = slots.keys().filter(|at| at.device == device).copied().collect();
        let gone: Vec<_> = at.iter().filter_map(|at| slots.remove(at)).collect();
        drop(slots);
        for slot in &gone {
            // No memory, no messages, no pin. Another vCPU may be at the configuration still, but cannot map it any more.
            let config = slot.function.config();
            config.write(reg::COMMAND as u64, 2, command::INTX_OFF.into());
            self.map(slot);
            let mapped = lock(&slot.mapped).take();
            if let Some(machine) = self.machine.upgrade() {
                for (n, bar) in config.bars() {
                    let Some(start) = mapped.and_then(|mapped| mapped[n]) else { continue };
                    if let Some(memory) = slot.function.bar_memory(n) {
                        memory.show(None);
                    }
                    bus(&machine, bar).remove(start);
                }
            }
            slot.function.config_written(reg::COMMAND as u8);
        }
        gone.into_iter().map(|slot| slot.function.clone()).collect()
    }

    /// The devices that are there, a bit for each.
    pub fn devices(&self) -> u32 {
        self.slots().iter().fold(0, |devices, (at, _)| devices | 1 << at.device)
    }

    /// Gives every BAR an address and enables the functions, as firmware would, for kernels that are started without.
    ///
    /// # Errors
    /// A window is full.
    pub fn assign(&self) -> Result<(), Full> {
        let mut bars: Vec<_> = self
            .slots()
            .into_iter()
            .flat_map(|(at, slot)| {
                slot.function.config().bars().map(|(n, bar)| (at, slot.clone(), n, bar)).collect::<Vec<_>>()
            })
            .collect();
        // From large to small there are no gaps.
        bars.sort_by_key(|(at, _, n, bar)| (std::cmp::Reverse(bar.size()), *at, *n));
        let Windows { mut io, mut low, mut high } = self.windows.clone();
        for (at, slot, n, bar) in bars {
            let start = match bar {
                Bar::Io(_) => take(&mut io, bar.size()),
                Bar::Memory32(_) => take(&mut low, bar.size()),
                Bar::Memory64(_) if bar.size() <= SMALL => {
                    take(&mut low, bar.size()).or_else(|| take(&mut high, bar.size()))
                }
                Bar::Memory64(_) => take(&mut high, bar.size()),
            };
            let start = start.ok_or_else(|| Full(format!("{} bytes of {at:?}", bar.size())))?;
            slot.function.config().place(n, bar, start);
        }
        for (at, slot) in self.slots() {
            let config = slot.function.config();
            config.enable(command::IO | command::MEMORY);
            let [pin] = config.get(reg::INTERRUPT_PIN);
            if pin != 0 {
                config.set(reg::INTERRUPT_LINE, &[super::PIRQ_GSI + at.pirq(pin - 1)]);
            }
            self.map(&slot);
        }
        Ok(())
    }

    /// Where the memory-mapped configuration space is, if firmware has not turned it off.
    pub fn ecam(&self) -> Option<u64> {
        *lock(&self.ecam)
    }

    /// Where functions' memory is now.
    pub fn memory_bars(&self) -> Vec<Range<u64>> {
        let slots = self.slots();
        let bars = slots.iter().flat_map(|(_, slot)| {
            let config = slot.function.config();
            let memory = config.bars().filter(|(_, bar)| !matches!(bar, Bar::Io(_)));
            memory.filter_map(|(n, bar)| {
                config.placed(n, bar).map(|start| start..start.saturating_add(bar.size()))
            })
        });
        bars.collect()
    }

    /// The configuration spaces, and with them where the BARs are.
    pub fn state(&self) -> Saved<HostState> {
        let functions = self.slots().into_iter().map(|(at, slot)| (at, slot.function.config().state()));
        Saved::V1(HostState { address: *lock(&self.address), functions: functions.collect() })
    }

    /// Goes on from `state`, whose functions are to be plugged in already.
    pub fn set_state(&self, state: &Saved<HostState>) {
        let Saved::V1(state) = state;
        *lock(&self.address) = state.address;
        for (at, config) in &state.functions {
            if let Some(slot) = self.slot(*at) {
                slot.function.config().set_state(config);
                self.map(&slot);
                // Bridges map what their registers say.
                for offset in (SCRATCH.start..SCRATCH.end).step_by(4) {
                    slot.function.config_written(offset as u8);
                }
            }
        }
    }

    fn connect(&self, at: Address, function: Arc<dyn Function>) {
        let [pin] = function.config().get(reg::INTERRUPT_PIN);
        let line = match pin {
            0 => Line::unconnected(),
            pin => (self.lines)(at.pirq(pin - 1)),
        };
        function.config().connect(line, self.routes.clone());
        let slot = Arc::new(Slot { function, mapped: Mutex::new(Some([None; 6])) });
        self.slots.write().unwrap_or_else(|e| e.into_inner()).insert(at, slot);
    }

    fn slot(&self, at: Address) -> Option<Arc<Slot>> {
        self.slots.read().unwrap_or_else(|e| e.into_inner()).get(&at).cloned()
    }

    fn slots(&self) -> Vec<(Address, Arc<Slot>)> {
        let slots = self.slots.read().unwrap_or_else(|e| e.into_inner());
        slots.iter().map(|(at, slot)| (*at, slot.clone())).collect()
    }

    /// Moves a function's BARs on the buses to where they are to be.
    fn map(&self, slot: &Slot) {
        let Some(machine) = self.machine.upgrade() else { return };
        let config = slot.function.config();
        let mut mapped = lock(&slot.mapped);
        let Some(mapped) = mapped.as_mut() else { return };
        let moved: Vec<_> = config
            .bars()
            .map(|(n, bar)| (n, bar, config.placed(n, bar)))
            .filter(|&(n, _, to)| mapped[n] != to)
            .collect();
        for &(n, bar, _) in &moved {
            if let Some(start) = mapped[n].take() {
                // Memory goes first and comes last, so that somebody answers meanwhile.
                if let Some(memory) = slot.function.bar_memory(n) {
                    memory.show(None);
                }
                bus(&machine, bar).remove(start);
            }
        }
        for (n, bar, to) in moved {
            let Some(start) = to else { continue };
            let registers = Arc::new(BarRegisters { function: slot.function.clone(), bar: n });
            // What a guest lays over something else is not to be reached, until it moves it.
            if bus(&machine, bar).insert(start, bar.size(), "PCI BAR", registers).is_ok() {
                mapped[n] = Some(start);
                if let Some(memory) = slot.function.bar_memory(n) {
                    memory.show(Some((start, memory::Kind::Ram)));
                }
            }
        }
    }

    fn map_ecam(&self, config: &Config) {
        let Some(machine) = self.machine.upgrade() else { return };
        let value = u64::from_le_bytes(config.get(PCIEXBAR));
        // Lengths: 256, 128 or 64 buses.
        let len = ECAM.len >> (value >> 1 & 3).min(2);
        let to = (value & 1 != 0).then_some(value & !(len - 1) & 0xf_ffff_ffff).filter(|&start| start != 0);
        let mut ecam = lock(&self.ecam);
        if let Some(start) = ecam.take() {
            machine.mmio.remove(start);
        }
        if let (Some(start), Some(host)) = (to, self.this.upgrade())
            && machine.mmio.insert(start, len, "PCI configuration", Arc::new(Ecam(host))).is_ok()
        {
            *ecam = Some(start);
        }
    }

    /// Reads configuration space: bus, device and function in `bdf` as in 0xcf8's bits 8–23.
    fn read_config(&self, bdf: u64, offset: u64, size: u8) -> u64 {
        match self.target(bdf).filter(|_| offset < 256) {
            Some(slot) => {
                slot.function.config_read(offset as u8);
                slot.function.config().read(offset, size)
            }
            None => u64::MAX,
        }
    }

    fn write_config(&self, bdf: u64, offset: u64, size: u8, value: u64) {
        if let Some(slot) = self.target(bdf).filter(|_| offset < 256) {
            slot.function.config().write(offset, size, value);
            self.map(&slot);
            slot.function.config_written(offset as u8);
        }
    }

    fn target(&self, bdf: u64) -> Option<Arc<Slot>> {
        let at = Address { device: (bdf >> 3) as u8 & 0x1f, function: bdf as u8 & 7 };
        (bdf >> 8 == 0).then(|| self.slot(at)).flatten()
    }
}

/// The bus that a BAR's registers are on.
fn bus(machine: &Machine, bar: Bar) -> &Bus {
    if matches!(bar, Bar::Io(_)) { &machine.ports } else { &machine.mmio }
}

/// Takes `size` aligned bytes from the start of a window.
fn take(window: &mut Range<u64>, size: u64) -> Option<u64> {
    let start = window.start.checked_next_multiple_of(size)?;
    let end = start.checked_add(size).filter(|&end| end <= window.end)?;
    window.start = end;
    Some(start)
}

/// The configuration ports.
impl Registers for Host {
    fn read(&self, offset: u64, size: u8) -> u64 {
        match (offset, size) {
            (0, 4) => (*lock(&self.address)).into(),
            (1, 1) => self.control.read(0, 1),
            (4..8, 1..=4) => {
                let address = u64::from(*lock(&self.address));
                if address >> 31 == 0 {
                    return u64::MAX;
                }
                self.read_config(address >> 8 & 0xffff, address & 0xfc | offset & 3, size)
            }
            _ => u64::MAX,
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        match (offset, size) {
            (0, 4) => *lock(&self.address) = value as u32 & 0x80ff_fffc,
            (1, 1) => self.control.write(0, 1, value),
            (4..8, 1..=4) => {
                let address = u64::from(*lock(&self.address));
                if address >> 31 != 0 {
                    self.write_config(address >> 8 & 0xffff, address & 0xfc | offset & 3, size, value);
                }
            }
            _ => {}
        }
    }
}

/// The memory-mapped configuration space.
struct Ecam(Arc<Host>);

impl Registers for Ecam {
    fn read(&self, offset: u64, size: u8) -> u64 {
        self.0.read_config(offset >> 12, offset & 0xfff, size)
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        self.0.write_config(offset >> 12, offset & 0xfff, size, value);
    }
}

struct BarRegisters {
    function: Arc<dyn Function>,
    bar: usize,
}

impl Registers for BarRegisters {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let config = self.function.config();
        if config.is_msix_bar(self.bar) {
            return config.read_msix(offset, size);
        }
        self.function.read_bar(self.bar, offset, size)
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let config = self.function.config();
        if config.is_msix_bar(self.bar) {
            return config.write_msix(offset, size, value);
        }
        self.function.write_bar(self.bar, offset, size, value);
    }

    fn doorbells(&self) -> Vec<(u64, Arc<EventFd>)> {
        self.function.doorbells(self.bar)
    }
}
