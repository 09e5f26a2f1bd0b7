//! The configuration space of a function: header, BARs, capabilities, interrupts.

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock};

use machine::irq::{Line, Msi, Route};
use serde::{Deserialize, Serialize};

use super::msi::Table;
use crate::lock;

/// Offsets in the header.
pub(super) mod reg {
    pub const COMMAND: usize = 4;
    pub const STATUS: usize = 6;
    pub const CLASS: usize = 8;
    pub const CACHE_LINE: usize = 0xc;
    pub const HEADER_TYPE: usize = 0xe;
    pub const BARS: usize = 0x10;
    pub const SUBSYSTEM: usize = 0x2c;
    pub const CAPABILITIES: usize = 0x34;
    pub const INTERRUPT_LINE: usize = 0x3c;
    pub const INTERRUPT_PIN: usize = 0x3d;
}
pub(super) mod command {
    pub const IO: u16 = 1;
    pub const MEMORY: u16 = 2;
    pub const BUS_MASTER: u16 = 4;
    pub const INTX_OFF: u16 = 0x400;
    /// I/O, memory, bus master, parity, SERR, INTx off.
    pub const ALL: u16 = 0x547;
}
const STATUS_INTX: u8 = 8;
const STATUS_CAPABILITIES: u8 = 0x10;
const FIRST_CAPABILITY: usize = 0x40;
const CAP_MSI: u8 = 5;
const CAP_MSIX: u8 = 0x11;
const MSI_ENABLE: u16 = 1;
const MSIX_ENABLE: u16 = 0x8000;
const MSIX_MASK: u16 = 0x4000;

/// What a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface: 24 bits.
    pub class: u32,
    /// Subsystem vendor and device.
    pub subsystem: (u16, u16),
}

/// A range of addresses that the function wants. Sizes are rounded up to a power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bar {
    /// Ports.
    Io(u32),
    /// Memory below 4 GiB.
    Memory32(u32),
    /// Memory anywhere.
    Memory64(u64),
}

impl Bar {
    /// Bytes.
    pub fn size(self) -> u64 {
        match self {
            Self::Io(n) => u64::from(n.clamp(4, 256)).next_power_of_two(),
            Self::Memory32(n) => u64::from(n.clamp(4096, 1 << 30)).next_power_of_two(),
            Self::Memory64(n) => n.clamp(4096, 1 << 40).next_power_of_two(),
        }
    }

    fn flags(self) -> u32 {
        match self {
            Self::Io(_) => 1,
            Self::Memory32(_) => 0,
            Self::Memory64(_) => 4,
        }
    }
}

/// The part of a function's configuration that changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    bytes: Vec<u8>,
    table: Table,
    intx: bool,
}

/// Makes ways for messages.
pub(crate) type Routes = Arc<dyn Fn() -> Box<dyn Route> + Send + Sync>;

/// Where a function's interrupts go.
struct Wires {
    line: Line,
    routes: Routes,
    /// Those that were needed, by vector; MSI has the first.
    made: Vec<OnceLock<Box<dyn Route>>>,
}

impl Wires {
    fn send(&self, vector: u16, message: Msi) {
        if let Some(made) = self.made.get(usize::from(vector)) {
            made.get_or_init(&*self.routes).send(message);
        }
    }
}

/// The configuration space of a function. It is filled when the device is made, then belongs to the guest.
pub struct Config {
    state: Mutex<ConfigState>,
    writable: Vec<u8>,
    bars: [Option<Bar>; 6],
    /// First free byte for a capability, and where the last one's link is.
    free: (usize, usize),
    msi: Option<usize>,
    /// The MSI-X capability and its BAR.
    msix: Option<(usize, usize)>,
    wires: OnceLock<Wires>,
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config").field("bars", &self.bars).finish_non_exhaustive()
    }
}

impl Config {
    /// The space of an `id` without BARs, capabilities or interrupts.
    pub fn new(id: Id) -> Self {
        let state = ConfigState { bytes: vec![0; 256], table: Table::default(), intx: false };
        let mut this = Self {
            state: Mutex::new(state),
            writable: vec![0; 256],
            bars: [None; 6],
            free: (FIRST_CAPABILITY, reg::CAPABILITIES),
            msi: None,
            msix: None,
            wires: OnceLock::new(),
        };
        this.put(0, &id.vendor.to_le_bytes());
        this.put(2, &id.device.to_le_bytes());
        this.put(reg::CLASS, &(id.class << 8 | u32::from(id.revision)).to_le_bytes());
        this.put(reg::SUBSYSTEM, &id.subsystem.0.to_le_bytes());
        this.put(reg::SUBSYSTEM + 2, &id.subsystem.1.to_le_bytes());
        this.allow(reg::COMMAND, &command::ALL.to_le_bytes());
        this.allow(reg::CACHE_LINE, &[0xff; 2]);
        this.allow(reg::INTERRUPT_LINE, &[0xff]);
        this
    }

    fn bytes(&mut self) -> &mut Vec<u8> {
        &mut self.state.get_mut().unwrap_or_else(|e| e.into_inner()).bytes
    }

