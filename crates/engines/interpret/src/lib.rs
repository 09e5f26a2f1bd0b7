//! The reference engine: every instruction, exactly, in plain Rust.
//!
//! Instructions are decoded once into [`op::Op`]s, which name the function that executes them, and kept in blocks by where
//! their code lies in guest memory (`block`). [`Cpu`] runs from block to block. Linear addresses go through a software
//! TLB (`tlb`, `mmu`). x87 and vector arithmetic is executed by the host's processor through `native` (`simd`).
//!
//! An instruction that faults leaves no trace: handlers change state only when nothing can fail any more.
//!
//! Other software engines build on this one: they run what they can by other means and leave the rest, instruction by
//! instruction, to [`Cpu::instruction`] and [`Cpu::execute`]. For them its [`core::Core`] is open.
#![forbid(unsafe_code)]

mod alu;
mod block;
mod bmi;
pub mod core;
mod cpu;
mod debug;
mod decode;
mod dispatch;
mod far;
pub mod flags;
mod integer;
mod interrupt;
mod mmu;
mod mov;
mod msr;
pub mod op;
mod pv;
mod segment;
mod simd;
mod string;
mod system;
mod task;
pub mod tlb;
mod word;
mod xsave;

pub use block::options;
pub use cpu::{Cpu, Shutdown};
pub use decode::supported;
pub use mmu::{Mapping, canonical};
pub use simd::alignment_counts;
