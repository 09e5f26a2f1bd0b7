//! Tests of the whole engine: a processor, a little memory, a few instructions.

mod changes;
mod files;
mod lockstep;

use std::sync::Arc;

use machine::apic::Apics;
use machine::cpu::{Error, Exit, State, Vcpu};
use machine::{Clock, Machine, Memory};
use x86::cpuid::{Config, Cpuid, IMPLEMENTED, Model, Vendor};
use x86::segment::{attr, index};
use x86::{Segment, Table, flags};

use crate::Cpu;

/// Where code starts; memory is mapped to linear addresses one to one.
const CODE: u64 = 0x1_0000;
const SIZE: u64 = 2 << 20;
const PML4: u64 = 0x1000;

/// A processor in ring 0, in 64-bit or 32-bit mode, with code at [`CODE`]. Without a usable IDT: an exception ends it.
struct Bench {
    cpu: Cpu,
    memory: Memory,
    _apics: Apics,
}

impl Bench {
    fn new(bits: u32, code: &[u8], gpr: &[u64; 16]) -> Self {
        let memory = Memory::new(SIZE, 0).unwrap();
        let machine = Arc::new(Machine::new(memory.clone(), Clock::manual(1_000_000)).unwrap());
        let apics = Apics::new(1, &machine.clock, &machine.timers);
        // One page of 1 GiB.
        memory.write(PML4, &(PML4 + 0x1023).to_le_bytes());
        memory.write(PML4 + 0x1000, &0xe3u64.to_le_bytes());
        memory.write(CODE, code);
        let config = Config {
            model: Model::V3,
            vendor: Vendor::Amd,
            available: IMPLEMENTED,
            vcpus: 1,
            tsc_khz: 1_000_000,
            host: None,
        };
        let cpuid = Arc::new(Cpuid::new(&config).unwrap());
        let mut cpu = Cpu::new(machine, apics.local(0).unwrap(), cpuid, 0, 1).unwrap();
        cpu.set_state(&state(bits, gpr)).unwrap();
        Self { cpu, memory, _apics: apics }
    }

    fn run(&mut self) -> Result<Exit, Error> {
        self.cpu.run()
    }
}

fn state(bits: u32, gpr: &[u64; 16]) -> State {
    use x86::control::{cr0, cr4, efer, xcr0};
    let mut s = State::reset(true, 0);
    s.gpr = *gpr;
    s.rip = CODE;
    s.rflags = flags::FIXED;
    s.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP;
    s.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    s.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
    let data = attr::P | attr::S | attr::ACCESSED | attr::RW | attr::G;
    let flat = Segment { selector: 0x10, attributes: data | attr::DB, limit: u32::MAX, base: 0 };
    s.segments = [flat; 6];
    let kind = if bits == 64 { attr::L } else { attr::DB };
    s.segments[index::CS] = Segment { selector: 8, attributes: data | attr::CODE | kind, ..flat };
    s.idtr = Table { base: 0, limit: 0 };
    if bits == 64 {
        s.cr0 |= cr0::PG;
        s.cr3 = PML4;
        s.efer = efer::LME | efer::LMA | efer::NXE;
    }
    s
}
