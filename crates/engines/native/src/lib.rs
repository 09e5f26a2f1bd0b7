//! Runs one unprivileged compute instruction on the host's processor.
//!
//! The arithmetic of x87, MMX, SSE to AVX2, FMA, AES, SHA and the like need not be written again: the host's
//! processor is of the guest's kind. [`Stubs::compile`] turns a decoded instruction of a fixed list ([`listed`])
//! into a small function that loads the registers it reads from a [`SimdState`], executes it, and stores what it
//! wrote; [`Stubs::run`] calls that function. Its memory operand, if it has one, is in a [`Bounce`] buffer.
//!
//! What a guest can make the host execute is exactly: loads from the state, one listed instruction that was encoded
//! here (never guest bytes), stores to the state, `ret`. Faults, memory, `#MF` and privilege stay with the caller.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod buffer;
mod compile;
mod features;
mod float;
#[cfg(feature = "oracle")]
pub mod oracle;
mod run;
mod state;
mod table;
mod x87;

pub use run::{Outcome, StubId, Stubs};
pub use state::{Bounce, SimdState};
pub use table::listed;

/// Why an instruction has no stub.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// Not in the list of pure compute instructions, or an operand form that is not.
    #[error("this instruction is not one that may run on the host's processor: emulate it")]
    NotListed,
    /// The host's processor lacks the instruction.
    #[error("the host's processor has no such instruction: do not offer its feature to the guest")]
    HostLacks,
    /// The code buffer is full: call [`Stubs::reset`], drop every [`StubId`], compile again.
    #[error("the code buffer is full: reset it and compile again")]
    Full,
}

/// Why [`Stubs::new`] failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host gave no memory for code.
    #[error("cannot map memory for native code ({0}): allow more address space, or executable memory")]
    Map(rustix::io::Errno),
}
