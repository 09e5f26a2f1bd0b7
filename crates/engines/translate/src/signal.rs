//! Faults of the host's processor in translated code.
//!
//! The handler does next to nothing: if the fault lies in code of the vCPU that runs on this thread, it notes it in the
//! frame and lets execution go on where translated code is left. Everything else is a bug of ours: it is reported on standard
//! error, and goes to whoever handled the signal before us, which ends the process.

use std::cell::Cell;
use std::fmt::Write;
use std::sync::OnceLock;

use crate::frame::at;

/// What a handler must know of the vCPU that runs on this thread.
#[derive(Clone, Copy)]
pub struct Running {
    /// Host addresses of its blocks.
    pub range: (u64, u64),
    /// Its frame: RSP in translated code.
    pub frame: u64,
    /// Where translated code is left after a fault.
    pub exit: u64,
    /// Address of the guest's RIP, as it was when translated code was last entered or left.
    pub rip: u64,
}

thread_local! {
    static RUNNING: Cell<Option<Running>> = const { Cell::new(None) };
    static STACK: Cell<bool> = const { Cell::new(false) };
}

const SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];
const STACK_SIZE: usize = 1 << 16;

struct Old([libc::sigaction; 4]);
// SAFETY: plain data.
unsafe impl Send for Old {}
// SAFETY: plain data.
unsafe impl Sync for Old {}

static OLD: OnceLock<Old> = OnceLock::new();

/// Prepares this thread, and once the process, for faults in the code of `running`.
pub fn prepare(running: Running) {
    OLD.get_or_init(install);
    if !STACK.get() {
        give_stack();
        block_others();
        STACK.set(true);
    }
    RUNNING.set(Some(running));
}

/// The thread does not run translated code any more.
pub fn done() {
    RUNNING.set(None);
}

fn install() -> Old {
    // SAFETY: sigaction with zeroed and then filled structures; the handler is async-signal-safe.
    unsafe {
        let mut old: [libc::sigaction; 4] = std::mem::zeroed();
        for (signal, old) in SIGNALS.into_iter().zip(&mut old) {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(signal, &action, old);
        }
        Old(old)
    }
}

/// No signal but our own may come while RSP leads to the frame: handlers of others run on the stack that they find.
fn block_others() {
    // SAFETY: sets of signals on the stack, filled before they are used.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut set);
        for signal in SIGNALS.into_iter().chain([libc::SIGTRAP, libc::SIGABRT]) {
            libc::sigdelset(&mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
}

/// RSP is no stack in translated code, so signals need one of their own; it lasts as long as the thread may.
fn give_stack() {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, handed to the kernel for good: threads of vCPUs are few and live long.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), STACK_SIZE, prot, flags, -1, 0);
        if at != libc::MAP_FAILED {
            let stack = libc::stack_t { ss_sp: at, ss_flags: 0, ss_size: STACK_SIZE };
            libc::sigaltstack(&stack, std::ptr::null_mut());
        }
    }
}

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands over valid pointers; the frame is the running vCPU's.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        if (*info).si_code <= 0 {
            // Sent by somebody, and not a fault.
            forward(signal, info, context);
            libc::raise(signal);
            return;
        }
        let pc = registers[libc::REG_RIP as usize] as u64;
        let running = RUNNING.get().filter(|r| {
            (r.range.0..r.range.1).contains(&pc) && registers[libc::REG_RSP as usize] as u64 == r.frame
        });
        let Some(r) = running else {
            report(signal, (*info).si_addr() as u64, registers);
            return forward(signal, info, context);
        };
        let note = |field: i32, value: u64| ((r.frame + field as u64) as *mut u64).write(value);
        note(at::FAULT_PC, pc);
        note(at::FAULT_ADDRESS, (*info).si_addr() as u64);
        note(at::FAULT_FLAGS, registers[libc::REG_EFL as usize] as u64);
        note(at::FAULT_SIGNAL, signal as u64);
        registers[libc::REG_RIP as usize] = r.exit as i64;
    }
}

/// A text of bounded length, made without memory from anywhere.
struct Text {
    bytes: [u8; 2048],
    len: usize,
}

impl Write for Text {
    fn write_str(&mut self, s: &str) -> std::fmt::Result {
        let n = s.len().min(self.bytes.len() - self.len);
        self.bytes[self.len..self.len + n].copy_from_slice(&s.as_bytes()[..n]);
        self.len += n;
        Ok(())
    }
}

