//! The tests' oracle: one user-mode instruction, given as bytes, executed by the processor from a given state in a
//! sandboxed child process; out comes the resulting state, or the exception.
//!
//! A case costs well under a microsecond when the instruction runs through, some microseconds when it faults or is
//! stepped. Cases go to the child in batches. A child that dies or hangs is replaced, and the case says so.

mod blob;
mod child;
mod wire;

use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};
use std::time::{Duration, Instant};

use crate::SimdState;
use wire::{BATCH, CODE_SIZE, Shared, WireCase, WireReply};

pub use wire::WINDOW;

/// Start of the executable pages. Unmapped memory on both sides; the rest of the pages is INT3.
pub const CODE: u64 = 0x1010_0000;
/// End of the executable pages.
pub const CODE_END: u64 = CODE + CODE_SIZE as u64;
/// Start of the data pages: two, readable and writable, unmapped memory on both sides.
pub const DATA: u64 = 0x2000_0000;
/// Bytes in the data pages.
pub const DATA_SIZE: usize = 0x2000;
/// A page of zeros that can only be read.
pub const READ_ONLY: u64 = 0x2001_0000;

/// The registers that user code has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuImage {
    /// In the processor's order: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// Where the instruction stands, from [`CODE`] to [`CODE_END`]; afterwards the next, or the faulting, one.
    pub rip: u64,
    /// CF, PF, AF, ZF, SF, OF, DF, NT, AC and ID count on the way in; IF and bit 1 are set on the way out.
    pub rflags: u64,
    /// Base of FS. Left alone, and 0 on the way out, where the system has no FSGSBASE.
    pub fs_base: u64,
    /// Base of GS. See `fs_base`.
    pub gs_base: u64,
    /// x87, MMX, SSE and AVX.
    pub simd: SimdState,
}

impl Default for CpuImage {
    fn default() -> Self {
        let simd = SimdState::default();
        CpuImage { gpr: [0; 16], rip: CODE, rflags: 0x202, fs_base: 0, gs_base: 0, simd }
    }
}

/// The kind of code segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit code.
    Long,
    /// 32-bit code in compatibility mode, DS, ES and SS flat; addresses and registers have 32 bits.
    Compat32,
    /// 16-bit protected-mode code. CS has base [`CODE`], DS, ES and SS have base [`DATA`], and both a limit of 0x1fff;
    /// RIP is an offset in the code pages.
    Protected16,
}

/// One instruction to execute.
#[derive(Debug, Clone)]
pub struct Case {
    /// The bytes of the instruction, at most 15.
    pub code: Vec<u8>,
    /// 64-bit or 32-bit code.
    pub mode: Mode,
    /// Stop by TF after the instruction instead of by a jump behind it: for branches, and at the end of the code
    /// pages. Some 10 times slower.
    pub step: bool,
    /// The state before.
    pub image: CpuImage,
    /// Offset in the data pages of `memory`; everything around it is zero.
    pub window: usize,
    /// What is there.
    pub memory: [u8; WINDOW],
}

/// How a case ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The instruction completed.
    Completed,
    /// An exception. For #PF, `address` is CR2.
    Fault {
        /// Vector of the exception.
        vector: u8,
        /// Error code, 0 where the vector has none.
        error: u64,
        /// CR2; only meaningful for #PF.
        address: u64,
    },
    /// It tried a system call, which was refused.
    Syscall,
    /// It killed the child, or kept it busy for seconds.
    Died,
}

/// The state after a case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// How it ended.
    pub end: End,
    /// The registers then.
    pub image: CpuImage,
    /// The window of the data pages then.
    pub memory: [u8; WINDOW],
    /// The data pages outside of the window were written to.
    pub strayed: bool,
}

