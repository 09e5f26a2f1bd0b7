//! Multiplication and division, bits, exchanges, and decimal arithmetic.

use std::cell::Cell;

use x86::cpuid::Feature;
use x86::exception::vector;
use x86::gpr::{RAX, RBX, RCX, RDX};
use x86::{Exception, flags};

use crate::core::Core;
use crate::flags::Lazy;
use crate::op::{Flow, HIGH, Op, Result};
use crate::word::Word;

/// The register that holds the upper half of a product or dividend: AH, DX, EDX, RDX.
fn upper<T: Word>() -> u8 {
    if T::SIZE == 1 { HIGH } else { RDX as u8 }
}

/// MUL, and one-operand IMUL with `S`.
pub fn mul<T: Word, const S: bool, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let b = c.get_rm::<T, M>(op, op.dst)?;
    let a = T::get(c, 0);
    let (low, high, over) = if S {
        let p = i128::from(a.s() as i64) * i128::from(b.s() as i64);
        let low = T::of(p as u64);
        (low, T::of((p >> T::BITS) as u64), i128::from(low.s() as i64) != p)
    } else {
        let p = u128::from(a.u()) * u128::from(b.u());
        let high = T::of((p >> T::BITS) as u64);
        (T::of(p as u64), high, high.u() != 0)
    };
    T::set(c, 0, low);
    T::set(c, upper::<T>(), high);
    c.lazy = Lazy::shift(low, over, over);
    Ok(Flow::Next)
}

#[inline(always)]
fn imul<T: Word>(c: &mut Core, op: &Op, a: T, b: T) -> Result<Flow> {
    let (a, b) = (a.s() as i64, b.s() as i64);
    let (low, over) = if T::SIZE == 8 {
        let (p, over) = a.overflowing_mul(b);
        (T::of(p as u64), over)
    } else {
        let p = a.wrapping_mul(b);
        let low = T::of(p as u64);
        (low, low.s() != p as u64)
    };
    T::set(c, op.dst, low);
    c.lazy = Lazy::shift(low, over, over);
    Ok(Flow::Next)
}

/// IMUL r, r/m.
pub fn imul_r_rm<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let b = c.get_rm::<T, M>(op, op.src)?;
    let a = T::get(c, op.dst);
    imul(c, op, a, b)
}

/// IMUL r, r/m, imm.
pub fn imul_i<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let a = c.get_rm::<T, M>(op, op.src)?;
    imul(c, op, a, T::of(op.imm))
}

/// DIV.
pub fn div<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let d = u128::from(c.get_rm::<T, M>(op, op.dst)?.u());
    let n = u128::from(T::get(c, upper::<T>()).u()) << T::BITS | u128::from(T::get(c, 0).u());
    if d == 0 {
        return c.raise(Exception::DE);
    }
    let (q, r) = if n >> 64 == 0 {
        (u128::from(n as u64 / d as u64), u128::from(n as u64 % d as u64))
    } else {
        (n / d, n % d)
    };
    if q >> T::BITS != 0 {
        return c.raise(Exception::DE);
    }
    T::set(c, 0, T::of(q as u64));
    T::set(c, upper::<T>(), T::of(r as u64));
    Ok(Flow::Next)
}

/// IDIV.
pub fn idiv<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let d = i128::from(c.get_rm::<T, M>(op, op.dst)?.s() as i64);
    let high = i128::from(T::get(c, upper::<T>()).s() as i64);
    let n = high << T::BITS | i128::from(T::get(c, 0).u());
    let (Some(q), Some(r)) = (n.checked_div(d), n.checked_rem(d)) else {
        return c.raise(Exception::DE);
    };
    let low = T::of(q as u64);
    if i128::from(low.s() as i64) != q {
        return c.raise(Exception::DE);
    }
    T::set(c, 0, low);
    T::set(c, upper::<T>(), T::of(r as u64));
    Ok(Flow::Next)
}

/// What BT, BTS, BTR and BTC do to the bit: 0 to 3.
fn bit<const K: u8>(v: u64, n: u32) -> u64 {
    match K {
        0 => v,
        1 => v | 1 << n,
        2 => v & !(1 << n),
        _ => v ^ 1 << n,
    }
}

