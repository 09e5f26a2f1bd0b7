//! A VM's network cards, which outlive its machine's resets, and come and go while the guest runs.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use devices::e1000::E1000;
use devices::pci::{Address, Function, HotPlug};
use devices::virtio;
use machine::Machine;

use crate::Error;
use crate::config::{Mac, Nic, NicModel};
use crate::storage::{Refusal, Slots, ask};

/// Bytes of the longest packet.
const MTU: u16 = 1500;

/// A VM's network cards.
#[derive(Debug, Default)]
pub struct Nics(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    nics: Vec<Attached>,
    machine: Option<Slots>,
}

#[derive(Debug)]
struct Attached {
    nic: Nic,
    /// Where it was last, and is to be again after a reset.
    at: Option<Address>,
    leaving: bool,
}

impl From<Vec<Nic>> for Nics {
    fn from(nics: Vec<Nic>) -> Self {
        let nics = nics.into_iter().map(|nic| Attached { nic, at: None, leaving: false }).collect();
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
        // Who has been asked to give up a card need not be asked any more.
        state.nics.retain(|attached| !attached.leaving);
        for attached in &mut state.nics {
            let function = controller(&attached.nic, machine, cpus)
                .map_err(|source| Error::Host { what: "a thread for a device", source })?;
            attached.at = Some(hotplug.plug(attached.at, function)?);
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
        state.nics.push(Attached { nic, at, leaving: false });
        Ok(())
    }

    /// Asks the guest to give up the card with this address, and waits until it has. `force` does not ask.
    ///
    /// # Errors
    /// There is no such card, or the guest does not give it up.
    pub fn detach(&self, mac: Mac, patience: Duration, force: bool) -> Result<(), Refusal> {
        let mut state = self.state();
        let hotplug = state.machine.as_ref().and_then(Slots::hotplug);
        let found = state.nics.iter_mut().find(|attached| attached.nic.mac == mac);
        let attached = found.ok_or_else(|| Refusal::Unknown(format!("{mac:x?}")))?;
        if std::mem::replace(&mut attached.leaving, true) {
            return Err(Refusal::Leaving);
        }
        let place = hotplug.zip(attached.at);
        drop(state);
        let given_up = match &place {
            Some((hotplug, at)) if !force => ask(hotplug, *at, patience, || !self.has(mac)),
            _ => Ok(()),
        };
        let mut state = self.state();
        // None: a new machine has come without it.
        let attached = state.nics.iter_mut().find(|attached| attached.nic.mac == mac);
        if let (Err(refusal), Some(attached)) = (given_up, attached) {
            attached.leaving = false;
            return Err(refusal);
        }
        state.nics.retain(|attached| attached.nic.mac != mac);
        drop(state);
        // Its threads end here, not on a vCPU's.
        if let Some((hotplug, at)) = place {
            drop(hotplug.remove(at));
        }
        Ok(())
    }

    fn has(&self, mac: Mac) -> bool {
        self.state().nics.iter().any(|attached| attached.nic.mac == mac)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    use devices::net::{Guest, Header, Link};
    use devices::{pci, pm, reset};
    use machine::{Clock, Memory, Registers, irq};

    struct Unplugged;

    impl Link for Unplugged {
        fn connect(&self, _: Guest) {}
        fn send(&self, _: &Header, _: &[u8]) {}
    }

    /// A machine whose guest takes part in hot-plug, and never does anything.
    fn machine() -> (Arc<Machine>, Arc<pci::Host>, Arc<HotPlug>) {
        let machine = Machine::new(Memory::new(2 << 20, 0).unwrap(), Clock::manual(1_000_000)).unwrap();
        let machine = Arc::new(machine);
        let Machine { power, clock, timers, .. } = &*machine;
        let pm = pm::Pm::new(irq::Line::unconnected(), power.clone(), clock.clone(), timers);
        pm.write(pm::GPE0 - pm::PM.start + 8, 1, 1 << pci::HOTPLUG_GPE);
        let host = pci::Host::new(
            Arc::downgrade(&machine),
            pci::Windows::default(),
            |_| irq::Line::unconnected(),
            || Box::new(|_| ()),
            reset::Control::new(power.clone()),
        );
        let hotplug = HotPlug::new(&host, pm);
        assert!(hotplug.has_listener());
        (machine, host, hotplug)
    }

    #[test]
    fn a_card_that_is_asked_for_does_not_come_back_with_a_reset() {
        const PATIENCE: Duration = Duration::from_secs(60);
        let nic = |n| Nic { mac: [2, 0, 0, 0, 0, n], model: NicModel::E1000, link: Arc::new(Unplugged) };
        let nics: Arc<Nics> = Arc::new(vec![nic(1), nic(2)].into());
        let (machine_1, _host_1, hotplug) = machine();
        nics.plug(&hotplug, &machine_1, 1).unwrap();
        let refused = nics.detach([2, 0, 0, 0, 0, 2], Duration::from_millis(1), false);
        assert!(matches!(refused, Err(Refusal::Kept(_))));
        let begun = Instant::now();
        let waits = std::thread::spawn({
            let nics = nics.clone();
            move || nics.detach([2, 0, 0, 0, 0, 1], PATIENCE, false)
        });
        while !nics.state().nics[0].leaving {
            std::thread::yield_now();
        }
        let again = nics.detach([2, 0, 0, 0, 0, 1], PATIENCE, false);
        assert!(matches!(again, Err(Refusal::Leaving)));
        let (machine_2, host_2, hotplug) = machine();
        nics.plug(&hotplug, &machine_2, 1).unwrap();
        waits.join().unwrap().unwrap();
        assert!(begun.elapsed() < PATIENCE, "it waited for a guest that is no more");
        assert_eq!(nics.state().nics.len(), 1, "the other one stays");
        assert_eq!(host_2.devices().count_ones(), 2, "the host bridge and that one");
    }
}
