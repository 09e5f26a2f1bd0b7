//! The processor's state as handlers see it, and what follows from it.

use std::sync::Arc;

use machine::cpu::State;
use machine::{Machine, apic};
use memory::{Keeper, Memory};
use x86::control::{cr0, cr4, dr7, efer};
use x86::cpuid::{Cpuid, Feature, Live};
use x86::segment::{attr, index};
use x86::{Exception, Segment, flags};

use crate::flags::Lazy;
use crate::op::{Fault, Result, slot};
use crate::tlb::Tlb;

/// Cheap counters.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Instructions executed.
    pub instructions: u64,
    /// Blocks decoded.
    pub decoded: u64,
    /// Times that all blocks were forgotten.
    pub flushes: u64,
    /// Walks of page tables.
    pub tlb_misses: u64,
    /// Accesses to devices.
    pub mmio: u64,
    /// Accesses to ports.
    pub ports: u64,
    /// Interrupts taken.
    pub interrupts: u64,
    /// Exceptions taken.
    pub exceptions: u64,
    /// HLT executed.
    pub halts: u64,
}

/// What the run loop must look at before the next instruction; zero nearly always.
pub mod attention {
    /// Run a single instruction without polling for interrupts (STI, MOV SS).
    pub const SHADOW: u32 = 1 << 0;
    /// RFLAGS.TF.
    pub const TRAP: u32 = 1 << 1;
    /// DR7 enables a breakpoint on execution.
    pub const BREAKPOINTS: u32 = 1 << 2;
    /// A debugger wants to look at every instruction.
    pub const DEBUGGER: u32 = 1 << 3;
    /// Halted, waiting for SIPI, shut down.
    pub const IDLE: u32 = 1 << 4;
    /// An exception or interrupt waits that came with a state from outside, or an NMI.
    pub const EVENT: u32 = 1 << 6;
    /// RF is set: it lasts for one instruction.
    pub const RESUME: u32 = 1 << 7;
    /// The code segment's limit is below 4 GiB, so every instruction is checked (not in 64-bit mode).
    pub const LIMIT: u32 = 1 << 8;
    /// This vCPU has changed where memory is, and the others may not know yet.
    pub const MAP: u32 = 1 << 9;
}

/// Registers and everything else that instructions work on.
pub struct Core {
    /// General-purpose registers, and the slots of [`slot`].
    pub r: [u64; 32],
    /// Where to go on, when a handler says [`crate::op::Flow::Jump`]; else of the block's start.
    pub rip: u64,
    /// Status flags.
    pub lazy: Lazy,
    /// RFLAGS without its status flags.
    pub rflags: u64,
    /// Mask of [`apic::Local::pending`] bits that matter now.
    pub poll: u32,
    /// Bits of [`attention`].
    pub attention: u32,
    /// Fetch context: differs whenever the same RIP may mean other code.
    pub context: u64,
    /// Which part of the TLB is in use.
    pub bank: usize,
    /// Current privilege level.
    pub cpl: u8,
    /// Bits of the code segment's mode: 16, 32 or 64.
    pub bits: u8,
    /// Mask of the stack pointer.
    pub stack_mask: u64,
    /// Bits of segments that are flat and readable (0–5), and writable (8–13), so that no check is needed.
    pub flat: u32,
    /// A store hit cached code.
    pub hit: bool,
    /// Why the last handler failed.
    pub exception: Exception,
    /// DR6 bits of debug traps that the running instruction met.
    pub pending_db: u64,
    /// The TLB.
    pub tlb: Box<Tlb>,
    /// Guest memory.
    pub memory: Memory,
    /// Tells whether the TLB is still right about where memory is.
    pub keeper: Keeper,
    /// Everything else; GPRs, RIP, RFLAGS and FPU here are stale.
    pub s: State,
    /// PDPTEs of PAE paging.
    pub pdpte: [u64; 4],
    /// x87, MMX, SSE and AVX registers.
    pub fpu: native::SimdState,
    /// State of the SIMD handlers.
    pub simd: crate::simd::Simd,
    /// The machine around it.
    pub machine: Arc<Machine>,
    /// Its APIC.
    pub local: Arc<apic::Local>,
    /// What it is.
    pub cpuid: Arc<Cpuid>,
    /// What happened.
    pub count: Counters,
    /// The debugger's watchpoint that was hit.
    pub watch_hit: Option<u64>,
    /// What the debugger wants.
    pub debug: machine::cpu::Debug,
    /// Data breakpoints are on, the guest's or the debugger's: linear pages that the TLB must not hold.
    pub watched: bool,
    /// What it has agreed with the guest about time.
    pub pv: crate::pv::Pv,
    /// An event was delivered, or SYSCALL executed: no single-step trap follows the instruction.
    pub delivered: bool,
    /// MOV SS or POP SS was executed: debug traps wait until after the next instruction.
    pub traps_wait: bool,
}

