//! Exceptions while an exception is delivered (SDM 3A, 6.15).

use bare::{
    code,
    paging::{read, unmap},
    report::Report,
    segments::{self, CODE, CODE32, DATA, IST_EXCEPTION, tss},
    trap::{self, DE, DF, Frame, GP, NP, PF, SS, TS, UD, run as enter},
};

code! {
    load: "mov rax, [rdi]";
    divide: "xor ebx, ebx", "div ebx";
    non_canonical: "mov rax, [rdx]";
    int_0x41: "int 0x41";
    undefined: "ud2";
}

const PRESENT: u8 = 0x8e;
const ABSENT: u8 = 0x0e;

/// Runs `code` with a gate changed, and puts the gate back.
fn with_gate(vector: u64, target: u64, selector: u16, ist: u8, access: u8, frame: &Frame) -> (u64, u64) {
    let gate = trap::gate(vector);
    trap::set_gate(vector, target, selector, ist, access);
    let trap = enter(frame);
    trap::restore_gate(vector, gate);
    (trap.frame.vector, trap.frame.error)
}

/// What QEMU puts into the error code.
const TIMES_16: &str = "the error code is the vector times 16";

pub fn run(t: &mut Report) {
    let absent = unmap(0);
    let page_fault = Frame { rdi: absent, ..Frame::kernel(load()) };
    let protection = Frame { rdx: 1 << 63, ..Frame::kernel(non_canonical()) };
    let division = Frame::kernel(divide());
    let invalid = Frame::kernel(undefined());
    let software = Frame::kernel(int_0x41());

    let got = with_gate(PF, trap::stub(PF), CODE, 1, ABSENT, &page_fault);
    t.eq("page fault, gate absent", got, (DF, 0));
    let got = with_gate(GP, trap::stub(GP), CODE, 1, ABSENT, &protection);
    t.eq("protection, gate absent", got, (DF, 0));
    let got = with_gate(DE, trap::stub(DE), CODE, 1, ABSENT, &division);
    t.eq("divide error, gate absent", got, (DF, 0));
    let got = with_gate(UD, trap::stub(UD), CODE, 1, ABSENT, &invalid);
    let why = "the EXT bit is not set";
    t.tcg(why).eq("invalid opcode, gate absent", got, (NP, UD * 8 + 3));
    let got = with_gate(0x41, trap::stub(0x41), CODE, 1, ABSENT, &software);
    t.tcg(TIMES_16).eq("INT n, gate absent", got, (NP, 0x41 * 8 + 2));
    let got = with_gate(0x41, trap::stub(0x41), 0, 1, PRESENT, &software);
    t.eq("INT n, null selector", got, (GP, 0));
    let got = with_gate(0x41, trap::stub(0x41), DATA, 1, PRESENT, &software);
    t.eq("INT n, data selector", got, (GP, DATA.into()));
    let got = with_gate(0x41, trap::stub(0x41), CODE32, 1, PRESENT, &software);
    t.eq("INT n, 32-bit code selector", got, (GP, CODE32.into()));
    let got = with_gate(0x41, trap::stub(0x41), 0x3f8, 1, PRESENT, &software);
    t.eq("INT n, selector beyond the GDT", got, (GP, 0x3f8));
    let got = with_gate(0x41, trap::stub(0x41), CODE, 1, 0x85, &software);
    t.tcg(TIMES_16).eq("INT n, not a 64-bit gate", got, (GP, 0x41 * 8 + 2));
    let got = with_gate(0x41, 1 << 63, CODE, 1, PRESENT, &software);
    let why = "the target of a gate is not checked";
    t.tcg(why).eq("INT n, target not canonical", got, (GP, 0));

    stacks(t, absent, &page_fault, &invalid);
    limits(t, &software);
}

/// Bad stacks, given by IST 5.
fn stacks(t: &mut Report, absent: u64, page_fault: &Frame, invalid: &Frame) {
    tss().ist[4] = absent + 0x800;
    let got = with_gate(UD, trap::stub(UD), CODE, 5, PRESENT, invalid);
    t.eq("invalid opcode, absent stack", got, (PF, 2));
    let got = with_gate(PF, trap::stub(PF), CODE, 5, PRESENT, page_fault);
    t.eq("page fault, absent stack", got, (DF, 0));
    tss().ist[4] = 1 << 63;
    let got = with_gate(UD, trap::stub(UD), CODE, 5, PRESENT, invalid);
    let why = "a stack address is not checked";
    t.tcg(why).check("invalid opcode, stack not canonical", got.0 == SS && got.1 <= 1);
    let got = with_gate(PF, trap::stub(PF), CODE, 5, PRESENT, page_fault);
    t.eq("page fault, stack not canonical", got, (DF, 0));

    // A stack in the TSS beyond its limit.
    let old = segments::gdt(segments::TSS);
    let base = tss() as *const _ as u64;
    let set = |limit| {
        segments::set_system(0, segments::TSS, base, limit, 0x89);
        load_task();
    };
    set(0x24 + 8 * (u32::from(IST_EXCEPTION) + 3) - 1);
    let got = with_gate(0x41, trap::stub(0x41), CODE, 5, 0xee, &Frame::kernel(int_0x41()));
    t.check("IST beyond the TSS limit", got.0 == TS && got.1 & !1 == segments::TSS.into());
    set(old as u32 & 0xffff);
    t.eq("TSS busy again", segments::gdt(segments::TSS) >> 40 & 15, 0xb);
    _ = read(base);
}

fn load_task() {
    // SAFETY: the descriptor was just made available.
    unsafe { core::arch::asm!("ltr {:x}", in(reg) segments::TSS) };
}

/// A vector beyond the limit of the IDT.
fn limits(t: &mut Report, software: &Frame) {
    let whole = segments::TablePointer { limit: 4095, base: idt_base() };
    let short = segments::TablePointer { limit: 0x41 * 16 + 14, base: whole.base };
    // SAFETY: the exceptions are within the limit.
    unsafe { core::arch::asm!("lidt [{}]", in(reg) &short) };
    let trap = enter(software);
    trap::load_idt();
    t.tcg(TIMES_16).eq("vector beyond the IDT", (trap.frame.vector, trap.frame.error), (GP, 0x41 * 8 + 2));
    t.eq("its RIP", trap.frame.rip, software.rip);
}

fn idt_base() -> u64 {
    let mut pointer = segments::TablePointer { limit: 0, base: 0 };
    // SAFETY: ten bytes of ours.
    unsafe { core::arch::asm!("sidt [{}]", in(reg) &mut pointer) };
    pointer.base
}
