//! Loads of segment registers and their checks, limits and types in use, LAR, LSL, VERR, VERW, LDT.

use core::arch::asm;

use bare::{
    code,
    paging::{P, U, W, frame, map},
    report::Report,
    segments::{DATA, FREE, TSS, segment, set_gdt, set_system},
    trap::{self, Frame, GP, NP, SS, UD, catch},
};

code! {
    mov_ds: "mov ds, eax";
    mov_ss: "mov ss, eax";
    mov_ds32: ".code32", "mov ds, eax";
    mov_ss32: ".code32", "mov ss, eax";
    mov_cs: ".byte 0x8e, 0xc8";
    load_ds32: ".code32", "mov ds, eax", "mov ebx, [edi]";
    store_ds32: ".code32", "mov ds, eax", "mov [edi], ebx";
    load_ss32: ".code32", "mov ss, eax", "mov ebx, ss:[edi]";
    load_cs32: ".code32", "mov ebx, cs:[edi]";
    store_cs32: ".code32", "mov cs:[edi], ebx";
    load_ds64: "mov ds, eax", "mov ebx, [rdi]";
    read_ds: "mov eax, ds";
}

const SLOT: u16 = FREE;
/// An error code's part of a selector.
const fn bits(selector: u16) -> u64 {
    (selector & !3) as u64
}

fn kernel(code: u64, rax: u16) -> Option<trap::Trap> {
    Some(trap::run(&Frame { rax: rax.into(), ..Frame::kernel(code) }))
}

fn user(code: u64, rax: u16) -> Option<trap::Trap> {
    Some(trap::run(&Frame { rax: rax.into(), ..Frame::user(code) }))
}

pub fn run(t: &mut Report) {
    data(t);
    stack(t);
    limits(t);
    types(t);
    questions(t);
    ldt(t);
}

/// Access bytes: data and code, DPL by the caller.
const READ_ONLY: u8 = 0x90;
const WRITABLE: u8 = 0x92;
const EXECUTE_ONLY: u8 = 0x98;
const READABLE_CODE: u8 = 0x9a;
const CONFORMING: u8 = 0x9e;

fn with(access: u8) {
    set_gdt(SLOT, segment(0, 0xfffff, access, 0xc));
}

fn data(t: &mut Report) {
    t.trap("DS, null", kernel(mov_ds(), 3), UD, 0);
    t.trap("DS, null, ring 3", user(mov_ds(), 3), UD, 0);
    for (name, access, rpl, ring3, expected) in [
        ("DS, data", WRITABLE, 0, false, (UD, 0)),
        ("DS, read-only data", READ_ONLY, 0, false, (UD, 0)),
        ("DS, readable code", READABLE_CODE, 0, false, (UD, 0)),
        ("DS, execute-only code", EXECUTE_ONLY, 0, false, (GP, bits(SLOT))),
        ("DS, absent", WRITABLE & 0x7f, 0, false, (NP, bits(SLOT))),
        ("DS, system", 0x82, 0, false, (GP, bits(SLOT))),
        ("DS, RPL 3 of DPL 0", WRITABLE, 3, false, (GP, bits(SLOT))),
        ("DS, ring 3 of DPL 0", WRITABLE, 0, true, (GP, bits(SLOT))),
        ("DS, ring 3 of DPL 3", WRITABLE | 0x60, 3, true, (UD, 0)),
        ("DS, RPL 3 of conforming code", CONFORMING, 3, true, (UD, 0)),
    ] {
        with(access);
        let trap = if ring3 { user(mov_ds(), SLOT | rpl) } else { kernel(mov_ds(), SLOT | rpl) };
        t.trap(name, trap, expected.0, expected.1);
    }
    t.trap("DS, beyond the GDT", kernel(mov_ds(), 0x201), GP, 0x200);
    t.trap("DS, no LDT", kernel(mov_ds(), 0x84), GP, 0x84);
    t.trap("CS by MOV", kernel(mov_cs(), DATA), UD, 0);
    t.eq("CS by MOV, RIP", kernel(mov_cs(), DATA).map(|t| t.frame.rip), Some(mov_cs()));
    with(WRITABLE);
    kernel(mov_ds(), SLOT);
    t.eq("a load sets the accessed bit", bare::segments::gdt(SLOT) >> 40 & 0xff, u64::from(WRITABLE | 1));
    with(WRITABLE & 0x7f);
    kernel(mov_ds(), SLOT);
    t.eq("a failing load does not", bare::segments::gdt(SLOT) >> 40 & 0xff, u64::from(WRITABLE & 0x7f));
    // SAFETY: DS means nothing here.
    unsafe { asm!("mov ds, {:e}", in(reg) u32::from(DATA)) };
    let f = trap::run(&Frame::user(read_ds())).frame;
    t.eq("IRET to ring 3 clears a DS of DPL 0", f.rax & 0xffff, 0);
    // SAFETY: as before.
    let f = unsafe {
        asm!("mov ds, {:e}", in(reg) 0x23);
        trap::run(&Frame::user(read_ds())).frame
    };
    t.eq("IRET to ring 3 keeps a DS of DPL 3", f.rax & 0xffff, 0x23);
}

