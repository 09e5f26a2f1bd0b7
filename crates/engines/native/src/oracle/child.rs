//! The sandboxed child: it executes cases until it is killed.
//!
//! It comes from `fork` in a process that may have threads, so nothing here allocates, locks or panics.

use std::mem::offset_of;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::{AtomicU32, fence};

use super::blob::{BLOB, BLOB_SIZE, Blob, DATA_PAGES, Data};
use super::wire::{BATCH, CODE_SIZE, Shared, WINDOW, WireCase, WireReply};
use super::{CODE, DATA, DATA_SIZE, Mode, READ_ONLY};

const INT3: u8 = 0xcc;
const TF: u64 = 1 << 8;
/// What a case may set in RFLAGS besides IF and bit 1: the arithmetic flags, DF, NT, AC and ID.
const SETTABLE: u64 = 0x24_4cd5;
const USER_CS: u64 = 0x33;
const USER32_CS: u64 = 0x23;
const USER_SS: u64 = 0x2b;
/// Entries 0 and 1 of the LDT.
const CS16: u64 = 0x07;
const SS16: u64 = 0x0f;

const LONG: u32 = Mode::Long as u32;
const PROTECTED16: u32 = Mode::Protected16 as u32;

type Fallible = Result<(), i32>;

/// The child's life. `memory` is the descriptor of `shared`, `components` the XSAVE components of this host.
pub fn main(shared: &'static Shared, memory: i32, components: u64, has_fsgsbase: bool, parent: i32) -> ! {
    // SAFETY: single-threaded child; every call is a plain system call on memory that is ours.
    let ready = unsafe {
        // Some systems have no LDT.
        shared.has_16_bit.store(segments().is_ok().into(), Release);
        set_up(memory, components, has_fsgsbase)
    };
    if let Err(errno) = ready {
        shared.failure.store(errno as u32, Release);
        shared.reply.fetch_add(1, Release);
        // SAFETY: ends this process only.
        unsafe { libc::_exit(1) };
    }
    let mut done = 0;
    let mut code = (0, 0);
    loop {
        shared.reply.store(done, Release);
        gate(libc::SYS_futex, &raw const shared.reply as u64, libc::FUTEX_WAKE as u64, 1, 0);
        wait(&shared.request, done, parent);
        done = shared.request.load(Acquire);
        let count = shared.count.load(Acquire).min(BATCH as u32);
        let first = shared.progress.load(Acquire);
        for i in first..count {
            let i = i as usize;
            // SAFETY: while a request is under way the child alone uses cases and replies, which are plain data.
            unsafe {
                let case = &shared.cases[i];
                let reply = (&raw const shared.replies[i]).cast_mut();
                execute(shared, case, &mut *reply, &mut code);
            }
            shared.progress.store(i as u32 + 1, Release);
        }
    }
}

/// Waits until `word` is no longer `value`; ends the child when its parent has gone.
fn wait(word: &AtomicU32, value: u32, parent: i32) {
    while word.load(Acquire) == value {
        let second = libc::timespec { tv_sec: 1, tv_nsec: 0 };
        let (word, second) = (std::ptr::from_ref(word) as u64, &raw const second as u64);
        gate(libc::SYS_futex, word, libc::FUTEX_WAIT as u64, u64::from(value), second);
        if gate(libc::SYS_getppid, 0, 0, 0, 0) != i64::from(parent) {
            gate(libc::SYS_exit_group, 0, 0, 0, 0);
        }
    }
}

fn gate(number: i64, a: u64, b: u64, c: u64, d: u64) -> i64 {
    type Gate = extern "sysv64" fn(i64, u64, u64, u64, u64, u64) -> i64;
    // SAFETY: set_up put the gate's code there.
    let gate = unsafe { std::mem::transmute::<usize, Gate>(Blob::gate() as usize) };
    gate(number, a, b, c, d, 0)
}

fn data() -> *mut Data {
    DATA_PAGES as *mut Data
}

unsafe fn set_up(memory: i32, components: u64, has_fsgsbase: bool) -> Fallible {
    use libc::{MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PROT_EXEC, PROT_READ, PROT_WRITE};
    let read_write = PROT_READ | PROT_WRITE;
    let own = MAP_PRIVATE | MAP_ANONYMOUS;
    // SAFETY: as the caller's; map() never replaces a mapping.
    unsafe {
        map(BLOB, BLOB_SIZE + size_of::<Data>(), read_write, own, -1)?;
        std::ptr::copy_nonoverlapping(Blob::template(), BLOB as *mut u8, BLOB_SIZE);
        check(libc::mprotect(BLOB as *mut _, BLOB_SIZE, PROT_READ | PROT_EXEC))?;
        map(CODE, CODE_SIZE, PROT_READ | PROT_EXEC, MAP_SHARED, memory)?;
        map(DATA, DATA_SIZE, read_write, own, -1)?;
        map(READ_ONLY, 0x1000, PROT_READ, own, -1)?;
        // Present from now on, so that a store faults as one to a present page.
        std::ptr::read_volatile(READ_ONLY as *const u8);
        let data = &mut *data();
        data.components = components;
        data.has_fsgsbase = has_fsgsbase.into();
        data.host_mxcsr = 0x1f80;
        data.handler = on_signal as *const () as u64;
        arch_base(libc::SYS_arch_prctl, 0x1003, &mut data.host_fs)?;
        arch_base(libc::SYS_arch_prctl, 0x1004, &mut data.host_gs)?;
        signals()?;
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        check(libc::setrlimit(libc::RLIMIT_CORE, &none))?;
        check(libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) as i32)?;
        sandbox()
    }
}

