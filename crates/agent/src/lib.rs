//! The agent that runs in guests (`guests/agent`), as the program that they start: it does for the host what the crate `exec` says.
#![forbid(unsafe_code)]

/// The program: static, for x86-64. Empty where the host that built this had no static C library.
pub const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/agent"));
