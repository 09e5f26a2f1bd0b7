//! What CPUID tells a guest: models by name, the same on every engine (SDM vol. 2A, CPUID; APM vol. 3, appendix E; Linux,
//! Documentation/virt/kvm/x86/cpuid.rst).

extern crate alloc;

mod feature;

use alloc::vec::Vec;

pub use feature::{Feature, Features};

/// The four registers of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Leaf {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl Leaf {
    const fn new(eax: u32, ebx: u32, ecx: u32, edx: u32) -> Self {
        Self { eax, ebx, ecx, edx }
    }

    fn register(&mut self, n: usize) -> &mut u32 {
        match n {
            0 => &mut self.eax,
            1 => &mut self.ebx,
            2 => &mut self.ecx,
            _ => &mut self.edx,
        }
    }
}

/// One answer of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// EAX of the question.
    pub leaf: u32,
    /// ECX of the question, where it matters.
    pub subleaf: Option<u32>,
    /// The answer, but for what is [`Live`].
    pub value: Leaf,
}

/// A processor by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    /// x86-64-v2 of the psABI: SSE4.2, POPCNT, CMPXCHG16B.
    V2,
    /// x86-64-v3: AVX2, BMI, FMA, MOVBE.
    V3,
    /// All that the host and the engine have.
    Host,
}

