//! Lockstep: the reference engine executes each piece of guest code first, then translated code does, and both must agree.
//!
//! Blocks are not linked and no jump is found in the table of jumps, so each entry executes at most one block. Before it
//! the reference engine executes what lies at RIP, up to the first instruction that it must not execute twice (one that
//! touches a device, faults, stores to code, or is left to it anyway), and notes registers and stores after each. Then all
//! is undone, translated code runs, and where it stops must be a place where the reference engine was, with the same
//! registers and bytes.
//!
//! Flags that nobody reads any more need not be right where translated code is left. So the reference keeps flags of its
//! own from entry to entry: a flag that was wrongly taken for dead shows in what it leads to.
//!
//! Not seen: a store to where the reference engine stored nothing, until somebody reads there.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;

use iced_x86::{
    Decoder, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
    UsedMemory,
};
use interpret::core::{Core, Counters};
use interpret::flags::Lazy;
use interpret::op::{Op, slot};
use machine::cpu::Stats;
use memory::Memory;
use native::SimdState;
use x86::Exception;
use x86::cpuid::Cpuid;
use x86::segment::index;

use super::{Cpu, Stop};
use crate::allowed;
use crate::block::Kind;
use crate::control::is_far;
use crate::decode::{self, STATUS};
use crate::frame::{NO_SALT, at, reason};
use crate::seats::number;
use crate::strings::String as Strings;

/// Instructions that the reference engine executes ahead at most: no block is longer.
const AHEAD: usize = 64;
/// Pieces of code that are kept decoded.
const PIECES: usize = 1 << 16;
/// Devices store to memory at any time: a difference is one if it comes each time.
const ATTEMPTS: u32 = 4;

/// The state of lockstep mode.
#[derive(Default)]
pub struct Lockstep {
    pieces: HashMap<(u64, u32), Arc<Piece>>,
    shadow: Option<Shadow>,
    compared: u64,
    instructions: u64,
    unknown: u64,
    repeated: u64,
}

/// The reference's own flags between two entries.
#[derive(Clone, Copy)]
struct Shadow {
    rip: u64,
    /// Instructions that the reference engine had executed: none since.
    instructions: u64,
    flags: Flags,
}

#[derive(Clone, Copy)]
struct Flags {
    bits: u64,
    /// Those that the manuals leave undefined.
    undefined: u32,
}

/// Decoded guest code, straight on from an address.
struct Piece {
    bytes: Vec<u8>,
    steps: Vec<Step>,
}

struct Step {
    i: Instruction,
    op: Op,
    memory: Vec<UsedMemory>,
    /// It can be executed and undone.
    pure: bool,
    vectors: bool,
    bytes: Vec<u8>,
}

/// What instructions change beside memory, before a piece.
struct Saved {
    r: [u64; 32],
    rip: u64,
    lazy: Lazy,
    rflags: u64,
    attention: u32,
    hit: bool,
    delivered: bool,
    exception: Exception,
    count: Counters,
    fpu: SimdState,
    kernel_gs: u64,
    frame_flags: u32,
    page: u64,
}

/// A store of the reference engine's.
struct Store {
    offset: u64,
    len: usize,
    old: [u8; 64],
    new: [u8; 64],
}

/// The reference's state after an instruction.
struct State {
    rip: u64,
    r: [u64; 16],
    gs: u64,
    kernel_gs: u64,
    rflags: u64,
    flags: Flags,
    simd: usize,
    stores: usize,
}

/// What the reference engine did.
#[derive(Default)]
struct Trace {
    states: Vec<State>,
    simd: Vec<([[u128; 2]; 16], u32)>,
    stores: Vec<Store>,
    /// It stopped where translated code goes on.
    open: bool,
}

/// Where translated code was left.
#[derive(Debug)]
struct Exit {
    rip: u64,
    kind: Option<Kind>,
    /// What is added to RSP because the jump faults.
    undo: u64,
}

impl Cpu {
    /// From now on the reference engine checks every block. For one vCPU alone: others change memory in between.
    pub fn lockstep(&mut self) {
        self.lock = Some(Box::default());
        self.cache.keep_unlinked();
    }

