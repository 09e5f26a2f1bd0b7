//! Tries to get out: each check is a way in which an engine that rewrites code could let a guest reach what is not its own, or
//! be stopped from going on. What must come is what the processor does, a fault mostly.
#![no_std]
#![no_main]

use bare::{
    code, cpu,
    paging::{self, A, D, P, U, W, frame, map, user},
    report::Report,
    trap::{self, Frame, GP, PF, SS, run},
};

bare::guest!(main);

code! {
    jump: "jmp rax";
    call: "call rax";
    ret: "push rax", "stc", "ret";
    jump_memory: "mov [rsp - 64], rax", "jmp [rsp - 64]";
    jump32: ".code32", "jmp eax";
    landed: "mov ebx, 0x77";
    landed32: ".code32", "mov ebx, 0x77", "ud2";
    load: "mov rbx, [rax]";
    store: "mov [rax], rbx";
    vector: "movups xmm0, [rax]";
    vector_store: "movups [rax], xmm0";
    // Accesses off one register, of which only a later one is out of bounds.
    group: "mov rbx, [rax]", "mov rcx, [rax + 120]", "mov [rax + 248], rbx";
    moved: "mov rbx, [rax]", "add rax, 0x7ffff", "mov rbx, [rax + 8]";
    popped: "mov rsp, rax", "pop rbx", "pop rsp", "pop rcx", "pop rdx";
    indexed: "mov rbx, [rax + rcx * 8]", "mov rbx, [rax + rcx * 8 + 8]";
    bits: "bts [rax], rcx";
    bits_read: "bt [rax], rcx";
    push: "mov rsp, rax", "push rbx";
    pop: "mov rsp, rax", "pop rbx";
    leave: "mov rbp, rax", "leave";
    enter: "mov rsp, rax", "enter 16, 3";
    compare: "lock cmpxchg16b [rax]";
    wrap32: ".code32", "mov ebx, [eax + 8]", "mov ecx, [eax + 12]", "ud2";
    read_code: "mov rbx, [rip + load_only]", "load_only:";
    carry: "push rbx", "push rbx", "push rbx", "lea rbp, [rip + 3f]", "mov [rsp + 16], rbp", "pop rbx",
        "stc", "pop rbp", "ret", "3: setc al", "movzx eax, al";
    // Fault, fault, fault: a store to a page that never becomes writable.
    rounds: "2: mov [rax], rbx", "jmp 2b";
}

fn main() {
    let mut t = Report::new("hostile");
    jumps(&mut t);
    addresses(&mut t);
    groups(&mut t);
    stacks(&mut t);
    revoked(&mut t);
    growth(&mut t);
    t.end()
}

/// What the translate engine adds to an address in its table of jumps, for its `n`th combination of rights and mode.
fn salt(n: u16) -> u64 {
    u64::from(n) << 48 | u64::from(n.wrapping_mul(0x9e37) & 0x7fff)
}

/// Addresses that are not canonical, and would be what another address is elsewhere.
fn jumps(t: &mut Report) {
    let place = landed();
    for code in [landed(), user(landed())] {
        let kernel = code == place;
        let begin = if kernel { Frame::kernel(place) } else { Frame::user(place) };
        t.eq("the place to land", run(&begin).frame.rbx, 0x77);
        for (name, snippet) in
            [("jump", jump()), ("call", call()), ("return", ret()), ("jump by memory", jump_memory())]
        {
            let mut wrong = 0;
            for one in (2..24).step_by(2) {
                for other in (2..24).step_by(2).filter(|&other| other != one) {
                    let target = code.wrapping_add(salt(one)).wrapping_sub(salt(other));
                    let frame = if kernel { Frame::user(snippet) } else { Frame::kernel(snippet) };
                    let got = run(&Frame { rax: target, ..frame }).frame;
                    wrong += u32::from((got.vector, got.rbx) != (GP, 0));
                }
            }
            t.eq(name, wrong, 0);
        }
    }
    // The upper half of a register does not count in 32-bit code.
    let wide = landed32() | 0x5_0000_0000;
    t.eq("32-bit jump", run(&Frame { rax: wide, ..Frame::kernel32(jump32()) }).frame.rbx, 0x77);
    t.eq("flags through a return", run(&Frame::kernel(carry())).frame.rax, 1);
}

