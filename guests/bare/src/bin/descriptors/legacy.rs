//! Without long mode: hardware task switches (SDM 3A, chapter 7), and real mode.

use bare::{
    code,
    legacy::{self, LegacyTrap},
    paging::{frame, read},
    report::Report,
    segments::{CODE32, FREE, segment, set_gdt},
    task::{LINK, Task, wide},
};

/// Selectors of two tasks.
const TASK_A: u16 = FREE;
const TASK_B: u16 = FREE + 16;
/// 16-bit segments for the way to real mode, and one for a test.
const CODE16: u16 = 0xb0;
const DATA16: u16 = 0xb8;
const OTHER: u16 = 0xc0;

/// What 32-bit code leaves.
#[unsafe(no_mangle)]
static mut LEGACY_RESULTS: [u32; 16] = [0; 16];

code! {
    nothing: ".code32", "ret";
    invalid: ".code32", "nop", "ud2";
    bad_load: ".code32", "mov eax, 0x3f8", "mov ds, eax";
    call_task: ".code32", "mov eax, 0x80", "ltr ax", "mov ebx, 0x1111",
        ".byte 0x9a", ".long 0", ".word 0x90",
        "call_task_back: mov [LEGACY_RESULTS], ebx", "pushfd", "pop dword ptr [LEGACY_RESULTS + 4]",
        "str eax", "mov [LEGACY_RESULTS + 8], eax", "mov eax, cr0", "mov [LEGACY_RESULTS + 12], eax", "ret";
    task: ".code32", "pushfd", "pop dword ptr [LEGACY_RESULTS + 16]", "str eax",
        "mov [LEGACY_RESULTS + 20], eax", "mov [LEGACY_RESULTS + 24], ebx", "mov ebx, 0x2222", "iretd",
        "task_again: ud2";
    jump_task: ".code32", "mov eax, 0x80", "ltr ax", "mov ebx, 0x3333",
        ".byte 0xea", ".long 0", ".word 0x90", "mov [LEGACY_RESULTS], ebx", "ret";
    jumping_task: ".code32", "pushfd", "pop dword ptr [LEGACY_RESULTS + 16]", "str eax",
        "mov [LEGACY_RESULTS + 20], eax", ".byte 0xea", ".long 0", ".word 0x80";
    interrupt: ".code32", "mov eax, 0x80", "ltr ax", "int 0x30", "ret";
    // The task for #GP steps over the two bytes of MOV DS in task A (its TSS is in ESI).
    faulting: ".code32", "mov eax, 0x80", "ltr ax", "mov eax, 0x3f8", "mov ds, eax", "mov [LEGACY_RESULTS], eax",
        "ret";
    fault_task: ".code32", "pop dword ptr [LEGACY_RESULTS + 16]", "mov [LEGACY_RESULTS + 20], esp",
        "add dword ptr [esi + 32], 2", "iretd";
    real_trip: ".code32", "mov [real_esp], esp", "lidt [real_idtr]", ".byte 0xea", ".long 0", ".word 0xb0",
        "real_back: mov eax, 0x10", "mov ds, eax", "mov es, eax", "mov ss, eax", "mov esp, [real_esp]", "ret",
        "real_idtr: .word 0x3ff", ".long 0";
}

