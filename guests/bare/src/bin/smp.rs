//! The second CPU: started, interrupted, raced with, and told of changes.
#![no_std]
#![no_main]

use core::{
    arch::asm,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst},
};

use bare::{
    apic, cpu,
    paging::{self, P, W, frame, map, pte, read},
    report::Report,
    smp, timer, trap,
};

bare::guest!(main);

const ROUNDS: u64 = 20_000;

fn main() {
    let mut t = Report::new("smp");
    apic::enable();
    apic::write(apic::LVT_LINT0, apic::MASKED);
    for vector in 0x30..0xf0 {
        trap::set_eoi(vector, 1);
    }
    let Some(id) = smp::second() else {
        t.skip("smp", "one CPU");
        t.end()
    };
    t.check("INIT, SIPI start the second CPU", smp::start(id));
    identity(&mut t, id);
    ipis(&mut t, id);
    atomics(&mut t);
    code(&mut t, id);
    shootdown(&mut t, id);
    t.check("the second CPU started anew", smp::start(id));
    t.check("and it works", {
        smp::run(|| {});
        smp::join()
    });
    t.end()
}

static VALUE: AtomicU64 = AtomicU64::new(0);

fn identity(t: &mut Report, id: u32) {
    smp::run(|| VALUE.store(apic::id().into(), SeqCst));
    t.check("it does what it is told", smp::join());
    t.eq("its LAPIC identifier", VALUE.load(SeqCst), id.into());
    smp::run(|| VALUE.store(u64::from(cpu::cpuid(1, 0)[1] >> 24), SeqCst));
    smp::join();
    t.eq("its identifier in CPUID 1", VALUE.load(SeqCst), id.into());
    smp::run(|| VALUE.store(cpu::rdmsr(0x1b), SeqCst));
    smp::join();
    t.eq("BSP flag: second, first", (VALUE.load(SeqCst) >> 8 & 1, cpu::rdmsr(0x1b) >> 8 & 1), (0, 1));
}

fn ipis(t: &mut Report, id: u32) {
    let arrives = |destination: u32, command: u32| {
        let vector = u64::from(command & 0xff);
        trap::reset_count(vector);
        apic::ipi(destination, command);
        timer::until(|| trap::count(vector) != 0)
    };
    t.check("IPI to it", arrives(id, 0x50));
    t.check("IPI to all others", arrives(0, 3 << 18 | 0x51));
    trap::reset_count(0x52);
    apic::ipi(0, 2 << 18 | 0x52);
    t.check("IPI to all", timer::until(|| trap::count(0x52) == 2));
    smp::run(|| apic::ipi(0, 3 << 18 | 0x53));
    t.check("IPI from it", timer::until(|| trap::count(0x53) == 1));
    smp::join();
    // Asleep in HLT until an IPI comes.
    smp::run(|| {
        while trap::count(0x54) == 0 {
            cpu::wait_for_interrupt();
        }
        cpu::sti();
    });
    timer::pause();
    t.check("IPI wakes it from HLT", arrives(id, 0x54) && smp::join());
    trap::hook(trap::NMI, Some(|_| true));
    t.check("NMI to it", arrives(id, 0x400 | 2));
    trap::hook(trap::NMI, None);
    // There and back, many times.
    trap::hook(
        0x55,
        Some(|_| {
            VALUE.fetch_add(1, SeqCst);
            false
        }),
    );
    VALUE.store(0, SeqCst);
    let mut all = true;
    for i in 1..=500 {
        apic::ipi(id, 0x55);
        all &= timer::until(|| VALUE.load(SeqCst) == i);
    }
    t.check("500 IPIs, each answered", all);
}

static LOCKED: AtomicU64 = AtomicU64::new(0);
static EXCHANGED: AtomicU64 = AtomicU64::new(0);
static UNDER_LOCK: AtomicU64 = AtomicU64::new(0);
static LOCK: AtomicBool = AtomicBool::new(false);

#[repr(align(16))]
struct Pair([u64; 2]);
static mut PAIR: Pair = Pair([0; 2]);

/// Adds to both halves of PAIR at once.
fn add_pair() {
    let pair = &raw mut PAIR;
    // SAFETY: the loop only ends when no other CPU changed the pair meanwhile; RBX is kept by hand.
    unsafe {
        asm!(
            "push rbx",
            "mov rax, [rsi]",
            "mov rdx, [rsi + 8]",
            "2: lea rbx, [rax + 1]",
            "lea rcx, [rdx + 3]",
            "lock cmpxchg16b [rsi]",
            "jnz 2b",
            "pop rbx",
            in("rsi") pair, out("rax") _, out("rdx") _, out("rcx") _,
        );
    }
}

