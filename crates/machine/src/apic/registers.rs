//! A local APIC's registers: what can be said of them without other processors (SDM vol. 3A, chapter 10).

use serde::{Deserialize, Serialize};

use super::{Destination, Events, LOCAL_BASE, Mode};

/// Offsets of registers in the xAPIC page (SDM vol. 3A, table 10-1); an x2APIC's MSR is 0x800 + offset / 16.
pub(super) mod at {
    pub const ID: u16 = 0x20;
    pub const VERSION: u16 = 0x30;
    pub const TPR: u16 = 0x80;
    pub const APR: u16 = 0x90;
    pub const PPR: u16 = 0xa0;
    pub const EOI: u16 = 0xb0;
    pub const LDR: u16 = 0xd0;
    pub const DFR: u16 = 0xe0;
    pub const SVR: u16 = 0xf0;
    pub const ISR: u16 = 0x100;
    pub const TMR: u16 = 0x180;
    pub const IRR: u16 = 0x200;
    pub const ESR: u16 = 0x280;
    pub const ICR: u16 = 0x300;
    pub const ICR_HIGH: u16 = 0x310;
    pub const LVT: u16 = 0x320;
    pub const INITIAL: u16 = 0x380;
    pub const CURRENT: u16 = 0x390;
    pub const DIVIDE: u16 = 0x3e0;
    pub const SELF_IPI: u16 = 0x3f0;
}

/// Entries of the local vector table, in the order of their registers.
pub(super) mod lvt {
    pub const TIMER: usize = 0;
    pub const LINT0: usize = 3;
    pub const LINT1: usize = 4;
    pub const ERROR: usize = 5;
    /// Mask bit.
    pub const MASKED: u32 = 1 << 16;
    /// What of each entry can be written.
    pub const WRITABLE: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
}

/// Bits of IA32_APIC_BASE.
pub(super) mod base {
    pub const BSP: u64 = 1 << 8;
    pub const EXTD: u64 = 1 << 10;
    pub const EN: u64 = 1 << 11;
    pub const ADDRESS: u64 = ((1 << x86::cpuid::PHYSICAL_BITS) - 1) & !0xfff;
}

/// 256 bits, one for each vector.
pub(super) type Vectors = [u32; 8];

/// Errors of ESR.
pub(super) mod esr {
    pub const SEND_ILLEGAL: u32 = 1 << 5;
    pub const RECEIVE_ILLEGAL: u32 = 1 << 6;
    pub const REGISTER: u32 = 1 << 7;
}

/// A local APIC's state, to save and restore. Version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalState {
    /// Layout of this structure.
    pub version: u32,
    /// Initial id, which is the x2APIC id.
    pub id: u32,
    /// xAPIC id register, where software changed it.
    pub xid: u8,
    /// IA32_APIC_BASE.
    pub base: u64,
    /// Task priority.
    pub tpr: u8,
    /// Logical destination (xAPIC form).
    pub ldr: u32,
    /// Destination format.
    pub dfr: u32,
    /// Spurious vector and software enable.
    pub svr: u32,
    /// In service.
    pub isr: [u32; 8],
    /// Trigger modes.
    pub tmr: [u32; 8],
    /// Requested.
    pub irr: [u32; 8],
    /// Errors shown, and errors since.
    pub esr: (u32, u32),
    /// Interrupt command.
    pub icr: u64,
    /// Timer, thermal, performance, LINT0, LINT1, error.
    pub lvt: [u32; 6],
    /// Timer's initial count.
    pub initial: u32,
    /// Divide configuration.
    pub divide: u32,
    /// When the count was or will be 0, in nanoseconds of guest time; 0 when the timer is off.
    pub expiry: u64,
    /// IA32_TSC_DEADLINE.
    pub deadline: u64,
    /// What the guest's TSC is ahead of the clock's.
    pub tsc_offset: u64,
    /// Level of the 8259's INTR.
    pub extint: bool,
    /// An ExtINT came as a message.
    pub extint_message: bool,
    /// An NMI that the processor has not seen yet.
    pub nmi: bool,
    /// An INIT that the processor has not seen yet.
    pub init: bool,
    /// A start-up IPI that the processor has not seen yet; after `init`.
    pub sipi: Option<u8>,
}

