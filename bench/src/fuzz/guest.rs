//! The interpreter's side: a machine whose user-mode memory looks like the oracle's.

use std::sync::Arc;

use anyhow::{Context, Result};
use machine::apic::Apics;
use machine::cpu::{Debug, Fpu, State, Vcpu};
use machine::{Clock, Machine, Memory};
use native::SimdState;
use native::oracle::{CODE, CODE_END, Case, CpuImage, DATA, DATA_SIZE, End, Mode, READ_ONLY, Reply, WINDOW};
use vm_memory::{Bytes, GuestAddress};
use x86::control::{cr0, cr4, efer};
use x86::cpuid::{Config, Cpuid, Features, IMPLEMENTED, Leaf, Model, NATIVE, Vendor};
use x86::segment::{attr, index};
use x86::{Segment, Table, gpr};

/// Where ring 0 sees the machine's first 2 MiB: user code has nothing there.
const KERNEL: u64 = 0xffff_8000_0000_0000;
/// Where things are in the machine's RAM.
const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const STACK: u64 = 0x9000;
/// One address for each vector: execution that arrives there tells which.
const HANDLERS: u64 = 0xa000;
const PAGE_TABLES: u64 = 0x1_0000;
/// The frames behind the oracle's code, data and read-only pages.
const CODE_FRAME: u64 = 0x20_0000;
const DATA_FRAME: u64 = 0x21_0000;
const READ_ONLY_FRAME: u64 = 0x22_0000;
/// A REP instruction of the generator ends within so many iterations.
const ITERATIONS: usize = 64;

/// The machine.
pub struct Guest {
    cpu: interpret::Cpu,
    memory: Memory,
    _timers: Apics,
}

impl Guest {
    /// Makes it.
    ///
    /// # Errors
    /// The host gives no memory, or its processor cannot be shown to a guest.
    pub fn new() -> Result<Self> {
        let memory = Memory::new(4 << 20, 0)?;
        let machine = Arc::new(Machine::new(memory.clone(), Clock::manual(1_000_000))?);
        let apics = Apics::new(1, &machine.clock, &machine.timers);
        let local = apics.local(0).context("there is one processor")?;
        let mut cpu = interpret::Cpu::new(machine, local, Arc::new(processor()?), 0);
        cpu.debug(&Debug { step: true, ..Debug::default() })?;
        let guest = Self { cpu, memory, _timers: apics };
        guest.tables()?;
        Ok(guest)
    }

    fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.memory.guest().write_slice(bytes, GuestAddress(at))?)
    }

    fn word(&self, at: u64, value: u64) -> Result<()> {
        self.put(at, &value.to_le_bytes())
    }

    /// Descriptors and page tables.
    fn tables(&self) -> Result<()> {
        self.word(GDT + 8, 0x00af_9b00_0000_ffff)?;
        self.word(TSS + 4, KERNEL + STACK)?;
        for vector in 0..256 {
            let to = KERNEL + HANDLERS + 16 * vector;
            // Interrupt gates that user code may use: INT3 and INTO are among the instructions.
            self.word(IDT + 16 * vector, to & 0xffff | 8 << 16 | 0xee00 << 32 | (to >> 16) << 48)?;
            self.word(IDT + 16 * vector + 8, to >> 32)?;
        }
        let table = |n: u64| PAGE_TABLES + 0x1000 * n;
        let all = 0x67; // present, writable, user, accessed, dirty
        self.word(table(0), table(1) | all)?;
        self.word(table(1), table(2) | all)?;
        self.word(table(0) + 8 * 256, table(5) | all)?;
        self.word(table(5), table(6) | all)?;
        self.word(table(6), 0xe3)?; // the first 2 MiB, for ring 0
        let map = |directory: u64, linear: u64, frame: u64, flags: u64| {
            self.word(table(2) + 8 * (linear >> 21 & 511), table(directory) | all)?;
            self.word(table(directory) + 8 * (linear >> 12 & 511), frame | flags)
        };
        for page in 0..(CODE_END - CODE) >> 12 {
            map(3, CODE + (page << 12), CODE_FRAME + (page << 12), 0x65)?;
        }
        for page in 0..DATA_SIZE as u64 >> 12 {
            map(4, DATA + (page << 12), DATA_FRAME + (page << 12), all | 1 << 63)?;
        }
        map(4, READ_ONLY, READ_ONLY_FRAME, 0x65 | 1 << 63)?;
        self.put(CODE_FRAME, &vec![0xcc; (CODE_END - CODE) as usize])
    }

    /// Runs a case.
    pub fn run(&mut self, case: &Case) -> Reply {
        self.try_run(case).unwrap_or_else(|_| Reply {
            end: End::Died,
            image: case.image.clone(),
            memory: case.memory,
            strayed: false,
        })
    }

    fn try_run(&mut self, case: &Case) -> Result<Reply> {
        let offset = if case.mode == Mode::Protected16 { case.image.rip } else { case.image.rip - CODE };
        let mut data = vec![0; DATA_SIZE];
        data[case.window..case.window + WINDOW].copy_from_slice(&case.memory);
        self.put(DATA_FRAME, &data)?;
        self.put(CODE_FRAME + offset, &case.code)?;
        self.cpu.set_state(&state(case))?;
        let mut after = self.cpu.state()?;
        for _ in 0..ITERATIONS {
            self.cpu.run()?;
            after = self.cpu.state()?;
            let trapped = after.segments[index::CS].selector & 3 == 0;
            if trapped || case.step || after.rip != case.image.rip {
                break;
            }
        }
        self.put(CODE_FRAME + offset, &[0xcc; 15])?;
        self.memory.guest().read_slice(&mut data, GuestAddress(DATA_FRAME))?;
        let mut memory = [0; WINDOW];
        memory.copy_from_slice(&data[case.window..case.window + WINDOW]);
        let (before, behind) = (&data[..case.window], &data[case.window + WINDOW..]);
        let strayed = before.iter().chain(behind).any(|&b| b != 0);
        let (image, end) = self.outcome(&after)?;
        Ok(Reply { end, image, memory, strayed })
    }

    /// What a state says: in a handler, the exception and the registers at it.
    fn outcome(&self, after: &State) -> Result<(CpuImage, End)> {
        let mut image = CpuImage {
            gpr: after.gpr,
            rip: after.rip,
            rflags: after.rflags,
            fs_base: after.segments[index::FS].base,
            gs_base: after.segments[index::GS].base,
            simd: from_canonical(&after.fpu),
        };
        if after.segments[index::CS].selector & 3 != 0 {
            return Ok((image, End::Completed));
        }
        let vector = (after.rip.wrapping_sub(KERNEL + HANDLERS) >> 4) as u8;
        let has_code = matches!(vector, 8 | 10..=14 | 17);
        let frame = after.gpr[gpr::RSP].wrapping_sub(KERNEL);
        let word = |n: u64| self.memory.guest().read_obj::<u64>(GuestAddress(frame + 8 * n));
        let (error, frame) = if has_code { (word(0)?, 1) } else { (0, 0) };
        image.rip = word(frame)?;
        image.rflags = word(frame + 2)?;
        image.gpr[gpr::RSP] = word(frame + 3)?;
        Ok((image, End::Fault { vector, error, address: after.cr2 }))
    }
}

