//! Saving and restoring vector state: FXSAVE, the XSAVE family, MXCSR, XCR0 (SDM vol. 1, chapter 13).
//!
//! Components are x87 (0), SSE (1) and AVX (2). Only AVX lies in the extended region, so the compacted form has the same
//! layout as the standard one.

use native::SimdState;
use x86::Exception;
use x86::control::{cr0, cr4, xcr0};
use x86::gpr::{RAX, RCX, RDX};

use crate::core::Core;
use crate::op::{Flow, Op, Result};

/// XSAVE.
pub const PLAIN: u8 = 0;
/// XSAVEOPT.
pub const OPT: u8 = 1;
/// XSAVEC.
pub const COMPACT: u8 = 2;
/// XSAVES.
pub const SUPERVISOR: u8 = 3;

const HEADER: usize = 512;
const AVX: usize = 576;
const SIZE: usize = 832;
/// In XCOMP_BV: the compacted form.
const COMPACTED: u64 = 1 << 63;
/// The bits of MXCSR that exist.
const MXCSR_MASK: u32 = 0xffff;

impl Core {
    /// #NM if CR0.TS, #UD if CR0.EM.
    fn check_fxsave(&mut self) -> Result<()> {
        if self.s.cr0 & (cr0::EM | cr0::TS) != 0 { self.raise(Exception::NM) } else { Ok(()) }
    }

    fn check_xsave(&mut self) -> Result<()> {
        if self.s.cr4 & cr4::OSXSAVE == 0 {
            return self.ud();
        }
        if self.s.cr0 & cr0::TS != 0 { self.raise(Exception::NM) } else { Ok(()) }
    }

    /// An area of any length at an op's operand, aligned to `align`: accessed piece by piece after all of it was made
    /// sure of.
    fn area(&mut self, op: &Op, len: u64, align: u64, write: bool) -> Result<u64> {
        let linear = self.operand(op, len, write)?;
        if linear & (align - 1) != 0 {
            return self.gp();
        }
        self.place(linear, 1, write, op.segment, self.bank)?;
        self.place(linear.wrapping_add(len - 1), 1, write, op.segment, self.bank)?;
        Ok(linear)
    }

    fn write_area(&mut self, op: &Op, linear: u64, bytes: &[u8]) -> Result<()> {
        for (i, chunk) in bytes.chunks(64).enumerate() {
            let at = linear.wrapping_add(64 * i as u64);
            let place = self.place(at, chunk.len() as u64, true, op.segment, self.bank)?;
            self.place_write_bytes(&place, chunk);
        }
        Ok(())
    }

    fn read_area(&mut self, op: &Op, linear: u64, bytes: &mut [u8]) -> Result<()> {
        for (i, chunk) in bytes.chunks_mut(64).enumerate() {
            self.read_bytes(linear.wrapping_add(64 * i as u64), op.segment, chunk)?;
        }
        Ok(())
    }
}

fn put(area: &mut [u8], at: usize, bytes: &[u8]) {
    area[at..at + bytes.len()].copy_from_slice(bytes);
}

fn word<const N: usize>(area: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| area[at + i])
}

/// Whether the 64-bit form of the pointers is saved.
fn wide(op: &Op) -> bool {
    use iced_x86::Mnemonic as M;
    op.instruction.as_ref().is_some_and(|i| {
        matches!(
            i.mnemonic(),
            M::Fxsave64
                | M::Fxrstor64
                | M::Xsave64
                | M::Xsaveopt64
                | M::Xsavec64
                | M::Xsaves64
                | M::Xrstor64
                | M::Xrstors64
        )
    })
}

/// Writes the x87 part of the legacy region.
fn put_x87(area: &mut [u8], f: &SimdState, wide: bool) {
    put(area, 0, &f.fcw.to_le_bytes());
    put(area, 2, &f.fsw.to_le_bytes());
    area[4] = f.ftw;
    area[5] = 0;
    put(area, 6, &f.fop.to_le_bytes());
    let keep = if wide { u64::MAX } else { 0xffff_ffff_ffff };
    put(area, 8, &(f.fip & keep).to_le_bytes());
    put(area, 16, &(f.fdp & keep).to_le_bytes());
    for i in 0..8 {
        let v = f.fpr[(f.top() + i) % 8] & ((1 << 80) - 1);
        put(area, 32 + 16 * i, &v.to_le_bytes());
    }
}

fn get_x87(area: &[u8], f: &mut SimdState, wide: bool) {
    f.fcw = u16::from_le_bytes(word(area, 0)) & 0x1f7f | 0x40;
    f.fsw = u16::from_le_bytes(word(area, 2));
    f.ftw = area[4];
    f.fop = u16::from_le_bytes(word(area, 6)) & 0x7ff;
    let keep = if wide { u64::MAX } else { 0xffff_ffff_ffff };
    f.fip = u64::from_le_bytes(word(area, 8)) & keep;
    f.fdp = u64::from_le_bytes(word(area, 16)) & keep;
    for i in 0..8 {
        f.fpr[(f.top() + i) % 8] = u128::from_le_bytes(word(area, 32 + 16 * i)) & ((1 << 80) - 1);
    }
}

