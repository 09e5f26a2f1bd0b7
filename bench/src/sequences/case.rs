//! A case: code, and the state in which it starts. Its text form is one `key value` per line, numbers in hexadecimal.

use std::fmt::Write;

use machine::cpu::State;
use x86::control::{cr0, cr4, efer};
use x86::segment::{attr, index};
use x86::{Segment, Table, flags};

use super::layout::{CODE_AT, FRAMES, GDT, IDT, IDT_32, IDT_IST, KERNEL, PAGES, PDPT_PAE, PML4, TSS, TSS_32};
use crate::fuzz::Random;

/// What kind of code it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit, ring 3.
    User,
    /// 64-bit, ring 0.
    Kernel,
    /// 32-bit under a 64-bit system, ring 3.
    Compat,
    /// 32-bit under a 32-bit system with PAE, ring 3.
    Flat,
    /// 32-bit, ring 0.
    FlatKernel,
}

/// All modes, with their names in text.
pub const MODES: [(Mode, &str); 5] = [
    (Mode::User, "user"),
    (Mode::Kernel, "kernel"),
    (Mode::Compat, "compat"),
    (Mode::Flat, "flat"),
    (Mode::FlatKernel, "flat-kernel"),
];

impl Mode {
    /// 64 or 32.
    pub fn bits(self) -> u32 {
        if matches!(self, Self::User | Self::Kernel) { 64 } else { 32 }
    }

    /// Whether it is ring 3.
    pub fn is_user(self) -> bool {
        !matches!(self, Self::Kernel | Self::FlatKernel)
    }

    /// Whether EFER.LMA is set.
    pub fn is_long(self) -> bool {
        !matches!(self, Self::Flat | Self::FlatKernel)
    }
}

/// A case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// The kind of code.
    pub mode: Mode,
    /// Linear address of the code's first page: low, or in the negative 2 GiB.
    pub high: bool,
    /// Where in the code pages it starts.
    pub start: u16,
    /// The code.
    pub code: Vec<u8>,
    /// Lengths of its instructions, for those who take it apart.
    pub lengths: Vec<u8>,
    /// General-purpose registers.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub rflags: u64,
    /// CR0.
    pub cr0: u64,
    /// CR4.
    pub cr4: u64,
    /// FS and GS base.
    pub bases: [u64; 2],
    /// Where the vector registers' contents come from.
    pub vectors: u64,
    /// MXCSR.
    pub mxcsr: u32,
    /// Whether exceptions switch to a stack of their own (64-bit systems).
    pub ist: bool,
    /// An interrupt that waits; 0 for none.
    pub interrupt: u8,
    /// If not 0, it does not wait from the start on, but comes when translated code has been left so many times.
    pub pause: u16,
    /// Whether the translate engine keeps dead flags exact where exceptions push them.
    pub exact: bool,
    /// Words at RSP.
    pub stack: Vec<u64>,
    /// Page-table entries: code, data, and the code once more, writable.
    pub pages: [u64; PAGES],
}

impl Case {
    /// A case without code, in a plain state.
    pub fn new(mode: Mode) -> Self {
        let mut pages = [0; PAGES];
        let user = if mode.is_user() { 4 } else { 0 };
        for (page, frame) in pages.iter_mut().zip(FRAMES) {
            *page = frame | 0x63 | user;
        }
        Self {
            mode,
            high: false,
            start: 0x100,
            code: Vec::new(),
            lengths: Vec::new(),
            gpr: [0; 16],
            rflags: flags::FIXED,
            cr0: cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG,
            cr4: cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE,
            bases: [0; 2],
            vectors: 1,
            mxcsr: 0x1f80,
            ist: true,
            interrupt: 0,
            pause: 0,
            exact: false,
            stack: Vec::new(),
            pages,
        }
    }

    /// What is added to the low linear addresses of code and data.
    pub fn offset(&self) -> u64 {
        if self.high { 0xffff_ffff_8000_0000 } else { 0 }
    }

    /// Linear address of the first instruction.
    pub fn rip(&self) -> u64 {
        self.offset() + CODE_AT + u64::from(self.start)
    }

    /// Whether it goes from one address space to another, which have PCIDs 1 and 2.
    pub fn switches(&self) -> bool {
        self.cr4 & cr4::PCIDE != 0
    }

