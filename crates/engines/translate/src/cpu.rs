//! The run loop: into translated code, and what to do when it is left.

mod faults;
mod lockstep;

use std::sync::Arc;
use std::time::Instant;

use iced_x86::{Decoder, DecoderError, InstructionInfoFactory};
use interpret::Shutdown;
use interpret::flags::Lazy;
use interpret::op::{Flow, slot};
use interpret::tlb::{ENTRIES, Tlb};
use machine::cpu::{Debug, Error as CpuError, Exit, Kick, State, Stats, Vcpu};
use machine::{Gpa, Machine, apic};
use memory::Memory;
use rustc_hash::FxHashMap;
use x86::control::{cr0, cr3, cr4, xcr0};
use x86::cpuid::Cpuid;
use x86::flags;
use x86::segment::{attr, index};

use crate::Error;
use crate::block::{Kind, Mode, Site};
use crate::cache::Cache;
use crate::decode;
use crate::frame::{Frame, NO_SALT, at, reason};
use crate::host::Host;
use crate::lpt::Lpt;
use crate::signal::{self, Running};
use crate::space::Spaces;
use crate::trace::Trace;

/// Bytes of translated code that a vCPU keeps: at least, and at most.
const CODE: (u64, u64) = (4 << 20, 64 << 20);
/// Stores into a page that holds code, after which stores to it are no longer tried.
const PATIENCE: u32 = 32;

/// Counters.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    entries: u64,
    helpers: u64,
    instructions: u64,
    fills: u64,
    slow: u64,
    faults: u64,
    links: u64,
    jumps: u64,
    polls: u64,
    /// Nanoseconds, by samples: in translated code, in what is done for it, and in devices.
    code: u64,
    help: u64,
    devices: u64,
}

/// One entry into translated code in so many is timed.
const SAMPLE: u64 = 64;

/// A vCPU of the translate engine.
pub struct Cpu {
    vcpu: interpret::Cpu,
    memory: Memory,
    host: Host,
    frame: Frame,
    spaces: Spaces,
    pub(crate) cache: Cache,
    /// Host addresses of guest memory: writable, and read-only.
    alias: (u64, u64, u64),
    gs: u64,
    count: Counters,
    info: InstructionInfoFactory,
    /// How often stores hit pages with code.
    hits: FxHashMap<u64, u32>,
    /// The number of entries into code at which the vCPU kicks itself.
    pause: u64,
    lock: Option<Box<lockstep::Lockstep>>,
}

/// Where to go on.
enum Next {
    /// At this host address.
    Host(u64),
    /// At RIP, wherever that is now.
    Look,
}

impl Cpu {
    /// A vCPU of `machine` after reset, with its APIC, one of `count`. Number 0 is the boot processor.
    ///
    /// # Errors
    /// The host lacks memory or address space.
    pub fn new(
        machine: Arc<Machine>,
        local: Arc<apic::Local>,
        cpuid: Arc<Cpuid>,
        index: u32,
        count: u32,
    ) -> Result<Self, Error> {
        // All that we take is to stay below a quarter of the guest's memory and 32 MiB: a sixth of that for linear page
        // tables, the rest for code, and for what is known about it, which takes a little more.
        let share = machine.memory.ram_size() / 4 + (12 << 20);
        let room = (share - share / 6) * 4 / 9 / u64::from(count.max(1));
        let code = room.clamp(CODE.0, CODE.1) & !0xfff;
        let memory = machine.memory.clone();
        let alias = memory.alias()?;
        let alias = (alias.writable(), alias.readable(), alias.len());
        // A lone vCPU needs no LOCK but as a barrier towards devices' threads, which bring the whole of it if they can.
        let keep_lock = count > 1 || !memory::order_threads_is_exact();
        let frame = Frame::new()?;
        let bell = frame.bell();
        local.set_bell(move || bell.ring());
        let host = Host::detect();
        let mut vcpu = interpret::Cpu::new(machine, local, cpuid, index);
        vcpu.core().tlb.log = Some(Vec::new());
        Ok(Self {
            vcpu,
            memory,
            host,
            frame,
            spaces: Spaces::new(count, share / 6)?,
            cache: Cache::new(code as usize, host, keep_lock)?,
            alias,
            gs: 0,
            count: Counters::default(),
            info: InstructionInfoFactory::new(),
            hits: FxHashMap::default(),
            pause: u64::MAX,
            lock: None,
        })
    }

