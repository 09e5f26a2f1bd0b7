//! Random programs, on the reference engine and on the translate engine: both must end alike, in every register and in all
//! of memory.

mod case;
mod compare;
mod generate;
mod layout;
mod operands;
mod pair;
mod program;
mod special;

use std::fmt::Write;

use anyhow::Result;
use iced_x86::{Decoder, DecoderOptions, Formatter, NasmFormatter};

pub use case::{Case, Mode};
pub use generate::Generator;
pub use pair::Pair;

/// How one case went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Alike.
    Same,
    /// The case never ends.
    Endless,
    /// Not alike, for what the manuals leave undefined.
    Undefined,
    /// Not alike.
    Different(Vec<String>),
}

/// How a run went.
#[derive(Debug, Default)]
pub struct Summary {
    /// Cases that were compared.
    pub cases: u64,
    /// Of these, cases that did not end, and cases with undefined results.
    pub endless: u64,
    /// See `endless`.
    pub undefined: u64,
    /// Cases that differed: seed, the reduced case, and what differed.
    pub failures: Vec<(u64, Case, Vec<String>)>,
}

/// Failures after which a run stops.
const ENOUGH: usize = 20;

/// Runs `cases` cases from `seed` on.
///
/// # Errors
/// An engine gives up, or cannot be made.
pub fn run(cases: u64, seed: u64, mut progress: impl FnMut(&Summary)) -> Result<Summary> {
    let generator = Generator::new();
    let mut pair = Pair::new()?;
    let mut summary = Summary::default();
    for n in 0..cases {
        let seed = seed.wrapping_add(n);
        let case = generator.case(seed);
        summary.cases += 1;
        match check(&mut pair, &case) {
            Verdict::Same => {}
            Verdict::Endless => summary.endless += 1,
            Verdict::Undefined => summary.undefined += 1,
            Verdict::Different(_) => {
                let case = reduce(&mut pair, case);
                let what = match check(&mut pair, &case) {
                    Verdict::Different(what) => what,
                    other => vec![format!("not again: {other:?}")],
                };
                summary.failures.push((seed, case, what));
                if summary.failures.len() >= ENOUGH {
                    break;
                }
            }
        }
        progress(&summary);
    }
    Ok(summary)
}

/// Runs a case on both.
pub fn check(pair: &mut Pair, case: &Case) -> Verdict {
    let mut verdict = try_check(pair, case);
    for _ in 0..3 {
        // A busy host can make any case look endless.
        if !matches!(&verdict, Ok(Verdict::Different(what)) if what[0].starts_with("end is")) {
            break;
        }
        verdict = try_check(pair, case);
    }
    verdict.unwrap_or_else(|e| {
        // Whatever state it is in is not to be trusted any more.
        if let Ok(fresh) = Pair::new() {
            *pair = fresh;
        }
        Verdict::Different(vec![format!("{e:#}")])
    })
}

fn try_check(pair: &mut Pair, case: &Case) -> Result<Verdict> {
    let image = pair.image(case);
    pair.reference.prepare(case, &image)?;
    pair.subject.prepare(case, &image)?;
    let mut reference = pair.reference.run()?;
    let mut subject = pair.subject.run()?;
    // One that takes the reference engine long may well take the other too long: code that writes itself in a loop.
    if subject.endless && (reference.endless || reference.instructions > 2000) {
        return Ok(Verdict::Endless);
    }
    if reference.state == subject.state
        && reference.exit == subject.exit
        && pair.reference.now == pair.subject.now
    {
        return Ok(Verdict::Same);
    }
    let kept = pair.reference.now.clone();
    let trace = compare::trace(&mut pair.reference, case, &image, &mut |_| {})?;
    let after = std::mem::replace(&mut pair.reference.now, kept);
    // What the last exception pushed, and the flags themselves.
    let clear = |flags: &mut u64| *flags &= !trace.open;
    clear(&mut reference.state.rflags);
    clear(&mut subject.state.rflags);
    let same = reference.state == subject.state && reference.exit == subject.exit;
    let memory = pair
        .reference
        .now
        .iter()
        .zip(&pair.subject.now)
        .enumerate()
        .filter(|(_, (a, b))| a != b)
        .all(|(n, (a, b))| is_pushed_flags(&reference.state, &pair.reference, n, a ^ b, trace.open));
    let verdict = if trace.depends || same && memory {
        Verdict::Undefined
    } else {
        Verdict::Different(compare::differences(pair, &reference, &subject))
    };
    // The trace changed memory since.
    pair.reference.now = after;
    pair.reference.reread();
    Ok(verdict)
}

