//! Loops for ever with interrupts forbidden.
#![no_std]
#![no_main]

bare::guest!(main);

fn main() {
    bare::println!("spinning");
    // SAFETY: jumps to itself.
    unsafe { core::arch::asm!("cli", "2: jmp 2b", options(noreturn)) }
}