    /// Sets bytes at `offset`, before the function is plugged in.
    pub fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes()[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Lets the guest write the bits of `mask` at `offset`.
    pub fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Says that there are more functions at this device.
    pub fn multifunction(&mut self) {
        self.bytes()[reg::HEADER_TYPE] |= 0x80;
    }

    /// Says that the function uses pin INTA#.
    pub fn use_intx(&mut self) {
        self.bytes()[reg::INTERRUPT_PIN] = 1;
    }

    /// Adds a BAR and returns its number.
    ///
    /// # Panics
    /// There are six at most, and one in 64 bits counts twice.
    pub fn add_bar(&mut self, bar: Bar) -> usize {
        let wide = |b: &Option<Bar>| matches!(b, Some(Bar::Memory64(_)));
        let n = self.bars.iter().rposition(Option::is_some);
        let n = n.map_or(0, |n| n + if wide(&self.bars[n]) { 2 } else { 1 });
        self.add_bar_at(n, bar);
        n
    }

    /// Adds BAR number `n`, for devices whose drivers know where their registers are.
    ///
    /// # Panics
    /// There are six at most, and one in 64 bits counts twice.
    pub fn add_bar_at(&mut self, n: usize, bar: Bar) {
        let width = if matches!(bar, Bar::Memory64(_)) { 2 } else { 1 };
        assert!(n + width <= 6, "a function has six BARs");
        self.bars[n] = Some(bar);
        let at = reg::BARS + 4 * n;
        self.put(at, &bar.flags().to_le_bytes());
        let mask = !(bar.size() - 1);
        self.allow(at, &mask.to_le_bytes()[..4 * width]);
    }

    /// Adds a capability: `id`, the link, then `body`. Returns its offset.
    ///
    /// # Panics
    /// The space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let (at, link) = self.free;
        let end = (at + 2 + body.len()).next_multiple_of(4);
        assert!(end <= 256, "capabilities fit in 256 bytes");
        self.put(link, &[at as u8]);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.bytes()[reg::STATUS] |= STATUS_CAPABILITIES;
        self.free = (end, at + 1);
        at
    }

