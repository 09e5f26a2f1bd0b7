//! A virtual machine as its owner knows it.
#![forbid(unsafe_code)]
