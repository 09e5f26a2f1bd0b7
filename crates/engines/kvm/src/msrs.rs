//! Model-specific registers, between the canonical form and KVM_GET_MSRS and KVM_SET_MSRS.

use kvm_bindings::{Msrs as List, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use machine::cpu::{Error, Msrs};
use x86::msr;

use crate::host;

/// Every MSR that has a field in `m`, with the field. The order is that of restoring: a clock's page last.
fn fields(m: &mut Msrs) -> Vec<(u32, &mut u64)> {
    let fixed = [msr::MTRR_FIX64K_00000, msr::MTRR_FIX16K_80000, msr::MTRR_FIX16K_A0000]
        .into_iter()
        .chain(msr::MTRR_FIX4K_C0000..msr::MTRR_FIX4K_C0000 + 8);
    let mut all = vec![
        (msr::TSC_ADJUST, &mut m.tsc_adjust),
        (msr::TSC_AUX, &mut m.tsc_aux),
        (msr::STAR, &mut m.star),
        (msr::LSTAR, &mut m.lstar),
        (msr::CSTAR, &mut m.cstar),
        (msr::SFMASK, &mut m.sfmask),
        (msr::KERNEL_GS_BASE, &mut m.kernel_gs_base),
        (msr::SYSENTER_CS, &mut m.sysenter_cs),
        (msr::SYSENTER_ESP, &mut m.sysenter_esp),
        (msr::SYSENTER_EIP, &mut m.sysenter_eip),
        (msr::PAT, &mut m.pat),
        (msr::MISC_ENABLE, &mut m.misc_enable),
        (msr::XSS, &mut m.xss),
        (msr::SPEC_CTRL, &mut m.spec_ctrl),
        (msr::MTRR_DEF_TYPE, &mut m.mtrr_def_type),
        (msr::MCG_STATUS, &mut m.mcg_status),
    ];
    all.extend(fixed.zip(&mut m.mtrr_fixed));
    all.extend((msr::MTRR_PHYS_BASE0..).zip(&mut m.mtrr_variable));
    all.extend([
        (msr::KVM_POLL_CONTROL, &mut m.kvm_poll_control),
        (msr::KVM_ASYNC_PF_EN, &mut m.kvm_async_pf),
        (msr::KVM_STEAL_TIME, &mut m.kvm_steal_time),
        (msr::KVM_PV_EOI_EN, &mut m.kvm_pv_eoi),
        (msr::KVM_WALL_CLOCK_NEW, &mut m.kvm_wall_clock),
        (msr::KVM_SYSTEM_TIME_NEW, &mut m.kvm_system_time),
    ]);
    all
}

/// A list for the ioctls.
fn list(entries: &[(u32, u64)]) -> List {
    let entries: Vec<_> =
        entries.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    List::from_entries(&entries).unwrap_or_else(|_| unreachable!("a few dozen MSRs fit"))
}

/// Reads one MSR; `None` if this vCPU has none of that number.
pub fn read(fd: &VcpuFd, index: u32) -> Result<Option<u64>, Error> {
    let mut list = list(&[(index, 0)]);
    let read = fd.get_msrs(&mut list).map_err(host("KVM did not read an MSR"))?;
    Ok((read == 1).then(|| list.as_slice()[0].data))
}

/// Writes one MSR; false if this vCPU does not take it.
pub fn write(fd: &VcpuFd, index: u32, data: u64) -> Result<bool, Error> {
    Ok(fd.set_msrs(&list(&[(index, data)])).map_err(host("KVM did not write an MSR"))? == 1)
}

/// Which of the canonical MSRs this host's KVM has for a vCPU. Found by reading each and writing it back:
/// KVM_GET_MSR_INDEX_LIST leaves out some that work (the MTRRs, up to Linux 6.2), and lists some that CPUID then hides.
pub fn supported(fd: &VcpuFd) -> Result<Vec<u32>, Error> {
    let mut found = Vec::new();
    for (index, _) in fields(&mut Msrs::default()) {
        if let Some(value) = read(fd, index)?
            && write(fd, index, value)?
        {
            found.push(index);
        }
    }
    Ok(found)
}

/// Reads those that are `supported`; the others are as after reset. The TSC is not among them.
pub fn get(fd: &VcpuFd, supported: &[u32]) -> Result<Msrs, Error> {
    let wanted: Vec<_> = supported.iter().map(|&index| (index, 0)).collect();
    let mut list = list(&wanted);
    let read = fd.get_msrs(&mut list).map_err(host("KVM did not read the MSRs"))?;
    let mut msrs = Msrs::default();
    let mut fields = fields(&mut msrs);
    for entry in &list.as_slice()[..read.min(wanted.len())] {
        if let Some((_, field)) = fields.iter_mut().find(|(index, _)| *index == entry.index) {
            **field = entry.data;
        }
    }
    drop(fields);
    Ok(msrs)
}

/// Writes `msrs`, all but the TSC.
pub fn set(fd: &VcpuFd, supported: &[u32], msrs: &Msrs) -> Result<(), Error> {
    let (mut msrs, mut reset) = (msrs.clone(), Msrs::default());
    let (mut wanted, mut missing) = (Vec::new(), None);
    for ((index, field), (_, initial)) in fields(&mut msrs).into_iter().zip(fields(&mut reset)) {
        if supported.contains(&index) {
            wanted.push((index, *field));
        } else if field != initial {
            missing = Some((index, *field));
        }
    }
    let written = fd.set_msrs(&list(&wanted)).map_err(host("KVM did not write the MSRs"))?;
    match missing.or(wanted.get(written).copied()) {
        None => Ok(()),
        Some((index, value)) => Err(Error::Guest(format!(
            "this host's KVM does not take {value:#x} in the guest's MSR {index:#x}; \
             resume the machine on a host with the same processor features, or with another engine"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_msr_is_listed_twice_and_every_field_is_there() {
        let mut msrs = Msrs::default();
        let mut numbers: Vec<_> = fields(&mut msrs)
            .into_iter()
            .map(|(index, field)| {
                *field = u64::from(index);
                index
            })
            .collect();
        numbers.sort_unstable();
        let all = numbers.len();
        numbers.dedup();
        assert_eq!(numbers.len(), all);
        // `tsc_offset` alone goes another way.
        assert_eq!(all * 8 + 8, size_of::<Msrs>());
        assert_eq!(msrs.mtrr_fixed[10], 0x26f, "4K_F8000");
        assert_eq!(msrs.mtrr_variable[15], 0x20f);
    }
}