/// Why there is no oracle.
#[derive(Debug, thiserror::Error)]
pub enum OracleError {
    /// The host's processor or system does not save state as needed.
    #[error("the host has no XSAVE with SSE and AVX state: the oracle cannot run here")]
    NoXsave,
    /// A system call failed.
    #[error("the oracle's child could not be started: {0}")]
    System(#[from] std::io::Error),
}

/// A child process that executes cases.
pub struct Oracle {
    shared: NonNull<Shared>,
    memory: OwnedFd,
    child: Option<i32>,
}

// SAFETY: the mapping belongs to this value, and a child process is not bound to a thread.
unsafe impl Send for Oracle {}

impl Oracle {
    /// Starts the child.
    pub fn new() -> Result<Self, OracleError> {
        if !std::arch::is_x86_feature_detected!("avx") {
            return Err(OracleError::NoXsave);
        }
        let memory = rustix::fs::memfd_create("oracle", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(std::io::Error::from)?;
        rustix::fs::ftruncate(&memory, size_of::<Shared>() as u64).map_err(std::io::Error::from)?;
        // SAFETY: a fresh mapping; all zero is a valid `Shared`.
        let shared = unsafe {
            use rustix::mm::{MapFlags, ProtFlags, mmap};
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            mmap(std::ptr::null_mut(), size_of::<Shared>(), protection, MapFlags::SHARED, &memory, 0)
        }
        .map_err(std::io::Error::from)?;
        let shared = NonNull::new(shared.cast()).ok_or(OracleError::NoXsave)?;
        let mut oracle = Oracle { shared, memory, child: None };
        // SAFETY: nobody else uses the mapping yet.
        unsafe { (&raw mut (*shared.as_ptr()).code).cast::<u8>().write_bytes(0xcc, CODE_SIZE) };
        oracle.start()?;
        Ok(oracle)
    }

    fn shared(&self) -> &'static Shared {
        // SAFETY: the mapping lives until drop, after which no reference of this module is used. Atomics apart, the
        // child writes to it only during a request, when the parent only looks at atomics.
        unsafe { self.shared.as_ref() }
    }

    fn start(&mut self) -> Result<(), OracleError> {
        const HWCAP2_FSGSBASE: u64 = 2;
        // SAFETY: reads a constant of the process.
        let has_fsgsbase = unsafe { libc::getauxval(libc::AT_HWCAP2) } & HWCAP2_FSGSBASE != 0;
        let shared = self.shared();
        let request = shared.request.load(Acquire);
        shared.request.store(0, Release);
        shared.reply.store(request.wrapping_add(1).max(1), Release);
        // SAFETY: the child runs only `child::main`, which does nothing that is not allowed after fork.
        let child = unsafe { libc::fork() };
        if child < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        if child == 0 {
            // SAFETY: asks for a number.
            let parent = unsafe { libc::getppid() };
            child::main(shared, self.memory.as_raw_fd(), 7, has_fsgsbase, parent);
        }
        self.child = Some(child);
        if !self.wait(0) || shared.failure.load(Acquire) != 0 {
            self.kill();
            let errno = shared.failure.swap(0, AcqRel);
            return Err(std::io::Error::from_raw_os_error(errno as i32).into());
        }
        Ok(())
    }

    /// Waits for `reply` to become `value`. False when the child died, or stayed at one case for too long.
    fn wait(&mut self, value: u32) -> bool {
        const PATIENCE: Duration = Duration::from_secs(3);
        let shared = self.shared();
        let mut moved = (shared.progress.load(Acquire), Instant::now());
        loop {
            let reply = shared.reply.load(Acquire);
            if reply == value || shared.failure.load(Acquire) != 0 {
                return reply == value;
            }
            let slice = libc::timespec { tv_sec: 0, tv_nsec: 20_000_000 };
            // SAFETY: waits on a word of the mapping.
            unsafe {
                let word = &raw const shared.reply;
                libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAIT, reply, &raw const slice)
            };
            let progress = shared.progress.load(Acquire);
            if progress != moved.0 {
                moved = (progress, Instant::now());
            }
            if shared.reply.load(Acquire) != value && (self.is_dead() || moved.1.elapsed() > PATIENCE) {
                return false;
            }
        }
    }

    /// Whether [`Mode::Protected16`] works here: the system must have modify_ldt. Without it such cases fault.
    pub fn has_16_bit(&self) -> bool {
        self.shared().has_16_bit.load(Acquire) != 0
    }

    fn is_dead(&mut self) -> bool {
        let Some(child) = self.child else { return true };
        // SAFETY: asks about our own child.
        let dead = unsafe { libc::waitpid(child, std::ptr::null_mut(), libc::WNOHANG) } == child;
        if dead {
            self.child = None;
        }
        dead
    }