fn check(result: i32) -> Fallible {
    // SAFETY: errno of this thread.
    if result < 0 { Err(unsafe { *libc::__errno_location() }) } else { Ok(()) }
}

unsafe fn arch_base(call: i64, which: i32, base: &mut u64) -> Fallible {
    // SAFETY: stores to `base` only.
    check(unsafe { libc::syscall(call, which, std::ptr::from_mut(base)) } as i32)
}

unsafe fn map(address: u64, size: usize, protection: i32, flags: i32, file: i32) -> Fallible {
    let flags = flags | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
    // SAFETY: MAP_FIXED_NOREPLACE leaves other mappings alone. The code is at the start of the file.
    let got = unsafe { libc::mmap(address as *mut _, size, protection, flags, file, 0) };
    if got == libc::MAP_FAILED { check(-1) } else { Ok(()) }
}

/// The segments of 16-bit code: code and data pages with bases and limits to match.
unsafe fn segments() -> Fallible {
    const WRITE: i32 = 0x11;
    const CODE_CONTENTS: u32 = 2 << 1;
    const USEABLE: u32 = 1 << 6;
    // entry_number, base_addr, limit and flags of `struct user_desc`.
    let code: [u32; 4] = [0, CODE as u32, CODE_SIZE as u32 - 1, CODE_CONTENTS | USEABLE];
    let data: [u32; 4] = [1, DATA as u32, DATA_SIZE as u32 - 1, USEABLE];
    for descriptor in [code, data] {
        // SAFETY: the kernel reads 16 bytes.
        check(unsafe { libc::syscall(libc::SYS_modify_ldt, WRITE, descriptor.as_ptr(), 16) } as i32)?;
    }
    Ok(())
}

unsafe fn signals() -> Fallible {
    const STACK: usize = 0x10000;
    // SAFETY: a fresh stack for handlers, because a case's RSP is anything; the handler is code at BLOB.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let stack = libc::mmap(std::ptr::null_mut(), STACK, protection, flags, -1, 0);
        if stack == libc::MAP_FAILED {
            return check(-1);
        }
        let stack = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: STACK };
        check(libc::sigaltstack(&stack, std::ptr::null_mut()))?;
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = Blob::signal() as usize;
        // Left by a jump, so nothing may stay blocked.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        let none: libc::sigset_t = std::mem::zeroed();
        check(libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()))?;
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS] {
            check(libc::sigaction(signal, &action, std::ptr::null_mut()))?;
        }
    }
    Ok(())
}

/// Allows the three system calls of the loop, and only from the gate's own SYSCALL instruction; any other attempt
/// becomes SIGSYS. Written by hand because seccompiler cannot compare the instruction pointer.
unsafe fn sandbox() -> Fallible {
    const ARCH_X86_64: u32 = 0xc000_003e;
    let word = |offset: usize| libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: offset as u32 };
    let ip = offset_of!(libc::seccomp_data, instruction_pointer);
    let unless = |value: u32, skip: u8| libc::sock_filter { code: 0x15, jt: 0, jf: skip, k: value };
    let when = |value: i64, skip: u8| libc::sock_filter { code: 0x15, jt: skip, jf: 0, k: value as u32 };
    let give = |action: u32| libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: action };
    let mut filter = [
        word(offset_of!(libc::seccomp_data, arch)),
        unless(ARCH_X86_64, 8),
        word(ip),
        unless(Blob::gate_return() as u32, 6),
        word(ip + 4),
        unless(0, 4),
        word(offset_of!(libc::seccomp_data, nr)),
        when(libc::SYS_futex, 3),
        when(libc::SYS_getppid, 2),
        when(libc::SYS_exit_group, 1),
        give(libc::SECCOMP_RET_TRAP),
        give(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: concerns this process only; the kernel copies the filter.
    unsafe {
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        check(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program))
    }
}

/// The Rust half of the signal handler: notes everything in [`Data`], then leaves by a jump, not by sigreturn.
extern "C" fn on_signal(number: i32, _info: *const libc::siginfo_t, context: *const libc::ucontext_t) -> ! {
    use libc::*;
    const ORDER: [i32; 16] = [
        REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10,
        REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
    ];
    // SAFETY: the kernel gave a valid context; its floating-point state is an XSAVE area of standard format, at
    // least as long as ours, because the child checked for XSAVE. `Data` is used by nobody else meanwhile.
    unsafe {
        let data = &mut *data();
        let registers = &(*context).uc_mcontext.gregs;
        for (out, register) in data.gpr_out.iter_mut().zip(ORDER) {
            *out = registers[register as usize] as u64;
        }
        data.signal = number as u64;
        data.rip_out = registers[REG_RIP as usize] as u64;
        data.flags_out = registers[REG_EFL as usize] as u64;
        data.trap = registers[REG_TRAPNO as usize] as u64;
        data.error = registers[REG_ERR as usize] as u64;
        data.address = registers[REG_CR2 as usize] as u64;
        let area = (*context).uc_mcontext.fpregs.cast::<u8>();
        std::ptr::copy_nonoverlapping(area, data.xsave_out.as_mut_ptr(), data.xsave_out.len());
        std::arch::asm!("jmp {}", in(reg) Blob::resume(), options(noreturn));
    }
}

