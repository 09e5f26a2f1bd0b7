//! DR0 to DR3, DR6, DR7.

use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

use bare::{
    code, cpu,
    paging::{P, W, frame, map},
    report::Report,
    trap::{self, DB, Frame, GP, UD, catch},
};

use crate::{BD, BS, NOTHING, RF, TF, clear};

code! {
    nops: "nop", "nop", "nop", "nop";
    twice: "inc ebx", "bp_target: inc ecx", "inc edx";
    store8: "mov [rdi], al", "nop";
    store64: "mov [rdi], rax", "nop";
    load8: "mov al, [rdi]", "nop";
    load64: "mov rax, [rdi]", "nop";
    add: "add [rdi], rax", "nop";
    push: "push rax", "nop";
    strings: "rep movsb", "nop";
    out: "out 0x80, al", "nop";
    input: "in al, 0x71", "nop";
    read_dr0: "mov rax, dr0";
    write_dr7: "mov dr7, rax";
    read_dr4: "mov rax, dr4";
    mov_ss_nop: "mov ss, eax", "nop", "nop";
    load_ss: "mov ss, word ptr [rdi]", "nop", "nop";
}

unsafe extern "C" {
    static bp_target: u8;
}

const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const IO: u64 = 2;
const ACCESS: u64 = 3;

/// Sets breakpoint `n`: what for, and how many bytes.
fn set(n: u64, address: u64, kind: u64, bytes: u64) {
    let len = [0, 0, 1, 0, 3, 0, 0, 0, 2][bytes as usize];
    // SAFETY: its exceptions are caught.
    unsafe {
        match n {
            0 => cpu::set_dr0(address),
            1 => cpu::set_dr1(address),
            2 => cpu::set_dr2(address),
            _ => cpu::set_dr3(address),
        }
        cpu::set_dr7(cpu::dr7() | 2 << (n * 2) | (kind | len << 2) << (16 + n * 4));
    }
}

/// Vector, bytes from the start, DR6; breakpoints are off afterwards.
fn go(f: Frame) -> (u64, u64, u64) {
    let trap = trap::run(&f);
    clear();
    (trap.frame.vector, trap.frame.rip.wrapping_sub(f.rip), trap.dr6)
}

pub fn run(t: &mut Report) {
    registers(t);
    execute(t);
    resume(t);
    data(t);
    ports(t);
    general_detect(t);
    shadow(t);
}

fn registers(t: &mut Report) {
    clear();
    // SAFETY: nothing is enabled.
    unsafe {
        cpu::set_dr0(0x1122_3344_5566_7788);
        t.eq("DR0 holds 64 bits", cpu::dr0(), 0x1122_3344_5566_7788);
        cpu::set_dr7(0);
        t.eq("DR7, bit 10 is 1", cpu::dr7(), 0x400);
        cpu::set_dr6(0);
        t.eq("DR6, reserved bits are 1", cpu::dr6() | 1 << 11, NOTHING | 1 << 11);
        t.tcg("accepted").trap("DR6, upper half", catch(|| cpu::set_dr6(1 << 32)), GP, 0);
        t.tcg("accepted").trap("DR7, upper half", catch(|| cpu::set_dr7(1 << 32)), GP, 0);
    }
    clear();
    t.eq("DR0 in ring 3", go(Frame::user(read_dr0())).0, GP);
    let dr6 = cpu::dr6();
    let f = trap::run(&Frame::kernel(read_dr4())).frame;
    t.eq("DR4 is DR6 without CR4.DE", (f.vector, f.rax), (UD, dr6));
    // SAFETY: debugging extensions.
    unsafe { cpu::set_cr4(cpu::cr4() | 8) };
    let got = go(Frame::kernel(read_dr4()));
    t.eq("DR4 is undefined with CR4.DE", (got.0, got.1), (UD, 0));
    // SAFETY: as it was.
    unsafe { cpu::set_cr4(cpu::cr4() & !8) };
}

fn execute(t: &mut Report) {
    for n in 0..4 {
        set(n, nops() + n, EXECUTE, 1);
        t.eq("execution", go(Frame::kernel(nops())), (DB, n, NOTHING | 1 << n));
    }
    set(0, nops() + 1, EXECUTE, 1);
    set(2, nops() + 1, EXECUTE, 1);
    let got = go(Frame::kernel(nops()));
    t.eq("execution, two at once", (got.0, got.1, got.2 & 5), (DB, 1, 5));
    set(0, nops() + 1, EXECUTE, 1);
    let got = go(Frame { rflags: 2 | TF, ..Frame::kernel(nops()) });
    t.check("execution and single step", got.0 == DB && got.1 == 1 && got.2 & BS != 0);
    set(0, nops(), EXECUTE, 1);
    let got = go(Frame { rflags: 2 | RF, ..Frame::kernel(nops()) });
    t.eq("RF lets the instruction run", (got.0, got.1), (UD, 4));
    // SAFETY: the breakpoint is off.
    unsafe { cpu::set_dr0(nops()) };
    t.eq("off", go(Frame::kernel(nops())).0, UD);
}

static HITS: AtomicU32 = AtomicU32::new(0);

fn resume(t: &mut Report) {
    trap::hook(
        DB,
        Some(|f| {
            HITS.fetch_add(1, SeqCst);
            f.rflags |= RF;
            true
        }),
    );
    set(3, &raw const bp_target as u64, EXECUTE, 1);
    let f = trap::run(&Frame { rbx: 0, rcx: 0, rdx: 0, ..Frame::kernel(twice()) }).frame;
    clear();
    trap::hook(DB, None);
    t.eq("resumed with RF", (f.vector, f.rbx, f.rcx, f.rdx), (UD, 1, 1, 1));
    t.eq("resumed with RF, hits", HITS.load(SeqCst), 1);
}

