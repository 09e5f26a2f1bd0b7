//! The run loop: from block to block, with interrupts, exceptions and debugging in between.

use std::sync::Arc;

use machine::cpu::{Activity, Debug, Error, Exit, Kick, State, Stats, Stop, Vcpu};
use machine::{Gpa, Machine, apic};
use x86::control::dr6;
use x86::cpuid::Cpuid;
use x86::segment::{attr, index};
use x86::{Segment, flags};

use crate::block::{Block, Cache, Id};
use crate::core::{Core, attention};
pub use crate::interrupt::Shutdown;
use crate::interrupt::Source;
use crate::op::{Fault, Flow, Op, Result, slot};

/// A vCPU of the reference engine.
pub struct Cpu {
    core: Core,
    cache: Cache,
}

impl Cpu {
    /// A vCPU of `machine` after reset, with its APIC. Number 0 is the boot processor.
    pub fn new(machine: Arc<Machine>, local: Arc<apic::Local>, cpuid: Arc<Cpuid>, index: u32) -> Self {
        Self { core: Core::new(machine, local, cpuid, index), cache: Cache::default() }
    }

    /// Registers and all else, for engines that build on this one.
    pub fn core(&mut self) -> &mut Core {
        &mut self.core
    }

    /// Whether [`Cpu::attend`] has something to look after before the next instruction.
    #[inline]
    pub fn wants_attention(&self) -> bool {
        let core = &self.core;
        core.attention & !attention::LIMIT != 0 || core.local.pending() & core.poll != 0
    }

    /// Guest code is about to run: to be called at the start of [`Vcpu::run`], and [`Cpu::leave`] at its end.
    pub fn enter(&mut self) {
        if self.core.keeper.enter() {
            self.core.forget_map();
        }
    }

    /// No guest code runs until [`Cpu::enter`].
    pub fn leave(&mut self) {
        self.core.keeper.leave();
    }

    /// Executes one instruction at RIP and delivers the exception that it raises, for engines that build on this one.
    ///
    /// # Errors
    /// The processor shut down.
    pub fn instruction(&mut self) -> std::result::Result<(), Shutdown> {
        if self.one().is_err() {
            self.exception()?;
        }
        Ok(())
    }

    /// Decodes an instruction, to be executed by [`Cpu::execute`].
    pub fn compile(&self, bytes: &[u8]) -> Op {
        let core = &self.core;
        let options = crate::block::options(core);
        let i = iced_x86::Decoder::with_ip(core.bits.into(), bytes, 0, options).decode();
        crate::decode::compile(&i, core.bits, &core.cpuid)
    }

    /// Executes an instruction that lies at RIP. Changes RIP to where execution goes on.
    ///
    /// # Errors
    /// It raised an exception, which [`Cpu::exception`] delivers.
    #[inline]
    pub fn execute(&mut self, op: &Op) -> Result<Flow> {
        let core = &mut self.core;
        let start = core.rip;
        core.r[usize::from(slot::START)] = start;
        core.hit = false;
        core.delivered = false;
        core.count.instructions += 1;
        let result = (op.run)(core, op);
        leave(core, result, start, op.end, op.len)
    }

    /// Stands still after a triple fault, until it is reset.
    pub fn shut_down(&mut self) -> Exit {
        self.core.s.activity = Activity::Shutdown;
        self.core.attend(attention::IDLE, true);
        Exit::TripleFault
    }

    /// Delivers the exception that a handler raised.
    ///
    /// # Errors
    /// The processor shut down.
    #[cold]
    pub fn exception(&mut self) -> std::result::Result<(), Shutdown> {
        let e = self.core.exception;
        self.core.deliver_exception(e)
    }

    /// The block at RIP.
    #[inline]
    fn next(&mut self) -> Result<Id> {
        if let Some(id) = self.cache.seen(&self.core) {
            return Ok(id);
        }
        let id = self.cache.find(&mut self.core)?;
        self.cache.remember(&self.core, id);
        Ok(id)
    }

    /// Runs at most `most` blocks, until something wants attention.
    ///
    /// # Errors
    /// The processor shut down.
    pub fn blocks(&mut self, most: u32) -> std::result::Result<(), Shutdown> {
        for _ in 0..most {
            if self.wants_attention() {
                return Ok(());
            }
            let result = match self.next() {
                Ok(id) => {
                    let Some(block) = self.cache.get(id) else { return Ok(()) };
                    let core = &mut self.core;
                    if core.attention != 0 && over_limit(core, block) {
                        self.one().map(|_| ())
                    } else {
                        execute(core, block, usize::MAX).map(|_| ())
                    }
                }
                Err(e) => Err(e),
            };
            if result.is_err() {
                self.exception()?;
            }
        }
        Ok(())
    }

    /// Executes one instruction; how it went.
    fn one(&mut self) -> Result<Flow> {
        let core = &mut self.core;
        core.delivered = false;
        let limit = u64::from(core.s.segments[index::CS].limit);
        let limited = core.attention & attention::LIMIT != 0;
        if limited && core.rip > limit {
            return core.gp();
        }
        let id = self.cache.find(core)?;
        let Some(block) = self.cache.get(id) else { return Ok(Flow::End) };
        let len = block.ops.first().map_or(0, |op| u64::from(op.len));
        if limited && core.rip + len.saturating_sub(1) > limit {
            return core.gp();
        }
        execute(core, block, 1)
    }