    /// What code means now; `None` if it is left to the reference engine.
    pub(crate) fn mode(&mut self) -> Option<Mode> {
        let core = self.vcpu.core();
        if core.bank == Tlb::USER_ALIGNED {
            return None;
        }
        let mut mode = 0;
        if core.bits == 64 {
            mode |= Mode::LONG;
        } else {
            let flat = [index::ES, index::SS, index::DS].iter().all(|&n| core.flat >> n & 0x101 == 0x101);
            let cs = core.s.segments[index::CS];
            if core.bits != 32
                || !core.protected()
                || !flat
                || cs.base != 0
                || cs.limit != u32::MAX
                || core.stack_mask != 0xffff_ffff
            {
                return None;
            }
            let usable = |n: usize| {
                let s = core.s.segments[n];
                s.limit == u32::MAX && s.usable() && !s.has(attr::CODE) && s.has(attr::RW) && !s.has(attr::DC)
            };
            mode |= if usable(index::FS) { Mode::FS } else { 0 };
            mode |= if usable(index::GS) { Mode::GS } else { 0 };
        }
        mode |= if core.rflags & flags::DF != 0 { Mode::DF } else { 0 };
        let s = &core.s;
        if s.cr0 & (cr0::EM | cr0::TS) == 0 && s.cr4 & cr4::OSFXSR != 0 {
            mode |= Mode::SSE;
        }
        let both = xcr0::SSE | xcr0::AVX;
        if s.cr0 & cr0::TS == 0 && s.cr4 & cr4::OSXSAVE != 0 && s.xcr0 & both == both && core.protected() {
            mode |= Mode::AVX;
        }
        Some(Mode(mode))
    }

    /// Takes note of what the guest's TLB was told to forget, and of code that changed.
    fn refresh(&mut self) {
        if self.vcpu.core().tlb.log.as_ref().is_some_and(|l| !l.is_empty()) {
            self.flush_tables();
        }
        self.cache.refresh(&self.memory);
    }

    fn flush_tables(&mut self) {
        let core = self.vcpu.core();
        let log = core.tlb.log.replace(Vec::new()).unwrap_or_default();
        for flush in log {
            let large = |linear| core.tlb.may_be_large(linear);
            self.spaces.flush(flush, large);
        }
        let core = self.vcpu.core();
        let pcid = if core.s.cr4 & cr4::PCIDE != 0 { core.s.cr3 & cr3::PCID } else { 0 };
        self.spaces.settle(pcid as u16);
    }

    /// What is added to linear addresses in the table of jumps now.
    fn salt(&mut self, mode: Mode) -> u64 {
        let user = self.vcpu.core().cpl == 3;
        self.spaces.salt(&self.frame, mode, user)
    }

    /// The linear page table of the current address space and rights.
    fn table(&mut self) -> &mut Lpt {
        let bank = self.vcpu.core().bank / ENTRIES;
        self.spaces.table(bank)
    }

    fn linear(&mut self) -> u64 {
        let core = self.vcpu.core();
        core.code_linear(core.rip)
    }

    /// Host address of the block at RIP. `None` if the reference engine executes what is there.
    fn look(&mut self, mode: Mode, salt: u64) -> interpret::op::Result<Option<u64>> {
        let linear = self.linear();
        let tag = linear.wrapping_add(salt);
        let (found, host) = self.frame.jump(tag as u16);
        if found == tag {
            return Ok(Some(host));
        }
        let Some(offset) = self.vcpu.core().fetch(linear)? else { return Ok(None) };
        if linear & 0xfff > 0x1000 - decode::LONGEST && self.straddles(offset, linear & 0xfff, mode) {
            return self.look_straddler(linear, offset, mode, tag);
        }
        let Some(host) = self.find(offset, mode) else { return Ok(None) };
        self.frame.set_jump(tag, host);
        let core = self.vcpu.core();
        let user = core.cpl == 3;
        self.spaces.entered(linear, user, core.tlb.is_global(user, linear));
        Ok(Some(host))
    }

    /// Whether the instruction at `offset` in guest memory reaches into the next page, by its first bytes.
    fn straddles(&mut self, offset: u64, at: u64, mode: Mode) -> bool {
        let mut bytes = [0; decode::LONGEST as usize];
        let bytes = &mut bytes[..(0x1000 - at) as usize];
        self.memory.read(offset, bytes);
        let mut decoder = Decoder::new(mode.bits(), bytes, interpret::options(self.vcpu.core()));
        decoder.decode().is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes
    }

