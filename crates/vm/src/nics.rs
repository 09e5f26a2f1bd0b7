//! A VM's network cards, which outlive its machine's resets, and come and go while the guest runs.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use devices::e1000::E1000;
use devices::pci::{Address, Function, HotPlug};
use devices::virtio;
use machine::Machine;

use crate::Error;
use crate::config::{Mac, Nic, NicModel};
use crate::storage::{Refusal, Slots};

/// Bytes of the longest packet.
const MTU: u16 = 1500;

/// A VM's network cards.
#[derive(Debug, Default)]
pub struct Nics(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    nics: Vec<(Nic, Option<Address>)>,
    machine: Option<Slots>,
}

impl From<Vec<Nic>> for Nics {
    fn from(nics: Vec<Nic>) -> Self {
        let nics = nics.into_iter().map(|nic| (nic, None)).collect();
        Self(Mutex::new(State { nics, machine: None }))
    }
}

fn controller(nic: &Nic, machine: &Machine, cpus: u32) -> std::io::Result<Arc<dyn Function>> {
    let (link, memory) = (nic.link.clone(), machine.memory.clone());
    Ok(match nic.model {
        NicModel::Virtio => {
            let pairs = cpus.min(virtio::net::MOST_PAIRS);
            let options = virtio::net::Options { mac: nic.mac, mtu: MTU, pairs };
            virtio::Pci::new(Arc::new(virtio::net::Net::new(options, link)), memory)?
        }
        NicModel::E1000 => E1000::new(nic.mac, link, memory, machine.clock.clone(), &machine.timers)?,
    })
}

impl Nics {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Plugs all into a new machine.
    pub(crate) fn plug(
        &self,
        hotplug: &Arc<HotPlug>,
        machine: &Arc<Machine>,
        cpus: u32,
    ) -> Result<(), Error> {
        let mut state = self.state();
        for (nic, at) in &mut state.nics {
            let function = controller(nic, machine, cpus)
                .map_err(|source| Error::Host { what: "a thread for a device", source })?;
            *at = Some(hotplug.plug(*at, function)?);
        }
        state.machine = Some(Slots::new(hotplug, machine, cpus));
        Ok(())
    }

    /// Gives the guest a card.
    ///
    /// # Errors
    /// There is no room for it.
    pub fn attach(&self, nic: Nic) -> Result<(), Refusal> {
        let mut state = self.state();
        let mut at = None;
        if let Some((hotplug, machine, cpus)) = state.machine.as_ref().and_then(Slots::now) {
            let function = controller(&nic, &machine, cpus).map_err(Refusal::Host)?;
            at = Some(hotplug.insert(function).map_err(Refusal::Full)?);
        }
        state.nics.push((nic, at));
        Ok(())
    }

    /// Asks the guest to give up the card with this address, and waits until it has. `force` does not ask.
    ///
    /// # Errors
    /// There is no such card, or the guest does not give it up.
    pub fn detach(&self, mac: Mac, patience: Duration, force: bool) -> Result<(), Refusal> {
        let state = self.state();
        let found = state.nics.iter().find(|(nic, _)| nic.mac == mac);
        let (_, at) = found.ok_or_else(|| Refusal::Unknown(format!("{mac:x?}")))?;
        let hotplug = state.machine.as_ref().and_then(Slots::hotplug);
        let place = hotplug.zip(*at);
        drop(state);
        if let Some((hotplug, at)) = place {
            if !force && !hotplug.is_ejected(at) {
                hotplug.ask(at);
                if !hotplug.wait_ejected(at, patience) {
                    hotplug.withdraw(at);
                    return Err(Refusal::Kept(patience.as_secs_f64()));
                }
            }
            drop(hotplug.remove(at));
        }
        self.state().nics.retain(|(nic, _)| nic.mac != mac);
        Ok(())
    }
}
