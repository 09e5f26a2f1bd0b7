//! The reference engine: every instruction, exactly, in plain Rust.
//!
//! Instructions are decoded once into [`op::Op`]s, which name the function that executes them, and kept in blocks by where
//! their code lies in guest memory (`block`). [`Cpu`] runs from block to block. Linear addresses go through a software
//! TLB (`tlb`, `mmu`). x87 and vector arithmetic is executed by the host's processor through `native` (`simd`).
//!
//! An instruction that faults leaves no trace: handlers change state only when nothing can fail any more.
#![forbid(unsafe_code)]

mod alu;
mod block;
mod bmi;
mod core;
mod cpu;
mod debug;
mod decode;
mod dispatch;
mod far;
mod flags;
mod integer;
mod interrupt;
mod mmu;
mod mov;
mod msr;
mod op;
mod pv;
mod segment;
mod simd;
mod string;
mod system;
mod task;
mod tlb;
mod word;
mod xsave;

pub use cpu::Cpu;