    fn look_straddler(
        &mut self,
        linear: u64,
        offset: u64,
        mode: Mode,
        tag: u64,
    ) -> interpret::op::Result<Option<u64>> {
        let second = (linear | 0xfff).wrapping_add(1);
        let core = self.vcpu.core();
        // A fault of the second page's is raised by whoever executes the instruction.
        let Ok(Some(next)) = core.fetch(second) else { return Ok(None) };
        let user = core.cpl == 3;
        let global = core.tlb.is_global(user, linear) && core.tlb.is_global(user, second);
        let found = self.cache.straddler(&mut self.vcpu, &self.frame, (offset, next), mode);
        let Some(host) = found else { return Ok(None) };
        self.frame.set_jump(tag, host);
        self.spaces.entered(linear, user, global);
        self.spaces.entered(second, user, global);
        Ok(Some(host))
    }

    pub(crate) fn find(&mut self, offset: u64, mode: Mode) -> Option<u64> {
        self.cache.find(&mut self.vcpu, &self.frame, offset, mode)
    }

    /// Runs translated code until something else has to be looked at.
    fn translated(&mut self, mode: Mode) -> Result<(), Stop> {
        let salt = self.salt(mode);
        let mut host = match self.look(mode, salt) {
            Ok(Some(host)) => host,
            Ok(None) => return self.vcpu.instruction().map_err(Stop::from),
            Err(_) => return self.vcpu.exception().map_err(Stop::from),
        };
        self.frame.listen(salt);
        self.start();
        loop {
            if self.frame.is_rung() {
                self.frame.listen(salt);
            }
            if self.count.entries == self.pause {
                self.pause = u64::MAX;
                self.vcpu.core().local.kick();
            }
            // It may have come before the bell was listened to.
            if self.vcpu.wants_attention() {
                self.flags_out();
                return Ok(());
            }
            let next = if self.count.entries.is_multiple_of(SAMPLE) {
                self.timed(host)?
            } else {
                self.enter(host)?;
                self.left()?
            };
            host = match next {
                Next::Host(host) => host,
                Next::Look => match self.again(mode, salt)? {
                    Some(host) => host,
                    None => return Ok(()),
                },
            };
        }
    }

    /// Runs translated code, and what follows, against the clock.
    fn timed(&mut self, host: u64) -> Result<Next, Stop> {
        let devices = |cpu: &mut Self| cpu.vcpu.core().count.mmio + cpu.vcpu.core().count.ports;
        let before = devices(self);
        let begun = Instant::now();
        self.enter(host)?;
        let left = Instant::now();
        let next = self.left();
        let done = left.elapsed().as_nanos() as u64 * SAMPLE;
        self.count.code += (left - begun).as_nanos() as u64 * SAMPLE;
        *(if devices(self) == before { &mut self.count.help } else { &mut self.count.devices }) += done;
        next
    }

    /// Has what is done written down for developers: blocks and what became of them, host faults.
    pub fn set_trace(&mut self, trace: Trace) {
        self.cache.trace = Some(trace);
    }

    /// From now on the flags that an exception or an interrupt pushes are exact, or not: dead ones may be stale then. For
    /// comparisons; code is slower so.
    pub fn keep_all_flags(&mut self, all: bool) {
        self.cache.keep_all_flags(all, &self.frame);
    }

    /// Kicks this vCPU when translated code has been left so many times from now on: at an instant that is the same each
    /// time, for comparisons.
    pub fn pause_after(&mut self, exits: u64) {
        self.pause = self.count.entries + exits;
    }

    /// Prepares the frame for the start of a block at RIP.
    fn start(&mut self) {
        let page = self.linear() & !0xfff;
        self.frame.set(at::PAGE, page);
        self.flags_in();
    }

    /// The block at RIP, if nothing else has to be looked at first.
    fn again(&mut self, mode: Mode, salt: u64) -> Result<Option<u64>, Stop> {
        self.refresh();
        if self.vcpu.wants_attention() || self.mode() != Some(mode) || self.salt(mode) != salt {
            return Ok(None);
        }
        let Ok(Some(host)) = self.look(mode, salt) else { return Ok(None) };
        self.start();
        Ok(Some(host))
    }

    #[inline]
    fn enter(&mut self, host: u64) -> Result<(), Stop> {
        if self.lock.is_some() {
            return self.enter_lockstep(host);
        }
        self.enter_code(host);
        Ok(())
    }

