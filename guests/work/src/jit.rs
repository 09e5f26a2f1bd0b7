//! Code that a program writes itself.

use crate::sys::check;
use crate::tool::mix;

/// A function of one number.
type Function = extern "C" fn(u64) -> u64;

/// A page that can be written and executed.
struct Code(*mut u8);

const PAGE: usize = 4096;

impl Code {
    fn new() -> Self {
        let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        // SAFETY: a new anonymous mapping.
        let page = unsafe {
            libc::mmap(std::ptr::null_mut(), PAGE, all, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        check(page != libc::MAP_FAILED, "mmap of a page to write and execute");
        Self(page.cast())
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= PAGE);
        // SAFETY: it is in our page, which no Rust reference points into.
        unsafe { self.0.add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Calls the code at `at`, which has to be a `Function`.
    fn call(&self, at: usize, argument: u64) -> u64 {
        assert!(at < PAGE);
        // SAFETY: callers have written a whole function there, which keeps to the calling convention.
        let function: Function = unsafe { std::mem::transmute(self.0.add(at)) };
        function(argument)
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        // SAFETY: our own page, which nobody uses any more.
        unsafe { libc::munmap(self.0.cast(), PAGE) };
    }
}

/// Writes a function with a new constant, at one of 16 places of a page, and calls it, 8 times.
pub fn make(iterations: u64) -> u64 {
    let mut code = Code::new();
    let mut sum = 0;
    for round in 0..iterations {
        let at = (round as usize % 16) * 256;
        // imul rax, rdi, constant; add rax, constant; ret
        let mut bytes = [0x48, 0x69, 0xc7, 0, 0, 0, 0, 0x48, 0x05, 0, 0, 0, 0, 0xc3];
        bytes[3..7].copy_from_slice(&(round as i32 * 7 + 3).to_le_bytes());
        bytes[9..13].copy_from_slice(&(round as i32 ^ 0x5555).to_le_bytes());
        code.write(at, &bytes);
        sum = (0..8).fold(sum, |sum, n| mix(sum, code.call(at, n)));
    }
    sum
}

/// Writes a loop once, and runs it long.
pub fn run(iterations: u64) -> u64 {
    let mut code = Code::new();
    // mov eax, 1; again: imul rax, rax, 0x01000193; xor rax, rdi; dec rdi; jnz again; ret
    code.write(
        0,
        &[
            0xb8, 1, 0, 0, 0, 0x48, 0x69, 0xc0, 0x93, 1, 0, 1, 0x48, 0x31, 0xf8, 0x48, 0xff, 0xcf, 0x75,
            0xf1, 0xc3,
        ],
    );
    code.call(0, iterations)
}

/// A loop that counts in memory beside its own code, in another cache line of the same page.
pub fn beside(iterations: u64) -> u64 {
    let mut code = Code::new();
    // again: add [rip + 2041], rdi (the page's middle); dec rdi; jnz again; mov rax, [the same]; ret
    let mut bytes =
        vec![0x48, 0x01, 0x3d, 0, 0, 0, 0, 0x48, 0xff, 0xcf, 0x75, 0xf4, 0x48, 0x8b, 0x05, 0, 0, 0, 0, 0xc3];
    bytes[3..7].copy_from_slice(&(PAGE as i32 / 2 - 7).to_le_bytes());
    bytes[15..19].copy_from_slice(&(PAGE as i32 / 2 - 19).to_le_bytes());
    code.write(0, &bytes);
    code.call(0, iterations)
}
