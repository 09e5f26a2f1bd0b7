//! What the compiler expects of a platform, and how a guest ends.

use core::arch::{asm, global_asm};

use crate::{cpu, pic, println, segments, serial, trap};

/// Port of the debug-exit device: a value v ends the machine with status (v << 1) | 1.
const DEBUG_EXIT: u16 = 0xf4;

/// Prepares descriptors, exceptions and COM1; runs before a guest's main function.
pub fn start() {
    serial::init();
    segments::init(0);
    trap::init();
    // The firmware may have left its timer tick on.
    pic::unmask(0);
}

/// Ends the machine: 0 when all is well.
pub fn exit(value: u32) -> ! {
    cpu::outl(DEBUG_EXIT, value);
    // Without the device: shut down by triple fault rather than hang.
    trap::triple_fault()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    println!("FAIL panic: {info}");
    exit(1)
}

#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

// SAFETY: each does what C says of the function of this name; REP string instructions need no alignment.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: as memcpy's caller promises.
    unsafe { asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len => _) };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: as memset's caller promises.
    unsafe { asm!("rep stosb", inout("rdi") to => _, in("al") byte as u8, inout("rcx") len => _) };
    to
}

global_asm!(
    ".text",
    ".globl memmove, memcmp, bcmp",
    "memmove:",
    "mov rax, rdi",
    "mov rcx, rdx",
    "cmp rdi, rsi",
    "jbe 2f",
    "std",
    "lea rdi, [rdi + rcx - 1]",
    "lea rsi, [rsi + rcx - 1]",
    "2: rep movsb",
    "cld",
    "ret",
    "bcmp:",
    "memcmp:",
    "xor eax, eax",
    "mov rcx, rdx",
    "test rcx, rcx",
    "je 2f",
    "repe cmpsb",
    "movzx eax, byte ptr [rdi - 1]",
    "movzx ecx, byte ptr [rsi - 1]",
    "sub ecx, eax",
    "mov eax, ecx",
    "2: ret",
);
