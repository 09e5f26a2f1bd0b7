//! Faults of the host's processor in translated code.
//!
//! The handler does next to nothing: if the fault lies in code of the vCPU that runs on this thread, it notes it in the
//! frame and lets execution go on where translated code is left. Everything else goes to whoever handled the signal before
//! us, which for a bug of ours ends the process with a report.

use std::cell::Cell;
use std::sync::OnceLock;

use crate::frame::at;

/// What a handler must know of the vCPU that runs on this thread.
#[derive(Clone, Copy)]
pub struct Running {
    /// Host addresses of its code.
    pub range: (u64, u64),
    /// Its frame: RSP in translated code.
    pub frame: u64,
    /// Where translated code is left after a fault.
    pub exit: u64,
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
        let pc = registers[libc::REG_RIP as usize] as u64;
        let running = RUNNING.get().filter(|r| {
            (r.range.0..r.range.1).contains(&pc) && registers[libc::REG_RSP as usize] as u64 == r.frame
        });
        let Some(r) = running else { return forward(signal, info, context) };
        let note = |field: i32, value: u64| ((r.frame + field as u64) as *mut u64).write(value);
        note(at::FAULT_PC, pc);
        note(at::FAULT_ADDRESS, (*info).si_addr() as u64);
        note(at::FAULT_FLAGS, registers[libc::REG_EFL as usize] as u64);
        note(at::FAULT_SIGNAL, signal as u64);
        registers[libc::REG_RIP as usize] = r.exit as i64;
    }
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
