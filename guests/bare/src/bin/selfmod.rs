//! Code that changes: the processor runs what memory holds (SDM 3A, 8.1.3 and 11.6).
#![no_std]
#![no_main]

use core::arch::asm;

use bare::{
    code, cpu,
    paging::{self, P, W, frame, map, pte},
    report::Report,
    trap::{self, Frame, UD, run},
};

bare::guest!(main);

code! {
    // Each writes over the instruction that follows: `mov eax, 1` becomes `mov eax, 2`.
    next: "mov byte ptr [rip + 2f + 1], 2", "2: mov eax, 1";
    later: "mov byte ptr [rip + 2f + 1], 2", "jmp 2f", "2: mov eax, 1";
    // Ahead in the same straight line, in the middle of a multi-byte instruction.
    ahead: "mov dword ptr [rip + 2f + 2], 0x11223344", "xor ecx, ecx", "inc ecx", "nop", "2: mov r8d, 1";
    // The store itself turns into something else once it has run; the second round sees it.
    itself: "mov ecx, 2", "xor eax, eax", "2: inc eax", "mov byte ptr [rip + 2b + 1], 0xc8", "dec ecx", "jnz 2b";
    // REP STOSB with NOPs over itself, and over the three instructions behind it.
    rep_itself: "lea rdi, [rip + 2f]", "mov ecx, 8", "mov eax, 0x90", "2: rep stosb", "inc edx", "inc edx", "inc edx";
    rep_behind: "lea rdi, [rip + 3f]", "mov ecx, 6", "mov eax, 0x90", "rep stosb", "3: inc edx", "inc edx", "inc edx";
}

fn main() {
    let mut t = Report::new("selfmod");
    neighbours(&mut t);
    crossing(&mut t);
    aliases(&mut t);
    jit(&mut t);
    remap(&mut t);
    t.end()
}

/// Copies a snippet to a writable page.
fn copy(code: u64, to: u64) {
    // SAFETY: 64 bytes of code into a frame of ours.
    unsafe { (to as *mut u8).copy_from(code as *const u8, 64) };
}

fn neighbours(t: &mut Report) {
    let page = map(0, frame(0), P | W);
    let go = |code: u64| {
        copy(code, page);
        run(&Frame { rdx: 5, ..Frame::kernel(page) }).frame
    };
    t.eq("next instruction", go(next()).rax, 2);
    t.eq("next instruction, again", go(next()).rax, 2);
    t.eq("after a jump", go(later()).rax, 2);
    t.eq("further ahead", go(ahead()).r8, 0x1122_3344);
    // INC EAX, then DEC EAX (FF C8).
    t.eq("an instruction before, in a loop", go(itself()).rax, 0);
    t.eq("REP STOSB over what follows", go(rep_behind()).rdx, 5);
    // No manual says so, but processors run it to its end.
    let f = go(rep_itself());
    let got = (f.vector, f.rcx, f.rdi, f.rdx);
    t.tcg("each iteration is fetched anew").eq("REP STOSB over itself", got, (UD, 0, page + 0x11 + 8, 5));
}

fn put(address: u64, bytes: &[u8]) {
    // SAFETY: test pages.
    unsafe { (address as *mut u8).copy_from(bytes.as_ptr(), bytes.len()) };
}

/// An instruction across two pages, each half changed from outside.
fn crossing(t: &mut Report) {
    let first = map(1, frame(1), P | W);
    map(2, frame(2), P | W);
    let start = first + 0xffd;
    // mov eax, 0x11111111 ; ud2
    put(start, &[0xb8, 0x11, 0x11, 0x11, 0x11, 0x0f, 0x0b]);
    let go = || run(&Frame::kernel(start)).frame.rax;
    t.eq("instruction across pages", go(), 0x1111_1111);
    put(first + 0x1001, &[0x22]);
    t.eq("its second half changed", go(), 0x2211_1111);
    put(first + 0xffe, &[0x33]);
    t.eq("its first half changed", go(), 0x2211_1133);
    put(frame(2), &[0x44]);
    t.eq("its second half changed by another address", go(), 0x2244_1133);
    map(2, frame(3), P | W);
    put(frame(3), &[0x55, 0x66, 0x0f, 0x0b]);
    t.eq("its second page exchanged", go(), 0x6655_1133);
}

