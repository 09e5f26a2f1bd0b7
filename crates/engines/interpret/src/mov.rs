//! Moves, stack pushes and pops, and near control flow: hot and simple.

use x86::gpr::{RBP, RSP};
use x86::segment::index;

use crate::core::Core;
use crate::mmu::canonical;
use crate::op::{Flow, Op, Result};
use crate::word::Word;

const SS: u8 = index::SS as u8;

/// MOV r, r/m.
pub fn mov_r_rm<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let v = c.get_rm::<T, M>(op, op.src)?;
    T::set(c, op.dst, v);
    Ok(Flow::Next)
}

/// MOV m, r.
pub fn mov_m_r<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let v = T::get(c, op.src);
    c.store(op, v)
}

/// MOV r/m, imm.
pub fn mov_rm_i<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.set_rm::<T, M>(op, T::of(op.imm))
}

/// MOVZX, and MOVSX and MOVSXD with `X`.
pub fn extend<T: Word, F: Word, const X: bool, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let v = c.get_rm::<F, M>(op, op.src)?;
    T::set(c, op.dst, T::of(if X { v.s() } else { v.u() }));
    Ok(Flow::Next)
}

/// LEA.
pub fn lea<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let v = c.effective(op);
    T::set(c, op.dst, T::of(v));
    Ok(Flow::Next)
}

/// CMOVcc; the condition is in `imm`. The operand is read, and a 32-bit register's upper half cleared, in any case.
pub fn cmov<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let v = c.get_rm::<T, M>(op, op.src)?;
    let v = if c.lazy.condition(op.imm as u8) { v } else { T::get(c, op.dst) };
    T::set(c, op.dst, v);
    Ok(Flow::Next)
}

/// SETcc.
pub fn setcc<const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let v = u8::from(c.lazy.condition(op.imm as u8));
    c.set_rm::<u8, M>(op, v)
}

impl Core {
    /// The stack pointer moved by `by`, as wide as the stack is.
    #[inline(always)]
    pub fn stack_at(&self, by: u64) -> u64 {
        self.r[RSP].wrapping_add(by) & self.stack_mask
    }

    /// Sets the stack pointer, as wide as the stack is.
    #[inline(always)]
    pub fn set_stack(&mut self, sp: u64) {
        self.r[RSP] = self.r[RSP] & !self.stack_mask | sp & self.stack_mask;
    }

    /// Pushes.
    #[inline(always)]
    pub fn push<T: Word>(&mut self, v: T) -> Result<Flow> {
        let sp = self.stack_at(T::SIZE.wrapping_neg());
        let linear = if self.bits == 64 { sp } else { self.linear(SS, sp, T::SIZE, true)? };
        let flow = self.write(linear, SS, v)?;
        self.set_stack(sp);
        Ok(flow)
    }

    /// Reads what is `by` bytes above the top of the stack.
    #[inline(always)]
    pub fn stack_read<T: Word>(&mut self, by: u64) -> Result<T> {
        let sp = self.stack_at(by);
        let linear = if self.bits == 64 { sp } else { self.linear(SS, sp, T::SIZE, false)? };
        self.read(linear, SS)
    }

    /// Pops.
    #[inline(always)]
    pub fn pop<T: Word>(&mut self) -> Result<T> {
        let v = self.stack_read::<T>(0)?;
        self.set_stack(self.stack_at(T::SIZE));
        Ok(v)
    }

    /// RIP of the next instruction.
    #[inline(always)]
    pub fn next_rip(&self, op: &Op) -> u64 {
        self.r[usize::from(crate::op::slot::START)].wrapping_add(op.end.into())
    }

    /// Jumps to `rip`, cut to the operand size, if it may be fetched from.
    #[inline(always)]
    pub fn jump<T: Word>(&mut self, rip: u64) -> Result<Flow> {
        let rip = T::of(rip).u();
        self.check_target(rip)?;
        self.rip = rip;
        Ok(Flow::Jump)
    }

    /// #GP(0) if `rip` is outside the code segment, or not canonical.
    #[inline(always)]
    pub fn check_target(&mut self, rip: u64) -> Result<()> {
        let inside =
            if self.bits == 64 { canonical(rip) } else { rip <= self.s.segments[index::CS].limit.into() };
        if inside { Ok(()) } else { self.gp() }
    }
}

/// PUSH r.
pub fn push_r<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let v = T::get(c, op.dst);
    c.push(v)
}

/// PUSH imm.
pub fn push_i<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.push(T::of(op.imm))
}

/// PUSH m.
pub fn push_m<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let v = c.load::<T>(op)?;
    c.push(v)
}

/// POP r.
pub fn pop_r<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let v = c.pop::<T>()?;
    T::set(c, op.dst, v);
    Ok(Flow::Next)
}

