//! RFLAGS.TF, ICEBP, RF.

use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

use bare::{
    code, cpu,
    paging::{self, P, U, W, frame, map, unmap},
    report::Report,
    trap::{self, BP, DB, Frame, GP, PF, UD},
};

use crate::{BS, NOTHING, RF, TF, clear};

code! {
    nops: "nop", "nop", "nop";
    popf: "pushfq", "or dword ptr [rsp], 0x100", "popfq", "nop", "nop";
    popf_off: "pushfq", "and dword ptr [rsp], -257", "popfq", "nop", "nop";
    jump: "jmp 2f", "nop", "2: nop";
    strings: "rep movsb", "nop";
    mov_ss: "mov ss, eax", "nop", "nop";
    load: "mov rax, [rdi]", "nop";
    icebp: ".byte 0xf1", "nop";
    int3: "int3", "nop";
    nop_int3: "nop", "int3";
    nops32: ".code32", "nop", "nop";
    cpuid: "cpuid", "nop";
    io: "out 0x80, al", "nop";
    rdtsc: "rdtsc", "nop";
}

/// What a step tells: vector, bytes from the start, DR6.
fn one(frame: Frame) -> (u64, u64, u64) {
    clear();
    let trap = trap::run(&Frame { rflags: frame.rflags | TF, ..frame });
    clear();
    (trap.frame.vector, trap.frame.rip.wrapping_sub(frame.rip), trap.dr6)
}

pub fn run(t: &mut Report) {
    single(t);
    trace(t);
    icebps(t);
    rf(t);
}

fn single(t: &mut Report) {
    t.eq(
        "DR6 at rest",
        {
            clear();
            cpu::dr6()
        },
        NOTHING,
    );
    let step = |bytes| (DB, bytes, NOTHING | BS);
    t.eq("one NOP", one(Frame::kernel(nops())), step(1));
    t.eq("one NOP in ring 3", one(Frame::user(nops())), step(1));
    t.eq("one NOP in compatibility mode", one(Frame::user32(nops32())), step(1));
    t.eq("a jump", one(Frame::kernel(jump())), step(3));
    t.eq("CPUID", one(Frame::kernel(cpuid())), step(2));
    t.eq("RDTSC", one(Frame::kernel(rdtsc())), step(2));
    t.eq("OUT", one(Frame::kernel(io())), step(2));
    let page = map(0, frame(0), P | W);
    let f = Frame { rcx: 3, rsi: page, rdi: page + 64, ..Frame::kernel(strings()) };
    t.eq("REP MOVSB steps by element", one(f), step(0));
    t.eq("REP MOVSB, the last", one(Frame { rcx: 1, ..f }), step(2));
    t.eq("REP MOVSB of none", one(Frame { rcx: 0, ..f }), step(2));
    t.eq("MOV SS: the next instruction too", one(Frame { rax: 0x10, ..Frame::kernel(mov_ss()) }), step(3));
    let f = Frame { rdi: unmap(1), ..Frame::kernel(load()) };
    t.eq("a fault comes alone", one(f), (PF, 0, NOTHING));
    t.eq("an invalid opcode comes alone", one(Frame::kernel(nops() + 3)), (UD, 0, NOTHING));
    t.eq("INT3 comes alone", one(Frame::kernel(int3())), (BP, 1, NOTHING));
    clear();
    let trap = trap::run(&Frame::kernel(popf()));
    t.eq("POPF sets TF: after the next instruction", trap.frame.rip - popf(), 10);
    t.eq("TF is in the saved flags", trap.frame.rflags & TF, TF);
    let trap = trap::run(&Frame { rflags: 0x202 | TF, ..Frame::kernel(nops()) });
    t.eq("TF and IF are in the saved flags", trap.frame.rflags & (TF | 0x200), TF | 0x200);
}

static STEPS: AtomicU64 = AtomicU64::new(0);
static START: AtomicU64 = AtomicU64::new(0);

/// Records the low four bits of each distance.
fn record(f: &mut Frame) -> bool {
    STEPS.store(STEPS.load(SeqCst) << 4 | f.rip.wrapping_sub(START.load(SeqCst)) & 15, SeqCst);
    true
}

fn trace(t: &mut Report) {
    trap::hook(DB, Some(record));
    let steps = |f: Frame| {
        START.store(f.rip, SeqCst);
        STEPS.store(0, SeqCst);
        let trap = trap::run(&Frame { rflags: f.rflags | TF, ..f });
        (trap.frame.vector, STEPS.load(SeqCst))
    };
    t.eq("every instruction", steps(Frame::kernel(nops())), (UD, 0x123));
    let page = map(0, frame(0), P | W);
    let f = Frame { rcx: 3, rsi: page, rdi: page + 64, ..Frame::kernel(strings()) };
    t.eq("every element", steps(f), (UD, 0x0023));
    // PUSHFQ 1, AND 8, POPFQ 9: POPFQ itself is still stepped, being traced by the TF before it.
    t.eq("POPF clears TF", steps(Frame::kernel(popf_off())), (UD, 0x189));
    trap::hook(DB, None);
    clear();
}

fn icebps(t: &mut Report) {
    clear();
    let trap = trap::run(&Frame::kernel(icebp()));
    t.tcg("undefined").eq("ICEBP", (trap.frame.vector, trap.frame.rip), (DB, icebp() + 1));
    t.eq("ICEBP, DR6 untouched", trap.dr6 & BS, 0);
    let trap = trap::run(&Frame::user(icebp()));
    t.tcg("undefined").eq(
        "ICEBP in ring 3 needs no DPL",
        (trap.frame.vector, trap.frame.rip),
        (DB, paging::user(icebp()) + 1),
    );
    let trap = trap::run(&Frame::user(int3()));
    t.tcg("the error code is the vector times 16").eq(
        "INT3 in ring 3 does",
        (trap.frame.vector, trap.frame.error),
        (GP, 3 * 8 + 2),
    );
    clear();
}

fn rf(t: &mut Report) {
    let page = unmap(1);
    let trap = trap::run(&Frame { rdi: page, ..Frame::kernel(load()) });
    t.tcg("never set").eq("a fault saves RF set", trap.frame.rflags & RF, RF);
    let trap = trap::run(&Frame::kernel(int3()));
    t.eq("a trap saves RF clear", trap.frame.rflags & RF, 0);
    let trap = trap::run(&Frame { rflags: 2 | RF, ..Frame::kernel(nop_int3()) });
    t.tcg("not without a breakpoint").eq("an instruction clears RF", trap.frame.rflags & RF, 0);
    let page = map(1, frame(1), P | U);
    t.eq("readable again", trap::run(&Frame { rdi: page, ..Frame::kernel(load()) }).frame.vector, UD);
}
