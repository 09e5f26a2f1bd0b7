//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS, FS and GS bases, UMIP.

use core::arch::asm;

use bare::{
    code,
    cpu::{self, CSTAR, EFER, FS_BASE, GS_BASE, KERNEL_GS_BASE, LSTAR, SFMASK, STAR, rdmsr, wrmsr},
    paging::{self, frame},
    report::Report,
    segments::{CODE, DATA, USER_CODE, USER_CODE32, USER_DATA},
    trap::{self, Frame, GP, UD},
};

code! {
    syscall: "syscall";
    syscall32: ".code32", "syscall";
    sysret: "sysretq";
    sysret32: "sysret";
    sysenter: "sysenter";
    sysexit: ".byte 0x48, 0x0f, 0x35";
    landing: "ud2";
    landing32: ".code32", "ud2";
    swapgs: "swapgs";
    load_fs: "mov rax, fs:[8]", "mov rbx, gs:[8]";
    rdfsbase: "rdfsbase rax", "rdgsbase rbx";
    wrfsbase: "wrfsbase rax", "wrgsbase rbx";
    sidt: "sidt [rsp - 32]";
    smsw: "smsw eax";
    str_: "str eax";
}

pub fn run(t: &mut Report) {
    syscalls(t);
    sysenters(t);
    bases(t);
    umip(t);
}

fn syscalls(t: &mut Report) {
    // SAFETY: what lands there traps; no page depends on it.
    unsafe {
        wrmsr(EFER, rdmsr(EFER) & !1);
        t.trap("SYSCALL without EFER.SCE", Some(trap::run(&Frame::user(syscall()))), UD, 0);
        t.eq("its CS", trap::run(&Frame::user(syscall())).frame.cs, USER_CODE.into());
        wrmsr(EFER, rdmsr(EFER) | 1);
        wrmsr(STAR, u64::from(CODE) << 32 | u64::from(USER_CODE32) << 48);
        wrmsr(LSTAR, landing());
        wrmsr(CSTAR, landing());
        wrmsr(SFMASK, 0x4d5);
    }
    let flags = 0x2 | 0x8d5 | 0x400;
    let from = Frame::user(syscall());
    let f = trap::run(&Frame { rflags: flags, ..from }).frame;
    t.eq("SYSCALL lands", (f.vector, f.rip, f.cs, f.ss), (UD, landing(), CODE.into(), DATA.into()));
    t.eq("SYSCALL, RCX, R11, RSP", (f.rcx, f.r11, f.rsp), (from.rip + 2, flags, from.rsp));
    t.tcg("arithmetic flags are all cleared").eq("SYSCALL, flags masked", f.rflags & 0xfd7, flags & !0x4d5);
    let target = paging::user(landing());
    let back = |code: u64, rcx: u64| {
        trap::run(&Frame { rcx, r11: 0x202 | 1 << 16 | 1 << 17, ..Frame::kernel(code) })
    };
    let f = back(sysret(), target).frame;
    t.eq("SYSRET", (f.vector, f.rip, f.cs, f.ss), (UD, target, USER_CODE.into(), USER_DATA.into()));
    t.tcg("VM is kept").eq("SYSRET, flags", f.rflags & 0x2_0202, 0x202);
    let f = back(sysret32(), paging::user(landing32())).frame;
    t.eq("SYSRET to 32-bit", (f.vector, f.cs, f.ss), (UD, USER_CODE32.into(), USER_DATA.into()));
    let trap = back(sysret(), 1 << 63);
    let expected = if cpu::is_intel() { CODE } else { USER_CODE };
    t.tcg("as on Intel").eq(
        "SYSRET, not canonical",
        (trap.frame.vector, trap.frame.error, trap.frame.cs),
        (GP, 0, expected.into()),
    );
    let trap = trap::run(&Frame { rcx: target, ..Frame::user(sysret()) });
    t.trap("SYSRET in ring 3", Some(trap), GP, 0);
    let from = Frame::user32(syscall32());
    let f = trap::run(&from).frame;
    if cpu::is_intel() {
        t.eq("SYSCALL in compatibility mode", (f.vector, f.rip), (UD, from.rip));
    } else {
        t.eq("SYSCALL in compatibility mode", (f.vector, f.rip, f.rcx), (UD, landing(), from.rip + 2));
    }
}

