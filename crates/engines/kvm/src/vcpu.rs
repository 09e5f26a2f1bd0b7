//! A vCPU: the run loop, and state in and out.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use kvm_bindings::{
    CpuId, KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR,
    KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_IOAPIC_EOI, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN, KVMIO, kvm_interrupt, kvm_mp_state, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use machine::cpu::{self, Activity, Debug, Error, Exit, State, Stats, Stop};
use machine::irq::Controllers;
use machine::{Bus, Gpa, Machine, Memory};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;
use x86::cpuid::{Cpuid, PHYSICAL_BITS};
use x86::paging::{self, Access, Paging};
use x86::{Segment, flags, msr};

use crate::kick::Kick;
use crate::vm::Shared;
use crate::{convert, cpuid, debug, fpu, host, msrs};

// Not in kvm-ioctls: how PIC interrupts get to a LAPIC in the kernel (KVM API, 4.16).
ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);

/// Exits by kind.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    port_in: u64,
    port_out: u64,
    mmio_read: u64,
    mmio_write: u64,
    eoi: u64,
    pic: u64,
    interrupted: u64,
    other: u64,
    /// Nanoseconds in KVM_RUN, halts included.
    run: u64,
}

/// A virtual processor of the host's KVM.
pub struct Vcpu {
    fd: VcpuFd,
    shared: Arc<Shared>,
    machine: Arc<Machine>,
    kick: Arc<Kick>,
    boot: bool,
    /// The components of XCR0 that the guest may use.
    xcr0: u64,
    /// The canonical MSRs that this host has.
    msrs: Vec<u32>,
    /// A triple fault was seen, which KVM forgets.
    shutdown: bool,
    slots: debug::Slots,
    /// The breakpoint on which the vCPU stopped, to be passed when it goes on.
    stopped_at: Option<u64>,
    counters: Counters,
}

impl Vcpu {
    pub(crate) fn new(
        shared: Arc<Shared>,
        id: u8,
        model: &Cpuid,
        machine: Arc<Machine>,
        kick: Arc<Kick>,
    ) -> Result<Self, Error> {
        let fd = shared.fd.create_vcpu(id.into()).map_err(host("KVM made no vCPU"))?;
        let entries = cpuid::entries(model, &shared.supported_cpuid, id);
        let list = CpuId::from_entries(&entries)
            .map_err(|_| Error::Guest("the CPU model has more CPUID leaves than KVM takes".into()))?;
        fd.set_cpuid2(&list).map_err(host("KVM did not take the CPU model's CPUID"))?;
        // A host that cannot scale its TSC runs the guest at its own rate, which the guest's kernel learns from kvmclock.
        let khz = u32::try_from(machine.clock.tsc_khz()).unwrap_or(u32::MAX);
        if fd.get_tsc_khz().is_ok_and(|own| own != khz) {
            let _ = fd.set_tsc_khz(khz);
        }
        // KVM finds LAPICs by a map that leaves out a new vCPU until something about its LAPIC is written.
        let lapic = fd.get_lapic().map_err(host("KVM did not read the LAPIC"))?;
        fd.set_lapic(&lapic).map_err(host("KVM did not take the LAPIC"))?;
        let msrs = msrs::supported(&fd)?;
        let boot = id == 0;
        let mut vcpu = Self {
            xcr0: model.xcr0(),
            fd,
            shared,
            machine,
            kick,
            boot,
            msrs,
            shutdown: false,
            slots: debug::Slots::default(),
            stopped_at: None,
            counters: Counters::default(),
        };
        cpu::Vcpu::set_state(&mut vcpu, &State::reset(boot, model.signature()))?;
        Ok(vcpu)
    }

    fn controllers(&self) -> Option<Arc<dyn Controllers>> {
        self.shared.controllers.get()?.upgrade()
    }

