//! Moves that say more about memory than about numbers: non-temporal and masked ones.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use super::{Class, control};
use crate::core::Core;
use crate::op::{Flow, Handler, Op, Result};

/// The handler, if the instruction is one of these.
pub fn handler(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        M::Movntps | M::Movntpd | M::Movntdq => non_temporal::<false>,
        M::Vmovntps | M::Vmovntpd | M::Vmovntdq => non_temporal::<true>,
        M::Movntq => movntq,
        M::Movntdqa => load_non_temporal::<false>,
        M::Vmovntdqa => load_non_temporal::<true>,
        M::Maskmovq => maskmov::<8>,
        M::Maskmovdqu => maskmov::<16>,
        M::Vmaskmovdqu => maskmov::<32>,
        M::Vmaskmovps | M::Vpmaskmovd => masked::<4>,
        M::Vmaskmovpd | M::Vpmaskmovq => masked::<8>,
        _ => return None,
    })
}

/// Bytes of a vector register.
pub fn bytes(c: &Core, n: usize) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&c.fpu.ymm[n & 15][0].to_le_bytes());
    bytes[16..].copy_from_slice(&c.fpu.ymm[n & 15][1].to_le_bytes());
    bytes
}

/// Sets a vector register.
pub fn set_bytes(c: &mut Core, n: usize, bytes: &[u8; 32]) {
    let half = |at: usize| u128::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    c.fpu.ymm[n & 15] = [half(0), half(16)];
}

/// Reads any number of bytes. Nothing is read if any of them cannot be.
pub fn read_all(c: &mut Core, linear: u64, segment: u8, to: &mut [u8]) -> Result<()> {
    let places = places(c, linear, segment, to.len(), false)?;
    for (place, piece) in places.iter().zip(to.chunks_mut(64)) {
        c.place_read_bytes(place, piece);
    }
    Ok(())
}

/// Writes any number of bytes. Nothing is written if any of them cannot be.
pub fn write_all(c: &mut Core, linear: u64, segment: u8, from: &[u8]) -> Result<()> {
    let places = places(c, linear, segment, from.len(), true)?;
    for (place, piece) in places.iter().zip(from.chunks(64)) {
        c.place_write_bytes(place, piece);
    }
    Ok(())
}

fn places(c: &mut Core, linear: u64, segment: u8, len: usize, write: bool) -> Result<Vec<crate::mmu::Place>> {
    (0..len)
        .step_by(64)
        .map(|at| c.place(linear.wrapping_add(at as u64), (len - at).min(64) as u64, write, segment, c.bank))
        .collect()
}

/// Number of a vector register operand.
pub fn vector(i: &Instruction, n: u32) -> usize {
    i.op_register(n).number() & 15
}

fn size_of_operand(i: &Instruction) -> usize {
    i.memory_size().size().min(32)
}

fn non_temporal<const VEX: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    if VEX { Class::Avx } else { Class::Sse }.check(c)?;
    let Some(i) = op.instruction.as_deref() else { return c.ud() };
    let size = size_of_operand(i);
    let linear = c.operand(op, size as u64, true)?;
    if linear & (size as u64 - 1) != 0 {
        return c.gp();
    }
    let value = bytes(c, vector(i, 1));
    write_all(c, linear, op.segment, &value[..size])?;
    Ok(Flow::End)
}

fn movntq(c: &mut Core, op: &Op) -> Result<Flow> {
    Class::Mmx.check(c)?;
    control::check_pending(c)?;
    let Some(i) = op.instruction.as_deref() else { return c.ud() };
    let value = c.fpu.fpr[i.op_register(1).number() & 7] as u64;
    let flow = c.store(op, value)?;
    enter_mmx(c);
    Ok(flow)
}

fn enter_mmx(c: &mut Core) {
    c.fpu.fsw &= !(7 << 11);
    c.fpu.ftw = 0xff;
}