fn stack(t: &mut Report) {
    t.trap("SS, null, 64-bit ring 0", kernel(mov_ss(), 0), UD, 0);
    t.trap("SS, null, 64-bit ring 3", user(mov_ss(), 3), GP, 0);
    let f = Frame { rax: 0, ..Frame::kernel32(mov_ss32()) };
    t.trap("SS, null, compatibility mode", Some(trap::run(&f)), GP, 0);
    for (name, access, rpl, expected) in [
        ("SS, data", WRITABLE, 0, (UD, 0)),
        ("SS, read-only data", READ_ONLY, 0, (GP, bits(SLOT))),
        ("SS, code", READABLE_CODE, 0, (GP, bits(SLOT))),
        ("SS, absent", WRITABLE & 0x7f, 0, (SS, bits(SLOT))),
        ("SS, RPL 3 in ring 0", WRITABLE, 3, (GP, bits(SLOT))),
        ("SS, DPL 3 in ring 0", WRITABLE | 0x60, 0, (GP, bits(SLOT))),
    ] {
        with(access);
        t.trap(name, kernel(mov_ss(), SLOT | rpl), expected.0, expected.1);
    }
    let f = Frame { rax: 3, ..Frame::user32(mov_ds32()) };
    t.trap("DS, null, compatibility mode", Some(trap::run(&f)), UD, 0);
}

/// Limits count in compatibility mode and not in 64-bit mode.
fn limits(t: &mut Report) {
    let why = "segment limits are not checked";
    let page = map(0, frame(0), P | W | U) as u32;
    let go = |code: u64, rdi: u64| Some(trap::run(&Frame { rax: SLOT.into(), rdi, ..Frame::kernel32(code) }));
    set_gdt(SLOT, segment(page, 0x7ff, WRITABLE, 4));
    t.trap("limit, the last double word", go(load_ds32(), 0x7fc), UD, 0);
    t.tcg(why).trap("limit, one byte over", go(load_ds32(), 0x7fd), GP, 0);
    t.tcg(why).trap("limit, far over", go(store_ds32(), 0x4000_0000), GP, 0);
    t.tcg(why).trap("limit, stack segment", go(load_ss32(), 0x7fd), SS, 0);
    t.trap(
        "limit, base is added",
        {
            // SAFETY: the test frame.
            unsafe { ((frame(0) + 0x10) as *mut u32).write_volatile(0xabcd) };
            go(load_ds32(), 0x10)
        },
        UD,
        0,
    );
    t.eq("what was read", go(load_ds32(), 0x10).map(|t| t.frame.rbx), Some(0xabcd));
    let f = Frame { rax: SLOT.into(), rdi: u64::from(page) + 0x10, ..Frame::kernel(load_ds64()) };
    let trap = trap::run(&f);
    t.eq("64-bit mode knows neither base nor limit", (trap.frame.vector, trap.frame.rbx), (UD, 0xabcd));

    set_gdt(SLOT, segment(page.wrapping_sub(0xffff_f000), 0xfffff, WRITABLE, 0xc));
    t.eq("base and offset wrap at 4 GiB", go(load_ds32(), 0xffff_f010).map(|t| t.frame.rbx), Some(0xabcd));
    // Expand-down: what is above the limit, to 64 KiB or 4 GiB.
    set_gdt(SLOT, segment(page, 0x0f, 0x96, 4));
    t.trap("expand-down, above the limit", go(load_ds32(), 0x10), UD, 0);
    t.tcg(why).trap("expand-down, at the limit", go(load_ds32(), 0x0f), GP, 0);
    set_gdt(SLOT, segment(page, 0x0f, 0x96, 0));
    t.tcg(why).trap("expand-down, 16-bit, above 64 KiB", go(load_ds32(), 0xfffd), GP, 0);
    set_gdt(SLOT, segment(0, 0, WRITABLE, 0xc));
    t.tcg(why).trap("limit in pages", go(load_ds32(), 0x1000), GP, 0);
}

fn types(t: &mut Report) {
    let why = "segment types are not checked in use";
    let page = map(0, frame(0), P | W | U);
    let go = |code: u64, selector: u16| {
        Some(trap::run(&Frame { rax: selector.into(), rdi: page, ..Frame::kernel32(code) }))
    };
    with(READ_ONLY);
    t.trap("read-only data, load", go(load_ds32(), SLOT), UD, 0);
    t.tcg(why).trap("read-only data, store", go(store_ds32(), SLOT), GP, 0);
    with(READABLE_CODE);
    t.tcg(why).trap("code by DS, store", go(store_ds32(), SLOT), GP, 0);
    t.tcg(why).trap("null DS, load", go(load_ds32(), 0), GP, 0);
    t.trap("code, load", go(load_cs32(), 0), UD, 0);
    t.tcg(why).trap("code, store", go(store_cs32(), 0), GP, 0);
    set_gdt(SLOT, segment(0, 0xfffff, EXECUTE_ONLY, 0xc));
    let f = Frame { cs: SLOT.into(), rdi: page, ..Frame::kernel32(load_cs32()) };
    t.tcg(why).trap("execute-only code, load", Some(trap::run(&f)), GP, 0);
    t.eq("its code", trap::run(&f).frame.cs, u64::from(SLOT));
}

