//! Far jumps, calls and returns, call gates, interrupt gates, IRET.

use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

use bare::{
    code, cpu,
    paging::{self, frame, read},
    report::Report,
    segments::{
        self, CODE, CODE32, DATA, FREE, USER_CODE, USER_CODE32, USER_DATA, gate, segment, set_gdt, tss,
    },
    trap::{self, Frame, GP, NP, SS, Trap, UD},
};

code! {
    far_jump: "jmp fword ptr [rdi]";
    far_call: "call fword ptr [rdi]";
    far_call64: ".byte 0x48, 0xff, 0x1f";
    far_return: "push rax", "push rbx", "retfq";
    landing: "ud2";
    landing32: ".code32", "mov ebx, cs", "ud2";
    return32: ".code32", "mov ebx, cs", "retf";
    gate_landing: "mov rax, [rsp]", "mov rbx, [rsp + 8]", "mov rcx, [rsp + 16]", "mov rdx, [rsp + 24]";
    gate_return: "mov rbx, rsp", "retfq";
    through_gate: "call fword ptr [rdi]", "mov eax, cs";
    int_0x42: "int 0x42", "mov eax, cs";
    iret: "iretq";
    cli: "cli";
    popf: "push rax", "popfq", "pushfq", "pop rbx";
}

const SLOT: u16 = FREE;
const fn bits(selector: u16) -> u64 {
    (selector & !3) as u64
}

/// A far pointer for 32-bit operands, which a ring-3 guest can read too.
fn pointer(offset: u64, selector: u16) -> u64 {
    let at = frame(2) as *mut u32;
    // SAFETY: a test frame.
    unsafe {
        at.write_volatile(offset as u32);
        at.add(1).write_volatile(selector.into());
    }
    at as u64
}

fn go(code: u64, offset: u64, selector: u16) -> Option<Trap> {
    Some(trap::run(&Frame { rdi: pointer(offset, selector), ..Frame::kernel(code) }))
}

fn outcome(trap: Option<Trap>) -> (u64, u64, u64) {
    trap.map_or((0, 0, 0), |t| (t.frame.vector, t.frame.cs, t.frame.rip))
}

pub fn run(t: &mut Report) {
    jumps(t);
    calls(t);
    returns(t);
    call_gates(t);
    interrupt_gates(t);
    irets(t);
    flags(t);
}

fn jumps(t: &mut Report) {
    t.eq("far JMP", outcome(go(far_jump(), landing(), CODE)), (UD, CODE.into(), landing()));
    let got = outcome(go(far_jump(), landing32(), CODE32));
    t.eq("far JMP to compatibility mode", got, (UD, CODE32.into(), landing32() + 2));
    t.trap("far JMP, null", go(far_jump(), landing(), 0), GP, 0);
    t.trap("far JMP, data", go(far_jump(), landing(), DATA), GP, bits(DATA));
    t.trap("far JMP, beyond the GDT", go(far_jump(), landing(), 0x3f8), GP, 0x3f8);
    t.trap("far JMP, ring 3's code", go(far_jump(), landing(), USER_CODE), GP, bits(USER_CODE));
    set_gdt(SLOT, segment(0, 0xfffff, 0x1a, 0xa));
    t.trap("far JMP, absent", go(far_jump(), landing(), SLOT), NP, bits(SLOT));
    if !t.avoided_on_tcg("far JMP, both L and D", "accepted, and a hypervisor below cannot go on") {
        set_gdt(SLOT, segment(0, 0xfffff, 0x9a, 0xe));
        t.trap("far JMP, both L and D", go(far_jump(), landing(), SLOT), GP, bits(SLOT));
    }
    set_gdt(SLOT, segment(0, 0xfffff, 0x9e, 0xa));
    let trap = trap::run(&Frame {
        rdi: paging::user(pointer(paging::user(landing()), SLOT)),
        ..Frame::user(far_jump())
    });
    t.eq(
        "far JMP in ring 3 to conforming code",
        (trap.frame.vector, trap.frame.cs),
        (UD, u64::from(SLOT | 3)),
    );
    t.trap("far JMP to a TSS in long mode", go(far_jump(), 0, segments::TSS), GP, bits(segments::TSS));
}

