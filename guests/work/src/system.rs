//! What an operating system does for a program.

use std::fs::{File, remove_file};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::sys::check;
use crate::tool::mix;

const PAGE: usize = 4096;

/// The cheapest system call.
pub fn syscall(iterations: u64) -> u64 {
    // SAFETY: getppid takes nothing and cannot fail.
    let parent = unsafe { libc::getppid() };
    // SAFETY: as above.
    (0..iterations).filter(|_| unsafe { libc::syscall(libc::SYS_getppid) } == parent.into()).count() as u64
}

/// Signals that a process sends itself.
pub fn signal(iterations: u64) -> u64 {
    static HANDLED: AtomicU64 = AtomicU64::new(0);
    extern "C" fn handler(_: libc::c_int) {
        HANDLED.fetch_add(1, Ordering::Relaxed);
    }
    HANDLED.store(0, Ordering::Relaxed);
    // SAFETY: all zeroes are a valid `sigaction`; the handler only does what a handler may, and raise runs it.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as extern "C" fn(libc::c_int) as usize;
        check(libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) == 0, "sigaction");
        (0..iterations).for_each(|_| check(libc::raise(libc::SIGUSR1) == 0, "raise"));
    }
    HANDLED.load(Ordering::Relaxed)
}

/// Waits for `child` and gives its exit status.
fn wait_for(child: libc::pid_t) -> u64 {
    let mut status = 0;
    // SAFETY: the status is valid to be written.
    check(unsafe { libc::waitpid(child, &raw mut status, 0) } == child, "waitpid");
    libc::WEXITSTATUS(status) as u64
}

/// A byte goes to another process and comes back, changed.
pub fn pipe(iterations: u64) -> u64 {
    let pair = || std::io::pipe().inspect_err(|_| check(false, "pipe"));
    let (Ok((mut from_us, mut to_child)), Ok((mut from_child, mut to_us))) = (pair(), pair()) else {
        return 0;
    };
    let mut byte = [0];
    // SAFETY: there is one thread here; the child only uses its pipes and leaves by `_exit`.
    let child = unsafe { libc::fork() };
    check(child >= 0, "fork");
    if child == 0 {
        drop(to_child);
        while let Ok(1) = from_us.read(&mut byte) {
            byte[0] = byte[0].wrapping_mul(5).wrapping_add(1);
            if to_us.write_all(&byte).is_err() {
                break;
            }
        }
        // SAFETY: this ends the process without running what belongs to the parent.
        unsafe { libc::_exit(3) };
    }
    drop((from_us, to_us));
    let mut sum = 0;
    for _ in 0..iterations {
        check(to_child.write_all(&byte).is_ok() && from_child.read_exact(&mut byte).is_ok(), "a pipe");
        sum = mix(sum, byte[0].into());
    }
    drop(to_child);
    mix(sum, wait_for(child))
}

/// Waits until `word` is no longer `value`.
fn futex_wait(word: &AtomicU32, value: u32) {
    while word.load(Ordering::Acquire) == value {
        // SAFETY: the word outlives the call, which reads it; there is no time limit.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                value,
                0usize,
            )
        };
    }
}

/// Sets `word` and wakes who waits for that.
fn futex_wake(word: &AtomicU32, value: u32) {
    word.store(value, Ordering::Release);
    // SAFETY: the word is valid; waking nobody is fine.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, 1) };
}

/// Two threads take turns.
pub fn futex(iterations: u64) -> u64 {
    let (turn, total) = (AtomicU32::new(0), AtomicU64::new(0));
    let player = |mine: u32| {
        for _ in 0..iterations {
            futex_wait(&turn, 1 - mine);
            total.store(mix(total.load(Ordering::Relaxed), mine.into()), Ordering::Relaxed);
            futex_wake(&turn, 1 - mine);
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| player(1));
        player(0);
    });
    total.into_inner()
}

/// Maps `pages` anonymous pages, hands them to `body` and unmaps them.
fn with_pages(pages: usize, body: impl FnOnce(&mut [u8])) {
    // SAFETY: a new anonymous mapping; nobody else knows it, and it is unmapped after its only use.
    unsafe {
        let (rw, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let memory = libc::mmap(std::ptr::null_mut(), pages * PAGE, rw, private, -1, 0);
        check(memory != libc::MAP_FAILED, "mmap");
        body(std::slice::from_raw_parts_mut(memory.cast(), pages * PAGE));
        check(libc::munmap(memory, pages * PAGE) == 0, "munmap");
    }
}

/// Touches 128 new pages.
pub fn fault(iterations: u64) -> u64 {
    let mut sum = 0;
    for round in 0..iterations {
        with_pages(128, |memory| {
            for page in memory.chunks_exact_mut(PAGE) {
                page[round as usize % PAGE] = 1;
                sum = mix(sum, page[0].into());
            }
        });
    }
    sum
}

/// Maps and unmaps without a touch.
pub fn mmap(iterations: u64) -> u64 {
    let mut sum = 0;
    (0..iterations).for_each(|_| with_pages(4, |memory| sum += memory.len() as u64));
    sum
}

/// Forks a child that ends at once.
pub fn fork(iterations: u64) -> u64 {
    let mut sum = 0;
    for round in 0..iterations {
        // SAFETY: there is one thread here; the child leaves by `_exit`.
        let child = unsafe { libc::fork() };
        check(child >= 0, "fork");
        if child == 0 {
            // SAFETY: this ends the process without running what belongs to the parent.
            unsafe { libc::_exit(round as i32 & 0x7f) };
        }
        sum = mix(sum, wait_for(child));
    }
    sum
}

/// Starts this program anew, which ends at once.
pub fn exec(iterations: u64) -> u64 {
    let start = || Command::new("/proc/self/exe").arg("--exit").stdin(Stdio::null()).status();
    (0..iterations).filter(|_| start().is_ok_and(|status| status.success())).count() as u64
}

/// Makes a file of one page in memory, reads it back and removes it.
pub fn file(iterations: u64) -> u64 {
    let directory = if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" };
    let path = format!("{directory}/lodge-work-{}", std::process::id());
    let mut page = [0; PAGE];
    let mut sum = 0;
    for round in 0..iterations {
        page[round as usize % PAGE] = round as u8;
        let mut read = [0; PAGE];
        let turn = File::create(&path)
            .and_then(|mut file| file.write_all(&page))
            .and_then(|()| File::open(&path)?.read_exact(&mut read))
            .and_then(|()| remove_file(&path));
        check(turn.is_ok(), &path);
        sum = mix(sum, read[round as usize % PAGE].into());
    }
    sum
}
