//! Feature bits of CPUID, by name.

use core::fmt;

/// One feature bit: the word of [`Features`] it is in, times 32, plus its bit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Feature(u16);

/// Where the words of [`Features`] stand in CPUID: leaf, subleaf, and register (0 EAX … 3 EDX).
pub(super) const WORDS: [(u32, u32, usize); 10] = [
    (1, 0, 2),
    (1, 0, 3),
    (7, 0, 1),
    (7, 0, 2),
    (7, 0, 3),
    (0xd, 1, 0),
    (0x8000_0001, 0, 2),
    (0x8000_0001, 0, 3),
    (0x8000_0008, 0, 1),
    (7, 1, 0),
];

/// A set of features.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(pub(super) [u32; WORDS.len()]);

macro_rules! features {
    ($($name:ident = $word:literal, $bit:literal, $text:literal;)*) => {
        #[allow(missing_docs)]
        impl Feature {
            $(pub const $name: Self = Self($word * 32 + $bit);)*
        }

        /// Every feature that has a name here, with the name that Linux gives it in /proc/cpuinfo.
        pub const ALL: &[(Feature, &str)] = &[$((Feature::$name, $text)),*];
    };
}

// Words: 0 leaf 1 ECX, 1 leaf 1 EDX, 2 leaf 7 EBX, 3 leaf 7 ECX, 4 leaf 7 EDX, 5 leaf 0xd.1 EAX, 6 0x80000001 ECX,
// 7 0x80000001 EDX, 8 0x80000008 EBX, 9 leaf 7.1 EAX.
features! {
    SSE3 = 0, 0, "pni";
    PCLMULQDQ = 0, 1, "pclmulqdq";
    MONITOR = 0, 3, "monitor";
    SSSE3 = 0, 9, "ssse3";
    FMA = 0, 12, "fma";
    CX16 = 0, 13, "cx16";
    PCID = 0, 17, "pcid";
    SSE4_1 = 0, 19, "sse4_1";
    SSE4_2 = 0, 20, "sse4_2";
    X2APIC = 0, 21, "x2apic";
    MOVBE = 0, 22, "movbe";
    POPCNT = 0, 23, "popcnt";
    TSC_DEADLINE = 0, 24, "tsc_deadline_timer";
    AES = 0, 25, "aes";
    XSAVE = 0, 26, "xsave";
    OSXSAVE = 0, 27, "osxsave";
    AVX = 0, 28, "avx";
    F16C = 0, 29, "f16c";
    RDRAND = 0, 30, "rdrand";
    HYPERVISOR = 0, 31, "hypervisor";
    FPU = 1, 0, "fpu";
    VME = 1, 1, "vme";
    DE = 1, 2, "de";
    PSE = 1, 3, "pse";
    TSC = 1, 4, "tsc";
    MSR = 1, 5, "msr";
    PAE = 1, 6, "pae";
    MCE = 1, 7, "mce";
    CX8 = 1, 8, "cx8";
    APIC = 1, 9, "apic";
    SEP = 1, 11, "sep";
    MTRR = 1, 12, "mtrr";
    PGE = 1, 13, "pge";
    MCA = 1, 14, "mca";
    CMOV = 1, 15, "cmov";
    PAT = 1, 16, "pat";
    PSE36 = 1, 17, "pse36";
    CLFLUSH = 1, 19, "clflush";
    MMX = 1, 23, "mmx";
    FXSR = 1, 24, "fxsr";
    SSE = 1, 25, "sse";
    SSE2 = 1, 26, "sse2";
    HTT = 1, 28, "ht";
    FSGSBASE = 2, 0, "fsgsbase";
    TSC_ADJUST = 2, 1, "tsc_adjust";
    BMI1 = 2, 3, "bmi1";
    AVX2 = 2, 5, "avx2";
    FDP_EXCPTN_ONLY = 2, 6, "fdp_excptn_only";
    SMEP = 2, 7, "smep";
    BMI2 = 2, 8, "bmi2";
    ERMS = 2, 9, "erms";
    INVPCID = 2, 10, "invpcid";
    ZERO_FCS_FDS = 2, 13, "zero_fcs_fds";
    RDSEED = 2, 18, "rdseed";
    ADX = 2, 19, "adx";
    SMAP = 2, 20, "smap";
    CLFLUSHOPT = 2, 23, "clflushopt";
    CLWB = 2, 24, "clwb";
    SHA = 2, 29, "sha_ni";
    UMIP = 3, 2, "umip";
    PKU = 3, 3, "pku";
    VAES = 3, 9, "vaes";
    VPCLMULQDQ = 3, 10, "vpclmulqdq";
    LA57 = 3, 16, "la57";
    RDPID = 3, 22, "rdpid";
    FSRM = 4, 4, "fsrm";
    XSAVEOPT = 5, 0, "xsaveopt";
    XSAVEC = 5, 1, "xsavec";
    XGETBV1 = 5, 2, "xgetbv1";
    XSAVES = 5, 3, "xsaves";
    LAHF_LM = 6, 0, "lahf_lm";
    CMP_LEGACY = 6, 1, "cmp_legacy";
    CR8_LEGACY = 6, 4, "cr8_legacy";
    LZCNT = 6, 5, "abm";
    SSE4A = 6, 6, "sse4a";
    MISALIGNSSE = 6, 7, "misalignsse";
    PREFETCHW = 6, 8, "3dnowprefetch";
    SYSCALL = 7, 11, "syscall";
    NX = 7, 20, "nx";
    MMXEXT = 7, 22, "mmxext";
    FXSR_OPT = 7, 25, "fxsr_opt";
    PDPE1GB = 7, 26, "pdpe1gb";
    RDTSCP = 7, 27, "rdtscp";
    LM = 7, 29, "lm";
    CLZERO = 8, 0, "clzero";
    XSAVEERPTR = 8, 2, "xsaveerptr";
    WBNOINVD = 8, 9, "wbnoinvd";
}

impl Features {
    /// The set of `list`.
    pub const fn of(list: &[Feature]) -> Self {
        let mut words = [0; WORDS.len()];
        let mut i = 0;
        while i < list.len() {
            words[list[i].0 as usize / 32] |= 1 << (list[i].0 % 32);
            i += 1;
        }
        Self(words)
    }

    /// The set that a processor shows, whose answers to a leaf and subleaf `cpuid` gives.
    pub fn from_leaves(mut cpuid: impl FnMut(u32, u32) -> super::Leaf) -> Self {
        Self(WORDS.map(|(leaf, subleaf, register)| *cpuid(leaf, subleaf).register(register)))
    }

    /// Whether `feature` is in the set.
    #[inline]
    pub const fn has(&self, feature: Feature) -> bool {
        self.0[feature.0 as usize / 32] & 1 << (feature.0 % 32) != 0
    }

    /// What is in both sets.
    pub fn and(mut self, other: Self) -> Self {
        self.0.iter_mut().zip(other.0).for_each(|(a, b)| *a &= b);
        self
    }

    /// What is in either set.
    pub const fn or(mut self, other: Self) -> Self {
        let mut i = 0;
        while i < self.0.len() {
            self.0[i] |= other.0[i];
            i += 1;
        }
        self
    }

    /// What is in this set and not in `other`.
    pub fn without(mut self, other: Self) -> Self {
        self.0.iter_mut().zip(other.0).for_each(|(a, b)| *a &= !b);
        self
    }

    /// The names of the set's features, as /proc/cpuinfo has them.
    pub fn names(&self) -> impl Iterator<Item = &'static str> + '_ {
        ALL.iter().filter(|(f, _)| self.has(*f)).map(|(_, name)| *name)
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}