fn calls(t: &mut Report) {
    let trap = go(far_call(), landing(), CODE).unwrap_or_default();
    let pushed = read(trap.frame.rsp);
    t.eq("far CALL, return address", pushed & 0xffff_ffff, far_call() + 2);
    t.eq("far CALL, return selector", pushed >> 32 & 0xffff, CODE.into());
    t.eq("far CALL, 8 bytes", trap.frame.rsp, trap::stack_top() - 8);
    let trap = go(far_call(), return32(), CODE32).unwrap_or_default();
    let got = (trap.frame.vector, trap.frame.cs, trap.frame.rip, trap.frame.rbx);
    t.eq("far CALL to 32-bit code and back", got, (UD, CODE.into(), far_call() + 2, CODE32.into()));
    t.trap("far CALL, data", go(far_call(), landing(), DATA), GP, bits(DATA));
    if cpu::is_intel() {
        let at = frame(2) as *mut u64;
        // SAFETY: a test frame.
        unsafe {
            at.write_volatile(landing());
            at.add(1).write_volatile(CODE.into());
        }
        let trap = trap::run(&Frame { rdi: at as u64, ..Frame::kernel(far_call64()) });
        t.eq("far CALL with REX.W, 16 bytes", trap.frame.rsp, trap::stack_top() - 16);
    }
}

fn returns(t: &mut Report) {
    let go = |selector: u16, offset: u64| {
        let f = Frame { rax: selector.into(), rbx: offset, ..Frame::kernel(far_return()) };
        Some(trap::run(&f))
    };
    t.eq("far RET", outcome(go(CODE, landing())), (UD, CODE.into(), landing()));
    t.trap("far RET, null", go(0, landing()), GP, 0);
    t.trap("far RET, data", go(DATA, landing()), GP, bits(DATA));
    // To ring 3: RETF takes RSP and SS from the stack too.
    let stack = trap::stack_top() - 64;
    let words = [paging::user(landing()), USER_CODE.into(), paging::user(stack), USER_DATA.into()];
    for (i, word) in words.iter().enumerate() {
        paging::write(stack + 8 * i as u64, *word);
    }
    let trap = trap::run(&Frame { rsp: stack, ..Frame::kernel(far_return() + 2) });
    let got = (trap.frame.vector, trap.frame.cs, trap.frame.ss, trap.frame.rsp);
    t.eq("far RET to ring 3", got, (UD, USER_CODE.into(), USER_DATA.into(), paging::user(stack)));
    paging::write(stack + 24, DATA.into());
    let trap = trap::run(&Frame { rsp: stack, ..Frame::kernel(far_return() + 2) });
    t.trap("far RET to ring 3, SS of ring 0", Some(trap), GP, bits(DATA));
    let f = Frame { rax: CODE.into(), rbx: landing(), ..Frame::user(far_return()) };
    t.trap("far RET from ring 3 to ring 0", Some(trap::run(&f)), GP, bits(CODE));
}

/// A 64-bit call gate takes two slots.
fn set_gate(target: u64, selector: u16, access: u8) {
    set_gdt(SLOT, gate(target, selector, 0, access));
    set_gdt(SLOT + 8, target >> 32);
}

