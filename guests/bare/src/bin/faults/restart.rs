//! An instruction that faults leaves nothing behind, and does its work when it is started again.

use bare::{
    code,
    paging::{self, P, W, frame, get, map, pte, read, set, unmap, write},
    report::Report,
    trap::{self, Frame, PF, Trap, UD},
};

code! {
    push: "push rax";
    pop_memory: "pop qword ptr [rdi]";
    call_memory: "call [rdi]";
    call_near: ".byte 0xe8, 0, 0, 0, 0";
    xchg: "xchg [rdi], rax";
    xadd: "xadd [rdi], rax";
    add: "add [rdi], rax";
    cmpxchg: "cmpxchg [rdi], rbx";
    store: "mov [rdi], rax";
    movsb: "rep movsb";
    movsq_down: "std", "rep movsq";
    stosq: "rep stosq";
    scasb: "repne scasb";
    leave: "leave";
    enter: "enter 32, 3";
}

fn go(code: u64, frame: Frame) -> Trap {
    let f = Frame::kernel(code);
    trap::run(&Frame { rip: f.rip, cs: f.cs, ss: f.ss, rflags: 2, ..frame })
}

pub fn run(t: &mut Report) {
    nothing_left(t);
    read_modify_write(t);
    crossing(t);
    strings(t);
    demand(t);
    nested(t);
}

fn nothing_left(t: &mut Report) {
    let absent = unmap(0);
    let stack = trap::stack_top() - 64;
    let full = Frame { rax: 1, rbx: 2, rdi: absent, rsp: stack, rbp: stack, ..Frame::default() };

    let trap = go(push(), Frame { rsp: absent + 64, ..full });
    t.eq("PUSH", (trap.frame.vector, trap.frame.error, trap.frame.rsp), (PF, 2, absent + 64));
    t.eq("PUSH, CR2", trap.cr2, absent + 56);
    let trap = go(pop_memory(), full);
    t.eq("POP to memory", (trap.frame.error, trap.frame.rsp), (2, stack));
    let trap = go(call_memory(), full);
    t.eq("CALL by memory", (trap.frame.error, trap.frame.rsp), (0, stack));
    let trap = go(call_near(), Frame { rsp: absent + 64, ..full });
    t.eq("CALL, stack", (trap.frame.rip, trap.frame.rsp), (call_near(), absent + 64));
    let trap = go(leave(), Frame { rbp: absent, ..full });
    t.eq("LEAVE", (trap.frame.error, trap.frame.rsp, trap.frame.rbp), (0, stack, absent));
    let page = map(1, frame(1), P | W);
    let trap = go(enter(), Frame { rsp: page + 16, rbp: stack, ..full });
    t.eq("ENTER", (trap.frame.vector, trap.frame.rsp, trap.frame.rbp), (PF, page + 16, stack));
}

fn read_modify_write(t: &mut Report) {
    let page = map(0, frame(0), P);
    write(frame(0), 0x55);
    for (name, code) in
        [("XCHG", xchg()), ("XADD", xadd()), ("ADD to memory", add()), ("CMPXCHG that would fail", cmpxchg())]
    {
        let trap =
            go(code, Frame { rax: 0x11, rbx: 0x22, rdi: page, rsp: trap::stack_top(), ..Frame::default() });
        let f = trap.frame;
        t.eq(name, (f.vector, f.error, f.rax, f.rbx), (PF, P | 2, 0x11, 0x22));
        t.eq(name, read(frame(0)), 0x55);
    }
}

fn crossing(t: &mut Report) {
    let first = map(2, frame(2), P | W);
    unmap(3);
    write(frame(2) + 0xff8, 0);
    let f = Frame { rax: u64::MAX, rdi: first + 0xffc, rsp: trap::stack_top(), ..Frame::default() };
    let trap = go(store(), f);
    t.eq("store across pages", (trap.frame.error, trap.cr2), (2, first + 0x1000));
    t.eq("store across pages, first half not written", read(frame(2) + 0xff8), 0);
    // The bytes of `mov [rdi], rax` (48 89 07) lie on both sides.
    map(2, frame(2), P | W);
    write(frame(2) + 0xff8, 0x8948_9090_9090_9090);
    let trap = trap::run(&Frame::kernel(first + 0xffe));
    let got = (trap.frame.error & 3, trap.frame.rip, trap.cr2);
    t.eq("fetch across pages", got, (0, first + 0xffe, first + 0x1000));
    map(3, frame(3), P | W);
    write(frame(3), 0x000b_0f07);
    let trap = go(push(), Frame { rsp: first + 0x1004, rax: 0x1122_3344_5566_7788, ..f });
    t.eq("PUSH across pages", (trap.frame.vector, trap.frame.rsp), (UD, first + 0xffc));
    t.eq("PUSH across pages, low", read(frame(2) + 0xff8) >> 32, 0x5566_7788);
    t.eq("PUSH across pages, high", read(frame(3)) & 0xffff_ffff, 0x1122_3344);
}

fn fill(address: u64, len: u64, seed: u8) {
    for i in 0..len {
        // SAFETY: frames of ours.
        unsafe { ((address + i) as *mut u8).write_volatile((i as u8).wrapping_mul(7) ^ seed) };
    }
}

