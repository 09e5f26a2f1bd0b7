//! .

use bare::report::Report;

pub fn run(_: &mut Report) {}
