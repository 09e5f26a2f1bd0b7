//! The canonical CPU state, to and from the structures of KVM's ioctls.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, kvm_debugregs,
    kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events,
};
use machine::cpu::{Activity, Events, State};
use x86::exception::vector;
use x86::segment::{attr, index};
use x86::{Exception, Segment, Table, flags, gpr};

/// KVM_X86_SHADOW_INT_MOV_SS and KVM_X86_SHADOW_INT_STI (Linux, arch/x86/include/uapi/asm/kvm.h).
const SHADOW_MOV_SS: u8 = 1;
const SHADOW_STI: u8 = 2;

/// The general registers, RIP and RFLAGS of `state`.
pub fn to_regs(state: &State) -> kvm_regs {
    let r = &state.gpr;
    kvm_regs {
        rax: r[gpr::RAX],
        rbx: r[gpr::RBX],
        rcx: r[gpr::RCX],
        rdx: r[gpr::RDX],
        rsi: r[gpr::RSI],
        rdi: r[gpr::RDI],
        rsp: r[gpr::RSP],
        rbp: r[gpr::RBP],
        r8: r[gpr::R8],
        r9: r[gpr::R9],
        r10: r[gpr::R10],
        r11: r[gpr::R11],
        r12: r[gpr::R12],
        r13: r[gpr::R13],
        r14: r[gpr::R14],
        r15: r[gpr::R15],
        rip: state.rip,
        rflags: state.rflags | flags::FIXED,
    }
}

/// The opposite of [`to_regs`].
pub fn from_regs(state: &mut State, r: &kvm_regs) {
    // In the order of `x86::gpr`.
    state.gpr = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ];
    state.rip = r.rip;
    state.rflags = r.rflags;
}

fn to_segment(s: &Segment) -> kvm_segment {
    let bit = |mask: u16| u8::from(s.attributes & mask != 0);
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.kind(),
        present: bit(attr::P),
        dpl: s.dpl(),
        db: bit(attr::DB),
        s: bit(attr::S),
        l: bit(attr::L),
        g: bit(attr::G),
        avl: bit(attr::AVL),
        unusable: u8::from(!s.usable()),
        padding: 0,
    }
}

fn from_segment(s: &kvm_segment) -> Segment {
    let flag = |on: u8, mask: u16| if on != 0 { mask } else { 0 };
    let attributes = if s.unusable != 0 || s.present == 0 {
        0
    } else {
        u16::from(s.type_ & 0xf)
            | flag(s.s, attr::S)
            | u16::from(s.dpl & 3) << attr::DPL_SHIFT
            | attr::P
            | flag(s.avl, attr::AVL)
            | flag(s.l, attr::L)
            | flag(s.db, attr::DB)
            | flag(s.g, attr::G)
    };
    Segment { selector: s.selector, attributes, limit: s.limit, base: s.base }
}

fn to_table(t: &Table) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] }
}

fn from_table(t: &kvm_dtable) -> Table {
    Table { base: t.base, limit: t.limit }
}

/// Puts the segments, tables and control registers of `state` into `sregs`, which keeps what is the LAPIC's.
pub fn to_sregs(state: &State, sregs: &mut kvm_sregs) {
    let s = &state.segments;
    sregs.es = to_segment(&s[index::ES]);
    sregs.cs = to_segment(&s[index::CS]);
    sregs.ss = to_segment(&s[index::SS]);
    sregs.ds = to_segment(&s[index::DS]);
    sregs.fs = to_segment(&s[index::FS]);
    sregs.gs = to_segment(&s[index::GS]);
    if sregs.ss.unusable != 0 {
        // KVM takes the privilege level from SS, even from a null one, as 64-bit code has it below ring 3.
        sregs.ss.dpl = (s[index::CS].selector & 3) as u8;
    }
    sregs.ldt = to_segment(&state.ldtr);
    sregs.tr = to_segment(&state.tr);
    sregs.gdt = to_table(&state.gdtr);
    sregs.idt = to_table(&state.idtr);
    sregs.cr0 = state.cr0;
    // A page fault on its way brings its address along.
    sregs.cr2 = match state.events.exception {
        Some(Exception { vector: vector::PF, address, .. }) => address,
        _ => state.cr2,
    };
    sregs.cr3 = state.cr3;
    sregs.cr4 = state.cr4;
    sregs.efer = state.efer;
    sregs.interrupt_bitmap = [0; 4];
}

