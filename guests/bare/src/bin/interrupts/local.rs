//! LAPIC: self IPIs, priorities, NMI, x2APIC mode (SDM 3A, chapter 11).

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use bare::{
    apic::{self, DFR, ESR, IRR, ISR, LDR, PPR, SVR, TPR},
    cpu,
    report::Report,
    segments, timer,
    trap::{self, Frame, GP, NMI, catch},
};

const SELF: u32 = 1 << 18;

/// Vectors in the order of their delivery, a byte each.
static ORDER: AtomicU64 = AtomicU64::new(0);

fn record(frame: &mut Frame) -> bool {
    let order = ORDER.load(SeqCst);
    ORDER.store(order << 8 | frame.vector & 0xff, SeqCst);
    false
}

/// Sends itself an interrupt, waits until it came.
fn arrives(send: impl Fn(u32), vector: u64) -> bool {
    trap::reset_count(vector);
    send(vector as u32);
    timer::until(|| trap::count(vector) == 1)
}

pub fn run(t: &mut Report) {
    destinations(t, "IPI");
    priorities(t);
    nesting(t);
    nmi(t);
    errors(t);
    disabled(t);
}

fn destinations(t: &mut Report, name: &str) {
    t.check(name, arrives(|v| apic::ipi(0, SELF | v), 0x50));
    t.check(name, arrives(|v| apic::ipi(apic::id(), v), 0x51));
    t.check(name, arrives(|v| apic::ipi(0, 2 << 18 | v), 0x52));
    apic::ipi(0, 3 << 18 | 0x53);
    timer::pause();
    t.eq("IPI to all but oneself, alone or others asleep", trap::count(0x53), 0);
}

fn priorities(t: &mut Report) {
    apic::write(DFR, u32::MAX);
    apic::write(LDR, 1 << 24);
    t.check("IPI, logical flat", arrives(|v| apic::ipi(1, 1 << 11 | v), 0x54));
    apic::write(DFR, 0x0fff_ffff);
    apic::write(LDR, 0x21 << 24);
    t.check("IPI, logical cluster", arrives(|v| apic::ipi(0x21, 1 << 11 | v), 0x55));
    apic::ipi(0x11, 1 << 11 | 0x56);
    timer::pause();
    t.eq("IPI, another cluster", trap::count(0x56), 0);
    apic::write(DFR, u32::MAX);
    apic::write(LDR, 1 << 24);

    for vector in [0x31, 0x60, 0x61, 0xa0] {
        trap::hook(vector, Some(record));
        apic::ipi(0, SELF | vector as u32);
    }
    t.check("pending while interrupts are forbidden", apic::bit(IRR, 0x60) && !apic::bit(ISR, 0x60));
    timer::pause();
    t.eq("delivered by priority", ORDER.load(SeqCst), 0xa061_6031);

    apic::write(TPR, 0x60);
    t.eq("CR8 shows TPR", cpu::cr8(), 6);
    t.eq("PPR follows TPR", apic::read(PPR), 0x60);
    ORDER.store(0, SeqCst);
    for vector in [0x31, 0x61, 0xa0] {
        apic::ipi(0, SELF | vector as u32);
    }
    timer::pause();
    t.eq("TPR holds its class and lower", ORDER.load(SeqCst), 0xa0);
    t.check("held in IRR", apic::bit(IRR, 0x61) && apic::bit(IRR, 0x31));
    // SAFETY: 5 lets class 6 through.
    unsafe { cpu::set_cr8(5) };
    timer::pause();
    t.eq("CR8 lets a class through", (ORDER.load(SeqCst), apic::read(TPR)), (0xa061, 0x50));
    // SAFETY: lets everything through.
    unsafe { cpu::set_cr8(0) };
    timer::pause();
    t.eq("CR8 of 0 lets all through", ORDER.load(SeqCst), 0xa0_6131);
    for vector in [0x31, 0x60, 0x61, 0xa0] {
        trap::hook(vector, None);
    }
}

static SEEN: AtomicU32 = AtomicU32::new(0);

/// In service at 0x60: a lower one must wait, a higher one must not.
fn outer(_: &mut Frame) -> bool {
    apic::ipi(0, SELF | 0x58);
    apic::ipi(0, SELF | 0x70);
    let in_service = apic::bit(ISR, 0x60) && apic::read(PPR) == 0x60;
    timer::pause();
    let seen = u32::from(in_service) | (trap::count(0x70) & 1) << 1 | (trap::count(0x58) & 1) << 2;
    SEEN.store(seen, SeqCst);
    false
}