/// LAR (0), LSL (1), VERR (2), VERW (3): the value, or `None` with ZF clear.
fn ask(what: u32, selector: u16) -> Option<u32> {
    let (mut value, selector): (u32, u32) = (0, selector.into());
    let zf: u8;
    // SAFETY: these only look.
    unsafe {
        match what {
            0 => asm!("lar {0:e}, {1:e}", "setz {2}", inout(reg) value, in(reg) selector, out(reg_byte) zf),
            1 => asm!("lsl {0:e}, {1:e}", "setz {2}", inout(reg) value, in(reg) selector, out(reg_byte) zf),
            2 => asm!("verr {0:x}", "setz {1}", in(reg) selector, out(reg_byte) zf),
            _ => asm!("verw {0:x}", "setz {1}", in(reg) selector, out(reg_byte) zf),
        }
    }
    (zf != 0).then_some(value)
}

fn questions(t: &mut Report) {
    let all = |access: u8, rpl: u16| {
        set_gdt(SLOT, segment(0x1234_5678, 0x4321, access, 0xc));
        core::array::from_fn::<_, 4, _>(|what| ask(what as u32, SLOT | rpl))
    };
    let rights = |access: u8| Some(0xc0_0000 | u32::from(access) << 8);
    let limit = Some(0x0432_1fff);
    t.eq("questions on data", all(WRITABLE, 0), [rights(WRITABLE), limit, Some(0), Some(0)]);
    t.eq("on read-only data", all(READ_ONLY, 0), [rights(READ_ONLY), limit, Some(0), None]);
    t.eq("on readable code", all(READABLE_CODE, 0), [rights(READABLE_CODE), limit, Some(0), None]);
    t.eq("on execute-only code", all(EXECUTE_ONLY, 0), [rights(EXECUTE_ONLY), limit, None, None]);
    t.eq("on data of DPL 0 with RPL 3", all(WRITABLE, 3), [None; 4]);
    t.eq("on conforming code with RPL 3", all(CONFORMING, 3), [rights(CONFORMING), limit, Some(0), None]);
    let absent = WRITABLE & 0x7f;
    t.check("on absent data", all(absent, 0)[..2] == [rights(absent), limit]);
    t.eq("on a TSS", all(0x89, 0), [rights(0x89), limit, None, None]);
    t.eq("on an LDT", all(0x82, 0), [rights(0x82), limit, None, None]);
    t.eq("on a call gate", all(0x8c, 0), [rights(0x8c), None, None, None]);
    t.eq("on an interrupt gate", all(0x8e, 0), [None; 4]);
    t.tcg("valid").eq("on a 16-bit TSS in long mode", all(0x81, 0), [None; 4]);
    t.eq("on null", [ask(0, 0), ask(1, 3), ask(2, 0), ask(3, 0)], [None; 4]);
    t.eq("beyond the GDT", [ask(0, 0x400), ask(1, 0x400), ask(2, 0x400), ask(3, 0x400)], [None; 4]);
}

fn ldt(t: &mut Report) {
    // SAFETY: nothing of ours is in an LDT.
    let load = |selector: u16| catch(|| unsafe { asm!("lldt {:x}", in(reg) selector) });
    let table = frame(1) as *mut u64;
    // SAFETY: a test frame.
    unsafe { table.add(1).write_volatile(segment(0, 0xfffff, WRITABLE, 0xc)) };
    set_system(0, SLOT, frame(1), 15, 0x82);
    t.no_trap("LLDT", load(SLOT));
    let sldt: u64;
    // SAFETY: only looks.
    unsafe { asm!("sldt {}", out(reg) sldt) };
    t.eq("SLDT", sldt, SLOT.into());
    t.trap("DS from the LDT", kernel(mov_ds(), 0x0c), UD, 0);
    t.trap("DS beyond the LDT", kernel(mov_ds(), 0x14), GP, 0x14);
    set_system(0, SLOT, frame(1), 15, 0x02);
    t.trap("LLDT, absent", load(SLOT), NP, bits(SLOT));
    t.trap("LLDT, data", load(DATA), GP, bits(DATA));
    t.trap("LLDT, from an LDT", load(0x0c), GP, 0x0c);
    t.no_trap("LLDT, null", load(0));
    t.trap("DS without an LDT", kernel(mov_ds(), 0x0c), GP, 0x0c);
    // SAFETY: faults.
    t.trap("LTR, busy", catch(|| unsafe { asm!("ltr {:x}", in(reg) TSS) }), GP, bits(TSS));
    if !t.avoided_on_tcg("LTR, null", "it is accepted") {
        // SAFETY: faults.
        t.trap("LTR, null", catch(|| unsafe { asm!("ltr {:x}", in(reg) 0u16) }), GP, 0);
    }
    // SAFETY: the CPU's own DS again.
    unsafe { asm!("mov ds, {:e}", in(reg) u32::from(DATA)) };
}