#[inline(always)]
fn bit_in<T: Word, const K: u8, const M: bool>(
    c: &mut Core,
    op: &Op,
    linear: Option<u64>,
    n: u64,
) -> Result<Flow> {
    let n = n as u32 & (T::BITS - 1);
    let f = |c: &mut Core, v: T| {
        c.lazy = c.lazy.with_cf(v.u() >> n & 1 != 0);
        T::of(bit::<K>(v.u(), n))
    };
    match linear {
        Some(linear) if K == 0 => {
            let v = c.read::<T>(linear, op.segment)?;
            f(c, v);
            Ok(Flow::Next)
        }
        Some(linear) => c.modify(linear, op.segment, op.lock, f),
        None => {
            let v = T::get(c, op.dst);
            let v = f(c, v);
            if K != 0 {
                T::set(c, op.dst, v);
            }
            Ok(Flow::Next)
        }
    }
}

/// BT, BTS, BTR, BTC with an immediate.
pub fn bt_i<T: Word, const K: u8, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let linear = if M { Some(c.operand(op, T::SIZE, K != 0)?) } else { None };
    bit_in::<T, K, M>(c, op, linear, op.imm)
}

/// BT, BTS, BTR, BTC with a register, which in memory reaches beyond the operand.
pub fn bt_r<T: Word, const K: u8, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let n = T::get(c, op.src).s();
    let linear = if M {
        let by = ((n as i64) >> T::BITS.trailing_zeros()).wrapping_mul(T::SIZE as i64);
        let offset = c.effective(op).wrapping_add(by as u64);
        let offset = match op.address_size {
            8 => offset,
            4 => offset & 0xffff_ffff,
            _ => offset & 0xffff,
        };
        Some(c.linear(op.segment, offset, T::SIZE, K != 0)?)
    } else {
        None
    };
    bit_in::<T, K, M>(c, op, linear, n)
}

/// BSF, and BSR with `R`. A zero source leaves the destination alone, as processors do (AMD documents it).
pub fn bsf<T: Word, const R: bool, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let v = c.get_rm::<T, M>(op, op.src)?.u();
    if v != 0 {
        T::set(c, op.dst, T::of(if R { 63 - v.leading_zeros() } else { v.trailing_zeros() }.into()));
    }
    let zf = if v == 0 { flags::ZF } else { 0 };
    c.lazy = Lazy::from_bits(c.lazy.bits() & !flags::ZF | zf);
    Ok(Flow::Next)
}

/// TZCNT, LZCNT with `R`.
pub fn tzcnt<T: Word, const R: bool, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let v = c.get_rm::<T, M>(op, op.src)?.u();
    let n = if R { v.leading_zeros() - (64 - T::BITS) } else { v.trailing_zeros().min(T::BITS) };
    T::set(c, op.dst, T::of(n.into()));
    let f = if n == T::BITS { flags::CF } else { 0 } | if n == 0 { flags::ZF } else { 0 };
    c.lazy = Lazy::from_bits(c.lazy.bits() & !(flags::CF | flags::ZF) | f);
    Ok(Flow::Next)
}

/// POPCNT.
pub fn popcnt<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let v = c.get_rm::<T, M>(op, op.src)?.u();
    T::set(c, op.dst, T::of(v.count_ones().into()));
    c.lazy = Lazy::from_bits(if v == 0 { flags::ZF } else { 0 });
    Ok(Flow::Next)
}

/// XADD.
pub fn xadd<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let b = T::get(c, op.src);
    let old = Cell::new(T::of(0));
    let add = |c: &mut Core, a: T| {
        old.set(a);
        let sum = T::of(a.u().wrapping_add(b.u()));
        c.lazy = Lazy::add(a, b, sum);
        sum
    };
    if M {
        let flow = c.modify_rm::<T, M>(op, add)?;
        T::set(c, op.src, old.get());
        Ok(flow)
    } else {
        // The destination is written last: it wins when both are one register.
        let a = T::get(c, op.dst);
        let sum = add(c, a);
        T::set(c, op.src, a);
        T::set(c, op.dst, sum);
        Ok(Flow::Next)
    }
}

/// CMPXCHG. Memory is written in any case.
pub fn cmpxchg<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let (expected, new) = (T::get(c, 0), T::get(c, op.src));
    let found = Cell::new(T::of(0));
    let f = |c: &mut Core, v: T| {
        found.set(v);
        c.lazy = Lazy::sub(expected, v, T::of(expected.u().wrapping_sub(v.u())));
        if v == expected { new } else { v }
    };
    let flow = if M {
        c.modify_rm::<T, M>(op, f)?
    } else {
        let v = T::get(c, op.dst);
        let res = f(c, v);
        if v == expected {
            T::set(c, op.dst, res);
        }
        Flow::Next
    };
    if found.get() != expected {
        T::set(c, 0, found.get());
    }
    Ok(flow)
}

