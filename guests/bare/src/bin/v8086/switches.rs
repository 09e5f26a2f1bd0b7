//! Task switches into virtual-8086 mode and out of it.

use bare::{
    code, legacy,
    paging::frame,
    report::Report,
    segments::{CODE32, DATA, gate},
    task::{LINK, Task, wide},
};

use crate::machine::{
    CS, DS, ES, FS, GS, IOPL3, NT, SP, SS, TASK_A, TASK_B, TASK_C, VM, at_halt, data, place, result, task_a,
};

code! {
    jump: ".code32", "mov eax, 0x80", "ltr ax", ".byte 0xea", ".long 0", ".word 0x90";
    call: ".code32", "mov eax, 0x80", "ltr ax", ".byte 0x9a", ".long 0", ".word 0x90", "ret";
    look: ".code16", "mov word ptr [0], ds", "mov word ptr [2], es", "mov word ptr [4], fs", "mov word ptr [6], gs",
        "mov word ptr [8], sp", "mov word ptr [10], bx", "hlt";
    int_30: ".code16", "int 0x30", "mov word ptr [0], bx", "mov word ptr [2], gs", "hlt";
    // A handler that ends the task.
    leave: ".code32", "pushfd", "or dword ptr [esp], 0x4000", "popfd", "iretd";
    task: ".code32", "mov word ptr [V8086_RESULTS], ds", "str eax", "mov dword ptr [V8086_RESULTS + 4], eax",
        "mov ebx, 0", "iretd";
}

/// Task B, fresh, in virtual-8086 mode.
fn task_b(flags: u32) -> Task {
    let b = Task::wide(TASK_B, 11, 13, 0);
    for (n, value) in [
        (wide::EFLAGS, flags | VM | 2),
        (wide::CS, CS.into()),
        (wide::SS, SS.into()),
        (wide::DS, DS.into()),
        (wide::ES, ES.into()),
        (wide::FS, FS.into()),
        (wide::GS, GS.into()),
        (wide::ESP, SP),
        (wide::EBX, 0xb0b),
    ] {
        b.set(n, value);
    }
    b
}

pub fn run(t: &mut Report) {
    into(t);
    nested(t);
    out_by_gate(t);
}

fn into(t: &mut Report) {
    let (a, b) = (task_a(), task_b(0));
    place(look());
    let trap = legacy::call(jump());
    t.check("JMP to a task in virtual-8086 mode", at_halt(trap));
    t.eq("TR", trap.map(|t| t.tr), Some(TASK_B.into()));
    t.eq("DS, ES, FS, GS in it", [0, 1, 2, 3].map(data), [DS, ES, FS, GS]);
    t.eq("SP, BX in it", (data(4), data(5)), (SP as u16, 0xb0b));
    t.eq("busy", (a.kind(), b.kind()), (9, 0xb));
    // SAFETY: a test frame.
    let pushed = |n| unsafe { ((frame(13) + 4096) as *const u32).sub(n).read_volatile() };
    let frame = [1, 2, 3, 4, 5, 6, 8].map(pushed);
    t.eq("its exception's frame", frame, [GS, FS, DS, ES, SS, SP as u16, CS].map(u32::from));
}

fn nested(t: &mut Report) {
    let (a, b) = (task_a(), task_b(IOPL3));
    place(int_30());
    legacy::set_gate(0x30, Some(gate(leave(), CODE32, 0, 0xee)));
    t.eq("CALL to a task in virtual-8086 mode, and back from its handler", legacy::call(call()), None);
    legacy::set_gate(0x30, None);
    t.eq("back link", b.get(LINK), TASK_A.into());
    t.eq(
        "it is left in protected mode",
        (b.get(wide::EFLAGS) & (VM | NT), b.get(wide::CS)),
        (0, CODE32.into()),
    );
    t.eq("with null data segments", [wide::DS, wide::ES, wide::FS, wide::GS].map(|n| b.get(n)), [0; 4]);
    t.eq("busy after it", (a.kind(), b.kind()), (0xb, 9));
}

fn out_by_gate(t: &mut Report) {
    let set = |flags| {
        let c = Task::wide(TASK_C, 14, 15, task());
        place(int_30());
        legacy::set_gate(0x30, Some(c.gate()));
        let (_, b) = (task_a(), task_b(flags));
        let trap = legacy::call(jump());
        legacy::set_gate(0x30, None);
        (b, c, trap)
    };
    let (b, c, trap) = set(IOPL3);
    t.check("INT by a task gate, and back", at_halt(trap));
    t.eq("back in its task", trap.map(|t| t.tr), Some(TASK_B.into()));
    t.eq("with its BX and GS", (data(0), data(1)), (0xb0b, GS));
    t.eq("in the handler's: DS, TR", (result(0) as u16, result(1)), (DATA, TASK_C.into()));
    t.eq("handler's back link, busy bits", (c.get(LINK), b.kind(), c.kind()), (TASK_B.into(), 0xb, 9));
    let saved = (b.get(wide::EFLAGS) & (VM | IOPL3 | NT), b.get(wide::EIP));
    t.eq("saved EFLAGS, EIP", saved, (VM | IOPL3, 2));
    let segments = [wide::CS, wide::SS, wide::DS, wide::ES, wide::FS, wide::GS].map(|n| b.get(n) as u16);
    t.eq("saved segments", segments, [CS, SS, DS, ES, FS, GS]);
    let (_, c, trap) = set(0);
    t.eq("the same with IOPL 0", trap.map(|t| (t.vector, t.error, t.eip)), Some((13, 0, 0)));
    t.eq("does not switch", (trap.map(|t| t.tr), c.kind()), (Some(TASK_B.into()), 9));
}
