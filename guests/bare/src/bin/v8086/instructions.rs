//! What 8086 code may do, by IOPL (SDM 3B, 21.2 and 21.3).

use bare::{
    code, legacy,
    report::Report,
    segments::{CODE32, gate},
};

use crate::machine::{
    CS, DS, ES, FS, GS, IF, IOPL3, SP, SS, VM, at_halt, counting, data, ends, pushed, result, run_in, task_a,
};

code! {
    look: ".code16", "mov word ptr [0], cs", "mov word ptr [2], ss", "mov word ptr [4], ds", "mov word ptr [6], es",
        "mov word ptr [8], fs", "mov word ptr [10], gs", "mov word ptr [12], sp", "smsw ax", "mov word ptr [14], ax",
        "hlt";
    load: ".code16", "mov ax, 0x7f1", "mov ds, ax", "mov word ptr [0], 0x1234", "push 0x7f2", "pop es",
        "mov byte ptr es:[0], 0x56", "hlt";
    far: ".code16", "6: .byte 0x9a", ".word 8f - 6b, 0x900", "push 0x55", "pop ax", "mov word ptr [2], ax", "hlt",
        "8: mov word ptr [0], sp", ".byte 0xcb";
    cli: ".code16", "cli", "hlt";
    sti: ".code16", "sti", "hlt";
    pushf: ".code16", "pushf", "pop word ptr [0]", "hlt";
    pushfd: ".code16", "pushfd", "pop dword ptr [0]", "hlt";
    popf: ".code16", "push 0", "popf", "hlt";
    popfd: ".code16", "push 0", "push 0", "popfd", "hlt";
    only_popf: ".code16", "popf", "hlt";
    only_iret: ".code16", "iret", "hlt";
    iret: ".code16", "6: push 0", "push cs", ".byte 0x6a, 8f - 6b", "iret", "8: hlt";
    int_30: ".code16", "int 0x30", "mov word ptr [0], ds", "mov word ptr [2], gs", "mov word ptr [4], sp", "hlt";
    int3: ".code16", "int3", "hlt";
    into: ".code16", "mov al, 0x7f", "inc al", "into", "hlt";
    hlt: ".code16", "hlt";
    clts: ".code16", "clts", "hlt";
    read_cr0: ".code16", "mov eax, cr0", "hlt";
    write_cr0: ".code16", "mov cr0, eax", "hlt";
    read_dr7: ".code16", "mov eax, dr7", "hlt";
    lgdt: ".code16", "lgdt [0]", "hlt";
    lidt: ".code16", "lidt [0]", "hlt";
    lmsw: ".code16", "lmsw ax", "hlt";
    rdmsr: ".code16", "rdmsr", "hlt";
    wbinvd: ".code16", "wbinvd", "hlt";
    sldt: ".code16", "sldt ax", "hlt";
    str: ".code16", "str ax", "hlt";
    lldt: ".code16", "lldt ax", "hlt";
    ltr: ".code16", "ltr ax", "hlt";
    lar: ".code16", "lar ax, ax", "hlt";
    lsl: ".code16", "lsl ax, ax", "hlt";
    verr: ".code16", "verr ax", "hlt";
    arpl: ".code16", ".byte 0x63, 0xc0", "hlt";
    out8: ".code16", "out 0x80, al", "hlt";
    out16: ".code16", "out 0x80, ax", "hlt";
    out32: ".code16", "out 0x80, eax", "hlt";
    in_far: ".code16", "mov dx, 0x200", "in al, dx", "hlt";
}

pub fn run(t: &mut Report) {
    segments(t);
    privileged(t);
    without_iopl(t);
    with_iopl(t);
    interrupts(t);
    ports(t);
}

fn segments(t: &mut Report) {
    task_a();
    let trap = run_in(0, look());
    t.check("IRET to virtual-8086 mode", at_halt(trap));
    t.eq("CS, SS, DS, ES, FS, GS", [0, 1, 2, 3, 4, 5].map(data), [CS, SS, DS, ES, FS, GS]);
    t.eq("SP, PE", (data(6), data(7) & 1), (SP as u16, 1));
    let frame = [1, 2, 3, 4, 5, 6, 8].map(pushed);
    t.eq("GS, FS, DS, ES, SS, ESP, CS pushed", frame, [GS, FS, DS, ES, SS, SP as u16, CS].map(u32::from));
    task_a();
    t.check("loads of segments", at_halt(run_in(0, load())));
    t.eq("what went through them", (data(8), data(16)), (0x1234, 0x56));
    t.eq("DS and ES pushed", (pushed(3), pushed(4)), (0x7f1, 0x7f2));
    task_a();
    t.check("far CALL and RETF", at_halt(run_in(0, far())));
    t.eq("SP in it, and after it", (data(0), data(1)), (SP as u16 - 4, 0x55));
}

fn privileged(t: &mut Report) {
    for (name, code) in [
        ("HLT", hlt()),
        ("CLTS", clts()),
        ("MOV from CR0", read_cr0()),
        ("MOV to CR0", write_cr0()),
        ("MOV from DR7", read_dr7()),
        ("LGDT", lgdt()),
        ("LIDT", lidt()),
        ("LMSW", lmsw()),
        ("RDMSR", rdmsr()),
        ("WBINVD", wbinvd()),
    ] {
        t.eq(name, ends(IOPL3, code), Some((13, 0, 0)));
    }
    for (name, code) in [
        ("SLDT", sldt()),
        ("STR", str()),
        ("LLDT", lldt()),
        ("LTR", ltr()),
        ("LAR", lar()),
        ("LSL", lsl()),
        ("VERR", verr()),
        ("ARPL", arpl()),
    ] {
        t.eq(name, ends(IOPL3, code), Some((6, 0, 0)));
    }
}

