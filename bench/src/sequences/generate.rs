//! Random cases.

use iced_x86::{Code, Instruction, Register};
use x86::control::{cr0, cr4};
use x86::{flags, gpr};

use super::case::{Case, Mode};
use super::layout::{DATA_AT, FRAMES, INTERRUPTS};
use super::operands::{self, Catalog, spot};
use super::program::{Fix, Program};
use super::special;
use crate::fuzz::Random;

/// Makes cases.
pub struct Generator {
    long: Catalog,
    short: Catalog,
}

/// Short instructions that fit in an immediate.
const SHORT: [&[u8]; 10] = [
    &[0x90],
    &[0x01, 0xd8],
    &[0x29, 0xc8],
    &[0x31, 0xd2],
    &[0x0f, 0xaf, 0xc3],
    &[0x8d, 0x04, 0x0b],
    &[0xf7, 0xd8],
    &[0xff, 0xc0],
    &[0xf9],
    &[0x83, 0xd1, 0x05],
];

/// Four bytes of short instructions.
pub fn four(random: &mut Random) -> [u8; 4] {
    let mut bytes = Vec::new();
    while bytes.len() < 4 {
        let one = SHORT[random.below(SHORT.len() as u32) as usize];
        if bytes.len() + one.len() <= 4 {
            bytes.extend_from_slice(one);
        }
    }
    [bytes[0], bytes[1], bytes[2], bytes[3]]
}

impl Default for Generator {
    fn default() -> Self {
        Self::new()
    }
}

impl Generator {
    /// With all instructions.
    pub fn new() -> Self {
        Self { long: Catalog::new(64), short: Catalog::new(32) }
    }

    /// The case of a seed.
    pub fn case(&self, seed: u64) -> Case {
        let mut random = Random::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5eed);
        (0..8).for_each(|_| _ = random.bits());
        let r = &mut random;
        let mode = match r.below(16) {
            0..5 => Mode::User,
            5..9 => Mode::Kernel,
            9..11 => Mode::Compat,
            11..14 => Mode::Flat,
            _ => Mode::FlatKernel,
        };
        let mut case = Case::new(mode);
        state(&mut case, r);
        let catalog = if mode.bits() == 64 { &self.long } else { &self.short };
        let mut p = Program::new(&case);
        let most = if r.one_in(3) { 40 } else { 16 };
        let count = 1 + r.below(most) as usize;
        for (n, known) in p.known.iter_mut().enumerate() {
            let pages = case.offset() + DATA_AT;
            *known = (case.gpr[n].wrapping_sub(pages) < 0x8000).then_some(case.gpr[n]);
        }
        while p.next() < count {
            step(&mut p, &case, catalog, r);
        }
        end(&mut p, &case, r);
        let total: usize = p.assemble(0x100).0.len();
        case.start = match r.below(4) {
            0 | 1 => 0x1000 - r.below(total as u32 + 1).min(0x1000) as u16,
            2 => 0x40 + r.below(0x1800) as u16,
            _ => 0x40 * (1 + r.below(0x60) as u16),
        };
        (case.code, case.lengths) = p.assemble(case.start);
        let starts: Vec<u64> = case
            .lengths
            .iter()
            .scan(case.rip(), |at, &l| {
                *at += u64::from(l);
                Some(*at - u64::from(l))
            })
            .collect();
        for _ in 0..r.below(6) {
            case.stack.push(starts[r.below(starts.len() as u32) as usize]);
        }
        case
    }
}

