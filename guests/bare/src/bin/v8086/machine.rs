//! A machine of 1 MiB for 8086 code, and what its code left.

use bare::{
    code,
    legacy::{self, LegacyTrap},
    paging::frame,
    segments::FREE,
    task::Task,
};

pub const VM: u32 = 1 << 17;
pub const NT: u32 = 1 << 14;
pub const IF: u32 = 1 << 9;
pub const IOPL3: u32 = 3 << 12;

/// Segments of 8086 code. Nothing else uses that memory by now.
pub const CS: u16 = 0x900;
pub const SS: u16 = 0x7e0;
pub const DS: u16 = 0x7f0;
pub const ES: u16 = 0x123;
pub const FS: u16 = 0x456;
pub const GS: u16 = 0x789;
pub const SP: u32 = 0x100;

/// The task that everything begins in, and two others.
pub const TASK_A: u16 = FREE;
pub const TASK_B: u16 = FREE + 16;
pub const TASK_C: u16 = FREE + 32;

/// What IRETD takes to virtual-8086 mode: EIP, CS, EFLAGS, ESP, SS, ES, DS, FS, GS.
#[unsafe(no_mangle)]
static mut V8086_FRAME: [u32; 9] = [0; 9];
/// What 32-bit code leaves.
#[unsafe(no_mangle)]
static mut V8086_RESULTS: [u32; 8] = [0; 8];

code! {
    enter: ".code32", "mov eax, 0x80", "ltr ax", "mov esp, offset V8086_FRAME", "iretd";
    // Leaves the data segments, its flags and its stack pointer, and goes back.
    handler: ".code32", "mov word ptr ss:[V8086_RESULTS], ds", "mov word ptr ss:[V8086_RESULTS + 2], es",
        "mov word ptr ss:[V8086_RESULTS + 4], fs", "mov word ptr ss:[V8086_RESULTS + 6], gs",
        "mov dword ptr ss:[V8086_RESULTS + 12], esp",
        "pushfd", "pop dword ptr ss:[V8086_RESULTS + 8]", "inc dword ptr ss:[V8086_RESULTS + 16]", "iretd";
}

/// The address of a handler that counts and goes back.
pub fn counting() -> u64 {
    handler()
}

pub fn result(n: usize) -> u32 {
    // SAFETY: written by code that has ended.
    unsafe { (&raw const V8086_RESULTS[n]).read_volatile() }
}

pub fn set_result(n: usize, value: u32) {
    // SAFETY: nothing runs.
    unsafe { (&raw mut V8086_RESULTS[n]).write_volatile(value) };
}

/// The `n`th word of the 8086 code's data segment.
pub fn data(n: usize) -> u16 {
    // SAFETY: low memory, which is mapped.
    unsafe { ((u64::from(DS) * 16) as *const u16).add(n).read_volatile() }
}

/// The `n`th double word from the top of task A's stack for privilege 0: GS is the first.
pub fn pushed(n: usize) -> u32 {
    // SAFETY: a test frame.
    unsafe { ((frame(12) + 4096) as *const u32).sub(n).read_volatile() }
}

/// Task A, fresh, with a stack for privilege 0.
pub fn task_a() -> Task {
    Task::wide(TASK_A, 10, 12, 0)
}

/// Puts 8086 code in its place, and zeros where it and others leave results.
pub fn place(code: u64) {
    // SAFETY: low memory that is ours, and code of at most 64 bytes with readable memory behind it.
    unsafe {
        ((u64::from(CS) * 16) as *mut u8).copy_from(code as *const u8, 64);
        ((u64::from(DS) * 16) as *mut u8).write_bytes(0, 64);
        (&raw mut V8086_RESULTS).write_volatile([0; 8]);
    }
}

/// Runs 8086 code in task A, with these flags besides VM, until an exception ends it.
pub fn run_in(flags: u32, code: u64) -> Option<LegacyTrap> {
    place(code);
    enter_frame([0, CS.into(), flags | VM | 2, SP, SS.into(), ES.into(), DS.into(), FS.into(), GS.into()])
}

/// The same in a fresh task A: the exception's vector, error code and IP.
pub fn ends(flags: u32, code: u64) -> Option<(u32, u32, u32)> {
    task_a();
    run_in(flags, code).map(|t| (t.vector, t.error, t.eip))
}

/// IRETD with this frame: EIP, CS, EFLAGS, ESP, SS and the data segments.
pub fn enter_frame(frame: [u32; 9]) -> Option<LegacyTrap> {
    // SAFETY: nothing runs.
    unsafe { (&raw mut V8086_FRAME).write_volatile(frame) };
    legacy::call(enter())
}

/// Whether it is the HLT at the end of a snippet that ended it, in virtual-8086 mode.
pub fn at_halt(trap: Option<LegacyTrap>) -> bool {
    trap.is_some_and(|t| {
        let at = (u64::from(CS) * 16 + u64::from(t.eip & 0xffff)) as *const u8;
        // SAFETY: low memory, which is mapped.
        let byte = unsafe { at.read_volatile() };
        (t.vector, t.error, t.cs, t.eflags & VM, byte) == (13, 0, CS.into(), VM, 0xf4)
    })
}
