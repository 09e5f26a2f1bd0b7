//! The frame buffer of a Bochs-VBE display is memory, wherever its BAR puts it, for every CPU.
#![no_std]
#![no_main]

use core::{
    arch::asm,
    sync::atomic::{AtomicU64, Ordering::SeqCst},
};

use bare::{apic, cpu, paging::read, paging::write, println, report::Report, smp};

bare::guest!(main);

/// The display's PCI identification, registers, and bit of the command register.
const ID: u32 = 0x1111_1234;
const COMMAND: u32 = 4;
const BAR: u32 = 0x10;
const MEMORY: u32 = 2;
/// Where nothing else is, below the interrupt controllers.
const ELSEWHERE: u64 = 0xd000_0000;
const PIXELS: u64 = 1024 * 768;
const ROUNDS: u64 = 200;
const NOBODY: u64 = u64::MAX;

fn main() {
    let mut t = Report::new("display");
    let Some(display) = (0..32).find(|&device| pci(device, 0) == ID) else {
        t.skip("display", "there is none");
        t.end()
    };
    set_pci(display, COMMAND, pci(display, COMMAND) | MEMORY);
    let first = u64::from(pci(display, BAR) & !0xf);
    for (index, value) in [(4, 0), (1, 1024), (2, 768), (3, 32), (4, 0x41)] {
        cpu::outw(0x1ce, index);
        cpu::outw(0x1d0, value);
    }
    t.eq("a new mode is black", (0..8).fold(0, |all, n| all | read(first + n * 8)), 0);
    repaint(&mut t, first);
    code(&mut t, first);
    moves(&mut t, display, first);
    t.end()
}

/// Register of a device on bus 0.
fn pci(device: u32, register: u32) -> u32 {
    cpu::outl(0xcf8, 1 << 31 | device << 11 | register);
    cpu::inl(0xcfc)
}

fn set_pci(device: u32, register: u32, value: u32) {
    cpu::outl(0xcf8, 1 << 31 | device << 11 | register);
    cpu::outl(0xcfc, value);
}

fn repaint(t: &mut Report, start: u64) {
    let begun = cpu::rdtsc();
    for n in 0..PIXELS {
        // SAFETY: the display's memory, which is nobody else's.
        unsafe { ((start + 4 * n) as *mut u32).write_volatile(n as u32) };
    }
    println!("a repaint took {} thousand TSC ticks", (cpu::rdtsc() - begun) / 1000);
    let right = (0..PIXELS / 2).all(|n| read(start + 8 * n) == (2 * n + 1) << 32 | 2 * n);
    t.check("what was painted is there", right);
}

/// Code in the frame buffer, which changes.
fn code(t: &mut Report, start: u64) {
    for value in [1u64, 2] {
        // mov eax, value; ret
        write(start + 0x2000, 0xc3 << 40 | value << 8 | 0xb8);
        let got: u64;
        // SAFETY: the code just written, which changes RAX alone.
        unsafe { asm!("call {}", in(reg) start + 0x2000, out("rax") got) };
        t.eq("code in it", got, value);
    }
}

/// The address that the second CPU reads, or 0; where the frame buffer is not any more; what was read there afterwards.
static LOOK: AtomicU64 = AtomicU64::new(0);
static GONE: AtomicU64 = AtomicU64::new(0);
static STALE: AtomicU64 = AtomicU64::new(0);
static LOOKS: AtomicU64 = AtomicU64::new(0);

fn moves(t: &mut Report, display: u32, first: u64) {
    let mut at = first;
    let second = smp::second().filter(|&id| {
        apic::enable();
        smp::start(id)
    });
    write(first, 0x1234_5678);
    let (mut old, mut new) = (0, 0);
    for round in 0..ROUNDS {
        let to = if at == first { ELSEWHERE } else { first };
        if second.is_some() {
            LOOK.store(at, SeqCst);
            let before = LOOKS.load(SeqCst);
            smp::run(look);
            while LOOKS.load(SeqCst) < before + 10 + round % 10 {
                core::hint::spin_loop();
            }
        }
        read(at);
        set_pci(display, BAR, to as u32);
        GONE.store(at, SeqCst);
        old += u64::from(read(at) == NOBODY);
        new += u64::from(read(to) == 0x1234_5678);
        if second.is_some() {
            let before = LOOKS.load(SeqCst);
            while LOOKS.load(SeqCst) < before + 10 {
                core::hint::spin_loop();
            }
            LOOK.store(0, SeqCst);
            smp::join();
        }
        GONE.store(0, SeqCst);
        at = to;
    }
    t.eq("it is not where it was", old, ROUNDS);
    t.eq("it is where it was moved", new, ROUNDS);
    match second {
        Some(_) => t.tcg("it tells other CPUs later").eq("for the other CPU neither", STALE.load(SeqCst), 0),
        None => t.skip("for the other CPU neither", "one CPU"),
    }
    set_pci(display, COMMAND, pci(display, COMMAND) & !MEMORY);
    t.eq("nor where it was when it is off", read(at), NOBODY);
}

/// Reads the frame buffer until it is told to stop.
fn look() {
    loop {
        let at = LOOK.load(SeqCst);
        if at == 0 {
            return;
        }
        let gone = GONE.load(SeqCst);
        let value = read(at);
        if gone == at && value != NOBODY {
            STALE.fetch_add(1, SeqCst);
        }
        LOOKS.fetch_add(1, SeqCst);
    }
}