    /// Hands the boot processor what the PICs have for it, or asks KVM to tell when it can take it.
    fn inject(&mut self) -> Result<(), Error> {
        if !self.boot {
            return Ok(());
        }
        let Some(controllers) = self.controllers() else { return Ok(()) };
        if self.shared.intr.load(Ordering::SeqCst)
            && self.fd.get_kvm_run().ready_for_interrupt_injection != 0
            && let Some(vector) = controllers.acknowledge()
        {
            self.counters.pic += 1;
            let interrupt = kvm_interrupt { irq: vector.into() };
            // SAFETY: a vCPU's descriptor, and the structure that the request takes.
            if unsafe { ioctl_with_ref(&self.fd, KVM_INTERRUPT(), &interrupt) } != 0 {
                let source = std::io::Error::last_os_error();
                return Err(Error::Host { what: "KVM did not take an interrupt of the PIC", source });
            }
            self.fd.get_kvm_run().ready_for_interrupt_injection = 0;
        }
        self.fd.get_kvm_run().request_interrupt_window = self.shared.intr.load(Ordering::SeqCst).into();
        Ok(())
    }

    /// Serves the exit that KVM_RUN returned with. `Some` if it is the owner's business.
    fn exit(&mut self) -> Result<Option<Exit>, Error> {
        let run = self.fd.get_kvm_run();
        match run.exit_reason {
            KVM_EXIT_IO => self.port(),
            KVM_EXIT_MMIO => self.mmio(),
            KVM_EXIT_IOAPIC_EOI => {
                // SAFETY: the exit reason says that this is the field; any bits are a `u8`.
                let vector = unsafe { run.__bindgen_anon_1.eoi.vector };
                self.counters.eoi += 1;
                if let Some(controllers) = self.controllers() {
                    controllers.eoi(vector);
                }
            }
            KVM_EXIT_IRQ_WINDOW_OPEN | KVM_EXIT_INTR | KVM_EXIT_HLT => self.counters.other += 1,
            KVM_EXIT_SHUTDOWN => {
                self.shutdown = true;
                return Ok(Some(Exit::TripleFault));
            }
            KVM_EXIT_DEBUG => {
                // SAFETY: as above; any bits are integers.
                let exit = unsafe { run.__bindgen_anon_1.debug.arch };
                let stop = debug::stop(&exit, &self.slots);
                self.stopped_at = matches!(stop, Stop::Breakpoint(_)).then_some(exit.pc);
                return Ok(Some(Exit::Debug(stop)));
            }
            reason => return Err(self.failure(reason)),
        }
        Ok(None)
    }

    /// IN, OUT, INS or OUTS.
    fn port(&mut self) {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason says that this is the field; any bits are integers.
        let io = unsafe { run.__bindgen_anon_1.io };
        let len = usize::from(io.size) * io.count as usize;
        let start = std::ptr::from_mut(run).cast::<u8>();
        // SAFETY: the kernel put `count` items of `size` bytes at `data_offset` of the vCPU's mapping, which is larger than
        // the structure; only this thread touches it before the next KVM_RUN.
        let data = unsafe { std::slice::from_raw_parts_mut(start.add(io.data_offset as usize), len) };
        let ports = &self.machine.ports;
        let out = u32::from(io.direction) == KVM_EXIT_IO_OUT;
        for item in data.chunks_exact_mut(usize::from(io.size).max(1)) {
            if out {
                ports.write(io.port.into(), io.size, value(item));
            } else {
                put(item, ports.read(io.port.into(), io.size));
            }
        }
        *(if out { &mut self.counters.port_out } else { &mut self.counters.port_in }) += 1;
    }

    fn mmio(&mut self) {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason says that this is the field; any bits are integers.
        let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
        let data = &mut mmio.data[..(mmio.len as usize).min(8)];
        if mmio.is_write != 0 {
            self.counters.mmio_write += 1;
            write(&self.machine.mmio, mmio.phys_addr, data);
        } else {
            self.counters.mmio_read += 1;
            read(&self.machine.mmio, mmio.phys_addr, data);
        }
    }