    fn enter_code(&mut self, host: u64) {
        let core = self.vcpu.core();
        let (fs, gs) = (core.r[usize::from(slot::FS)], core.r[usize::from(slot::GS)]);
        let smap = core.s.cr4 & cr4::SMAP != 0;
        let waits = core.local.pending() & !core.poll & apic::INTERRUPT != 0;
        let table = self.spaces.table(core.bank / ENTRIES).base();
        let f = &self.frame;
        f.set(at::FS, fs);
        f.set(at::GS, gs);
        f.set(at::KERNEL_GS, core.s.msrs.kernel_gs_base);
        for (n, s) in (0..).zip(&core.s.segments) {
            f.set(at::SELECTORS + 8 * n, s.selector.into());
        }
        f.set32(at::RFLAGS, core.rflags as u32);
        f.set32(at::SYSTEM, u32::from(core.cpl == 0));
        f.set32(at::WAITING, u32::from(waits));
        f.set(at::TABLE_AC, self.spaces.table(Tlb::SYSTEM_AC / ENTRIES).base());
        let plain = if smap { Tlb::SYSTEM } else { Tlb::SYSTEM_AC };
        f.set(at::TABLE, self.spaces.table(plain / ENTRIES).base());
        if self.gs != table {
            self.host.set_gs_base(table);
            self.gs = table;
        }
        self.count.entries += 1;
        // SAFETY: `host` is the start of a block, where a site goes on, or where an access is tried again, all in code that
        // has not been flushed since; pointers were set in `run`, and the table's entries all come from `fill`.
        unsafe { self.cache.stubs.enter(&self.frame, host) };
        self.system_state();
    }

    /// Takes over what translated code did to the system's state.
    fn system_state(&mut self) {
        let (rflags, gs, kernel) =
            (self.frame.get32(at::RFLAGS), self.frame.get(at::GS), self.frame.get(at::KERNEL_GS));
        let core = self.vcpu.core();
        if rflags != core.rflags as u32 {
            core.rflags = rflags.into();
            core.flags_changed();
            self.gs = self.spaces.table(core.bank / ENTRIES).base();
        }
        if gs != core.r[usize::from(slot::GS)] {
            core.set_base(index::GS, gs);
            core.s.msrs.kernel_gs_base = kernel;
        }
    }

    /// The status flags from the frame.
    fn flags_out(&mut self) {
        let ax = u64::from(self.frame.get32(at::FLAGS));
        self.vcpu.core().lazy = Lazy::from_bits((ax >> 8 & 0xd5) | (ax & 1) << 11);
    }

    /// The status flags to the frame.
    fn flags_in(&mut self) {
        let bits = self.vcpu.core().lazy.bits();
        self.frame.set32(at::FLAGS, ((bits & 0xd5) << 8 | bits >> 11 & 1) as u32);
    }

    fn set_rip(&mut self, guest: u16) {
        let rip = self.frame.get(at::PAGE).wrapping_add(guest.into());
        let core = self.vcpu.core();
        core.rip = if core.bits == 64 { rip } else { rip & 0xffff_ffff };
    }

    /// Looks after why translated code was left.
    fn left(&mut self) -> Result<Next, Stop> {
        match self.frame.get32(at::REASON) {
            reason::SITE => {
                let Some(site) = self.cache.site(self.frame.get32(at::SITE)) else {
                    return Err(Stop::Bug("a site that is none".into()));
                };
                self.set_rip(site.guest);
                self.at_site(site)
            }
            _ => self.fault(),
        }
    }

    fn at_site(&mut self, site: Site) -> Result<Next, Stop> {
        match site.kind {
            Kind::Access { size, write, align } => {
                let linear = self.frame.get(at::LINEAR);
                // A page is not touched for an access that faults.
                if linear & u64::from(align) == 0 && self.fill(linear, size, write) {
                    return Ok(Next::Host(site.host));
                }
                self.count.slow += 1;
                self.flags_out();
                self.interpret()
            }
            Kind::Group { .. } => self.group(site),
            Kind::Cross => self.cross(site),
            Kind::Helper { op } => self.help(site, op),
            Kind::Jump { undo } => self.jump(undo),
            Kind::Instruction => {
                self.flags_out();
                self.interpret()
            }
            Kind::Wild { undo } => {
                self.flags_out();
                let core = self.vcpu.core();
                core.r[4] = core.r[4].wrapping_add(undo as u64);
                self.interpret()
            }
            Kind::Link => self.link(site),
            Kind::Stale => {
                let tag = self.linear().wrapping_add(self.frame.get(at::OWN_SALT));
                self.frame.clear_jump(tag as u16);
                self.flags_out();
                Ok(Next::Look)
            }
            Kind::Poll => {
                self.count.polls += 1;
                self.flags_out();
                Ok(Next::Look)
            }
        }
    }

