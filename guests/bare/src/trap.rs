//! Exceptions and interrupts: counted, hooked, or caught by a test.

use core::{
    arch::asm,
    sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering::SeqCst},
};

use crate::{
    apic,
    cpu::{self, outb},
    paging, println, runtime,
    segments::{self, TablePointer},
};

/// Divide error.
pub const DE: u64 = 0;
/// Debug.
pub const DB: u64 = 1;
/// Non-maskable interrupt.
pub const NMI: u64 = 2;
/// Breakpoint.
pub const BP: u64 = 3;
/// Overflow.
pub const OF: u64 = 4;
/// Invalid opcode.
pub const UD: u64 = 6;
/// Device not available.
pub const NM: u64 = 7;
/// Double fault.
pub const DF: u64 = 8;
/// Invalid TSS.
pub const TS: u64 = 10;
/// Segment not present.
pub const NP: u64 = 11;
/// Stack fault.
pub const SS: u64 = 12;
/// General protection.
pub const GP: u64 = 13;
/// Page fault.
pub const PF: u64 = 14;
/// x87 error.
pub const MF: u64 = 16;
/// Alignment check.
pub const AC: u64 = 17;
/// SIMD error.
pub const XM: u64 = 19;

/// The state of the CPU when an exception or interrupt came, as `trap.s` saves it.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Frame {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

impl Frame {
    fn new(rip: u64, cs: u16, ss: u16, rsp: u64) -> Self {
        Frame { rip, cs: cs.into(), ss: ss.into(), rsp, rflags: 2, ..Frame::default() }
    }

    /// About to run the code at `rip` in ring 0, 64-bit, on a stack of its own.
    pub fn kernel(rip: u64) -> Self {
        Frame::new(rip, segments::CODE, segments::DATA, stack_top())
    }

    /// The same in compatibility mode, 32-bit.
    pub fn kernel32(rip: u64) -> Self {
        Frame::new(rip, segments::CODE32, segments::DATA, stack_top())
    }

    /// The same in ring 3, where the code and stack appear 1 GiB higher.
    pub fn user(rip: u64) -> Self {
        Frame::new(paging::user(rip), segments::USER_CODE, segments::USER_DATA, paging::user(stack_top()))
    }

    /// Ring 3, compatibility mode, 32-bit.
    pub fn user32(rip: u64) -> Self {
        Frame { cs: segments::USER_CODE32.into(), ..Frame::user(rip) }
    }
}

/// Top of the stack that [`Frame::kernel`] and its like use (the last of the test frames).
pub fn stack_top() -> u64 {
    paging::frame(63) + 4096
}

/// What a test caught.
#[derive(Clone, Copy, Default, Debug)]
pub struct Trap {
    /// Registers, vector and error code (0 where the vector has none).
    pub frame: Frame,
    /// CR2 at that time.
    pub cr2: u64,
    /// DR6 at that time.
    pub dr6: u64,
    /// Where the CPU put the frame: tells which stack it used.
    pub stack: u64,
}

/// A handler that a guest sets; true when it dealt with the event.
pub type Hook = fn(&mut Frame) -> bool;

/// Saved stack pointer of the catch in force, or 0.
#[unsafe(no_mangle)]
static CATCH_RSP: AtomicU64 = AtomicU64::new(0);
// SAFETY: all fields are integers.
static mut CAUGHT: Trap = unsafe { core::mem::zeroed() };

static HOOKS: [AtomicUsize; 256] = [const { AtomicUsize::new(0) }; 256];
static COUNTS: [AtomicU32; 256] = [const { AtomicU32::new(0) }; 256];
/// Which controller wants an end of interrupt for a vector: 0 none, 1 LAPIC, 2 first PIC, 3 both PICs.
static EOI: [AtomicU8; 256] = [const { AtomicU8::new(0) }; 256];

#[repr(C, align(16))]
struct Idt([[u64; 2]; 256]);
static mut IDT: Idt = Idt([[0; 2]; 256]);

unsafe extern "C" {
    static trap_stubs: [[u8; 16]; 256];
    static catch_resume: u8;
    fn catch_call(f: extern "C" fn(*mut u8), argument: *mut u8) -> u64;
    fn enter_frame(frame: *const Frame) -> !;
}

/// Where a vector's handler begins.
pub fn stub(vector: u64) -> u64 {
    &raw const trap_stubs as u64 + vector * 16
}

/// Fills the IDT and loads it.
pub fn init() {
    for vector in 0..256 {
        let ist = match vector {
            NMI => segments::IST_NMI,
            DF => segments::IST_DOUBLE,
            0..32 => segments::IST_EXCEPTION,
            _ => segments::IST_INTERRUPT,
        };
        set_gate(vector, stub(vector), segments::CODE, ist, 0x8e);
    }
    load_idt();
}

/// Loads the IDT on this CPU.
pub fn load_idt() {
    let pointer = TablePointer { limit: 4095, base: &raw const IDT as u64 };
    // SAFETY: the table is filled and lives for ever.
    unsafe { asm!("lidt [{}]", in(reg) &pointer) };
}

/// Sets one gate of the IDT.
pub fn set_gate(vector: u64, target: u64, selector: u16, ist: u8, access: u8) {
    let entry = [segments::gate(target, selector, ist, access), target >> 32];
    // SAFETY: volatile, since only the CPU reads it.
    unsafe { (&raw mut IDT.0[vector as usize]).write_volatile(entry) };
}