/// Whether word `n` of memory is where the last exception pushed flags, and only undefined ones differ.
fn is_pushed_flags(state: &machine::cpu::State, _: &pair::Side, n: usize, differ: u64, open: u64) -> bool {
    let vector = (state.rip.wrapping_sub(layout::KERNEL + layout::HANDLERS) >> 4) as u8;
    let has_code = matches!(vector, 8 | 10..=14 | 17);
    let long = state.efer & x86::control::efer::LMA != 0;
    let word = if long { 8 } else { 4 };
    let at = state.gpr[x86::gpr::RSP] + word * (2 + u64::from(has_code));
    let shift = 8 * (at % 8);
    // Linear addresses keep the lowest 12 bits.
    at & 0xff8 == (8 * n as u64) & 0xff8 && differ & !(open << shift) == 0
}

/// The same difference with fewer instructions.
fn reduce(pair: &mut Pair, mut case: Case) -> Case {
    let fails = |pair: &mut Pair, case: &Case| matches!(check(pair, case), Verdict::Different(_));
    if !fails(pair, &case) {
        return case;
    }
    loop {
        let before = case.clone();
        let mut at = 0;
        for n in 0..case.lengths.len() {
            let len = usize::from(case.lengths[n]);
            let mut fewer = case.clone();
            fewer.code[at..at + len].fill(0x90);
            if fewer.code != case.code && fails(pair, &fewer) {
                case = fewer;
            }
            at += len;
        }
        let plain = Case::new(case.mode);
        let simpler: [&dyn Fn(&mut Case); 11] = [
            &|c| c.interrupt = 0,
            &|c| c.stack.clear(),
            &|c| c.pages = plain.pages,
            &|c| c.cr0 = plain.cr0,
            &|c| c.cr4 = plain.cr4,
            &|c| c.bases = [0; 2],
            &|c| c.mxcsr = 0x1f80,
            &|c| c.ist = true,
            &|c| c.rflags = 2,
            &|c| c.rflags = 0x3002,
            &|c| c.vectors = 1,
        ];
        for simplify in simpler {
            let mut simple = case.clone();
            simplify(&mut simple);
            if simple != case && fails(pair, &simple) {
                case = simple;
            }
        }
        for n in 0..12 {
            let mut simple = case.clone();
            simple.pages[n] = plain.pages[n];
            if simple != case && fails(pair, &simple) {
                case = simple;
            }
        }
        for n in (0..16).filter(|&n| n != 4) {
            let mut simple = case.clone();
            simple.gpr[n] = 0;
            if simple != case && fails(pair, &simple) {
                case = simple;
            }
        }
        if case == before {
            return case;
        }
    }
}

/// A case with its instructions in words, as a comment.
pub fn describe(case: &Case) -> String {
    let mut text = String::new();
    let mut decoder = Decoder::with_ip(case.mode.bits(), &case.code, case.rip(), DecoderOptions::NONE);
    let mut formatter = NasmFormatter::new();
    while decoder.can_decode() {
        let i = decoder.decode();
        if i.code() != iced_x86::Code::Nopd {
            let mut words = String::new();
            formatter.format(&i, &mut words);
            let _ = writeln!(text, "# {:x} {words}", i.ip());
        }
    }
    text + &case.print()
}

/// What the reference engine does with a case, step by step.
///
/// # Errors
/// The engine gives up.
pub fn follow(pair: &mut Pair, case: &Case, mut show: impl FnMut(&str)) -> Result<()> {
    let image = pair.image(case);
    compare::trace(&mut pair.reference, case, &image, &mut show)?;
    pair.reference.reread();
    Ok(())
}