impl Core {
    /// Raises `e`.
    #[cold]
    pub fn raise<T>(&mut self, e: Exception) -> Result<T> {
        self.exception = e;
        Err(Fault)
    }

    /// #GP(0).
    #[cold]
    pub fn gp<T>(&mut self) -> Result<T> {
        self.raise(Exception::GP0)
    }

    /// #UD.
    #[cold]
    pub fn ud<T>(&mut self) -> Result<T> {
        self.raise(Exception::UD)
    }

    /// #UD unless the CPUID model has `feature`.
    #[inline]
    pub fn need(&mut self, feature: Feature) -> Result<()> {
        if self.cpuid.has(feature) { Ok(()) } else { self.ud() }
    }

    /// RFLAGS, all of it.
    pub fn get_flags(&self) -> u64 {
        self.rflags | self.lazy.bits()
    }

    /// Sets RFLAGS; reserved bits read as they must.
    pub fn set_flags(&mut self, value: u64) {
        self.lazy = Lazy::from_bits(value);
        self.set_system_flags(value);
    }

    /// Sets the flags but for the six status flags.
    pub fn set_system_flags(&mut self, value: u64) {
        self.rflags = value & (flags::DEFINED & !flags::STATUS) | flags::FIXED;
        self.flags_changed();
    }

    /// To be called after TF, IF, AC, VM or RF changed.
    pub fn flags_changed(&mut self) {
        self.poll = apic::EVENT | if self.rflags & flags::IF != 0 { apic::INTERRUPT } else { 0 };
        let bits = [(flags::TF, attention::TRAP), (flags::RF, attention::RESUME)];
        for (flag, bit) in bits {
            self.attend(bit, self.rflags & flag != 0);
        }
        self.rights_changed();
    }

    /// Sets or clears a bit of [`attention`].
    #[inline]
    pub fn attend(&mut self, bit: u32, set: bool) {
        self.attention = if set { self.attention | bit } else { self.attention & !bit };
    }

    /// To be called after CPL, AC, SMAP or alignment checking changed: chooses the TLB's bank.
    #[inline]
    pub fn rights_changed(&mut self) {
        let ac = self.rflags & flags::AC != 0;
        self.bank = match (self.cpl == 3, ac) {
            (true, true) if self.s.cr0 & cr0::AM != 0 => Tlb::USER_ALIGNED,
            (true, _) => Tlb::USER,
            (false, true) => Tlb::SYSTEM_AC,
            (false, false) if self.s.cr4 & cr4::SMAP == 0 => Tlb::SYSTEM_AC,
            (false, false) => Tlb::SYSTEM,
        };
        self.context_changed();
    }

    /// To be called after CPL, the code segment's mode, or the mapping of code changed.
    #[inline]
    pub fn context_changed(&mut self) {
        self.context = self.tlb.epoch << 8 | u64::from(self.bits) << 1 | u64::from(self.cpl == 3);
    }

    /// Whether the processor is in long mode (64-bit or compatibility).
    #[inline]
    pub fn long(&self) -> bool {
        self.s.efer & efer::LMA != 0
    }

    /// Whether protected mode is on and virtual-8086 mode is not.
    #[inline]
    pub fn protected(&self) -> bool {
        self.s.cr0 & cr0::PE != 0 && !self.v8086()
    }

    /// Whether in virtual-8086 mode.
    #[inline]
    pub fn v8086(&self) -> bool {
        self.rflags & flags::VM != 0
    }

    /// I/O privilege level.
    pub fn iopl(&self) -> u8 {
        ((self.rflags & flags::IOPL) >> flags::IOPL_SHIFT) as u8
    }

    /// Loads a segment register's visible and hidden part.
    pub fn set_segment(&mut self, n: usize, segment: Segment) {
        self.s.segments[n] = segment;
        match n {
            index::CS => self.code_segment_changed(),
            index::SS => self.stack_segment_changed(),
            index::FS => self.r[usize::from(slot::FS)] = segment.base,
            index::GS => self.r[usize::from(slot::GS)] = segment.base,
            _ => {}
        }
        self.flat_changed(n);
    }

    /// Sets the base of FS or GS alone.
    pub fn set_base(&mut self, n: usize, base: u64) {
        self.s.segments[n].base = base;
        self.r[usize::from(if n == index::FS { slot::FS } else { slot::GS })] = base;
        self.flat_changed(n);
    }

    fn flat_changed(&mut self, n: usize) {
        let s = &self.s.segments[n];
        let plain = s.base == 0 && s.limit == u32::MAX && s.usable();
        let code = s.has(attr::CODE);
        let readable = plain && (if code { s.has(attr::RW) } else { !s.has(attr::DC) });
        let writable = plain && !code && s.has(attr::RW) && !s.has(attr::DC);
        self.flat = self.flat & !(0x101 << n) | u32::from(readable) << n | u32::from(writable) << (n + 8);
    }

