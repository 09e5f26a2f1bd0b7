//! The LPC bridge of Intel's ICH9 (data sheet 316972, chapter 13): routes the PIRQ lines, and says where the ACPI PM block
//! is.

use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use machine::irq::{Input, Line};
use machine::{Machine, Registers};
use serde::{Deserialize, Serialize};

use super::{Config, Function, Id, PIRQ_GSI};
use crate::{Saved, lock, pm};

const PMBASE: usize = 0x40;
const ACPI_CNTL: usize = 0x44;
const ACPI_ENABLE: u8 = 0x80;
/// PIRQA–D and PIRQE–H: the IRQ of the 8259s, or bit 7 for none.
const PIRQ_A: usize = 0x60;
const PIRQ_E: usize = 0x68;
const UNROUTED: u8 = 0x80;

/// How many users hold each PIRQ line up, which is saved so that it can be looked at; the users set their lines anew.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LpcState {
    /// By PIRQ line.
    pub users: [u32; 8],
}

/// The LPC bridge.
pub struct Lpc {
    config: Config,
    machine: Weak<Machine>,
    pm: Arc<pm::Pm>,
    /// Where the PM block is on the bus.
    mapped: Mutex<Option<u64>>,
    users: Mutex<LpcState>,
    /// Lines to the GSIs 0 to 23.
    lines: Vec<Line>,
}

impl fmt::Debug for Lpc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lpc").field("users", &*lock(&self.users)).finish_non_exhaustive()
    }
}

impl Lpc {
    /// A bridge that puts `pm` on the port bus of `machine`, at [`pm::PM`] until the guest moves it. `line` makes a line to a
    /// GSI. To be plugged in at [`super::LPC`].
    pub fn new(machine: Weak<Machine>, pm: Arc<pm::Pm>, line: impl Fn(u8) -> Line) -> Arc<Self> {
        let mut config = Config::new(Id {
            vendor: 0x8086,
            device: 0x2918,
            revision: 2,
            class: 0x06_0100,
            subsystem: (0x1af4, 0x1100),
        });
        config.multifunction();
        // The rest of its registers firmware writes and reads, to no effect.
        config.allow(0x40, &[0xff; 0xc0]);
        config.put(PMBASE, &(pm::PM.start as u32 | 1).to_le_bytes());
        config.allow(PMBASE, &0xff80_u32.to_le_bytes());
        config.put(ACPI_CNTL, &[ACPI_ENABLE]);
        for base in [PIRQ_A, PIRQ_E] {
            config.put(base, &[UNROUTED; 4]);
            config.allow(base, &[0x8f; 4]);
        }
        let lines = (0..24).map(line).collect();
        let this =
            Arc::new(Self { config, machine, pm, mapped: Mutex::default(), users: Mutex::default(), lines });
        this.map_pm();
        this
    }

    /// A line to a PIRQ (0 to 7), for one user.
    pub fn line(self: &Arc<Self>, pirq: u8) -> Line {
        Line::new(Arc::new(Pirq { lpc: self.clone(), pirq: pirq % 8, up: Mutex::new(false) }))
    }

    /// Who holds the lines. The rest of the bridge's state is its configuration space, with [`super::Host::state`].
    pub fn state(&self) -> Saved<LpcState> {
        Saved::V1(lock(&self.users).clone())
    }

    fn map_pm(&self) {
        let Some(machine) = self.machine.upgrade() else { return };
        let base = u64::from(u32::from_le_bytes(self.config.get(PMBASE)) & 0xff80);
        let [control] = self.config.get(ACPI_CNTL);
        let to = (control & ACPI_ENABLE != 0 && base != 0).then_some(base);
        let mut mapped = lock(&self.mapped);
        if *mapped == to {
            return;
        }
        if let Some(start) = mapped.take() {
            machine.ports.remove(start);
        }
        let pm: Arc<dyn Registers> = self.pm.clone();
        if let Some(start) = to
            && machine.ports.insert(start, pm::PM.len, "ACPI PM", pm).is_ok()
        {
            *mapped = Some(start);
        }
    }

    /// The IRQ of the 8259s that a PIRQ is routed to.
    fn route(&self, pirq: usize) -> Option<u8> {
        let [route] = self.config.get(if pirq < 4 { PIRQ_A + pirq } else { PIRQ_E + pirq - 4 });
        // 0 to 2, 8 and 13 are reserved.
        (route & UNROUTED == 0 && !matches!(route & 0xf, 0..=2 | 8 | 13)).then_some(route & 0xf)
    }

    fn settle(&self, state: &LpcState) {
        let mut legacy = 0u16;
        for (pirq, &users) in state.users.iter().enumerate() {
            if let Some(line) = self.lines.get(usize::from(PIRQ_GSI) + pirq) {
                line.set(users > 0);
            }
            if users > 0
                && let Some(irq) = self.route(pirq)
            {
                legacy |= 1 << irq;
            }
        }
        for (irq, line) in self.lines.iter().enumerate().take(16) {
            line.set(legacy & 1 << irq != 0);
        }
    }
}

impl Function for Lpc {
    fn config(&self) -> &Config {
        &self.config
    }

    fn config_written(&self, _: u8) {
        self.map_pm();
        self.settle(&lock(&self.users));
    }
}

/// One user's end of a PIRQ line.
struct Pirq {
    lpc: Arc<Lpc>,
    pirq: u8,
    up: Mutex<bool>,
}

impl Input for Pirq {
    fn set(&self, level: bool) {
        let mut up = lock(&self.up);
        if std::mem::replace(&mut *up, level) == level {
            return;
        }
        let mut state = lock(&self.lpc.users);
        let users = &mut state.users[usize::from(self.pirq)];
        *users = if level { *users + 1 } else { users.saturating_sub(1) };
        self.lpc.settle(&state);
    }
}

impl Drop for Pirq {
    fn drop(&mut self) {
        // A device that was unplugged holds nothing up.
        self.set(false);
    }
}