fn race() {
    for _ in 0..ROUNDS {
        LOCKED.fetch_add(1, SeqCst);
        _ = EXCHANGED.fetch_update(SeqCst, SeqCst, |v| Some(v + 1));
        while LOCK.swap(true, SeqCst) {
            core::hint::spin_loop();
        }
        UNDER_LOCK.store(UNDER_LOCK.load(SeqCst) + 1, SeqCst);
        LOCK.store(false, SeqCst);
        if cpu::has_cx16() {
            add_pair();
        }
    }
}

fn atomics(t: &mut Report) {
    smp::run(race);
    race();
    t.check("races end", smp::join());
    t.eq("LOCK XADD", LOCKED.load(SeqCst), 2 * ROUNDS);
    t.eq("LOCK CMPXCHG", EXCHANGED.load(SeqCst), 2 * ROUNDS);
    t.eq("XCHG spin lock", UNDER_LOCK.load(SeqCst), 2 * ROUNDS);
    // SAFETY: both CPUs are done.
    let pair = unsafe { (&raw const PAIR.0).read_volatile() };
    let rounds = if cpu::has_cx16() { 2 * ROUNDS } else { 0 };
    t.eq("LOCK CMPXCHG16B", pair, [rounds, 3 * rounds]);
    // A locked access across a page border.
    let page = map(0, frame(0), P | W);
    map(1, frame(1), P | W);
    VALUE.store(page + 0xffd, SeqCst);
    fn crossing() {
        let at = VALUE.load(SeqCst);
        for _ in 0..1000 {
            // SAFETY: both pages are mapped.
            unsafe { asm!("lock inc qword ptr [{}]", in(reg) at) };
        }
    }
    smp::run(crossing);
    crossing();
    smp::join();
    // SAFETY: both pages are mapped.
    t.eq("LOCK INC across pages", unsafe { ((page + 0xffd) as *const u64).read_unaligned() }, 2000);
}

static TURN: AtomicU32 = AtomicU32::new(0);
static WRONG: AtomicU32 = AtomicU32::new(0);

/// Calls the function at page 2 whenever told that it has changed.
fn caller() {
    for round in 1..=200u32 {
        while TURN.load(SeqCst) != 2 * round - 1 {
            core::hint::spin_loop();
        }
        let got: u32;
        // SAFETY: page 2 holds a function; CPUID serializes, as cross-modified code asks for.
        unsafe {
            core::arch::x86_64::__cpuid(0);
            asm!("call {}", in(reg) paging::TEST + 0x2000, out("eax") got);
        }
        WRONG.fetch_add(u32::from(got != round), SeqCst);
        TURN.store(2 * round, SeqCst);
    }
}

fn code(t: &mut Report, _id: u32) {
    let page = map(2, frame(2), P | W);
    smp::run(caller);
    let mut all = true;
    for round in 1..=200u32 {
        let [a, b, c, d] = round.to_le_bytes();
        // SAFETY: mov eax, round; ret. The other CPU waits for its turn.
        unsafe { (page as *mut [u8; 6]).write_volatile([0xb8, a, b, c, d, 0xc3]) };
        TURN.store(2 * round - 1, SeqCst);
        all &= timer::until(|| TURN.load(SeqCst) == 2 * round);
    }
    t.check("cross-modified code, 200 turns", all && smp::join());
    t.eq("cross-modified code, wrong results", WRONG.load(SeqCst), 0);
}

static STOP: AtomicBool = AtomicBool::new(false);

/// Reads page 3 until told to stop.
fn reader() {
    while !STOP.load(SeqCst) {
        VALUE.store(read(paging::TEST + 0x3000), SeqCst);
    }
}

fn shootdown(t: &mut Report, id: u32) {
    paging::write(frame(3), 0xa);
    paging::write(frame(4), 0xb);
    let page = map(3, frame(3), P | W);
    trap::hook(
        0x58,
        Some(|_| {
            cpu::invlpg(paging::TEST + 0x3000);
            false
        }),
    );
    smp::run(reader);
    let mut wrong = 0;
    for i in 0..50 {
        let target = 4 - i % 2;
        // SAFETY: a test entry; the IPI has the other CPU forget the old one.
        unsafe { pte(3).write_volatile(frame(target) | P | W) };
        cpu::invlpg(page);
        let before = trap::count(0x58);
        apic::ipi(id, 0x58);
        timer::until(|| trap::count(0x58) != before);
        // Twice: a read that was under way may still be stored.
        let expected = 7 + target as u64;
        if !timer::until(|| VALUE.load(SeqCst) == expected) {
            wrong += 1;
            break;
        }
    }
    STOP.store(true, SeqCst);
    t.check("TLB shootdown, it ends", smp::join());
    t.eq("TLB shootdown, stale reads", wrong, 0);
}
