//! CPUID: what the model says, less what this host's KVM cannot do.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// One CPUID leaf of the guest's processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    /// EAX of the question.
    pub function: u32,
    /// ECX of the question, for leaves that look at it.
    pub index: Option<u32>,
    /// EAX, EBX, ECX and EDX of the answer.
    pub registers: [u32; 4],
}

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// Registers that are sets of features, each of which the host must have: function, index, register, and the bits that
/// count as had although KVM_GET_SUPPORTED_CPUID may not say so.
const FEATURES: [(u32, u32, usize, u32); 15] = [
    // TSC-deadline comes with the LAPIC (`Vm::new` asks for it), OSXSAVE follows CR4, and that there is a hypervisor is so.
    (1, 0, ECX, 1 << 24 | 1 << 27 | 1 << 31),
    // The APIC bit follows the APIC base MSR; HTT is topology.
    (1, 0, EDX, 1 << 9 | 1 << 28),
    (7, 0, EBX, 0),
    (7, 0, ECX, 0),
    (7, 0, EDX, 0),
    (7, 1, EAX, 0),
    (0xd, 0, EAX, 0),
    (0xd, 0, EDX, 0),
    (0xd, 1, EAX, 0),
    // CMP_LEGACY and TOPOEXT are topology.
    (0x8000_0001, 0, ECX, 1 << 1 | 1 << 22),
    (0x8000_0001, 0, EDX, 1 << 9),
    (0x8000_0007, 0, EDX, 1 << 8),
    (0x8000_0008, 0, EBX, 0),
    (0x8000_000a, 0, EDX, 0),
    (0x4000_0001, 0, EAX, 0),
];

/// The model's leaves for KVM_SET_CPUID2, with the features that are not `supported` taken out.
pub fn filter(model: &[Leaf], supported: &CpuId) -> Vec<kvm_cpuid_entry2> {
    model.iter().map(|leaf| entry(&filter_leaf(leaf, supported))).collect()
}

fn filter_leaf(leaf: &Leaf, supported: &CpuId) -> Leaf {
    let index = leaf.index.unwrap_or(0);
    let host = supported.as_slice().iter().find(|e| e.function == leaf.function && e.index == index);
    let host = host.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx]);
    let mut leaf = *leaf;
    for (_, _, register, granted) in FEATURES.iter().filter(|f| (f.0, f.1) == (leaf.function, index)) {
        leaf.registers[*register] &= host[*register] | granted;
    }
    leaf
}

fn entry(leaf: &Leaf) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = leaf.registers;
    kvm_cpuid_entry2 {
        function: leaf.function,
        index: leaf.index.unwrap_or(0),
        flags: if leaf.index.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

/// The leaves of a list of KVM's.
pub fn leaves(list: &CpuId) -> Vec<Leaf> {
    let leaf = |e: &kvm_cpuid_entry2| Leaf {
        function: e.function,
        index: (e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(e.index),
        registers: [e.eax, e.ebx, e.ecx, e.edx],
    };
    list.as_slice().iter().map(leaf).collect()
}

/// The components of XCR0 that the guest's processor has.
pub fn xcr0(entries: &[kvm_cpuid_entry2]) -> u64 {
    let leaf = entries.iter().find(|e| e.function == 0xd && e.index == 0);
    leaf.map_or(0, |e| u64::from(e.edx) << 32 | u64::from(e.eax))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> CpuId {
        let leaf = |function, index, registers| entry(&Leaf { function, index, registers });
        CpuId::from_entries(&[
            leaf(1, None, [0x800f12, 0x0100_0800, 0x0020_0201, 0x0f]),
            leaf(7, Some(0), [1, 1 << 5 | 1 << 8, 0, 0]),
            leaf(0xd, Some(0), [3, 0x340, 0x340, 0]),
        ])
        .unwrap()
    }

    #[test]
    fn features_that_the_host_lacks_go_and_identity_stays() {
        let leaf = Leaf { function: 1, index: None, registers: [0x306c3, 0x0300_0800, u32::MAX, u32::MAX] };
        let got = filter_leaf(&leaf, &host());
        assert_eq!(got.registers, [0x306c3, 0x0300_0800, 0x8920_0201, 0x1000_020f]);
        let leaf = Leaf { function: 7, index: Some(0), registers: [0, 1 << 3 | 1 << 5, 4, 8] };
        assert_eq!(filter_leaf(&leaf, &host()).registers, [0, 1 << 5, 0, 0]);
        let name = Leaf { function: 0x8000_0002, index: None, registers: [1, 2, 3, 4] };
        assert_eq!(filter_leaf(&name, &host()), name);
    }

    #[test]
    fn xcr0_is_what_the_filtered_leaf_says() {
        let model = [Leaf { function: 0xd, index: Some(0), registers: [7, 0, 0x340, 0] }];
        let entries = filter(&model, &host());
        assert_eq!(xcr0(&entries), 3);
        assert_eq!(entries[0].flags, KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
    }
}
