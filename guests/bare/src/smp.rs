//! The second CPU: started by INIT and SIPI, then does what it is told.

use core::{
    arch::asm,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
};

use crate::{acpi, apic, cpu, segments, timer, trap};

/// Page (and SIPI vector) that the trampoline is copied to.
const PAGE: u64 = 0x8000;

unsafe extern "C" {
    static sipi_start: u8;
    static sipi_end: u8;
}

static ALIVE: AtomicBool = AtomicBool::new(false);
static WORK: AtomicUsize = AtomicUsize::new(0);

/// Identifier of the second CPU's LAPIC; `None` when the MADT lists one CPU.
pub fn second() -> Option<u32> {
    let (ids, count) = acpi::cpus();
    ids[..count].iter().copied().find(|&id| id != apic::id())
}

/// Starts the second CPU by INIT, SIPI, SIPI; true when it came up.
pub fn start(id: u32) -> bool {
    ALIVE.store(false, SeqCst);
    // SAFETY: low memory that nothing else uses; the code is position-independent.
    unsafe {
        let (start, end) = (&raw const sipi_start, &raw const sipi_end);
        (PAGE as *mut u8).copy_from(start, end as usize - start as usize);
    }
    apic::ipi(id, 0x4500);
    timer::pause();
    for _ in 0..2 {
        apic::ipi(id, 0x4600 | (PAGE >> 12) as u32);
        timer::pause();
        if ALIVE.load(SeqCst) {
            break;
        }
    }
    timer::until(|| ALIVE.load(SeqCst))
}

/// Has the second CPU run a function, once it has ended the one before.
pub fn run(work: fn()) {
    while WORK.load(SeqCst) != 0 {
        core::hint::spin_loop();
    }
    WORK.store(work as usize, SeqCst);
}

/// Waits until the second CPU has ended its function; false when it does not.
pub fn join() -> bool {
    timer::until(|| WORK.load(SeqCst) == 0)
}

#[unsafe(no_mangle)]
extern "C" fn second_main() -> ! {
    segments::init(1);
    trap::load_idt();
    apic::enable();
    ALIVE.store(true, SeqCst);
    cpu::sti();
    loop {
        let work = WORK.load(SeqCst);
        if work != 0 {
            // SAFETY: run() stores functions only.
            unsafe { core::mem::transmute::<usize, fn()>(work)() };
            WORK.store(0, SeqCst);
        }
        // SAFETY: a hint.
        unsafe { asm!("pause") };
    }
}