    /// KVM cannot go on with the guest: says what is known.
    fn failure(&mut self, reason: u32) -> Error {
        let run = self.fd.get_kvm_run();
        let mut what = match reason {
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: the exit reason says that this is the field; any bits are integers.
                let e = unsafe { run.__bindgen_anon_1.internal };
                let data = &e.data[..(e.ndata as usize).min(e.data.len())];
                let kind = match e.suberror {
                    1 => "it cannot emulate an instruction of the guest",
                    2 => "two exceptions at once",
                    3 => "an exit while an event was being delivered",
                    4 => "an exit that it does not know",
                    _ => "an internal error",
                };
                format!("KVM gave up: {kind} (suberror {}, data {data:x?})", e.suberror)
            }
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: as above.
                let e = unsafe { run.__bindgen_anon_1.fail_entry };
                let reason = e.hardware_entry_failure_reason;
                format!("the processor refused to enter the guest (reason {reason:#x}, host CPU {})", e.cpu)
            }
            other => format!("KVM_RUN returned for a reason that Lodge does not know ({other})"),
        };
        what.push_str(&self.registers());
        what.push_str("\ntry --engine interpret");
        Error::Guest(what)
    }

    /// The registers, for an error message.
    fn registers(&mut self) -> String {
        use std::fmt::Write;
        let Ok(s) = cpu::Vcpu::state(self) else { return String::new() };
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = s.gpr;
        let mut text = String::new();
        let _ = write!(
            text,
            "\nrip {:016x} rsp {rsp:016x} rflags {:x}\nrax {rax:016x} rbx {rbx:016x} rcx {rcx:016x} rdx {rdx:016x}\
             \nrsi {rsi:016x} rdi {rdi:016x} rbp {rbp:016x} r8  {r8:016x}\
             \nr9  {r9:016x} r10 {r10:016x} r11 {r11:016x} r12 {r12:016x}\nr13 {r13:016x} r14 {r14:016x} r15 {r15:016x}\
             \ncr0 {:x} cr2 {:x} cr3 {:x} cr4 {:x} efer {:x}",
            s.rip, s.rflags, s.cr0, s.cr2, s.cr3, s.cr4, s.efer,
        );
        for (name, seg) in ["es", "cs", "ss", "ds", "fs", "gs"].iter().zip(&s.segments) {
            let Segment { selector, base, limit, attributes } = seg;
            let _ = write!(
                text,
                "\n{name} {selector:04x} base {base:x} limit {limit:x} attributes {attributes:04x}"
            );
        }
        text
    }

    /// What the guest's TSC is ahead of the machine's clock.
    fn tsc_offset(&self) -> Result<u64, Error> {
        let before = self.machine.clock.tsc();
        let tsc = msrs::read(&self.fd, msr::TSC)?.unwrap_or(0);
        let after = self.machine.clock.tsc();
        Ok(tsc.wrapping_sub(before + (after - before) / 2))
    }

    /// Sets the TSC, unless it is right: reading it back is exact to microseconds only, and a state that goes out and in
    /// again must not move the guest's time.
    fn set_tsc_offset(&self, offset: u64) -> Result<(), Error> {
        let millisecond = self.machine.clock.tsc_khz() as i64;
        if (self.tsc_offset()?.wrapping_sub(offset) as i64).abs() > millisecond {
            msrs::write(&self.fd, msr::TSC, self.machine.clock.tsc().wrapping_add(offset))?;
        }
        Ok(())
    }

    /// Lets a guest that stopped before the instruction at a breakpoint execute that instruction.
    fn pass_breakpoint(&mut self) -> Result<(), Error> {
        if let Some(at) = self.stopped_at.take() {
            let mut regs = self.fd.get_regs().map_err(host("KVM did not read the registers"))?;
            if regs.rip == at {
                regs.rflags |= flags::RF;
                self.fd.set_regs(&regs).map_err(host("KVM did not write the registers"))?;
            }
        }
        Ok(())
    }
}

