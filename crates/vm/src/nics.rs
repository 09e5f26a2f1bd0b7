//! A VM's network cards, which outlive its machine's resets, and come and go while the guest runs.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use devices::e1000::E1000;
use devices::pci::{Address, Function, HotPlug};
use devices::virtio;
use machine::Machine;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::config::{Mac, Nic, NicModel};
use crate::port::{Limits, Port, Traffic};
use crate::storage::{Refusal, Slots, ask};

/// Bytes of the longest packet.
const MTU: u16 = 1500;

/// Connects a card that users describe in so many words, and that is not given away: what is known of cards is the number that it may have.
pub type Open = Box<dyn Fn(&str, &dyn Fn(Mac) -> bool) -> Result<Nic, String> + Send + Sync>;

/// A VM's network cards.
#[derive(Default)]
pub struct Nics {
    state: Mutex<State>,
    open: Option<Open>,
}

/// A card, as users see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicStatus {
    /// Its Ethernet address.
    pub mac: String,
    /// Which it is.
    pub model: String,
    /// What it is connected to.
    pub network: String,
    /// How much may go through.
    pub limits: Limits,
    /// What has gone through, and whether anything can.
    pub traffic: Traffic,
}

#[derive(Debug, Default)]
struct State {
    nics: Vec<Attached>,
    machine: Option<Slots>,
}

#[derive(Debug)]
struct Attached {
    nic: Nic,
    port: Arc<Port>,
    /// Where it was last, and is to be again after a reset.
    at: Option<Address>,
    leaving: bool,
}

impl Attached {
    fn new(nic: Nic) -> std::io::Result<Self> {
        let port = Port::new(nic.link.clone(), nic.limits)?;
        if !nic.plugged {
            port.plug(false);
        }
        Ok(Self { nic, port, at: None, leaving: false })
    }

    fn status(&self) -> NicStatus {
        NicStatus {
            mac: text(self.nic.mac),
            model: match self.nic.model {
                NicModel::Virtio => "virtio".into(),
                NicModel::E1000 => "e1000".into(),
            },
            network: self.nic.network.clone(),
            limits: self.nic.limits,
            traffic: self.port.traffic(),
        }
    }
}

fn text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn controller(card: &Attached, machine: &Machine, cpus: u32) -> std::io::Result<Arc<dyn Function>> {
    let (nic, link, memory) = (&card.nic, card.port.clone(), machine.memory.clone());
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
    /// These cards; `open` makes those that come later.
    ///
    /// # Errors
    /// The host gives no threads.
    pub fn new(nics: Vec<Nic>, open: Option<Open>) -> std::io::Result<Self> {
        let nics = nics.into_iter().map(Attached::new).collect::<std::io::Result<_>>()?;
        Ok(Self { state: Mutex::new(State { nics, machine: None }), open })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
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
            let function = controller(attached, machine, cpus)
                .map_err(|source| Error::Host { what: "a thread for a device", source })?;
            attached.at = Some(hotplug.plug(attached.at, function)?);
        }
        state.machine = Some(Slots::new(hotplug, machine, cpus));
        Ok(())
    }

    /// Gives the guest a card that the user describes in these words: those of `lodge run --network`.
    ///
    /// # Errors
    /// There is none such, or no room for it.
    pub fn attach_as(&self, words: &str) -> Result<NicStatus, Refusal> {
        let open = self.open.as_ref().ok_or_else(|| Refusal::Network("there are no networks here".into()))?;
        // It may take as long as the network helper does: others may look meanwhile.
        self.attach(open(words, &|mac| self.has(mac)).map_err(Refusal::Network)?)
    }

    /// Gives the guest a card.
    ///
    /// # Errors
    /// It has one with this address, or there is no room for it.
    pub fn attach(&self, nic: Nic) -> Result<NicStatus, Refusal> {
        let mut state = self.state();
        if state.nics.iter().any(|attached| attached.nic.mac == nic.mac) {
            return Err(Refusal::Network(format!(
                "there is a card with the address {} already",
                text(nic.mac)
            )));
        }
        let mut attached = Attached::new(nic).map_err(Refusal::Host)?;
        if let Some((hotplug, machine, cpus)) = state.machine.as_ref().and_then(Slots::now) {
            let function = controller(&attached, &machine, cpus).map_err(Refusal::Host)?;
            attached.at = Some(hotplug.insert(function).map_err(Refusal::Full)?);
        }
        let status = attached.status();
        state.nics.push(attached);
        Ok(status)
    }

    /// All cards.
    pub fn list(&self) -> Vec<NicStatus> {
        self.state().nics.iter().map(Attached::status).collect()
    }

    /// Puts in, or takes out, the cable of the card that has this number, from 1 on, or this address.
    ///
    /// # Errors
    /// There is no such card.
    pub fn set_plugged(&self, which: &str, plugged: bool) -> Result<(), Refusal> {
        let port = self.find(&self.state(), which)?.port.clone();
        port.plug(plugged);
        Ok(())
    }

    fn find<'a>(&self, state: &'a State, which: &str) -> Result<&'a Attached, Refusal> {
        let number = which.parse::<usize>().ok().and_then(|number| number.checked_sub(1));
        let by_number = number.and_then(|number| state.nics.get(number));
        let which = which.to_ascii_lowercase();
        let found = by_number.or_else(|| state.nics.iter().find(|attached| text(attached.nic.mac) == which));
        found.ok_or(Refusal::NoCard(which))
    }

    /// Asks the guest to give up the card with this number, from 1 on, or address, and waits until it has. `force` does not ask.
    ///
    /// # Errors
    /// There is no such card, or the guest does not give it up.
    pub fn detach(&self, which: &str, patience: Duration, force: bool) -> Result<(), Refusal> {
        let mut state = self.state();
        let hotplug = state.machine.as_ref().and_then(Slots::hotplug);
        let mac = self.find(&state, which)?.nic.mac;
        let found = state.nics.iter_mut().find(|attached| attached.nic.mac == mac);
        let attached = found.ok_or_else(|| Refusal::NoCard(which.into()))?;
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

impl fmt::Debug for Nics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nics").field("state", &self.state).finish_non_exhaustive()
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
        let nic = |n| Nic {
            mac: [2, 0, 0, 0, 0, n],
            model: NicModel::E1000,
            link: Arc::new(Unplugged),
            network: "none".into(),
            limits: Limits::default(),
            plugged: true,
        };
        let nics = Arc::new(Nics::new(vec![nic(1), nic(2)], None).unwrap());
        let (machine_1, _host_1, hotplug) = machine();
        nics.plug(&hotplug, &machine_1, 1).unwrap();
        let refused = nics.detach("02:00:00:00:00:02", Duration::from_millis(1), false);
        assert!(matches!(refused, Err(Refusal::Kept(_))));
        let begun = Instant::now();
        let waits = std::thread::spawn({
            let nics = nics.clone();
            move || nics.detach("1", PATIENCE, false)
        });
        while !nics.state().nics[0].leaving {
            std::thread::yield_now();
        }
        let again = nics.detach("1", PATIENCE, false);
        assert!(matches!(again, Err(Refusal::Leaving)));
        let (machine_2, host_2, hotplug) = machine();
        nics.plug(&hotplug, &machine_2, 1).unwrap();
        waits.join().unwrap().unwrap();
        assert!(begun.elapsed() < PATIENCE, "it waited for a guest that is no more");
        assert_eq!(nics.state().nics.len(), 1, "the other one stays");
        assert_eq!(host_2.devices().count_ones(), 2, "the host bridge and that one");
    }
}
