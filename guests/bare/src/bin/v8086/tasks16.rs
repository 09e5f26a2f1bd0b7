//! 16-bit tasks, and what can be wrong with a task switch.

use bare::{
    code, legacy,
    legacy::LegacyTrap,
    paging::frame,
    report::Report,
    segments::{CODE32, segment, set_gdt},
    task::{LINK, Task, narrow, wide},
};

use crate::machine::{NT, TASK_A, TASK_B, place, result, set_result, task_a};

/// A code segment that begins where a task's code does, a stack segment, and a gate.
const CODE_B: u16 = 0xb0;
const STACK_B: u16 = 0xb8;
const GATE: u16 = 0xc0;
/// A code segment that begins where the code of a 16-bit task A does.
const CODE_A: u16 = 0xc8;

code! {
    call: ".code32", "mov eax, 0x80", "ltr ax", "mov ebx, 0x11112222", "mov [V8086_RESULTS + 28], esp",
        ".byte 0x9a", ".long 0", ".word 0x90", "call16_back: mov esp, [V8086_RESULTS + 28]",
        "mov [V8086_RESULTS], ebx", "pushfd", "pop dword ptr [V8086_RESULTS + 4]",
        "str eax", "mov [V8086_RESULTS + 8], eax", "ret";
    call_gate: ".code32", "mov eax, 0x80", "ltr ax", ".byte 0x9a", ".long 0", ".word 0xc0", "ret";
    jump: ".code32", "mov eax, 0x80", "ltr ax", "mov ebx, 0x11112222",
        ".byte 0xea", ".long 0", ".word 0x90", "mov [V8086_RESULTS], ebx", "ret";
    interrupt: ".code32", "mov eax, 0x80", "ltr ax", "int 0x30", "ret";
    invalid: ".code32", "mov eax, 0x80", "ltr ax", "ud2";
    faulting: ".code32", "mov eax, 0x80", "ltr ax", "mov eax, 0x3f8", "mov ds, eax", "ret";
    iret: ".code32", "mov eax, 0x80", "ltr ax", "pushfd", "or dword ptr [esp], 0x4000", "popfd",
        "iret16_at: iretd";
    // The rest runs in task B: in a segment that begins with it, with flat data.
    task: ".code32", "task16_at: pushfd", "pop dword ptr [V8086_RESULTS + 16]", "str eax",
        "mov [V8086_RESULTS + 20], eax", "mov [V8086_RESULTS + 24], bx", "mov ebx, 0x33334444", "iretd",
        "task16_again: ud2";
    jumping: ".code32", "pushfd", "pop dword ptr [V8086_RESULTS + 16]", "str eax",
        "mov [V8086_RESULTS + 20], eax", ".byte 0xea", ".long 0", ".word 0x80";
    // The task for #GP steps over the two bytes of MOV DS in task A, whose TSS is where the last result says.
    fault_task: ".code32", "pop word ptr [V8086_RESULTS + 16]", "mov [V8086_RESULTS + 20], sp",
        "mov eax, [V8086_RESULTS + 28]", "add dword ptr [eax + 32], 2", "iretd";
    // From a 16-bit task A to B, and back to where the stack is as it was.
    from16: ".code32", "mov eax, 0x80", "ltr ax", "mov [V8086_RESULTS + 28], esp",
        ".byte 0xea", ".long from16_inside - from16_begin", ".word 0xc8", "from16_begin:", "from16_inside:",
        "mov ebx, 0x11112222", ".byte 0x9a", ".long 0", ".word 0x90", "from16_back:",
        "mov esp, [V8086_RESULTS + 28]", "mov [V8086_RESULTS], bx", "str eax", "mov [V8086_RESULTS + 8], eax",
        ".byte 0xea", ".long from16_end", ".word 0x38", "from16_end: ret";
}

unsafe extern "C" {
    static call16_back: u8;
    static iret16_at: u8;
    static task16_at: u8;
    static task16_again: u8;
    static from16_begin: u8;
    static from16_back: u8;
}

