//! Single step, breakpoints, and the debug registers (SDM 3B, chapter 18).
#![no_std]
#![no_main]

#[path = "debug/breakpoints.rs"]
mod breakpoints;
#[path = "debug/step.rs"]
mod step;

use bare::{cpu, report::Report};

bare::guest!(main);

/// DR6 when nothing happened.
const NOTHING: u64 = 0xffff_0ff0;
/// DR6: a debug register was accessed under DR7.GD.
const BD: u64 = 1 << 13;
/// DR6: single step.
const BS: u64 = 1 << 14;
/// RFLAGS.TF.
const TF: u64 = 1 << 8;
/// RFLAGS.RF.
const RF: u64 = 1 << 16;

fn clear() {
    // SAFETY: all breakpoints off.
    unsafe {
        cpu::set_dr7(0x400);
        cpu::set_dr6(NOTHING);
    }
}

fn main() {
    let mut t = Report::new("debug");
    step::run(&mut t);
    breakpoints::run(&mut t);
    t.end()
}
