//! Machines that are alike, but for their engines.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use machine::apic::{Apics, Local, LocalState};
use machine::cpu::{Exit, State, Vcpu};
use machine::{Clock, Machine, Memory, Registers};
use vm_memory::{Bytes, GuestAddress};
use x86::cpuid::Cpuid;
use x86::gpr;

use super::case::Case;
use super::layout::{self, END, FRAMES, INTERRUPTS, PAGES, PORT};

/// Instructions after which a case counts as endless: those that end execute some hundreds.
const MOST: u64 = 3000;
/// How often a case is looked at that does not end, and how often it may be seen.
const TICK: Duration = Duration::from_millis(20);
const TICKS: u32 = 15;
const PAGE: usize = 0x1000;
/// More exits than there are.
const NEVER: u64 = 1 << 60;

/// How a case went on one engine.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// How it ended.
    pub exit: Exit,
    /// It did not end by itself in time.
    pub endless: bool,
    /// The state at its end.
    pub state: State,
}

/// Where translated code was when it was interrupted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    rip: u64,
    gpr: [u64; 16],
}

/// The ports with which a case talks to us.
struct Ports {
    local: Arc<Local>,
    ended: Arc<AtomicBool>,
}

impl Registers for Ports {
    fn read(&self, _: u64, _: u8) -> u64 {
        0x5a5a_5a5a
    }

    fn write(&self, offset: u64, _: u8, value: u64) {
        match offset {
            0 => {
                self.ended.store(true, Ordering::SeqCst);
                self.local.kick();
            }
            1 => self.local.write(0xb0, 0),
            _ => ask(&self.local, INTERRUPTS.start as u8 + (value as u8 & 7)),
        }
    }
}

/// Sends an interrupt, as an APIC does to itself.
fn ask(local: &Local, vector: u8) {
    local.write(0x300, 0x4_0000 | u32::from(vector));
}

/// Counts cases, and ends those that last.
struct Watch {
    number: AtomicU64,
    timed_out: AtomicBool,
    stop: AtomicBool,
}

/// A machine's engine.
enum Engine {
    Interpret(Box<interpret::Cpu>),
    Translate(Box<translate::Cpu>),
}

/// One machine.
pub struct Side {
    engine: Engine,
    memory: Memory,
    local: Arc<Local>,
    apic: LocalState,
    ended: Arc<AtomicBool>,
    watch: Arc<Watch>,
    /// What memory holds, as far as we know.
    pub now: Vec<u8>,
    _apics: Apics,
}

fn start_watch(cpu: &dyn Vcpu) -> Arc<Watch> {
    let watch = Arc::new(Watch {
        number: AtomicU64::new(0),
        timed_out: AtomicBool::new(false),
        stop: AtomicBool::new(false),
    });
    let (kicker, watching) = (cpu.kicker(), watch.clone());
    std::thread::spawn(move || {
        let (mut seen, mut ticks) = (0, 0);
        while !watching.stop.load(Ordering::SeqCst) {
            std::thread::sleep(TICK);
            let now = watching.number.load(Ordering::SeqCst);
            ticks = if now == seen && now % 2 == 1 { ticks + 1 } else { 0 };
            if ticks > TICKS {
                watching.timed_out.store(true, Ordering::SeqCst);
                kicker.kick();
            }
            seen = now;
        }
    });
    watch
}

impl Side {
    /// A machine: `None` has the reference engine, else dead flags are exact or not.
    fn new(exact: Option<bool>, cpuid: Arc<Cpuid>) -> Result<Self> {
        let memory = Memory::new(1 << 20, 0)?;
        let machine = Arc::new(Machine::new(memory.clone(), Clock::manual(1_000_000))?);
        let apics = Apics::new(1, &machine.clock, &machine.timers);
        let local = apics.local(0).context("there is one processor")?;
        local.write(0xf0, 0x1ff);
        let ended = Arc::new(AtomicBool::new(false));
        let ports = Ports { local: local.clone(), ended: ended.clone() };
        machine.ports.insert(PORT, 3, "sequences", Arc::new(ports))?;
        let (engine, watch) = match exact {
            None => {
                let cpu = Box::new(interpret::Cpu::new(machine, local.clone(), cpuid, 0));
                let watch = start_watch(&*cpu);
                (Engine::Interpret(cpu), watch)
            }
            Some(exact) => {
                let mut cpu = Box::new(translate::Cpu::new(machine, local.clone(), cpuid, 0, 1)?);
                cpu.keep_all_flags(exact);
                let watch = start_watch(&*cpu);
                (Engine::Translate(cpu), watch)
            }
        };
        let apic = local.state();
        Ok(Self { engine, memory, local, apic, ended, watch, now: vec![0; END as usize], _apics: apics })
    }

    /// Its processor.
    pub fn cpu(&mut self) -> &mut dyn Vcpu {
        match &mut self.engine {
            Engine::Interpret(cpu) => &mut **cpu,
            Engine::Translate(cpu) => &mut **cpu,
        }
    }