fn call_gates(t: &mut Report) {
    set_gate(gate_landing(), CODE, 0xec);
    let trap = go(far_call(), 0, SLOT).unwrap_or_default();
    let f = trap.frame;
    t.eq("call gate, same ring", (f.vector, f.rax, f.rbx), (UD, far_call() + 2, CODE.into()));
    let user = |code: u64, selector: u16| {
        let f = Frame { rdi: paging::user(pointer(0, selector)), ..Frame::user(code) };
        trap::run(&f)
    };
    let f = user(through_gate(), SLOT | 3).frame;
    let back = paging::user(through_gate()) + 2;
    t.eq("call gate from ring 3", (f.vector, f.cs, f.ss), (UD, CODE.into(), 0));
    let stack = paging::user(trap::stack_top());
    t.eq("what it pushed", (f.rax, f.rbx, f.rcx, f.rdx), (back, USER_CODE.into(), stack, USER_DATA.into()));
    t.eq("its stack is RSP0", f.rsp, tss().rsp[0] - 32);
    set_gate(gate_return(), CODE, 0xec);
    let f = user(through_gate(), SLOT | 3).frame;
    t.eq(
        "call gate and return",
        (f.vector, f.cs, f.rax, f.rsp),
        (UD, USER_CODE.into(), USER_CODE.into(), stack),
    );
    set_gate(gate_landing(), CODE, 0x8c);
    t.trap("call gate of DPL 0 in ring 3", Some(user(far_call(), SLOT | 3)), GP, bits(SLOT));
    set_gate(gate_landing(), CODE, 0x6c);
    t.trap("call gate, absent", Some(user(far_call(), SLOT | 3)), NP, bits(SLOT));
    set_gate(gate_landing(), DATA, 0xec);
    t.trap("call gate to data", Some(user(far_call(), SLOT | 3)), GP, bits(DATA));
    set_gate(gate_landing(), CODE32, 0xec);
    t.trap("call gate to 32-bit code", Some(user(far_call(), SLOT | 3)), GP, bits(CODE32));
    set_gate(gate_landing(), 0, 0xec);
    t.trap("call gate to null", Some(user(far_call(), SLOT | 3)), GP, 0);
}

static FLAGS: AtomicU64 = AtomicU64::new(0);

fn see_flags(_: &mut Frame) -> bool {
    FLAGS.store(cpu::flags(), SeqCst);
    true
}

fn interrupt_gates(t: &mut Report) {
    const IF: u64 = 0x200;
    let old = tss().rsp[0];
    // Not aligned: the CPU aligns.
    tss().rsp[0] = old - 8;
    trap::set_gate(0x42, trap::stub(0x42), CODE, 0, 0xee);
    let trap = trap::run(&Frame::user(int_0x42()));
    let f = trap.frame;
    t.eq("INT from ring 3", (f.vector, f.cs, f.rip), (0x42, USER_CODE.into(), paging::user(int_0x42()) + 2));
    t.eq("its stack is RSP0, aligned", trap.stack + size_of::<Frame>() as u64, old - 16);
    tss().rsp[0] = old;
    let f = Frame::kernel(int_0x42());
    let trap = trap::run(&Frame { rsp: f.rsp - 4, ..f });
    t.eq(
        "INT in ring 0 without IST: same stack, aligned",
        trap.stack + size_of::<Frame>() as u64,
        f.rsp - 16,
    );
    t.eq("INT, saved RSP", trap.frame.rsp, f.rsp - 4);
    trap::set_gate(0x42, trap::stub(0x42), CODE, 2, 0xee);
    let trap = trap::run(&Frame::user(int_0x42()));
    t.eq("INT with IST", trap.stack + size_of::<Frame>() as u64, tss().ist[1]);

    trap::hook(0x42, Some(see_flags));
    let f = Frame { rflags: 2 | IF, ..Frame::user(int_0x42()) };
    let trap = trap::run(&f);
    t.eq("there and back", (trap.frame.vector, trap.frame.rax), (UD, USER_CODE.into()));
    t.eq("interrupt gate clears IF", FLAGS.load(SeqCst) & IF, 0);
    t.eq("IRET sets it again", trap.frame.rflags & IF, IF);
    trap::set_gate(0x42, trap::stub(0x42), CODE, 2, 0xef);
    trap::run(&f);
    t.eq("trap gate keeps IF", FLAGS.load(SeqCst) & IF, IF);
    trap::hook(0x42, None);
}