    /// To be called after CS, EFER.LMA or CR0.PE changed.
    pub fn code_segment_changed(&mut self) {
        let cs = &self.s.segments[index::CS];
        self.bits = if self.long() && cs.has(attr::L) {
            64
        } else if cs.has(attr::DB) {
            32
        } else {
            16
        };
        self.attend(attention::LIMIT, self.bits != 64 && cs.limit != u32::MAX);
        self.stack_segment_changed();
        self.context_changed();
    }

    fn stack_segment_changed(&mut self) {
        self.stack_mask = if self.bits == 64 {
            u64::MAX
        } else if self.s.segments[index::SS].has(attr::DB) {
            0xffff_ffff
        } else {
            0xffff
        };
    }

    /// Sets the privilege level.
    pub fn set_cpl(&mut self, cpl: u8) {
        self.cpl = cpl & 3;
        self.rights_changed();
    }

    /// To be called after DR7, or what the debugger wants, changed.
    pub fn breakpoints_changed(&mut self) {
        let enabled = |n: usize| self.s.dr7 >> (2 * n) & 3 != 0;
        let kind = |n: usize| self.s.dr7 >> (16 + 4 * n) & 3;
        let code = (0..4).any(|n| enabled(n) && kind(n) == 0);
        let data = (0..4).any(|n| enabled(n) && kind(n) & 1 != 0);
        let debugger = self.debug.step || !self.debug.breakpoints.is_empty();
        let ports = self.s.cr4 & cr4::DE != 0 && (0..4).any(|n| enabled(n) && kind(n) == 2);
        // Data breakpoints trap right after the instruction, so each is looked at.
        self.attend(attention::BREAKPOINTS, code || data || ports);
        self.attend(attention::DEBUGGER, debugger || !self.debug.watchpoints.is_empty());
        self.watched = data || !self.debug.watchpoints.is_empty();
        self.tlb.flush_all();
        self.context_changed();
    }

    /// What CPUID is to know of this vCPU.
    pub fn live(&self) -> Live {
        Live { apic_id: self.local.id(), osxsave: self.s.cr4 & cr4::OSXSAVE != 0, xcr0: self.s.xcr0 }
    }

    /// The linear address of code at `rip`.
    #[inline]
    pub fn code_linear(&self, rip: u64) -> u64 {
        if self.bits == 64 { rip } else { self.s.segments[index::CS].base.wrapping_add(rip) & 0xffff_ffff }
    }

    /// A vCPU that was just reset.
    pub fn new(machine: Arc<Machine>, local: Arc<apic::Local>, cpuid: Arc<Cpuid>, number: u32) -> Self {
        let state = State::reset(number == 0, cpuid.signature());
        let apic = local.clone();
        let mut core = Self {
            keeper: machine.memory.keeper(move || apic.kick()),
            r: [0; 32],
            rip: 0,
            lazy: Lazy::default(),
            rflags: 0,
            poll: 0,
            attention: 0,
            context: 0,
            bank: 0,
            cpl: 0,
            bits: 16,
            stack_mask: 0xffff,
            flat: 0,
            hit: false,
            exception: Exception::UD,
            pending_db: 0,
            tlb: Box::default(),
            memory: machine.memory.clone(),
            s: state.clone(),
            pdpte: [0; 4],
            fpu: native::SimdState::default(),
            simd: crate::simd::Simd::default(),
            machine,
            local,
            cpuid,
            count: Counters::default(),
            watch_hit: None,
            debug: machine::cpu::Debug::default(),
            watched: false,
            pv: crate::pv::Pv::default(),
            delivered: false,
            traps_wait: false,
        };
        core.load_state(&state);
        core
    }

    /// The whole state in its canonical form.
    pub fn save(&mut self) -> State {
        let mut s = self.s.clone();
        s.gpr.copy_from_slice(&self.r[..16]);
        s.rip = self.rip;
        s.rflags = self.get_flags();
        s.fpu = crate::simd::to_canonical(&self.fpu);
        s.events.shadow = self.attention & attention::SHADOW != 0;
        s
    }

    /// Takes a canonical state.
    pub fn load_state(&mut self, s: &State) {
        self.s = s.clone();
        self.r[..16].copy_from_slice(&s.gpr);
        self.rip = s.rip;
        self.fpu = crate::simd::from_canonical(&s.fpu);
        self.s.dr7 |= dr7::FIXED;
        self.cpl = if s.cr0 & cr0::PE == 0 {
            0
        } else if s.rflags & flags::VM != 0 {
            3
        } else {
            s.segments[index::SS].dpl()
        };
        self.attention = 0;
        for n in 0..6 {
            self.set_segment(n, s.segments[n]);
        }
        self.set_flags(s.rflags);
        self.attend(attention::SHADOW, s.events.shadow);
        self.attend(attention::IDLE, s.activity != machine::cpu::Activity::Running);
        let events = &s.events;
        self.attend(
            attention::EVENT,
            events.exception.is_some() || events.interrupt.is_some() || events.nmi_pending,
        );
        self.tlb.flush_all();
        self.load_pdptes_quietly();
        self.breakpoints_changed();
        self.rights_changed();
    }
}
