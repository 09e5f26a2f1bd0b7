//! Two machines that are alike, but for their engines.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use machine::apic::{Apics, Local, LocalState};
use machine::cpu::{Exit, State, Vcpu};
use machine::{Bus, Clock, Machine, Memory, Power, Registers, Timers};
use x86::cpuid::Cpuid;
use x86::gpr;

use super::case::Case;
use super::layout::{self, FRAMES, PORT};

/// How a case went on one engine.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How it ended.
    pub exit: Exit,
    /// It did not end by itself in time.
    pub endless: bool,
    /// Instructions, if the engine counts them.
    pub instructions: u64,
    /// The state at its end.
    pub state: State,
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
            _ => ask(&self.local, layout::INTERRUPTS.start as u8 + (value as u8 & 7)),
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

/// One machine.
pub struct Side {
    /// Its processor.
    pub cpu: Box<dyn Vcpu>,
    memory: Memory,
    local: Arc<Local>,
    apic: LocalState,
    ended: Arc<AtomicBool>,
    watch: Arc<Watch>,
    /// What memory holds.
    pub now: Vec<u64>,
    _apics: Apics,
}

/// An engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The reference.
    Interpret,
    /// What is compared with it.
    Translate,
}

impl Side {
    fn new(engine: Engine, cpuid: Arc<Cpuid>) -> Result<Self> {
        let memory = Memory::new(1 << 20, 0)?;
        let clock = Arc::new(Clock::manual(1_000_000));
        let timers = Timers::new(clock.clone())?;
        let apics = Apics::new(1, &clock, &timers);
        let machine = Arc::new(Machine {
            memory: memory.clone(),
            ports: Bus::default(),
            mmio: Bus::default(),
            clock,
            timers,
            power: Power::default(),
        });
        let local = apics.local(0).context("there is one processor")?;
        local.write(0xf0, 0x1ff);
        let ended = Arc::new(AtomicBool::new(false));
        let ports = Ports { local: local.clone(), ended: ended.clone() };
        machine.ports.insert(PORT, 3, "sequences", Arc::new(ports))?;
        let cpu: Box<dyn Vcpu> = match engine {
            Engine::Interpret => Box::new(interpret::Cpu::new(machine, local.clone(), cpuid, 0)),
            Engine::Translate => Box::new(translate::Cpu::new(machine, local.clone(), cpuid, 0, 1)?),
        };
        let watch = Arc::new(Watch {
            number: AtomicU64::new(0),
            timed_out: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let (kicker, watching) = (cpu.kicker(), watch.clone());
        std::thread::spawn(move || {
            let mut seen = 0;
            while !watching.stop.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(20));
                let now = watching.number.load(Ordering::SeqCst);
                if now == seen && now % 2 == 1 {
                    watching.timed_out.store(true, Ordering::SeqCst);
                    kicker.kick();
                }
                seen = now;
            }
        });
        let apic = local.state();
        let now = vec![0; (layout::END / 8) as usize];
        Ok(Self { cpu, memory, local, apic, ended, watch, now, _apics: apics })
    }

    /// Makes everything as `case` wants it, with `image` in memory.
    pub fn prepare(&mut self, case: &Case, image: &[u64]) -> Result<()> {
        for (n, (&want, now)) in image.iter().zip(&mut self.now).enumerate() {
            if want != *now {
                self.memory.store(8 * n as u64, want);
                *now = want;
            }
        }
        self.local.set_state(&self.apic);
        self.cpu.set_state(&case.state())?;
        if case.interrupt != 0 {
            ask(&self.local, case.interrupt);
        }
        Ok(())
    }

    /// Runs until the end.
    ///
    /// # Errors
    /// The engine gives up.
    pub fn run(&mut self) -> Result<Outcome> {
        self.ended.store(false, Ordering::SeqCst);
        self.watch.timed_out.store(false, Ordering::SeqCst);
        self.watch.number.fetch_add(1, Ordering::SeqCst);
        let before = self.cpu.stats().instructions.unwrap_or(0);
        let (mut exit, mut endless) = (Exit::Kicked, false);
        while !self.ended.load(Ordering::SeqCst) && exit == Exit::Kicked {
            exit = self.cpu.run()?;
            if self.watch.timed_out.load(Ordering::SeqCst) {
                endless = !self.ended.load(Ordering::SeqCst);
                break;
            }
        }
        self.watch.number.fetch_add(1, Ordering::SeqCst);
        let state = self.cpu.state()?;
        self.reread();
        let instructions = self.cpu.stats().instructions.unwrap_or(0) - before;
        Ok(Outcome { exit, endless, instructions, state })
    }

    /// Looks at memory again, after it was changed by steps.
    pub fn reread(&mut self) {
        for (n, now) in self.now.iter_mut().enumerate() {
            *now = self.memory.load(8 * n as u64);
        }
    }

    /// What the pages of code hold.
    pub fn code(&self) -> Vec<u64> {
        let frames = FRAMES[..2].iter();
        frames.flat_map(|f| (0..512).map(move |n| f + 8 * n)).map(|at| self.memory.load(at)).collect()
    }

    /// The bytes at a linear address that is mapped.
    pub fn peek<const N: usize>(&mut self, linear: u64) -> [u8; N] {
        std::array::from_fn(|n| {
            let at = self.cpu.translate(linear.wrapping_add(n as u64));
            at.map_or(0, |gpa| self.memory.load(gpa))
        })
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        self.watch.stop.store(true, Ordering::SeqCst);
    }
}

/// Both machines.
pub struct Pair {
    /// With the reference engine.
    pub reference: Side,
    /// With the other.
    pub subject: Side,
    base: Vec<u64>,
}

impl Pair {
    /// Makes them.
    ///
    /// # Errors
    /// The host gives no memory, or its processor cannot be shown to a guest.
    pub fn new() -> Result<Self> {
        let cpuid = Arc::new(crate::fuzz::processor()?);
        Ok(Self {
            reference: Side::new(Engine::Interpret, cpuid.clone())?,
            subject: Side::new(Engine::Translate, cpuid)?,
            base: layout::image(),
        })
    }

    /// What memory holds at the start of a case.
    pub fn image(&self, case: &Case) -> Vec<u64> {
        let mut image = self.base.clone();
        let mut put = |at: u64, byte: u8| {
            let (word, shift) = ((at / 8) as usize, 8 * (at % 8));
            image[word] = image[word] & !(0xff << shift) | u64::from(byte) << shift;
        };
        for (n, &byte) in case.code.iter().enumerate() {
            let at = usize::from(case.start) + n;
            if at < 0x2000 {
                put(FRAMES[at >> 12] + (at as u64 & 0xfff), byte);
            }
        }
        let size = case.mode.bits() as usize / 8;
        let top = case.gpr[gpr::RSP].wrapping_sub(case.offset() + layout::DATA_AT);
        for (n, word) in case.stack.iter().enumerate() {
            for (k, &byte) in word.to_le_bytes()[..size].iter().enumerate() {
                let at = top.wrapping_add((n * size + k) as u64);
                if at < 0x8000 {
                    put(FRAMES[2 + (at >> 12) as usize] + (at & 0xfff), byte);
                }
            }
        }
        for (n, entry) in case.pages.iter().enumerate() {
            image[(layout::page(n).1 / 8) as usize] = *entry;
        }
        image
    }
}
