//! The reference engine: every instruction, exactly, in plain Rust.
#![forbid(unsafe_code)]