/// Puts the instruction where the case wants it, with a jump to the exit behind it if it is not stepped. `last` is
/// what stands there now: place and length.
unsafe fn place(shared: &Shared, case: &WireCase, step: bool, last: &mut (usize, usize)) {
    let length = (case.code_length as usize).min(15);
    let base = if case.mode == PROTECTED16 { 0 } else { CODE };
    let at = (case.rip.wrapping_sub(base) as usize).min(CODE_SIZE - length);
    let mut bytes = [INT3; 32];
    bytes[..length].copy_from_slice(&case.code[..length]);
    let mut used = length;
    if !step {
        let exit = Blob::exit() as u32;
        let mut append = |part: &[u8]| {
            bytes[used..used + part.len()].copy_from_slice(part);
            used += part.len();
        };
        if case.mode == LONG {
            let next = CODE as u32 + (at + length) as u32 + 5;
            append(&[0xe9]);
            append(&exit.wrapping_sub(next).to_le_bytes());
        } else {
            // JMP ptr16:32.
            append(if case.mode == PROTECTED16 { &[0x66, 0xea] } else { &[0xea] });
            append(&exit.to_le_bytes());
            append(&(USER_CS as u16).to_le_bytes());
        }
    }
    let used = used.min(CODE_SIZE - at);
    let code = (&raw const shared.code).cast::<u8>().cast_mut();
    // SAFETY: at + used and the old range are within the code pages. IRETQ serializes before they are executed.
    unsafe {
        if (at, used) == *last && std::slice::from_raw_parts(code.add(at), used) == &bytes[..used] {
            return;
        }
        code.add(last.0).write_bytes(INT3, last.1);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), code.add(at), used);
    }
    *last = (at, used);
}

unsafe fn execute(shared: &Shared, case: &WireCase, reply: &mut WireReply, last: &mut (usize, usize)) {
    let step = case.step != 0;
    let window = (case.window as usize).min(DATA_SIZE - WINDOW);
    // SAFETY: the mappings of set_up; this is the only thread.
    unsafe {
        place(shared, case, step, last);
        let memory = (DATA as *mut u8).add(window);
        std::ptr::copy_nonoverlapping(case.memory.as_ptr(), memory, WINDOW);
        let data = &mut *data();
        data.gpr_in = case.gpr;
        data.xsave_in = case.xsave;
        data.fs_in = case.fs_base;
        data.gs_in = case.gs_base;
        let flags = case.rflags & SETTABLE | 0x202 | if step { TF } else { 0 };
        let (cs, ss) = match case.mode {
            LONG => (USER_CS, USER_SS),
            PROTECTED16 => (CS16, SS16),
            _ => (USER32_CS, USER_SS),
        };
        data.data_selector = if case.mode == LONG { 0 } else { ss };
        data.frame = [case.rip, cs, flags, case.gpr[4], ss];
        fence(Release);
        type Enter = extern "sysv64" fn() -> u64;
        let enter = std::mem::transmute::<usize, Enter>(Blob::enter() as usize);
        let by_signal = enter() != 0;
        fence(Acquire);
        let data = &*self::data();
        reply.gpr = data.gpr_out;
        // IRETQ to a 16-bit stack loads SP alone: bits 16 to 31 of ESP are those of the frame's address.
        if case.mode == PROTECTED16 && reply.gpr[4] >> 16 == &raw const data.frame as u64 >> 16 {
            reply.gpr[4] = case.gpr[4] & 0xffff_0000 | reply.gpr[4] & 0xffff;
        }
        reply.rflags = data.flags_out & (SETTABLE | 0x202);
        reply.xsave = data.xsave_out;
        (reply.fs_base, reply.gs_base) = (data.fs_out, data.gs_out);
        if by_signal {
            reply.signal = data.signal as u32;
            reply.rip = data.rip_out;
            (reply.trap, reply.error, reply.address) = (data.trap, data.error, data.address);
        } else {
            reply.signal = 0;
            reply.rip = case.rip.wrapping_add(u64::from(case.code_length));
        }
        std::ptr::copy_nonoverlapping(memory, reply.memory.as_mut_ptr(), WINDOW);
        memory.write_bytes(0, WINDOW);
        let pages = std::slice::from_raw_parts_mut(DATA as *mut u128, DATA_SIZE / 16);
        let strayed = pages.iter().fold(0, |all, &word| all | word) != 0;
        reply.strayed = strayed.into();
        if strayed {
            pages.fill(0);
        }
    }
}