impl Model {
    /// All models with their names.
    pub const ALL: [(Self, &'static str); 3] = [(Self::V2, "v2"), (Self::V3, "v3"), (Self::Host, "host")];

    /// What programs built for the model may use: without these it is not the model.
    pub const fn required(self) -> Features {
        match self {
            Self::V2 => V2,
            Self::V3 => V2.or(V3),
            Self::Host => Features::of(&[]),
        }
    }

    /// What the model has where host and engine can.
    pub const fn wanted(self) -> Features {
        match self {
            Self::V2 => V2.or(PLATFORM),
            Self::V3 => V2.or(V3).or(PLATFORM).or(V3_PLATFORM),
            Self::Host => IMPLEMENTED,
        }
    }
}

/// Who made the processor: decides how SYSCALL and SYSENTER behave in compatibility mode, and where caches are described.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// AuthenticAMD.
    Amd,
    /// GenuineIntel.
    Intel,
}

use Feature as F;

const V2: Features = Features::of(&[
    F::FPU,
    F::DE,
    F::PSE,
    F::TSC,
    F::MSR,
    F::PAE,
    F::MCE,
    F::CX8,
    F::APIC,
    F::SEP,
    F::MTRR,
    F::PGE,
    F::MCA,
    F::CMOV,
    F::PAT,
    F::PSE36,
    F::CLFLUSH,
    F::MMX,
    F::FXSR,
    F::SSE,
    F::SSE2,
    F::SSE3,
    F::SSSE3,
    F::CX16,
    F::SSE4_1,
    F::SSE4_2,
    F::POPCNT,
    F::LAHF_LM,
    F::SYSCALL,
    F::NX,
    F::LM,
]);
const V3: Features =
    Features::of(&[F::XSAVE, F::AVX, F::AVX2, F::BMI1, F::BMI2, F::F16C, F::FMA, F::LZCNT, F::MOVBE]);
const PLATFORM: Features = Features::of(&[
    F::XSAVE,
    F::HYPERVISOR,
    F::X2APIC,
    F::TSC_DEADLINE,
    F::TSC_ADJUST,
    F::RDTSCP,
    F::PDPE1GB,
    F::PCID,
    F::INVPCID,
    F::SMEP,
    F::SMAP,
    F::UMIP,
    F::FSGSBASE,
    F::ERMS,
    F::FSRM,
    F::RDRAND,
    F::RDSEED,
    F::AES,
    F::PCLMULQDQ,
    F::PREFETCHW,
    F::XSAVEERPTR,
]);
const V3_PLATFORM: Features =
    Features::of(&[F::ADX, F::RDPID, F::CLFLUSHOPT, F::CLWB, F::XSAVEOPT, F::XSAVEC, F::XGETBV1, F::XSAVES]);
/// What the software engines execute (the SIMD part of it by the host's processor).
pub const IMPLEMENTED: Features =
    V2.or(V3).or(PLATFORM).or(V3_PLATFORM).or(Features::of(&[F::SHA, F::VAES, F::VPCLMULQDQ, F::WBNOINVD]));
/// Of [`IMPLEMENTED`], what a software engine executes on the host's processor, and so needs the host to have.
pub const NATIVE: Features = Features::of(&[
    F::FPU,
    F::MMX,
    F::SSE,
    F::SSE2,
    F::SSE3,
    F::SSSE3,
    F::SSE4_1,
    F::SSE4_2,
    F::AVX,
    F::AVX2,
    F::F16C,
    F::FMA,
    F::AES,
    F::PCLMULQDQ,
    F::SHA,
    F::VAES,
    F::VPCLMULQDQ,
]);

/// What a guest's processors are made from.
#[derive(Clone, Debug)]
pub struct Config {
    /// The named model.
    pub model: Model,
    /// The host's vendor, for KVM runs its kind of guest best.
    pub vendor: Vendor,
    /// What engine and host have together.
    pub available: Features,
    /// How many vCPUs the VM has.
    pub vcpus: u32,
    /// The time-stamp counter's rate.
    pub tsc_khz: u64,
    /// The host's leaf 1 EAX and brand string, which the `host` model shows.
    pub host: Option<(u32, [u8; 48])>,
}

/// What of an answer depends on the asking vCPU's state.
#[derive(Clone, Copy, Debug, Default)]
pub struct Live {
    /// Its x2APIC id.
    pub apic_id: u32,
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    /// XCR0.
    pub xcr0: u64,
}

/// The processor of a VM: all that CPUID tells.
#[derive(Clone, Debug)]
pub struct Cpuid {
    entries: Vec<Entry>,
    features: Features,
    vendor: Vendor,
}

/// Bytes of the legacy area and header of XSAVE, and where the AVX component lies after them.
const XSAVE_BASE: u32 = 576;
const AVX_SIZE: u32 = 256;
/// Width of guest-physical addresses: 1 TiB.
pub const PHYSICAL_BITS: u32 = 40;

impl Cpuid {
    /// The processor of `config`.
    ///
    /// # Errors
    /// The features that the model requires and the host or engine lacks.
    pub fn new(config: &Config) -> Result<Self, Features> {
        let missing = config.model.required().without(config.available);
        if missing != Features::default() {
            return Err(missing);
        }
        let mut features = config.model.wanted().and(config.available.or(Features::of(&[F::HYPERVISOR])));
        if config.vcpus > 1 {
            features = features.or(Features::of(&[F::HTT]));
            if config.vendor == Vendor::Amd {
                features = features.or(Features::of(&[F::CMP_LEGACY]));
            }
        }
        if config.vendor == Vendor::Intel {
            features = features.without(Features::of(&[F::XSAVEERPTR]));
        }
        let mut this = Self { entries: Vec::new(), features, vendor: config.vendor };
        this.basic(config);
        this.hypervisor(config);
        this.extended(config);
        for (n, &(leaf, subleaf, register)) in feature::WORDS.iter().enumerate() {
            let found =
                this.entries.iter_mut().find(|e| e.leaf == leaf && e.subleaf.unwrap_or(subleaf) == subleaf);
            if let Some(entry) = found {
                *entry.value.register(register) |= this.features.0[n];
            }
        }
        Ok(this)
    }

    fn push(&mut self, leaf: u32, subleaf: Option<u32>, value: Leaf) {
        self.entries.push(Entry { leaf, subleaf, value });
    }