fn irets(t: &mut Report) {
    let stack = trap::stack_top() - 128;
    let go = |words: [u64; 5]| {
        for (i, word) in words.iter().enumerate() {
            paging::write(stack + 8 * i as u64, *word);
        }
        Some(trap::run(&Frame { rsp: stack, ..Frame::kernel(iret()) }))
    };
    let (here, there) = (landing(), paging::user(landing()));
    let (code, data): (u64, u64) = (CODE.into(), DATA.into());
    let (user_code, user_data) = (USER_CODE.into(), USER_DATA.into());
    t.eq("IRET", outcome(go([here, code, 2, stack, data])), (UD, code, here));
    let got = outcome(go([here, code, 2, stack, 0]));
    t.eq("IRET to ring 0, null SS", got, (UD, code, here));
    t.trap("IRET, null CS", go([here, 0, 2, stack, data]), GP, 0);
    t.trap("IRET, data as CS", go([here, data, 2, stack, data]), GP, data);
    t.trap("IRET to ring 3, null SS", go([there, user_code, 2, stack, 3]), GP, 0);
    t.trap("IRET to ring 3, SS of ring 0", go([there, user_code, 2, stack, data]), GP, data);
    set_gdt(SLOT, segment(0, 0xfffff, 0x72, 0xc));
    let absent = u64::from(SLOT | 3);
    t.tcg("#NP instead").trap(
        "IRET to ring 3, absent SS",
        go([there, user_code, 2, stack, absent]),
        SS,
        bits(SLOT),
    );
    let trap = Some(trap::run(&Frame { rflags: 2 | 1 << 14, rsp: stack, ..Frame::kernel(iret()) }));
    t.trap("IRET with NT in long mode", trap, GP, 0);
    let trap = go([here, code, 2 | 1 << 17, stack, data]);
    t.eq("IRET ignores VM in long mode", outcome(trap), (UD, code, here));
    t.eq("VM stays clear", trap.map(|t| t.frame.rflags >> 17 & 1), Some(0));
    let got = outcome(go([paging::user(landing32()), USER_CODE32.into(), 2, stack, user_data]));
    t.eq("IRET to 32-bit ring 3", got, (UD, USER_CODE32.into(), paging::user(landing32()) + 2));
}

/// What ring 3 may do with IF and IOPL.
fn flags(t: &mut Report) {
    const IF: u64 = 0x200;
    const IOPL: u64 = 0x3000;
    t.trap("CLI in ring 3", Some(trap::run(&Frame::user(cli()))), GP, 0);
    let trap = trap::run(&Frame { rflags: 2 | IF | IOPL, ..Frame::user(cli()) });
    t.eq("CLI in ring 3 with IOPL 3", (trap.frame.vector, trap.frame.rflags & IF), (UD, 0));
    let trap = trap::run(&Frame { rax: 2, rflags: 2 | IF, ..Frame::user(popf()) });
    t.eq("POPF in ring 3 keeps IF", trap.frame.rbx & IF, IF);
    let trap = trap::run(&Frame { rax: 2 | IOPL, rflags: 2, ..Frame::user(popf()) });
    t.eq("POPF in ring 3 keeps IOPL", trap.frame.rbx & IOPL, 0);
    let trap = trap::run(&Frame { rax: 2, rflags: 2 | IF | IOPL, ..Frame::user(popf()) });
    t.eq("POPF with IOPL 3 changes IF, not IOPL", trap.frame.rbx & (IF | IOPL), IOPL);
    let trap = trap::run(&Frame { rax: 2 | IOPL, ..Frame::kernel(popf()) });
    t.eq("POPF in ring 0 sets IOPL", trap.frame.rbx & IOPL, IOPL);
}
