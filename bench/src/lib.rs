//! Figures, and the comparison of the interpreter with the real processor.
#![forbid(unsafe_code)]

pub mod boot;
pub mod cpu;
pub mod disk;
pub mod fuzz;
pub mod monitor;
pub mod network;
pub mod rates;
pub mod sequences;
pub mod start;
