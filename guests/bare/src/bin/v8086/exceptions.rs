//! The way out of virtual-8086 mode by exceptions, and what is no way into it (SDM 3B, 21.2.5 and 21.3).

use bare::{
    code, legacy,
    report::Report,
    segments::{CODE32, USER_CODE32, USER_DATA, gate, segment, set_gdt},
};

use crate::machine::{
    CS, DS, ES, FS, GS, IF, IOPL3, SP, SS, VM, at_halt, counting, ends, enter_frame, pushed, result, run_in,
    task_a,
};

/// A conforming code segment.
const CONFORMING: u16 = 0xb0;

code! {
    divide: ".code16", "xor cx, cx", "div cx", "hlt";
    invalid: ".code16", "nop", "ud2";
    int_30: ".code16", "int 0x30", "hlt";
    read_end: ".code16", "mov bx, 0xffff", "mov ax, word ptr [bx]", "hlt";
    read_beyond: ".code16", "mov ebx, 0x10000", "mov al, byte ptr [ebx]", "hlt";
    push_end: ".code16", "mov sp, 1", "push ax", "hlt";
    popfd_vm: ".code32", "push 0x20002", "popfd", "pushfd", "pop dword ptr [V8086_RESULTS]", "ret";
    iret_vm: ".code32", "push 0x20002", "push 0x1b", "mov eax, offset iret_vm_end", "push eax", "iretd", "iret_vm_end: ud2";
}

unsafe extern "C" {
    static iret_vm_end: u8;
}

pub fn run(t: &mut Report) {
    delivery(t);
    gates(t);
    limits(t);
    no_way_in(t);
}

fn delivery(t: &mut Report) {
    task_a();
    let trap = run_in(IF, divide()).map(|t| (t.vector, t.error, t.eip));
    t.eq("#DE in virtual-8086 mode", trap, Some((0, 0, 2)));
    let frame = [1, 2, 3, 4, 5, 6, 8, 9].map(pushed);
    t.eq("its frame", frame, [GS, FS, DS, ES, SS, SP as u16, CS, 2].map(u32::from));
    t.eq("its EFLAGS: VM, IF", pushed(7) & (VM | IF | IOPL3), VM | IF);
    t.eq("#UD in virtual-8086 mode", ends(0, invalid()), Some((6, 0, 1)));
}

fn gates(t: &mut Report) {
    let through = |selector, access| {
        legacy::set_gate(0x30, Some(gate(counting(), selector, 0, access)));
        let trap = ends(IOPL3, int_30());
        legacy::set_gate(0x30, None);
        trap
    };
    t.eq("INT to privilege 3", through(USER_CODE32, 0xee), Some((13, 0x18, 0)));
    set_gdt(CONFORMING, segment(0, 0xfffff, 0x9f, 0xc));
    t.eq("INT to conforming code", through(CONFORMING, 0xee), Some((13, CONFORMING.into(), 0)));
    t.eq("INT, gate absent", through(CODE32, 0x6e), Some((11, 0x182, 0)));
    legacy::set_gate(6, Some(gate(counting(), 0, 0, 0x8e)));
    const EXT: &str = "no EXT in error codes of delivery";
    t.tcg(EXT).eq("#UD, null selector in the gate", ends(0, invalid()), Some((13, 1, 1)));
    legacy::set_gate(6, Some(gate(counting(), CODE32, 0, 0x0e)));
    t.tcg(EXT).eq("#UD, gate absent", ends(0, invalid()), Some((11, 0x33, 1)));
    legacy::set_gate(6, None);
}

fn limits(t: &mut Report) {
    const WHY: &str = "segment limits are not checked";
    t.tcg(WHY).eq("word at offset FFFF", ends(0, read_end()), Some((13, 0, 3)));
    t.tcg(WHY).eq("byte at offset 10000", ends(0, read_beyond()), Some((13, 0, 6)));
    t.tcg(WHY).eq("push with SP 1", ends(0, push_end()), Some((12, 0, 3)));
}

fn no_way_in(t: &mut Report) {
    t.eq("POPFD with VM, CPL 0", legacy::call(popfd_vm()), None);
    t.eq("changes nothing", result(0) & VM, 0);
    task_a();
    let stack = bare::paging::frame(13) as u32 + 4096;
    let user: [u32; 5] = [iret_vm() as u32, USER_CODE32.into(), 2, stack, USER_DATA.into()];
    let trap = enter_frame([user[0], user[1], user[2], user[3], user[4], 0, 0, 0, 0]);
    let got = trap.map(|t| (t.vector, t.eip, t.cs, t.eflags & VM));
    t.tcg("IRET sets VM at any privilege").eq(
        "IRETD with VM, CPL 3: stays in protected mode",
        got,
        Some((6, &raw const iret_vm_end as u32, 0x1b, 0)),
    );
    task_a();
    let trap = run_in(0, int_30());
    t.check(
        "and IRETD with VM, CPL 0, still works",
        !at_halt(trap) && trap.is_some_and(|t| t.eflags & VM != 0),
    );
}
