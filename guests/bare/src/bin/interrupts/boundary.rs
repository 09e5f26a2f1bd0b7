//! At which instruction boundary an interrupt is taken: STI and MOV SS shadows, HLT, POPF.

use core::{
    arch::naked_asm,
    sync::atomic::{AtomicU64, Ordering::SeqCst},
};

use bare::{
    apic,
    report::Report,
    trap::{self, Frame},
};

static RIP: AtomicU64 = AtomicU64::new(0);

fn record(frame: &mut Frame) -> bool {
    RIP.store(frame.rip, SeqCst);
    false
}

/// Functions that take the pending interrupt at a label of theirs.
macro_rules! boundaries {
    ($($name:ident $label:literal: $($line:literal),+;)+) => {$(
        fn $name() -> u64 {
            #[unsafe(naked)]
            extern "C" fn body() -> u64 {
                naked_asm!($($line,)+ "cli", concat!("lea rax, [rip + ", $label, "]"), "ret")
            }
            body()
        }
    )+};
}

boundaries! {
    sti_nop "2b": "sti", "nop", "2: nop";
    sti_hlt "2b": "sti", "hlt", "2: nop";
    sti_sti "2b": "sti", "sti", "2: nop";
    popf "2b": "pushfq", "or dword ptr [rsp], 0x200", "popfq", "2: nop";
    mov_ss "2b": "mov eax, ss", "pushfq", "or dword ptr [rsp], 0x200", "cli", "popfq", "2: mov ss, eax", "nop";
    sti_ret "2b": "lea rax, [rip + 2f]", "push rax", "sti", "ret", "2: nop";
    sti_cli "2b": "sti", "cli", "nop", "2: sti", "nop", "3: nop";
    nothing "2b": "cli", "2: nop";
}

fn pend() {
    trap::reset_count(0x50);
    RIP.store(0, SeqCst);
    apic::ipi(0, 1 << 18 | 0x50);
}

pub fn run(t: &mut Report) {
    trap::hook(0x50, Some(record));
    for (name, code) in [
        ("STI, then one instruction", sti_nop as fn() -> u64),
        ("STI, HLT", sti_hlt),
        ("STI, STI: the first one's shadow only", sti_sti),
        ("POPF without a shadow", popf),
        ("STI, RET", sti_ret),
    ] {
        pend();
        let label = code();
        t.eq(name, (trap::count(0x50), RIP.load(SeqCst)), (1, label));
    }
    pend();
    let label = mov_ss();
    t.eq("POPF, MOV SS", (trap::count(0x50), RIP.load(SeqCst)), (1, label));
    pend();
    let label = sti_cli();
    // Three bytes after the label: STI, NOP.
    t.eq("STI, CLI: no window", (trap::count(0x50), RIP.load(SeqCst)), (1, label + 2));
    nothing();
    mov_ss_shadow(t);
    trap::hook(0x50, None);
}

/// An interrupt that becomes pending right before MOV SS is not taken between it and the next instruction.
fn mov_ss_shadow(t: &mut Report) {
    let (first, after): (u64, u64);
    pend();
    // SAFETY: SS is loaded with what it holds.
    unsafe {
        core::arch::asm!(
            "mov {s:e}, ss",
            "lea {a}, [rip + 3f]",
            "lea {b}, [rip + 2f]",
            "sti",
            "mov ss, {s:e}",
            "2: nop",
            "3: nop",
            "cli",
            s = out(reg) _,
            a = out(reg) after,
            b = out(reg) first,
        );
    }
    let rip = RIP.load(SeqCst);
    // Whether a second shadow follows the first is the processor's choice; never is the stack half changed.
    t.check("STI, MOV SS", trap::count(0x50) == 1 && (rip == after || rip == first));
}