    /// Runs translated code at `host` after the reference engine, and compares.
    pub(super) fn enter_lockstep(&mut self, host: u64) -> Result<(), Stop> {
        let Some(mut lock) = self.lock.take() else { return Ok(()) };
        let result = lock.enter(self, host);
        self.lock = Some(lock);
        result.map_err(Stop::Bug)
    }
}

impl Lockstep {
    /// Adds what happened.
    pub fn stats(&self, stats: &mut Stats) {
        stats.counters.extend([
            ("lockstep: pieces of code compared", self.compared),
            ("lockstep: instructions compared", self.instructions),
            ("lockstep: pieces that could not be compared", self.unknown),
            ("lockstep: pieces repeated, for memory changed meanwhile", self.repeated),
        ]);
    }

    fn enter(&mut self, cpu: &mut Cpu, host: u64) -> Result<(), String> {
        let saved = Saved::new(cpu);
        let shadow = self.shadow.take();
        let flags = match shadow {
            Some(s) if s.rip == saved.rip && s.instructions == saved.count.instructions => s.flags,
            _ => Flags { bits: frame_flags(cpu), undefined: 0 },
        };
        let piece = self.piece(cpu);
        for attempt in 1.. {
            let trace = execute(cpu, &piece, flags);
            undo(&cpu.memory, &trace);
            saved.restore(cpu);
            cpu.frame.set(at::SALT, NO_SALT);
            cpu.enter_code(host);
            match self.compare(cpu, &piece, &trace) {
                Ok(()) => break,
                Err(what) if attempt == ATTEMPTS => return Err(report(cpu, &saved, &piece, host, &what)),
                Err(_) => {
                    self.repeated += 1;
                    undo(&cpu.memory, &trace);
                    saved.restore(cpu);
                }
            }
        }
        Ok(())
    }

    /// The code at RIP, decoded.
    fn piece(&mut self, cpu: &mut Cpu) -> Arc<Piece> {
        let linear = cpu.linear();
        let core = cpu.vcpu.core();
        let (rip, bits) = (core.rip, u32::from(core.bits));
        let bytes = code(core, linear, bits);
        if let Some(piece) = self.pieces.get(&(rip, bits))
            && piece.bytes == bytes
        {
            return piece.clone();
        }
        let steps = Self::decode(cpu, &bytes, rip, bits);
        let piece = Arc::new(Piece { bytes, steps });
        if self.pieces.len() >= PIECES {
            self.pieces.clear();
        }
        self.pieces.insert((rip, bits), piece.clone());
        piece
    }

    fn decode(cpu: &mut Cpu, bytes: &[u8], rip: u64, bits: u32) -> Vec<Step> {
        let core = cpu.vcpu.core();
        let cpuid = core.cpuid.clone();
        let mut decoder = Decoder::with_ip(bits, bytes, rip, interpret::options(core));
        let mut info = InstructionInfoFactory::new();
        let mut steps = Vec::new();
        while steps.len() < AHEAD && decoder.can_decode() {
            let at = decoder.position();
            let i = decoder.decode();
            if i.is_invalid() {
                break;
            }
            let bytes = bytes[at..decoder.position()].to_vec();
            let memory = info.info(&i).used_memory().to_vec();
            let (pure, vectors) = (is_pure(&i, &cpuid), uses_vectors(&i));
            steps.push(Step { i, op: cpu.vcpu.compile(&bytes), memory, pure, vectors, bytes });
            if !pure || !matches!(i.flow_control(), FlowControl::Next | FlowControl::ConditionalBranch) {
                break;
            }
        }
        steps
    }