fn sysenters(t: &mut Report) {
    // SAFETY: what lands there traps.
    unsafe {
        wrmsr(0x174, 0);
        wrmsr(0x175, trap::stack_top());
        wrmsr(0x176, landing());
    }
    let f = trap::run(&Frame::user(sysenter())).frame;
    if !cpu::is_intel() {
        return t.eq("SYSENTER in long mode", (f.vector, f.cs), (UD, USER_CODE.into()));
    }
    t.eq("SYSENTER without a selector", (f.vector, f.error), (GP, 0));
    // SAFETY: as before.
    unsafe { wrmsr(0x174, CODE.into()) };
    let f = trap::run(&Frame { rflags: 0x202, ..Frame::user(sysenter()) }).frame;
    t.eq("SYSENTER lands", (f.vector, f.rip, f.cs, f.ss), (UD, landing(), CODE.into(), DATA.into()));
    t.eq("SYSENTER, RSP and IF", (f.rsp, f.rflags & 0x200), (trap::stack_top(), 0));
    let (target, stack) = (paging::user(landing()), paging::user(trap::stack_top()));
    let f = trap::run(&Frame { rcx: stack, rdx: target, ..Frame::kernel(sysexit()) }).frame;
    t.eq("SYSEXIT", (f.vector, f.rip, f.cs, f.ss, f.rsp), (UD, target, USER_CODE.into(), 0x33, stack));
    t.trap("SYSEXIT in ring 3", Some(trap::run(&Frame::user(sysexit()))), GP, 0);
}

fn bases(t: &mut Report) {
    paging::write(frame(3) + 8, 0xf5);
    paging::write(frame(4) + 8, 0x65);
    // SAFETY: our code uses neither FS nor GS.
    unsafe {
        wrmsr(FS_BASE, frame(3));
        wrmsr(GS_BASE, frame(4));
        wrmsr(KERNEL_GS_BASE, 0x1234);
    }
    let f = trap::run(&Frame::kernel(load_fs())).frame;
    t.eq("FS and GS bases", (f.rax, f.rbx), (0xf5, 0x65));
    trap::run(&Frame::kernel(swapgs()));
    t.eq("SWAPGS", (rdmsr(GS_BASE), rdmsr(KERNEL_GS_BASE)), (0x1234, frame(4)));
    t.trap("SWAPGS in ring 3", Some(trap::run(&Frame::user(swapgs()))), GP, 0);
    // SAFETY: refused.
    let trap = trap::catch(|| unsafe { wrmsr(GS_BASE, 1 << 63) });
    t.tcg("accepted").trap("GS base, not canonical", trap, GP, 0);
    // SAFETY: our code uses neither FS nor GS.
    unsafe {
        wrmsr(FS_BASE, 0x5555);
        asm!("mov fs, {:e}", in(reg) u32::from(DATA));
    }
    t.eq("a load of FS sets its base", rdmsr(FS_BASE), 0);
    if cpu::has(7, 1, 0) {
        t.trap("RDFSBASE without CR4.FSGSBASE", Some(trap::run(&Frame::kernel(rdfsbase()))), UD, 0);
        // SAFETY: allows four instructions.
        unsafe { cpu::set_cr4(cpu::cr4() | 1 << 16) };
        trap::run(&Frame { rax: 0x7777, rbx: 0x8888, ..Frame::user(wrfsbase()) });
        let f = trap::run(&Frame::user(rdfsbase())).frame;
        t.eq("WRFSBASE, WRGSBASE, RDFSBASE, RDGSBASE", (f.rax, f.rbx), (0x7777, 0x8888));
        t.eq("and by MSR", (rdmsr(FS_BASE), rdmsr(GS_BASE)), (0x7777, 0x8888));
        let trap = trap::run(&Frame { rax: 1 << 63, ..Frame::kernel(wrfsbase()) });
        t.tcg("accepted").trap("WRFSBASE, not canonical", Some(trap), GP, 0);
        // SAFETY: as it was.
        unsafe { cpu::set_cr4(cpu::cr4() & !(1 << 16)) };
    } else {
        t.trap("RDFSBASE", Some(trap::run(&Frame::kernel(rdfsbase()))), UD, 0);
    }
    // SAFETY: as at the start.
    unsafe {
        wrmsr(FS_BASE, 0);
        wrmsr(GS_BASE, 0);
    }
}

fn umip(t: &mut Report) {
    let three = [("SIDT", sidt()), ("SMSW", smsw()), ("STR", str_())];
    for (name, code) in three {
        t.trap(name, Some(trap::run(&Frame::user(code))), UD, 0);
    }
    if !cpu::has(7, 2, 2) {
        return t.skip("UMIP", "not in CPUID");
    }
    // SAFETY: forbids four instructions to ring 3.
    unsafe { cpu::set_cr4(cpu::cr4() | 1 << 11) };
    for (name, code) in three {
        t.trap(name, Some(trap::run(&Frame::user(code))), GP, 0);
        t.trap(name, Some(trap::run(&Frame::kernel(code))), UD, 0);
    }
    // SAFETY: as it was.
    unsafe { cpu::set_cr4(cpu::cr4() & !(1 << 11)) };
}
