//! GDT and TSS of each CPU.

use core::{arch::asm, cell::UnsafeCell, mem::size_of};

/// 64-bit code, ring 0.
pub const CODE: u16 = 0x08;
/// Data, ring 0.
pub const DATA: u16 = 0x10;
/// 32-bit code, ring 3.
pub const USER_CODE32: u16 = 0x1b;
/// Data, ring 3.
pub const USER_DATA: u16 = 0x23;
/// 64-bit code, ring 3.
pub const USER_CODE: u16 = 0x2b;
/// 32-bit code, ring 0.
pub const CODE32: u16 = 0x38;
/// TSS of the CPU.
pub const TSS: u16 = 0x40;
/// First GDT slot that is free for tests; the last is 0x1f8.
pub const FREE: u16 = 0x80;

/// 64-bit task state segment (SDM 3A, 8.7), with an I/O bitmap for ports 0 to 0x3ff.
#[repr(C, packed(4))]
pub struct TaskState {
    reserved0: u32,
    /// Stacks of rings 0 to 2.
    pub rsp: [u64; 3],
    reserved1: u64,
    /// Interrupt stack table; IST1 is `ist[0]`.
    pub ist: [u64; 7],
    reserved2: u64,
    reserved3: u16,
    /// Offset of the I/O bitmap; beyond the limit means none.
    pub io_map_base: u16,
    /// One bit per port: 1 forbids it.
    pub io_map: [u8; 129],
    end: [u8; 3],
}

const STACK: usize = 8192;

/// IST index of exceptions, interrupts, NMI and double fault.
pub const IST_EXCEPTION: u8 = 1;
/// IST index of interrupts.
pub const IST_INTERRUPT: u8 = 2;
/// IST index of NMIs.
pub const IST_NMI: u8 = 3;
/// IST index of double faults.
pub const IST_DOUBLE: u8 = 4;

#[repr(C, align(16))]
struct PerCpu {
    stacks: [[u8; STACK]; 5],
    tss: TaskState,
    gdt: [u64; 64],
}

struct Cpus([UnsafeCell<PerCpu>; 2]);
// SAFETY: each CPU touches only its own entry.
unsafe impl Sync for Cpus {}

#[allow(clippy::declare_interior_mutable_const, reason = "copied into the array, never used itself")]
const NEW_CPU: UnsafeCell<PerCpu> = UnsafeCell::new(PerCpu {
    stacks: [[0; STACK]; 5],
    tss: TaskState {
        reserved0: 0,
        rsp: [0; 3],
        reserved1: 0,
        ist: [0; 7],
        reserved2: 0,
        reserved3: 0,
        io_map_base: size_of::<TaskState>() as u16,
        io_map: [0xff; 129],
        end: [0xff; 3],
    },
    gdt: [0; 64],
});
static CPUS: Cpus = Cpus([NEW_CPU; 2]);

/// A pseudo-descriptor for LGDT and LIDT.
#[repr(C, packed)]
pub struct TablePointer {
    /// Bytes less one.
    pub limit: u16,
    /// Linear address.
    pub base: u64,
}

unsafe extern "C" {
    static boot_gdt: [u64; 64];
}

/// Loads a GDT and TSS of its own on this CPU (0 or 1).
pub fn init(cpu: usize) {
    let this = CPUS.0[cpu].get();
    // SAFETY: each CPU calls this once, for its own entry; the tables live for ever.
    unsafe {
        (*this).gdt = boot_gdt;
        let stacks = &raw const (*this).stacks as u64;
        for i in 0..4 {
            (*this).tss.ist[i] = stacks + (i as u64 + 1) * STACK as u64;
        }
        (*this).tss.rsp[0] = stacks + 5 * STACK as u64;
        let base = &raw const (*this).tss as u64;
        set_system(cpu, TSS, base, size_of::<TaskState>() as u32 - 1, 0x89);
        let pointer = TablePointer { limit: 511, base: &raw const (*this).gdt as u64 };
        asm!("lgdt [{}]", in(reg) &pointer);
        asm!("ltr {:x}", in(reg) TSS);
        // After a reset the LDT is usable, with base 0.
        asm!("lldt {:x}", in(reg) 0u16);
        asm!("mov ds, {0:e}", "mov es, {0:e}", "mov ss, {0:e}", in(reg) u32::from(DATA));
    }
}

/// The first CPU's TSS.
#[allow(clippy::mut_from_ref)]
pub fn tss() -> &'static mut TaskState {
    // SAFETY: only the first CPU, in straight-line test code, uses it.
    unsafe { &mut (*CPUS.0[0].get()).tss }
}

/// A descriptor of the first CPU's GDT.
pub fn gdt(selector: u16) -> u64 {
    // SAFETY: volatile, since the CPU itself sets accessed and busy bits.
    unsafe { (&raw const (*CPUS.0[0].get()).gdt[usize::from(selector >> 3)]).read_volatile() }
}

/// Sets a descriptor of the first CPU's GDT.
pub fn set_gdt(selector: u16, descriptor: u64) {
    // SAFETY: as gdt().
    unsafe { (&raw mut (*CPUS.0[0].get()).gdt[usize::from(selector >> 3)]).write_volatile(descriptor) }
}

/// Linear address of a descriptor of the first CPU's GDT.
pub fn gdt_address(selector: u16) -> u64 {
    // SAFETY: only the address is taken.
    unsafe { &raw const (*CPUS.0[0].get()).gdt[usize::from(selector >> 3)] as u64 }
}

/// Makes a code or data descriptor: access byte, and the flags nibble (G, D/B, L, AVL).
pub const fn segment(base: u32, limit: u32, access: u8, flags: u8) -> u64 {
    let (base, limit) = (base as u64, limit as u64);
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | (access as u64) << 40
        | (limit >> 16 & 15) << 48
        | (flags as u64) << 52
        | (base >> 24) << 56
}

/// Sets a 16-byte system descriptor (TSS, LDT) in the GDT of a CPU.
pub fn set_system(cpu: usize, selector: u16, base: u64, limit: u32, access: u8) {
    let slot = usize::from(selector >> 3);
    // SAFETY: each CPU touches only its own entry.
    unsafe {
        (*CPUS.0[cpu].get()).gdt[slot] = segment(base as u32, limit, access, 0);
        (*CPUS.0[cpu].get()).gdt[slot + 1] = base >> 32;
    }
}

/// A gate descriptor's first half: target, selector, IST or parameter count, access byte.
pub const fn gate(offset: u64, selector: u16, count: u8, access: u8) -> u64 {
    (offset & 0xffff)
        | (selector as u64) << 16
        | (count as u64) << 32
        | (access as u64) << 40
        | (offset >> 16 & 0xffff) << 48
}
