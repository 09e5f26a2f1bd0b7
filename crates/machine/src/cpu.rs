//! The canonical state of a CPU, and what an engine is.

use std::fmt;
use std::sync::Arc;

use memory::Gpa;
use serde::{Deserialize, Serialize};
use x86::control::{cr0, dr6, dr7};
use x86::segment::attr;
use x86::{Exception, Segment, Table, flags, msr};

/// Everything that an x86 vCPU is between two instructions, but for its LAPIC. Every engine can hand it over and take it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// By the numbers of [`x86::gpr`].
    pub gpr: [u64; 16],
    /// Linear offset in CS of the next instruction.
    pub rip: u64,
    /// With bit 1 set.
    pub rflags: u64,
    /// By the numbers of [`x86::segment::index`].
    pub segments: [Segment; 6],
    /// Local descriptor table.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: Table,
    /// Interrupt descriptor table.
    pub idtr: Table,
    /// Control registers. CR8 is the LAPIC's TPR.
    pub cr0: u64,
    /// Last page fault's address.
    pub cr2: u64,
    /// Page-table root.
    pub cr3: u64,
    /// Feature enables.
    pub cr4: u64,
    /// Extended features.
    pub efer: u64,
    /// Extended state enables.
    pub xcr0: u64,
    /// Breakpoint addresses.
    pub dr: [u64; 4],
    /// Breakpoint status.
    pub dr6: u64,
    /// Breakpoint control.
    pub dr7: u64,
    /// x87, MMX, SSE and AVX registers.
    pub fpu: Fpu,
    /// Model-specific registers that have no field of their own.
    pub msrs: Msrs,
    /// What the vCPU is about.
    pub activity: Activity,
    /// Events on their way.
    pub events: Events,
}

/// x87, MMX, SSE and AVX state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fpu {
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word, TOP included.
    pub fsw: u16,
    /// Abridged tag word, as FXSAVE has it: a set bit means that the physical register is not empty.
    pub ftw: u8,
    /// Last opcode.
    pub fop: u16,
    /// Last instruction's pointer, 64 bits as FXSAVE64 stores it (or selector in bits 32–47 in the 32-bit form).
    pub fip: u64,
    /// Last operand's pointer, likewise.
    pub fdp: u64,
    /// ST(0)–ST(7) (relative to TOP, as in FXSAVE): 80-bit values; MMX registers are their low halves by physical number.
    pub st: [[u8; 10]; 8],
    /// SSE control and status.
    pub mxcsr: u32,
    /// YMM0–15, little-endian; the low 16 bytes are XMM.
    pub ymm: [[u8; 32]; 16],
}

impl Default for Fpu {
    /// After FNINIT, with the MXCSR of reset.
    fn default() -> Self {
        Self {
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            st: [[0; 10]; 8],
            mxcsr: 0x1f80,
            ymm: [[0; 32]; 16],
        }
    }
}

/// MSRs that an engine keeps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Msrs {
    /// What the guest's TSC is ahead of [`crate::Clock::tsc`], modulo 2⁶⁴.
    pub tsc_offset: u64,
    pub tsc_adjust: u64,
    pub tsc_aux: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub xss: u64,
    pub spec_ctrl: u64,
    pub mtrr_def_type: u64,
    /// 64K_00000, 16K_80000, 16K_A0000, 4K_C0000 to 4K_F8000.
    pub mtrr_fixed: [u64; 11],
    /// Base and mask, eight pairs.
    pub mtrr_variable: [u64; 16],
    pub mcg_status: u64,
    pub kvm_system_time: u64,
    pub kvm_wall_clock: u64,
    pub kvm_steal_time: u64,
    pub kvm_async_pf: u64,
    pub kvm_pv_eoi: u64,
    pub kvm_poll_control: u64,
}

impl Default for Msrs {
    fn default() -> Self {
        Self {
            tsc_offset: 0,
            tsc_adjust: 0,
            tsc_aux: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            pat: msr::PAT_RESET,
            misc_enable: 1,
            xss: 0,
            spec_ctrl: 0,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_variable: [0; 16],
            mcg_status: 0,
            kvm_system_time: 0,
            kvm_wall_clock: 0,
            kvm_steal_time: 0,
            kvm_async_pf: 0,
            kvm_pv_eoi: 0,
            kvm_poll_control: 1,
        }
    }
}

/// What a vCPU is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// Executing instructions.
    #[default]
    Running,
    /// In HLT, until an interrupt.
    Halted,
    /// After INIT, waiting for a start-up IPI.
    WaitForSipi,
    /// After a triple fault.
    Shutdown,
}

