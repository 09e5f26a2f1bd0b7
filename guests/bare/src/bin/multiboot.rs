//! Started by multiboot 1 (as ELF32): what the loader tells.
#![no_std]
#![no_main]

use bare::{
    acpi::{self, peek},
    println,
    report::Report,
};

bare::guest!(main);

core::arch::global_asm!(
    ".section .multiboot, \"a\"",
    ".balign 4",
    ".long 0x1badb002", // magic
    ".long 3",          // pages aligned, memory information
    ".long -(0x1badb002 + 3)",
    ".text",
);

fn main() {
    let mut t = Report::new("multiboot");
    let (magic, info) = acpi::boot_registers();
    t.eq("magic in EAX", magic, acpi::MULTIBOOT_MAGIC);
    let info = u64::from(info);
    let flags = peek::<u32>(info);
    t.eq("flags: memory, map", flags & 0x41, 0x41);
    t.within("lower memory, KiB", peek::<u32>(info + 4).into(), 512, 640);
    let upper = u64::from(peek::<u32>(info + 8)) << 10;
    t.within("upper memory", upper, 16 << 20, 4 << 30);
    if flags & 4 != 0 {
        let line: u64 = peek::<u32>(info + 16).into();
        let len = (0..256).take_while(|i| peek::<u8>(line + i) != 0).count();
        println!("command line of {len} bytes");
    }
    t.eq("modules", if flags & 8 != 0 { peek::<u32>(info + 20) } else { 0 }, 0);

    let (mut entry, len) = (u64::from(peek::<u32>(info + 48)), u64::from(peek::<u32>(info + 44)));
    let end = entry + len.min(4096);
    let (mut kernel, mut total) = (false, 0);
    while entry < end {
        let (base, size, kind) = (peek::<u64>(entry + 4), peek::<u64>(entry + 12), peek::<u32>(entry + 20));
        println!("map {base:#x} {size:#x} {kind}");
        if kind == 1 {
            total += size;
            kernel |= base <= 0x10_0000 && base + size > 0x20_0000;
        }
        entry += u64::from(peek::<u32>(entry)) + 4;
    }
    t.check("the map has the kernel's memory", kernel);
    t.within("RAM in the map", total, upper, upper + (4 << 30));
    t.end()
}