/// Registers and pages.
fn state(case: &mut Case, r: &mut Random) {
    let long = case.mode.bits() == 64;
    case.high = long && r.one_in(3);
    case.vectors = r.bits() >> 32;
    for n in 0..if long { 16 } else { 8 } {
        let value = if r.below(5) < 2 { spot(case, r) } else { r.integer() };
        case.gpr[n] = if long { value } else { value & 0xffff_ffff };
    }
    let slack = if r.one_in(8) { r.below(64) } else { 8 * r.below(8) };
    let page = if r.one_in(6) { 0xff0 } else { 0x800 };
    case.gpr[gpr::RSP] = case.offset() + DATA_AT + 0x3000 + page + u64::from(slack);
    case.rflags |= r.bits() & 0x8d5 & !flags::TF;
    for (flag, often) in [(flags::DF, 8), (flags::IF, 3), (flags::TF, 12), (flags::AC, 12), (flags::NT, 64)] {
        case.rflags |= if r.one_in(often) { flag } else { 0 };
    }
    case.rflags |= if r.one_in(2) { flags::IOPL } else { u64::from(r.below(4)) << 12 };
    case.cr0 |= if r.one_in(10) { cr0::AM } else { 0 };
    case.cr0 ^= if r.one_in(10) { cr0::WP } else { 0 };
    case.cr0 |= if r.one_in(40) { cr0::TS } else { 0 };
    case.cr0 |= if r.one_in(80) { cr0::EM } else { 0 };
    for (bit, often) in [(cr4::SMEP, 4), (cr4::SMAP, 4), (cr4::UMIP, 4), (cr4::TSD, 20)] {
        case.cr4 |= if r.one_in(often) { bit } else { 0 };
    }
    for (bit, often) in [(cr4::OSFXSR, 40), (cr4::OSXSAVE, 40), (cr4::OSXMMEXCPT, 20), (cr4::PGE, 10)] {
        case.cr4 ^= if r.one_in(often) { bit } else { 0 };
    }
    case.mxcsr = match r.below(4) {
        0 => r.bits() as u32 & 0xffff,
        1 => 0x1f80 | r.bits() as u32 & 0xe07f,
        _ => 0x1f80,
    };
    for base in &mut case.bases {
        *base = match r.below(4) {
            0 => 0,
            1 => r.bits() as i32 as i64 as u64,
            _ => case.gpr[4] & !0xfff,
        };
        *base &= if long { !0 } else { 0xffff_ffff };
    }
    case.ist = !r.one_in(4);
    if r.one_in(3) {
        case.interrupt = INTERRUPTS.start as u8 + r.below(8) as u8;
        case.pause = if r.one_in(3) { 0 } else { 1 + r.below(12) as u16 };
        case.rflags |= if case.pause != 0 { flags::IF } else { 0 };
    }
    case.exact = r.one_in(2);
    pages(case, r);
    if case.mode == Mode::Kernel && r.one_in(3) {
        // What is global, or changes in one address space alone, may be remembered or not.
        case.cr4 |= cr4::PCIDE;
        case.pages.iter_mut().for_each(|page| *page &= !0x100);
    }
}

/// Rights of pages.
fn pages(case: &mut Case, r: &mut Random) {
    const NX: u64 = 1 << 63;
    let plain = r.one_in(2);
    for (n, page) in case.pages.iter_mut().enumerate() {
        if n >= 2 {
            *page |= if r.one_in(2) { NX } else { 0 };
        }
        *page |= if r.one_in(6) { 0x100 } else { 0 };
        let often = match n {
            // The stack's page, and the code's.
            0 | 1 | 5 => 40,
            _ if plain => 1000,
            _ => 6,
        };
        if n < 2 {
            *page &= if r.one_in(2) { !2 } else { !0 };
            *page &= if r.one_in(4) { !0x60 } else { !0 };
        }
        if !r.one_in(often) {
            continue;
        }
        match r.below(7) {
            0 => *page &= !1,
            1 => *page &= !2,
            2 | 3 => *page ^= 4,
            4 => *page &= !0x40,
            5 => *page &= !0x60,
            _ => *page = *page & !0xf_f000 & !NX | FRAMES[r.below(12) as usize] | if n < 2 { 0 } else { NX },
        }
    }
}

/// Appends one or a few instructions.
fn step(p: &mut Program, case: &Case, catalog: &Catalog, r: &mut Random) {
    match r.below(32) {
        0 | 1 => jump(p, case, r),
        2 => counted(p, case, catalog, r),
        3 => call(p, case, r),
        4 => hidden(p, case, r),
        5 => special::code_store(p, case, r),
        6 => special::random(p, case, r),
        7 | 8 => stack(p, case, r),
        9 if r.one_in(2) => guarded(p, case, r),
        _ => operands::random(p, case, catalog, 0, r),
    }
}