/// One frame at two addresses: run at one, changed at the other.
fn aliases(t: &mut Report) {
    let (one, two) = (map(3, frame(4), P), map(4, frame(4), P | W));
    for value in 1..=20 {
        put(two, &[0xb8, value, 0, 0, 0, 0x0f, 0x0b]);
        let got = run(&Frame::kernel(one)).frame.rax;
        if got != u64::from(value) || value == 20 {
            t.eq("run at one address, changed at another", got, u64::from(value));
            break;
        }
    }
    // From inside: the code at `one` changes its own next instruction through `two`.
    // mov byte ptr [rdi + 5], 9 ; mov eax, 1 ; ud2
    put(two, &[0xc6, 0x47, 0x05, 9, 0xb8, 1, 0, 0, 0, 0x0f, 0x0b]);
    let got = run(&Frame { rdi: two, ..Frame::kernel(one) }).frame.rax;
    // Without a serializing instruction the old bytes may run once when the linear address differs (11.6).
    t.check("its own next instruction by another address", got == 9 || got == 1);
    // With CPUID between it must be the new one: mov byte ptr [rdi + 10], 9 ; xor eax, eax ; cpuid ; nop ; mov eax, 1 ; ud2
    put(two, &[0xc6, 0x47, 0x0a, 9, 0x31, 0xc0, 0x0f, 0xa2, 0x90, 0xb8, 1, 0, 0, 0, 0x0f, 0x0b]);
    t.eq("the same with CPUID between", run(&Frame { rdi: two, ..Frame::kernel(one) }).frame.rax, 9);
}

/// Generates a function, calls it, changes it, many times.
fn jit(t: &mut Report) {
    let page = map(5, frame(5), P | W);
    let mut wrong = 0;
    for i in 0..2000u32 {
        let at = page + u64::from(i % 7) * 16;
        let [a, b, c, d] = i.to_le_bytes();
        // lea eax, [rdi + i] ; ret
        put(at, &[0x8d, 0x87, a, b, c, d, 0xc3]);
        let got: u32;
        // SAFETY: what was just written.
        unsafe { asm!("call {}", in(reg) at, inout("rdi") 3u64 => _, out("eax") got) };
        wrong += u32::from(got != i + 3);
    }
    t.eq("2,000 functions made and called, wrong results", wrong, 0);
    // Data beside code: stores to the page that do not change the code.
    put(page, &[0xb8, 7, 0, 0, 0, 0xff, 0x43, 0x40, 0x0f, 0x0b]);
    let mut sum = 0;
    for _ in 0..100 {
        sum += run(&Frame { rbx: page + 0x100, ..Frame::kernel(page) }).frame.rax;
    }
    t.eq("a counter beside code", (sum, paging::read(page + 0x140) as u32), (700, 100));
}

/// The same address, another frame.
fn remap(t: &mut Report) {
    put(frame(6), &[0xb8, 6, 0, 0, 0, 0x0f, 0x0b]);
    put(frame(7), &[0xb8, 7, 0, 0, 0, 0x0f, 0x0b]);
    let page = map(6, frame(6), P);
    let go = || run(&Frame::kernel(page)).frame.rax;
    t.eq("first frame", go(), 6);
    map(6, frame(7), P);
    t.eq("another frame after INVLPG", go(), 7);
    // SAFETY: a test entry; the CR3 load forgets the old one.
    unsafe {
        pte(6).write_volatile(frame(6) | P);
        cpu::set_cr3(cpu::cr3());
    }
    t.eq("the first after a CR3 load", go(), 6);
    map(6, frame(6), P | paging::NX);
    let f = run(&Frame::kernel(page)).frame;
    t.eq("NX once it has run", (f.vector, f.error), (trap::PF, 0x11));
}