    /// How its instructions are decoded.
    pub fn options(&mut self) -> u32 {
        match &mut self.engine {
            Engine::Interpret(cpu) => interpret::options(cpu.core()),
            Engine::Translate(_) => 0,
        }
    }

    /// Makes everything as `case` wants it, with `image` in memory.
    pub fn prepare(&mut self, case: &Case, image: &[u8]) -> Result<()> {
        let mut now = std::mem::take(&mut self.now);
        for (n, (want, now)) in image.chunks(PAGE).zip(now.chunks_mut(PAGE)).enumerate() {
            if want != now {
                self.write(n * PAGE, want, now);
                now.copy_from_slice(want);
            }
        }
        self.now = now;
        self.local.set_state(&self.apic);
        self.cpu().set_state(&case.state())?;
        if case.interrupt != 0 && case.pause == 0 {
            ask(&self.local, case.interrupt);
        }
        Ok(())
    }

    /// Writes the words that differ, so that no more code than these hold counts as changed.
    fn write(&self, at: usize, want: &[u8], now: &[u8]) {
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |w: u64, &b| w << 8 | u64::from(b));
        for (n, (want, now)) in want.chunks(8).zip(now.chunks(8)).enumerate() {
            if want != now {
                self.memory.store((at + 8 * n) as u64, word(want));
            }
        }
    }

    fn begin(&mut self) {
        self.ended.store(false, Ordering::SeqCst);
        self.watch.timed_out.store(false, Ordering::SeqCst);
        self.watch.number.fetch_add(1, Ordering::SeqCst);
    }

    fn finish(&mut self, exit: Exit, endless: bool) -> Result<Outcome> {
        self.watch.number.fetch_add(1, Ordering::SeqCst);
        let state = self.cpu().state()?;
        self.reread();
        Ok(Outcome { exit, endless, state })
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    fn is_late(&self) -> bool {
        self.watch.timed_out.load(Ordering::SeqCst)
    }

    /// Runs until the end.
    ///
    /// # Errors
    /// The engine gives up.
    pub fn run(&mut self) -> Result<Outcome> {
        self.begin();
        let (exit, endless) = self.go_on()?;
        self.finish(exit, endless)
    }

    fn go_on(&mut self) -> Result<(Exit, bool)> {
        if let Engine::Interpret(cpu) = &mut self.engine {
            return Ok(bounded(cpu, &self.ended, &self.watch.timed_out));
        }
        let mut exit = Exit::Kicked;
        while !self.has_ended() && exit == Exit::Kicked {
            exit = self.cpu().run()?;
            if self.is_late() {
                return Ok((exit, !self.has_ended()));
            }
        }
        Ok((exit, false))
    }

    /// Runs until translated code has been left `case.pause` times, has the case's interrupt come there, and goes on until
    /// the end. Tells where that was, if it came to that.
    ///
    /// # Errors
    /// The engine gives up.
    pub fn run_interrupted(&mut self, case: &Case) -> Result<(Outcome, Option<Point>)> {
        self.begin();
        if let Engine::Translate(cpu) = &mut self.engine {
            cpu.pause_after(case.pause.into());
        }
        let exit = self.cpu().run()?;
        let late = self.is_late();
        if self.has_ended() || exit != Exit::Kicked || late {
            if let Engine::Translate(cpu) = &mut self.engine {
                cpu.pause_after(NEVER);
            }
            let endless = late && !self.has_ended();
            return Ok((self.finish(exit, endless)?, None));
        }
        let state = self.cpu().state()?;
        ask(&self.local, case.interrupt);
        let (exit, endless) = self.go_on()?;
        Ok((self.finish(exit, endless)?, Some(Point { rip: state.rip, gpr: state.gpr })))
    }

    /// Runs to the `n`-th time that execution comes to `point`, has the interrupt come there, and goes on until the end.
    /// `None` if it does not come there.
    ///
    /// # Errors
    /// The engine gives up.
    pub fn run_to(&mut self, point: &Point, n: u32, interrupt: u8) -> Result<Option<Outcome>> {
        self.begin();
        let mut left = n;
        let mut found = false;
        for _ in 0..MOST {
            if self.is_at(point)? {
                if left == 0 {
                    found = true;
                    break;
                }
                left -= 1;
            }
            if self.step().is_some() {
                break;
            }
        }
        if !found {
            self.finish(Exit::Kicked, false)?;
            return Ok(None);
        }
        ask(&self.local, interrupt);
        let (exit, endless) = self.go_on()?;
        self.finish(exit, endless).map(Some)
    }

    /// Lets the reference engine execute one instruction, or deliver one interrupt. Tells whether it ends.
    pub fn step(&mut self) -> Option<Exit> {
        let Engine::Interpret(cpu) = &mut self.engine else { return Some(Exit::Kicked) };
        let done = if cpu.wants_attention() { cpu.attend() } else { cpu.instruction().map(|()| None) };
        done.unwrap_or_else(|_| Some(cpu.shut_down()))
    }

    /// Has an interrupt come.
    pub fn interrupt(&self, vector: u8) {
        ask(&self.local, vector);
    }

    /// Whether execution is at `point`.
    pub fn is_at(&mut self, point: &Point) -> Result<bool> {
        if let Engine::Interpret(cpu) = &mut self.engine
            && cpu.core().rip != point.rip
        {
            return Ok(false);
        }
        let state = self.cpu().state()?;
        Ok(state.rip == point.rip && state.gpr == point.gpr)
    }

    /// The page-table entries that the case decides about, as they are now.
    pub fn entries(&self) -> [u64; PAGES] {
        std::array::from_fn(|n| self.memory.load(layout::page(n).1))
    }

    /// Looks at memory again.
    pub fn reread(&mut self) {
        let all = self.memory.guest().read_slice(&mut self.now, GuestAddress(0));
        debug_assert!(all.is_ok(), "{all:?}");
    }

    /// The bytes at a linear address that is mapped.
    pub fn peek<const N: usize>(&mut self, linear: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let first = N.min(PAGE - (linear as usize & (PAGE - 1)));
        for (at, piece) in [(0, 0..first), (first, first..N)] {
            if let Some(gpa) = self.cpu().translate(linear.wrapping_add(at as u64))
                && !piece.is_empty()
                && gpa + 16 <= END
            {
                self.memory.read(gpa, &mut bytes[piece]);
            }
        }
        bytes
    }
}