    /// A group of accesses whose page has to be looked up: for its first access alone, for the others may never be made.
    fn group(&mut self, site: Site) -> Result<Next, Stop> {
        let Kind::Group { write, align, skip, span } = site.kind else { return self.cross(site) };
        let linear = self.frame.get(at::LINEAR);
        if (linear & 0xfff) + u64::from(span) > 0x1000 {
            if let Some(host) = self.solo(&site) {
                return Ok(Next::Host(host));
            }
        } else if linear.wrapping_add(skip.into()) & u64::from(align) == 0 && self.fill(linear, 1, write) {
            return Ok(Next::Host(site.host));
        }
        self.count.slow += 1;
        self.flags_out();
        self.interpret()
    }

    /// A group of accesses that crosses a page: on in a block without groups, and from now on without asking.
    fn cross(&mut self, site: Site) -> Result<Next, Stop> {
        let before = self.cache.count.flushes;
        if let Some(host) = self.solo(&site) {
            if before == self.cache.count.flushes {
                self.cache.patch(&site, host);
            }
            return Ok(Next::Host(host));
        }
        self.flags_out();
        self.interpret()
    }

    /// The block without groups that begins at a site.
    fn solo(&mut self, site: &Site) -> Option<u64> {
        let (page, mode) = self.cache.place(site.block)?;
        if !self.cache.is_fresh(site.block, &self.memory) {
            return None;
        }
        self.find(page + u64::from(site.guest), Mode(mode.0 | Mode::SOLO))
    }

    /// A jump to where the table of jumps knows nothing. RIP is the jump's.
    fn jump(&mut self, undo: i32) -> Result<Next, Stop> {
        self.count.jumps += 1;
        self.flags_out();
        let salted = self.frame.get(at::LINEAR);
        let core = self.vcpu.core();
        let own = self.frame.get(at::OWN_SALT);
        let target = if core.bits == 64 {
            // Somebody may have rung just before.
            let either = [own, NO_SALT].map(|salt| salted.wrapping_sub(salt));
            either.into_iter().find(|&t| interpret::canonical(t))
        } else {
            [own, NO_SALT].map(|salt| salted.wrapping_sub(salt)).into_iter().find(|t| t >> 32 == 0)
        };
        let Some(target) = target else {
            // The jump itself faults, so it has not happened.
            core.r[4] = core.r[4].wrapping_add(undo as u64);
            return self.interpret();
        };
        core.rip = target;
        Ok(Next::Look)
    }

    fn interpret(&mut self) -> Result<Next, Stop> {
        self.count.instructions += 1;
        self.vcpu.instruction()?;
        Ok(Next::Look)
    }

    fn help(&mut self, site: Site, op: u32) -> Result<Next, Stop> {
        self.count.helpers += 1;
        self.flags_out();
        let Some(op) = self.cache.op(site.block, op) else { return self.interpret() };
        let mode = self.cache.place(site.block).map(|p| p.1);
        match self.vcpu.execute(op) {
            Ok(Flow::Next) => {
                let core = self.vcpu.core();
                let same = self.memory.code().changes() == self.cache.changes();
                let quiet = same && !core.hit && core.tlb.log.as_ref().is_some_and(Vec::is_empty);
                if site.host != 0 && quiet && !self.vcpu.wants_attention() && self.mode() == mode {
                    self.flags_in();
                    return Ok(Next::Host(site.host));
                }
                Ok(Next::Look)
            }
            Ok(_) => Ok(Next::Look),
            Err(_) => {
                self.vcpu.exception()?;
                Ok(Next::Look)
            }
        }
    }

    fn link(&mut self, site: Site) -> Result<Next, Stop> {
        self.count.links += 1;
        self.cache.refresh(&self.memory);
        if let Some(host) = self.cache.link(&site) {
            return Ok(Next::Host(host));
        }
        if let Some((page, mode)) = self.cache.place(site.block)
            && self.cache.is_fresh(site.block, &self.memory)
        {
            let before = self.cache.count.flushes;
            let host = self.find(page + u64::from(site.guest), mode);
            if let Some(host) = host {
                if before == self.cache.count.flushes {
                    self.cache.link(&site);
                }
                return Ok(Next::Host(host));
            }
        }
        self.flags_out();
        Ok(Next::Look)
    }

