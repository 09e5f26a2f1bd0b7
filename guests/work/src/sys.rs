//! System calls that the standard library has no words for.

use std::time::Duration;

/// The processor time of this process, and of the children that it has waited for.
pub fn cpu_time() -> Duration {
    let mut own = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: all zeroes are a valid `rusage`, which is plain numbers.
    let mut children: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both structures are valid to be written, and nothing else is touched.
    unsafe {
        libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut own);
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut children);
    }
    let micros = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    Duration::new(own.tv_sec as u64, own.tv_nsec as u32)
        + micros(children.ru_utime)
        + micros(children.ru_stime)
}

/// Keeps this process and its children to `count` of the processors that it may use; whether that could be done.
pub fn keep_to_cpus(count: u64) -> bool {
    // SAFETY: all zeroes are a valid, empty set; the calls get its true size and only write into it.
    unsafe {
        let mut allowed: libc::cpu_set_t = std::mem::zeroed();
        let mut chosen: libc::cpu_set_t = std::mem::zeroed();
        let size = size_of::<libc::cpu_set_t>();
        if libc::sched_getaffinity(0, size, &raw mut allowed) != 0 {
            return false;
        }
        let usable = (0..size * 8).filter(|&cpu| libc::CPU_ISSET(cpu, &allowed));
        usable.take(count as usize).for_each(|cpu| libc::CPU_SET(cpu, &mut chosen));
        libc::sched_setaffinity(0, size, &raw const chosen) == 0
    }
}

/// Orders that come over a terminal are not to be written back.
pub fn terminal_without_echo() {
    // SAFETY: all zeroes are a valid `termios`; the calls only touch it, and fail where there is no terminal.
    unsafe {
        let mut terminal: libc::termios = std::mem::zeroed();
        if libc::tcgetattr(0, &raw mut terminal) == 0 {
            terminal.c_lflag &= !libc::ECHO;
            libc::tcsetattr(0, libc::TCSANOW, &raw const terminal);
        }
    }
}

/// What went wrong with the last system call; a benchmark that cannot run ends.
pub fn check(ok: bool, what: &str) {
    if !ok {
        let error = std::io::Error::last_os_error();
        eprintln!("work: {what}: {error}");
        std::process::exit(1);
    }
}