    /// Whether translated code has come to where the reference was.
    fn compare(&mut self, cpu: &mut Cpu, piece: &Piece, trace: &Trace) -> Result<(), String> {
        let exit = exit(cpu)?;
        let actual = frame_flags(cpu);
        let mut found = None;
        for (n, s) in trace.states.iter().enumerate().rev().filter(|(_, s)| s.rip == exit.rip) {
            let helper = matches!(exit.kind, Some(Kind::Helper { .. }))
                && piece.steps.get(n).is_some_and(|step| !step.pure && sees_flags(&step.i));
            let exact = helper || matches!(exit.kind, Some(Kind::Jump { .. }));
            let what = differences(cpu, trace, s, &exit, exact.then_some(actual));
            if what.is_empty() {
                self.compared += 1;
                self.instructions += n as u64;
                let flags = if exact { Flags { bits: actual, undefined: 0 } } else { s.flags };
                let instructions = cpu.vcpu.core().count.instructions;
                self.shadow = Some(Shadow { rip: exit.rip, instructions, flags });
                return Ok(());
            }
            found.get_or_insert(format!("after {n} instructions (left for {:?}):\n{what}", exit.kind));
        }
        if trace.open && found.is_none() {
            self.unknown += 1;
            return Ok(());
        }
        Err(found.unwrap_or_else(|| {
            let places: Vec<_> = trace.states.iter().map(|s| format!("{:#x}", s.rip)).collect();
            format!(
                "left for {:?} at {:#x}; the reference was at {}\n",
                exit.kind,
                exit.rip,
                places.join(" ")
            )
        }))
    }
}

impl Saved {
    fn new(cpu: &mut Cpu) -> Self {
        let (frame_flags, page) = (cpu.frame.get32(at::FLAGS), cpu.frame.get(at::PAGE));
        let core = cpu.vcpu.core();
        Self {
            r: core.r,
            rip: core.rip,
            lazy: core.lazy,
            rflags: core.rflags,
            attention: core.attention,
            hit: core.hit,
            delivered: core.delivered,
            exception: core.exception,
            count: core.count,
            fpu: core.fpu.clone(),
            kernel_gs: core.s.msrs.kernel_gs_base,
            frame_flags,
            page,
        }
    }

    fn restore(&self, cpu: &mut Cpu) {
        let core = cpu.vcpu.core();
        let gs = self.r[usize::from(slot::GS)];
        if core.r[usize::from(slot::GS)] != gs {
            core.set_base(index::GS, gs);
        }
        core.s.msrs.kernel_gs_base = self.kernel_gs;
        core.r = self.r;
        core.rip = self.rip;
        core.lazy = self.lazy;
        if core.rflags != self.rflags {
            core.rflags = self.rflags;
            core.flags_changed();
        }
        core.attention = self.attention;
        core.hit = self.hit;
        core.delivered = self.delivered;
        core.exception = self.exception;
        core.count = self.count;
        core.fpu.clone_from(&self.fpu);
        cpu.frame.set32(at::FLAGS, self.frame_flags);
        cpu.frame.set(at::PAGE, self.page);
    }
}

/// The bytes at `linear` to the end of its page; of both pages if the first instruction lies in two.
fn code(core: &mut Core, linear: u64, bits: u32) -> Vec<u8> {
    let Ok(Some(offset)) = core.fetch(linear) else { return Vec::new() };
    let room = 0x1000 - (linear & 0xfff);
    let mut bytes = vec![0; room.min(AHEAD as u64 * 8) as usize];
    core.memory.read(offset, &mut bytes);
    if room < decode::LONGEST && Decoder::new(bits, &bytes, interpret::options(core)).decode().is_invalid() {
        let mut rest = vec![0; (decode::LONGEST - room) as usize];
        if let Ok(Some(second)) = core.fetch(linear.wrapping_add(room)) {
            core.memory.read(second, &mut rest);
            bytes.extend(rest);
        }
    }
    bytes
}