/// A fresh task A, and a 16-bit task B that begins at `code`.
fn prepare(code: u64) -> (Task, Task) {
    place(code);
    set_gdt(CODE_B, segment(code as u32, 0xffff, 0x9b, 4));
    set_gdt(STACK_B, segment(frame(13) as u32, 0xfff, 0x93, 0));
    let b = Task::narrow(TASK_B, 11, CODE_B, STACK_B);
    b.set(narrow::BX, 0xb0b);
    (task_a(), b)
}

fn in_b() -> (u32, u32, u32) {
    (result(4) & NT, result(5), result(6) & 0xffff)
}

pub fn run(t: &mut Report) {
    calls(t);
    jumps(t);
    from_16_bits(t);
    gates(t);
    bad_tasks(t);
    bad_links(t);
    faults_inside(t);
}

fn calls(t: &mut Report) {
    let b32 = u32::from(TASK_B);
    let (a, b) = prepare(task());
    b.set(22, 0x5555);
    t.eq("CALL to a 16-bit task", legacy::call(call()), None);
    t.eq("in it: NT, TR, BX", in_b(), (NT, b32, 0xb0b));
    t.eq("back: EBX, NT, TR", (result(0), result(1) & NT, result(2)), (0x1111_2222, 0, TASK_A.into()));
    t.eq("busy bits", (a.kind(), b.kind()), (0xb, 1));
    t.eq("back link", b.get(LINK), TASK_A.into());
    t.eq("caller's EIP in its TSS", a.get(wide::EIP), &raw const call16_back as u32);
    let length = &raw const task16_again as u32 - &raw const task16_at as u32;
    t.eq("task's IP in its TSS", b.get(narrow::IP), length);
    t.eq("task's BX in its TSS", b.get(narrow::BX), 0x4444);
    t.eq("IRET saves NT clear", b.get(narrow::FLAGS) & NT, 0);
    t.eq("nothing behind its 44 bytes is written", b.get(22), 0x5555);
    let (_, b) = prepare(task());
    set_gdt(GATE, b.gate());
    t.eq("CALL by a task gate", legacy::call(call_gate()), None);
    t.eq("in it: NT, TR", (in_b().0, in_b().1), (NT, b32));
}

fn jumps(t: &mut Report) {
    let (a, b) = prepare(jumping());
    t.eq("JMP to a 16-bit task and back", legacy::call(jump()), None);
    t.eq("its registers are back", result(0), 0x1111_2222);
    t.eq("in it: NT, TR", (in_b().0, in_b().1), (0, TASK_B.into()));
    t.eq("no back link", b.get(LINK), 0);
    t.eq("busy bits after JMP", (a.kind(), b.kind()), (0xb, 1));
}

fn from_16_bits(t: &mut Report) {
    let (_, b) = prepare(task());
    let begin = &raw const from16_begin as u32;
    set_gdt(CODE_A, segment(begin, 0xffff, 0x9b, 4));
    let a = Task::narrow(TASK_A, 10, 0, 0);
    t.eq("CALL from a 16-bit task to another", legacy::call(from16()), None);
    t.eq("in the second: NT, TR, BX", in_b(), (NT, TASK_B.into(), 0xb0b));
    t.eq("back in the first: BX, TR", (result(0) & 0xffff, result(2)), (0x2222, TASK_A.into()));
    let ip = &raw const from16_back as u32 - begin;
    t.eq("its IP and CS in its TSS", (a.get(narrow::IP), a.get(narrow::CS)), (ip, CODE_A.into()));
    t.eq("busy bits of both", (a.kind(), b.kind()), (3, 1));
}

fn gates(t: &mut Report) {
    let (_, b) = prepare(task());
    legacy::set_gate(0x30, Some(b.gate()));
    t.eq("INT to a 16-bit task", legacy::call(interrupt()), None);
    legacy::set_gate(0x30, None);
    t.eq("in it: NT, TR", (in_b().0, in_b().1), (NT, TASK_B.into()));
    let (a, b) = prepare(fault_task());
    legacy::set_gate(13, Some(b.gate()));
    set_result(7, a.address as u32);
    let trap = legacy::call(faulting());
    legacy::set_gate(13, None);
    t.eq("#GP by a 16-bit task: comes back", trap, None);
    t.eq("error code of 16 bits on its stack", (result(4) & 0xffff, result(5) & 0xffff), (0x3f8, 0x800));
    t.eq("busy bits after it", (a.kind(), b.kind()), (0xb, 1));
}

