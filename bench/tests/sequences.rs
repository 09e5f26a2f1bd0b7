//! The translate engine agrees with the reference engine: a slice of `cargo xtask bench sequences`, and what it found before.

use lodge_bench::sequences::{self, Case, Pair, Verdict};

#[test]
fn a_slice_of_the_long_run() {
    let seed = std::env::var("LODGE_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_261_121);
    println!("LODGE_SEED={seed}");
    match sequences::run(4000, seed, |_| {}) {
        Ok(summary) => {
            let told: Vec<String> = summary
                .failures
                .iter()
                .map(|(seed, case, what)| {
                    format!("seed {seed}: {}\n{}", what.join("; "), sequences::describe(case))
                })
                .collect();
            assert!(told.is_empty(), "{}", told.join("\n"));
            assert_eq!(summary.cases, 4000);
            assert!(summary.endless + summary.undefined + summary.stale < 400, "{summary:?}");
        }
        Err(e) => println!("skipped: {e:#}"),
    }
}

/// Each file in `sequences/` once made a difference.
#[test]
fn differences_of_the_past() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/sequences");
    let mut pair = match Pair::new() {
        Ok(pair) => pair,
        Err(e) => return println!("skipped: {e:#}"),
    };
    let mut count = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let case = Case::parse(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(Case::parse(&case.print()).unwrap(), case, "{}", path.display());
        for exact in [false, true] {
            let case = Case { exact, ..case.clone() };
            assert_eq!(sequences::check(&mut pair, &case), Verdict::Same, "{}", path.display());
        }
        count += 1;
    }
    assert!(count >= 5, "{count} cases");
}
