//! x87, MMX, SSE and AVX instructions: their checks and their memory here, their arithmetic on the host's processor.

mod control;
mod gather;
mod state;
mod store;

use iced_x86::{
    Code, CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic as M, OpAccess, OpKind,
    Register,
};
use native::{Bounce, Outcome, StubId, Stubs};
use x86::Exception;
use x86::control::{cr0, cr4, xcr0};
use x86::exception::vector;

use crate::core::Core;
use crate::flags::Lazy;
use crate::op::{Flow, Handler, Op, Result, slot};

pub use state::{from_canonical, to_canonical};

/// Compiled instructions are found by a small cache in front of [`Stubs::compile`].
const CACHED: usize = 2048;

/// State of the SIMD handlers, beside the registers in [`Core::fpu`].
#[derive(Default)]
pub struct Simd {
    stubs: Option<Stubs>,
    bounce: Bounce,
    cache: Vec<Option<Box<Entry>>>,
}

/// An instruction that the host executes, and what is to be done around it.
#[derive(Clone, Copy)]
struct Entry {
    instruction: Instruction,
    id: StubId,
    plan: Plan,
}

#[derive(Clone, Copy, Default)]
struct Plan {
    /// Bytes of the memory operand; 0 where there is none.
    size: u8,
    reads: bool,
    writes: bool,
    /// Alignment that the operand must have, less 1.
    align: u8,
    /// RFLAGS are read or written.
    flags: bool,
    /// x87 instructions leave a trace in FIP and FDP.
    x87: bool,
    /// x87 and MMX instructions report an x87 exception that is pending.
    waits: bool,
}

/// The kind of an instruction, which decides about the checks before it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    X87,
    Mmx,
    Sse,
    Avx,
    /// General registers only.
    Plain,
}

impl Class {
    fn of(i: &Instruction) -> Self {
        if i.encoding() == EncodingKind::VEX {
            let gpr = i.op_count() > 0
                && (0..i.op_count()).all(|n| match i.op_kind(n) {
                    OpKind::Register => i.op_register(n).is_gpr(),
                    _ => true,
                });
            let simd = i.cpuid_features().iter().any(|f| matches!(f, CpuidFeature::AVX | CpuidFeature::AVX2));
            return if gpr && !simd { Self::Plain } else { Self::Avx };
        }
        let registers =
            || (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register).map(|n| i.op_register(n));
        if i.cpuid_features()
            .iter()
            .any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387))
        {
            Self::X87
        } else if registers().any(Register::is_xmm) {
            // CVTPI2PS and the like have registers of both kinds; the stub does what belongs to MMX.
            Self::Sse
        } else if registers().any(|r| r.is_mm()) || matches!(i.mnemonic(), M::Emms | M::Maskmovq) {
            Self::Mmx
        } else if i.cpuid_features().iter().any(|f| {
            matches!(f, CpuidFeature::SSE | CpuidFeature::SSE2 | CpuidFeature::SSE3 | CpuidFeature::SSE4_1)
        }) {
            Self::Sse
        } else {
            Self::Plain
        }
    }

    /// #UD and #NM, in the order of the manual (SDM vol. 2A, 2.4; vol. 3A, 13.1 to 13.4, 2.5).
    #[inline]
    fn check(self, c: &mut Core) -> Result<()> {
        let (zero, four) = (c.s.cr0, c.s.cr4);
        let undefined = match self {
            Self::Plain => return Ok(()),
            Self::X87 => false,
            Self::Mmx => zero & cr0::EM != 0,
            Self::Sse => zero & cr0::EM != 0 || four & cr4::OSFXSR == 0,
            Self::Avx => {
                let both = xcr0::SSE | xcr0::AVX;
                four & cr4::OSXSAVE == 0 || c.s.xcr0 & both != both || !c.protected()
            }
        };
        if undefined {
            return c.ud();
        }
        if zero & cr0::TS != 0 || self == Self::X87 && zero & cr0::EM != 0 {
            return c.raise(Exception::NM);
        }
        Ok(())
    }
}

/// The checks before an instruction that is executed elsewhere.
pub fn check(c: &mut Core, op: &Op) -> Result<()> {
    match op.instruction.as_deref() {
        Some(i) => Class::of(i).check(c),
        None => c.ud(),
    }
}

/// The handler of an x87 or SIMD instruction, if it is one.
pub fn handler(i: &Instruction, op: &mut Op) -> Option<Handler> {
    if let Some(h) = control::handler(i).or_else(|| store::handler(i)).or_else(|| gather::handler(i)) {
        return Some(h);
    }
    if !native::listed(i.code()) {
        return None;
    }
    op.size = i.memory_size().size().min(64) as u8;
    Some(match Class::of(i) {
        Class::X87 => run::<0>,
        Class::Mmx => run::<1>,
        Class::Sse => run::<2>,
        Class::Avx => run::<3>,
        Class::Plain => run::<4>,
    })
}

const CLASSES: [Class; 5] = [Class::X87, Class::Mmx, Class::Sse, Class::Avx, Class::Plain];