fn clear_x87(f: &mut SimdState) {
    let fresh = SimdState::default();
    (f.fcw, f.fsw, f.ftw, f.fop, f.fip, f.fdp, f.fpr) =
        (fresh.fcw, fresh.fsw, fresh.ftw, fresh.fop, fresh.fip, fresh.fdp, fresh.fpr);
}

fn put_xmm(area: &mut [u8], f: &SimdState, count: usize) {
    for (i, r) in f.ymm.iter().enumerate().take(count) {
        put(area, 160 + 16 * i, &r[0].to_le_bytes());
    }
}

fn get_xmm(area: &[u8], f: &mut SimdState, count: usize) {
    for (i, r) in f.ymm.iter_mut().enumerate().take(count) {
        r[0] = u128::from_le_bytes(word(area, 160 + 16 * i));
    }
}

/// XMM and YMM registers that the mode has.
fn registers(c: &Core) -> usize {
    if c.bits == 64 { 16 } else { 8 }
}

/// FXSAVE.
pub fn fxsave(c: &mut Core, op: &Op) -> Result<Flow> {
    c.check_fxsave()?;
    let linear = c.area(op, 512, 16, true)?;
    let mut area = [0; 416];
    put_x87(&mut area, &c.fpu, wide(op));
    put(&mut area, 24, &c.fpu.mxcsr.to_le_bytes());
    put(&mut area, 28, &MXCSR_MASK.to_le_bytes());
    put_xmm(&mut area, &c.fpu, registers(c));
    let len = 160 + 16 * registers(c);
    c.write_area(op, linear, &area[..len])?;
    Ok(Flow::End)
}

/// FXRSTOR.
pub fn fxrstor(c: &mut Core, op: &Op) -> Result<Flow> {
    c.check_fxsave()?;
    let linear = c.area(op, 512, 16, false)?;
    let mut area = [0; 512];
    c.read_area(op, linear, &mut area)?;
    let mxcsr = u32::from_le_bytes(word(&area, 24));
    if mxcsr & !MXCSR_MASK != 0 {
        return c.gp();
    }
    get_x87(&area, &mut c.fpu, wide(op));
    c.fpu.mxcsr = mxcsr;
    let count = registers(c);
    get_xmm(&area, &mut c.fpu, count);
    Ok(Flow::Next)
}

/// Which components are not in their initial state.
fn in_use(c: &Core) -> u64 {
    let (f, fresh) = (&c.fpu, SimdState::default());
    let x87 = (f.fcw, f.fsw, f.ftw, f.fop, f.fip, f.fdp) != (fresh.fcw, fresh.fsw, fresh.ftw, 0, 0, 0)
        || f.fpr.iter().any(|&r| r != 0);
    let count = registers(c);
    let xmm = f.ymm.iter().take(count).any(|r| r[0] != 0);
    let ymm = f.ymm.iter().take(count).any(|r| r[1] != 0);
    u64::from(x87) | u64::from(xmm) << 1 | u64::from(ymm) << 2
}

fn requested(c: &Core) -> u64 {
    (c.r[RDX] << 32 | c.r[RAX] & 0xffff_ffff) & c.s.xcr0
}

/// XSAVE, XSAVEOPT, XSAVEC and XSAVES.
pub fn save<const K: u8>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.check_xsave()?;
    if K == SUPERVISOR {
        c.privileged()?;
    }
    let rfbm = requested(c);
    let compact = K >= COMPACT;
    let len = if rfbm & xcr0::AVX != 0 { SIZE } else { AVX };
    let linear = c.area(op, len as u64, 64, true)?;
    let used = in_use(c);
    let mut area = [0; SIZE];
    c.read_area(op, linear, &mut area[..len])?;
    // MXCSR belongs to SSE's component, and is saved with AVX too, in the standard form.
    let mxcsr_used = c.fpu.mxcsr != 0x1f80;
    let bits = if compact && mxcsr_used { used | xcr0::SSE } else { used } & rfbm;
    let write = if K == PLAIN { rfbm } else { bits };
    if write & xcr0::X87 != 0 {
        put_x87(&mut area, &c.fpu, wide(op));
    }
    let mxcsr = if compact { write & xcr0::SSE } else { rfbm & (xcr0::SSE | xcr0::AVX) };
    if mxcsr != 0 {
        put(&mut area, 24, &c.fpu.mxcsr.to_le_bytes());
        put(&mut area, 28, &MXCSR_MASK.to_le_bytes());
    }
    if write & xcr0::SSE != 0 {
        put_xmm(&mut area, &c.fpu, registers(c));
    }
    if write & xcr0::AVX != 0 {
        for i in 0..registers(c) {
            put(&mut area, AVX + 16 * i, &c.fpu.ymm[i][1].to_le_bytes());
        }
    }
    let old = u64::from_le_bytes(word(&area, HEADER));
    let bv = if compact { bits } else { old & !rfbm | used & rfbm };
    put(&mut area, HEADER, &bv.to_le_bytes());
    if compact {
        put(&mut area, HEADER + 8, &(rfbm | COMPACTED).to_le_bytes());
    }
    c.write_area(op, linear, &area[..len])?;
    Ok(Flow::End)
}

