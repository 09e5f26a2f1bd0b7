//! What counts as a difference.

use iced_x86::{Decoder, Formatter, Instruction, Mnemonic as M, NasmFormatter, OpKind, RflagsBits};
use machine::cpu::State;
use x86::exception::vector;
use x86::flags;
use x86::paging::entry;
use x86::segment::{attr, index};

use super::case::Case;
use super::layout::{self, CODE_AT, HANDLERS, KERNEL, PAGES};
use super::pair::{Outcome, Pair, Point, Side};

/// Instructions that are followed at most when flags have to be understood.
const STEPS: usize = 4000;

const STATUS: [(u32, u64); 6] = [
    (RflagsBits::CF, flags::CF),
    (RflagsBits::PF, flags::PF),
    (RflagsBits::AF, flags::AF),
    (RflagsBits::ZF, flags::ZF),
    (RflagsBits::SF, flags::SF),
    (RflagsBits::OF, flags::OF),
];

fn bits(iced: u32) -> u64 {
    STATUS.iter().filter(|(b, _)| iced & b != 0).fold(0, |m, (_, bit)| m | bit)
}

fn is_shift(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        M::Shl | M::Shr | M::Sar | M::Sal | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    )
}

fn undefined(i: &Instruction) -> u64 {
    let rotation = matches!(i.mnemonic(), M::Rol | M::Ror | M::Rcl | M::Rcr);
    bits(i.rflags_undefined())
        | if rotation {
            flags::OF
        } else if is_shift(i) {
            flags::OF | flags::AF | flags::CF
        } else {
            0
        }
}

/// All that differs after both ran `case`, in words.
pub fn differences(pair: &Pair, case: &Case, reference: &Outcome, subject: &Outcome) -> Vec<String> {
    let mut all = Vec::new();
    if (reference.exit, reference.endless) != (subject.exit, subject.endless) {
        all.push(format!(
            "end is {:?} ({}), not {:?} ({})",
            subject.exit, subject.endless, reference.exit, reference.endless
        ));
    }
    if reference.state != subject.state {
        let values = [&subject.state, &reference.state].map(|s| format!("{s:x?}"));
        let parts = values.each_ref().map(|v| v.split([',', '{', '}']).collect::<Vec<_>>());
        let names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"];
        for n in 0..16 {
            let (a, b) = (subject.state.gpr[n], reference.state.gpr[n]);
            if a != b {
                let name = names.get(n).map_or_else(|| format!("r{n}"), |s| (*s).to_owned());
                all.push(format!("{name} is {a:x}, not {b:x}"));
            }
        }
        for (n, (a, b)) in subject.state.fpu.ymm.iter().zip(&reference.state.fpu.ymm).enumerate() {
            if a != b {
                all.push(format!("ymm{n} is {a:02x?}, not {b:02x?}"));
            }
        }
        let rest = parts[0].iter().zip(&parts[1]).filter(|(a, b)| a != b && a.contains(':'));
        all.extend(rest.map(|(a, b)| format!("state has{a}, not{b}")));
        if all.is_empty() {
            all.push("states differ".into());
        }
    }
    for (at, a, b) in words(&pair.subjects[usize::from(case.exact)].now, &pair.reference.now) {
        all.push(format!("memory at {at:x} is {a:08x}, not {b:08x}"));
        if all.len() > 20 {
            all.push("and so on".into());
            break;
        }
    }
    all
}

/// Where two memories differ: address and both values.
fn words<'a>(a: &'a [u8], b: &'a [u8]) -> impl Iterator<Item = (usize, u32, u32)> + 'a {
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |w: u32, &b| w << 8 | u32::from(b));
    let pages = a.chunks(0x1000).zip(b.chunks(0x1000)).enumerate().filter(|(_, (a, b))| a != b);
    pages.flat_map(move |(page, (a, b))| {
        let words = a.chunks(4).zip(b.chunks(4)).enumerate().filter(|(_, (a, b))| a != b);
        words.map(move |(n, (a, b))| (0x1000 * page + 4 * n, word(a), word(b)))
    })
}

