//! What every bare-metal guest stands on: start-up to long mode, exceptions that a test can catch, a report on COM1.
//!
//! Address space of a guest (one PML4 entry, made in `boot.s`):
//!
//! | from    | what                                                                   |
//! |---------|------------------------------------------------------------------------|
//! | 0       | the first GiB of memory, identity-mapped, supervisor                     |
//! | 1 GiB   | the same memory again, for ring 3 ([`paging::user`])                     |
//! | 2 GiB   | empty: what a test maps ([`paging::map`])                                |
//! | 3 GiB   | identity-mapped, uncached: device registers                              |
#![no_std]

pub mod acpi;
pub mod apic;
pub mod cpu;
pub mod legacy;
pub mod paging;
pub mod pic;
pub mod report;
pub mod runtime;
pub mod segments;
pub mod serial;
pub mod smp;
pub mod task;
pub mod timer;
pub mod trap;

core::arch::global_asm!(include_str!("boot.s"));
core::arch::global_asm!(include_str!("trap.s"));

/// Names the function that a guest starts with, once the machine is in long mode.
#[macro_export]
macro_rules! guest {
    ($main:path) => {
        #[unsafe(no_mangle)]
        extern "C" fn guest_main() -> ! {
            $crate::runtime::start();
            let main: fn() = $main;
            main();
            $crate::runtime::exit(0)
        }
    };
}