    fn basic(&mut self, config: &Config) {
        let cores = config.vcpus.max(1);
        let id = match self.vendor {
            Vendor::Amd => *b"AuthenticAMD",
            Vendor::Intel => *b"GenuineIntel",
        };
        self.push(0, None, Leaf { eax: 0xd, ..vendor_leaf(&id) });
        self.push(1, None, Leaf::new(self.new_signature(config), 8 << 8 | cores.min(255) << 16, 0, 0));
        if self.vendor == Vendor::Intel {
            self.push(2, None, Leaf::new(0x00ff_ff01, 0, 0, 0)); // see leaf 4
            for (n, &(kind, level, ways, sets)) in
                [(1, 1, 8, 64), (2, 1, 8, 64), (3, 2, 8, 1024), (3, 3, 16, 16384)].iter().enumerate()
            {
                let sharing = if level == 3 { cores - 1 } else { 0 };
                let eax = kind | level << 5 | 1 << 8 | (cores - 1).min(63) << 26 | sharing.min(4095) << 14;
                self.push(4, Some(n as u32), Leaf::new(eax, (ways - 1) << 22 | 63, sets - 1, 0));
            }
        }
        self.push(6, None, Leaf::new(1 << 2, 0, 0, 0)); // ARAT: the APIC timer never stops
        self.push(7, Some(0), Leaf::default());
        // One thread per core, one package (SDM vol. 3A, 8.9.1).
        let bits = cores.next_power_of_two().trailing_zeros();
        self.push(0xb, Some(0), Leaf::new(0, 1, 1 << 8, 0));
        self.push(0xb, Some(1), Leaf::new(bits, cores, 2 << 8 | 1, 0));
        if self.has(F::XSAVE) {
            let avx = self.has(F::AVX);
            let size = XSAVE_BASE + if avx { AVX_SIZE } else { 0 };
            self.push(0xd, Some(0), Leaf::new(if avx { 7 } else { 3 }, size, size, 0));
            self.push(0xd, Some(1), Leaf::new(0, size, 0, 0));
            if avx {
                self.push(0xd, Some(2), Leaf::new(AVX_SIZE, XSAVE_BASE, 0, 0));
            }
        }
    }

    fn new_signature(&self, config: &Config) -> u32 {
        match (config.model, config.host, self.vendor) {
            (Model::Host, Some((signature, _)), _) => signature,
            // A K8, as QEMU's generic models are: Linux then leaves out mitigations for faults of later processors.
            (_, _, Vendor::Amd) => 0x0006_0fb1,
            (_, _, Vendor::Intel) => 0x0003_06f2,
        }
    }

    /// The paravirtual leaves that Linux looks for.
    fn hypervisor(&mut self, config: &Config) {
        self.push(0x4000_0000, None, Leaf::new(0x4000_0010, 0x4b4d_564b, 0x564b_4d56, 0x0000_004d)); // KVMKVMKVM
        // CLOCKSOURCE, NOP_IO_DELAY, CLOCKSOURCE2, CLOCKSOURCE_STABLE
        self.push(0x4000_0001, None, Leaf::new(1 | 1 << 1 | 1 << 3 | 1 << 24, 0, 0, 0));
        self.push(0x4000_0010, None, Leaf::new(config.tsc_khz as u32, 1_000_000, 0, 0));
    }

    fn extended(&mut self, config: &Config) {
        let vendor = self.entries[0].value;
        self.push(0x8000_0000, None, Leaf { eax: 0x8000_0008, ..vendor });
        self.push(0x8000_0001, None, Leaf { eax: self.entries[1].value.eax, ..Leaf::default() });
        let mut brand = [0; 48];
        let name: &[u8] = match (config.model, &config.host) {
            (Model::Host, Some((_, host))) => host,
            (Model::V2, _) => b"Lodge x86-64-v2 processor",
            _ => b"Lodge x86-64-v3 processor",
        };
        brand[..name.len()].copy_from_slice(name);
        for (n, b) in brand.chunks_exact(16).enumerate() {
            let word = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
            self.push(0x8000_0002 + n as u32, None, Leaf::new(word(0), word(4), word(8), word(12)));
        }
        if self.vendor == Vendor::Amd {
            // L1: 32 KiB, 8 ways, 64-byte lines. L2: 512 KiB, 8 ways. L3: 16 MiB, 16 ways.
            self.push(0x8000_0005, None, Leaf::new(0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140));
            self.push(0x8000_0006, None, Leaf::new(0, 0, 0x0200_6140, 0x0080_8140));
        }
        // No invariant TSC: a guest may be moved to where it has another rate; the paravirtual clock knows.
        self.push(0x8000_0007, None, Leaf::default());
        let cores = config.vcpus.clamp(1, 256);
        let ecx = if self.vendor == Vendor::Amd && cores > 1 {
            (cores - 1) | cores.next_power_of_two().trailing_zeros() << 12
        } else {
            0
        };
        self.push(0x8000_0008, None, Leaf::new(PHYSICAL_BITS | 48 << 8, 0, ecx, 0));
    }

    /// Whether the processor has `feature`.
    #[inline]
    pub fn has(&self, feature: Feature) -> bool {
        self.features.has(feature)
    }