/// Whether two memories are alike but for `flags` in what looks like images of RFLAGS, at whatever addresses. With
/// `touched` the first may say of more pages that they were accessed or written: by an instruction before which an
/// interrupt came.
pub fn alike(a: &[u8], b: &[u8], flags: u64, touched: bool) -> bool {
    let image = |from: usize| {
        // What is always set, and always clear in its lower half, as far as the page goes: what follows lies elsewhere.
        const IMAGE: [(u8, u8); 2] = [(0x2a, 2), (0x80, 0)];
        let page = &a[from..(from | 0xfff) + 1];
        page.iter().zip(IMAGE).all(|(byte, (mask, value))| byte & mask == value)
    };
    let [low, middle] = [flags as u8, (flags >> 8) as u8];
    words(a, b).all(|(at, x, y)| {
        if touched && at as u64 & !0xfff == layout::TABLE && x == y | x & ACCESSED_DIRTY {
            return true;
        }
        (at..at + 4).filter(|&n| a[n] != b[n]).all(|n| {
            let is = |from: usize, mask: u8| (a[n] ^ b[n]) & !mask == 0 && image(from);
            is(n, low) || is(n.saturating_sub(1), middle) || n & 0xfff == 0 && (a[n] ^ b[n]) & !middle == 0
        })
    })
}

/// Status flags at the end that need not be right where dead flags may be stale: those that a fault pushed, for only a
/// software interrupt reads them.
pub fn stale(state: &State) -> u64 {
    let vector = state.rip.wrapping_sub(KERNEL + HANDLERS) >> 4;
    let software = vector == u64::from(vector::BP) || (32..256).contains(&vector);
    if software { 0 } else { flags::STATUS }
}

const ACCESSED_DIRTY: u32 = 0x60;
const UNDERFLOW_MASK: u32 = 1 << 11;

/// What an execution says about undefined flags.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trace {
    /// Flags that are undefined at the end.
    pub open: u64,
    /// Flags that were undefined when an exception or an interrupt pushed them.
    pub pushed: u64,
    /// An instruction depended on undefined flags, or was random.
    pub depends: bool,
    /// The page tables changed without the TLB being told: old translations may be used, or not (SDM vol. 3, 4.10.2.3).
    pub remapped: bool,
    /// Code of 64 bits went to code of fewer, from where on the upper halves of registers are undefined (SDM vol. 1, 3.4.1.1).
    pub halves: bool,
}

/// Follows the case on the reference engine, with its interrupt where it came to `point` the `n`-th time. Memory is then
/// as it was at the end.
pub fn trace(
    side: &mut Side,
    case: &Case,
    image: &[u8],
    point: Option<&(Point, u32)>,
    show: &mut dyn FnMut(&str),
) -> anyhow::Result<Trace> {
    follow(side, case, image, point, 0, show)
}

/// Runs the case on the reference engine as [`trace`] does, with the other choice for those of `flags` that an instruction
/// leaves undefined.
pub fn run_otherwise(
    side: &mut Side,
    case: &Case,
    image: &[u8],
    point: Option<&(Point, u32)>,
    flags: u64,
) -> anyhow::Result<Outcome> {
    follow(side, case, image, point, flags, &mut |_| {})?;
    side.run()
}