fn load_non_temporal<const VEX: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    if VEX { Class::Avx } else { Class::Sse }.check(c)?;
    let Some(i) = op.instruction.as_deref() else { return c.ud() };
    let (size, to) = (size_of_operand(i), vector(i, 0));
    let linear = c.operand(op, size as u64, false)?;
    if linear & (size as u64 - 1) != 0 {
        return c.gp();
    }
    let mut value = if VEX { [0; 32] } else { bytes(c, to) };
    read_all(c, linear, op.segment, &mut value[..size])?;
    set_bytes(c, to, &value);
    Ok(Flow::Next)
}

/// MASKMOVQ, MASKMOVDQU: bytes whose mask has its top bit set, to DS:rDI. `N` is 32 for the VEX form.
fn maskmov<const N: usize>(c: &mut Core, op: &Op) -> Result<Flow> {
    match N {
        8 => Class::Mmx.check(c)?,
        16 => Class::Sse.check(c)?,
        _ => Class::Avx.check(c)?,
    }
    let Some(i) = op.instruction.as_deref() else { return c.ud() };
    let (first, second) = if i.op0_kind() == OpKind::Register { (0, 1) } else { (1, 2) };
    let (source, mask, len) = if N == 8 {
        control::check_pending(c)?;
        let mm = |n: u32| {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&(c.fpu.fpr[i.op_register(n).number() & 7] as u64).to_le_bytes());
            bytes
        };
        (mm(first), mm(second), 8)
    } else {
        (bytes(c, vector(i, first)), bytes(c, vector(i, second)), 16)
    };
    let offset = c.r[x86::gpr::RDI] & u64::MAX >> (64 - 8 * u32::from(op.address_size.clamp(2, 8)));
    let linear = c.linear(op.segment, offset, len as u64, true)?;
    for n in (0..len).filter(|&n| mask[n] & 0x80 != 0) {
        // Each byte is a store of its own: a fault in the middle leaves those before it written, and is restartable.
        c.write(linear.wrapping_add(n as u64), op.segment, source[n])?;
    }
    if N == 8 {
        enter_mmx(c);
    }
    Ok(Flow::End)
}

/// One element of an operand, which may lie beyond the segment's limit where others are.
fn element_place<const ELEMENT: usize>(
    c: &mut Core,
    op: &Op,
    at: usize,
    write: bool,
) -> Result<crate::mmu::Place> {
    let mask = u64::MAX >> (64 - 8 * u32::from(op.address_size.clamp(2, 8)));
    let offset = c.effective(op).wrapping_add(at as u64) & mask;
    let linear = c.linear(op.segment, offset, ELEMENT as u64, write)?;
    c.place(linear, ELEMENT as u64, write, op.segment, c.bank)
}

/// VMASKMOV and VPMASKMOV: elements whose mask has its top bit set; the others are not touched, and cannot fault.
fn masked<const ELEMENT: usize>(c: &mut Core, op: &Op) -> Result<Flow> {
    Class::Avx.check(c)?;
    let Some(i) = op.instruction.as_deref() else { return c.ud() };
    let len =
        if (0..3).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_ymm()) { 32 } else { 16 };
    let mask = bytes(c, vector(i, 1));
    let chosen = move |at: &usize| mask[at + ELEMENT - 1] & 0x80 != 0;
    if i.op0_kind() == OpKind::Memory {
        let source = bytes(c, vector(i, 2));
        let mut places = Vec::with_capacity(8);
        for at in (0..len).step_by(ELEMENT).filter(&chosen) {
            places.push((at, element_place::<ELEMENT>(c, op, at, true)?));
        }
        for (at, place) in places {
            c.place_write_bytes(&place, &source[at..at + ELEMENT]);
        }
        return Ok(Flow::End);
    }
    let mut value = [0; 32];
    for at in (0..len).step_by(ELEMENT).filter(&chosen) {
        let place = element_place::<ELEMENT>(c, op, at, false)?;
        c.place_read_bytes(&place, &mut value[at..at + ELEMENT]);
    }
    debug_assert_ne!(i.op0_register(), Register::None);
    set_bytes(c, vector(i, 0), &value);
    Ok(Flow::Next)
}