fn strings(t: &mut Report) {
    let from = map(4, frame(4), P | W);
    let to = map(5, frame(5), P | W);
    unmap(6);
    fill(frame(4), 4096, 1);
    fill(frame(5), 4096, 2);
    let rsp = trap::stack_top();
    let f = Frame { rsi: from, rdi: to + 0xf00, rcx: 0x200, rsp, ..Frame::default() };
    let trap = go(movsb(), f);
    let got = (trap.frame.rip, trap.frame.rcx, trap.frame.rsi, trap.frame.rdi, trap.cr2);
    t.eq("REP MOVSB stops at the page", got, (movsb(), 0x100, from + 0x100, to + 0x1000, to + 0x1000));
    t.eq("REP MOVSB did the first part", read(frame(5) + 0xff8), read(frame(4) + 0xf8));
    let trap = go(movsq_down(), Frame { rsi: from + 0x80, rdi: from + 0x18, rcx: 20, ..f });
    let got = (trap.frame.vector, trap.frame.rcx, trap.frame.rdi);
    unmap(3);
    // The page below `from` is page 3, present before: the copy ended there.
    t.eq("REP MOVSQ downwards", got, (UD, 0, from + 0x18 - 160));
    let trap = go(movsq_down(), Frame { rsi: from + 0x800, rdi: from + 0x18, rcx: 20, ..f });
    let got = (trap.frame.vector, trap.frame.rcx, trap.frame.rdi);
    t.eq("REP MOVSQ downwards to an absent page", got, (PF, 16, from - 8));
    let trap = go(stosq(), Frame { rdi: to + 0xff4, rcx: 4, ..f });
    let got = (trap.frame.rcx, trap.frame.rdi, trap.cr2);
    t.eq("REP STOSQ, an element across pages", got, (3, to + 0xffc, to + 0x1000));
    let trap = go(scasb(), Frame { rax: 0x1ff, rdi: to + 0xff0, rcx: 100, ..f });
    fill(frame(5), 4096, 2);
    let seen = trap.frame.vector == PF && trap.frame.rcx == 84 && trap.frame.rdi == to + 0x1000;
    t.check("REPNE SCASB stops at the page or at the byte", seen || trap.frame.vector == UD);
}

/// Maps what is missing in the test area: frame n to page n.
fn pager(f: &mut Frame) -> bool {
    let page = (bare::cpu::cr2() - paging::TEST) / 4096;
    if f.error & 1 != 0 || page >= 48 {
        return false;
    }
    let n = page as usize;
    set(pte(n), frame(n) | P | W, paging::TEST + page * 4096);
    true
}

fn demand(t: &mut Report) {
    for n in 8..20 {
        unmap(n);
    }
    fill(frame(8), 4096, 3);
    fill(frame(9), 4096, 4);
    trap::hook(PF, Some(pager));
    trap::reset_count(PF);
    let base = paging::TEST;
    let f = Frame {
        rsi: base + 0x8800,
        rdi: base + 0xa123,
        rcx: 0x1000,
        rsp: trap::stack_top(),
        ..Frame::default()
    };
    let trap = go(movsb(), f);
    t.eq("paged REP MOVSB ends", (trap.frame.vector, trap.frame.rcx), (UD, 0));
    t.eq("paged REP MOVSB, faults", trap::count(PF), 4);
    let (from, to) = ((frame(8) + 0x800) as *const u8, (frame(10) + 0x123) as *const u8);
    // SAFETY: frames of ours, which lie one after the other.
    let same = (0..0x1000).all(|i| unsafe { from.add(i).read_volatile() == to.add(i).read_volatile() });
    t.check("paged REP MOVSB, every byte", same);
    let trap = go(store(), Frame { rax: 0x0102_0304_0506_0708, rdi: base + 14 * 4096 - 3, ..f });
    t.eq("paged store across pages", (trap.frame.vector, get(pte(13)) & P, get(pte(14)) & P), (UD, P, P));
    t.eq("what it wrote", read(frame(13) + 0xff8) >> 40, 0x06_0708);
    trap::hook(PF, None);
}

/// Catches an invalid opcode inside the page-fault handler.
fn faulty_pager(f: &mut Frame) -> bool {
    let inner = trap::catch(|| unsafe { core::arch::asm!("ud2") });
    inner.is_some_and(|t| t.frame.vector == UD) && pager(f)
}

fn nested(t: &mut Report) {
    let page = unmap(20);
    // The inner exception needs another stack than the page fault's.
    let gate = trap::gate(UD);
    trap::set_gate(UD, trap::stub(UD), bare::segments::CODE, bare::segments::IST_DOUBLE, 0x8e);
    trap::hook(PF, Some(faulty_pager));
    let trap = go(store(), Frame { rax: 0xfeed, rdi: page, rsp: trap::stack_top(), ..Frame::default() });
    trap::hook(PF, None);
    trap::restore_gate(UD, gate);
    t.eq("exception in the page-fault handler", (trap.frame.vector, read(frame(20))), (UD, 0xfeed));
}