/// Whether an instruction changes nothing but registers and memory, if it does not fault.
fn is_pure(i: &Instruction, cpuid: &Cpuid) -> bool {
    use Mnemonic as M;
    if !interpret::supported(i, cpuid) {
        return false;
    }
    match i.flow_control() {
        FlowControl::Next => {}
        FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::Call => {
            return decode::is_near(i);
        }
        FlowControl::IndirectBranch | FlowControl::IndirectCall => {
            return matches!(i.mnemonic(), M::Jmp | M::Call) && !is_far(i);
        }
        FlowControl::Return => return i.mnemonic() == M::Ret,
        _ => return false,
    }
    match i.mnemonic() {
        M::Lea | M::Leave | M::Pushfd | M::Pushfq => true,
        M::Cli | M::Sti | M::Cld | M::Swapgs | M::Stac | M::Clac => true,
        M::Mov if i.op1_kind() == OpKind::Register && i.op1_register().is_segment_register() => {
            i.op0_kind() == OpKind::Register
        }
        _ if Strings::of(i).is_some() => !i.has_rep_prefix() && !i.has_repne_prefix(),
        M::Push | M::Pop => i.op0_kind() != OpKind::Register || i.op0_register().is_gpr(),
        _ if allowed::is_bit_string(i) => matches!(i.op1_register().size(), 4 | 8),
        _ => decode::is_skipped(i) || allowed::class(i).is_some(),
    }
}

/// Whether an instruction that is left to the reference engine needs the flags; others may find dead ones.
fn sees_flags(i: &Instruction) -> bool {
    i.rflags_read() & STATUS != 0 || !matches!(i.flow_control(), FlowControl::Next | FlowControl::Return)
}

fn uses_vectors(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall)
        || (0..i.op_count())
            .any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_vector_register())
}

/// Lets the reference engine execute a piece. What it changed remains.
fn execute(cpu: &mut Cpu, piece: &Piece, flags: Flags) -> Trace {
    let core = cpu.vcpu.core();
    core.lazy = Lazy::from_bits(flags.bits);
    let mut undefined = flags.undefined;
    let mut trace = Trace::default();
    trace.simd.push((core.fpu.ymm, core.fpu.mxcsr));
    trace.push(core, undefined);
    for step in &piece.steps {
        if !step.pure {
            break;
        }
        if step.i.rflags_read() & undefined != 0 {
            trace.open = true;
            break;
        }
        let first = trace.stores.len();
        if operands(cpu.vcpu.core(), step, &mut trace.stores).is_none() {
            trace.stores.truncate(first);
            break;
        }
        if cpu.vcpu.execute(&step.op).is_err() {
            let core = cpu.vcpu.core();
            for s in trace.stores.drain(first..) {
                core.memory.write(s.offset, &s.old[..s.len]);
            }
            break;
        }
        let core = cpu.vcpu.core();
        for s in &mut trace.stores[first..] {
            core.memory.read(s.offset, &mut s.new[..s.len]);
        }
        if step.vectors {
            trace.simd.push((core.fpu.ymm, core.fpu.mxcsr));
        }
        undefined = undefined_after(&step.i, undefined);
        trace.push(core, undefined);
        let next = if core.bits == 64 { step.i.next_ip() } else { step.i.next_ip() & 0xffff_ffff };
        if core.rip != next {
            break;
        }
    }
    trace
}

/// The flags that are undefined after an instruction.
fn undefined_after(i: &Instruction, before: u32) -> u32 {
    use Mnemonic as M;
    // AF of these is clear here and on all processors.
    if matches!(i.mnemonic(), M::And | M::Or | M::Xor | M::Test) {
        return 0;
    }
    let undefined = i.rflags_undefined() & STATUS;
    before & !decode::writes(i) | undefined
}

/// Makes sure that an instruction's operands lie in memory, and notes what its stores will change. `None` if the
/// instruction must not be executed.
fn operands(core: &mut Core, step: &Step, stores: &mut Vec<Store>) -> Option<()> {
    for m in &step.memory {
        if matches!(m.access(), OpAccess::NoMemAccess | OpAccess::None) {
            continue;
        }
        let mut linear = m.virtual_address(0, |r, _, _| Some(value(core, r)))?;
        if allowed::is_bit_string(&step.i) {
            let r = step.i.op1_register();
            let bit = value(core, r);
            let words = if r.size() == 8 { bit as i64 >> 6 } else { i64::from(bit as i32 >> 5) };
            linear = linear.wrapping_add((words * r.size() as i64) as u64);
        }
        let size = m.memory_size().size() as u64;
        let write = !matches!(m.access(), OpAccess::Read | OpAccess::CondRead);
        if !(1..=64).contains(&size) {
            return None;
        }
        let mut done = 0;
        while done < size {
            let at = linear.wrapping_add(done);
            let at = if core.bits == 64 { at } else { at & 0xffff_ffff };
            let len = (size - done).min(0x1000 - (at & 0xfff));
            let mapping = core.map(at, write, core.bank).ok()??;
            if write {
                if !mapping.writable || core.memory.code().holds_code(mapping.offset) {
                    return None;
                }
                let (offset, len) = (mapping.offset + (at & 0xfff), len as usize);
                let mut s = Store { offset, len, old: [0; 64], new: [0; 64] };
                core.memory.read(offset, &mut s.old[..len]);
                stores.push(s);
            }
            done += len;
        }
    }
    Some(())
}

