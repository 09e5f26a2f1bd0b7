//! The two 8259 PICs and the IOAPIC.

use crate::cpu::{inb, outb};

/// First vector of the PICs.
pub const VECTOR: u64 = 0x20;

/// Initialises both PICs (vectors 0x20 to 0x2f, edge, normal EOI), all lines masked.
pub fn init() {
    for (port, vector, cascade) in [(0x20, 0x20, 4), (0xa0, 0x28, 2)] {
        outb(port, 0x11);
        outb(port + 1, vector);
        outb(port + 1, cascade);
        outb(port + 1, 1);
        outb(port + 1, 0xff);
    }
}

/// Masks all lines but those set in `lines`.
pub fn unmask(lines: u16) {
    outb(0x21, !lines as u8);
    outb(0xa1, !(lines >> 8) as u8);
}

/// Requested lines.
pub fn requested() -> u16 {
    outb(0x20, 0x0a);
    outb(0xa0, 0x0a);
    u16::from(inb(0x20)) | u16::from(inb(0xa0)) << 8
}

/// Lines in service.
pub fn in_service() -> u16 {
    outb(0x20, 0x0b);
    outb(0xa0, 0x0b);
    u16::from(inb(0x20)) | u16::from(inb(0xa0)) << 8
}

/// The IOAPIC's usual address.
const IOAPIC: u64 = 0xfec0_0000;

/// Reads a register of the IOAPIC.
pub fn ioapic(register: u32) -> u32 {
    // SAFETY: identity-mapped device registers.
    unsafe {
        (IOAPIC as *mut u32).write_volatile(register);
        ((IOAPIC + 0x10) as *const u32).read_volatile()
    }
}

/// Writes a register of the IOAPIC.
pub fn set_ioapic(register: u32, value: u32) {
    // SAFETY: as ioapic().
    unsafe {
        (IOAPIC as *mut u32).write_volatile(register);
        ((IOAPIC + 0x10) as *mut u32).write_volatile(value);
    }
}

/// Mask bit of a redirection entry.
pub const MASKED: u32 = 1 << 16;
/// Level-triggered.
pub const LEVEL: u32 = 1 << 15;
/// Remote IRR: in service at a LAPIC.
pub const REMOTE: u32 = 1 << 14;
/// Logical destination.
pub const LOGICAL: u32 = 1 << 11;

/// Routes an IOAPIC pin: low half (vector and flags), destination.
pub fn route(pin: u32, low: u32, destination: u32) {
    set_ioapic(0x10 + pin * 2, MASKED);
    set_ioapic(0x11 + pin * 2, destination << 24);
    set_ioapic(0x10 + pin * 2, low);
}

/// The low half of a pin's redirection entry.
pub fn routed(pin: u32) -> u32 {
    ioapic(0x10 + pin * 2)
}
