//! A line per check, a sum at the end.

use core::fmt::Debug;

use crate::{cpu, println, runtime, trap::Trap};

/// Counts checks. Print order is run order; the last line is `N passed, M failed`.
pub struct Report {
    passed: u32,
    failed: u32,
    on_tcg: bool,
    deviation: Option<&'static str>,
}

impl Report {
    /// Begins; prints the guest's name.
    pub fn new(name: &str) -> Self {
        println!("guest {name}");
        Report { passed: 0, failed: 0, on_tcg: cpu::on_tcg(), deviation: None }
    }

    /// The next check is known to fail under QEMU's translator, for this reason: it is reported there, not counted.
    pub fn tcg(&mut self, why: &'static str) -> &mut Self {
        self.deviation = (self.on_tcg).then_some(why);
        self
    }

    /// True, and reported, when a check would end the guest under QEMU's translator, for this reason.
    pub fn avoided_on_tcg(&mut self, name: &str, why: &str) -> bool {
        let avoid = self.on_tcg;
        if avoid {
            println!("deviates {name}: not tried ({why})");
        }
        avoid
    }

    fn line(&mut self, name: &str, ok: bool, expected: &dyn Debug, got: &dyn Debug) {
        let deviation = self.deviation.take();
        if ok {
            self.passed += 1;
            println!("ok {name}");
        } else if let Some(why) = deviation {
            println!("deviates {name}: expected {expected:x?} got {got:x?} ({why})");
        } else {
            self.failed += 1;
            println!("FAIL {name}: expected {expected:x?} got {got:x?}");
        }
    }

    /// Two values must be equal (printed in hexadecimal).
    pub fn eq<T: PartialEq + Debug>(&mut self, name: &str, got: T, expected: T) {
        self.line(name, got == expected, &expected, &got);
    }

    /// Something must hold.
    pub fn check(&mut self, name: &str, holds: bool) {
        self.line(name, holds, &true, &holds);
    }

    /// A number must lie in a range, ends included.
    pub fn within(&mut self, name: &str, got: u64, low: u64, high: u64) {
        self.line(name, (low..=high).contains(&got), &(low..=high), &got);
    }

    /// A trap must have this vector and error code (0 for vectors without one).
    pub fn trap(&mut self, name: &str, got: Option<Trap>, vector: u64, error: u64) {
        let got = got.map(|t| (t.frame.vector, t.frame.error));
        self.line(name, got == Some((vector, error)), &Some((vector, error)), &got);
    }

    /// No trap must have come.
    pub fn no_trap(&mut self, name: &str, got: Option<Trap>) {
        let got = got.map(|t| (t.frame.vector, t.frame.error, t.frame.rip));
        self.line(name, got.is_none(), &None::<()>, &got);
    }

    /// Says that something was left out, which counts as passed.
    pub fn skip(&mut self, name: &str, why: &str) {
        self.passed += 1;
        println!("ok {name}: skipped, {why}");
    }

    /// Prints the sum and ends the machine: 0 when nothing failed.
    pub fn end(self) -> ! {
        println!("{} passed, {} failed", self.passed, self.failed);
        runtime::exit(u32::from(self.failed != 0))
    }
}
