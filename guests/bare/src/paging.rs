//! Page tables of the test area (2 GiB to 3 GiB) and frames to map there.

use core::cell::UnsafeCell;

use crate::cpu;

/// Present.
pub const P: u64 = 1;
/// Writable.
pub const W: u64 = 2;
/// Ring 3 may.
pub const U: u64 = 4;
/// Accessed.
pub const A: u64 = 1 << 5;
/// Dirty.
pub const D: u64 = 1 << 6;
/// Large page (in a PD or PDPT entry).
pub const LARGE: u64 = 1 << 7;
/// Global.
pub const G: u64 = 1 << 8;
/// No execution.
pub const NX: u64 = 1 << 63;

/// Begin of the test area.
pub const TEST: u64 = 0x8000_0000;
/// Physical memory that belongs to tests: 16 MiB to 32 MiB.
pub const SCRATCH: u64 = 0x100_0000;

unsafe extern "C" {
    static mut boot_pdpt: [u64; 512];
    static mut test_pd: [u64; 512];
    static mut test_pt: [u64; 512];
}

#[repr(C, align(4096))]
struct Frames(UnsafeCell<[[u8; 4096]; 64]>);
// SAFETY: tests agree on who uses which.
unsafe impl Sync for Frames {}
static FRAMES: Frames = Frames(UnsafeCell::new([[0; 4096]; 64]));

/// Address (physical and linear) of frame `n` of 64.
pub fn frame(n: usize) -> u64 {
    assert!(n < 64);
    FRAMES.0.get() as u64 + n as u64 * 4096
}

/// The same memory where ring 3 may use it.
pub fn user(address: u64) -> u64 {
    address + 0x4000_0000
}

/// Entry of the page table that maps the `n`th 4 KiB page of the test area.
pub fn pte(n: usize) -> *mut u64 {
    // SAFETY: only the address is taken.
    unsafe { &raw mut test_pt[n] }
}

/// The `n`th entry of the test area's page directory (0 is the page table of [`pte`]).
pub fn pde(n: usize) -> *mut u64 {
    // SAFETY: only the address is taken.
    unsafe { &raw mut test_pd[n] }
}

/// The `n`th entry of the PDPT: GiB `n` of the address space (0 to 3 are in use).
pub fn pdpte(n: usize) -> *mut u64 {
    // SAFETY: only the address is taken.
    unsafe { &raw mut boot_pdpt[n] }
}

/// Reads an entry.
#[allow(clippy::not_unsafe_ptr_arg_deref, reason = "pte, pde and pdpte make these pointers")]
pub fn get(entry: *mut u64) -> u64 {
    // SAFETY: pte, pde and pdpte give valid pointers; the CPU writes them too.
    unsafe { entry.read_volatile() }
}

/// Writes an entry and drops `address` from the TLB.
#[allow(clippy::not_unsafe_ptr_arg_deref, reason = "pte, pde and pdpte make these pointers")]
pub fn set(entry: *mut u64, value: u64, address: u64) {
    // SAFETY: pte, pde and pdpte give valid pointers.
    unsafe { entry.write_volatile(value) };
    cpu::invlpg(address);
}

/// Maps the `n`th page of the test area; gives its linear address.
pub fn map(n: usize, physical: u64, flags: u64) -> u64 {
    let address = TEST + n as u64 * 4096;
    set(pte(n), physical | flags, address);
    address
}

/// Takes the `n`th page of the test area away; gives its linear address.
pub fn unmap(n: usize) -> u64 {
    map(n, 0, 0)
}

/// Reads memory that may fault.
pub fn read(address: u64) -> u64 {
    // SAFETY: the test has mapped it, or catches the fault.
    unsafe { (address as *const u64).read_volatile() }
}

/// Writes memory that may fault.
pub fn write(address: u64, value: u64) {
    // SAFETY: the test has mapped it, or catches the fault.
    unsafe { (address as *mut u64).write_volatile(value) };
}