/// POP m: the address is computed with the stack pointer after the pop.
pub fn pop_m<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let sp = c.r[RSP];
    let v = c.pop::<T>()?;
    let flow = c.store(op, v);
    if flow.is_err() {
        c.r[RSP] = sp;
    }
    flow
}

/// LEAVE.
pub fn leave<T: Word>(c: &mut Core, _: &Op) -> Result<Flow> {
    let sp = c.r[RSP];
    c.set_stack(c.r[RBP]);
    match c.pop::<T>() {
        Ok(v) => {
            T::set(c, RBP as u8, v);
            Ok(Flow::Next)
        }
        Err(e) => {
            c.r[RSP] = sp;
            Err(e)
        }
    }
}

/// JMP rel; `T` is as wide as the instruction pointer becomes.
pub fn jmp<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let target = c.next_rip(op).wrapping_add(op.imm);
    c.jump::<T>(target)
}

/// Jcc rel, for one condition.
pub fn jcc<T: Word, const CC: u8>(c: &mut Core, op: &Op) -> Result<Flow> {
    if c.lazy.condition(CC) {
        let target = c.next_rip(op).wrapping_add(op.imm);
        c.jump::<T>(target)
    } else {
        Ok(Flow::Next)
    }
}

/// JCXZ, JECXZ, JRCXZ: `A` is the address size.
pub fn jcxz<T: Word, A: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    if A::get(c, 1).u() == 0 { jmp::<T>(c, op) } else { Ok(Flow::Next) }
}

/// LOOP (`K` 0), LOOPE (1), LOOPNE (2).
pub fn loops<T: Word, A: Word, const K: u8>(c: &mut Core, op: &Op) -> Result<Flow> {
    let count = A::of(A::get(c, 1).u().wrapping_sub(1));
    let flag = match K {
        0 => true,
        1 => c.lazy.zf(),
        _ => !c.lazy.zf(),
    };
    let flow = if count.u() != 0 && flag { jmp::<T>(c, op)? } else { Flow::Next };
    A::set(c, 1, count);
    Ok(flow)
}

/// CALL rel.
pub fn call<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let next = c.next_rip(op);
    call_to::<T>(c, next, next.wrapping_add(op.imm))
}

#[inline(always)]
fn call_to<T: Word>(c: &mut Core, next: u64, target: u64) -> Result<Flow> {
    let target = T::of(target).u();
    c.check_target(target)?;
    c.push(T::of(next))?;
    c.rip = target;
    Ok(Flow::Jump)
}

/// CALL r/m.
pub fn call_rm<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let target = c.get_rm::<T, M>(op, op.dst)?.u();
    let next = c.next_rip(op);
    call_to::<T>(c, next, target)
}

/// JMP r/m.
pub fn jmp_rm<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let target = c.get_rm::<T, M>(op, op.dst)?.u();
    c.jump::<T>(target)
}

/// RET, with the bytes to drop in `imm`.
pub fn ret<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let target = c.stack_read::<T>(0)?.u();
    c.check_target(target)?;
    c.set_stack(c.stack_at(T::SIZE.wrapping_add(op.imm)));
    c.rip = target;
    Ok(Flow::Jump)
}

/// XCHG r/m, r: always locked when in memory.
pub fn xchg<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let new = T::get(c, op.src);
    if M {
        let linear = c.operand(op, T::SIZE, true)?;
        let old = std::cell::Cell::new(T::of(0));
        let flow = c.modify(linear, op.segment, true, |_, v| {
            old.set(v);
            new
        })?;
        T::set(c, op.src, old.get());
        Ok(flow)
    } else {
        let old = T::get(c, op.dst);
        T::set(c, op.dst, new);
        T::set(c, op.src, old);
        Ok(Flow::Next)
    }
}

/// NOP and what does nothing here: prefetches, fences, hints.
pub fn nop(_: &mut Core, _: &Op) -> Result<Flow> {
    Ok(Flow::Next)
}

/// PUSHA, PUSHAD.
pub fn pusha<T: Word>(c: &mut Core, _: &Op) -> Result<Flow> {
    let rsp = c.r[RSP];
    for n in 0..8 {
        let v = if n == RSP { rsp } else { c.r[n] };
        if let Err(e) = c.push(T::of(v)) {
            c.r[RSP] = rsp;
            return Err(e);
        }
    }
    Ok(if c.hit { Flow::End } else { Flow::Next })
}

/// POPA, POPAD: all but the stack pointer, which is skipped.
pub fn popa<T: Word>(c: &mut Core, _: &Op) -> Result<Flow> {
    let mut values = [T::of(0); 8];
    for (n, v) in values.iter_mut().enumerate() {
        *v = c.stack_read::<T>(T::SIZE * (7 - n as u64))?;
    }
    for (n, v) in values.into_iter().enumerate().filter(|&(n, _)| n != RSP) {
        T::set(c, n as u8, v);
    }
    c.set_stack(c.stack_at(8 * T::SIZE));
    Ok(Flow::Next)
}
