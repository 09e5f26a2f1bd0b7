//! The interpreter agrees with the real processor: a slice of `cargo xtask bench fuzz`, and what it found before.

use lodge_bench::fuzz;

#[test]
fn a_slice_of_the_long_run() {
    let seed = std::env::var("LODGE_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_261_121);
    println!("LODGE_SEED={seed}");
    match fuzz::run(60_000, seed, "", |_| {}) {
        Ok(summary) => {
            assert!(summary.mismatches.is_empty(), "{:#?}", summary.mismatches);
            assert!(summary.forms >= 2000, "{} forms", summary.forms);
        }
        Err(e) => println!("skipped: {e:#}"),
    }
}

/// Each file in `cases/` once was a mismatch: bytes, state in, and the state that the processor made of it.
#[test]
fn mismatches_of_the_past() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/cases");
    let mut guest = fuzz::Guest::new().unwrap();
    let mut count = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let (case, expected) = fuzz::parse(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let differences = fuzz::differences(&case, &expected, &guest.run(&case));
        assert!(differences.is_empty(), "{}: {differences:?}", path.display());
        count += 1;
    }
    assert!(count >= 8, "{count} cases");
}
