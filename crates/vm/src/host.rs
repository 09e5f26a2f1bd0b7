//! What this host can run guests with.

use raw_cpuid::CpuId;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Serialize;
use x86::cpuid::{Config, Cpuid, Features, IMPLEMENTED, Leaf, Model, NATIVE, Vendor};

use crate::{Choice, Error};

/// One engine, and whether it can be used here.
#[derive(Clone, Debug, Serialize)]
pub struct Engine {
    /// Its name, as `--engine` takes it.
    pub name: &'static str,
    /// Whether it can be used.
    pub usable: bool,
    /// Whether `auto` chooses it.
    pub chosen: bool,
    /// Why it can or cannot.
    pub reason: String,
    /// What would make it usable.
    pub remedy: Option<String>,
}

/// All engines, fastest first.
pub fn engines() -> Vec<Engine> {
    let kvm = kvm::probe();
    let chosen = kvm.is_ok();
    let translate = translate::probe();
    let kvm = match kvm {
        Ok(_) => Engine {
            name: "kvm",
            usable: true,
            chosen,
            reason: "/dev/kvm ran a trial guest".into(),
            remedy: None,
        },
        Err(why) => {
            Engine { name: "kvm", usable: false, chosen, reason: why.reason, remedy: Some(why.remedy) }
        }
    };
    let interpret = Engine {
        name: "interpret",
        usable: true,
        chosen: !chosen && translate.is_err(),
        reason: "needs nothing of the host".into(),
        remedy: None,
    };
    let translate = match translate {
        Ok(()) => Engine {
            name: "translate",
            usable: true,
            chosen: !chosen,
            reason: "guest code is rewritten into host code".into(),
            remedy: None,
        },
        Err(error) => Engine {
            name: "translate",
            usable: false,
            chosen: false,
            reason: error.to_string(),
            remedy: Some("allow more address space (ulimit -v, vm.overcommit_memory)".into()),
        },
    };
    vec![kvm, translate, interpret]
}

/// An engine that can be used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// The host's KVM, whose guests see a time-stamp counter of this rate.
    Kvm {
        /// In kHz.
        tsc_khz: u64,
        /// What KVM gives a guest of the host's features.
        features: Features,
    },
    /// The interpreter.
    Interpret,
    /// Binary rewriting.
    Translate,
}

/// The engine that `choice` means here.
///
/// # Errors
/// It was named, and cannot be used.
pub fn choose(choice: Choice) -> Result<Chosen, Error> {
    if choice == Choice::Interpret {
        return Ok(Chosen::Interpret);
    }
    if choice == Choice::Translate {
        return match translate::probe() {
            Ok(()) => Ok(Chosen::Translate),
            Err(error) => Err(Error::Translate(error)),
        };
    }
    match (kvm::probe(), choice) {
        (Ok(usable), _) => Ok(Chosen::Kvm { tsc_khz: usable.tsc_khz, features: usable.features }),
        (Err(_), Choice::Auto) if translate::probe().is_ok() => Ok(Chosen::Translate),
        (Err(_), Choice::Auto) => Ok(Chosen::Interpret),
        (Err(why), _) => Err(Error::Engine { engine: "kvm", reason: why.reason, remedy: why.remedy }),
    }
}

/// Bytes of memory that the host has, or 0 if it does not say.
pub fn memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib = line.and_then(|l| l.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// Raises the limit of open files as far as it goes: each vCPU and each queue of a virtio device has some.
pub fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    // Where that is refused, it is as it was.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// The host processor's features.
fn features() -> Features {
    let (basic, extended) = (raw_cpuid::cpuid!(0).eax, raw_cpuid::cpuid!(0x8000_0000).eax);
    Features::from_leaves(|leaf, subleaf| {
        if leaf > basic && leaf < 0x8000_0000 || leaf > extended {
            return Leaf::default();
        }
        let r = raw_cpuid::cpuid!(leaf, subleaf);
        Leaf { eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx }
    })
}

/// The processor of a guest on `engine`: of `model`, or of the best that there is.
///
/// # Errors
/// The host or engine lacks what the model requires.
pub fn processor(engine: Chosen, model: Option<Model>, vcpus: u32, tsc_khz: u64) -> Result<Cpuid, Error> {
    let cpu = CpuId::new();
    let available = match engine {
        Chosen::Kvm { features, .. } => features,
        Chosen::Interpret | Chosen::Translate => IMPLEMENTED.without(NATIVE).or(features().and(NATIVE)),
    };
    let intel = cpu.get_vendor_info().is_some_and(|v| v.as_str() == "GenuineIntel");
    let mut brand = [0; 48];
    if let Some(name) = cpu.get_processor_brand_string() {
        brand.iter_mut().zip(name.as_str().bytes()).for_each(|(to, from)| *to = from);
    }
    let config = |model| Config {
        model,
        vendor: if intel { Vendor::Intel } else { Vendor::Amd },
        available,
        vcpus,
        tsc_khz,
        host: Some((raw_cpuid::cpuid!(1).eax, brand)),
    };
    let make = |model| Cpuid::new(&config(model));
    match model {
        Some(model) => make(model),
        None => make(Model::V3).or_else(|_| make(Model::V2)),
    }
    .map_err(|missing| {
        let name = Model::ALL.iter().find(|(m, _)| Some(*m) == model).map_or("v2", |(_, name)| name);
        Error::Model { model: name, missing }
    })
}
