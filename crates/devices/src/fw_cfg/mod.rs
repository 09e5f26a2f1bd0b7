//! What firmware, and kernels' drivers, learn of the machine: QEMU's fw_cfg device (its specification is
//! `docs/specs/fw_cfg.rst` there), by ports and by DMA.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use machine::{Memory, Registers};
use memory::{Gpa, Kind};
use serde::{Deserialize, Serialize};

use crate::{At, Saved, lock, read_bytes};

#[cfg(test)]
mod tests;

/// Selector, data, and at +4 the DMA address.
pub const FW_CFG: At = At::new(0x510, 12);

/// Keys that are no files.
pub mod key {
    /// "QEMU".
    pub const SIGNATURE: u16 = 0;
    /// What the device can do.
    pub const ID: u16 = 1;
    /// The machine's UUID, 16 bytes.
    pub const UUID: u16 = 2;
    /// Bytes of RAM, u64.
    pub const RAM_SIZE: u16 = 3;
    /// No display, u16.
    pub const NOGRAPHIC: u16 = 4;
    /// Processors at start, u16.
    pub const NB_CPUS: u16 = 5;
    /// A boot menu is wanted, u16.
    pub const BOOT_MENU: u16 = 0xe;
    /// IRQ 0 is GSI 2, u32: the PC's own.
    pub const IRQ0_OVERRIDE: u16 = 0x8002;
    /// Greatest APIC id and one, u16.
    pub const MAX_CPUS: u16 = 0xf;
    /// The list of files.
    pub const FILE_DIR: u16 = 0x19;
    /// The first file.
    pub const FILE_FIRST: u16 = 0x20;
}

/// Ports and DMA.
const FEATURES: u32 = 3;
/// What the DMA address register reads as: "QEMU CFG".
const DMA_SIGNATURE: u64 = u64::from_be_bytes(*b"QEMU CFG");
const NAME: usize = 55;
const FILES: usize = 0x3fe0;
const CHUNK: usize = 4096;

mod dma {
    pub const ERROR: u32 = 1;
    pub const READ: u32 = 2;
    pub const SKIP: u32 = 4;
    pub const SELECT: u32 = 8;
    pub const WRITE: u32 = 16;
}

/// A file cannot be added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Its name is empty, too long or taken.
    #[error("fw_cfg file name {0:?} is empty, longer than 55 bytes or taken; choose another")]
    Name(String),
    /// No more.
    #[error("fw_cfg holds no more files")]
    Full,
}

/// What a file holds at the moment.
type Make = Arc<dyn Fn() -> Vec<u8> + Send + Sync>;

#[derive(Clone, Default)]
struct Item {
    bytes: Vec<u8>,
    writable: bool,
    make: Option<Make>,
}

#[derive(Default)]
struct Inner {
    keys: BTreeMap<u16, Item>,
    /// By name, and so in the directory. Keys are given in this order.
    files: Vec<(String, Item)>,
    state: State,
}

/// The device's registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The selected key.
    pub key: u16,
    /// The next byte of it.
    pub offset: u64,
    /// The high half of the DMA address.
    pub dma_high: u32,
    /// Files that the guest may write, with their contents.
    pub written: BTreeMap<String, Vec<u8>>,
}

/// The fw_cfg device.
pub struct FwCfg {
    inner: Mutex<Inner>,
    memory: Memory,
}

impl fmt::Debug for FwCfg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(lock(&self.inner).files.iter().map(|(name, _)| name)).finish()
    }
}

impl FwCfg {
    /// A device without files, that accesses `memory` by DMA.
    pub fn new(memory: Memory) -> Arc<Self> {
        let this = Self { inner: Mutex::default(), memory };
        this.set(key::SIGNATURE, b"QEMU");
        this.set(key::ID, &FEATURES.to_le_bytes());
        this.rebuild(&mut lock(&this.inner));
        Arc::new(this)
    }

    /// Sets what `key` (below [`key::FILE_FIRST`], or with bit 15 set for what is the architecture's own) holds. Numbers are
    /// little-endian.
    pub fn set(&self, key: u16, bytes: &[u8]) {
        lock(&self.inner).keys.insert(key, Item { bytes: bytes.to_vec(), ..Item::default() });
    }

    /// Adds a file. To be done before the guest runs, for keys go by the order of names.
    ///
    /// # Errors
    /// The name is no good.
    pub fn add_file(&self, name: &str, bytes: Vec<u8>) -> Result<(), Error> {
        self.add(name, Item { bytes, ..Item::default() })
    }

