//! How other threads get a vCPU out of KVM_RUN.
//!
//! A signal ends a KVM_RUN that goes on, and `immediate_exit` in the page shared with the kernel ends one that is about to
//! start (KVM API, 5, "immediate_exit"): with both, no kick is lost, wherever the thread is just then.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, Once};

use kvm_bindings::kvm_run;

/// The signal that gets a thread out of KVM_RUN: its handler does nothing.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 4
}

extern "C" fn nothing(_: libc::c_int) {}

/// Installs the handler, once per process.
pub fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: a zeroed sigaction is a valid one (no flags, empty mask).
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as *const () as libc::sighandler_t;
        // KVM_RUN returns EINTR all the same; other system calls that a device makes on this thread go on.
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the handler touches nothing, so it is safe at any moment on any thread.
        unsafe { libc::sigaction(signal(), &action, std::ptr::null_mut()) };
    });
}

fn thread_id() -> libc::pid_t {
    thread_local!(static ID: Cell<libc::pid_t> = const { Cell::new(0) });
    ID.with(|id| {
        if id.get() == 0 {
            // SAFETY: takes nothing and cannot fail.
            id.set(unsafe { libc::gettid() });
        }
        id.get()
    })
}

/// Where a vCPU runs, while it does.
struct Running {
    thread: libc::pid_t,
    immediate_exit: *const AtomicU8,
}

// SAFETY: the pointer is used only under `Kick::running`'s lock, and `Entered` takes it away before its target goes.
unsafe impl Send for Running {}

/// The handle by which a vCPU is kicked.
#[derive(Default)]
pub struct Kick {
    kicked: AtomicBool,
    running: Mutex<Option<Running>>,
}

impl Kick {
    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Makes the vCPU look around for something to do, without its owner knowing.
    pub fn poke(&self) {
        if let Some(running) = &*self.running()
            && running.thread != thread_id()
        {
            // SAFETY: `Entered` keeps the page for as long as this entry is here, and we hold the lock.
            unsafe { &*running.immediate_exit }.store(1, Ordering::SeqCst);
            // SAFETY: no memory involved; the thread is alive, for it must take our lock to leave.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), running.thread, signal()) };
        }
    }

    /// Enters the current thread as the one that runs the vCPU to which `run` belongs, until what is returned is dropped.
    ///
    /// # Safety
    /// `run` stays mapped for as long as what is returned lives.
    pub unsafe fn enter(&self, run: *mut kvm_run) -> Entered<'_> {
        // SAFETY: `run` is mapped; an AtomicU8 is laid out as a u8, and the kernel only reads it.
        let immediate_exit = unsafe { AtomicU8::from_ptr(&raw mut (*run).immediate_exit) };
        *self.running() = Some(Running { thread: thread_id(), immediate_exit });
        let entered = Entered { kick: self, immediate_exit };
        if self.kicked.load(Ordering::SeqCst) {
            entered.immediate_exit.store(1, Ordering::SeqCst);
        }
        entered
    }
}

impl machine::cpu::Kick for Kick {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        if let Some(running) = &*self.running()
            && running.thread == thread_id()
        {
            // A device on the vCPU's own thread: the next KVM_RUN completes the access and comes back.
            // SAFETY: as in `poke`.
            unsafe { &*running.immediate_exit }.store(1, Ordering::SeqCst);
            return;
        }
        self.poke();
    }
}

/// A thread in [`machine::cpu::Vcpu::run`].
pub struct Entered<'a> {
    kick: &'a Kick,
    immediate_exit: &'a AtomicU8,
}

impl Entered<'_> {
    /// KVM_RUN was interrupted: forgets the request to, and tells whether it was a kick (else a poke, or a stray signal).
    pub fn take_kick(&self) -> bool {
        // In this order: a kick that comes in between is either taken now or ends the next KVM_RUN.
        self.immediate_exit.store(0, Ordering::SeqCst);
        self.kick.kicked.swap(false, Ordering::SeqCst)
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        *self.kick.running() = None;
    }
}
