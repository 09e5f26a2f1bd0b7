//! Runs code in 32-bit protected mode without paging, as before long mode.

use core::arch::{asm, global_asm};

use crate::{
    segments::{self, CODE32, DATA, TSS},
    trap,
};

global_asm!(include_str!("legacy.s"));

unsafe extern "C" {
    static mut legacy_trap: LegacyTrap;
    static mut legacy_idt: [u64; 64];
    static legacy_stubs: u8;
    fn legacy_call(function: u64) -> u32;
}

/// An exception in legacy mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs)]
pub struct LegacyTrap {
    pub vector: u32,
    pub error: u32,
    pub eip: u32,
    pub cs: u32,
    pub eflags: u32,
    /// The task register: tells which task the exception belongs to.
    pub tr: u32,
}

/// Sets a gate of the legacy IDT for the calls that follow; `None` means the ordinary handler.
pub fn set_gate(vector: usize, gate: Option<u64>) {
    let stub = &raw const legacy_stubs as u64 + vector as u64 * 16;
    let gate = gate.unwrap_or(segments::gate(stub, CODE32, 0, 0x8e));
    // SAFETY: used in legacy mode only.
    unsafe { (&raw mut legacy_idt[vector]).write_volatile(gate) };
}

/// Calls 32-bit code at an address below 4 GiB; gives the exception that ended it, if any.
pub fn call(function: u64) -> Option<LegacyTrap> {
    // SAFETY: legacy_call saves and restores what Rust relies on; tables and task are put back here.
    unsafe {
        let trapped = legacy_call(function) != 0;
        trap::load_idt();
        let descriptor = segments::gdt(TSS);
        segments::set_gdt(TSS, descriptor & !(2 << 40));
        asm!("ltr {:x}", in(reg) TSS);
        asm!("mov ds, {0:e}", "mov es, {0:e}", in(reg) u32::from(DATA));
        trapped.then(|| (&raw const legacy_trap).read_volatile())
    }
}

/// Fills the legacy IDT.
pub fn init() {
    (0..64).for_each(|vector| set_gate(vector, None));
}
