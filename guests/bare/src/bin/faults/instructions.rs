//! Exceptions that single instructions raise by themselves.

use core::arch::asm;

use bare::{
    code,
    cpu::{self, CR0_AM, CR0_TS},
    paging::{self, P, U, W, map},
    report::Report,
    trap::{self, AC, BP, DE, Frame, GP, MF, NM, OF, SS, Trap, UD, XM},
};

code! {
    at_ud2: "ud2";
    ud1: "ud1 eax, eax";
    push_es: ".byte 0x06";
    lock_mov: ".byte 0xf0, 0x89, 0x07";
    lock_add_reg: ".byte 0xf0, 0x01, 0xc0";
    long_call: ".byte 0x9a, 0, 0, 0, 0, 8, 0";
    into64: ".byte 0xce";
    bound64: ".byte 0x62, 0x07";
    too_long: ".byte 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x90";
    long_enough: ".byte 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x90";
    breakpoint: "int3", "breakpoint_end: nop";
    int_3: ".byte 0xcd, 3", "nop";
    int_0x40: "int 0x40", "nop";
    into32: ".code32", "mov al, 0x7f", "add al, 1", "into", "nop";
    bound32: ".code32", "bound eax, [edi]", "nop";
    aam32: ".code32", "aam 0";
    hlt: "hlt";
    load: "mov rax, [rdi]";
    load_bp: "mov rax, [rbp]";
    load_gs_sp: "mov rax, [rsp]";
    push: "push rax";
    jump: "jmp rdi";
    ret: "push rdi", "ret";
    x87: "fld1";
    wait: "wait";
    sse: "movaps xmm0, xmm1";
    sse_load: "movaps xmm0, [rdi]";
    x87_zero_divide: "fninit", "push 0x37b", "fldcw [rsp]", "fld1", "fldz", "fdivp", "mov eax, 5", "x87_wait: wait";
    x87_masked: "fninit", "fld1", "fldz", "fdivp", "wait";
    sse_zero_divide: "push 0x1d80", "ldmxcsr [rsp]", "mov eax, 1", "cvtsi2ss xmm0, eax", "xorps xmm1, xmm1",
        "sse_divide: divss xmm0, xmm1";
    mxcsr_reserved: "push 0x10000", "ldmxcsr [rsp]";
    load_ac: "pushfq", "or dword ptr [rsp], 0x40000", "popfq", "load_ac_at: mov eax, [rdi]";
    rdpmc_cr4: "mov cr4, rax";
}

unsafe extern "C" {
    static breakpoint_end: u8;
    static x87_wait: u8;
    static sse_divide: u8;
    static load_ac_at: u8;
}

fn kernel(code: u64) -> Option<Trap> {
    Some(trap::run(&Frame::kernel(code)))
}

fn kernel_at(code: u64, rdi: u64) -> Option<Trap> {
    Some(trap::run(&Frame { rdi, rbp: rdi, ..Frame::kernel(code) }))
}

fn rip(trap: Option<Trap>) -> u64 {
    trap.map_or(0, |t| t.frame.rip)
}

pub fn run(t: &mut Report) {
    invalid(t);
    software(t);
    canonical(t);
    not_available(t);
    arithmetic(t);
    alignment(t);
    control(t);
}

fn invalid(t: &mut Report) {
    for (name, code) in [
        ("UD2", at_ud2()),
        ("UD1", ud1()),
        ("PUSH ES in 64-bit mode", push_es()),
        ("LOCK MOV", lock_mov()),
        ("LOCK ADD to a register", lock_add_reg()),
        ("far CALL with an immediate in 64-bit mode", long_call()),
        ("INTO in 64-bit mode", into64()),
    ] {
        let trap = kernel(code);
        t.trap(name, trap, UD, 0);
        t.tcg("RIP is after what was decoded").eq(name, rip(trap), code);
    }
    t.trap("16 bytes are too many", kernel(too_long()), GP, 0);
    t.trap("15 bytes are not", kernel(long_enough()), UD, 0);
    t.trap("HLT in ring 3", Some(trap::run(&Frame::user(hlt()))), GP, 0);
}

