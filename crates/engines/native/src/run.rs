//! The stubs of one vCPU, and calling them.

use std::collections::HashMap;
use std::ptr::NonNull;

use iced_x86::Instruction;

use crate::buffer::CodeBuffer;
use crate::compile::{ARITHMETIC_FLAGS, Kind, compile};
use crate::state::FxArea;
use crate::{Bounce, Error, SimdState, Unsupported, float, x87};

/// A compiled instruction of one [`Stubs`]; with another it may mean another instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StubId {
    generation: u32,
    index: u32,
}

/// How an instruction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Executed: registers, flags and the bounce buffer hold the results.
    Done,
    /// Executed, but an unmasked x87 exception kept it from storing to memory; the next waiting x87 instruction will
    /// report the exception.
    NotStored,
    /// An unmasked SSE or AVX exception: MXCSR has its flags, nothing else changed. Raise #XM (or #UD, by
    /// CR4.OSXMMEXCPT).
    SimdException,
    /// Not executed: an x87 exception is pending. Raise #MF.
    PendingX87,
    /// Not executed: the stub is of a time before [`Stubs::reset`].
    Stale,
}

type Entry = unsafe extern "sysv64" fn(*mut u8, *mut u8, *mut Bounce);

struct Stub {
    entry: Entry,
    kind: Kind,
    mmx: bool,
    reads_flags: bool,
    writes_flags: u64,
    fast: Option<(x87::Plan, Entry)>,
}

/// The compiled instructions of one vCPU, with their code.
pub struct Stubs {
    buffer: CodeBuffer,
    stubs: Vec<Stub>,
    ids: HashMap<Vec<u8>, StubId>,
    generation: u32,
}

impl Stubs {
    /// An empty set with its own code buffer of 1 MiB, filled as needed.
    pub fn new() -> Result<Self, Error> {
        Ok(Stubs { buffer: CodeBuffer::new()?, stubs: Vec::new(), ids: HashMap::new(), generation: 0 })
    }

    /// Compiles `instruction`; where its memory operand is, and which prefixes and general registers it has, do not
    /// matter for [`Stubs::run`]. Compiling the same again gives the same id.
    pub fn compile(&mut self, instruction: &Instruction) -> Result<StubId, Unsupported> {
        let compiled = compile(instruction)?;
        if let Some(&id) = self.ids.get(&compiled.code) {
            return Ok(id);
        }
        let fast = match &compiled.fast {
            Some((plan, code)) => Some((*plan, self.push(code)?)),
            None => None,
        };
        let stub = Stub {
            entry: self.push(&compiled.code)?,
            kind: compiled.kind,
            mmx: compiled.mmx,
            reads_flags: compiled.reads_flags,
            writes_flags: compiled.writes_flags,
            fast,
        };
        let index = u32::try_from(self.stubs.len()).map_err(|_| Unsupported::Full)?;
        let id = StubId { generation: self.generation, index };
        self.stubs.push(stub);
        self.ids.insert(compiled.code, id);
        Ok(id)
    }

    fn push(&mut self, code: &[u8]) -> Result<Entry, Unsupported> {
        let address = self.buffer.push(code)?;
        // SAFETY: `code` is a whole function of this type, made by `compile`.
        Ok(unsafe { std::mem::transmute::<NonNull<u8>, Entry>(address) })
    }

    /// Drops all stubs; their ids become [`Outcome::Stale`].
    pub fn reset(&mut self) {
        self.stubs.clear();
        self.ids.clear();
        self.buffer.clear();
        self.generation = self.generation.wrapping_add(1);
    }

    /// Executes stub `id`. `gprs` are in the processor's order (RAX, RCX, RDX, RBX, RSP, …); of `flags` only CF, PF,
    /// AF, ZF, SF and OF are used, and only those that the instruction defines are changed.
    #[inline]
    pub fn run(
        &self,
        id: StubId,
        state: &mut SimdState,
        gprs: &mut [u64; 16],
        flags: &mut u64,
        bounce: &mut Bounce,
    ) -> Outcome {
        let Some(stub) = self.stubs.get(id.index as usize).filter(|_| id.generation == self.generation)
        else {
            return Outcome::Stale;
        };
        if stub.mmx || matches!(stub.kind, Kind::X87 { .. }) {
            return stub.with_x87(state, gprs, flags, bounce);
        }
        stub.with_flags(flags, bounce, |bounce| match stub.kind {
            Kind::Float => stub.float(state, gprs, bounce),
            _ => stub.plain(state, gprs, bounce),
        })
    }
}