core::arch::global_asm!(
    ".data",
    "real_esp: .long 0",
    // Copied to 0x9000; counts at 0x7f00.
    ".globl real_start, real_60, real_0, real_13, real_end",
    ".code16",
    "real_start:",
    "mov ax, 0xb8",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov eax, cr0",
    "and al, 0xfe",
    "mov cr0, eax",
    ".byte 0xea",
    ".word 2f - real_start, 0x900",
    "2: xor ax, ax",
    "mov ds, ax",
    "mov ss, ax",
    "mov sp, 0x7ef0",
    "int 0x60",
    "xor dx, dx",
    "xor cx, cx",
    "div cx",
    "mov ax, 0xffff",
    "mov es, ax",
    "mov bx, 0x10",
    "mov al, es:[bx]",
    "mov [0x7f04], al",
    "mov [0x7f08], cs",
    "mov bx, 0xffff",
    "mov cx, [bx]",
    "mov [0x7f0a], sp",
    "smsw ax",
    "mov [0x7f0c], ax",
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    ".byte 0x66, 0xea",
    ".long real_back",
    ".word 0x38",
    "real_60: inc word ptr [0x7f00]",
    "iret",
    "real_0: inc word ptr [0x7f02]",
    "jmp 3f",
    "real_13: inc word ptr [0x7f06]",
    "3: push bp",
    "mov bp, sp",
    "add word ptr [bp + 2], 2",
    "pop bp",
    "iret",
    "real_end:",
    ".code64",
    ".text",
);

unsafe extern "C" {
    static call_task_back: u8;
    static task_again: u8;
    static real_start: u8;
    static real_60: u8;
    static real_0: u8;
    static real_13: u8;
    static real_end: u8;
}

fn result(n: usize) -> u32 {
    // SAFETY: written by code that has ended.
    unsafe { (&raw const LEGACY_RESULTS[n]).read_volatile() }
}

pub fn run(t: &mut Report) {
    legacy::init();
    t.eq("protected mode and back", legacy::call(nothing()), None);
    let trap = legacy::call(invalid()).map(|t| (t.vector, t.eip, t.cs));
    t.eq("exception in protected mode", trap, Some((6, invalid() as u32 + 1, CODE32.into())));
    let trap = legacy::call(bad_load()).map(|t| (t.vector, t.error, t.eip));
    t.eq("error code in protected mode", trap, Some((13, 0x3f8, bad_load() as u32 + 5)));
    task_call(t);
    task_jump(t);
    task_faults(t);
    task_gates(t);
    real_mode(t);
}

/// Two fresh tasks: A to be loaded, B ready to run `code`.
fn prepare(code: u64) -> (Task, Task) {
    let (a, b) = (Task::wide(TASK_A, 10, 13, 0), Task::wide(TASK_B, 11, 12, code));
    b.set(wide::EBX, 0xb0b);
    b.set(wide::ESI, a.address as u32);
    // SAFETY: nothing runs.
    unsafe { (&raw mut LEGACY_RESULTS).write_volatile([0; 16]) };
    (a, b)
}

const NT: u32 = 1 << 14;

fn task_call(t: &mut Report) {
    let (a, b) = prepare(task());
    t.eq("CALL to a task", legacy::call(call_task()), None);
    t.eq("in it: TR, EBX", (result(5), result(6)), (TASK_B.into(), 0xb0b));
    t.eq("in it: NT", result(4) & NT, NT);
    t.eq("back: EBX, NT, TR", (result(0), result(1) & NT, result(2)), (0x1111, 0, TASK_A.into()));
    t.eq("back: CR0.TS", result(3) & 8, 8);
    t.eq("busy bits", (a.kind(), b.kind()), (0xb, 9));
    t.eq("back link", b.get(LINK), TASK_A.into());
    t.eq("caller's EIP in its TSS", a.get(wide::EIP), &raw const call_task_back as u32);
    t.eq("task's EIP in its TSS", b.get(wide::EIP), &raw const task_again as u32);
    t.eq("task's EBX in its TSS", b.get(wide::EBX), 0x2222);
    t.eq("IRET saves NT clear", b.get(wide::EFLAGS) & NT, 0);
}

fn task_jump(t: &mut Report) {
    let (a, b) = prepare(jumping_task());
    t.eq("JMP to a task and back", legacy::call(jump_task()), None);
    t.eq("its registers are back", result(0), 0x3333);
    t.eq("in it: TR, NT", (result(5), result(4) & NT), (TASK_B.into(), 0));
    t.eq("no back link", b.get(LINK), 0);
    t.eq("busy bits after JMP", (a.kind(), b.kind()), (0xb, 9));
}