/// Events between the instruction before and the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// An exception that was raised and is not yet delivered.
    pub exception: Option<Exception>,
    /// An external interrupt that was acknowledged and is not yet delivered.
    pub interrupt: Option<u8>,
    /// STI, MOV SS or POP SS came just before: no interrupt now.
    pub shadow: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// In an NMI's handler, until IRET.
    pub nmi_blocked: bool,
}

impl State {
    /// The state after power-on or RESET (SDM vol. 3A, table 9-1): real mode at f000:fff0, with CS's base at 0xffff0000. The
    /// boot processor runs, the others wait for a start-up IPI. `signature` is CPUID's (leaf 1 EAX), which comes in EDX.
    pub fn reset(boot: bool, signature: u32) -> Self {
        let data = Segment::real(0);
        let mut segments = [data; 6];
        segments[x86::segment::index::CS] = Segment {
            selector: 0xf000,
            attributes: attr::P | attr::S | attr::CODE | attr::RW | attr::ACCESSED,
            limit: 0xffff,
            base: 0xffff_0000,
        };
        let system = |kind| Segment { selector: 0, attributes: attr::P | kind, limit: 0xffff, base: 0 };
        let mut gpr = [0; 16];
        gpr[x86::gpr::RDX] = signature.into();
        Self {
            gpr,
            rip: 0xfff0,
            rflags: flags::FIXED,
            segments,
            ldtr: system(2),
            tr: system(11),
            gdtr: Table { base: 0, limit: 0xffff },
            idtr: Table { base: 0, limit: 0xffff },
            cr0: cr0::ET | cr0::NW | cr0::CD,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            dr: [0; 4],
            dr6: dr6::FIXED,
            dr7: dr7::FIXED,
            fpu: Fpu::default(),
            msrs: Msrs::default(),
            activity: if boot { Activity::Running } else { Activity::WaitForSipi },
            events: Events::default(),
        }
    }
}

/// Why [`Vcpu::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Somebody kicked it.
    Kicked,
    /// A triple fault.
    TripleFault,
    /// The debugger's business: a breakpoint of its is next, or was hit, or one step is done.
    Debug(Stop),
}

/// What stopped a vCPU for the debugger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// One instruction was executed.
    Step,
    /// The instruction at this linear address has a breakpoint and was not executed yet.
    Breakpoint(u64),
    /// A watched address was accessed.
    Watchpoint(u64),
}

/// What a debugger wants of a vCPU. Invisible to the guest: its own debug registers and TF work beside it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Debug {
    /// Stop after one instruction.
    pub step: bool,
    /// Linear addresses before whose instruction to stop. KVM has four for breakpoints and watchpoints together.
    pub breakpoints: Vec<u64>,
    /// Linear address, length in bytes, and whether reads count as well as writes.
    pub watchpoints: Vec<(u64, u64, bool)>,
}

/// Counters of one vCPU, in the order to print them.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Instructions executed, where the engine counts them.
    pub instructions: Option<u64>,
    /// What else the engine counts: exits by kind, blocks decoded …
    pub counters: Vec<(&'static str, u64)>,
    /// Time by phase, in nanoseconds.
    pub times: Vec<(&'static str, u64)>,
}

/// What went wrong with an engine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused something.
    #[error("{what}: {source}")]
    Host {
        /// What Lodge was about.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// The engine cannot go on with this guest.
    #[error("{0}")]
    Guest(String),
}

/// Makes [`Vcpu::run`] return soon, from any thread. A kick while the vCPU does not run is not lost.
pub trait Kick: Send + Sync {
    /// Makes it return [`Exit::Kicked`].
    fn kick(&self);
}

/// A virtual processor of some engine, run by one thread.
pub trait Vcpu: Send {
    /// Runs the guest until something for the owner happens. Halts are waited for inside; devices are reached through the
    /// machine's buses.
    ///
    /// # Errors
    /// The host failed, or the engine cannot run this guest.
    fn run(&mut self) -> Result<Exit, Error>;

    /// The state between the last instruction and the next.
    ///
    /// # Errors
    /// The host failed.
    fn state(&mut self) -> Result<State, Error>;

    /// Goes on from `state`.
    ///
    /// # Errors
    /// The host failed, or the state is not one that this engine can run.
    fn set_state(&mut self, state: &State) -> Result<(), Error>;

    /// What the debugger wants from now on.
    ///
    /// # Errors
    /// The engine cannot: too many breakpoints, or the host failed.
    fn debug(&mut self, debug: &Debug) -> Result<(), Error>;

    /// Where a linear address lies now, without any effect on the guest.
    fn translate(&mut self, linear: u64) -> Option<Gpa>;

    /// A handle to kick it by.
    fn kicker(&self) -> Arc<dyn Kick>;

    /// What it counted.
    fn stats(&self) -> Stats;
}

impl fmt::Debug for dyn Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Vcpu")
    }
}