    /// Fills the entry for an access. False if the reference engine should do the access.
    fn fill(&mut self, linear: u64, size: u8, write: bool) -> bool {
        if (linear & 0xfff) + u64::from(size) > 0x1000 {
            return false;
        }
        let core = self.vcpu.core();
        let bank = core.bank;
        let Ok(Some(m)) = core.map(linear, write, bank) else { return false };
        let code = self.memory.code();
        let mut host = self.alias.1 + m.offset;
        if m.writable {
            let busy = code.holds_code(m.offset) && self.hits.get(&m.offset).is_some_and(|&n| n > PATIENCE);
            if busy && write {
                return false;
            }
            let protected = self.memory.alias().is_ok_and(|a| a.is_protected(m.offset));
            if write && protected && !busy {
                code.unprotect(m.offset);
            }
            if !busy {
                host = self.alias.0 + m.offset;
            }
        }
        self.count.fills += 1;
        self.spaces.fill(bank / ENTRIES, linear, host, m.global, m.shift)
    }

    fn step(&mut self) -> Result<Option<Exit>, Stop> {
        if self.vcpu.wants_attention() {
            return Ok(self.vcpu.attend()?);
        }
        self.refresh();
        match self.mode() {
            Some(mode) => self.translated(mode)?,
            None => self.vcpu.blocks(256)?,
        }
        Ok(None)
    }
}

/// Why the run loop ends.
enum Stop {
    /// The processor shut down.
    Shutdown,
    /// We did something wrong.
    Bug(String),
}

impl From<Shutdown> for Stop {
    fn from(_: Shutdown) -> Self {
        Self::Shutdown
    }
}

impl Vcpu for Cpu {
    fn run(&mut self) -> Result<Exit, CpuError> {
        let core = self.vcpu.core();
        let (registers, simd) = (core.r.as_ptr() as u64, std::ptr::from_ref(&core.fpu) as u64);
        let rip = std::ptr::from_ref(&core.rip) as u64;
        self.frame.set(at::REGISTERS, registers);
        self.frame.set(at::SIMD, simd);
        self.gs = 0;
        self.vcpu.enter();
        signal::prepare(Running {
            range: self.cache.blocks(),
            frame: self.frame.base() as u64,
            exit: self.cache.stubs.fault,
            rip,
        });
        let result = loop {
            match self.step() {
                Ok(None) => {}
                Ok(Some(exit)) => break Ok(exit),
                Err(Stop::Shutdown) => break Ok(self.vcpu.shut_down()),
                Err(Stop::Bug(what)) => {
                    break Err(CpuError::Guest(self.report(&what)));
                }
            }
        };
        signal::done();
        self.vcpu.leave();
        result
    }

    fn state(&mut self) -> Result<State, CpuError> {
        self.vcpu.state()
    }

    fn set_state(&mut self, state: &State) -> Result<(), CpuError> {
        self.vcpu.set_state(state)
    }

    fn debug(&mut self, debug: &Debug) -> Result<(), CpuError> {
        self.vcpu.debug(debug)
    }

    fn translate(&mut self, linear: u64) -> Option<Gpa> {
        self.vcpu.translate(linear)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.vcpu.kicker()
    }

    fn stats(&self) -> Stats {
        let mut stats = self.vcpu.stats();
        stats.instructions = None;
        let (c, k) = (&self.count, &self.cache.count);
        stats.counters.extend([
            ("blocks translated", k.blocks),
            ("instructions translated", k.instructions),
            ("bytes of code", self.cache.used() as u64),
            ("code cache flushes", k.flushes),
            ("pages of code that changed", k.invalidated),
            ("entries into code", c.entries),
            ("exits: instructions executed by the reference engine", c.helpers),
            ("exits: pages looked up for accesses", c.fills),
            ("exits: accesses done by the reference engine", c.slow),
            ("exits: jumps looked up", c.jumps),
            ("exits: links", c.links),
            ("exits: polls", c.polls),
            ("exits: host faults", c.faults),
            ("single instructions interpreted", c.instructions),
        ]);
        stats.times.extend([
            ("in translated code, by samples", c.code),
            ("in what is done for it, by samples", c.help),
            ("in devices, by samples", c.devices),
            ("translating", k.nanoseconds),
        ]);
        if let Some(lock) = &self.lock {
            lock.stats(&mut stats);
        }
        stats
    }
}