    /// Adds a file that `make` makes anew whenever the guest selects it: it tells of what firmware has done up to then. Its
    /// size remains what it is now; what is shorter later has zeros after it.
    ///
    /// # Errors
    /// The name is no good.
    pub fn add_made_file(
        &self,
        name: &str,
        make: impl Fn() -> Vec<u8> + Send + Sync + 'static,
    ) -> Result<(), Error> {
        self.add(name, Item { bytes: make(), make: Some(Arc::new(make)), writable: false })
    }

    /// Adds a file that the guest may write, by DMA, within its size.
    ///
    /// # Errors
    /// The name is no good.
    pub fn add_writable_file(&self, name: &str, bytes: Vec<u8>) -> Result<(), Error> {
        self.add(name, Item { bytes, writable: true, make: None })
    }

    /// What a file holds now.
    pub fn file(&self, name: &str) -> Option<Vec<u8>> {
        lock(&self.inner).files.iter().find(|(n, _)| n == name).map(|(_, item)| item.bytes.clone())
    }

    /// The registers.
    pub fn state(&self) -> Saved<State> {
        let inner = lock(&self.inner);
        let written = inner.files.iter().filter(|(_, item)| item.writable);
        let written = written.map(|(name, item)| (name.clone(), item.bytes.clone())).collect();
        Saved::V1(State { written, ..inner.state.clone() })
    }

    /// Goes on from `state`, with the same files as then.
    pub fn set_state(&self, state: &Saved<State>) {
        let Saved::V1(state) = state;
        let mut inner = lock(&self.inner);
        for (name, item) in inner.files.iter_mut().filter(|(_, item)| item.writable) {
            if let Some(bytes) = state.written.get(name) {
                item.bytes.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            }
        }
        inner.state = State { written: BTreeMap::new(), ..state.clone() };
    }

    fn add(&self, name: &str, item: Item) -> Result<(), Error> {
        let mut inner = lock(&self.inner);
        if inner.files.len() >= FILES {
            return Err(Error::Full);
        }
        match inner.files.binary_search_by(|(n, _)| n.as_str().cmp(name)) {
            Err(at) if !name.is_empty() && name.len() <= NAME && !name.contains('\0') => {
                inner.files.insert(at, (name.into(), item));
            }
            _ => return Err(Error::Name(name.into())),
        }
        self.rebuild(&mut inner);
        Ok(())
    }

    /// Writes the directory.
    fn rebuild(&self, inner: &mut Inner) {
        let mut bytes = (inner.files.len() as u32).to_be_bytes().to_vec();
        for (i, (name, item)) in inner.files.iter().enumerate() {
            bytes.extend((item.bytes.len() as u32).to_be_bytes());
            bytes.extend((key::FILE_FIRST + i as u16).to_be_bytes());
            bytes.extend([0; 2]);
            let end = bytes.len() + NAME + 1;
            bytes.extend(name.as_bytes());
            bytes.resize(end, 0);
        }
        inner.keys.insert(key::FILE_DIR, Item { bytes, ..Item::default() });
    }

    /// Does what the descriptor at `at` says, and writes there how it went.
    fn dma(&self, inner: &mut Inner, at: Gpa) {
        let mut descriptor = [0; 16];
        if !self.copy_out(at, &mut descriptor) {
            return;
        }
        let [control, len, high, low] = [0, 4, 8, 12].map(|i| {
            u32::from_be_bytes([descriptor[i], descriptor[i + 1], descriptor[i + 2], descriptor[i + 3]])
        });
        if control & dma::SELECT != 0 {
            inner.select((control >> 16) as u16);
        }
        let address = u64::from(high) << 32 | u64::from(low);
        let done = match control & (dma::READ | dma::WRITE | dma::SKIP) {
            c if c & dma::READ != 0 => self.dma_read(inner, address, len),
            c if c & dma::WRITE != 0 => self.dma_write(inner, address, len),
            c if c & dma::SKIP != 0 => {
                inner.state.offset = inner.state.offset.saturating_add(len.into());
                true
            }
            _ => true,
        };
        self.copy_in(at, &if done { 0 } else { dma::ERROR }.to_be_bytes());
    }