fn task_faults(t: &mut Report) {
    let outcome = |trap: Option<LegacyTrap>| trap.map(|t| (t.vector, t.error, t.tr));
    const A: u32 = TASK_A as u32;
    const B: u32 = TASK_B as u32;
    let (_, b) = prepare(task());
    b.describe(103, 0x09);
    t.eq("task, absent", outcome(legacy::call(call_task())), Some((11, B, A)));
    let (_, b) = prepare(task());
    b.describe(103, 0x8b);
    t.eq("task, busy", outcome(legacy::call(call_task())), Some((13, B, A)));
    let (_, b) = prepare(task());
    b.describe(102, 0x89);
    t.eq("task, short TSS", outcome(legacy::call(call_task())), Some((10, B, A)));
    // From here on the fault is the new task's. A bad CS or SS would leave no stack to take it on.
    let (_, b) = prepare(task());
    b.set(wide::ES, CODE32.into());
    t.eq("task, readable code as ES", outcome(legacy::call(call_task())), None);
    let (_, b) = prepare(task());
    b.set(wide::ES, 0x3f8);
    t.eq("task, ES beyond the GDT", outcome(legacy::call(call_task())), Some((10, 0x3f8, B)));
    let (_, b) = prepare(task());
    set_gdt(OTHER, segment(0, 0xfffff, 0x12, 0xc));
    b.set(wide::ES, OTHER.into());
    t.eq("task, absent ES", outcome(legacy::call(call_task())), Some((11, OTHER.into(), B)));
}

fn task_gates(t: &mut Report) {
    let gate = u64::from(TASK_B) << 16 | 0x85 << 40;
    prepare(task());
    legacy::set_gate(0x30, Some(gate));
    t.eq("INT by a task gate", legacy::call(interrupt()), None);
    legacy::set_gate(0x30, None);
    t.eq("in it: TR, NT", (result(5), result(4) & NT), (TASK_B.into(), NT));
    prepare(fault_task());
    legacy::set_gate(13, Some(gate));
    t.eq("exception by a task gate", legacy::call(faulting()), None);
    legacy::set_gate(13, None);
    t.eq("error code on its stack", (result(4), result(5)), (0x3f8, frame(12) as u32 + 4096));
    t.eq("and the faulting task goes on", result(0), 0x3f8);
}

fn low(address: u64) -> u16 {
    read(address) as u16
}

fn real_mode(t: &mut Report) {
    set_gdt(CODE16, segment(0x9000, 0xffff, 0x9b, 0));
    set_gdt(DATA16, segment(0, 0xffff, 0x93, 0));
    let start = &raw const real_start;
    // SAFETY: low memory, which nothing else uses by now.
    unsafe {
        (0x9000 as *mut u8).copy_from(start, &raw const real_end as usize - start as usize);
        (0x7f00 as *mut u8).write_bytes(0, 32);
        for (vector, handler) in
            [(0x60, &raw const real_60), (0, &raw const real_0), (13, &raw const real_13)]
        {
            let offset = (handler as usize - start as usize) as u32;
            let entry = core::hint::black_box(vector * 4) as *mut u32;
            core::arch::asm!("mov [{}], {:e}", in(reg) entry, in(reg) 0x900 << 16 | offset);
        }
    }
    t.eq("real mode and back", legacy::call(real_trip()), None);
    t.eq("INT by the IVT", low(0x7f00), 1);
    t.eq("divide error by the IVT", low(0x7f02), 1);
    t.eq("FFFF:0010 is 1 MiB", low(0x7f04) & 0xff, low(0x10_0000) & 0xff);
    t.eq("CS", low(0x7f08), 0x900);
    t.eq("stack", low(0x7f0a), 0x7ef0);
    t.eq("CR0.PE", low(0x7f0c) & 1, 0);
    t.tcg("segment limits are not checked").eq("word at offset FFFF", low(0x7f06), 1);
}
