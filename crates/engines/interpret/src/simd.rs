//! x87, MMX, SSE and AVX instructions, executed by the host's processor through `native`.

use std::collections::HashMap;

use iced_x86::{
    CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};
use machine::cpu::Fpu;
use native::{Bounce, Outcome, SimdState, StubId, Stubs};
use x86::Exception;
use x86::control::{cr0, cr4};
use x86::exception::vector;

use crate::core::Core;
use crate::op::{Flow, Handler, Op, Result};

/// The stubs of one vCPU.
#[derive(Default)]
pub struct Simd {
    stubs: Option<Stubs>,
    ids: HashMap<Instruction, StubId>,
    bounce: Bounce,
}

/// From the canonical form, where the x87 registers are relative to TOP.
pub fn from_canonical(f: &Fpu) -> SimdState {
    let mut s = SimdState {
        mxcsr: f.mxcsr,
        fcw: f.fcw,
        fsw: f.fsw,
        ftw: f.ftw,
        fop: f.fop,
        fip: f.fip,
        fdp: f.fdp,
        ..SimdState::default()
    };
    for (to, from) in s.ymm.iter_mut().zip(&f.ymm) {
        let half = |at: usize| u128::from_le_bytes(std::array::from_fn(|i| from[at + i]));
        *to = [half(0), half(16)];
    }
    for (i, st) in f.st.iter().enumerate() {
        let mut value = [0; 16];
        value[..10].copy_from_slice(st);
        s.fpr[(s.top() + i) % 8] = u128::from_le_bytes(value);
    }
    s
}

/// Into the canonical form.
pub fn to_canonical(s: &SimdState) -> Fpu {
    let mut f = Fpu {
        fcw: s.fcw,
        fsw: s.fsw,
        ftw: s.ftw,
        fop: s.fop,
        fip: s.fip,
        fdp: s.fdp,
        mxcsr: s.mxcsr,
        ..Fpu::default()
    };
    for (to, from) in f.ymm.iter_mut().zip(&s.ymm) {
        to[..16].copy_from_slice(&from[0].to_le_bytes());
        to[16..].copy_from_slice(&from[1].to_le_bytes());
    }
    for (i, st) in f.st.iter_mut().enumerate() {
        st.copy_from_slice(&s.fpr[(s.top() + i) % 8].to_le_bytes()[..10]);
    }
    f
}

fn is_x87(i: &Instruction) -> bool {
    i.cpuid_features()
        .iter()
        .any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387))
        || (Register::ST0..=Register::ST7).contains(&i.op0_register())
}

fn is_mmx(i: &Instruction) -> bool {
    i.mnemonic() == Mnemonic::Emms
        || (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm())
}

/// #UD and #NM by the control registers (SDM vol. 3A, table 2-2; vol. 2A, 2.4).
pub fn check(c: &mut Core, op: &Op) -> Result<()> {
    let Some(i) = &op.instruction else { return c.ud() };
    let s = &c.s;
    let ts = s.cr0 & cr0::TS != 0;
    let em = s.cr0 & cr0::EM != 0;
    let ud = if i.encoding() == EncodingKind::VEX {
        !c.protected() || s.cr4 & cr4::OSXSAVE == 0 || s.xcr0 & 6 != 6
    } else if is_x87(i) {
        if em || ts {
            return c.raise(Exception::NM);
        }
        false
    } else if is_mmx(i) {
        em
    } else {
        em || s.cr4 & cr4::OSFXSR == 0
    };
    if ud {
        return c.ud();
    }
    if ts { c.raise(Exception::NM) } else { Ok(()) }
}

/// The handler of an instruction that is about vector or x87 state, or none of ours.
pub fn handler(i: &Instruction, op: &mut Op) -> Option<Handler> {
    use Mnemonic as M;
    Some(match i.mnemonic() {
        M::Fninit => fninit,
        M::Fnclex => fnclex,
        M::Fnstcw => fnstcw,
        M::Fnstsw => fnstsw,
        M::Fldcw => fldcw,
        M::Wait => wait,
        M::Emms => emms,
        M::Fnop => x87_nop,
        _ if native::listed(i.code()) => {
            let mut factory = InstructionInfoFactory::new();
            let info = factory.info(i);
            let memory = info.used_memory().first().map(|m| m.access());
            match memory {
                None => run::<false, false>,
                Some(OpAccess::Write | OpAccess::CondWrite) => run::<false, true>,
                Some(OpAccess::ReadWrite | OpAccess::ReadCondWrite) => run::<true, true>,
                Some(_) => run::<true, false>,
            }
        }
        _ => {
            let _ = op;
            return None;
        }
    })
}