fn software(t: &mut Report) {
    let trap = kernel(breakpoint());
    t.trap("INT3", trap, BP, 0);
    t.eq("INT3, RIP after it", rip(trap), &raw const breakpoint_end as u64);
    let trap = kernel(int_3());
    t.trap("INT 3", trap, BP, 0);
    t.eq("INT 3, RIP after it", rip(trap), int_3() + 2);
    t.trap("INT 0x40", kernel(int_0x40()), 0x40, 0);
    let why = "the error code is the vector times 16";
    t.tcg(why).trap(
        "INT 0x40 in ring 3, gate of DPL 0",
        Some(trap::run(&Frame::user(int_0x40()))),
        GP,
        0x40 * 8 + 2,
    );
    let trap = Some(trap::run(&Frame::kernel32(into32())));
    t.trap("INTO in compatibility mode", trap, OF, 0);
    t.eq("INTO, RIP after it", rip(trap), into32() + 5);
    let bounds = [0u32, 5];
    let f = Frame { rax: 6, rdi: &raw const bounds as u64, ..Frame::kernel32(bound32()) };
    let trap = Some(trap::run(&f));
    t.trap("BOUND", trap, 5, 0);
    t.eq("BOUND, RIP at it", rip(trap), bound32());
    t.trap("BOUND within", Some(trap::run(&Frame { rax: 5, ..f })), UD, 0);
    t.trap("AAM 0", Some(trap::run(&Frame::kernel32(aam32()))), DE, 0);
    _ = bound64();
}

fn canonical(t: &mut Report) {
    let hole = 0x8000_0000_0000_0000u64;
    t.trap("load by RDI", kernel_at(load(), hole), GP, 0);
    t.trap("load by RDI, lowest", kernel_at(load(), 1 << 47), GP, 0);
    t.tcg("only the first byte is checked").trap(
        "load across the border",
        kernel_at(load(), (1 << 47) - 4),
        GP,
        0,
    );
    let why = "always #GP";
    t.tcg(why).trap("load by RBP", kernel_at(load_bp(), hole), SS, 0);
    t.tcg(why).trap(
        "load by RSP",
        Some(trap::run(&Frame { rsp: hole, ..Frame::kernel(load_gs_sp()) })),
        SS,
        0,
    );
    let trap = Some(trap::run(&Frame { rsp: hole + 8, ..Frame::kernel(push()) }));
    t.tcg(why).trap("PUSH", trap, SS, 0);
    t.eq("PUSH, RSP as before", trap.map(|t| t.frame.rsp), Some(hole + 8));
    let trap = kernel_at(jump(), hole);
    t.tcg("branches do not check their target").trap("JMP", trap, GP, 0);
    t.tcg("branches do not check their target").eq("JMP, RIP at it", rip(trap), jump());
    let trap = kernel_at(ret(), hole);
    t.tcg("branches do not check their target").trap("RET", trap, GP, 0);
    let trap = Some(trap::run(&Frame::kernel(hole)));
    t.tcg("branches do not check their target").trap("IRET", trap, GP, 0);
}

fn not_available(t: &mut Report) {
    const MP: u64 = 2;
    const EM: u64 = 4;
    let cr0 = cpu::cr0();
    let with = |value: u64, code: u64| {
        // SAFETY: the trap handler clears TS and EM before any compiled code runs.
        let trap = trap::catch(|| unsafe { asm!("mov cr0, {}", "jmp {}", in(reg) value, in(reg) code) });
        // SAFETY: as it was.
        unsafe { cpu::set_cr0(cr0) };
        trap
    };
    t.trap("x87 with TS", with(cr0 | CR0_TS, x87()), NM, 0);
    t.trap("SSE with TS", with(cr0 | CR0_TS, sse()), NM, 0);
    t.trap("WAIT with TS and MP", with(cr0 | CR0_TS, wait()), NM, 0);
    t.trap("WAIT with TS without MP", with((cr0 | CR0_TS) & !MP, wait()), UD, 0);
    t.trap("x87 with EM", with(cr0 | EM, x87()), NM, 0);
    let trap = with(cr0 | EM, sse());
    t.eq("SSE with EM, RIP", (trap.map(|t| t.frame.vector), rip(trap)), (Some(UD), sse()));
}