    fn kill(&mut self) {
        if let Some(child) = self.child.take() {
            // SAFETY: our own child, not yet waited for, so the number is still its.
            unsafe {
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, std::ptr::null_mut(), 0);
            }
        }
    }

    /// Executes `cases`, in order, each from its own state. Some hundred at a time are best: fewer pay for the
    /// hand-over to the child, more for memory.
    pub fn run(&mut self, cases: &[Case]) -> Result<Vec<Reply>, OracleError> {
        let mut replies = Vec::with_capacity(cases.len());
        for batch in cases.chunks(BATCH) {
            self.batch(batch, &mut replies)?;
        }
        Ok(replies)
    }

    fn batch(&mut self, cases: &[Case], replies: &mut Vec<Reply>) -> Result<(), OracleError> {
        let shared = self.shared();
        for (i, case) in cases.iter().enumerate() {
            // SAFETY: no request is under way, so the child leaves cases and replies alone.
            unsafe { write_case(case, &mut (*self.shared.as_ptr()).cases[i]) };
        }
        shared.count.store(cases.len() as u32, Release);
        shared.progress.store(0, Release);
        let mut dead = Vec::new();
        loop {
            if self.child.is_none() {
                self.start()?;
            }
            let request = shared.request.fetch_add(1, AcqRel).wrapping_add(1);
            // SAFETY: wakes waiters on a word of the mapping.
            unsafe { libc::syscall(libc::SYS_futex, &raw const shared.request, libc::FUTEX_WAKE, 1) };
            if self.wait(request) {
                break;
            }
            self.kill();
            let at = shared.progress.load(Acquire);
            dead.push(at as usize);
            shared.progress.store(at + 1, Release);
        }
        for (i, case) in cases.iter().enumerate() {
            // SAFETY: the request is done.
            let reply = unsafe { &(*self.shared.as_ptr()).replies[i] };
            replies.push(read_reply(case, reply, dead.contains(&i)));
        }
        Ok(())
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        self.kill();
        // SAFETY: the mapping is ours, and the child is gone.
        let _ = unsafe { rustix::mm::munmap(self.shared.as_ptr().cast(), size_of::<Shared>()) };
    }
}

fn write_case(case: &Case, wire: &mut WireCase) {
    let image = &case.image;
    wire.gpr = image.gpr;
    (wire.rip, wire.rflags) = (image.rip, image.rflags);
    (wire.fs_base, wire.gs_base) = (canonical(image.fs_base), canonical(image.gs_base));
    wire.xsave = image.simd.to_xsave();
    // A reserved bit would make XRSTOR fault.
    wire.xsave[24..28].copy_from_slice(&(image.simd.mxcsr & 0xffff).to_le_bytes());
    let length = case.code.len().min(15);
    wire.code[..length].copy_from_slice(&case.code[..length]);
    wire.code_length = length as u32;
    wire.mode = case.mode as u32;
    let end = if case.mode == Mode::Protected16 { CODE_END - CODE } else { CODE_END };
    let jump_fits = image.rip.saturating_add(length as u64 + 8) <= end;
    wire.step = (case.step || !jump_fits).into();
    wire.window = case.window.min(DATA_SIZE - WINDOW) as u32;
    wire.memory = case.memory;
}

/// WRFSBASE faults on other addresses.
fn canonical(address: u64) -> u64 {
    ((address << 16) as i64 >> 16) as u64
}

fn read_reply(case: &Case, wire: &WireReply, died: bool) -> Reply {
    if died {
        return Reply { end: End::Died, image: case.image.clone(), memory: case.memory, strayed: false };
    }
    const DEBUG: u64 = 1;
    const PAGE_FAULT: u64 = 14;
    let end = match wire.signal as i32 {
        0 => End::Completed,
        libc::SIGTRAP if wire.trap == DEBUG => End::Completed,
        libc::SIGSYS => End::Syscall,
        _ => End::Fault {
            vector: wire.trap as u8,
            error: if matches!(wire.trap, 8 | 10..=14 | 17) { wire.error } else { 0 },
            address: if wire.trap == PAGE_FAULT { wire.address } else { 0 },
        },
    };
    let image = CpuImage {
        gpr: wire.gpr,
        rip: wire.rip,
        rflags: wire.rflags,
        fs_base: wire.fs_base,
        gs_base: wire.gs_base,
        simd: SimdState::from_xsave(&wire.xsave),
    };
    Reply { end, image, memory: wire.memory, strayed: wire.strayed != 0 }
}
