//! All local APICs of a machine, and the messages between them.

use std::fmt;
use std::sync::{Arc, OnceLock, Weak};

use super::{Destination, Local, Mode};
use crate::irq::{Controllers, LocalApics, Msi};
use crate::{Clock, Timers};

/// All local APICs of a machine: what software engines have for the host's.
#[derive(Clone)]
pub struct Apics(Arc<Shared>);

pub(super) struct Shared {
    pub(super) clock: Arc<Clock>,
    locals: Vec<Arc<Local>>,
    controllers: OnceLock<Weak<dyn Controllers>>,
}

impl fmt::Debug for Apics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.0.locals).finish()
    }
}

impl Apics {
    /// Local APICs for `count` processors, whose ids are 0, 1, ….
    pub fn new(count: u32, clock: &Arc<Clock>, timers: &Timers) -> Self {
        Self(Arc::new_cyclic(|shared| Shared {
            clock: clock.clone(),
            locals: (0..count).map(|id| Local::new(id, shared, timers)).collect(),
            controllers: OnceLock::new(),
        }))
    }

    /// The APIC of processor `index`.
    pub fn local(&self, index: u32) -> Option<Arc<Local>> {
        self.0.locals.get(index as usize).cloned()
    }
}

impl Shared {
    fn controllers(&self) -> Option<Arc<dyn Controllers>> {
        self.controllers.get()?.upgrade()
    }

    pub(super) fn acknowledge(&self) -> Option<u8> {
        self.controllers()?.acknowledge()
    }

    pub(super) fn eoi(&self, vector: u8) {
        if let Some(controllers) = self.controllers() {
            controllers.eoi(vector);
        }
    }

    /// Delivers a message to all whom it is for. False if nobody takes it.
    pub(super) fn send(&self, mode: Mode, to: Destination, vector: u8, level: bool) -> bool {
        let targets = self.locals.iter().filter(|local| local.is_destination(to));
        if mode == Mode::LowestPriority {
            let lowest = targets.filter_map(|local| Some((local.priority()?, local))).min_by_key(|&(p, _)| p);
            return lowest.is_some_and(|(_, local)| local.deliver(mode, vector, level));
        }
        targets.fold(false, |any, local| local.deliver(mode, vector, level) | any)
    }
}

impl LocalApics for Apics {
    fn send(&self, msi: Msi) -> bool {
        let to = (msi.address >> 12) as u32 & 0xff;
        let destination = match msi.address & 1 << 2 {
            _ if to == 0xff => Destination::All,
            0 => Destination::Physical(to),
            _ => Destination::Logical(to, false),
        };
        let data = u64::from(msi.data);
        // Redirection hint with logical destination: to one of them.
        let mode = match Mode::of(data) {
            Some(Mode::Fixed) if msi.address & 0xc == 0xc => Mode::LowestPriority,
            Some(mode) => mode,
            None => return false,
        };
        self.0.send(mode, destination, data as u8, data & 1 << 15 != 0)
    }

    fn intr(&self, level: bool) {
        self.0.locals.iter().for_each(|local| local.intr(level));
    }

    fn connect(&self, controllers: Weak<dyn Controllers>) {
        // A second call has no effect: a machine has one set of controllers.
        let _ = self.0.controllers.set(controllers);
    }
}