/// CMPXCHG8B.
pub fn cmpxchg8b(c: &mut Core, op: &Op) -> Result<Flow> {
    let pair = |c: &Core, high: usize, low: usize| c.r[high] << 32 | c.r[low] & 0xffff_ffff;
    let (expected, new) = (pair(c, RDX, RAX), pair(c, RCX, RBX));
    let found = Cell::new(0);
    let linear = c.operand(op, 8, true)?;
    let flow = c.modify::<u64>(linear, op.segment, op.lock, |_, v| {
        found.set(v);
        if v == expected { new } else { v }
    })?;
    let equal = found.get() == expected;
    if !equal {
        c.r[RAX] = found.get() & 0xffff_ffff;
        c.r[RDX] = found.get() >> 32;
    }
    set_zf(c, equal);
    Ok(flow)
}

/// CMPXCHG16B.
pub fn cmpxchg16b(c: &mut Core, op: &Op) -> Result<Flow> {
    c.need(Feature::CX16)?;
    let linear = c.operand(op, 16, true)?;
    if linear & 15 != 0 {
        return c.gp();
    }
    let pair = |c: &Core, high: usize, low: usize| u128::from(c.r[high]) << 64 | u128::from(c.r[low]);
    let (expected, new) = (pair(c, RDX, RAX), pair(c, RCX, RBX));
    let place = c.place(linear, 16, true, op.segment, c.bank)?;
    let found = match place.ram() {
        Some(offset) => match c.memory.compare_exchange(offset, expected, new) {
            Ok(hit) => {
                c.hit |= hit;
                expected
            }
            Err(found) => found,
        },
        None => {
            let mut bytes = [0; 16];
            c.place_read_bytes(&place, &mut bytes);
            let found = u128::from_le_bytes(bytes);
            if found == expected {
                c.place_write_bytes(&place, &new.to_le_bytes());
            }
            found
        }
    };
    if found != expected {
        c.r[RAX] = found as u64;
        c.r[RDX] = (found >> 64) as u64;
    }
    set_zf(c, found == expected);
    Ok(if c.hit { Flow::End } else { Flow::Next })
}

fn set_zf(c: &mut Core, on: bool) {
    c.lazy = Lazy::from_bits(c.lazy.bits() & !flags::ZF | if on { flags::ZF } else { 0 });
}

/// BSWAP. Of 16 bits it gives zero, as processors do.
pub fn bswap<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let v = T::get(c, op.dst).u();
    T::set(c, op.dst, T::of(if T::SIZE == 2 { 0 } else { v.swap_bytes() >> (64 - T::BITS) }));
    Ok(Flow::Next)
}

/// MOVBE, to memory with `W`.
pub fn movbe<T: Word, const W: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.need(Feature::MOVBE)?;
    let swap = |v: T| T::of(v.u().swap_bytes() >> (64 - T::BITS));
    if W {
        let v = T::get(c, op.src);
        c.store(op, swap(v))
    } else {
        let v = c.load::<T>(op)?;
        T::set(c, op.dst, swap(v));
        Ok(Flow::Next)
    }
}

/// CRC32 of `F` bytes into a 32-bit accumulator.
pub fn crc32<F: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.need(Feature::SSE4_2)?;
    let v = c.get_rm::<F, M>(op, op.src)?.u();
    let mut crc = c.r[usize::from(op.dst & 15)] as u32;
    for i in 0..F::SIZE {
        crc ^= (v >> (8 * i)) as u8 as u32;
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    c.r[usize::from(op.dst & 15)] = crc.into();
    Ok(Flow::Next)
}

/// ADCX, and ADOX with `O`.
pub fn adx<T: Word, const O: bool, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.need(Feature::ADX)?;
    let b = c.get_rm::<T, M>(op, op.src)?.u();
    let a = T::get(c, op.dst).u();
    let carry = if O { c.lazy.of() } else { c.lazy.cf() };
    let sum = u128::from(a) + u128::from(b) + u128::from(carry);
    let out = sum >> T::BITS != 0;
    c.lazy = if O { c.lazy.with_cf_of(c.lazy.cf(), out) } else { c.lazy.with_cf(out) };
    T::set(c, op.dst, T::of(sum as u64));
    Ok(Flow::Next)
}

/// CBW, CWDE, CDQE: sign-extends the lower half of the accumulator.
pub fn cbw<T: Word, F: Word>(c: &mut Core, _: &Op) -> Result<Flow> {
    let v = F::get(c, 0).s();
    T::set(c, 0, T::of(v));
    Ok(Flow::Next)
}

