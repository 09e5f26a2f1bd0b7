//! Why a VM could not be made, or could not go on.

use x86::cpuid::Features;

/// Each message is one sentence: what happened; what to do.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("a guest needs 1 to 255 processors, not {0}; give --cpus a number in between")]
    Cpus(u32),
    #[error("--lockstep works with --engine translate and one processor; give --engine translate --cpus 1")]
    Lockstep,
    #[error("{0} MiB is too little memory for a guest; give --memory at least 4M")]
    MemorySmall(u64),
    #[error("a memory of {0} bytes is no whole number of MiB; give --memory in M or G")]
    MemoryOdd(u64),
    #[error("the guest wants {0} MiB of memory and this host has {1} MiB; ask for less with --memory")]
    MemoryLarge(u64, u64),
    #[error(
        "memory is plugged in pieces of 128 MiB; give --memory a max= that is so many more than what it starts with"
    )]
    MemoryMaxOdd,
    #[error("a guest's memory ends below 512 GiB; give --memory a smaller max=")]
    MemoryMaxLarge,
    #[error("the engine {engine} cannot be used here: {reason}; {remedy}")]
    Engine { engine: &'static str, reason: String, remedy: String },
    #[error("processor model {model} needs what this host lacks ({}); choose --cpu v2", list(.missing))]
    Model { model: &'static str, missing: Features },
    #[error("{0} disks and CDs are for the SATA controller, which has 6 ports; give some disks bus=virtio")]
    Sata(usize),
    #[error("cannot write the trace to {}: {}; give --trace another file", .0.display(), .1)]
    Trace(std::path::PathBuf, std::io::Error),
    #[error(transparent)]
    Translate(#[from] translate::Error),
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error(transparent)]
    Boot(#[from] boot::Error),
    #[error("the machine could not be put together: {0}; this is a bug of Lodge, please report it")]
    Assembly(#[from] machine::bus::Overlap),
    #[error("firmware cannot be told of the machine: {0}; this is a bug of Lodge, please report it")]
    FwCfg(#[from] devices::fw_cfg::Error),
    #[error(transparent)]
    Share(#[from] shares::Error),
    #[error(transparent)]
    Pci(#[from] devices::pci::Full),
    #[error("the host refused {what}: {source}; it may be short of threads or memory")]
    Host { what: &'static str, source: std::io::Error },
    #[error("{0}")]
    Vcpu(#[from] machine::cpu::Error),
}

impl Error {
    /// Whether what was asked for cannot be, wherever it is asked.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Cpus(_)
                | Self::Lockstep
                | Self::MemorySmall(_)
                | Self::MemoryOdd(_)
                | Self::MemoryLarge(..)
                | Self::MemoryMaxOdd
                | Self::MemoryMaxLarge
                | Self::Model { .. }
                | Self::Sata(_)
        )
    }
}

fn list(features: &Features) -> String {
    features.names().collect::<Vec<_>>().join(", ")
}