fn value(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b))
}

fn put(bytes: &mut [u8], value: u64) {
    for (byte, v) in bytes.iter_mut().zip(value.to_le_bytes()) {
        *byte = v;
    }
}

/// Reads from a bus; KVM splits at page ends, so any length from 1 to 8 may come.
fn read(bus: &Bus, at: Gpa, data: &mut [u8]) {
    match data.len() {
        1 | 2 | 4 | 8 => {
            let size = data.len() as u8;
            put(data, bus.read(at, size));
        }
        _ => (at..).zip(data).for_each(|(at, byte)| *byte = bus.read(at, 1) as u8),
    }
}

/// Writes to a bus, likewise.
fn write(bus: &Bus, at: Gpa, data: &[u8]) {
    match data.len() {
        1 | 2 | 4 | 8 => bus.write(at, data.len() as u8, value(data)),
        _ => (at..).zip(data).for_each(|(at, &byte)| bus.write(at, 1, byte.into())),
    }
}

/// Page tables, for looking only.
struct Tables<'a>(&'a Memory);

impl paging::Tables for Tables<'_> {
    fn read(&mut self, gpa: Gpa, size: u8) -> u64 {
        match (self.0.offset(gpa), size) {
            (Some(offset), 4) => self.0.load::<u32>(offset).into(),
            (Some(offset), _) => self.0.load(offset),
            (None, _) => 0,
        }
    }

    fn update(&mut self, _: Gpa, _: u8, _: u64, _: u64) -> bool {
        true
    }
}

