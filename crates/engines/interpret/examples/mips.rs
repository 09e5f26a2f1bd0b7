//! Million instructions per second on integer code: `cargo run --release -p lodge-interpret --example mips`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use interpret::Cpu;
use machine::apic::Apics;
use machine::cpu::{State, Vcpu};
use machine::{Clock, Machine, Memory};
use x86::Segment;
use x86::control::{cr0, cr4, efer};
use x86::cpuid::{Config, Cpuid, IMPLEMENTED, Model, Vendor};
use x86::segment::{attr, index};

const CODE: u64 = 0x10_0000;

/// A loop mix: a CRC by table, sorting steps, calls, string bytes; RBX is data, RSP a stack.
#[rustfmt::skip]
const LOOP: &[u8] = &[
    0xb9, 0x00, 0x04, 0x00, 0x00,                 // mov ecx,0x400
    0x31, 0xc0,                                   // xor eax,eax
    0x48, 0x89, 0xde,                             // mov rsi,rbx
    0x0f, 0xb6, 0x16,                             // movzx edx,BYTE PTR [rsi]
    0x31, 0xc2,                                   // xor edx,eax
    0x0f, 0xb6, 0xd2,                             // movzx edx,dl
    0xc1, 0xe8, 0x08,                             // shr eax,0x8
    0x33, 0x84, 0x93, 0x00, 0x10, 0x00, 0x00,     // xor eax,DWORD PTR [rbx+rdx*4+0x1000]
    0x48, 0x8d, 0x7e, 0x01,                       // lea rdi,[rsi+0x1]
    0x88, 0x07,                                   // mov BYTE PTR [rdi],al
    0x48, 0x01, 0xf0,                             // add rax,rsi
    0xa8, 0x01,                                   // test al,0x1
    0x74, 0x05,                                   // je 0x2e
    0xe8, 0x0a, 0x00, 0x00, 0x00,                 // call 0x38
    0x48, 0xff, 0xc6,                             // inc rsi
    0x48, 0xff, 0xc9,                             // dec rcx
    0x75, 0xd4,                                   // jne 0xa
    0xeb, 0xc8,                                   // jmp 0x0
    0x55,                                         // push rbp
    0x48, 0x89, 0xe5,                             // mov rbp,rsp
    0x48, 0x0f, 0xaf, 0xd0,                       // imul rdx,rax
    0x48, 0x39, 0xc2,                             // cmp rdx,rax
    0x48, 0x0f, 0x42, 0xc2,                       // cmovb rax,rdx
    0x5d,                                         // pop rbp
    0xc3,                                         // ret
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let memory = Memory::new(16 << 20, 0)?;
    let machine = Arc::new(Machine::new(memory.clone(), Clock::host(1_000_000))?);
    let apics = Apics::new(1, &machine.clock, &machine.timers);
    let local = apics.local(0).ok_or("no APIC")?;
    let config = Config {
        model: Model::V3,
        vendor: Vendor::Amd,
        available: IMPLEMENTED,
        vcpus: 1,
        tsc_khz: 1_000_000,
        host: None,
    };
    let cpuid = Arc::new(Cpuid::new(&config).map_err(|missing| format!("{missing:?}"))?);
    // 2 MiB pages one to one: a table of each level.
    for (at, entry) in [(0x1000, 0x2003u64), (0x2000, 0x3003)] {
        memory.store(at, entry);
    }
    for n in 0..8u64 {
        memory.store(0x3000 + 8 * n, n << 21 | 0x83);
    }
    memory.write(CODE, LOOP);
    let mut cpu = Cpu::new(machine, local, cpuid, 0);
    cpu.set_state(&long_mode())?;
    let kick = cpu.kicker();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(2));
        kick.kick();
    });
    let start = Instant::now();
    let exit = cpu.run()?;
    let seconds = start.elapsed().as_secs_f64();
    let stats = cpu.stats();
    let millions = stats.instructions.unwrap_or(0) as f64 / 1e6;
    println!(
        "{exit:?} at {:#x}: {:.0} million instructions per second",
        cpu.state()?.rip,
        millions / seconds
    );
    println!("{:?}", stats.counters);
    Ok(())
}

fn long_mode() -> State {
    let mut state = State::reset(true, 0);
    let data = attr::P | attr::S | attr::RW | attr::ACCESSED | attr::G | attr::DB;
    let flat = |attributes| Segment { selector: 8, attributes, limit: u32::MAX, base: 0 };
    state.segments = [flat(data); 6];
    state.segments[index::CS] = flat(data & !attr::DB | attr::CODE | attr::L);
    state.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::WP;
    state.cr3 = 0x1000;
    state.cr4 = cr4::PAE;
    state.efer = efer::LME | efer::LMA;
    state.rip = CODE;
    state.gpr[x86::gpr::RBX] = 0x20_0000;
    state.gpr[x86::gpr::RSP] = 0x30_0000;
    state
}
