//! Instructions that control x87 and SSE, and move their state: not arithmetic, so not the host's business.

use iced_x86::{Code, Instruction, Mnemonic as M};
use x86::Exception;
use x86::exception::vector;

use super::Class;
use crate::core::Core;
use crate::op::{Flow, Handler, Op, Result};

/// Exceptions of FSW, and the bits that summarize them.
const EXCEPTIONS: u16 = 0x3f;
const SUMMARY: u16 = 1 << 7;
const BUSY: u16 = 1 << 15;

/// The handler, if the instruction is one of these.
pub fn handler(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        M::Fninit => fninit,
        M::Fnclex => fnclex,
        M::Fnop => fnop,
        M::Wait => wait,
        M::Fneni | M::Fndisi | M::Fnsetpm => fignored,
        M::Fldcw => fldcw,
        M::Fnstcw => fnstcw,
        M::Fnstsw if i.code() == Code::Fnstsw_AX => fnstsw_ax,
        M::Fnstsw => fnstsw_m,
        M::Fnstenv => environment::<true, false>,
        M::Fldenv => environment::<false, false>,
        M::Fnsave => environment::<true, true>,
        M::Frstor => environment::<false, true>,
        M::Emms => emms,
        M::Vzeroupper => vzero::<false>,
        M::Vzeroall => vzero::<true>,
        _ => return None,
    })
}

/// #MF if an x87 exception waits to be reported.
pub fn check_pending(c: &mut Core) -> Result<()> {
    if c.fpu.fsw & !c.fpu.fcw & EXCEPTIONS != 0 {
        return c.raise(Exception::new(vector::MF));
    }
    Ok(())
}

/// Sets the summary bits as control word and flags want them.
fn summarize(c: &mut Core) {
    let pending = c.fpu.fsw & !c.fpu.fcw & EXCEPTIONS != 0;
    c.fpu.fsw = c.fpu.fsw & !(SUMMARY | BUSY) | if pending { SUMMARY | BUSY } else { 0 };
}

fn fninit(c: &mut Core, _: &Op) -> Result<Flow> {
    Class::X87.check(c)?;
    (c.fpu.fcw, c.fpu.fsw, c.fpu.ftw) = (0x37f, 0, 0);
    (c.fpu.fop, c.fpu.fip, c.fpu.fdp) = (0, 0, 0);
    Ok(Flow::Next)
}

fn fnclex(c: &mut Core, _: &Op) -> Result<Flow> {
    Class::X87.check(c)?;
    c.fpu.fsw &= 0x7f00;
    Ok(Flow::Next)
}

fn fnop(c: &mut Core, _: &Op) -> Result<Flow> {
    Class::X87.check(c)?;
    check_pending(c)?;
    Ok(Flow::Next)
}

/// FNENI, FNDISI, FNSETPM: of older coprocessors, ignored since.
fn fignored(c: &mut Core, _: &Op) -> Result<Flow> {
    Class::X87.check(c)?;
    Ok(Flow::Next)
}

fn wait(c: &mut Core, _: &Op) -> Result<Flow> {
    use x86::control::cr0::{MP, TS};
    if c.s.cr0 & (MP | TS) == MP | TS {
        return c.raise(Exception::NM);
    }
    check_pending(c)?;
    Ok(Flow::Next)
}

fn fldcw(c: &mut Core, op: &Op) -> Result<Flow> {
    Class::X87.check(c)?;
    check_pending(c)?;
    // Bit 6 always reads as one.
    c.fpu.fcw = c.load::<u16>(op)? & 0x1f7f | 0x40;
    summarize(c);
    Ok(Flow::Next)
}

fn fnstcw(c: &mut Core, op: &Op) -> Result<Flow> {
    Class::X87.check(c)?;
    c.store(op, c.fpu.fcw)
}

fn fnstsw_m(c: &mut Core, op: &Op) -> Result<Flow> {
    Class::X87.check(c)?;
    c.store(op, c.fpu.fsw)
}

fn fnstsw_ax(c: &mut Core, _: &Op) -> Result<Flow> {
    Class::X87.check(c)?;
    c.r[0] = c.r[0] & !0xffff | u64::from(c.fpu.fsw);
    Ok(Flow::Next)
}

fn emms(c: &mut Core, _: &Op) -> Result<Flow> {
    Class::Mmx.check(c)?;
    check_pending(c)?;
    // Like all MMX instructions it makes R0 the top, as measured.
    (c.fpu.ftw, c.fpu.fsw) = (0, c.fpu.fsw & !(7 << 11));
    Ok(Flow::Next)
}

/// The full tag word, two bits for each physical register, from the abridged one and the registers.
fn full_tags(c: &Core) -> u16 {
    (0..8).fold(0, |tags, n| {
        let value = c.fpu.fpr[n];
        let (exponent, fraction) = ((value >> 64) as u16 & 0x7fff, value as u64);
        let tag = match (c.fpu.ftw >> n & 1, exponent, fraction) {
            (0, ..) => 3,
            (_, 0, 0) => 1,
            (_, 0 | 0x7fff, _) => 2,
            (_, _, f) if f >> 63 == 0 => 2,
            _ => 0,
        };
        tags | tag << (2 * n)
    })
}