fn value(core: &Core, r: Register) -> u64 {
    match r {
        Register::FS => core.r[usize::from(slot::FS)],
        Register::GS => core.r[usize::from(slot::GS)],
        r if r.is_segment_register() => 0,
        r if r.is_gpr32() => core.r[usize::from(number(r))] & 0xffff_ffff,
        r if r.is_gpr16() => core.r[usize::from(number(r))] & 0xffff,
        r => core.r[usize::from(number(r))],
    }
}

impl Trace {
    fn push(&mut self, core: &Core, undefined: u32) {
        let mut r = [0; 16];
        r.copy_from_slice(&core.r[..16]);
        self.states.push(State {
            rip: core.rip,
            r,
            gs: core.r[usize::from(slot::GS)],
            kernel_gs: core.s.msrs.kernel_gs_base,
            rflags: core.rflags,
            flags: Flags { bits: core.lazy.bits(), undefined },
            simd: self.simd.len() - 1,
            stores: self.stores.len(),
        });
    }

    /// What a byte that some store touched is after the first `stores` of them.
    fn byte(&self, at: u64, stores: usize) -> Option<u8> {
        let here = |s: &&Store| (s.offset..s.offset + s.len as u64).contains(&at);
        let last = self.stores[..stores].iter().rev().find(here).map(|s| s.new[(at - s.offset) as usize]);
        last.or_else(|| self.stores.iter().find(here).map(|s| s.old[(at - s.offset) as usize]))
    }
}

fn undo(memory: &Memory, trace: &Trace) {
    for s in trace.stores.iter().rev() {
        memory.write(s.offset, &s.old[..s.len]);
    }
}

/// The status flags in the frame.
fn frame_flags(cpu: &Cpu) -> u64 {
    let ax = u64::from(cpu.frame.get32(at::FLAGS));
    (ax >> 8 & 0xd5) | (ax & 1) << 11
}

/// Where translated code was left, which nobody has looked after yet.
fn exit(cpu: &mut Cpu) -> Result<Exit, String> {
    let wide = cpu.vcpu.core().bits == 64;
    let page = cpu.frame.get(at::PAGE);
    let rip = |guest: u16| {
        let rip = page.wrapping_add(guest.into());
        if wide { rip } else { rip & 0xffff_ffff }
    };
    if cpu.frame.get32(at::REASON) != reason::SITE {
        let pc = cpu.frame.get(at::FAULT_PC);
        let (mark, _) =
            cpu.cache.mark(pc).ok_or_else(|| format!("a host fault at {pc:#x}, in no block\n"))?;
        return Ok(Exit { rip: rip(mark.guest), kind: None, undo: 0 });
    }
    let site = cpu.cache.site(cpu.frame.get32(at::SITE)).ok_or("a site that is none\n")?;
    if let Kind::Wild { undo } = site.kind {
        return Ok(Exit { rip: rip(site.guest), kind: Some(site.kind), undo: undo as u64 });
    }
    let Kind::Jump { undo } = site.kind else {
        return Ok(Exit { rip: rip(site.guest), kind: Some(site.kind), undo: 0 });
    };
    let salted = cpu.frame.get(at::LINEAR);
    let good = |t: &u64| if wide { interpret::canonical(*t) } else { t >> 32 == 0 };
    let target =
        [cpu.frame.get(at::OWN_SALT), NO_SALT].map(|salt| salted.wrapping_sub(salt)).into_iter().find(good);
    Ok(match target {
        Some(rip) => Exit { rip, kind: Some(site.kind), undo: 0 },
        None => Exit { rip: rip(site.guest), kind: Some(site.kind), undo: undo as u64 },
    })
}