fn follow(
    side: &mut Side,
    case: &Case,
    image: &[u8],
    point: Option<&(Point, u32)>,
    otherwise: u64,
    show: &mut dyn FnMut(&str),
) -> anyhow::Result<Trace> {
    side.prepare(case, image)?;
    let mut trace = Trace::default();
    let mut left = point.map(|p| p.1);
    let mut untold = false;
    for _ in 0..STEPS {
        if let (Some((point, _)), Some(n)) = (point, left)
            && side.is_at(point)?
        {
            left = n.checked_sub(1);
            if n == 0 {
                side.interrupt(case.interrupt);
            }
        }
        let state = side.cpu().state()?;
        let handlers = KERNEL + HANDLERS;
        if (handlers..handlers + 0x1000).contains(&state.rip) {
            break;
        }
        let i = instruction(side, &state);
        trace.halves |= case.mode.bits() == 64 && !state.segments[index::CS].has(attr::L);
        show(&describe(case, &i, &state));
        trace.before(&i, &state);
        trace.remapped |= untold && i.mnemonic() != M::Invlpg;
        let entries = side.entries();
        if side.step().is_some() {
            break;
        }
        let mut after = side.cpu().state()?;
        let flips = undefined(&i) & otherwise;
        if flips != 0 && inside(state.rip) == inside(after.rip) {
            after.rflags ^= flips;
            side.cpu().set_state(&after)?;
        }
        untold = changed(&entries, &side.entries());
        // Nor does a change of CR3 tell it of pages that are global.
        trace.remapped |= state.cr3 != after.cr3 && case.pages.iter().any(|entry| entry & entry::G != 0);
        if !inside(state.rip) && inside(after.rip) {
            if matches!(i.mnemonic(), M::Div | M::Idiv) {
                trace.open |= undefined(&i);
            }
            trace.pushed |= trace.open;
            if state.rflags & flags::TF != 0 {
                trace.after(&i);
                trace.pushed |= trace.open;
            }
        } else if inside(state.rip) && !inside(after.rip) {
            trace.open |= trace.pushed;
        } else {
            trace.after(&i);
        }
        if i.is_invalid() {
            break;
        }
    }
    side.reread();
    Ok(trace)
}

/// Whether entries of page tables that may be in a TLB became others, but for what the processor notes in them.
fn changed(before: &[u64; PAGES], after: &[u64; PAGES]) -> bool {
    let noted = u64::from(ACCESSED_DIRTY);
    let differs = |old: u64, new: u64| (old ^ new) & !noted != 0 || old & noted & !new != 0;
    before.iter().zip(after).any(|(&old, &new)| old & entry::P != 0 && differs(old, new))
}

/// Whether it is an address of a handler.
fn inside(rip: u64) -> bool {
    (KERNEL..KERNEL + 0x20_0000).contains(&rip)
}

/// The instruction at RIP.
fn instruction(side: &mut Side, state: &State) -> Instruction {
    let cs = state.segments[index::CS];
    let width = match (cs.has(attr::L), cs.has(attr::DB)) {
        (true, _) => 64,
        (_, true) => 32,
        _ => 16,
    };
    let bytes: [u8; 15] = side.peek(state.rip.wrapping_add(if width == 64 { 0 } else { cs.base }));
    Decoder::with_ip(width, &bytes, state.rip, side.options()).decode()
}

fn describe(case: &Case, i: &Instruction, state: &State) -> String {
    let mut text = String::new();
    NasmFormatter::new().format(i, &mut text);
    let at = state.rip.wrapping_sub(case.offset() + CODE_AT);
    let [rax, rcx, _, _, rsp, ..] = state.gpr;
    format!("{at:6x} {text}  rflags {:x} rax {rax:x} rcx {rcx:x} rsp {rsp:x}", state.rflags)
}

impl Trace {
    /// Before an instruction that may depend on undefined flags.
    fn before(&mut self, i: &Instruction, state: &State) {
        let reads = match i.mnemonic() {
            M::Pushf | M::Pushfd | M::Pushfq | M::Lahf | M::Syscall => flags::STATUS,
            _ => bits(i.rflags_read()),
        };
        self.depends |= reads & self.open != 0 || matches!(i.mnemonic(), M::Rdrand | M::Rdseed);
        // 16-bit double shifts by more than 16 leave even the result undefined.
        let narrow = matches!(i.mnemonic(), M::Shld | M::Shrd) && i.op1_register().is_gpr16();
        let count = if i.op_kind(i.op_count().saturating_sub(1)) == OpKind::Immediate8 {
            i.immediate8()
        } else {
            state.gpr[1] as u8
        };
        self.depends |= narrow && count & 31 > 16;
        // Whether it reports an unmasked underflow is what the reference engine does not know: see `native::float`.
        self.depends |= i.mnemonic() == M::Vcvtps2ph && state.fpu.mxcsr & UNDERFLOW_MASK == 0;
    }

    fn after(&mut self, i: &Instruction) {
        let conditional = is_shift(i) || i.has_rep_prefix() || i.has_repne_prefix();
        let written = if conditional { 0 } else { bits(i.rflags_modified()) };
        self.open = self.open & !written | undefined(i);
    }
}