    /// The state in which it starts.
    pub fn state(&self) -> State {
        let mut s = State::reset(true, 0);
        s.gpr = self.gpr;
        s.rip = self.rip();
        s.rflags = self.rflags;
        s.cr0 = self.cr0;
        s.cr4 = self.cr4;
        s.efer = efer::NXE | efer::SCE;
        s.xcr0 = 7;
        s.gdtr = Table { base: KERNEL + GDT, limit: 0x7f };
        s.ldtr = Segment { attributes: attr::P | 2, ..Segment::default() };
        s.tr = Segment { selector: 0x40, attributes: attr::P | 11, limit: 0x67, base: KERNEL + TSS };
        if self.mode.is_long() {
            s.efer |= efer::LME | efer::LMA;
            s.cr3 = PML4 | u64::from(self.switches());
            s.idtr = Table { base: KERNEL + if self.ist { IDT_IST } else { IDT }, limit: 0xfff };
        } else {
            s.cr3 = PDPT_PAE;
            s.idtr = Table { base: KERNEL + IDT_32, limit: 0x7ff };
            s.tr.base = KERNEL + TSS_32;
        }
        let dpl = if self.mode.is_user() { attr::DPL } else { 0 };
        let data = attr::P | attr::S | attr::ACCESSED | attr::RW | dpl;
        let selector = if self.mode.is_user() { 0x2b } else { 0x10 };
        let flat = Segment { selector, attributes: data | attr::DB | attr::G, limit: u32::MAX, base: 0 };
        s.segments = [flat; 6];
        s.segments[index::FS].base = self.bases[0];
        s.segments[index::GS].base = self.bases[1];
        let (selector, kind) = match self.mode {
            Mode::User => (0x33, attr::L),
            Mode::Kernel => (0x08, attr::L),
            Mode::Compat | Mode::Flat => (0x23, attr::DB),
            Mode::FlatKernel => (0x18, attr::DB),
        };
        s.segments[index::CS] = Segment { selector, attributes: data | attr::CODE | attr::G | kind, ..flat };
        // SYSCALL leads to a handler: that of vector 0xf0.
        s.msrs.star = 0x0008_0000_0000 << 8 | 0x0023 << 48;
        s.msrs.star = 8 << 32 | 0x23 << 48;
        s.msrs.lstar = KERNEL + super::layout::HANDLERS + 16 * 0xf0;
        s.msrs.cstar = s.msrs.lstar;
        s.msrs.sfmask = flags::IF | flags::TF | flags::DF | flags::AC;
        s.msrs.kernel_gs_base = self.bases[0] ^ 0x1000;
        let mut random = Random::new(self.vectors);
        s.fpu.mxcsr = self.mxcsr;
        for half in s.fpu.ymm.iter_mut().flat_map(|y| y.chunks_mut(16)) {
            half.copy_from_slice(&random.vector().to_le_bytes());
        }
        if self.mode.bits() == 32 {
            s.fpu.ymm[8..].fill([0; 32]);
        }
        s
    }

    /// As text.
    pub fn print(&self) -> String {
        let mut t = String::new();
        let mode = MODES.iter().find(|(m, _)| *m == self.mode).map_or("user", |(_, name)| name);
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let list = |words: &[u64]| words.iter().map(|w| format!("{w:x}")).collect::<Vec<_>>().join(" ");
        let _ = writeln!(t, "mode {mode}\nhigh {:x}\nstart {:x}", u8::from(self.high), self.start);
        let _ = writeln!(t, "code {}\nlengths {}", hex(&self.code), hex(&self.lengths));
        let _ = writeln!(t, "gpr {}\nrflags {:x}", list(&self.gpr), self.rflags);
        let _ = writeln!(t, "cr0 {:x}\ncr4 {:x}\nbases {}", self.cr0, self.cr4, list(&self.bases));
        let _ = writeln!(t, "vectors {:x}\nmxcsr {:x}", self.vectors, self.mxcsr);
        let _ = writeln!(t, "ist {:x}\ninterrupt {:x}", u8::from(self.ist), self.interrupt);
        let _ = writeln!(t, "pause {:x}\nexact {:x}", self.pause, u8::from(self.exact));
        let _ = writeln!(t, "stack {}\npages {}", list(&self.stack), list(&self.pages));
        t
    }

    /// From text.
    ///
    /// # Errors
    /// The line that makes no sense.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut case = Self::new(Mode::User);
        for line in text.lines().filter(|l| !l.is_empty() && !l.starts_with('#')) {
            let bad = || format!("this line makes no sense: {line}");
            let (key, rest) = line.split_once(' ').unwrap_or((line, ""));
            let words: Result<Vec<u64>, _> =
                rest.split_whitespace().map(|w| u64::from_str_radix(w, 16)).collect();
            let words = || words.clone().map_err(|_| bad());
            let number = || words()?.first().copied().ok_or_else(bad);
            let bytes = || -> Result<Vec<u8>, String> {
                let pair = |n: usize| rest.get(n..n + 2).and_then(|p| u8::from_str_radix(p, 16).ok());
                (0..rest.len()).step_by(2).map(|n| pair(n).ok_or_else(bad)).collect()
            };
            match key {
                "mode" => case.mode = MODES.iter().find(|(_, n)| *n == rest).ok_or_else(bad)?.0,
                "high" => case.high = number()? != 0,
                "start" => case.start = number()? as u16,
                "code" => case.code = bytes()?,
                "lengths" => case.lengths = bytes()?,
                "gpr" => case.gpr = words()?.try_into().map_err(|_| bad())?,
                "rflags" => case.rflags = number()?,
                "cr0" => case.cr0 = number()?,
                "cr4" => case.cr4 = number()?,
                "bases" => case.bases = words()?.try_into().map_err(|_| bad())?,
                "vectors" => case.vectors = number()?,
                "mxcsr" => case.mxcsr = number()? as u32,
                "ist" => case.ist = number()? != 0,
                "interrupt" => case.interrupt = number()? as u8,
                "pause" => case.pause = number()? as u16,
                "exact" => case.exact = number()? != 0,
                "stack" => case.stack = words()?,
                "pages" => case.pages = words()?.try_into().map_err(|_| bad())?,
                _ => return Err(bad()),
            }
        }
        Ok(case)
    }
}