/// What differs from a state of the reference's, a line each.
fn differences(cpu: &mut Cpu, trace: &Trace, s: &State, exit: &Exit, flags: Option<u64>) -> String {
    let mut out = String::new();
    let memory = cpu.memory.clone();
    let core = cpu.vcpu.core();
    let mut check = |name: &dyn Fn() -> String, is: u64, should: u64| {
        if is != should {
            let _ = writeln!(out, "  {} is {is:#x}, should be {should:#x}", name());
        }
    };
    let (count, mask) = if core.bits == 64 { (16, u64::MAX) } else { (8, 0xffff_ffff) };
    for n in 0..count {
        let is = if n == 4 { core.r[n].wrapping_add(exit.undo) } else { core.r[n] };
        check(&|| format!("{:?}", Register::RAX + n as u32), is & mask, s.r[n] & mask);
    }
    check(&|| "RFLAGS (system)".into(), core.rflags, s.rflags);
    check(&|| "GS base".into(), core.r[usize::from(slot::GS)], s.gs);
    check(&|| "KERNEL_GS_BASE".into(), core.s.msrs.kernel_gs_base, s.kernel_gs);
    if let Some(flags) = flags {
        let mut mask = 0;
        for (iced, bit) in FLAGS {
            mask |= if s.flags.undefined & iced == 0 { bit } else { 0 };
        }
        check(&|| "RFLAGS (status)".into(), flags & mask, s.flags.bits & mask);
    }
    let (ymm, mxcsr) = &trace.simd[s.simd];
    for n in (0..16).filter(|&n| core.fpu.ymm[n] != ymm[n]) {
        for (half, (&is, &should)) in core.fpu.ymm[n].iter().zip(&ymm[n]).enumerate() {
            check(&|| format!("YMM{n}[{}]", 2 * half), is as u64, should as u64);
            check(&|| format!("YMM{n}[{}]", 2 * half + 1), (is >> 64) as u64, (should >> 64) as u64);
        }
    }
    // A #XM leaves the exceptions' flags set, which the reference's fault was undone with.
    let flags = if exit.kind.is_none() { 0x3f } else { 0 };
    check(&|| "MXCSR".into(), (core.fpu.mxcsr | flags).into(), (mxcsr | flags).into());
    for store in &trace.stores {
        let mut is = [0; 64];
        memory.read(store.offset, &mut is[..store.len]);
        for (at, is) in (store.offset..).zip(&is[..store.len]) {
            let should = trace.byte(at, s.stores).unwrap_or(*is);
            check(&|| format!("the byte at {at:#x} in guest memory"), (*is).into(), should.into());
        }
    }
    out
}

/// iced's bits of the status flags, and the processor's.
const FLAGS: [(u32, u64); 6] = {
    use iced_x86::RflagsBits as B;
    use x86::flags as f;
    [(B::OF, f::OF), (B::SF, f::SF), (B::ZF, f::ZF), (B::AF, f::AF), (B::CF, f::CF), (B::PF, f::PF)]
};

fn report(cpu: &mut Cpu, saved: &Saved, piece: &Piece, host: u64, what: &str) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
    let mut out = format!("it differs from the reference engine at RIP {:#x}, {what}", saved.rip);
    let _ = writeln!(out, "guest code:");
    for step in &piece.steps {
        let _ = writeln!(out, "  {:#x}: {:<32} {:?}", step.i.ip(), hex(&step.bytes), step.i.code());
    }
    let _ = writeln!(out, "registers before:");
    for n in 0..16 {
        let _ = writeln!(out, "  {:?} {:#x}", Register::RAX + n as u32, saved.r[n]);
    }
    match cpu.cache.code(host) {
        Some((start, code)) => {
            let _ = writeln!(out, "rewritten, entered {:#x} from the start: {}", host - start, hex(code));
        }
        None => out.push_str("rewritten code is unknown\n"),
    }
    out
}
