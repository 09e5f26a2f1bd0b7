//! Segments, gates, privilege levels and tasks (SDM 3A, chapters 5 to 7).
#![no_std]
#![no_main]

#[path = "descriptors/io.rs"]
mod io;
#[path = "descriptors/loads.rs"]
mod loads;
#[path = "descriptors/legacy.rs"]
mod old;
#[path = "descriptors/syscalls.rs"]
mod syscalls;
#[path = "descriptors/transfers.rs"]
mod transfers;

use bare::report::Report;

bare::guest!(main);

fn main() {
    let mut t = Report::new("descriptors");
    loads::run(&mut t);
    transfers::run(&mut t);
    syscalls::run(&mut t);
    io::run(&mut t);
    old::run(&mut t);
    t.end()
}
