//! Exceptions: vector, error code, CR2 and RIP, and that a restarted instruction does its work exactly once.
#![no_std]
#![no_main]

#[path = "faults/delivery.rs"]
mod delivery;
#[path = "faults/instructions.rs"]
mod instructions;
#[path = "faults/pages.rs"]
mod pages;
#[path = "faults/restart.rs"]
mod restart;
#[path = "faults/translation.rs"]
mod translation;

use bare::report::Report;

bare::guest!(main);

fn main() {
    let mut t = Report::new("faults");
    pages::run(&mut t);
    translation::run(&mut t);
    instructions::run(&mut t);
    restart::run(&mut t);
    delivery::run(&mut t);
    t.end()
}