fn without_iopl(t: &mut Report) {
    for (name, code) in [
        ("CLI, IOPL 0", cli()),
        ("STI, IOPL 0", sti()),
        ("PUSHF, IOPL 0", pushf()),
        ("PUSHFD, IOPL 0", pushfd()),
        ("POPF, IOPL 0", only_popf()),
        ("IRET, IOPL 0", only_iret()),
    ] {
        t.eq(name, ends(0, code), Some((13, 0, 0)));
    }
    t.eq("CLI, IOPL 2", ends(2 << 12, cli()), Some((13, 0, 0)));
}

fn with_iopl(t: &mut Report) {
    let flags = |code, before| {
        task_a();
        let trap = run_in(before, code);
        (at_halt(trap), trap.map_or(0, |t| t.eflags & (VM | IOPL3 | IF)))
    };
    t.eq("CLI, IOPL 3", flags(cli(), IOPL3 | IF), (true, VM | IOPL3));
    t.eq("STI, IOPL 3", flags(sti(), IOPL3), (true, VM | IOPL3 | IF));
    t.eq("PUSHF, IOPL 3", flags(pushf(), IOPL3 | IF), (true, VM | IOPL3 | IF));
    t.eq("what it pushed", data(0), 0x3202);
    t.eq("PUSHFD, IOPL 3", flags(pushfd(), IOPL3 | IF), (true, VM | IOPL3 | IF));
    t.eq("what it pushed: no VM", (data(0), data(1)), (0x3202, 0));
    t.eq("POPF, IOPL 3: IF, not IOPL", flags(popf(), IOPL3 | IF), (true, VM | IOPL3));
    t.eq("POPFD, IOPL 3: not VM", flags(popfd(), IOPL3 | IF), (true, VM | IOPL3));
    t.eq("IRET, IOPL 3: IF, not IOPL", flags(iret(), IOPL3 | IF), (true, VM | IOPL3));
}

fn interrupts(t: &mut Report) {
    for access in [0xee, 0xef] {
        legacy::set_gate(0x30, Some(gate(counting(), CODE32, 0, access)));
        t.eq("INT, IOPL 0", ends(0, int_30()), Some((13, 0, 0)));
        task_a();
        t.check("INT, IOPL 3, to a handler and back", at_halt(run_in(IOPL3 | IF, int_30())));
        t.eq("handled once", result(4), 1);
        t.eq("in it: DS, ES, FS, GS are null", (result(0), result(1)), (0, 0));
        t.eq("in it: VM, IF", result(2) & (VM | IF), if access == 0xee { 0 } else { IF });
        t.eq("in it: size of the frame", (bare::paging::frame(12) + 4096) as u32 - result(3), 36);
        t.eq("after it: DS, GS, SP", (data(0), data(1), data(2)), (DS, GS, SP as u16));
        t.eq("and its EFLAGS", pushed(7) & (VM | IOPL3 | IF), VM | IOPL3 | IF);
    }
    legacy::set_gate(0x30, None);
    t.eq("INT, IOPL 3, gate of DPL 0", ends(IOPL3, int_30()), Some((13, 0x182, 0)));
    t.eq("INT3, gate of DPL 0", ends(0, int3()), Some((13, 0x1a, 0)));
    legacy::set_gate(3, Some(gate(counting(), CODE32, 0, 0xee)));
    legacy::set_gate(4, Some(gate(counting(), CODE32, 0, 0xee)));
    for (name, code) in [("INT3, IOPL 0", int3()), ("INTO, IOPL 0", into())] {
        task_a();
        t.check(name, at_halt(run_in(0, code)) && result(4) == 1);
    }
    legacy::set_gate(3, None);
    legacy::set_gate(4, None);
}

fn ports(t: &mut Report) {
    // Whether it was let through, with these ports forbidden and a TSS that ends so many bytes behind the map's begin.
    let through = |flags, code, forbidden: &[usize], length: u32| {
        let task = task_a();
        task.describe(103 + length, 0x89);
        for port in forbidden {
            // SAFETY: a test frame; the map follows the 104 bytes that every TSS has.
            unsafe { ((task.address + 104) as *mut u8).add(port / 8).write_volatile(1 << (port % 8)) };
        }
        let trap = run_in(flags, code);
        match trap.map(|t| (t.vector, t.error)) {
            _ if at_halt(trap) => Some(true),
            Some((13, 0)) => Some(false),
            _ => None,
        }
    };
    let (yes, no) = (Some(true), Some(false));
    t.eq("port, no map, IOPL 3", through(IOPL3, out8(), &[], 0), no);
    t.eq("port, allowed, IOPL 0", through(0, out8(), &[], 32), yes);
    t.eq("port, forbidden, IOPL 3", through(IOPL3, out8(), &[0x80], 32), no);
    t.eq("port, next one forbidden", through(0, out8(), &[0x81], 32), yes);
    t.eq("2 ports, second forbidden", through(0, out16(), &[0x81], 32), no);
    t.eq("4 ports, fourth forbidden", through(0, out32(), &[0x83], 32), no);
    t.eq("4 ports, fifth forbidden", through(0, out32(), &[0x84], 32), yes);
    t.eq("port beyond the map", through(IOPL3, in_far(), &[], 32), no);
    t.eq("port in the map's last byte", through(0, out8(), &[], 17), no);
    t.eq("port in the last byte but one", through(0, out8(), &[], 18), yes);
}