const CONDITIONS: [[Code; 4]; 16] = {
    use Code::*;
    [
        [Jo_rel8_64, Jo_rel32_64, Jo_rel8_32, Jo_rel32_32],
        [Jno_rel8_64, Jno_rel32_64, Jno_rel8_32, Jno_rel32_32],
        [Jb_rel8_64, Jb_rel32_64, Jb_rel8_32, Jb_rel32_32],
        [Jae_rel8_64, Jae_rel32_64, Jae_rel8_32, Jae_rel32_32],
        [Je_rel8_64, Je_rel32_64, Je_rel8_32, Je_rel32_32],
        [Jne_rel8_64, Jne_rel32_64, Jne_rel8_32, Jne_rel32_32],
        [Jbe_rel8_64, Jbe_rel32_64, Jbe_rel8_32, Jbe_rel32_32],
        [Ja_rel8_64, Ja_rel32_64, Ja_rel8_32, Ja_rel32_32],
        [Js_rel8_64, Js_rel32_64, Js_rel8_32, Js_rel32_32],
        [Jns_rel8_64, Jns_rel32_64, Jns_rel8_32, Jns_rel32_32],
        [Jp_rel8_64, Jp_rel32_64, Jp_rel8_32, Jp_rel32_32],
        [Jnp_rel8_64, Jnp_rel32_64, Jnp_rel8_32, Jnp_rel32_32],
        [Jl_rel8_64, Jl_rel32_64, Jl_rel8_32, Jl_rel32_32],
        [Jge_rel8_64, Jge_rel32_64, Jge_rel8_32, Jge_rel32_32],
        [Jle_rel8_64, Jle_rel32_64, Jle_rel8_32, Jle_rel32_32],
        [Jg_rel8_64, Jg_rel32_64, Jg_rel8_32, Jg_rel32_32],
    ]
};

/// Appends a branch to an item.
pub fn branch(p: &mut Program, case: &Case, condition: Option<u32>, item: usize, into: u8, r: &mut Random) {
    let wide = if case.mode.bits() == 64 { 0 } else { 2 };
    let form = wide + usize::from(r.one_in(2));
    let jumps = [Code::Jmp_rel8_64, Code::Jmp_rel32_64, Code::Jmp_rel8_32, Code::Jmp_rel32_32];
    let code = condition.map_or(jumps[form], |c| CONDITIONS[c as usize & 15][form]);
    if let Ok(i) = Instruction::with_branch(code, 0x40_0800 + case.offset()) {
        p.push(i, Fix::Branch(item, into));
    }
}

/// A jump forwards, at times into the middle of an instruction, at times through a register.
fn jump(p: &mut Program, case: &Case, r: &mut Random) {
    let to = p.next() + 1 + r.below(5) as usize;
    let into = if r.one_in(8) { 1 + r.below(3) as u8 } else { 0 };
    match r.below(8) {
        0 => {
            let n = [0, 1, 2, 3, 5, 6, 7, 10, 11, 15]
                [r.below(if case.mode.bits() == 64 { 10 } else { 7 }) as usize];
            p.set_to_item(n, to, into);
            let (code, first) = if case.mode.bits() == 64 {
                (Code::Jmp_rm64, Register::RAX)
            } else {
                (Code::Jmp_rm32, Register::EAX)
            };
            if let Ok(i) = Instruction::with1(code, first + n as u32) {
                p.push(i, Fix::None);
            }
        }
        1 => branch(p, case, None, to, into, r),
        _ => {
            let condition = r.below(16);
            branch(p, case, Some(condition), to, into, r);
        }
    }
}

/// A loop with a count.
fn counted(p: &mut Program, case: &Case, catalog: &Catalog, r: &mut Random) {
    let long = case.mode.bits() == 64;
    let by_loop = r.one_in(3);
    let n = if by_loop {
        1
    } else {
        [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 15][r.below(if long { 11 } else { 7 }) as usize]
    };
    p.set(n, 1 + u64::from(r.below(6)));
    let first = p.next();
    for _ in 0..r.below(5) {
        operands::random(p, case, catalog, 1 << n, r);
    }
    if r.one_in(4) {
        special::code_store(p, case, r);
    }
    let target = 0x40_0800 + case.offset();
    if by_loop {
        let code = if long { Code::Loop_rel8_64_RCX } else { Code::Loop_rel8_32_ECX };
        if let Ok(i) = Instruction::with_branch(code, target) {
            p.push(i, Fix::Branch(first, 0));
        }
        return;
    }
    let register = Register::EAX + n as u32;
    if let Ok(i) = Instruction::with1(Code::Dec_rm32, register) {
        p.push(i, Fix::None);
    }
    branch(p, case, Some(5), first, 0, r);
}

