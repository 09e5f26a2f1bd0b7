//! Reads and writes of a block device past the page cache, one or many at a time: Linux's asynchronous I/O by its system calls.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use crate::sys::{check, cpu_time};

/// Bytes of a request in sequence, and of one at random.
const LARGE: u64 = 128 << 10;
const SMALL: u64 = 4096;

/// What is done: `ORDER` is `seq` or `rand`, `-read-` or `-write-`, and how many requests are under way at once.
struct Pattern {
    random: bool,
    write: bool,
    depth: usize,
}

impl Pattern {
    fn parse(order: &str) -> Option<Self> {
        let mut words = order.split('-');
        let random = match words.next()? {
            "seq" => false,
            "rand" => true,
            _ => return None,
        };
        let write = match words.next()? {
            "read" => false,
            "write" => true,
            _ => return None,
        };
        let depth = words.next()?.parse().ok().filter(|depth| (1..=256).contains(depth))?;
        Some(Self { random, write, depth })
    }
}

/// A request of the kernel's (`struct iocb`).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Request {
    data: u64,
    key_and_flags: u64,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_file: u32,
}

/// Its end (`struct io_event`).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Event {
    data: u64,
    request: u64,
    result: i64,
    result2: i64,
}

/// The device, once it is there.
pub fn open(path: &str) -> File {
    let patience = Instant::now() + Duration::from_secs(60);
    loop {
        match File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path) {
            Ok(file) => return file,
            Err(_) if Instant::now() < patience => std::thread::sleep(Duration::from_millis(20)),
            Err(error) => {
                eprintln!("work: cannot open {path}: {error}");
                std::process::exit(1);
            }
        }
    }
}

/// Does `order` for `time`; gives what is to be said: requests, processor time, time, bytes of a request.
pub fn run(file: &File, order: &str, time: Duration) -> Option<String> {
    let pattern = Pattern::parse(order)?;
    let block = if pattern.random { SMALL } else { LARGE };
    // SAFETY: the call only looks at the device.
    let size = unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_END) };
    let blocks = size.cast_unsigned() / block;
    check(size > 0 && blocks > 0, "the device is too small");
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = 0;
    let mut place = move || {
        let n = if pattern.random {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        } else {
            next += 1;
            next - 1
        };
        (n % blocks * block).cast_signed()
    };
    let buffers = buffers(pattern.depth * block as usize);
    let mut requests = vec![Request::default(); pattern.depth];
    for (n, request) in requests.iter_mut().enumerate() {
        request.data = n as u64;
        request.opcode = u16::from(pattern.write);
        request.file = file.as_raw_fd().cast_unsigned();
        request.buffer = buffers + n as u64 * block;
        request.bytes = block;
    }
    let mut context = 0u64;
    // SAFETY: the call writes the context's handle only.
    check(unsafe { libc::syscall(libc::SYS_io_setup, pattern.depth, &raw mut context) } == 0, "io_setup");
    let (cpu, begun) = (cpu_time(), Instant::now());
    let mut done = 0u64;
    let mut waiting = 0;
    let mut ready: Vec<usize> = (0..pattern.depth).collect();
    let mut events = vec![Event::default(); pattern.depth];
    loop {
        if begun.elapsed() < time {
            for &n in &ready {
                requests[n].offset = place();
            }
            let list: Vec<*mut Request> = ready.iter().map(|&n| &raw mut requests[n]).collect();
            let mut sent = 0;
            while sent < list.len() {
                // SAFETY: requests and buffers outlive the context, and are left alone while the kernel has them.
                let n = unsafe {
                    libc::syscall(libc::SYS_io_submit, context, list.len() - sent, list[sent..].as_ptr())
                };
                check(n > 0, "io_submit");
                sent += n as usize;
            }
            waiting += ready.len();
        } else if waiting == 0 {
            break;
        }
        ready.clear();
        // SAFETY: there is room for as many events as there are requests.
        let n = unsafe {
            let none = std::ptr::null::<libc::timespec>();
            libc::syscall(libc::SYS_io_getevents, context, 1, events.len(), events.as_mut_ptr(), none)
        };
        check(n > 0, "io_getevents");
        for event in &events[..n as usize] {
            check(event.result == block.cast_signed(), "a request of the disk");
            ready.push(event.data as usize);
        }
        waiting -= n as usize;
        done += n as u64;
    }
    let (cpu, wall) = (cpu_time() - cpu, begun.elapsed());
    // SAFETY: nothing is under way any more.
    unsafe {
        libc::syscall(libc::SYS_io_destroy, context);
        libc::munmap(buffers as *mut libc::c_void, pattern.depth * block as usize);
    }
    Some(format!("{order} {done} {} {} {block}", cpu.as_nanos(), wall.as_nanos()))
}

/// Memory that begins at a page.
fn buffers(bytes: usize) -> u64 {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: new memory at an address that the kernel chooses.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, flags, -1, 0) };
    check(at != libc::MAP_FAILED, "memory for requests");
    at as u64
}