/// Executes an instruction on the host.
fn run<const CLASS: usize>(c: &mut Core, op: &Op) -> Result<Flow> {
    CLASSES[CLASS].check(c)?;
    let Some(instruction) = op.instruction.as_deref() else { return c.ud() };
    let Some((id, plan)) = find(c, instruction) else { return c.ud() };
    if plan.waits {
        // Before the operand is looked at: #MF comes before its faults.
        control::check_pending(c)?;
    }
    if plan.size == 0 {
        execute(c, op, id, plan)?;
        return Ok(Flow::Next);
    }

    let size = u64::from(plan.size);
    let linear = c.operand(op, size, plan.writes)?;
    if linear & u64::from(plan.align) != 0 {
        return c.gp();
    }
    let place = c.place(linear, size, plan.writes, op.segment, c.bank)?;
    if plan.reads {
        let mut bytes = [0; 64];
        c.place_read_bytes(&place, &mut bytes[..usize::from(plan.size)]);
        c.simd.bounce.bytes = bytes;
    }
    if execute(c, op, id, plan)? && plan.writes {
        let bytes = c.simd.bounce.bytes;
        c.place_write_bytes(&place, &bytes[..usize::from(plan.size)]);
        return Ok(if c.hit || c.attention != 0 { Flow::End } else { Flow::Next });
    }
    Ok(if c.attention != 0 { Flow::End } else { Flow::Next })
}

/// Calls the stub. False if the result is not to be stored.
fn execute(c: &mut Core, op: &Op, id: StubId, plan: Plan) -> Result<bool> {
    let mut flags = if plan.flags { c.get_flags() } else { 0 };
    let Some(gprs) = c.r.first_chunk_mut::<16>() else { return c.ud() };
    let Some(stubs) = &c.simd.stubs else { return c.ud() };
    let outcome = stubs.run(id, &mut c.fpu, gprs, &mut flags, &mut c.simd.bounce);
    match outcome {
        Outcome::Done | Outcome::NotStored => {}
        Outcome::SimdException if c.s.cr4 & cr4::OSXMMEXCPT != 0 => {
            return c.raise(Exception::new(vector::XM));
        }
        Outcome::PendingX87 => return c.raise(Exception::new(vector::MF)),
        Outcome::SimdException | Outcome::Stale => return c.ud(),
    }
    if plan.flags {
        c.lazy = Lazy::from_bits(flags);
    }
    if plan.x87 {
        c.fpu.fip = instruction_pointer(c, op);
        if op.memory {
            c.fpu.fdp = c.effective(op);
        }
    }
    Ok(outcome == Outcome::Done)
}

/// RIP of the instruction that runs.
fn instruction_pointer(c: &Core, op: &Op) -> u64 {
    c.r[usize::from(slot::START)].wrapping_add(u64::from(op.end) - u64::from(op.len))
}

/// The stub of an instruction, compiled where it is not in the cache.
fn find(c: &mut Core, instruction: &Instruction) -> Option<(StubId, Plan)> {
    let simd = &mut c.simd;
    if simd.cache.is_empty() {
        simd.cache.resize_with(CACHED, || None);
    }
    let at = (std::ptr::from_ref(instruction).addr() >> 5) % CACHED;
    if let Some(entry) = &simd.cache[at]
        && entry.instruction == *instruction
    {
        return Some((entry.id, entry.plan));
    }
    let stubs = match &mut simd.stubs {
        Some(stubs) => stubs,
        none => none.insert(Stubs::new().ok()?),
    };
    let id = match stubs.compile(instruction) {
        Err(native::Unsupported::Full) => {
            stubs.reset();
            simd.cache.fill_with(|| None);
            stubs.compile(instruction).ok()?
        }
        compiled => compiled.ok()?,
    };
    let plan = Plan::of(instruction);
    simd.cache[at] = Some(Box::new(Entry { instruction: *instruction, id, plan }));
    Some((id, plan))
}

impl Plan {
    fn of(i: &Instruction) -> Self {
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(i);
        let mut plan = Self {
            flags: i.rflags_read() | i.rflags_modified() != 0,
            x87: Class::of(i) == Class::X87,
            waits: Class::of(i) == Class::X87 || (0..i.op_count()).any(|n| i.op_register(n).is_mm()),
            ..Self::default()
        };
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        if !memory {
            return plan;
        }
        plan.size = i.memory_size().size().min(64) as u8;
        for used in info.used_memory() {
            let access = used.access();
            plan.reads |= !matches!(access, OpAccess::Write | OpAccess::CondWrite);
            plan.writes |= !matches!(access, OpAccess::Read | OpAccess::CondRead);
        }
        // A conditional store leaves what is there.
        plan.reads |= info.used_memory().iter().any(|u| u.access() == OpAccess::CondWrite);
        if alignment_counts(i) {
            plan.align = plan.size - 1;
        }
        plan
    }
}

/// Whether a misaligned operand is #GP: 16 bytes in a legacy SSE instruction that does not say otherwise, VMOVA* and VMOVNT*
/// (SDM vol. 2A, tables 2-17 to 2-20).
pub fn alignment_counts(i: &Instruction) -> bool {
    if i.encoding() == EncodingKind::VEX {
        return matches!(
            i.mnemonic(),
            M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa
        );
    }
    let unaligned = matches!(
        i.mnemonic(),
        M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpistri
            | M::Pcmpistrm
            | M::Pcmpestri
            | M::Pcmpestrm
    ) || matches!(i.mnemonic(), M::Pcmpestri64 | M::Pcmpestrm64);
    // AMD's processors do not care with SHA either; Intel's do (SDM vol. 2A, table 2-21).
    let unaligned = unaligned || i.cpuid_features().contains(&CpuidFeature::SHA);
    i.memory_size().size() == 16 && !unaligned && !is_x87_memory(i.code())
}

fn is_x87_memory(code: Code) -> bool {
    code.cpuid_features()
        .iter()
        .any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387))
}