/// Runs until the end, or until a case that ends would have ended: whether it did not.
fn bounded(cpu: &mut interpret::Cpu, ended: &AtomicBool, late: &AtomicBool) -> (Exit, bool) {
    let begun = cpu.core().count.instructions;
    loop {
        let exit = match cpu.blocks(16) {
            Ok(()) if cpu.wants_attention() => cpu.attend(),
            Ok(()) => Ok(None),
            Err(shutdown) => Err(shutdown),
        };
        match exit {
            Ok(Some(Exit::Kicked)) if !ended.load(Ordering::SeqCst) && !late.load(Ordering::SeqCst) => {}
            Ok(Some(exit)) => return (exit, !ended.load(Ordering::SeqCst)),
            Ok(None) if cpu.core().count.instructions - begun > MOST => return (Exit::Kicked, true),
            Ok(None) => {}
            Err(_) => return (cpu.shut_down(), false),
        }
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        self.watch.stop.store(true, Ordering::SeqCst);
    }
}

/// All machines.
pub struct Pair {
    /// With the reference engine.
    pub reference: Side,
    /// With the other: dead flags may be stale, and are exact.
    pub subjects: [Side; 2],
    base: Vec<u8>,
    /// What the last case wanted in memory, and the pages in which that is not `base`.
    image: Vec<u8>,
    patched: Vec<usize>,
}

impl Pair {
    /// Makes them.
    ///
    /// # Errors
    /// The host gives no memory, or its processor cannot be shown to a guest.
    pub fn new() -> Result<Self> {
        let cpuid = Arc::new(crate::fuzz::processor()?);
        let subjects = [Side::new(Some(false), cpuid.clone())?, Side::new(Some(true), cpuid.clone())?];
        let (image, patched) = (Vec::new(), Vec::new());
        Ok(Self { reference: Side::new(None, cpuid)?, subjects, base: layout::image(), image, patched })
    }

    /// What memory holds at the start of a case: to be given back to [`Pair::keep`], which makes the next one cheap.
    pub fn image(&mut self, case: &Case) -> Vec<u8> {
        let mut image = std::mem::take(&mut self.image);
        let patched = std::mem::take(&mut self.patched);
        if image.is_empty() {
            image.clone_from(&self.base);
        }
        for page in patched {
            image[page..page + PAGE].copy_from_slice(&self.base[page..page + PAGE]);
        }
        for (n, &byte) in case.code.iter().enumerate() {
            let at = usize::from(case.start) + n;
            if at < 2 * PAGE {
                image[FRAMES[at >> 12] as usize + (at & 0xfff)] = byte;
            }
        }
        let size = case.mode.bits() as usize / 8;
        let top = case.gpr[gpr::RSP].wrapping_sub(case.offset() + layout::DATA_AT);
        for (n, word) in case.stack.iter().enumerate() {
            for (k, &byte) in word.to_le_bytes()[..size].iter().enumerate() {
                let at = top.wrapping_add((n * size + k) as u64);
                if at < 0x8000 {
                    image[(FRAMES[2 + (at >> 12) as usize] + (at & 0xfff)) as usize] = byte;
                }
            }
        }
        for (n, entry) in case.pages.iter().enumerate() {
            let at = layout::page(n).1 as usize;
            image[at..at + 8].copy_from_slice(&entry.to_le_bytes());
        }
        image
    }

    /// Takes back the image of `case`.
    pub fn keep(&mut self, image: Vec<u8>, case: &Case) {
        self.image = image;
        let top = case.gpr[gpr::RSP].wrapping_sub(case.offset() + layout::DATA_AT);
        let stack = [top >> 12, (top >> 12) + 1].map(|n| n as usize).into_iter().filter(|&n| n < 8);
        let frames = [0, 1].into_iter().chain(stack.map(|n| 2 + n)).map(|n| FRAMES[n]);
        self.patched = frames.chain([layout::TABLE]).map(|at| at as usize).collect();
    }
}
