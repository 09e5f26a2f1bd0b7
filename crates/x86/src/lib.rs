//! What an x86 processor is, as types.
#![no_std]
#![forbid(unsafe_code)]