fn outcome(trap: Option<LegacyTrap>) -> Option<(u32, u32, u32)> {
    trap.map(|t| (t.vector, t.error, t.tr))
}

fn bad_tasks(t: &mut Report) {
    let (a, b): (u32, u32) = (TASK_A.into(), TASK_B.into());
    let with = |limit, access, code| {
        let (_, b) = prepare(task());
        b.describe(limit, access);
        legacy::set_gate(0x30, Some(b.gate()));
        legacy::set_gate(6, if code == invalid() { Some(b.gate()) } else { None });
        let trap = legacy::call(code);
        legacy::set_gate(0x30, None);
        legacy::set_gate(6, None);
        outcome(trap)
    };
    t.eq("16-bit task, absent", with(43, 0x01, call()), Some((11, b, a)));
    t.eq("16-bit task, busy", with(43, 0x83, call()), Some((13, b, a)));
    t.eq("16-bit task, short TSS", with(42, 0x81, call()), Some((10, b, a)));
    t.eq("16-bit task, short TSS, by INT", with(42, 0x81, interrupt()), Some((10, b, a)));
    const EXT: &str = "no EXT in error codes of task switches";
    t.tcg(EXT).eq("16-bit task, short TSS, by #UD", with(42, 0x81, invalid()), Some((10, b | 1, a)));
    t.tcg(EXT).eq("16-bit task, absent, by #UD", with(43, 0x01, invalid()), Some((11, b | 1, a)));
    t.tcg(EXT).eq("16-bit task, busy, by #UD", with(43, 0x83, invalid()), Some((13, b | 1, a)));
}

fn bad_links(t: &mut Report) {
    let at = &raw const iret16_at as u32;
    let to = |link: u32, access| {
        let (a, b) = prepare(task());
        b.describe(43, access);
        a.set(LINK, link);
        legacy::call(iret()).map(|t| (t.vector, t.error, t.eip))
    };
    let b = u32::from(TASK_B);
    t.eq("IRET to a task that is not busy", to(b, 0x81), Some((10, b, at)));
    t.eq("IRET to an absent task", to(b, 0x03), Some((11, b, at)));
    t.eq("IRET to no task", to(CODE32.into(), 0x81), Some((10, CODE32.into(), at)));
    t.eq("IRET with a null link", to(0, 0x81), Some((10, 0, at)));
    t.eq("IRET beyond the GDT", to(0x3f8, 0x81), Some((10, 0x3f8, at)));
}

fn faults_inside(t: &mut Report) {
    // From here on the fault is the new task's.
    let whole = |trap: Option<LegacyTrap>| trap.map(|t| (t.vector, t.error, t.tr, t.cs, t.eip));
    let (b32, cs) = (u32::from(TASK_B), u32::from(CODE_B));
    let (_, b) = prepare(task());
    b.set(narrow::ES, 0x3f8);
    const EIP: &str = "a fault in the new task has the old one's EIP";
    t.tcg(EIP).eq(
        "16-bit task, ES beyond the GDT",
        whole(legacy::call(call())),
        Some((10, 0x3f8, b32, cs, 0)),
    );
    let (_, b) = prepare(task());
    b.set(narrow::ES, 0x3f8);
    legacy::set_gate(0x30, Some(b.gate()));
    t.tcg(EIP).eq("the same by INT", whole(legacy::call(interrupt())), Some((10, 0x3f8, b32, cs, 0)));
    legacy::set_gate(0x30, None);
    let _ = prepare(task());
    let b = Task::wide(TASK_B, 11, 13, task());
    b.set(wide::IO, 104 << 16 | 1);
    let want = Some((1, 0, b32, CODE32.into(), task() as u32));
    t.tcg("the T bit is not looked at").eq("task with the T bit", whole(legacy::call(call())), want);
    let _ = prepare(task());
    let b = Task::wide(TASK_B, 11, 13, task());
    b.set(wide::GS, 0x3f8);
    let want = Some((10, 0x3f8, b32, CODE32.into(), task() as u32));
    t.tcg(EIP).eq("32-bit task, GS beyond the GDT", whole(legacy::call(call())), want);
}