/// FNSTENV, FLDENV and, with the registers, FNSAVE and FRSTOR (SDM vol. 1, figures 8-9 to 8-12).
fn environment<const STORE: bool, const REGISTERS: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    Class::X87.check(c)?;
    if !STORE {
        check_pending(c)?;
    }
    let wide = op.instruction.as_deref().is_none_or(|i| {
        !matches!(
            i.code(),
            Code::Fnstenv_m14byte | Code::Fldenv_m14byte | Code::Fnsave_m94byte | Code::Frstor_m94byte
        )
    });
    let header = if wide { 28 } else { 14 };
    let size = header + if REGISTERS { 80 } else { 0 };
    let linear = c.operand(op, size as u64, STORE)?;
    let mut image = [0u8; 108];
    if STORE {
        pack(c, wide, &mut image);
        for n in 0..8 {
            let value = c.fpu.fpr[(c.fpu.top() + n) % 8].to_le_bytes();
            image[header + 10 * n..header + 10 * n + 10].copy_from_slice(&value[..10]);
        }
        super::store::write_all(c, linear, op.segment, &image[..size])?;
        if REGISTERS {
            fninit(c, op)?;
        } else {
            c.fpu.fcw |= 0x3f;
            summarize(c);
        }
        return Ok(Flow::End);
    }
    super::store::read_all(c, linear, op.segment, &mut image[..size])?;
    unpack(c, wide, &image);
    if REGISTERS {
        for n in 0..8 {
            let mut value = [0; 16];
            value[..10].copy_from_slice(&image[header + 10 * n..header + 10 * n + 10]);
            let at = (c.fpu.top() + n) % 8;
            c.fpu.fpr[at] = u128::from_le_bytes(value);
        }
    }
    Ok(Flow::Next)
}

/// Writes the environment's words, each in 16 or 32 bits.
fn pack(c: &Core, wide: bool, image: &mut [u8]) {
    let real = !c.protected();
    let (ip, dp) = (c.fpu.fip as u32, c.fpu.fdp as u32);
    let mut words = [c.fpu.fcw.into(), c.fpu.fsw.into(), full_tags(c).into(), ip, 0, dp, 0];
    let opcode = u32::from(c.fpu.fop & 0x7ff);
    match (wide, real) {
        (true, false) => words[4] = opcode << 16,
        (true, true) => {
            (words[3], words[4]) = (ip & 0xffff, (ip >> 16) << 12 | opcode);
            (words[5], words[6]) = (dp & 0xffff, (dp >> 16) << 12);
        }
        (false, false) => {}
        (false, true) => {
            (words[4], words[6]) = ((ip >> 16 & 0xf) << 12 | opcode, (dp >> 16 & 0xf) << 12);
        }
    }
    for (n, word) in words.iter().enumerate() {
        if wide {
            // The upper halves of the first three, and of the last, read as ones.
            let ones = if n < 3 || n == 6 && !real { 0xffff_0000 } else { 0 };
            image[4 * n..4 * n + 4].copy_from_slice(&(word | ones).to_le_bytes());
        } else {
            image[2 * n..2 * n + 2].copy_from_slice(&(*word as u16).to_le_bytes());
        }
    }
}

fn unpack(c: &mut Core, wide: bool, image: &[u8]) {
    let real = !c.protected();
    let word = |n: usize| {
        if wide {
            u32::from_le_bytes([image[4 * n], image[4 * n + 1], image[4 * n + 2], image[4 * n + 3]])
        } else {
            u16::from_le_bytes([image[2 * n], image[2 * n + 1]]).into()
        }
    };
    c.fpu.fcw = word(0) as u16 & 0x1f7f | 0x40;
    c.fpu.fsw = word(1) as u16;
    let tags = word(2) as u16;
    c.fpu.ftw = (0..8).fold(0, |t, n| t | u8::from(tags >> (2 * n) & 3 != 3) << n);
    let (ip, dp) = match (wide, real) {
        (true, true) => (word(3) & 0xffff | (word(4) >> 12) << 16, word(5) & 0xffff | (word(6) >> 12) << 16),
        (false, true) => (word(3) | (word(4) >> 12) << 16, word(5) | (word(6) >> 12) << 16),
        _ => (word(3), word(5)),
    };
    c.fpu.fop = match (wide, real) {
        (true, false) => (word(4) >> 16) as u16 & 0x7ff,
        (_, true) => word(4) as u16 & 0x7ff,
        _ => c.fpu.fop,
    };
    (c.fpu.fip, c.fpu.fdp) = (ip.into(), dp.into());
    summarize(c);
}

fn vzero<const ALL: bool>(c: &mut Core, _: &Op) -> Result<Flow> {
    Class::Avx.check(c)?;
    let registers = if c.bits == 64 { 16 } else { 8 };
    for register in &mut c.fpu.ymm[..registers] {
        *register = if ALL { [0; 2] } else { [register[0], 0] };
    }
    Ok(Flow::Next)
}