/// Operands where nothing is.
fn addresses(t: &mut Report) {
    // Where the host has its program, libraries, stack and mappings, and the ends of everything.
    let places = [
        0x5555_5555_4000,
        0x7fff_f7dd_0000,
        0x7fff_ffff_e000,
        0x7f00_0000_0000,
        0x7fff_ffff_fff0,
        0xffff_8000_0000_0000,
        0xffff_ffff_ffff_f000,
        0x10_0000_0000,
        0x4000_0000_0000,
    ];
    let forms = [load(), store(), vector(), vector_store(), bits(), bits_read()];
    for (name, ring) in [("ring 0", Frame::kernel as fn(u64) -> Frame), ("ring 3", Frame::user)] {
        let mut wrong = 0;
        for form in forms {
            for place in places {
                let got = run(&Frame { rax: place, ..ring(form) });
                wrong += u32::from((got.frame.vector, got.cr2) != (PF, place));
            }
        }
        t.eq(name, wrong, 0);
        // What is mapped, with other upper bits: not canonical.
        let page = map(0, frame(0), P | W | U | A | D);
        let mapped = if name == "ring 3" { user(frame(0)) } else { page };
        let mut wrong = 0;
        for form in forms {
            let _ = run(&Frame { rax: mapped, ..ring(form) });
            for bit in 48..64 {
                let got = run(&Frame { rax: mapped | 1 << bit, ..ring(form) }).frame;
                wrong += u32::from((got.vector, got.error) != (GP, 0));
            }
        }
        t.eq("not canonical", wrong, 0);
    }
    // A bit that is far from its operand.
    let page = map(1, frame(1), P | W);
    for far in [1u64 << 62, 1 << 40, u64::MAX << 40, u64::MAX << 62] {
        let got = run(&Frame { rax: page, rcx: far, ..Frame::kernel(bits()) });
        let at = page.wrapping_add(((far as i64) >> 3) as u64 & !7);
        let canonical = ((at as i64) << 16 >> 16) as u64 == at;
        t.eq("a far bit", got.frame.vector, if canonical { PF } else { GP });
    }
    // 4 GiB is where 32-bit addresses begin again.
    let got = run(&Frame { rax: 0xffff_fff8 | 7 << 32, ..Frame::kernel32(wrap32()) }).frame;
    t.eq(
        "32-bit addresses begin again",
        (got.vector, got.rbx as u32, got.rcx as u32),
        (trap::UD, paging::read(0) as u32, (paging::read(0) >> 32) as u32),
    );
    let got = run(&Frame { rax: page + 8, ..Frame::kernel(compare()) }).frame;
    t.eq("16 bytes that are not aligned", (got.vector, got.error), (GP, 0));
}

/// Accesses that share one lookup.
fn groups(t: &mut Report) {
    let first = map(2, frame(2), P | W);
    paging::unmap(3);
    let end = first + 0x1000;
    let fault = |rip: u64, rax: u64, rcx: u64| {
        let got = run(&Frame { rax, rcx, ..Frame::kernel(rip) });
        (got.frame.vector, got.cr2)
    };
    // Back from the end, and where the first access is that does not fit.
    for (back, expected) in
        [(8, end + 112), (7, end), (64, end + 56), (124, end), (200, end + 48), (255, end)]
    {
        t.eq("a group over the end", fault(group(), end - back, 0), (PF, expected));
    }
    t.eq("a group whose base moves away", fault(moved(), first, 0), (PF, first + 0x8_0007));
    t.eq("a group with an index", fault(indexed(), end - 8 - 8 * 5, 5), (PF, end));
    // RSP changes in the middle of a group.
    paging::write(first, 1);
    paging::write(first + 8, 0x6666_0000_0000);
    t.eq("a stack that is popped away", fault(popped(), first, 0), (PF, 0x6666_0000_0000));
}

const NO_SS: &str = "stack addresses that are not canonical raise #GP";

/// Stack pointers at odd places.
fn stacks(t: &mut Report) {
    let got = |rip, rax| run(&Frame { rax, ..Frame::user(rip) }).frame.vector;
    for (name, form) in [("PUSH", push()), ("POP", pop()), ("ENTER", enter())] {
        t.eq(name, got(form, 0x5555_5555_4000), PF);
        t.tcg(NO_SS).eq(name, got(form, 0x8000_0000_0100_0000), SS);
        t.eq(name, got(form, 0xffff_8000_0000_0008), PF);
    }
    t.eq("PUSH below 0", got(push(), 0), PF);
    t.eq("LEAVE", got(leave(), 0x7f00_0000_0000), PF);
    t.tcg(NO_SS).eq("LEAVE, not canonical", got(leave(), 1 << 60), SS);
}

/// Rights that are taken away.
fn revoked(t: &mut Report) {
    let page = map(4, frame(4), P | W);
    let go = |code: u64| run(&Frame { rax: page, ..Frame::kernel(code) }).frame.vector;
    for round in 0..3 {
        map(4, frame(4), P | W);
        t.eq(
            "allowed",
            (round, go(load()), go(store()), go(vector_store())),
            (round, trap::UD, trap::UD, trap::UD),
        );
        map(4, frame(4), P);
        t.eq("read only", (go(load()), go(store()), go(rounds())), (trap::UD, PF, PF));
        paging::unmap(4);
        t.eq("gone", (go(load()), go(store()), go(rounds())), (PF, PF, PF));
    }
}

/// Structures that a guest makes grow: code of many tiny blocks, and pages far from each other.
fn growth(t: &mut Report) {
    let page = map(6, frame(6), P | W);
    let mut wrong = 0;
    for i in 0..20_000u64 {
        // mov ebx, i; ud2, at changing places
        let at = page + i * 7 % 4000;
        let [a, b, c, d] = (i as u32).to_le_bytes();
        // SAFETY: a test page.
        unsafe { (at as *mut [u8; 7]).write_volatile([0xbb, a, b, c, d, 0x0f, 0x0b]) };
        if i % 10 == 0 {
            wrong += u32::from(run(&Frame::kernel(at)).frame.rbx != i);
        }
    }
    t.eq("code that never stays", wrong, 0);
    // SAFETY: the same address space again.
    unsafe { cpu::set_cr3(cpu::cr3()) };
    t.check("still here", true);
}