/// The bits of MXCSR that exist wherever there is a 64-bit processor.
const MXCSR_BITS: u32 = 0xffff;
const ALL_MASKED: u16 = 0x3f;
const FSW_ERROR: u16 = 1 << 7;
const FSW_TOP: u16 = 7 << 11;

impl Stub {
    #[inline]
    fn with_flags(
        &self,
        flags: &mut u64,
        bounce: &mut Bounce,
        call: impl FnOnce(&mut Bounce) -> Outcome,
    ) -> Outcome {
        if self.reads_flags {
            // Bit 1 is always set, and the host's interrupts are on.
            bounce.flags = *flags & ARITHMETIC_FLAGS | 0x202;
        }
        let outcome = call(bounce);
        if self.writes_flags != 0 && outcome != Outcome::SimdException {
            *flags = *flags & !self.writes_flags | bounce.flags & self.writes_flags;
        }
        outcome
    }

    #[inline]
    fn plain(&self, state: &mut SimdState, gprs: &mut [u64; 16], bounce: &mut Bounce) -> Outcome {
        // SAFETY: the stub loads from and stores to exactly these three objects, at constant offsets inside them,
        // and executes one listed instruction whose memory operand is `bounce.bytes`. It changes only registers that
        // the calling convention lets it change, and leaves MXCSR, the x87 and the direction flag as Rust wants them.
        unsafe { (self.entry)(std::ptr::from_mut(state).cast(), gprs.as_mut_ptr().cast(), bounce) };
        Outcome::Done
    }

    #[inline]
    fn float(&self, state: &mut SimdState, gprs: &mut [u64; 16], bounce: &mut Bounce) -> Outcome {
        let mxcsr = state.mxcsr & MXCSR_BITS;
        if mxcsr & float::MASKS == float::MASKS {
            bounce.mxcsr = mxcsr;
            self.plain(state, gprs, bounce);
            state.mxcsr = bounce.mxcsr;
            return Outcome::Done;
        }
        self.float_unmasked(mxcsr, state, gprs, bounce)
    }

    /// Runs on copies, so that an exception leaves everything as it was.
    #[cold]
    fn float_unmasked(
        &self,
        mxcsr: u32,
        state: &mut SimdState,
        gprs: &mut [u64; 16],
        bounce: &mut Bounce,
    ) -> Outcome {
        let try_with = |control: u32| {
            let mut copy = (state.clone(), *gprs, bounce.clone());
            copy.2.mxcsr = control;
            self.plain(&mut copy.0, &mut copy.1, &mut copy.2);
            copy
        };
        let done = try_with(float::masked(mxcsr));
        let mut raised = done.2.mxcsr & float::FLAGS;
        if float::unmasked(mxcsr) & float::UE != 0 {
            // Unmasked underflow is raised by a tiny result even if it is exact (SDM vol. 1, 4.9.1.5); masked, only
            // by an inexact one, except that flush to zero makes every tiny result inexact.
            let flushed = try_with(float::masked(mxcsr) | float::FTZ);
            raised |= flushed.2.mxcsr & float::UE;
        }
        let (new_flags, exception) = float::judge(mxcsr, raised);
        if exception {
            state.mxcsr = mxcsr | new_flags;
            return Outcome::SimdException;
        }
        (*state, *gprs, *bounce) = done;
        state.mxcsr = mxcsr | new_flags;
        Outcome::Done
    }

