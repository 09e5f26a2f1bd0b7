//! Hot-plug of devices on bus 0, by ACPI (ACPI 6.5, 6.3): registers that tell the guest's ACPI interpreter which devices came
//! and which are asked to go, and by which it gives them up. The methods that use them are in the ACPI tables; the registers are
//! those of QEMU's machines (`docs/specs/acpi_pci_hotplug` there).
//!
//! The guest need not listen: what is plugged in is on the bus at once, and a system that starts later finds it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use machine::Registers;
use serde::{Deserialize, Serialize};

use super::{Address, Full, Function, HOTPLUG_GPE, Host};
use crate::{Saved, lock, pm};

/// Registers, of a bit for each device and 32 bits: devices that came, which a read forgets; devices that are to go; those that
/// the guest gives up, to be written.
const UP: u64 = 0;
const DOWN: u64 = 4;
const EJECT: u64 = 8;

/// What the guest has not taken note of yet, a bit for each device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HotPlugState {
    /// Came.
    pub up: u32,
    /// Are to go.
    pub down: u32,
}

#[derive(Default)]
struct State {
    registers: HotPlugState,
    /// Devices that may go.
    removable: u32,
    /// What the guest has given up; it ends when the host takes it.
    ejected: BTreeMap<u8, Vec<Arc<dyn Function>>>,
}

/// The registers, and who plugs.
pub struct HotPlug {
    host: Weak<Host>,
    pm: Arc<pm::Pm>,
    state: Mutex<State>,
    changed: Condvar,
}

impl fmt::Debug for HotPlug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HotPlug").field(&lock(&self.state).registers).finish()
    }
}

impl HotPlug {
    /// Registers for [`super::HOTPLUG`] that plug into `host`, and raise [`HOTPLUG_GPE`] of `pm`.
    pub fn new(host: &Arc<Host>, pm: Arc<pm::Pm>) -> Arc<Self> {
        Arc::new(Self { host: Arc::downgrade(host), pm, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Plugs a device in while the machine is put together, at `at` or where there is room. It may go later.
    ///
    /// # Errors
    /// There is no room.
    pub fn plug(&self, at: Option<Address>, function: Arc<dyn Function>) -> Result<Address, Full> {
        let mut state = lock(&self.state);
        self.connect(&mut state, at, function)
    }

    /// Plugs a device in while the guest runs, and tells the guest.
    ///
    /// # Errors
    /// There is no room.
    pub fn insert(&self, function: Arc<dyn Function>) -> Result<Address, Full> {
        let mut state = lock(&self.state);
        let at = self.connect(&mut state, None, function)?;
        let bit = 1 << at.device();
        state.registers.up |= bit;
        state.registers.down &= !bit;
        drop(state);
        self.pm.raise_gpe(HOTPLUG_GPE);
        Ok(at)
    }

    /// Waits until the guest has taken note of the device at `at`. False if it has not.
    pub fn wait_noticed(&self, at: Address, patience: Duration) -> bool {
        self.wait(patience, |state| state.registers.up >> at.device() & 1 == 0)
    }

    /// Whether the guest's system takes part.
    pub fn has_listener(&self) -> bool {
        self.pm.hears_gpe(HOTPLUG_GPE)
    }

    /// Asks the guest to give up the device at `at`.
    pub fn ask(&self, at: Address) {
        let mut state = lock(&self.state);
        state.registers.down |= 1 << at.device() & state.removable;
        drop(state);
        self.pm.raise_gpe(HOTPLUG_GPE);
    }

    /// Waits until the guest has given it up. False if it has not.
    pub fn wait_ejected(&self, at: Address, patience: Duration) -> bool {
        self.wait(patience, |state| state.ejected.contains_key(&at.device()))
    }

    /// Asks no more.
    pub fn withdraw(&self, at: Address) {
        lock(&self.state).registers.down &= !(1 << at.device());
    }

    /// Whether the guest has given it up.
    pub fn is_ejected(&self, at: Address) -> bool {
        self.wait_ejected(at, Duration::ZERO)
    }

    /// Takes a device away, whether or not the guest has given it up. It ends when the last of these is dropped.
    pub fn remove(&self, at: Address) -> Vec<Arc<dyn Function>> {
        let mut state = lock(&self.state);
        self.eject(&mut state, 1 << at.device());
        state.ejected.remove(&at.device()).unwrap_or_default()
    }

    /// The devices for the ACPI tables to describe, a bit for each: those that may go, and where there is room.
    pub fn slots(&self) -> u32 {
        let devices = self.host.upgrade().map_or(0, |host| host.devices());
        (!devices | lock(&self.state).removable) & Host::PLUGGABLE
    }

    /// What the guest has not taken note of.
    pub fn state(&self) -> Saved<HotPlugState> {
        Saved::V1(lock(&self.state).registers.clone())
    }

    /// Goes on from `state`; the devices are to be plugged in already.
    pub fn set_state(&self, state: &Saved<HotPlugState>) {
        let Saved::V1(from) = state;
        let mut state = lock(&self.state);
        let removable = state.removable;
        state.registers = HotPlugState { up: from.up & removable, down: from.down & removable };
    }

    fn connect(
        &self,
        state: &mut State,
        at: Option<Address>,
        function: Arc<dyn Function>,
    ) -> Result<Address, Full> {
        let host = self.host.upgrade().ok_or_else(|| Full("what comes while the machine ends".into()))?;
        // What was ejected keeps its place until the host takes it.
        let taken = state.ejected.keys().fold(host.devices(), |taken, device| taken | 1 << device);
        let free = (0..32).find(|device| (Host::PLUGGABLE & !taken) >> device & 1 == 1);
        let free = || free.and_then(|device| Address::new(device, 0));
        let at = at.or_else(free).ok_or_else(|| Full("one more device".into()))?;
        let at = host.plug(Some(at), function)?;
        state.removable |= 1 << at.device();
        Ok(at)
    }

    fn wait(&self, patience: Duration, done: impl Fn(&State) -> bool) -> bool {
        let deadline = Instant::now() + patience;
        let mut state = lock(&self.state);
        while !done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(|e| e.into_inner()).0;
        }
        true
    }

    /// Takes those of `devices` that may go from the bus.
    fn eject(&self, state: &mut MutexGuard<'_, State>, devices: u32) {
        let devices = devices & state.removable;
        let Some(host) = self.host.upgrade() else { return };
        for device in (0..32).filter(|device| devices >> device & 1 == 1) {
            state.ejected.entry(device).or_default().extend(host.unplug(device));
        }
        state.removable &= !devices;
        state.registers.up &= !devices;
        state.registers.down &= !devices;
        self.changed.notify_all();
    }
}

impl Registers for HotPlug {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let mut state = lock(&self.state);
        match (offset, size) {
            (UP, 4) => {
                self.changed.notify_all();
                std::mem::take(&mut state.registers.up).into()
            }
            (DOWN, 4) => state.registers.down.into(),
            _ => 0,
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        if (offset, size) == (EJECT, 4) {
            self.eject(&mut lock(&self.state), value as u32);
        }
    }
}
