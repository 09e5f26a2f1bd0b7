//! How devices' interrupts get to processors: the 8259s and the IOAPIC side by side, and messages.

use std::fmt;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::apic::{IOAPIC_BASE, IoApic, IoApicState};
use crate::bus::{Bus, Overlap, Registers};
use crate::irq::{Controllers, Input, Line, LocalApics, Msi, Route};
use crate::pic::{PicState, Pics};

/// All controllers that devices see, to save and restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IrqsState {
    /// The 8259s.
    pub pics: PicState,
    /// The IOAPIC.
    pub ioapic: IoApicState,
}

/// The interrupt controllers that devices see.
pub struct Irqs {
    pics: Pics,
    ioapic: Arc<IoApic>,
    sink: Arc<dyn LocalApics>,
    /// How many users hold each GSI up.
    asserted: [Mutex<u32>; 24],
}

impl fmt::Debug for Irqs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Irqs").field("pics", &self.pics).field("ioapic", &self.ioapic).finish_non_exhaustive()
    }
}

impl Irqs {
    /// Controllers before the local APICs of `sink`.
    pub fn new(sink: Arc<dyn LocalApics>) -> Arc<Self> {
        let this = Arc::new(Self {
            pics: Pics::default(),
            ioapic: Arc::new(IoApic::new(sink.clone())),
            sink,
            asserted: Default::default(),
        });
        let weak = Arc::downgrade(&this);
        this.sink.connect(weak);
        this
    }

    /// A line to `gsi` (0 to 23), for one user: several share it, wired-or. GSI n is IRQ n of the 8259s and pin n of the
    /// IOAPIC, but for the timer: IRQ 0 is pin 2. From 16 on there is the IOAPIC alone.
    pub fn line(self: &Arc<Self>, gsi: u8) -> Line {
        Line::new(Arc::new(Wire { irqs: self.clone(), gsi: gsi % 24, up: Mutex::new(false) }))
    }

    /// Sends a message-signalled interrupt.
    pub fn msi(&self, msi: Msi) {
        self.sink.send(msi);
    }

    /// A way for the messages of one source.
    pub fn route(&self) -> Box<dyn Route> {
        let sink = self.sink.clone();
        self.sink.route().unwrap_or_else(|| {
            Box::new(move |msi| {
                sink.send(msi);
            })
        })
    }

    /// The 8259s.
    pub fn pics(&self) -> &Pics {
        &self.pics
    }

    /// The IOAPIC.
    pub fn ioapic(&self) -> &IoApic {
        &self.ioapic
    }

    /// Puts the controllers' registers on the buses.
    ///
    /// # Errors
    /// Something else is there.
    pub fn insert(self: &Arc<Self>, ports: &Bus, mmio: &Bus) -> Result<(), Overlap> {
        for (base, len, chip) in [(0x20, 2, Port::Pic(0)), (0xa0, 2, Port::Pic(1)), (0x4d0, 2, Port::Elcr)] {
            ports.insert(base, len, "8259", Arc::new(PicPorts { irqs: self.clone(), port: chip }))?;
        }
        mmio.insert(IOAPIC_BASE, 0x1000, "IOAPIC", self.ioapic.clone())
    }

    /// The controllers' registers, to save them.
    pub fn state(&self) -> IrqsState {
        IrqsState { pics: self.pics.state(), ioapic: self.ioapic.state() }
    }

    /// Goes on with saved registers. Who holds a line up is the devices' state: each sets its line again.
    pub fn set_state(&self, saved: &IrqsState) {
        self.pics.set_state(&saved.pics, self.intr());
        self.ioapic.set_state(&saved.ioapic);
    }

    fn intr(&self) -> impl FnOnce(bool) + '_ {
        |level| self.sink.intr(level)
    }

    fn set(&self, gsi: u8, level: bool) {
        if gsi < 16 {
            self.pics.set(gsi, level, self.intr());
        }
        match gsi {
            0 => self.ioapic.set(2, level),
            2 => {}
            n => self.ioapic.set(n.into(), level),
        }
    }
}

impl Controllers for Irqs {
    fn acknowledge(&self) -> Option<u8> {
        Some(self.pics.acknowledge(self.intr()))
    }

    fn eoi(&self, vector: u8) {
        self.ioapic.eoi(vector);
    }
}

/// One user's end of a line.
struct Wire {
    irqs: Arc<Irqs>,
    gsi: u8,
    up: Mutex<bool>,
}

impl Input for Wire {
    fn set(&self, level: bool) {
        let mut up = self.up.lock().unwrap_or_else(|e| e.into_inner());
        if std::mem::replace(&mut *up, level) == level {
            return;
        }
        let mut users = self.irqs.asserted[usize::from(self.gsi)].lock().unwrap_or_else(|e| e.into_inner());
        *users = if level { *users + 1 } else { users.saturating_sub(1) };
        if *users == u32::from(level) {
            self.irqs.set(self.gsi, level);
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.set(false);
    }
}

#[derive(Clone, Copy)]
enum Port {
    Pic(usize),
    Elcr,
}

struct PicPorts {
    irqs: Arc<Irqs>,
    port: Port,
}

impl Registers for PicPorts {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let byte = |offset| match self.port {
            Port::Pic(chip) => self.irqs.pics.read(chip, offset, self.irqs.intr()),
            Port::Elcr => self.irqs.pics.elcr(offset as usize),
        };
        (0..size.into()).fold(0, |v, i| v | u64::from(byte(offset + i)) << (8 * i))
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        for i in 0..size.into() {
            let (at, value) = (offset + i, (value >> (8 * i)) as u8);
            match self.port {
                Port::Pic(chip) => self.irqs.pics.write(chip, at, value, self.irqs.intr()),
                Port::Elcr => self.irqs.pics.set_elcr(at as usize, value, self.irqs.intr()),
            }
        }
    }
}
