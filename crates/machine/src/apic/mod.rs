//! The APICs: a local one for each processor ([`Local`], together [`Apics`]) and the one for devices ([`IoApic`]).

mod apics;
mod io;
mod local;
mod registers;

pub use apics::Apics;
pub use io::{IoApic, IoApicState};
pub use local::{EVENT, Events, INTERRUPT, Local};
pub use registers::LocalState;

/// Address of the IOAPIC's registers.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Address of a local APIC's registers after reset.
pub const LOCAL_BASE: u64 = 0xfee0_0000;

/// How an interrupt message is delivered (SDM vol. 3A, 10.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Fixed,
    LowestPriority,
    Nmi,
    Init,
    StartUp,
    ExtInt,
}

impl Mode {
    /// Reads bits 8–10 of an ICR, LVT entry or message. SMI and reserved modes are nobody's business here.
    pub(crate) fn of(bits: u64) -> Option<Self> {
        Some(match bits >> 8 & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::ExtInt,
            _ => return None,
        })
    }
}

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Destination {
    /// This processor.
    Physical(u32),
    /// Those whose logical address matches; whether the number has x2APIC form.
    Logical(u32, bool),
    All,
    AllBut(u32),
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod stress;