    /// Looks after whatever keeps blocks from running freely, and executes at most one instruction.
    ///
    /// # Errors
    /// The processor shut down.
    pub fn attend(&mut self) -> std::result::Result<Option<Exit>, Shutdown> {
        if let Some(exit) = self.events()? {
            return Ok(Some(exit));
        }
        let core = &mut self.core;
        if core.attention & attention::IDLE != 0 {
            if core.s.activity == Activity::Shutdown {
                return Err(Shutdown);
            }
            let interrupts = core.s.activity == Activity::Halted && core.rflags & flags::IF != 0;
            core.keeper.leave();
            core.local.wait(interrupts);
            self.enter();
            return Ok(None);
        }
        if core.attention & !attention::LIMIT == 0 {
            return Ok(None);
        }
        self.step()
    }

    /// Events from other vCPUs and devices, in the order of their priority.
    fn events(&mut self) -> std::result::Result<Option<Exit>, Shutdown> {
        let core = &mut self.core;
        if core.attention & attention::MAP != 0 {
            core.attend(attention::MAP, false);
            if core.keeper.wait() {
                core.forget_map();
            }
        }
        if core.attention & attention::EVENT != 0 {
            self.saved_events()?;
        }
        let core = &mut self.core;
        if core.local.pending() & apic::EVENT != 0 {
            let events = core.local.take_events();
            if events.init {
                self.init();
            }
            let core = &mut self.core;
            if let Some(v) = events.sipi.filter(|_| core.s.activity == Activity::WaitForSipi) {
                start(core, v);
            }
            if events.nmi {
                core.s.events.nmi_pending = true;
                core.attend(attention::EVENT, true);
            }
            if events.kicked {
                return Ok(Some(Exit::Kicked));
            }
        }
        let core = &mut self.core;
        let open = core.rflags & flags::IF != 0 && core.attention & attention::SHADOW == 0;
        let waits = matches!(core.s.activity, Activity::Running | Activity::Halted);
        if open
            && waits
            && core.local.pending() & apic::INTERRUPT != 0
            && let Some(v) = core.local.acknowledge()
        {
            core.count.interrupts += 1;
            self.wake();
            self.external(v)?;
        }
        Ok(None)
    }

    fn wake(&mut self) {
        self.core.s.activity = Activity::Running;
        self.core.attend(attention::IDLE, false);
    }

    fn external(&mut self, v: u8) -> std::result::Result<(), Shutdown> {
        match self.core.deliver(v, Source::External, None) {
            Ok(()) => Ok(()),
            Err(Fault) => self.exception(),
        }
    }

    /// Events that came with a state, and NMIs.
    fn saved_events(&mut self) -> std::result::Result<(), Shutdown> {
        self.core.attend(attention::EVENT, false);
        let events = &mut self.core.s.events;
        if let Some(e) = events.exception.take() {
            return self.core.deliver_exception(e);
        }
        if let Some(v) = events.interrupt.take() {
            self.core.count.interrupts += 1;
            self.wake();
            return self.external(v);
        }
        if events.nmi_pending && !events.nmi_blocked {
            if self.core.attention & attention::SHADOW != 0 {
                self.core.attend(attention::EVENT, true);
                return Ok(());
            }
            events.nmi_pending = false;
            events.nmi_blocked = true;
            self.wake();
            return self.external(x86::exception::vector::NMI);
        }
        Ok(())
    }

    /// INIT: everything as after reset, but for what survives it (SDM vol. 3A, table 9-1).
    fn init(&mut self) {
        let core = &mut self.core;
        let boot = core.local.base() & 1 << 8 != 0;
        let mut state = State::reset(boot, core.cpuid.signature());
        let old = core.save();
        state.msrs = old.msrs;
        state.fpu = old.fpu;
        state.xcr0 = old.xcr0;
        core.local.init();
        core.load_state(&state);
    }

    /// Executes one instruction with everything that single-stepping and breakpoints want.
    fn step(&mut self) -> std::result::Result<Option<Exit>, Shutdown> {
        let core = &mut self.core;
        let linear = core.code_linear(core.rip);
        if core.attention & attention::DEBUGGER != 0
            && core.debug.breakpoints.contains(&linear)
            && !core.debug.step
        {
            return Ok(Some(Exit::Debug(Stop::Breakpoint(linear))));
        }
        let resume = core.rflags & flags::RF != 0;
        if core.attention & attention::BREAKPOINTS != 0 && !resume && !core.traps_wait {
            let bits = core.breakpoints_at(linear);
            if bits != 0 {
                // A fault, unlike other #DBs: RF in the frame lets the instruction pass afterwards.
                core.rflags |= flags::RF;
                let e = core.debug_exception(bits);
                core.deliver_exception(e)?;
                return Ok(None);
            }
        }
        let trap = core.rflags & flags::TF != 0;
        core.rflags &= !flags::RF;
        core.attend(attention::RESUME | attention::SHADOW, false);
        core.traps_wait = false;
        let result = self.one();
        let core = &mut self.core;
        match result {
            Err(Fault) => {
                core.pending_db = 0;
                self.exception()?;
            }
            Ok(flow) => {
                if flow == Flow::Again && resume {
                    core.rflags |= flags::RF;
                    core.attend(attention::RESUME, true);
                }
                self.traps(trap)?;
            }
        }
        Ok(self.debugger())
    }