/// CWD, CDQ, CQO: fills the upper register with the accumulator's sign.
pub fn cwd<T: Word>(c: &mut Core, _: &Op) -> Result<Flow> {
    let v = ((T::get(c, 0).s() as i64) >> 63) as u64;
    T::set(c, RDX as u8, T::of(v));
    Ok(Flow::Next)
}

/// LAHF.
pub fn lahf(c: &mut Core, _: &Op) -> Result<Flow> {
    if c.bits == 64 {
        c.need(Feature::LAHF_LM)?;
    }
    u8::set(c, HIGH, (c.lazy.bits() | flags::FIXED) as u8);
    Ok(Flow::Next)
}

/// SAHF.
pub fn sahf(c: &mut Core, _: &Op) -> Result<Flow> {
    if c.bits == 64 {
        c.need(Feature::LAHF_LM)?;
    }
    let of = if c.lazy.of() { flags::OF } else { 0 };
    c.lazy = Lazy::from_bits(u64::from(u8::get(c, HIGH)) | of);
    Ok(Flow::Next)
}

/// CLC (0), STC (1), CMC (2).
pub fn carry<const K: u8>(c: &mut Core, _: &Op) -> Result<Flow> {
    let cf = if K == 2 { !c.lazy.cf() } else { K == 1 };
    c.lazy = c.lazy.with_cf(cf);
    Ok(Flow::Next)
}

/// CLD, STD with `S`.
pub fn direction<const S: bool>(c: &mut Core, _: &Op) -> Result<Flow> {
    c.rflags = c.rflags & !flags::DF | if S { flags::DF } else { 0 };
    Ok(Flow::Next)
}

/// DAA, and DAS with `S`.
pub fn daa<const S: bool>(c: &mut Core, _: &Op) -> Result<Flow> {
    let (old, cf, af) = (u8::get(c, 0), c.lazy.cf(), c.lazy.af());
    let mut al = old;
    let step = |al: u8, by: u8| if S { al.wrapping_sub(by) } else { al.wrapping_add(by) };
    let low = old & 15 > 9 || af;
    let mut carry = false;
    if low {
        carry = cf || if S { old < 6 } else { old > 0xf9 };
        al = step(al, 6);
    }
    if old > 0x99 || cf {
        al = step(al, 0x60);
        carry = true;
    }
    u8::set(c, 0, al);
    let f = Lazy::shift(al, carry, false).bits();
    c.lazy = Lazy::from_bits(f | if low { flags::AF } else { 0 });
    Ok(Flow::Next)
}

/// AAA, and AAS with `S`.
pub fn aaa<const S: bool>(c: &mut Core, _: &Op) -> Result<Flow> {
    let adjust = u8::get(c, 0) & 15 > 9 || c.lazy.af();
    if adjust {
        let ax = u16::get(c, 0);
        u16::set(c, 0, if S { ax.wrapping_sub(0x106) } else { ax.wrapping_add(0x106) });
    }
    let al = u8::get(c, 0) & 15;
    u8::set(c, 0, al);
    let f = Lazy::shift(al, adjust, false).bits();
    c.lazy = Lazy::from_bits(f | if adjust { flags::AF } else { 0 });
    Ok(Flow::Next)
}

/// AAM.
pub fn aam(c: &mut Core, op: &Op) -> Result<Flow> {
    let (al, d) = (u8::get(c, 0), op.imm as u8);
    let (Some(q), Some(r)) = (al.checked_div(d), al.checked_rem(d)) else {
        return c.raise(Exception::DE);
    };
    u16::set(c, 0, u16::from(q) << 8 | u16::from(r));
    c.lazy = Lazy::logic(r);
    Ok(Flow::Next)
}

/// AAD.
pub fn aad(c: &mut Core, op: &Op) -> Result<Flow> {
    let (al, ah) = (u8::get(c, 0), u8::get(c, HIGH));
    let al = al.wrapping_add(ah.wrapping_mul(op.imm as u8));
    u16::set(c, 0, al.into());
    c.lazy = Lazy::logic(al);
    Ok(Flow::Next)
}

/// SALC.
pub fn salc(c: &mut Core, _: &Op) -> Result<Flow> {
    u8::set(c, 0, if c.lazy.cf() { 0xff } else { 0 });
    Ok(Flow::Next)
}

/// BOUND.
pub fn bound<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let linear = c.operand(op, 2 * T::SIZE, false)?;
    let low = c.read::<T>(linear, op.segment)?.s() as i64;
    let high = c.read::<T>(linear.wrapping_add(T::SIZE), op.segment)?.s() as i64;
    let v = T::get(c, op.dst).s() as i64;
    if v < low || v > high { c.raise(Exception::new(vector::BR)) } else { Ok(Flow::Next) }
}