    /// Adds MSI, with one message.
    pub fn add_msi(&mut self) {
        let at = self.add_capability(CAP_MSI, &[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        self.allow(at + 2, &[1, 0, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        self.msi = Some(at);
    }

    /// Adds MSI-X with `vectors` vectors (1 to 2048) and a BAR for its table. Returns the BAR's number.
    pub fn add_msix(&mut self, vectors: u16) -> usize {
        let vectors = vectors.clamp(1, 2048);
        let table = Table::new(vectors);
        let pending = table.pending_at() as u32;
        let bar = self.add_bar(Bar::Memory32(2 * pending));
        let mut body = (vectors - 1).to_le_bytes().to_vec();
        body.extend((bar as u32).to_le_bytes());
        body.extend((pending | bar as u32).to_le_bytes());
        let at = self.add_capability(CAP_MSIX, &body);
        self.allow(at + 2, &(MSIX_ENABLE | MSIX_MASK).to_le_bytes());
        self.state.get_mut().unwrap_or_else(|e| e.into_inner()).table = table;
        self.msix = Some((at, bar));
        bar
    }

    /// Whether the guest lets the function access memory.
    pub fn bus_master(&self) -> bool {
        lock(&self.state).command() & command::BUS_MASTER != 0
    }

    /// Whether MSI-X is in use, so that INTA# is not.
    pub fn msix_enabled(&self) -> bool {
        self.msix_control(&lock(&self.state)) & MSIX_ENABLE != 0
    }

    /// Sends interrupt `vector` by MSI-X or, if that is off, the one message of MSI. Nothing if the guest uses neither.
    pub fn notify(&self, vector: u16) {
        let Some(wires) = self.wires.get() else { return };
        let mut state = lock(&self.state);
        let control = self.msix_control(&state);
        let master = state.command() & command::BUS_MASTER != 0;
        if control & MSIX_ENABLE != 0 {
            if let Some(message) = state.table.raise(vector, control & MSIX_MASK != 0 || !master) {
                wires.send(vector, message);
            }
        } else if let Some(at) = self.msi.filter(|&at| master && state.word(at + 2) & MSI_ENABLE != 0) {
            let address = u64::from(state.dword(at + 8)) << 32 | u64::from(state.dword(at + 4));
            wires.send(0, Msi { address, data: state.word(at + 12).into() });
        }
    }

    /// Sets the level of INTA#. It reaches the guest unless the guest uses messages or turned the pin off.
    pub fn set_intx(&self, level: bool) {
        let mut state = lock(&self.state);
        state.intx = level;
        self.settle(&mut state);
    }

    /// Reads `N` bytes at `offset`, for the device itself.
    pub fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        let state = lock(&self.state);
        std::array::from_fn(|i| state.bytes.get(offset + i).copied().unwrap_or(0))
    }

    /// Sets bytes at `offset`, from the device itself.
    pub fn set(&self, offset: usize, bytes: &[u8]) {
        let mut state = lock(&self.state);
        state.bytes.iter_mut().skip(offset).zip(bytes).for_each(|(to, from)| *to = *from);
    }

    pub(super) fn state(&self) -> ConfigState {
        lock(&self.state).clone()
    }

    pub(super) fn set_state(&self, from: &ConfigState) {
        let mut state = lock(&self.state);
        for ((to, from), mask) in state.bytes.iter_mut().zip(&from.bytes).zip(&self.writable) {
            *to = *to & !mask | from & mask;
        }
        state.table = from.table.clone().like(&state.table);
        state.intx = from.intx;
        self.settle(&mut state);
    }

    pub(crate) fn connect(&self, line: Line, routes: Routes) {
        let vectors = lock(&self.state).table.vectors().max(1);
        let made = (0..vectors).map(|_| OnceLock::new()).collect();
        // Only the first plug counts.
        let _ = self.wires.set(Wires { line, routes, made });
    }

    pub(super) fn bars(&self) -> impl Iterator<Item = (usize, Bar)> + '_ {
        self.bars.iter().enumerate().filter_map(|(i, bar)| bar.map(|bar| (i, bar)))
    }

    pub(super) fn is_msix_bar(&self, bar: usize) -> bool {
        self.msix.is_some_and(|(_, b)| b == bar)
    }

    /// Where a BAR's registers are now, if the command register enables them.
    pub(super) fn placed(&self, n: usize, bar: Bar) -> Option<u64> {
        let state = lock(&self.state);
        let low = state.dword(reg::BARS + 4 * n);
        let enabled = |bit| state.command() & bit != 0;
        let (on, start) = match bar {
            Bar::Io(_) => (enabled(command::IO), u64::from(low & 0xfffc)),
            Bar::Memory32(_) => (enabled(command::MEMORY), u64::from(low & !0xf)),
            Bar::Memory64(_) => {
                let high = u64::from(state.dword(reg::BARS + 4 * n + 4));
                (enabled(command::MEMORY), high << 32 | u64::from(low & !0xf))
            }
        };
        (on && start != 0).then_some(start)
    }

    /// Puts a BAR somewhere, as firmware does.
    pub(super) fn place(&self, n: usize, bar: Bar, start: u64) {
        let width = if matches!(bar, Bar::Memory64(_)) { 8 } else { 4 };
        self.set(reg::BARS + 4 * n, &(start | u64::from(bar.flags())).to_le_bytes()[..width]);
    }

    pub(super) fn enable(&self, bits: u16) {
        let mut state = lock(&self.state);
        let value = state.command() | bits;
        state.bytes[reg::COMMAND..reg::COMMAND + 2].copy_from_slice(&value.to_le_bytes());
    }

    pub(super) fn read(&self, offset: u64, size: u8) -> u64 {
        let state = lock(&self.state);
        crate::read_bytes(offset, size, |offset| state.bytes.get(offset as usize).copied().unwrap_or(0xff))
    }

    pub(super) fn write(&self, offset: u64, size: u8, value: u64) {
        let mut state = lock(&self.state);
        crate::write_bytes(offset, size, value, |offset, value| {
            let at = offset as usize;
            if let (Some(byte), Some(mask)) = (state.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | value & mask;
            }
        });
        self.settle(&mut state);
    }

    pub(super) fn read_msix(&self, offset: u64, size: u8) -> u64 {
        let mut state = lock(&self.state);
        crate::read_bytes(offset, size, |offset| state.table.read(offset))
    }

    pub(super) fn write_msix(&self, offset: u64, size: u8, value: u64) {
        let mut state = lock(&self.state);
        crate::write_bytes(offset, size, value, |offset, value| state.table.write(offset, value));
        self.settle(&mut state);
    }

    fn msix_control(&self, state: &ConfigState) -> u16 {
        self.msix.map_or(0, |(at, _)| state.word(at + 2))
    }

    /// After a change: messages that waited for it, and the pin.
    fn settle(&self, state: &mut ConfigState) {
        let control = self.msix_control(state);
        let msi = self.msi.is_some_and(|at| state.word(at + 2) & MSI_ENABLE != 0);
        let intx = state.intx && !msi && control & MSIX_ENABLE == 0;
        state.bytes[reg::STATUS] =
            state.bytes[reg::STATUS] & !STATUS_INTX | if state.intx { STATUS_INTX } else { 0 };
        let Some(wires) = self.wires.get() else { return };
        wires.line.set(intx && state.command() & command::INTX_OFF == 0);
        if control & (MSIX_ENABLE | MSIX_MASK) == MSIX_ENABLE && state.command() & command::BUS_MASTER != 0 {
            let pending = state.table.take_pending();
            pending.into_iter().for_each(|(vector, message)| wires.send(vector, message));
        }
    }
}

impl ConfigState {
    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn dword(&self, at: usize) -> u32 {
        u32::from(self.word(at + 2)) << 16 | u32::from(self.word(at))
    }

    fn command(&self) -> u16 {
        self.word(reg::COMMAND)
    }
}
