//! Random instructions of every user-mode form, on the real processor and in the interpreter: all must agree.

mod compare;
mod form;
mod guest;
mod random;
mod text;

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use native::oracle::{Case, Oracle, Reply};

pub use compare::differences;
pub(crate) use form::suits;
pub use form::{Form, forms};
pub use guest::Guest;
pub(crate) use guest::processor;
pub use random::Random;
pub use text::{parse, print};

/// Cases that go to the oracle at once.
const BATCH: usize = 500;

/// How a run went.
#[derive(Debug, Default)]
pub struct Summary {
    /// Forms that were tried: an instruction code in a mode, with its operand in a register or in memory.
    pub forms: usize,
    /// Cases that were compared.
    pub cases: u64,
    /// Of these, cases that ended in an exception on the processor.
    pub faults: u64,
    /// What differed, by instruction: how often, and the first case, in words and as a file for the regression tests.
    pub mismatches: BTreeMap<String, (u64, String, String)>,
}

/// Runs about `cases` random cases of the forms whose mnemonic contains `filter`.
///
/// # Errors
/// The oracle cannot run here.
pub fn run(cases: u64, seed: u64, filter: &str, mut progress: impl FnMut(u64)) -> Result<Summary> {
    let mut oracle = Oracle::new().context("the real processor cannot be asked here")?;
    let mut random = Random::new(seed);
    let all = forms();
    let chosen: Vec<&Form> = all.iter().filter(|f| f.name().contains(&filter.to_lowercase())).collect();
    anyhow::ensure!(!chosen.is_empty(), "no instruction form has {filter:?} in its name");
    let mut guest = Guest::new()?;
    let mut summary = Summary { forms: chosen.len(), ..Summary::default() };
    let mut next = 0;
    while summary.cases < cases {
        let mut batch: Vec<(&Form, Case)> = Vec::with_capacity(BATCH);
        while batch.len() < BATCH.min(cases as usize) {
            let form = chosen[next % chosen.len()];
            next += 1;
            if let Some(case) = form.case(&mut random) {
                batch.push((form, case));
            }
        }
        let requests: Vec<Case> = batch.iter().map(|(_, case)| case.clone()).collect();
        let replies = oracle.run(&requests)?;
        for ((form, case), reply) in batch.iter().zip(&replies) {
            check(&mut summary, &mut guest, form, case, reply);
        }
        progress(summary.cases);
    }
    Ok(summary)
}

fn check(summary: &mut Summary, guest: &mut Guest, form: &Form, case: &Case, expected: &Reply) {
    use native::oracle::End;
    summary.cases += 1;
    match expected.end {
        End::Died | End::Syscall => return,
        End::Fault { .. } => summary.faults += 1,
        End::Completed => {}
    }
    let got = guest.run(case);
    let differences = compare::differences(case, expected, &got);
    if !differences.is_empty() {
        let entry = summary
            .mismatches
            .entry(form.name())
            .or_insert_with(|| (0, differences.join("; "), text::print(case, expected)));
        entry.0 += 1;
    }
}