pub(crate) fn processor() -> Result<Cpuid> {
    let host = Features::from_leaves(|leaf, subleaf| {
        let r = raw_cpuid::cpuid!(leaf, subleaf);
        Leaf { eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx }
    });
    let config = Config {
        model: Model::Host,
        vendor: Vendor::Amd,
        available: IMPLEMENTED.without(NATIVE).or(host.and(NATIVE)),
        vcpus: 1,
        tsc_khz: 1_000_000,
        host: None,
    };
    Cpuid::new(&config).map_err(|missing| anyhow::anyhow!("this host lacks {missing:?}"))
}

fn state(case: &Case) -> State {
    let mut s = State::reset(true, 0);
    let image = &case.image;
    s.gpr = image.gpr;
    s.rip = image.rip;
    s.rflags = image.rflags;
    s.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
    s.cr3 = PAGE_TABLES;
    s.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
    s.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    s.xcr0 = 7;
    s.gdtr = Table { base: KERNEL + GDT, limit: 0xf };
    s.idtr = Table { base: KERNEL + IDT, limit: 0xfff };
    s.tr = Segment { selector: 0x40, attributes: attr::P | 11, limit: 0x67, base: KERNEL + TSS };
    s.ldtr = Segment { attributes: attr::P | 2, ..Segment::default() };
    let user = attr::P | attr::S | attr::ACCESSED | attr::RW | attr::DPL;
    let flat = Segment { selector: 0x2b, attributes: user | attr::DB | attr::G, limit: u32::MAX, base: 0 };
    s.segments = [flat; 6];
    let code = user | attr::CODE;
    s.segments[index::CS] = match case.mode {
        Mode::Long => Segment { selector: 0x33, attributes: code | attr::L | attr::G, ..flat },
        Mode::Compat32 => Segment { selector: 0x23, attributes: code | attr::DB | attr::G, ..flat },
        Mode::Protected16 => {
            let small = Segment { attributes: user, limit: 0x1fff, base: DATA, ..flat };
            [index::DS, index::ES, index::SS].into_iter().for_each(|n| s.segments[n] = small);
            Segment { selector: 0x1f, attributes: code, limit: 0x1fff, base: CODE }
        }
    };
    s.fpu = to_canonical(&image.simd);
    s
}

fn to_canonical(s: &SimdState) -> Fpu {
    let mut fpu = Fpu { fcw: s.fcw, fsw: s.fsw, ftw: s.ftw, mxcsr: s.mxcsr, ..Fpu::default() };
    for n in 0..8 {
        fpu.st[n].copy_from_slice(&s.fpr[(s.top() + n) % 8].to_le_bytes()[..10]);
    }
    for (to, from) in fpu.ymm.iter_mut().zip(&s.ymm) {
        to[..16].copy_from_slice(&from[0].to_le_bytes());
        to[16..].copy_from_slice(&from[1].to_le_bytes());
    }
    fpu
}

fn from_canonical(fpu: &Fpu) -> SimdState {
    let mut s =
        SimdState { fcw: fpu.fcw, fsw: fpu.fsw, ftw: fpu.ftw, mxcsr: fpu.mxcsr, ..SimdState::default() };
    for n in 0..8 {
        let mut value = [0; 16];
        value[..10].copy_from_slice(&fpu.st[n]);
        let at = (s.top() + n) % 8;
        s.fpr[at] = u128::from_le_bytes(value);
    }
    for (to, from) in s.ymm.iter_mut().zip(&fpu.ymm) {
        let half = |at: usize| u128::from_le_bytes(std::array::from_fn(|i| from[at + i]));
        *to = [half(0), half(16)];
    }
    s
}