const NAMES: [(libc::c_int, &str); 17] = [
    (libc::REG_RIP, "rip"),
    (libc::REG_RSP, "rsp"),
    (libc::REG_RBP, "rbp"),
    (libc::REG_RAX, "rax"),
    (libc::REG_RBX, "rbx"),
    (libc::REG_RCX, "rcx"),
    (libc::REG_RDX, "rdx"),
    (libc::REG_RSI, "rsi"),
    (libc::REG_RDI, "rdi"),
    (libc::REG_R8, "r8"),
    (libc::REG_R9, "r9"),
    (libc::REG_R10, "r10"),
    (libc::REG_R11, "r11"),
    (libc::REG_R12, "r12"),
    (libc::REG_R13, "r13"),
    (libc::REG_R14, "r14"),
    (libc::REG_R15, "r15"),
];

/// Says that Lodge has a bug: async-signal-safe, for integers are written without memory or locks.
fn report(signal: libc::c_int, address: u64, registers: &[libc::greg_t]) {
    let mut text = Text { bytes: [0; 2048], len: 0 };
    let t = &mut text;
    // Writing to `Text` does not fail.
    let _ = write!(
        t,
        "\nlodge: this is a bug of Lodge's and not of the guest: signal {signal} at address {address:#x} in its own code; \
         please report it with what follows, and use --engine interpret\n"
    );
    for (n, (register, name)) in NAMES.into_iter().enumerate() {
        let end = if n % 4 == 3 { "\n" } else { " " };
        let _ = write!(t, "{name}={:#018x}{end}", registers[register as usize]);
    }
    match RUNNING.get() {
        Some(r) => {
            // SAFETY: the frame and RIP are the running vCPU's, which outlive its run.
            let (rip, page, site) = unsafe {
                let field = |at: i32| (r.frame + at as u64) as *const u64;
                ((r.rip as *const u64).read(), field(at::PAGE).read(), field(at::SITE).cast::<u32>().read())
            };
            let _ = write!(
                t,
                "\nvcpu: guest rip={rip:#x}, page of code={page:#x}, last site={site}, code={:#x}..{:#x}\n",
                r.range.0, r.range.1
            );
        }
        None => {
            let _ = write!(t, "\nnot on a vCPU's thread\n");
        }
    }
    // SAFETY: the text's own bytes.
    unsafe { libc::write(2, text.bytes.as_ptr().cast(), text.len) };
}

/// Lets the previous handler have a signal that is none of ours.
///
/// # Safety
/// As for a signal handler.
unsafe fn forward(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let n = SIGNALS.iter().position(|&s| s == signal).unwrap_or(0);
    let old = OLD.get().map(|o| o.0[n]);
    // SAFETY: the previous handler gets what the kernel gave; without one the default action follows, for the instruction
    // is executed again when the handler returns.
    unsafe {
        match old {
            Some(o) if o.sa_sigaction != libc::SIG_DFL && o.sa_sigaction != libc::SIG_IGN => {
                if o.sa_flags & libc::SA_SIGINFO != 0 {
                    let f: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                        std::mem::transmute(o.sa_sigaction);
                    f(signal, info, context);
                } else {
                    let f: extern "C" fn(libc::c_int) = std::mem::transmute(o.sa_sigaction);
                    f(signal);
                }
            }
            _ => {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &action, std::ptr::null_mut());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    const PROVOKE: &str = "LODGE_TEST_PROVOKE";

    /// Runs itself again, for it dies.
    #[test]
    fn a_fault_of_our_own_is_reported_and_ends_the_process() {
        if std::env::var_os(PROVOKE).is_some() {
            let frame = crate::frame::Frame::new().unwrap();
            let rip = 0x1234_5678u64;
            let rip = std::ptr::from_ref(&rip) as u64;
            prepare(Running { range: (0x1000, 0x2000), frame: frame.base() as u64, exit: 0, rip });
            // SAFETY: none: it faults, at an address that nothing is mapped at.
            unsafe { std::arch::asm!("mov rax, [{}]", in(reg) 0x77u64, out("rax") _) };
            unreachable!("there is nothing at 0x77");
        }
        let name = "signal::tests::a_fault_of_our_own_is_reported_and_ends_the_process";
        let mut again = Command::new(std::env::current_exe().unwrap());
        let done = again.args(["--exact", name, "--nocapture"]).env(PROVOKE, "1").output().unwrap();
        let text = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.signal(), Some(libc::SIGSEGV), "{text}");
        for part in ["a bug of Lodge's", "signal 11 at address 0x77", "rip=0x", "guest rip=0x12345678"] {
            assert!(text.contains(part), "no {part:?} in: {text}");
        }
    }
}