/// A jump backwards that happens a few times: until a word in memory is shifted out.
fn guarded(p: &mut Program, case: &Case, r: &mut Random) {
    let at = case.offset() + DATA_AT + 0x7ff0;
    let mut i = Instruction::default();
    i.set_code(Code::Shr_rm32_imm8);
    i.set_op0_kind(iced_x86::OpKind::Memory);
    i.set_memory_displacement64(if case.mode.bits() == 64 { at } else { at & 0xffff_ffff });
    i.set_memory_displ_size(if case.mode.bits() == 64 { 8 } else { 4 });
    i.set_op1_kind(iced_x86::OpKind::Immediate8);
    i.set_immediate8(9);
    p.push(i, Fix::None);
    let back = p.next().saturating_sub(1 + r.below(6) as usize);
    branch(p, case, Some(5), back, 0, r);
}

/// CALL forwards, or RET.
fn call(p: &mut Program, case: &Case, r: &mut Random) {
    let long = case.mode.bits() == 64;
    let to = p.next() + 1 + r.below(4) as usize;
    match r.below(6) {
        0 | 1 => {
            let code = if long { Code::Call_rel32_64 } else { Code::Call_rel32_32 };
            if let Ok(i) = Instruction::with_branch(code, 0x40_0800 + case.offset()) {
                p.push(i, Fix::Branch(to, 0));
            }
        }
        2 => {
            let n = [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 15][r.below(if long { 11 } else { 8 }) as usize];
            if n != 4 {
                p.set_to_item(n, to, 0);
            }
            let (code, first) =
                if long { (Code::Call_rm64, Register::RAX) } else { (Code::Call_rm32, Register::EAX) };
            if let Ok(i) = Instruction::with1(code, first + n as u32) {
                p.push(i, Fix::None);
            }
        }
        3 => {
            p.push_item(to, 0);
            p.raw(&[0xc3]);
        }
        4 => {
            p.push_item(to, 0);
            p.raw(&[0xc2, 8 * r.below(3) as u8, 0]);
        }
        _ => p.raw(&[0xc3]),
    }
}

/// A jump into the immediate of an instruction, where there are others.
fn hidden(p: &mut Program, case: &Case, r: &mut Random) {
    let to = p.next() + 1 + r.below(2) as usize;
    let condition = r.below(16);
    branch(p, case, Some(condition), to, 1, r);
    if to > p.next() {
        p.raw(&[0x90]);
    }
    let bytes = four(r);
    p.raw(&[&[[0xa9, 0xb8, 0x3d, 0x68][r.below(4) as usize]], &bytes[..]].concat());
    p.known[0] = None;
}

/// Pushes and pops.
fn stack(p: &mut Program, case: &Case, r: &mut Random) {
    let long = case.mode.bits() == 64;
    let n = r.below(if long { 16 } else { 8 });
    let register = if long { Register::RAX } else { Register::EAX } + n;
    let code = match (r.below(4), long) {
        (0..2, true) => Code::Push_r64,
        (0..2, false) => Code::Push_r32,
        (_, true) => Code::Pop_r64,
        (_, false) => Code::Pop_r32,
    };
    if let Ok(i) = Instruction::with1(code, register) {
        p.push(i, Fix::None);
    }
}

/// How a program ends.
fn end(p: &mut Program, case: &Case, r: &mut Random) {
    match r.below(4) {
        0 => p.raw(&[0xcc]),
        1 => p.raw(&[0x0f, 0x0b]),
        2 if case.mode.is_user() => p.raw(&[0xcd, 0x80]),
        2 => p.raw(&[0xe6, super::layout::PORT as u8, 0xeb, 0xfe]),
        _ => {}
    }
}