    /// All features.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Who made it.
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// Leaf 1 EAX: family, model and stepping. Also EDX after reset.
    pub fn signature(&self) -> u32 {
        self.entries[1].value.eax
    }

    /// The bits of XCR0 that may be set.
    pub fn xcr0(&self) -> u64 {
        match (self.has(F::XSAVE), self.has(F::AVX)) {
            (false, _) => 0,
            (true, false) => 3,
            (true, true) => 7,
        }
    }

    /// The table itself, for engines that hand it to the host. What [`Live`] decides wants filling in.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The answer to EAX = `leaf`, ECX = `subleaf`. Leaves beyond the last repeat the last basic leaf on Intel and are zero
    /// on AMD; here they are zero for both.
    pub fn query(&self, leaf: u32, subleaf: u32, live: &Live) -> Leaf {
        let found = self.entries.iter().find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf));
        let mut value = match found {
            Some(entry) => entry.value,
            None if leaf == 0xb => Leaf::new(0, 0, subleaf & 0xff, 0),
            None => return Leaf::default(),
        };
        match (leaf, subleaf) {
            (1, _) => {
                value.ebx |= (live.apic_id & 0xff) << 24;
                value.ecx |= u32::from(live.osxsave) << 27;
            }
            (0xb, _) => value.edx = live.apic_id,
            (0xd, 0 | 1) => value.ebx = xsave_size(live.xcr0),
            _ => {}
        }
        value
    }
}

/// Bytes of an XSAVE area with the components of `xcr0`. In the compacted form it is the same: only AVX follows the header.
pub const fn xsave_size(xcr0: u64) -> u32 {
    if xcr0 & crate::control::xcr0::AVX != 0 { XSAVE_BASE + AVX_SIZE } else { XSAVE_BASE }
}

fn vendor_leaf(id: &[u8; 12]) -> Leaf {
    let word = |i: usize| u32::from_le_bytes([id[i], id[i + 1], id[i + 2], id[i + 3]]);
    Leaf::new(0, word(0), word(8), word(4))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(model: Model, available: Features) -> Config {
        Config { model, vendor: Vendor::Amd, available, vcpus: 2, tsc_khz: 1_000_000, host: None }
    }

    #[test]
    fn models_show_their_features_in_the_right_leaves() {
        let v3 = Cpuid::new(&config(Model::V3, IMPLEMENTED)).unwrap();
        let live = Live { apic_id: 1, osxsave: true, xcr0: 7 };
        assert_ne!(v3.query(7, 0, &live).ebx & 1 << 5, 0, "AVX2");
        assert_eq!(v3.query(1, 0, &live).ebx >> 24, 1);
        assert_ne!(v3.query(1, 0, &live).ecx & 1 << 27, 0);
        assert_eq!(v3.query(0xd, 0, &live), Leaf::new(7, 832, 832, 0));
        assert_eq!(v3.query(0xd, 1, &live).eax, 0xf);
        let v2 = Cpuid::new(&config(Model::V2, IMPLEMENTED)).unwrap();
        assert_eq!(v2.query(7, 0, &live).ebx & 1 << 5, 0);
        assert_eq!(v2.query(1, 0, &live).ecx & 1 << 28, 0);
        assert_eq!(v2.xcr0(), 3);
    }

    #[test]
    fn a_host_that_lacks_what_a_model_requires_is_told_what() {
        let without = IMPLEMENTED.without(Features::of(&[F::AVX2, F::SMAP]));
        let missing = Cpuid::new(&config(Model::V3, without)).unwrap_err();
        assert!(missing.names().eq(["avx2"]));
        assert!(!Cpuid::new(&config(Model::V2, without)).unwrap().has(F::SMAP), "wanted only where there is");
    }

    #[test]
    fn leaves_that_are_not_there_are_zero() {
        let v3 = Cpuid::new(&config(Model::V3, IMPLEMENTED)).unwrap();
        for leaf in [3, 0xe, 0x4000_0002, 0x8000_0009, u32::MAX] {
            assert_eq!(v3.query(leaf, 0, &Live::default()), Leaf::default());
        }
        assert_eq!(v3.query(0xb, 2, &Live { apic_id: 1, ..Live::default() }), Leaf::new(0, 0, 2, 1));
    }
}