    fn with_x87(
        &self,
        state: &mut SimdState,
        gprs: &mut [u64; 16],
        flags: &mut u64,
        bounce: &mut Bounce,
    ) -> Outcome {
        if state.fsw & FSW_ERROR != 0 || state.fsw & !state.fcw & ALL_MASKED != 0 {
            return Outcome::PendingX87;
        }
        self.with_flags(flags, bounce, |bounce| match self.kind {
            Kind::Plain => {
                self.plain(state, gprs, bounce);
                enter_mmx(state);
                Outcome::Done
            }
            Kind::Float => {
                // Even if it ends in #XM, as measured.
                let outcome = self.float(state, gprs, bounce);
                enter_mmx(state);
                outcome
            }
            Kind::X87 { stores } => match &self.fast {
                Some((plan, entry)) if plan.fits(state) => plan.run(*entry, state, bounce),
                _ => self.x87_slow(stores, state, bounce),
            },
        })
    }

    #[cold]
    fn x87_slow(&self, stores: bool, state: &mut SimdState, bounce: &mut Bounce) -> Outcome {
        let mut area = FxArea::load(state);
        // SAFETY: as in `plain`; this stub's first argument is an aligned FXSAVE image with a valid MXCSR, the second
        // is not used. No exception is pending in it, so a waiting instruction does not fault; an exception that it
        // causes stays pending until FNINIT.
        unsafe { (self.entry)(area.0.as_mut_ptr(), std::ptr::null_mut(), bounce) };
        area.store(state);
        // Of what a store can raise, only a rounding leaves the result stored (SDM vol. 1, 8.5).
        let not_stored = state.fsw & !state.fcw & (ALL_MASKED & !(1 << 5)) != 0;
        if stores && not_stored { Outcome::NotStored } else { Outcome::Done }
    }
}

/// MMX instructions but EMMS set TOP to 0 and all tags to valid (SDM vol. 1, 9.5.1).
fn enter_mmx(state: &mut SimdState) {
    state.fsw &= !FSW_TOP;
    state.ftw = 0xff;
}

/// Whether an 80-bit number is a NaN.
fn is_nan(value: u128) -> bool {
    (value >> 64) & 0x7fff == 0x7fff && value & (u128::MAX >> 65) != 0
}

impl x87::Plan {
    fn st(state: &SimdState, i: u8) -> usize {
        (state.top() + usize::from(i)) % 8
    }

    fn fits(&self, state: &SimdState) -> bool {
        let full = |i| state.ftw >> Self::st(state, i) & 1 != 0;
        state.fcw & ALL_MASKED == ALL_MASKED
            && (!self.top || full(0))
            && (!self.pushes || !full(7))
            && (self.other_may_be_empty || self.other.is_none_or(full))
    }

    fn run(&self, entry: Entry, state: &mut SimdState, bounce: &mut Bounce) -> Outcome {
        let top = Self::st(state, if self.pushes { 7 } else { 0 });
        let other = Self::st(state, self.other.unwrap_or(0));
        bounce.fcw = state.fcw;
        bounce.fsw = !state.fsw & ALL_MASKED;
        let registers = state.fpr.as_mut_ptr();
        // SAFETY: `top` and `other` are below 8, so both pointers are to registers of `state`, from which the stub
        // loads, and to which it stores, 10 bytes each. The host's x87 stack is empty between calls; all exceptions
        // are masked. Else as in `Stub::plain`.
        unsafe { entry(registers.add(top).cast(), registers.add(other).cast(), bounce) };
        // A remainder that is NaN leaves the bits of its quotient alone.
        let no_quotient = self.remainder && is_nan(state.fpr[top]);
        let conditions = if no_quotient { x87::C1 | x87::C2 } else { self.conditions };
        state.fsw = state.fsw & !conditions | bounce.fsw & (conditions | ALL_MASKED);
        if self.pushes {
            state.ftw |= 1 << top;
            state.fsw = state.fsw & !FSW_TOP | (top as u16) << 11;
        }
        if let (Some(_), true) = (self.other, self.other_may_be_empty) {
            state.ftw |= 1 << other;
        }
        for _ in 0..self.pops {
            state.ftw &= !(1 << state.top());
            state.fsw = state.fsw & !FSW_TOP | (Self::st(state, 1) as u16) << 11;
        }
        Outcome::Done
    }
}