/// The opposite of [`to_sregs`].
pub fn from_sregs(state: &mut State, sregs: &kvm_sregs) {
    for (to, from) in
        state.segments.iter_mut().zip([&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs])
    {
        *to = from_segment(from);
    }
    state.ldtr = from_segment(&sregs.ldt);
    state.tr = from_segment(&sregs.tr);
    state.gdtr = from_table(&sregs.gdt);
    state.idtr = from_table(&sregs.idt);
    state.cr0 = sregs.cr0;
    state.cr2 = sregs.cr2;
    state.cr3 = sregs.cr3;
    state.cr4 = sregs.cr4;
    state.efer = sregs.efer;
}

/// The debug registers of `state`.
pub fn to_debugregs(state: &State) -> kvm_debugregs {
    let dr6 = match state.events.exception {
        Some(Exception { vector: vector::DB, address, .. }) => state.dr6 | address,
        _ => state.dr6,
    };
    kvm_debugregs { db: state.dr, dr6, dr7: state.dr7, ..Default::default() }
}

/// The opposite of [`to_debugregs`].
pub fn from_debugregs(state: &mut State, regs: &kvm_debugregs) {
    state.dr = regs.db;
    state.dr6 = regs.dr6;
    state.dr7 = regs.dr7;
}

/// The events of `state`.
pub fn to_events(state: &State) -> kvm_vcpu_events {
    let e = &state.events;
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if let Some(exception) = e.exception {
        events.exception.injected = 1;
        events.exception.nr = exception.vector;
        events.exception.has_error_code = exception.error_code.is_some().into();
        events.exception.error_code = exception.error_code.unwrap_or(0);
    }
    if let Some(vector) = e.interrupt {
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
    }
    if e.shadow {
        // VMX refuses a shadow by STI while interrupts are off.
        let sti = state.rflags & flags::IF != 0;
        events.interrupt.shadow = if sti { SHADOW_STI } else { SHADOW_MOV_SS };
    }
    events.nmi.pending = e.nmi_pending.into();
    events.nmi.masked = e.nmi_blocked.into();
    events
}

/// The opposite of [`to_events`]; `state` has its CR2 already.
pub fn from_events(state: &mut State, events: &kvm_vcpu_events) {
    let x = &events.exception;
    let exception = (x.injected != 0 || x.pending != 0).then(|| Exception {
        vector: x.nr,
        error_code: (x.has_error_code != 0).then_some(x.error_code),
        // KVM has put a page fault's address into CR2, and a debug exception's bits into DR6, by now.
        address: if x.nr == vector::PF { state.cr2 } else { 0 },
    });
    let nmi = &events.nmi;
    state.events = Events {
        exception,
        interrupt: (events.interrupt.injected != 0 && events.interrupt.soft == 0)
            .then_some(events.interrupt.nr),
        shadow: events.interrupt.shadow != 0,
        nmi_pending: nmi.pending != 0 || nmi.injected != 0,
        // One that KVM began to inject blocks already, but has to be delivered yet.
        nmi_blocked: nmi.masked != 0 && nmi.injected == 0,
    };
}

/// What KVM calls an activity. A triple fault it does not remember.
pub fn to_mp_state(activity: Activity) -> u32 {
    match activity {
        Activity::Running | Activity::Shutdown => KVM_MP_STATE_RUNNABLE,
        Activity::Halted => KVM_MP_STATE_HALTED,
        Activity::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    }
}