impl cpu::Vcpu for Vcpu {
    fn run(&mut self) -> Result<Exit, Error> {
        if self.shutdown {
            return Ok(Exit::TripleFault);
        }
        self.pass_breakpoint()?;
        let kick = self.kick.clone();
        // SAFETY: the page is mapped for as long as `self.fd` lives, which is longer than this call.
        let entered = unsafe { kick.enter(self.fd.get_kvm_run()) };
        loop {
            self.inject()?;
            let start = Instant::now();
            let result = self.fd.run().map(|_| ());
            self.counters.run += start.elapsed().as_nanos() as u64;
            match result {
                Ok(()) => {
                    if let Some(exit) = self.exit()? {
                        return Ok(exit);
                    }
                }
                // Only here may a kick be answered: a KVM_RUN that was interrupted has completed the access before.
                // EAGAIN: a start-up IPI came.
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                    self.counters.interrupted += 1;
                    if entered.take_kick() {
                        return Ok(Exit::Kicked);
                    }
                }
                Err(e) => return Err(host("KVM did not run the vCPU")(e)),
            }
        }
    }

    fn state(&mut self) -> Result<State, Error> {
        let fd = &self.fd;
        let mut state = State::reset(true, 0);
        convert::from_regs(&mut state, &fd.get_regs().map_err(host("KVM did not read the registers"))?);
        convert::from_sregs(&mut state, &fd.get_sregs().map_err(host("KVM did not read the segments"))?);
        let debugregs = fd.get_debug_regs().map_err(host("KVM did not read the debug registers"))?;
        convert::from_debugregs(&mut state, &debugregs);
        state.fpu = fpu::from_xsave(&fd.get_xsave().map_err(host("KVM did not read the FPU"))?);
        let xcrs = fd.get_xcrs().map_err(host("KVM did not read XCR0"))?;
        let count = (xcrs.nr_xcrs as usize).min(xcrs.xcrs.len());
        state.xcr0 = xcrs.xcrs[..count].iter().find(|x| x.xcr == 0).map_or(1, |x| x.value);
        state.msrs = msrs::get(fd, &self.msrs)?;
        state.msrs.tsc_offset = self.tsc_offset()?;
        let events = fd.get_vcpu_events().map_err(host("KVM did not read the events"))?;
        convert::from_events(&mut state, &events);
        let mp_state = fd.get_mp_state().map_err(host("KVM did not tell what the vCPU is about"))?;
        state.activity =
            if self.shutdown { Activity::Shutdown } else { convert::from_mp_state(mp_state.mp_state) };
        Ok(state)
    }

    fn set_state(&mut self, state: &State) -> Result<(), Error> {
        let fd = &self.fd;
        let mut sregs = fd.get_sregs().map_err(host("KVM did not read the segments"))?;
        convert::to_sregs(state, &mut sregs);
        fd.set_sregs(&sregs).map_err(host("KVM did not take the segments and control registers"))?;
        fd.set_regs(&convert::to_regs(state)).map_err(host("KVM did not take the registers"))?;
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0].value = state.xcr0;
        // A processor without XSAVE has no XCR0 to set.
        if self.xcr0 != 0 {
            fd.set_xcrs(&xcrs).map_err(host("KVM did not take XCR0"))?;
        }
        // SAFETY: the kernel reads more than the structure's 4 KiB only where a process asked for larger state, by
        // arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM), which Lodge never does.
        unsafe { fd.set_xsave(&fpu::to_xsave(&state.fpu, self.xcr0)) }
            .map_err(host("KVM did not take the FPU"))?;
        fd.set_debug_regs(&convert::to_debugregs(state))
            .map_err(host("KVM did not take the debug registers"))?;
        msrs::set(fd, &self.msrs, &state.msrs)?;
        self.set_tsc_offset(state.msrs.tsc_offset)?;
        let mp_state = kvm_mp_state { mp_state: convert::to_mp_state(state.activity) };
        fd.set_mp_state(mp_state).map_err(host("KVM did not take what the vCPU is about"))?;
        fd.set_vcpu_events(&convert::to_events(state)).map_err(host("KVM did not take the events"))?;
        self.shutdown = state.activity == Activity::Shutdown;
        self.stopped_at = None;
        // It spoke of the state before.
        self.fd.get_kvm_run().ready_for_interrupt_injection = 0;
        Ok(())
    }

    fn debug(&mut self, debug: &Debug) -> Result<(), Error> {
        let (kvm, slots) = debug::plan(debug, self.shared.block_irqs)?;
        self.fd.set_guest_debug(&kvm).map_err(host("KVM did not take the debugger's wishes"))?;
        self.slots = slots;
        Ok(())
    }

    fn translate(&mut self, linear: u64) -> Option<Gpa> {
        // Not by KVM_TRANSLATE, which sets accessed bits in the guest's tables.
        let sregs = self.fd.get_sregs().ok()?;
        let mut tables = Tables(&self.machine.memory);
        let pdpt = sregs.cr3 & 0xffff_ffe0;
        let paging = Paging {
            cr0: sregs.cr0,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
            pdpte: [0, 8, 16, 24].map(|at| paging::Tables::read(&mut tables, pdpt + at, 8)),
            physical_bits: PHYSICAL_BITS as u8,
        };
        let access = Access { peek: true, smap_off: true, ..Access::default() };
        let page = paging::walk(&paging, &mut tables, linear, access).ok()?;
        Some(page.gpa | linear & 0xfff)
    }

    fn kicker(&self) -> Arc<dyn cpu::Kick> {
        self.kick.clone()
    }

    fn stats(&self) -> Stats {
        let c = &self.counters;
        Stats {
            instructions: None,
            counters: vec![
                ("port reads", c.port_in),
                ("port writes", c.port_out),
                ("MMIO reads", c.mmio_read),
                ("MMIO writes", c.mmio_write),
                ("IOAPIC EOIs", c.eoi),
                ("PIC interrupts", c.pic),
                ("interrupted runs", c.interrupted),
                ("other exits", c.other),
            ],
            times: vec![("in KVM_RUN", c.run)],
        }
    }
}