impl LocalState {
    pub(super) fn new(id: u32) -> Self {
        let mut this = Self {
            version: 1,
            id,
            xid: id as u8,
            base: LOCAL_BASE | base::EN | if id == 0 { base::BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            esr: (0, 0),
            icr: 0,
            lvt: [lvt::MASKED; 6],
            initial: 0,
            divide: 0,
            expiry: 0,
            deadline: 0,
            tsc_offset: 0,
            extint: false,
            extint_message: false,
            nmi: false,
            init: false,
            sipi: None,
        };
        this.reset();
        this
    }

    /// As after INIT: all but the id, the base and what is wired.
    pub(super) fn reset(&mut self) {
        (self.tpr, self.ldr, self.dfr, self.svr) = (0, 0, u32::MAX, 0xff);
        (self.isr, self.tmr, self.irr) = ([0; 8], [0; 8], [0; 8]);
        (self.esr, self.icr, self.initial, self.divide) = ((0, 0), 0, 0, 0);
        (self.expiry, self.deadline, self.extint_message) = (0, 0, false);
        self.lvt = [lvt::MASKED; 6];
        if self.id == 0 {
            // Firmware leaves the boot processor in virtual-wire mode; kernels that are started without firmware rely on it.
            self.lvt[lvt::LINT0] = 0x700;
        }
    }

    pub(super) fn enabled(&self) -> bool {
        self.base & base::EN != 0
    }

    pub(super) fn x2apic(&self) -> bool {
        self.base & base::EXTD != 0
    }

    pub(super) fn software_enabled(&self) -> bool {
        self.enabled() && self.svr & 0x100 != 0
    }

    /// Processor priority (SDM vol. 3A, 10.8.3.1).
    pub(super) fn ppr(&self) -> u8 {
        let service = highest(&self.isr).unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= service { self.tpr } else { service }
    }

    /// The vector that the processor would get now.
    pub(super) fn deliverable(&self) -> Option<u8> {
        let vector = highest(&self.irr)?;
        (self.software_enabled() && vector & 0xf0 > self.ppr() & 0xf0).then_some(vector)
    }

    /// Whether the 8259's interrupts get through.
    pub(super) fn takes_extint(&self) -> bool {
        !self.enabled() || self.lvt[lvt::LINT0] & (lvt::MASKED | 0x700) == 0x700
    }

    /// Whether the processor would get an interrupt of the 8259 now.
    pub(super) fn extint_ready(&self) -> bool {
        self.extint_message || self.extint && self.takes_extint()
    }

    /// Requests `vector`. False if it is illegal.
    pub(super) fn request(&mut self, vector: u8, level: bool) -> bool {
        if vector < 16 {
            self.error(esr::RECEIVE_ILLEGAL);
            return false;
        }
        set(&mut self.irr, vector, true);
        set(&mut self.tmr, vector, level);
        true
    }

    /// An edge on one of the LINT pins; ExtINT is a level and not seen here.
    pub(super) fn local_interrupt(&mut self, pin: usize, events: &mut Events) {
        let entry = self.lvt[pin];
        if !self.enabled() || entry & lvt::MASKED != 0 {
            return;
        }
        match Mode::of(entry.into()) {
            Some(Mode::Fixed) => drop(self.request(entry as u8, false)),
            Some(Mode::Nmi) => events.nmi = true,
            _ => {}
        }
    }

    /// Notes errors, and requests the error interrupt.
    pub(super) fn error(&mut self, bits: u32) {
        self.esr.1 |= bits;
        let entry = self.lvt[lvt::ERROR];
        if entry & lvt::MASKED == 0 && entry as u8 >= 16 {
            set(&mut self.irr, entry as u8, true);
            set(&mut self.tmr, entry as u8, false);
        }
    }

    /// Ends the service of the highest vector; it, if its end is to be told to the IOAPIC.
    pub(super) fn eoi(&mut self) -> Option<u8> {
        let vector = highest(&self.isr)?;
        set(&mut self.isr, vector, false);
        get(&self.tmr, vector).then_some(vector)
    }

    /// Nanoseconds of guest time per tick of the timer: the bus clock is 1 GHz.
    pub(super) fn divisor(&self) -> u64 {
        let code = self.divide & 3 | (self.divide & 8) >> 1;
        1 << ((code + 1) & 7)
    }

    /// The timer's mode: 0 one-shot, 1 periodic, 2 TSC-deadline.
    pub(super) fn timer_mode(&self) -> u32 {
        self.lvt[lvt::TIMER] >> 17 & 3
    }

    /// The logical id of x2APIC mode (SDM vol. 3A, 10.12.10.2).
    pub(super) fn x2ldr(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 15)
    }

    pub(super) fn is_destination(&self, destination: Destination) -> bool {
        match destination {
            Destination::All => true,
            Destination::AllBut(id) => self.id != id,
            Destination::Physical(id) if self.x2apic() => self.id == id,
            Destination::Physical(id) => u32::from(self.xid) == id,
            Destination::Logical(to, x2) if self.x2apic() => {
                // An 8-bit logical destination reaches the first eight processors of cluster 0.
                let to = if x2 { to } else { to & 0xff };
                self.x2ldr() >> 16 == to >> 16 && self.x2ldr() & to & 0xffff != 0
            }
            Destination::Logical(to, _) => {
                let mine = self.ldr >> 24;
                if self.dfr >> 28 == 0xf {
                    mine & to & 0xff != 0
                } else {
                    mine >> 4 == (to >> 4 & 0xf) && mine & to & 0xf != 0
                }
            }
        }
    }

    /// Decodes the interrupt command register, its mode, destination and vector, where it is of a kind that there is.
    pub(super) fn command(&self) -> Option<(Mode, Destination, u8)> {
        let icr = self.icr;
        let mode = Mode::of(icr)?;
        let (level, assert) = (icr & 1 << 15 != 0, icr & 1 << 14 != 0);
        if mode == Mode::Init && level && !assert {
            return None; // INIT level de-assert: without meaning on current processors
        }
        let to = if self.x2apic() { (icr >> 32) as u32 } else { (icr >> 56) as u32 };
        let broadcast = if self.x2apic() { u32::MAX } else { 0xff };
        let destination = match icr >> 18 & 3 {
            1 => Destination::Physical(if self.x2apic() { self.id } else { self.xid.into() }),
            2 => Destination::All,
            3 => Destination::AllBut(self.id),
            _ if to == broadcast => Destination::All,
            _ if icr & 1 << 11 != 0 => Destination::Logical(to, self.x2apic()),
            _ => Destination::Physical(to),
        };
        Some((mode, destination, icr as u8))
    }
}

pub(super) fn highest(vectors: &Vectors) -> Option<u8> {
    let word = vectors.iter().rposition(|&w| w != 0)?;
    Some(word as u8 * 32 + 31 - vectors[word].leading_zeros() as u8)
}

pub(super) fn get(vectors: &Vectors, vector: u8) -> bool {
    vectors[usize::from(vector / 32)] & 1 << (vector % 32) != 0
}

pub(super) fn set(vectors: &mut Vectors, vector: u8, value: bool) {
    let word = &mut vectors[usize::from(vector / 32)];
    *word = *word & !(1 << (vector % 32)) | u32::from(value) << (vector % 32);
}
