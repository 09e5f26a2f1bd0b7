//! CPUID between the models of [`x86::cpuid`] and KVM's ioctls.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use x86::cpuid::{Cpuid, Entry, Feature, Features, Leaf};

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// Registers that are sets of features, each of which the host's KVM must have: leaf, subleaf, register, and the bits that
/// need no say of KVM's.
const SETS: [(u32, u32, usize, u32); 11] = [
    // TSC-deadline comes with the LAPIC, OSXSAVE follows CR4, and that there is a hypervisor is so.
    (1, 0, ECX, 1 << 24 | 1 << 27 | 1 << 31),
    // The APIC bit follows the APIC base MSR; HTT is topology.
    (1, 0, EDX, 1 << 9 | 1 << 28),
    (7, 0, EBX, 0),
    (7, 0, ECX, 0),
    (7, 0, EDX, 0),
    (7, 1, EAX, 0),
    (0xd, 1, EAX, 0),
    // CMP_LEGACY is topology.
    (0x8000_0001, 0, ECX, 1 << 1),
    (0x8000_0001, 0, EDX, 1 << 9),
    (0x8000_0008, 0, EBX, 0),
    (KVM_FEATURES, 0, EAX, 0),
];

/// KVM's own paravirtual features, which hosts have more or less of (Linux, Documentation/virt/kvm/x86/cpuid.rst).
const KVM_FEATURES: u32 = 0x4000_0001;
/// Extended topology.
const TOPOLOGY: u32 = 0xb;

/// What KVM said it supports, leaf by leaf.
fn answer(supported: &CpuId, leaf: u32, subleaf: u32) -> Leaf {
    let entry = supported.as_slice().iter().find(|e| e.function == leaf && e.index == subleaf);
    entry.map_or(Leaf::default(), |e| Leaf { eax: e.eax, ebx: e.ebx, ecx: e.ecx, edx: e.edx })
}

/// The features that a guest can have on this host.
pub fn features(supported: &CpuId) -> Features {
    // KVM may not list the deadline timer, for it needs the LAPIC in the kernel, where `Vm::new` puts it; the APIC bit
    // follows the APIC base MSR.
    Features::from_leaves(|leaf, subleaf| answer(supported, leaf, subleaf))
        .or(Features::of(&[Feature::TSC_DEADLINE, Feature::APIC]))
}

/// What KVM_SET_CPUID2 takes for the vCPU with LAPIC `id` of the processor `model`, less the features that
/// this host's KVM lacks. KVM fills in what CR4 and XCR0 decide.
pub fn entries(model: &Cpuid, supported: &CpuId, id: u8) -> Vec<kvm_cpuid_entry2> {
    model.entries().iter().map(|e| entry(e, supported, id)).collect()
}

fn entry(e: &Entry, supported: &CpuId, id: u8) -> kvm_cpuid_entry2 {
    let Leaf { eax, ebx, ecx, edx } = e.value;
    let mut value = [eax, ebx, ecx, edx];
    let subleaf = e.subleaf.unwrap_or(0);
    let Leaf { eax, ebx, ecx, edx } = answer(supported, e.leaf, subleaf);
    let host = [eax, ebx, ecx, edx];
    for (_, _, register, granted) in SETS.iter().filter(|set| (set.0, set.1) == (e.leaf, subleaf)) {
        value[*register] &= host[*register] | granted;
    }
    match e.leaf {
        1 => value[EBX] |= u32::from(id) << 24,
        TOPOLOGY => value[EDX] = id.into(),
        _ => {}
    }
    let [eax, ebx, ecx, edx] = value;
    kvm_cpuid_entry2 {
        function: e.leaf,
        index: subleaf,
        flags: if e.subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86::cpuid::{Config, IMPLEMENTED, Model, Vendor};

    fn supported() -> CpuId {
        let leaf = |function, index, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        CpuId::from_entries(&[
            leaf(1, 0, 0x800f12, 0x0500_0800, 1 << 19, 1 << 25),
            leaf(7, 0, 0, 1 << 5, 0, 0),
            leaf(7, 1, 0, 1 << 5, 0, 0),
            leaf(0x4000_0001, 0, 1 | 1 << 3, 0, 0, 0),
        ])
        .unwrap()
    }

    #[test]
    fn features_are_what_kvm_lists_and_what_comes_with_its_lapic() {
        let got: Vec<_> = features(&supported()).names().collect();
        assert_eq!(got, ["sse4_1", "tsc_deadline_timer", "apic", "sse", "avx2"]);
    }

    #[test]
    fn every_processor_has_its_own_id() {
        let config = Config {
            model: Model::V3,
            vendor: Vendor::Amd,
            available: IMPLEMENTED,
            vcpus: 4,
            tsc_khz: 1_000_000,
            host: None,
        };
        let model = Cpuid::new(&config).unwrap();
        let entries = entries(&model, &supported(), 3);
        let find = |leaf, index| entries.iter().find(|e| e.function == leaf && e.index == index).unwrap();
        assert_eq!(find(1, 0).ebx, 3 << 24 | 4 << 16 | 8 << 8);
        assert_eq!((find(0xb, 0).edx, find(0xb, 1).edx), (3, 3));
        assert_eq!(find(0xb, 1).flags, KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
        assert_eq!(find(1, 0).flags, 0);
        assert_eq!(find(0x4000_0001, 0).eax, 1 | 1 << 3, "no more than the host's KVM has");
        assert_eq!(find(7, 0).ebx, 1 << 5, "likewise: AVX2 alone");
        assert_eq!(find(1, 0).ecx, 1 << 31 | 1 << 24 | 1 << 19);
    }
}