/// A gate of the IDT, to be put back later.
pub fn gate(vector: u64) -> [u64; 2] {
    // SAFETY: no reference is kept.
    unsafe { (&raw const IDT.0[vector as usize]).read_volatile() }
}

/// Puts a gate back.
pub fn restore_gate(vector: u64, entry: [u64; 2]) {
    // SAFETY: as set_gate().
    unsafe { (&raw mut IDT.0[vector as usize]).write_volatile(entry) };
}

/// Runs `hook` at each event of a vector; `None` takes it away.
pub fn hook(vector: u64, hook: Option<Hook>) {
    HOOKS[vector as usize].store(hook.map_or(0, |f| f as usize), SeqCst);
}

/// How often a vector came since the last call of [`reset_count`].
pub fn count(vector: u64) -> u32 {
    COUNTS[vector as usize].load(SeqCst)
}

/// Counts a vector from 0 again.
pub fn reset_count(vector: u64) {
    COUNTS[vector as usize].store(0, SeqCst);
}

/// Says who wants an end of interrupt for a vector: 0 nobody, 1 LAPIC, 2 first PIC, 3 both PICs.
pub fn set_eoi(vector: u64, kind: u8) {
    EOI[vector as usize].store(kind, SeqCst);
}

/// True when a catch took the event, and with it the control.
#[unsafe(no_mangle)]
extern "C" fn trap_handler(frame: &mut Frame) -> bool {
    let vector = frame.vector as usize & 255;
    COUNTS[vector].fetch_add(1, SeqCst);
    let hook = HOOKS[vector].load(SeqCst);
    if hook != 0 {
        // SAFETY: only hook() stores here, and it stores a Hook.
        let hook: Hook = unsafe { core::mem::transmute(hook) };
        if hook(frame) {
            return false;
        }
    }
    match EOI[vector].load(SeqCst) {
        1 => apic::eoi(),
        2 => outb(0x20, 0x20),
        3 => {
            outb(0xa0, 0x20);
            outb(0x20, 0x20);
        }
        // No controller behind it: an exception or INT n.
        _ if vector < 32 || CATCH_RSP.load(SeqCst) != 0 => {
            caught(frame);
            return true;
        }
        _ => {}
    }
    false
}

fn caught(frame: &mut Frame) {
    let trap = Trap { frame: *frame, cr2: cpu::cr2(), dr6: cpu::dr6(), stack: frame as *const Frame as u64 };
    let rsp = CATCH_RSP.load(SeqCst);
    if rsp == 0 {
        println!("FAIL unexpected exception: {trap:#x?}");
        runtime::exit(1);
    }
    // SAFETY: one CPU catches, and it waits for us.
    unsafe { CAUGHT = trap };
    frame.rip = &raw const catch_resume as u64;
    frame.cs = segments::CODE.into();
    frame.ss = segments::DATA.into();
    frame.rsp = rsp;
    frame.rflags = 2;
}

/// Runs `f` until it returns (`None`) or raises an exception or software interrupt.
///
/// What `f` owns is not dropped when it does not return; interrupts are forbidden afterwards when it did not.
pub fn catch<F: FnOnce()>(f: F) -> Option<Trap> {
    extern "C" fn call<F: FnOnce()>(slot: *mut u8) {
        // SAFETY: catch() passes its Option<F>.
        let f = unsafe { (*slot.cast::<Option<F>>()).take() };
        if let Some(f) = f {
            f();
        }
    }
    let mut slot = Some(f);
    let outer = CATCH_RSP.load(SeqCst);
    // SAFETY: trap_handler resumes catch_call with its stack pointer and callee-saved registers.
    let trapped = unsafe { catch_call(call::<F>, (&raw mut slot).cast()) } != 0;
    CATCH_RSP.store(outer, SeqCst);
    // SAFETY: the usual state, whatever the test left.
    unsafe { asm!("fninit", "ldmxcsr [{}]", in(reg) &0x1f80u32) };
    // SAFETY: written by the handler before we came back.
    trapped.then(|| unsafe { (&raw const CAUGHT).read_volatile() })
}

/// Enters the state that `frame` describes (any ring and code size of long mode) and stays until something traps.
pub fn run(frame: &Frame) -> Trap {
    let frame = *frame;
    // SAFETY: the caller describes a state; whatever it does wrong, it traps.
    let trap = catch(|| unsafe { enter_frame(&frame) });
    // SAFETY: flat data segments.
    unsafe { asm!("mov ds, {0:e}", "mov es, {0:e}", in(reg) u32::from(segments::DATA)) };
    trap.unwrap_or_default()
}

/// Resets the machine the hard way: an exception with no IDT.
pub fn triple_fault() -> ! {
    let pointer = TablePointer { limit: 0, base: 0 };
    // SAFETY: never comes back.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &pointer, options(noreturn)) }
}

/// Assembles snippets for [`run`]; each name becomes a function that gives its address.
///
/// A snippet that runs to its end reaches UD2; labels inside are global to the guest.
#[macro_export]
macro_rules! code {
    ($($name:ident: $($line:literal),+;)+) => {$(
        fn $name() -> u64 {
            #[unsafe(naked)]
            extern "C" fn body() {
                core::arch::naked_asm!($($line,)+ ".code64", "ud2")
            }
            body as *const () as u64
        }
    )+};
}