fn data(t: &mut Report) {
    let page = map(0, frame(0), P | W);
    let at = page + 0x40;
    let f = |code: u64, rdi: u64| Frame { rdi, ..Frame::kernel(code) };
    let watch = |n: u64, kind: u64, bytes: u64, frame: Frame| {
        set(n, at, kind, bytes);
        go(frame)
    };
    let hit = |n: u64, bytes: u64| (DB, bytes, NOTHING | 1 << n);
    t.eq("write of 1 byte", watch(0, WRITE, 1, f(store8(), at)), hit(0, 2));
    t.eq("write, a load does not count", watch(0, WRITE, 1, f(load8(), at)).0, UD);
    t.eq("write, the next byte does not count", watch(1, WRITE, 1, f(store8(), at + 1)).0, UD);
    t.eq("write of 8 bytes over a watched one", watch(1, WRITE, 1, f(store64(), at - 7)), hit(1, 3));
    t.eq("write of 8 bytes short of it", watch(1, WRITE, 1, f(store64(), at - 8)).0, UD);
    t.eq("write within 8 watched bytes", watch(2, WRITE, 8, f(store8(), at + 7)), hit(2, 2));
    t.eq("write within 4 watched bytes", watch(2, WRITE, 4, f(store8(), at + 3)), hit(2, 2));
    t.eq("write behind 4 watched bytes", watch(2, WRITE, 4, f(store8(), at + 4)).0, UD);
    t.eq("access, load", watch(3, ACCESS, 2, f(load8(), at + 1)), hit(3, 2));
    t.eq("access, long load", watch(3, ACCESS, 2, f(load64(), at - 4)), hit(3, 3));
    t.eq("access, store", watch(3, ACCESS, 2, f(store8(), at)), hit(3, 2));
    t.eq(
        "access, a fetch does not count",
        {
            set(0, nops(), ACCESS, 8);
            go(Frame::kernel(nops())).0
        },
        UD,
    );
    t.eq("write by ADD", watch(0, WRITE, 8, f(add(), at)), hit(0, 3));
    let on_stack = Frame { rsp: at + 8, ..Frame::kernel(push()) };
    t.eq("write by PUSH", watch(0, WRITE, 8, on_stack), hit(0, 1));
    let copy = Frame { rcx: 16, rsi: page + 0x100, ..f(strings(), at - 3) };
    set(1, at, WRITE, 1);
    let trap = trap::run(&copy);
    clear();
    // The fourth element hits; the processor may report some elements later.
    let f4 = trap.frame;
    t.eq("REP MOVSB, vector and DR6", (f4.vector, trap.dr6 & 15), (DB, 2));
    t.within("REP MOVSB, elements left", f4.rcx, 0, 12);
    t.eq("REP MOVSB, consistent", f4.rdi, at - 3 + 16 - f4.rcx);
    let byte = |address: u64| {
        // SAFETY: the test frame.
        unsafe { (address as *mut u8).read_volatile() }
    };
    // SAFETY: the test frame.
    unsafe { (at as *mut u8).write_volatile(0) };
    let trapped = watch(0, WRITE, 1, Frame { rax: 0x5a, ..f(store8(), at) });
    t.eq("the write was done", (trapped.0, byte(at)), (DB, 0x5a));
}

fn ports(t: &mut Report) {
    // SAFETY: debugging extensions, which I/O breakpoints need.
    unsafe { cpu::set_cr4(cpu::cr4() | 8) };
    set(0, 0x80, IO, 1);
    t.eq("OUT", go(Frame::kernel(out())), (DB, 2, NOTHING | 1));
    set(1, 0x70, IO, 2);
    t.eq("IN from the second of two ports", go(Frame::kernel(input())), (DB, 2, NOTHING | 2));
    set(1, 0x81, IO, 1);
    t.eq("another port", go(Frame::kernel(out())).0, UD);
    // SAFETY: as it was.
    unsafe { cpu::set_cr4(cpu::cr4() & !8) };
}

fn general_detect(t: &mut Report) {
    clear();
    // SAFETY: the next access to a debug register is caught.
    unsafe { cpu::set_dr7(1 << 13 | 0x400) };
    let trap = trap::run(&Frame::kernel(read_dr0()));
    let dr7 = cpu::dr7();
    clear();
    t.tcg("not implemented").eq("GD", (trap.frame.vector, trap.frame.rip), (DB, read_dr0()));
    t.tcg("not implemented").eq("GD, DR6", trap.dr6, NOTHING | BD);
    t.tcg("not implemented").eq("GD is off in the handler", dr7 & 1 << 13, 0);
    // SAFETY: as before.
    unsafe { cpu::set_dr7(1 << 13 | 0x400) };
    t.tcg("not implemented").eq("GD, a write", go(Frame::kernel(write_dr7())), (DB, 0, NOTHING | BD));
}

fn shadow(t: &mut Report) {
    let page = map(0, frame(0), P | W);
    // SAFETY: the test frame.
    unsafe { (page as *mut u16).write_volatile(0x10) };
    let f = Frame { rdi: page, ..Frame::kernel(load_ss()) };
    set(0, page, ACCESS, 2);
    t.tcg("no shadow for breakpoints").eq(
        "MOV SS from watched memory: after the next",
        go(f),
        (DB, 3, NOTHING | 1),
    );
    let f = Frame { rax: 0x10, ..Frame::kernel(mov_ss_nop()) };
    set(0, mov_ss_nop() + 2, EXECUTE, 1);
    t.tcg("no shadow for breakpoints").eq("execution right behind MOV SS is missed", go(f).0, UD);
    set(0, mov_ss_nop() + 3, EXECUTE, 1);
    t.eq("execution one further is not", go(f), (DB, 3, NOTHING | 1));
}
