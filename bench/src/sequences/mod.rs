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
use x86::flags;

pub use case::{Case, Mode};
pub use generate::Generator;
pub use pair::Pair;
use pair::{Outcome, Point};

/// How one case went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Alike.
    Same,
    /// The case never ends.
    Endless,
    /// Alike only if dead flags are kept: code that wrote itself needed some.
    Stale,
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
    /// Cases in which code that wrote itself needed flags that it had not needed before.
    pub stale: u64,
    /// Cases that differed: seed, the reduced case, and what differed.
    pub failures: Vec<(u64, Case, Vec<String>)>,
}

/// Failures after which a run stops.
const ENOUGH: usize = 20;
/// How often execution may come by the place of an interrupt with the same registers.
const OFTEN: u32 = 8;

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
            Verdict::Stale => summary.stale += 1,
            Verdict::Undefined => summary.undefined += 1,
            Verdict::Different(first) => {
                summary.failures.push(minimal(seed, case, first));
                if summary.failures.len() >= ENOUGH {
                    progress(&summary);
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
    try_check(pair, case).unwrap_or_else(|e| {
        // Whatever state it is in is not to be trusted any more.
        if let Ok(fresh) = Pair::new() {
            *pair = fresh;
        }
        Verdict::Different(vec![format!("{e:#}")])
    })
}

fn try_check(pair: &mut Pair, case: &Case) -> Result<Verdict> {
    let mut verdict = compare(pair, case)?;
    for _ in 0..3 {
        // A busy host can make any case look endless.
        if !matches!(&verdict, Verdict::Different(what) if what[0].starts_with("end is")) {
            break;
        }
        verdict = compare(pair, case)?;
    }
    if !matches!(verdict, Verdict::Different(_)) || case.exact {
        return Ok(verdict);
    }
    // Code that wrote itself may need flags that were dead before.
    let image = pair.image(case);
    compare::trace(&mut pair.reference, case, &image, None, &mut |_| {})?;
    let wrote_code = code(&pair.reference.now) != code(&image);
    pair.keep(image, case);
    let exact = Case { exact: true, ..case.clone() };
    let stale = wrote_code && matches!(compare(pair, &exact)?, Verdict::Same | Verdict::Undefined);
    Ok(if stale { Verdict::Stale } else { verdict })
}

fn compare(pair: &mut Pair, case: &Case) -> Result<Verdict> {
    let image = pair.image(case);
    let verdict = compare_with(pair, case, &image);
    pair.keep(image, case);
    verdict
}

fn compare_with(pair: &mut Pair, case: &Case, image: &[u8]) -> Result<Verdict> {
    let Pair { reference: side, subjects, .. } = pair;
    let subject = &mut subjects[usize::from(case.exact)];
    side.prepare(case, image)?;
    let mut reference = side.run()?;
    if reference.endless {
        return Ok(Verdict::Endless);
    }
    subject.prepare(case, image)?;
    if case.pause == 0 {
        let outcome = subject.run()?;
        return judge(pair, case, image, (&reference, &outcome), None);
    }
    let (outcome, point) = subject.run_interrupted(case)?;
    let Some(point) = point else { return judge(pair, case, image, (&reference, &outcome), None) };
    // The same registers may come by more than once.
    let mut verdict =
        Verdict::Different(vec![format!("it was left at {point:x?}, where the reference never was")]);
    for n in 0..OFTEN {
        let side = &mut pair.reference;
        side.prepare(case, image)?;
        let Some(outcome_there) = side.run_to(&point, n, case.interrupt)? else { break };
        reference = outcome_there;
        if reference.endless {
            return Ok(Verdict::Endless);
        }
        let point = (point.clone(), n);
        verdict = judge(pair, case, image, (&reference, &outcome), Some(&point))?;
        if !matches!(verdict, Verdict::Different(_)) {
            break;
        }
    }
    if matches!(verdict, Verdict::Different(_)) {
        // The way to there may hang on undefined flags.
        let trace = compare::trace(&mut pair.reference, case, image, None, &mut |_| {})?;
        if trace.depends || trace.remapped {
            return Ok(Verdict::Undefined);
        }
    }
    Ok(verdict)
}

/// Compares two outcomes, which are those of the last runs.
fn judge(
    pair: &mut Pair,
    case: &Case,
    image: &[u8],
    (reference, subject): (&Outcome, &Outcome),
    point: Option<&(Point, u32)>,
) -> Result<Verdict> {
    let alike = |pair: &Pair, at_end: u64, pushed: u64, halves: bool| {
        let mut state = subject.state.clone();
        if halves {
            let both = state.gpr.iter_mut().zip(&reference.state.gpr);
            both.for_each(|(a, b)| *a = *a & 0xffff_ffff | *b & !0xffff_ffff);
        }
        state.rflags ^= (state.rflags ^ reference.state.rflags) & at_end;
        let now = &pair.subjects[usize::from(case.exact)].now;
        let memory = compare::alike(now, &pair.reference.now, pushed, point.is_some());
        reference.exit == subject.exit && state == reference.state && memory && !subject.endless
    };
    let (at_end, pushed) =
        if case.exact { (0, 0) } else { (compare::stale(&reference.state), flags::STATUS) };
    if alike(pair, at_end, pushed, false) {
        return Ok(Verdict::Same);
    }
    let kept = pair.reference.now.clone();
    let trace = compare::trace(&mut pair.reference, case, image, point, &mut |_| {})?;
    let after = std::mem::replace(&mut pair.reference.now, kept);
    let verdict = if alike(pair, at_end | trace.open, pushed | trace.open | trace.pushed, trace.halves) {
        Verdict::Same
    } else if trace.depends || trace.remapped || trace.pushed != 0 && code(&pair.reference.now) != code(image)
    {
        // The latter may have pushed them where they are code.
        Verdict::Undefined
    } else {
        Verdict::Different(compare::differences(pair, case, reference, subject))
    };
    pair.reference.now = after;
    if matches!(verdict, Verdict::Different(_)) && trace.pushed != 0 {
        // What was pushed may have been read as data.
        for otherwise in [flags::AF, flags::CF, flags::OF, flags::PF, flags::SF, flags::ZF, flags::STATUS] {
            let outcome = compare::run_otherwise(&mut pair.reference, case, image, point, otherwise)?;
            let now = &pair.subjects[usize::from(case.exact)].now;
            if outcome == *subject && compare::alike(now, &pair.reference.now, 0, point.is_some()) {
                return Ok(Verdict::Undefined);
            }
        }
    }
    Ok(verdict)
}

/// The pages of code.
fn code(memory: &[u8]) -> [&[u8]; 2] {
    let page = |n: usize| &memory[layout::FRAMES[n] as usize..][..0x1000];
    [page(0), page(1)]
}

/// The latest interrupt that is tried.
const PAUSES: u16 = 40;

/// The same difference with fewer instructions, on engines that know no code yet: where an interrupt comes hangs on that.
fn minimal(seed: u64, case: Case, first: Vec<String>) -> (u64, Case, Vec<String>) {
    let afresh = |case: &Case| match Pair::new().map(|mut pair| check(&mut pair, case)) {
        Ok(Verdict::Different(what)) => Some(what),
        _ => None,
    };
    // How often code is left hangs on what is known already.
    let pauses = if case.pause == 0 { 0..1 } else { 1..PAUSES };
    let mut cases = pauses.map(|pause| Case { pause, ..case.clone() });
    let Some(case) = cases.find(|case| afresh(case).is_some()) else {
        return (seed, case, [vec!["not again".into()], first].concat());
    };
    let case = reduce(case, |case| afresh(case).is_some());
    let what = afresh(&case).unwrap_or_default();
    (seed, case, what)
}

fn reduce(mut case: Case, fails: impl Fn(&Case) -> bool) -> Case {
    loop {
        let before = case.clone();
        let mut at = 0;
        for n in 0..case.lengths.len() {
            let len = usize::from(case.lengths[n]);
            let mut fewer = case.clone();
            fewer.code[at..at + len].fill(0x90);
            if fewer.code != case.code && fails(&fewer) {
                case = fewer;
            }
            at += len;
        }
        let plain = Case::new(case.mode);
        let simpler: [&dyn Fn(&mut Case); 12] = [
            &|c| (c.interrupt, c.pause) = (0, 0),
            &|c| c.exact = true,
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
            if simple != case && fails(&simple) {
                case = simple;
            }
        }
        for n in 0..12 {
            let mut simple = case.clone();
            simple.pages[n] = plain.pages[n];
            if simple != case && fails(&simple) {
                case = simple;
            }
        }
        for n in (0..16).filter(|&n| n != 4) {
            let mut simple = case.clone();
            simple.gpr[n] = 0;
            if simple != case && fails(&simple) {
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
    let mut decoder = Decoder::with_ip(case.mode.bits(), &case.code, case.rip(), DecoderOptions::AMD);
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
    compare::trace(&mut pair.reference, case, &image, None, &mut show)?;
    Ok(())
}