/// XRSTOR, and XRSTORS with `S`.
pub fn restore<const S: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.check_xsave()?;
    if S {
        c.privileged()?;
    }
    let rfbm = requested(c);
    let linear = c.area(op, AVX as u64, 64, false)?;
    let mut area = [0; SIZE];
    c.read_area(op, linear, &mut area[..AVX])?;
    let bv = u64::from_le_bytes(word(&area, HEADER));
    let comp = u64::from_le_bytes(word(&area, HEADER + 8));
    let compact = comp & COMPACTED != 0;
    let bad = if compact {
        let present = comp & !COMPACTED;
        present & !c.s.xcr0 != 0 || bv & !present != 0 || area[HEADER + 16..AVX].iter().any(|&b| b != 0)
    } else {
        S || bv & !c.s.xcr0 != 0 || area[HEADER + 8..HEADER + 24].iter().any(|&b| b != 0)
    };
    if bad {
        return c.gp();
    }
    let load = rfbm & bv;
    if load & xcr0::AVX != 0 {
        c.area(op, SIZE as u64, 64, false)?;
        c.read_area(op, linear.wrapping_add(AVX as u64), &mut area[AVX..])?;
    }
    let mxcsr = u32::from_le_bytes(word(&area, 24));
    let wants = if compact { load & xcr0::SSE } else { rfbm & (xcr0::SSE | xcr0::AVX) };
    if wants != 0 && mxcsr & !MXCSR_MASK != 0 {
        return c.gp();
    }
    take(c, &area, rfbm, load, wide(op));
    if wants != 0 {
        c.fpu.mxcsr = mxcsr;
    } else if compact && rfbm & xcr0::SSE != 0 {
        c.fpu.mxcsr = 0x1f80;
    }
    Ok(Flow::Next)
}

/// Loads the components of `load`, and puts the rest of `rfbm` into their initial state.
fn take(c: &mut Core, area: &[u8; SIZE], rfbm: u64, load: u64, wide: bool) {
    let count = registers(c);
    let f = &mut c.fpu;
    if load & xcr0::X87 != 0 {
        get_x87(area, f, wide);
    } else if rfbm & xcr0::X87 != 0 {
        clear_x87(f);
    }
    if load & xcr0::SSE != 0 {
        get_xmm(area, f, count);
    } else if rfbm & xcr0::SSE != 0 {
        f.ymm.iter_mut().take(count).for_each(|r| r[0] = 0);
    }
    if load & xcr0::AVX != 0 {
        for (i, r) in f.ymm.iter_mut().enumerate().take(count) {
            r[1] = u128::from_le_bytes(word(area, AVX + 16 * i));
        }
    } else if rfbm & xcr0::AVX != 0 {
        f.ymm.iter_mut().take(count).for_each(|r| r[1] = 0);
    }
}

/// XGETBV.
pub fn xgetbv(c: &mut Core, _: &Op) -> Result<Flow> {
    if c.s.cr4 & cr4::OSXSAVE == 0 {
        return c.ud();
    }
    let v = match c.r[RCX] as u32 {
        0 => c.s.xcr0,
        1 if c.cpuid.has(x86::cpuid::Feature::XGETBV1) => {
            let mxcsr = u64::from(c.fpu.mxcsr != 0x1f80) << 1;
            (in_use(c) | mxcsr) & c.s.xcr0
        }
        _ => return c.gp(),
    };
    c.r[RAX] = v & 0xffff_ffff;
    c.r[RDX] = v >> 32;
    Ok(Flow::Next)
}

/// XSETBV.
pub fn xsetbv(c: &mut Core, _: &Op) -> Result<Flow> {
    if c.s.cr4 & cr4::OSXSAVE == 0 {
        return c.ud();
    }
    c.privileged()?;
    let v = c.r[RDX] << 32 | c.r[RAX] & 0xffff_ffff;
    let avx_alone = v & (xcr0::SSE | xcr0::AVX) == xcr0::AVX;
    if c.r[RCX] as u32 != 0 || v & xcr0::X87 == 0 || v & !c.cpuid.xcr0() != 0 || avx_alone {
        return c.gp();
    }
    c.s.xcr0 = v;
    Ok(Flow::End)
}

/// LDMXCSR.
pub fn ldmxcsr(c: &mut Core, op: &Op) -> Result<Flow> {
    crate::simd::check(c, op)?;
    let v = c.load::<u32>(op)?;
    if v & !MXCSR_MASK != 0 {
        return c.gp();
    }
    c.fpu.mxcsr = v;
    Ok(Flow::Next)
}

/// STMXCSR.
pub fn stmxcsr(c: &mut Core, op: &Op) -> Result<Flow> {
    crate::simd::check(c, op)?;
    c.store(op, c.fpu.mxcsr)
}
