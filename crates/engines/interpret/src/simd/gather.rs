//! VGATHER and VPGATHER: loads from many addresses, which may fault at each (SDM vol. 2C, VGATHERDPD and the like).

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::Class;
use super::store::{bytes, set_bytes, vector};
use crate::core::Core;
use crate::op::{Flow, Handler, Op, Result};

/// The handler, if the instruction is one of these.
pub fn handler(i: &Instruction) -> Option<Handler> {
    if i.encoding() != iced_x86::EncodingKind::VEX {
        return None;
    }
    Some(match i.mnemonic() {
        M::Vgatherdps | M::Vpgatherdd => gather::<4, 4>,
        M::Vgatherdpd | M::Vpgatherdq => gather::<4, 8>,
        M::Vgatherqps | M::Vpgatherqd => gather::<8, 4>,
        M::Vgatherqpd | M::Vpgatherqq => gather::<8, 8>,
        _ => return None,
    })
}

/// Indices of `INDEX` bytes choose elements of `ELEMENT` bytes.
fn gather<const INDEX: usize, const ELEMENT: usize>(c: &mut Core, op: &Op) -> Result<Flow> {
    Class::Avx.check(c)?;
    let Some(i) = op.instruction.as_deref() else { return c.ud() };
    let (to, index, mask) = (vector(i, 0), i.memory_index().number() & 15, vector(i, 2));
    if to == index || to == mask || index == mask {
        return c.ud();
    }
    let wide = |register: iced_x86::Register| if register.is_ymm() { 32 } else { 16 };
    let count = (wide(i.op0_register()) / ELEMENT).min(wide(i.memory_index()) / INDEX);
    let indices = bytes(c, index);
    for n in 0..count {
        let at = n * ELEMENT;
        let mut wanted = bytes(c, mask);
        let chosen = wanted[at + ELEMENT - 1] & 0x80 != 0;
        wanted[at..at + ELEMENT].fill(0);
        if !chosen {
            set_bytes(c, mask, &wanted);
            continue;
        }
        let offset = {
            let mut word = [0; 8];
            word[..INDEX].copy_from_slice(&indices[n * INDEX..(n + 1) * INDEX]);
            let index = i64::from_le_bytes(word);
            (if INDEX == 4 { i64::from(index as i32) } else { index }) as u64
        };
        let linear = address(c, op, i, offset, ELEMENT as u64)?;
        let mut element = [0; 8];
        c.read_bytes(linear, op.segment, &mut element[..ELEMENT])?;
        // What is done is done: a fault at a later element leaves this one loaded and its mask cleared.
        let mut value = bytes(c, to);
        value[at..at + ELEMENT].copy_from_slice(&element[..ELEMENT]);
        set_bytes(c, to, &value);
        set_bytes(c, mask, &wanted);
    }
    // Beyond the elements all is zero, and so is the whole mask.
    let mut value = bytes(c, to);
    value[count * ELEMENT..].fill(0);
    set_bytes(c, to, &value);
    set_bytes(c, mask, &[0; 32]);
    Ok(Flow::Next)
}

fn address(c: &mut Core, op: &Op, i: &Instruction, index: u64, size: u64) -> Result<u64> {
    debug_assert_eq!(i.op1_kind(), OpKind::Memory);
    let base = c.r[usize::from(op.base & 31)];
    let scaled = index.wrapping_mul(i.memory_index_scale().into());
    let sum = base.wrapping_add(scaled).wrapping_add(op.disp);
    let offset = if op.address_size == 4 { sum & 0xffff_ffff } else { sum };
    c.linear(op.segment, offset, size, false)
}