fn run<const R: bool, const W: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    check(c, op)?;
    let Some(i) = &op.instruction else { return c.ud() };
    let size = (i.memory_size().size() as u64).clamp(1, 64);
    let mut linear = 0;
    let mut place = None;
    if R || W {
        linear = c.operand(op, size, W)?;
        let aligned =
            size >= 16 && i.encoding() == EncodingKind::Legacy && !unaligned(i.mnemonic()) && !is_x87(i);
        let moves = matches!(
            i.mnemonic(),
            Mnemonic::Vmovaps
                | Mnemonic::Vmovapd
                | Mnemonic::Vmovdqa
                | Mnemonic::Vmovntps
                | Mnemonic::Vmovntpd
                | Mnemonic::Vmovntdq
                | Mnemonic::Vmovntdqa
        );
        if (aligned || moves) && linear & (size - 1) != 0 {
            return c.gp();
        }
        place = Some(c.place(linear, size, W, op.segment, c.bank)?);
    }
    let _ = linear;
    let mut simd = std::mem::take(&mut c.simd);
    let result = execute(c, &mut simd, i, place.as_ref().map(|p| (p, R, W)), size as usize);
    c.simd = simd;
    result
}

fn unaligned(m: Mnemonic) -> bool {
    matches!(
        m,
        Mnemonic::Movups
            | Mnemonic::Movupd
            | Mnemonic::Movdqu
            | Mnemonic::Lddqu
            | Mnemonic::Pcmpestri
            | Mnemonic::Pcmpestrm
            | Mnemonic::Pcmpistri
            | Mnemonic::Pcmpistrm
    )
}

fn execute(
    c: &mut Core,
    simd: &mut Simd,
    i: &Instruction,
    place: Option<(&crate::mmu::Place, bool, bool)>,
    size: usize,
) -> Result<Flow> {
    if simd.stubs.is_none() {
        simd.stubs = Stubs::new().ok();
    }
    let Some(stubs) = &mut simd.stubs else { return c.ud() };
    let id = match simd.ids.get(i) {
        Some(&id) => id,
        None => {
            let id = stubs.compile(i).or_else(|_| {
                stubs.reset();
                simd.ids.clear();
                stubs.compile(i)
            });
            let Ok(id) = id else { return c.ud() };
            simd.ids.insert(*i, id);
            id
        }
    };
    if let Some((place, true, _)) = place {
        c.place_read_bytes(place, &mut simd.bounce.bytes[..size]);
    }
    let mut flags = c.lazy.bits();
    let mut gprs = [0; 16];
    gprs.copy_from_slice(&c.r[..16]);
    let outcome = stubs.run(id, &mut c.fpu, &mut gprs, &mut flags, &mut simd.bounce);
    match outcome {
        Outcome::Done => {}
        Outcome::NotStored => return Ok(Flow::Next),
        Outcome::SimdException if c.s.cr4 & cr4::OSXMMEXCPT == 0 => return c.ud(),
        Outcome::SimdException => return c.raise(Exception::new(vector::XM)),
        Outcome::PendingX87 => return c.raise(Exception::new(vector::MF)),
        Outcome::Stale => return c.ud(),
    }
    c.r[..16].copy_from_slice(&gprs);
    c.lazy = crate::flags::Lazy::from_bits(flags);
    if let Some((place, _, true)) = place {
        c.place_write_bytes(place, &simd.bounce.bytes[..size]);
        return Ok(if c.hit { Flow::End } else { Flow::Next });
    }
    Ok(Flow::Next)
}

fn fninit(c: &mut Core, op: &Op) -> Result<Flow> {
    check(c, op)?;
    let f = &mut c.fpu;
    (f.fcw, f.fsw, f.ftw, f.fop, f.fip, f.fdp) = (0x37f, 0, 0, 0, 0, 0);
    Ok(Flow::Next)
}

fn fnclex(c: &mut Core, op: &Op) -> Result<Flow> {
    check(c, op)?;
    c.fpu.fsw &= 0x7f00;
    Ok(Flow::Next)
}

fn fnstcw(c: &mut Core, op: &Op) -> Result<Flow> {
    check(c, op)?;
    c.store(op, c.fpu.fcw)
}

fn fnstsw(c: &mut Core, op: &Op) -> Result<Flow> {
    check(c, op)?;
    let v = c.fpu.fsw;
    if op.memory { c.store(op, v) } else { c.set_rm::<u16, false>(op, v) }
}

fn pending(c: &mut Core) -> Result<()> {
    if c.fpu.fsw & 0x80 != 0 { c.raise(Exception::new(vector::MF)) } else { Ok(()) }
}

fn fldcw(c: &mut Core, op: &Op) -> Result<Flow> {
    check(c, op)?;
    pending(c)?;
    let v = c.load::<u16>(op)?;
    c.fpu.fcw = v & 0x1f7f | 0x40;
    let unmasked = c.fpu.fsw & !c.fpu.fcw & 0x3f != 0;
    c.fpu.fsw = c.fpu.fsw & 0x7f7f | if unmasked { 0x8080 } else { 0 };
    Ok(Flow::Next)
}

fn wait(c: &mut Core, _: &Op) -> Result<Flow> {
    let both = cr0::MP | cr0::TS;
    if c.s.cr0 & both == both {
        return c.raise(Exception::NM);
    }
    pending(c)?;
    Ok(Flow::Next)
}

fn emms(c: &mut Core, op: &Op) -> Result<Flow> {
    check(c, op)?;
    pending(c)?;
    c.fpu.ftw = 0;
    Ok(Flow::Next)
}

fn x87_nop(c: &mut Core, op: &Op) -> Result<Flow> {
    check(c, op)?;
    pending(c)?;
    Ok(Flow::Next)
}
