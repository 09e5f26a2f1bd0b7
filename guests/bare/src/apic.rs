//! The local APIC, xAPIC and x2APIC.

use core::sync::atomic::{AtomicBool, Ordering::SeqCst};

use crate::cpu;

const BASE: u64 = 0xfee0_0000;
const APIC_BASE: u32 = 0x1b;

/// Registers, as xAPIC offsets.
pub const ID: u32 = 0x20;
/// Version.
pub const VERSION: u32 = 0x30;
/// Task priority.
pub const TPR: u32 = 0x80;
/// Processor priority.
pub const PPR: u32 = 0xa0;
/// Logical destination.
pub const LDR: u32 = 0xd0;
/// Destination format.
pub const DFR: u32 = 0xe0;
/// Spurious vector and enable.
pub const SVR: u32 = 0xf0;
/// In service, 8 registers.
pub const ISR: u32 = 0x100;
/// Requested, 8 registers.
pub const IRR: u32 = 0x200;
/// Error status.
pub const ESR: u32 = 0x280;
/// Interrupt command.
pub const ICR: u32 = 0x300;
/// Timer entry.
pub const LVT_TIMER: u32 = 0x320;
/// LINT0 entry.
pub const LVT_LINT0: u32 = 0x350;
/// LINT1 entry.
pub const LVT_LINT1: u32 = 0x360;
/// Error entry.
pub const LVT_ERROR: u32 = 0x370;
/// Timer initial count.
pub const TIMER_INITIAL: u32 = 0x380;
/// Timer current count.
pub const TIMER_CURRENT: u32 = 0x390;
/// Timer divider.
pub const TIMER_DIVIDE: u32 = 0x3e0;

/// Mask bit of a local vector table entry.
pub const MASKED: u32 = 1 << 16;

static X2: AtomicBool = AtomicBool::new(false);

/// Reads a register.
pub fn read(register: u32) -> u32 {
    if X2.load(SeqCst) {
        cpu::rdmsr(0x800 + (register >> 4)) as u32
    } else {
        // SAFETY: the LAPIC's page, identity-mapped.
        unsafe { ((BASE + u64::from(register)) as *const u32).read_volatile() }
    }
}

/// Writes a register.
pub fn write(register: u32, value: u32) {
    if X2.load(SeqCst) {
        // SAFETY: LAPIC registers do not change what our code may do.
        unsafe { cpu::wrmsr(0x800 + (register >> 4), value.into()) };
    } else {
        // SAFETY: the LAPIC's page, identity-mapped.
        unsafe { ((BASE + u64::from(register)) as *mut u32).write_volatile(value) };
    }
}

/// Ends the interrupt in service.
pub fn eoi() {
    write(0xb0, 0);
}

/// This CPU's APIC identifier.
pub fn id() -> u32 {
    let id = read(ID);
    if X2.load(SeqCst) { id } else { id >> 24 }
}

/// Enables this CPU's LAPIC with spurious vector 0xff, all local entries masked but LINT0 as it was.
pub fn enable() {
    write(SVR, 0x1ff);
    write(TPR, 0);
    write(LVT_TIMER, MASKED);
    write(LVT_ERROR, MASKED);
}

/// Goes to x2APIC mode (this CPU; all CPUs that use these functions must).
pub fn enable_x2() {
    // SAFETY: from here on the registers are MSRs, which X2 says.
    unsafe { cpu::wrmsr(APIC_BASE, cpu::rdmsr(APIC_BASE) | 0xc00) };
    X2.store(true, SeqCst);
}

/// Back from x2APIC mode to xAPIC mode, by way of off.
pub fn disable_x2() {
    let base = cpu::rdmsr(APIC_BASE);
    // SAFETY: off, then on in xAPIC mode.
    unsafe {
        cpu::wrmsr(APIC_BASE, base & !0xc00);
        cpu::wrmsr(APIC_BASE, base & !0xc00 | 0x800);
    }
    X2.store(false, SeqCst);
}

/// Sends an IPI: low half of ICR (vector, mode, shorthand) to an APIC identifier.
pub fn ipi(destination: u32, command: u32) {
    if X2.load(SeqCst) {
        // SAFETY: as write().
        unsafe { cpu::wrmsr(0x830, u64::from(destination) << 32 | u64::from(command)) };
    } else {
        write(0x310, destination << 24);
        write(ICR, command);
        for _ in 0..100_000 {
            if read(ICR) & 1 << 12 == 0 {
                break;
            }
        }
    }
}

/// Whether a bit of the 256-bit register that begins at `first` (ISR, TMR, IRR) is set.
pub fn bit(first: u32, vector: u64) -> bool {
    read(first + (vector as u32 >> 5) * 0x10) >> (vector & 31) & 1 != 0
}
