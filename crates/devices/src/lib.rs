//! The devices of the PC.
#![forbid(unsafe_code)]
