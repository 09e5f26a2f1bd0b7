//! What a debugger wants, as KVM_SET_GUEST_DEBUG takes it: single step, and the processor's four debug registers.

use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    kvm_debug_exit_arch, kvm_guest_debug,
};
use machine::cpu::{Debug, Error, Stop};
use x86::control::{dr6, dr7};

/// One debug register in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    address: u64,
    /// R/W field of DR7: 0 executes, 1 writes, 3 reads or writes.
    access: u64,
    /// LEN field of DR7.
    length: u64,
}

/// The debug registers in use, at most four.
#[derive(Clone, Debug, Default)]
pub struct Slots(Vec<Slot>);

/// What is to be done, and the slots by which to understand the exits. `block_irqs`: KVM can keep interrupts out of a
/// single step, which would otherwise end in a handler.
pub fn plan(debug: &Debug, block_irqs: bool) -> Result<(kvm_guest_debug, Slots), Error> {
    let mut slots: Vec<_> =
        debug.breakpoints.iter().map(|&address| Slot { address, access: 0, length: 0 }).collect();
    for &(address, length, reads) in &debug.watchpoints {
        cover(&mut slots, address, length, if reads { 3 } else { 1 });
    }
    if slots.len() > 4 {
        return Err(Error::Guest(
            "KVM has four hardware breakpoints and watchpoints together; remove some, or run with --engine interpret"
                .into(),
        ));
    }
    let mut kvm = kvm_guest_debug::default();
    if debug.step {
        kvm.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
        if block_irqs {
            kvm.control |= KVM_GUESTDBG_BLOCKIRQ;
        }
    }
    if !slots.is_empty() {
        kvm.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
        kvm.arch.debugreg[7] = dr7::FIXED;
    }
    for (i, slot) in slots.iter().enumerate() {
        kvm.arch.debugreg[i] = slot.address;
        // SDM vol. 3B, 17.2.4: the global enable bit, R/W and LEN.
        kvm.arch.debugreg[7] |= 2 << (2 * i) | slot.access << (16 + 4 * i) | slot.length << (18 + 4 * i);
    }
    Ok((kvm, Slots(slots)))
}

/// Covers a watched range with aligned pieces of 8, 4, 2 and 1 bytes; gives up after more than there are registers.
fn cover(slots: &mut Vec<Slot>, mut address: u64, mut left: u64, access: u64) {
    while left > 0 && slots.len() <= 4 {
        let (size, length) = [(8, 2), (4, 3), (2, 1), (1, 0)]
            .into_iter()
            .find(|&(size, _)| address.is_multiple_of(size) && size <= left)
            .unwrap_or((1, 0));
        slots.push(Slot { address, access, length });
        address = address.wrapping_add(size);
        left -= size;
    }
}

/// What a KVM_EXIT_DEBUG tells.
pub fn stop(exit: &kvm_debug_exit_arch, slots: &Slots) -> Stop {
    let hit = slots.0.iter().enumerate().find(|(i, _)| exit.dr6 & (dr6::B0 << i) != 0);
    match hit {
        Some((_, slot)) if slot.access == 0 => Stop::Breakpoint(slot.address),
        Some((_, slot)) => Stop::Watchpoint(slot.address),
        None => Stop::Step,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_laid_out_as_the_manual_says() {
        let debug = Debug {
            step: false,
            breakpoints: vec![0xffff_ffff_8100_0000],
            watchpoints: vec![(0x1004, 4, false), (0x2000, 8, true)],
        };
        let (kvm, slots) = plan(&debug, true).unwrap();
        assert_eq!(kvm.control, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP);
        assert_eq!(kvm.arch.debugreg[..3], [0xffff_ffff_8100_0000, 0x1004, 0x2000]);
        assert_eq!(kvm.arch.debugreg[7], 0x0bd0_042a);
        let exit = |dr6| kvm_debug_exit_arch { dr6, ..Default::default() };
        assert_eq!(stop(&exit(1), &slots), Stop::Breakpoint(0xffff_ffff_8100_0000));
        assert_eq!(stop(&exit(4), &slots), Stop::Watchpoint(0x2000));
        assert_eq!(stop(&exit(dr6::BS), &slots), Stop::Step);
    }

    #[test]
    fn unaligned_ranges_take_several_registers() {
        let watch = |range| Debug { watchpoints: vec![range], ..Debug::default() };
        let (kvm, _) = plan(&watch((0x1001, 7, false)), false).unwrap();
        assert_eq!(kvm.arch.debugreg[..4], [0x1001, 0x1002, 0x1004, 0]);
        assert!(plan(&watch((0x1001, 1 << 40, false)), false).is_err());
        assert!(plan(&watch((u64::MAX, 3, false)), false).is_ok(), "wraps without harm");
        assert_eq!(plan(&Debug::default(), true).unwrap().0.control, 0);
    }
}
