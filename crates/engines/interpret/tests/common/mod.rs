//! A tiny machine for snippets of machine code. A write to port 0xf4 stops the vCPU, so does every exception.

use std::sync::Arc;

use interpret::Cpu;
use machine::apic::{Apics, Local};
use machine::cpu::{Exit, State, Vcpu};
use machine::{Clock, Machine, Memory, Registers};
use x86::Segment;
use x86::control::{cr0, cr4, efer};
use x86::cpuid::{Config, Cpuid, IMPLEMENTED, Model, Vendor};
use x86::segment::{attr, index};

/// Where snippets lie.
pub const CODE: u64 = 0x10_0000;
/// 2 MiB of linear addresses in 4 KiB pages, at first mapped one to one and for the supervisor alone.
pub const PAGES: u64 = 0x40_0000;
/// Top of the stack.
pub const STACK: u64 = 0x30_0000;
const GDT: u64 = 0x8000;
const IDT: u64 = 0x9000;
const TSS: u64 = 0xa000;
const HANDLERS: u64 = 0x7000;
const TABLE: u64 = 0x4000;

/// `out 0xf4, al`: ends every snippet.
pub const STOP: [u8; 2] = [0xe6, 0xf4];

struct Stop(Arc<Local>);

impl Registers for Stop {
    fn read(&self, _: u64, _: u8) -> u64 {
        0
    }
    fn write(&self, _: u64, _: u8, _: u64) {
        self.0.kick();
    }
}

/// A vCPU with its machine.
pub struct Guest {
    pub cpu: Cpu,
    pub memory: Memory,
}

/// How a snippet ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    Stopped,
    /// Vector, error code if it has one, and RIP that was pushed.
    Exception(u8, Option<u64>, u64),
    TripleFault,
}

impl Guest {
    fn new() -> Self {
        let memory = Memory::new(16 << 20, 0).unwrap();
        let machine = Machine::new(memory.clone(), Clock::manual(1_000_000)).unwrap();
        let local = Apics::new(1, &machine.clock, &machine.timers).local(0).unwrap();
        machine.ports.insert(0xf4, 1, "stop", Arc::new(Stop(local.clone()))).unwrap();
        let config = Config {
            model: Model::V3,
            vendor: Vendor::Amd,
            available: IMPLEMENTED,
            vcpus: 1,
            tsc_khz: 1_000_000,
            host: None,
        };
        let cpuid = Cpuid::new(&config).unwrap();
        let cpu = Cpu::new(Arc::new(machine), local.clone(), Arc::new(cpuid), 0);
        Self { cpu, memory }
    }

    /// Long mode, privilege 0, with `code` at [`CODE`].
    pub fn long(code: &[u8]) -> Self {
        let mut guest = Self::new();
        let memory = &guest.memory;
        for (at, entry) in [(0x1000, 0x2007u64), (0x2000, 0x3007), (0x3000 + 8 * (PAGES >> 21), TABLE | 7)] {
            memory.store(at, entry);
        }
        for n in (0..8u64).filter(|n| n << 21 != PAGES) {
            memory.store(0x3000 + 8 * n, n << 21 | 0x83);
        }
        for n in 0..512 {
            guest.memory.store(TABLE + 8 * n, (PAGES + (n << 12)) | 0x3);
        }
        let memory = &guest.memory;
        memory.store(GDT + 8, 0x00af_9b00_0000_ffffu64);
        memory.store(GDT + 16, 0x00cf_9300_0000_ffffu64);
        for v in 0..32u64 {
            memory.store(IDT + 16 * v, (HANDLERS + 16 * v) | 8 << 16 | 0x8e00 << 32);
            memory.write(HANDLERS + 16 * v, &STOP);
        }
        memory.store(TSS + 0x24, 0x20_0000u64); // IST1
        memory.write(CODE, code);
        guest.cpu.set_state(&long_state()).unwrap();
        guest
    }

    /// Real mode, with `code` at 0000:8000 and a stack below it.
    pub fn real(code: &[u8]) -> Self {
        let mut guest = Self::new();
        guest.memory.write(0x8000, code);
        let mut state = State::reset(true, 0);
        state.segments[index::CS] = Segment {
            attributes: attr::P | attr::S | attr::CODE | attr::RW | attr::ACCESSED,
            ..Segment::real(0)
        };
        state.rip = 0x8000;
        state.gpr[x86::gpr::RSP] = 0x7000;
        guest.cpu.set_state(&state).unwrap();
        guest
    }

    /// Changes the state before (or between) runs.
    pub fn set(&mut self, change: impl FnOnce(&mut State)) {
        let mut state = self.cpu.state().unwrap();
        change(&mut state);
        self.cpu.set_state(&state).unwrap();
    }

    /// Sets the entry of the page of [`PAGES`] that holds `linear`.
    pub fn map(&self, linear: u64, entry: u64) {
        self.memory.store(TABLE + 8 * ((linear - PAGES) >> 12), entry);
    }

    /// The entry of the page of [`PAGES`] that holds `linear`.
    pub fn entry(&self, linear: u64) -> u64 {
        self.memory.load(TABLE + 8 * ((linear - PAGES) >> 12))
    }

    /// Runs until the snippet stops. For exceptions in long mode the frame is undone, all but the flags.
    pub fn run(&mut self) -> (End, State) {
        let exit = self.cpu.run().unwrap();
        let mut state = self.cpu.state().unwrap();
        if exit == Exit::TripleFault {
            return (End::TripleFault, state);
        }
        assert_eq!(exit, Exit::Kicked);
        if !(HANDLERS..HANDLERS + 0x200).contains(&state.rip) || state.cr0 & cr0::PG == 0 {
            return (End::Stopped, state);
        }
        let vector = ((state.rip - HANDLERS) >> 4) as u8;
        let has_code = matches!(vector, 8 | 10..=14 | 17);
        let mut sp = state.gpr[x86::gpr::RSP];
        let code = has_code.then(|| self.memory.load(sp));
        sp += if has_code { 8 } else { 0 };
        let rip = self.memory.load(sp);
        state.rflags = self.memory.load(sp + 16);
        state.gpr[x86::gpr::RSP] = self.memory.load(sp + 24);
        (End::Exception(vector, code, rip), state)
    }
}

fn long_state() -> State {
    let mut state = State::reset(true, 0);
    let data = attr::P | attr::S | attr::RW | attr::ACCESSED | attr::G | attr::DB;
    let flat = |selector, attributes| Segment { selector, attributes, limit: u32::MAX, base: 0 };
    state.segments = [flat(16, data); 6];
    state.segments[index::CS] = flat(8, data & !attr::DB | attr::CODE | attr::L);
    state.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::WP;
    state.cr3 = 0x1000;
    state.cr4 = cr4::PAE;
    state.efer = efer::LME | efer::LMA | efer::NXE;
    state.gdtr = x86::Table { base: GDT, limit: 23 };
    state.idtr = x86::Table { base: IDT, limit: 0x1ff };
    state.tr = Segment { selector: 0x40, attributes: attr::P | 11, limit: 0x67, base: TSS };
    state.rip = CODE;
    state.gpr[x86::gpr::RSP] = STACK;
    state
}

/// The bytes of several pieces.
pub fn code(pieces: &[&[u8]]) -> Vec<u8> {
    pieces.concat()
}

/// Linear address of IDT entry `vector`.
pub fn gate(vector: u64) -> u64 {
    IDT + 16 * vector
}