    /// Single-step and data breakpoint traps after an instruction.
    fn traps(&mut self, single: bool) -> std::result::Result<(), Shutdown> {
        let core = &mut self.core;
        if core.traps_wait {
            return Ok(());
        }
        let mut bits = std::mem::take(&mut core.pending_db);
        if single && !core.delivered {
            bits |= dr6::BS;
        }
        if bits != 0 {
            let e = core.debug_exception(bits);
            core.deliver_exception(e)?;
        }
        Ok(())
    }

    fn debugger(&mut self) -> Option<Exit> {
        let core = &mut self.core;
        if let Some(at) = core.watch_hit.take() {
            return Some(Exit::Debug(Stop::Watchpoint(at)));
        }
        core.debug.step.then_some(Exit::Debug(Stop::Step))
    }
}

/// A start-up IPI: real mode at `vector` << 12.
fn start(core: &mut Core, vector: u8) {
    let attributes = attr::P | attr::S | attr::CODE | attr::RW | attr::ACCESSED;
    let selector = u16::from(vector) << 8;
    core.set_segment(
        index::CS,
        Segment { selector, attributes, limit: 0xffff, base: u64::from(vector) << 12 },
    );
    core.rip = 0;
    core.s.activity = Activity::Running;
    core.attend(attention::IDLE, false);
}

fn over_limit(core: &Core, block: &Block) -> bool {
    core.rip.saturating_add(block.len) > u64::from(core.s.segments[index::CS].limit) + 1
}

/// Executes the first `most` instructions of a block, and sets RIP to where execution goes on. If one faults, to it.
#[inline]
fn execute(core: &mut Core, block: &Block, most: usize) -> Result<Flow> {
    let start = core.rip;
    core.r[usize::from(slot::START)] = start;
    core.hit = false;
    let mut done = 0;
    let mut end = 0;
    for op in block.ops.iter().take(most) {
        done += 1;
        match (op.run)(core, op) {
            Ok(Flow::Next) => end = op.end,
            other => {
                core.count.instructions += done;
                return leave(core, other, start, op.end, op.len);
            }
        }
    }
    core.count.instructions += done;
    core.rip = next(core, start, end);
    Ok(Flow::Next)
}

#[inline]
fn leave(core: &mut Core, result: Result<Flow>, start: u64, end: u16, len: u8) -> Result<Flow> {
    match result {
        Ok(Flow::Jump) => {}
        Ok(Flow::Next | Flow::End) => core.rip = next(core, start, end),
        Ok(Flow::Again) | Err(Fault) => core.rip = next(core, start, end - u16::from(len)),
    }
    result
}

#[inline]
fn next(core: &Core, start: u64, by: u16) -> u64 {
    let rip = start.wrapping_add(by.into());
    if core.bits == 64 { rip } else { rip & 0xffff_ffff }
}

struct Kicker(Arc<apic::Local>);

impl Kick for Kicker {
    fn kick(&self) {
        self.0.kick();
    }
}

impl Vcpu for Cpu {
    fn run(&mut self) -> std::result::Result<Exit, Error> {
        self.enter();
        let exit = loop {
            let exit = match self.blocks(u32::MAX) {
                Ok(()) => self.attend(),
                Err(e) => Err(e),
            };
            match exit {
                Ok(None) => {}
                Ok(Some(exit)) => break exit,
                Err(Shutdown) => break self.shut_down(),
            }
        };
        self.leave();
        Ok(exit)
    }

    fn state(&mut self) -> std::result::Result<State, Error> {
        Ok(self.core.save())
    }

    fn set_state(&mut self, state: &State) -> std::result::Result<(), Error> {
        self.core.load_state(state);
        self.core.local.set_tsc_offset(state.msrs.tsc_offset);
        Ok(())
    }

    fn debug(&mut self, debug: &Debug) -> std::result::Result<(), Error> {
        self.core.debug = debug.clone();
        self.core.breakpoints_changed();
        Ok(())
    }

    fn translate(&mut self, linear: u64) -> Option<Gpa> {
        self.core.peek(linear)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(Kicker(self.core.local.clone()))
    }

    fn stats(&self) -> Stats {
        let c = &self.core.count;
        Stats {
            instructions: Some(c.instructions),
            counters: vec![
                ("blocks decoded", c.decoded),
                ("block cache flushes", c.flushes),
                ("TLB misses", c.tlb_misses),
                ("TLB flushes", self.core.tlb.flushes),
                ("device accesses", c.mmio),
                ("port accesses", c.ports),
                ("interrupts", c.interrupts),
                ("exceptions", c.exceptions),
                ("halts", c.halts),
            ],
            times: Vec::new(),
        }
    }
}