fn arithmetic(t: &mut Report) {
    let trap = kernel(x87_zero_divide());
    t.trap("x87 division by zero", trap, MF, 0);
    t.eq("it comes at the next x87 instruction", rip(trap), &raw const x87_wait as u64);
    t.trap("x87 division by zero, masked", kernel(x87_masked()), UD, 0);
    let trap = kernel(sse_zero_divide());
    let why = "SSE exceptions are not raised";
    t.tcg(why).trap("SSE division by zero", trap, XM, 0);
    let here = &raw const sse_divide as u64;
    t.tcg(why).eq("it comes at the instruction", rip(trap), here);
    let why = "reserved MXCSR bits are accepted";
    t.tcg(why).trap("LDMXCSR, reserved bit", kernel(mxcsr_reserved()), GP, 0);
}

fn alignment(t: &mut Report) {
    let page = map(0, paging::frame(0), P | W | U);
    t.trap("MOVAPS, misaligned", kernel_at(sse_load(), page + 8), GP, 0);
    t.trap("MOVAPS, aligned", kernel_at(sse_load(), page + 16), UD, 0);
    let user = |rdi| Some(trap::run(&Frame { rdi, ..Frame::user(load_ac()) }));
    t.trap("AC flag without CR0.AM", user(page + 1), UD, 0);
    // SAFETY: ring 0 is never checked.
    unsafe { cpu::set_cr0(cpu::cr0() | CR0_AM) };
    let trap = user(page + 1);
    let why = "alignment is never checked";
    t.tcg(why).trap("ring 3, AC flag and CR0.AM", trap, AC, 0);
    let here = paging::user(&raw const load_ac_at as u64);
    t.tcg(why).eq("its RIP", rip(trap), here);
    t.trap("the same, aligned", user(page + 4), UD, 0);
    let trap = Some(trap::run(&Frame { rdi: page + 1, ..Frame::kernel(load_ac()) }));
    t.trap("the same in ring 0", trap, UD, 0);
    // SAFETY: as it was.
    unsafe { cpu::set_cr0(cpu::cr0() & !CR0_AM) };
}

fn control(t: &mut Report) {
    let cr0 = cpu::cr0();
    // SAFETY: each of these is refused, or harmless.
    unsafe {
        if !t.avoided_on_tcg("impossible CR0 values", "they are accepted") {
            t.trap("CR0.PG without PE", trap::catch(|| cpu::set_cr0(cr0 & !1)), GP, 0);
            t.trap("CR0.NW without CD", trap::catch(|| cpu::set_cr0(cr0 | 1 << 29)), GP, 0);
            t.trap("CR0, upper half", trap::catch(|| cpu::set_cr0(cr0 | 1 << 32)), GP, 0);
        }
        if !t.avoided_on_tcg("impossible CR4 values", "they are accepted") {
            t.trap("CR4.PAE cleared in long mode", trap::catch(|| cpu::set_cr4(cpu::cr4() & !0x20)), GP, 0);
            t.trap("CR4, reserved bit", trap::catch(|| cpu::set_cr4(cpu::cr4() | 1 << 31)), GP, 0);
        }
        let trap = trap::catch(|| cpu::set_cr8(16));
        t.tcg("ignored").trap("CR8, too large", trap, GP, 0);
        cpu::set_cr8(0);
        if !t.avoided_on_tcg("CR3, reserved bit", "it is accepted") {
            t.trap("CR3, reserved bit", trap::catch(|| cpu::set_cr3(cpu::cr3() | 1 << 62)), GP, 0);
        }
        if !t.avoided_on_tcg("impossible EFER values", "they are accepted") {
            t.trap("EFER.LME cleared with paging", trap::catch(|| cpu::wrmsr(cpu::EFER, 0)), GP, 0);
            let trap = trap::catch(|| cpu::wrmsr(cpu::EFER, cpu::rdmsr(cpu::EFER) | 2));
            t.trap("EFER, reserved bit", trap, GP, 0);
        }
        let trap = trap::catch(|| cpu::wrmsr(cpu::LSTAR, 1 << 63));
        t.tcg("not checked").trap("LSTAR, not canonical", trap, GP, 0);
    }
    let trap = trap::catch(|| _ = cpu::rdmsr(0x1234_5678));
    t.tcg("reads as zero").trap("RDMSR of none", trap, GP, 0);
    t.trap("MOV to CR4 in ring 3", Some(trap::run(&Frame::user(rdpmc_cr4()))), GP, 0);
}