fn nesting(t: &mut Report) {
    // The inner interrupt needs another stack.
    trap::set_gate(0x70, trap::stub(0x70), segments::CODE, segments::IST_DOUBLE, 0x8e);
    trap::hook(0x60, Some(outer));
    trap::reset_count(0x58);
    trap::reset_count(0x70);
    apic::ipi(0, SELF | 0x60);
    timer::pause();
    trap::hook(0x60, None);
    t.eq("in service: higher nests, lower waits", SEEN.load(SeqCst), 3);
    t.eq("the lower one comes after EOI", trap::count(0x58), 1);
    t.eq("nothing in service at the end", (apic::bit(ISR, 0x60), apic::read(PPR)), (false, 0));
}

static DEPTH: AtomicU32 = AtomicU32::new(0);
static DEEPEST: AtomicU32 = AtomicU32::new(0);

/// The first NMI sends another, which has to wait for IRET.
fn on_nmi(_: &mut Frame) -> bool {
    let depth = DEPTH.fetch_add(1, SeqCst) + 1;
    DEEPEST.fetch_max(depth, SeqCst);
    if trap::count(NMI) == 1 {
        apic::ipi(apic::id(), 0x400);
        for _ in 0..1000 {
            core::hint::spin_loop();
        }
    }
    DEPTH.fetch_sub(1, SeqCst);
    true
}

fn nmi(t: &mut Report) {
    trap::reset_count(NMI);
    trap::hook(NMI, Some(on_nmi));
    cpu::cli();
    apic::ipi(apic::id(), 0x400);
    let start = cpu::rdtsc();
    while trap::count(NMI) < 2 && cpu::rdtsc() - start < 4_000_000_000 {}
    t.eq("NMIs, with interrupts forbidden", trap::count(NMI), 2);
    t.eq("the second waits for IRET", DEEPEST.load(SeqCst), 1);
    trap::hook(NMI, None);
}

fn errors(t: &mut Report) {
    apic::write(ESR, 0);
    apic::write(ESR, 0);
    t.eq("no LAPIC error", apic::read(ESR), 0);
    t.eq("LAPIC version", apic::read(apic::VERSION) & 0xf0, 0x10);
}

fn disabled(t: &mut Report) {
    apic::write(SVR, 0xff);
    t.check("software disable masks the local entries", apic::read(apic::LVT_TIMER) & apic::MASKED != 0);
    apic::write(apic::LVT_TIMER, 0x40);
    t.tcg("not forced").check("and keeps them masked", apic::read(apic::LVT_TIMER) & apic::MASKED != 0);
    apic::enable();
}

pub fn x2apic(t: &mut Report) {
    if !cpu::has(1, 2, 21) {
        return t.skip("x2APIC", "not in CPUID");
    }
    let id = apic::id();
    apic::enable_x2();
    t.eq("x2APIC identifier", apic::id(), id);
    t.eq("x2APIC in CPUID 0xb", cpu::cpuid(0xb, 0)[3], id);
    let logical = (id >> 4) << 16 | 1 << (id & 15);
    t.eq("x2APIC logical identifier", apic::read(LDR), logical);
    destinations(t, "x2APIC IPI");
    t.check("x2APIC IPI, logical", arrives(|v| apic::ipi(logical, 1 << 11 | v), 0x57));
    // SAFETY: the self-IPI register.
    t.check("x2APIC self IPI", arrives(|v| unsafe { cpu::wrmsr(0x83f, v.into()) }, 0x59));
    t.trap("x2APIC, no ICR2", catch(|| _ = cpu::rdmsr(0x831)), GP, 0);
    t.trap("x2APIC, DFR does not exist", catch(|| _ = cpu::rdmsr(0x80e)), GP, 0);
    t.trap("x2APIC, self IPI is write-only", catch(|| _ = cpu::rdmsr(0x83f)), GP, 0);
    // SAFETY: refused.
    t.trap("x2APIC, EOI of not 0", catch(|| unsafe { cpu::wrmsr(0x80b, 1) }), GP, 0);
    // SAFETY: refused: a way back leads through off only.
    let back = catch(|| unsafe { cpu::wrmsr(0x1b, cpu::rdmsr(0x1b) & !0x400) });
    t.trap("x2APIC to xAPIC directly", back, GP, 0);
    apic::disable_x2();
    apic::enable();
    t.check("IPI in xAPIC mode again", arrives(|v| apic::ipi(0, SELF | v), 0x5a));
}