/// The opposite of [`to_mp_state`].
pub fn from_mp_state(mp_state: u32) -> Activity {
    match mp_state {
        KVM_MP_STATE_HALTED => Activity::Halted,
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => {
            Activity::WaitForSipi
        }
        _ => Activity::Running,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A state with a different value in every field.
    fn sample() -> State {
        let mut state = State::reset(true, 0x800f12);
        state.gpr = std::array::from_fn(|i| 0x1111_1111_0000_0000 * (i as u64 & 7) + i as u64);
        state.rip = 0xffff_ffff_8100_0000;
        state.rflags = flags::FIXED | flags::IF | flags::ZF;
        for (i, s) in state.segments.iter_mut().enumerate() {
            *s = Segment::from_descriptor(8 * i as u16, 0x00af_9a00_1234_ffff + ((i as u64) << 16));
        }
        state.segments[index::FS] = Segment { selector: 0, attributes: 0, limit: 0, base: 0x7f00_0000_1000 };
        state.tr = Segment { selector: 0x40, attributes: 0x8b, limit: 0x67, base: 0xffff_8000_0000_0000 };
        state.gdtr = Table { base: 0xfffe_0000_0000_0000, limit: 0x7f };
        state.idtr = Table { base: 0xfffe_0000_0000_1000, limit: 0xfff };
        (state.cr0, state.cr2, state.cr3, state.cr4, state.efer) =
            (0x8005_0033, 0xdead, 0x1000, 0x6a0, 0xd01);
        state.dr = [1, 2, 3, 4];
        (state.dr6, state.dr7) = (0xffff_4ff1, 0x401);
        state.events = Events {
            exception: Some(Exception::page_fault(0xdead, 6)),
            interrupt: None,
            shadow: true,
            nmi_pending: true,
            nmi_blocked: true,
        };
        state
    }

    #[test]
    fn there_and_back() {
        let state = sample();
        let mut sregs = kvm_sregs { cr8: 5, apic_base: 0xfee0_0900, ..Default::default() };
        to_sregs(&state, &mut sregs);
        assert_eq!((sregs.cr8, sregs.apic_base), (5, 0xfee0_0900), "the LAPIC's stay");
        let mut back = State::reset(true, 0);
        from_regs(&mut back, &to_regs(&state));
        from_sregs(&mut back, &sregs);
        from_debugregs(&mut back, &to_debugregs(&state));
        from_events(&mut back, &to_events(&state));
        assert_eq!(back, state);
    }

    #[test]
    fn registers_go_to_their_names() {
        let mut state = State::reset(true, 0);
        state.gpr = std::array::from_fn(|i| i as u64);
        let regs = to_regs(&state);
        assert_eq!((regs.rax, regs.rcx, regs.rdx, regs.rbx), (0, 1, 2, 3));
        assert_eq!((regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r15), (4, 5, 6, 7, 15));
    }

    #[test]
    fn a_null_stack_segment_keeps_its_ring() {
        let mut state = sample();
        state.segments[index::CS].selector = 0x11;
        state.segments[index::SS] = Segment::default();
        let mut sregs = kvm_sregs::default();
        to_sregs(&state, &mut sregs);
        assert_eq!((sregs.ss.unusable, sregs.ss.dpl), (1, 1));
    }

    #[test]
    fn an_nmi_that_kvm_began_to_inject_is_not_lost() {
        let mut events = kvm_vcpu_events::default();
        (events.nmi.injected, events.nmi.masked) = (1, 1);
        let mut state = State::reset(true, 0);
        from_events(&mut state, &events);
        assert_eq!((state.events.nmi_pending, state.events.nmi_blocked), (true, false));
    }

    #[test]
    fn activities() {
        for activity in [Activity::Running, Activity::Halted, Activity::WaitForSipi] {
            assert_eq!(from_mp_state(to_mp_state(activity)), activity);
        }
    }
}
