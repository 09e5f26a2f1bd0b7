//! Binary rewriting: guest code runs as host code.
//!
//! Guest and host are processors of one kind, so instructions are copied, and only what touches memory or privilege is
//! rewritten ([`block`], [`rewrite`], [`control`]). What is rare or difficult is left to the reference engine, which is
//! part of every vCPU here and shares its registers.
//!
//! * Registers: thirteen of the guest's sixteen are in the host's ([`seats`]); RSP leads to the vCPU's [`frame`].
//! * Memory: an access looks its page up in a linear page table ([`lpt`]) and goes straight to guest memory.
//! * Flags: the guest's status flags are the host's, or wait in the frame while a check of ours needs the host's.
//! * Code: blocks are kept by where their guest code lies in memory and know nothing of the linear address they run at, so
//!   that a library is translated once for all processes ([`cache`]).
//! * Faults of the host's processor in translated code are the guest's, or say that a store hit code ([`signal`]).

mod allowed;
mod asm;
mod block;
mod buffer;
mod cache;
mod control;
mod cpu;
mod decode;
mod frame;
mod host;
mod lpt;
mod plan;
mod rewrite;
mod seats;
mod signal;
mod space;
mod strings;
mod stubs;
mod system;
#[cfg(test)]
mod tests;
mod trace;

pub use cpu::Cpu;
pub use trace::Trace;

/// Whether vCPUs can be made here.
///
/// # Errors
/// Why not: mostly that the host limits address space.
pub fn probe() -> Result<(), Error> {
    let _tables = [lpt::Lpt::new()?, lpt::Lpt::new()?, lpt::Lpt::new()?];
    let _code = buffer::Buffer::new(1 << 20)?;
    Ok(())
}

/// Why a vCPU could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused memory or address space.
    #[error(
        "the host gives no {0} to the translate engine: {1}; allow more address space, or use --engine interpret"
    )]
    Map(&'static str, std::io::Error),
    /// Something does not fit anywhere.
    #[error("the translate engine has no room left; use --engine interpret")]
    Space,
    /// Guest memory could not be mapped again.
    #[error(transparent)]
    Memory(#[from] memory::Error),
}
