//! The host's KVM as an engine.
//!
//! The LAPICs are in the host's kernel ("split irqchip"), and so is HLT; everything else of the machine is ours:
//! [`machine::bus`] answers port and memory-mapped accesses, the IOAPIC and the PICs are the machine's. The way in is
//! [`Vm::new`], which is the machine's [`machine::irq::LocalApics`], and [`Vm::vcpu`] for each processor.
//!
//! A `/dev/kvm` that opens is not yet one that can run a guest: [`probe()`] tries it.
//!
//! "KVM API" in the comments is Linux's Documentation/virt/kvm/api.rst.

mod convert;
mod cpuid;
mod debug;
mod fpu;
mod kick;
mod msrs;
mod probe;
mod vcpu;
mod vm;

pub use probe::{Unusable, Usable, probe};
pub use vcpu::Vcpu;
pub use vm::Vm;

use machine::cpu::Error;

/// Makes an [`Error::Host`] of what an ioctl returned.
fn host<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Host { what, source: source.into() }
}