    /// Copies the item's bytes to the guest, and zeros past its end.
    fn dma_read(&self, inner: &mut Inner, mut address: Gpa, len: u32) -> bool {
        let mut left = len as usize;
        let mut chunk = [0; CHUNK];
        while left > 0 {
            let n = left.min(CHUNK);
            chunk[..n].iter_mut().for_each(|byte| *byte = inner.next());
            if !self.copy_in(address, &chunk[..n]) {
                return false;
            }
            left -= n;
            address = address.wrapping_add(n as u64);
        }
        true
    }

    fn dma_write(&self, inner: &mut Inner, address: Gpa, len: u32) -> bool {
        let offset = inner.state.offset;
        let Some(item) = inner.item_mut().filter(|item| item.writable) else { return false };
        let range = usize::try_from(offset).ok().and_then(|from| Some(from..from.checked_add(len as usize)?));
        let Some(to) = range.and_then(|range| item.bytes.get_mut(range)) else { return false };
        // All or nothing.
        let mut bytes = vec![0; to.len()];
        if !self.copy_out(address, &mut bytes) {
            return false;
        }
        to.copy_from_slice(&bytes);
        inner.state.offset += u64::from(len);
        true
    }

    /// The pieces of RAM (or ROM, to read) that `len` bytes at `gpa` are in, as offset and length; `None` if some are in none.
    fn pieces(&self, mut gpa: Gpa, len: usize, write: bool) -> Option<Vec<(u64, usize)>> {
        let mut left = len as u64;
        let mut out = vec![];
        while left > 0 {
            let region = self.memory.region(gpa).filter(|r| !write || r.kind == Kind::Ram)?;
            let within = gpa - region.gpa;
            let n = left.min(region.size - within);
            out.push((region.offset + within, n as usize));
            left -= n;
            gpa = gpa.checked_add(n)?;
        }
        Some(out)
    }

    fn copy_out(&self, gpa: Gpa, mut to: &mut [u8]) -> bool {
        let Some(pieces) = self.pieces(gpa, to.len(), false) else { return false };
        for (offset, n) in pieces {
            let (now, later) = to.split_at_mut(n);
            self.memory.read(offset, now);
            to = later;
        }
        true
    }

    fn copy_in(&self, gpa: Gpa, mut from: &[u8]) -> bool {
        let Some(pieces) = self.pieces(gpa, from.len(), true) else { return false };
        for (offset, n) in pieces {
            let (now, later) = from.split_at(n);
            self.memory.write(offset, now);
            from = later;
        }
        true
    }
}

impl Inner {
    fn select(&mut self, key: u16) {
        self.state.key = key;
        self.state.offset = 0;
        if let Some(item) = self.item_mut()
            && let Some(make) = &item.make
        {
            let size = item.bytes.len();
            item.bytes = make();
            item.bytes.resize(size, 0);
        }
    }

    fn item_mut(&mut self) -> Option<&mut Item> {
        let key = self.state.key;
        if let Some(item) = self.keys.get_mut(&key) {
            return Some(item);
        }
        self.files.get_mut(usize::from(key.checked_sub(key::FILE_FIRST)?)).map(|(_, item)| item)
    }

    /// The next byte of the item, 0 past its end.
    fn next(&mut self) -> u8 {
        let offset = self.state.offset;
        let byte = self.item_mut().and_then(|item| item.bytes.get(usize::try_from(offset).ok()?).copied());
        self.state.offset = offset.saturating_add(1);
        byte.unwrap_or(0)
    }
}

impl Registers for FwCfg {
    fn read(&self, offset: u64, size: u8) -> u64 {
        match offset {
            1 => {
                let mut inner = lock(&self.inner);
                read_bytes(0, size, |_| inner.next())
            }
            4.. => read_bytes(offset - 4, size, |at| {
                DMA_SIGNATURE.to_be_bytes().get(at as usize).copied().unwrap_or(0)
            }),
            _ => 0,
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let mut inner = lock(&self.inner);
        match (offset, size) {
            (0, 2) => inner.select(value as u16),
            (4, 4) => inner.state.dma_high = (value as u32).swap_bytes(),
            (8, 4) => {
                let high = std::mem::take(&mut inner.state.dma_high);
                self.dma(&mut inner, u64::from(high) << 32 | u64::from((value as u32).swap_bytes()));
            }
            (4, 8) => self.dma(&mut inner, value.swap_bytes()),
            // The data port was for writing once; it is ignored now.
            _ => {}
        }
    }
}
