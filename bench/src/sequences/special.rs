//! What the catalogue does not have: privileged instructions, traps, code that writes itself.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::case::{Case, Mode};
use super::generate::four;
use super::layout::{self, PORT};
use super::operands::spot;
use super::program::{Fix, Program};
use crate::fuzz::Random;

fn long(case: &Case) -> bool {
    case.mode.bits() == 64
}

/// An operand in memory at a constant address.
fn absolute(i: &mut Instruction, case: &Case, n: u32, at: u64) {
    i.set_op_kind(n, OpKind::Memory);
    i.set_memory_displacement64(if long(case) { at } else { at & 0xffff_ffff });
    i.set_memory_displ_size(if long(case) { 8 } else { 4 });
}

/// MOV dword [at], value; `fix` may say where.
fn store(p: &mut Program, case: &Case, at: u64, value: u32, fix: Fix) {
    let mut i = Instruction::default();
    i.set_code(Code::Mov_rm32_imm32);
    absolute(&mut i, case, 0, at);
    i.set_op1_kind(OpKind::Immediate32);
    i.set_immediate32(value);
    p.push(i, fix);
}

/// Stores into the program's own code: what comes next, or comes again.
pub fn code_store(p: &mut Program, case: &Case, r: &mut Random) {
    let next = p.next();
    let alias = r.below(4) != 0;
    let any = case.offset() + 0x40_0800;
    if r.one_in(8) {
        // REP STOSB of NOPs.
        p.set_to_item(7, next + 4 + r.below(4) as usize, 0);
        p.set(1, u64::from(r.below(6)));
        p.set(0, 0x90);
        p.raw(&[0xf3, 0xaa]);
        return;
    }
    let item = match r.below(4) {
        0 => next + 1,
        1 => next + 2 + r.below(4) as usize,
        2 => next.saturating_sub(r.below(5) as usize),
        _ => next + 1 + r.below(2) as usize,
    };
    let into = if r.one_in(3) { r.below(6) as u8 } else { 0 };
    let value = u32::from_le_bytes(four(r));
    let fix = Fix::Memory(item, into, alias);
    match r.below(4) {
        0 => {
            let mut i = Instruction::default();
            i.set_code(Code::Mov_rm8_imm8);
            absolute(&mut i, case, 0, any);
            i.set_op1_kind(OpKind::Immediate8);
            i.set_immediate8([0x90, 0xcc, 0xf8, 0x40][r.below(4) as usize]);
            p.push(i, fix);
        }
        1 => {
            p.set(2, u64::from(value) | u64::from(u32::from_le_bytes(four(r))) << 32);
            let mut i = Instruction::default();
            let code = [Code::Mov_rm32_r32, Code::Xchg_rm32_r32, Code::Mov_rm64_r64]
                [r.below(if long(case) { 3 } else { 2 }) as usize];
            i.set_code(code);
            absolute(&mut i, case, 0, any);
            i.set_op1_kind(OpKind::Register);
            i.set_op1_register(if code == Code::Mov_rm64_r64 { Register::RDX } else { Register::EDX });
            // The MOV before it is an item, too.
            let fix = Fix::Memory(item + usize::from(item > next), into, alias);
            p.push(i, fix);
        }
        _ => store(p, case, any, value, fix),
    }
    if r.one_in(3) {
        // What is often written over.
        let bytes = four(r);
        p.raw(&[&[0xb8], &bytes[..]].concat());
        p.known[0] = None;
    }
}

/// Something of the system's.
pub fn random(p: &mut Program, case: &Case, r: &mut Random) {
    let kernel = !case.mode.is_user();
    match r.below(if kernel { 30 } else { 20 }) {
        0 => p.raw(&[0xfa]),
        1 => p.raw(&[0xfb]),
        2 => {
            p.raw(&[0x9c]);
        }
        3 | 4 => popf(p, case, r),
        5 => interrupt_return(p, case, r),
        6 => far_return(p, case, r),
        7 => segment(p, case, r),
        8 => p.raw(&[0xe6, PORT as u8 + 2]),
        9 => {
            p.raw([&[0xf1][..], &[0xcd, 1], &[0x0f, 5], &[0x0f, 1, 0xd0]][r.below(4) as usize]);
            p.known[0] = None;
            p.known[2] = None;
        }
        10 => {
            p.raw([&[0x0f, 0xa2][..], &[0x0f, 0x31]][r.below(2) as usize]);
            (0..4).for_each(|n| p.known[n] = None);
        }
        11 => mxcsr(p, case, r),
        12 => save(p, case, r),
        13 if long(case) => base(p, case, r),
        14 | 15 => p.raw(&[0xe4 | r.below(2) as u8, PORT as u8]),
        16 => p.raw([&[0x0f, 1, 0xca][..], &[0x0f, 1, 0xcb]][r.below(2) as usize]),
        17 => p.raw(&[[0xf5, 0xf8, 0xf9, 0xfc, 0xfd, 0x9f, 0x9e, 0xd7][r.below(8) as usize]]),
        18 => strings_to_ports(p, case, r),
        19 => p.raw(&[&[0xcd], &[r.bits() as u8][..]].concat()),
        20..23 if case.switches() => switch(p, r),
        20..23 => remap(p, case, r),
        23 => control(p, case, r),
        24 => reload(p, r),
        25 => p.raw(&[0x0f, 6]),
        26 => {
            // Task priority.
            p.set(0, u64::from(r.below(5)));
            p.raw(if long(case) { &[0x44, 0x0f, 0x22, 0xc0] } else { &[0xf0, 0x0f, 0x22, 0xc0] });
        }
        27 if long(case) => p.raw(&[0x0f, 1, 0xf8]),
        28 => model_specific(p, case, r),
        _ => invalidate(p, case, spot(case, r)),
    }
}

/// Flags from the stack.
fn popf(p: &mut Program, case: &Case, r: &mut Random) {
    let mut value = r.bits() as u32 & 0xcd5 | 2;
    for (bit, often) in [(8, 6), (9, 2), (14, 12), (18, 6)] {
        value |= if r.one_in(often) { 1 << bit } else { 0 };
    }
    value |= if case.rflags & 0x3000 == 0x3000 { 0x3000 } else { 0 };
    p.raw(&[&[0x68], &value.to_le_bytes()[..]].concat());
    p.raw(if r.one_in(8) { &[0x66, 0x9d] } else { &[0x9d] });
}

fn selectors(case: &Case) -> (u8, u8) {
    match case.mode {
        Mode::User => (0x33, 0x2b),
        Mode::Kernel => (0x08, 0x10),
        Mode::Compat | Mode::Flat => (0x23, 0x2b),
        Mode::FlatKernel => (0x18, 0x10),
    }
}

/// IRET to what comes next.
fn interrupt_return(p: &mut Program, case: &Case, r: &mut Random) {
    let (code, stack) = selectors(case);
    if long(case) {
        p.raw(&[0x6a, stack]);
        p.raw(&[0x54]);
    }
    p.raw(&[0x9c]);
    p.raw(&[0x6a, code]);
    let to = p.next() + 2 + r.below(2) as usize;
    p.push_item(to, 0);
    p.raw(if long(case) { &[0x48, 0xcf] } else { &[0xcf] });
}

/// RETF to what comes next.
fn far_return(p: &mut Program, case: &Case, r: &mut Random) {
    let other = [(0x33, 0x23), (8, 0x18)][usize::from(!case.mode.is_user())];
    let code = if r.one_in(12) {
        // Of 16 bits, which goes well until it jumps.
        [0x5b, 0x50][usize::from(!case.mode.is_user())]
    } else if r.one_in(6) && case.mode.is_long() {
        [other.0, other.1][r.below(2) as usize]
    } else {
        selectors(case).0
    };
    p.raw(&[0x6a, code]);
    let to = p.next() + 2;
    p.push_item(to, 0);
    p.raw(if long(case) { &[0x48, 0xcb] } else { &[0xcb] });
}

/// A segment register.
fn segment(p: &mut Program, case: &Case, r: &mut Random) {
    let choices = [0u64, 0x10, 0x2b, 0x3b, 0x33, 0x18];
    let usual = u64::from(selectors(case).1);
    let selector = if r.one_in(2) { usual } else { choices[r.below(6) as usize] };
    p.set(0, selector);
    p.raw(&[0x8e, 0xc0 | [0, 2, 3, 4, 5][r.below(5) as usize] << 3]);
    if r.one_in(2) && !long(case) {
        p.set(0, usual);
        p.raw(&[0x8e, 0xd8]);
        p.raw(&[0x8e, 0xc0]);
    }
}

/// LDMXCSR of something good.
fn mxcsr(p: &mut Program, case: &Case, r: &mut Random) {
    let at = spot(case, r) & !3;
    let value = if r.one_in(2) { 0x1f80 } else { r.bits() as u32 & 0xffff };
    store(p, case, at, value, Fix::None);
    let mut i = Instruction::default();
    i.set_code(Code::Ldmxcsr_m32);
    absolute(&mut i, case, 0, at);
    p.push(i, Fix::None);
}

/// XSAVE and the like, to and from an aligned place.
fn save(p: &mut Program, case: &Case, r: &mut Random) {
    let at = (spot(case, r) & !0xfff) + 0x400 + 64 * u64::from(r.below(8));
    p.set(0, u64::from(r.below(8)));
    p.set(2, 0);
    let (save, restore) = [
        (Code::Fxsave_m512byte, Code::Fxrstor_m512byte),
        (Code::Xsave_mem, Code::Xrstor_mem),
        (Code::Xsaveopt_mem, Code::Xrstor_mem),
    ][r.below(3) as usize];
    for code in [save, restore] {
        let mut i = Instruction::default();
        i.set_code(code);
        absolute(&mut i, case, 0, at);
        p.push(i, Fix::None);
        if r.one_in(2) {
            p.set(0, u64::from(r.below(8)));
        }
    }
}

/// FS and GS base.
fn base(p: &mut Program, case: &Case, r: &mut Random) {
    let n = r.below(16);
    let wide = r.one_in(2);
    let first = if wide { Register::RAX } else { Register::EAX };
    let codes = [
        [Code::Rdfsbase_r32, Code::Rdgsbase_r32, Code::Wrfsbase_r32, Code::Wrgsbase_r32],
        [Code::Rdfsbase_r64, Code::Rdgsbase_r64, Code::Wrfsbase_r64, Code::Wrgsbase_r64],
    ];
    if n != 4 && r.one_in(2) {
        p.set(n as usize, spot(case, r) & !0xfff);
    }
    if let Ok(i) = Instruction::with1(codes[usize::from(wide)][r.below(4) as usize], first + n) {
        p.push(i, Fix::None);
    }
}

/// INS and OUTS.
fn strings_to_ports(p: &mut Program, case: &Case, r: &mut Random) {
    p.set(2, PORT + 2);
    p.set(1, u64::from(r.below(4)));
    p.set(6, spot(case, r));
    p.set(7, spot(case, r));
    p.raw(&[0xf3, [0x6c, 0x6d, 0x6e, 0x6f][r.below(4) as usize]]);
    (6..8).for_each(|n| p.known[n] = None);
}

fn invalidate(p: &mut Program, case: &Case, at: u64) {
    let mut i = Instruction::default();
    i.set_code(Code::Invlpg_m);
    absolute(&mut i, case, 0, at);
    p.push(i, Fix::None);
}

/// Changes a page-table entry, and says so.
fn remap(p: &mut Program, case: &Case, r: &mut Random) {
    let n = if r.one_in(6) { r.below(2) } else { 2 + r.below(10) } as usize;
    // Not the stack's page: what an exception before INVLPG pushes may go to either.
    let n = if n == 5 { 6 } else { n };
    let (linear, entry) = layout::page(n);
    let other = case.pages[if r.one_in(3) { r.below(12) as usize } else { n }];
    let flips = [0, 1, 2, 4, 0x20, 0x40, 0x60, 0][r.below(8) as usize];
    if n < 2 {
        p.set(7, layout::KERNEL + entry);
        p.set(0, other ^ flips);
        p.set(6, case.offset() + linear);
        p.set(2, layout::KERNEL + layout::REMAP);
        p.raw(&[0xff, 0xd2]); // CALL RDX
        return;
    }
    store(p, case, layout::KERNEL + entry, (other ^ flips) as u32, Fix::None);
    if case.high && r.one_in(4) {
        invalidate(p, case, linear);
    }
    if r.one_in(4) {
        reload(p, r);
        // Global pages stay.
        invalidate(p, case, case.offset() + linear);
    } else {
        invalidate(p, case, case.offset() + linear + u64::from(r.below(0x1000)));
    }
}

/// The other address space, or this one: CR3 with its PCID, and the bit that keeps what is known of it.
fn switch(p: &mut Program, r: &mut Random) {
    let root = [layout::PML4 | 1, layout::OTHER_PML4 | 2][r.below(2) as usize];
    p.set(0, root | if r.one_in(2) { 1 << 63 } else { 0 });
    p.raw(&[0x0f, 0x22, 0xd8]);
}

/// CR3, with what it has.
fn reload(p: &mut Program, r: &mut Random) {
    let n = [0u8, 3, 6][r.below(3) as usize];
    p.raw(&[0x0f, 0x20, 0xd8 | n]);
    p.raw(&[0x0f, 0x22, 0xd8 | n]);
    p.known[usize::from(n)] = None;
}

/// A bit of CR0 or CR4.
fn control(p: &mut Program, case: &Case, r: &mut Random) {
    let (register, bit) =
        [(0, 3), (0, 16), (0, 2), (0, 18), (4, 20), (4, 21), (4, 9), (4, 18), (4, 7), (4, 10), (4, 2)]
            [r.below(11) as usize];
    let bits: &[u8] = if long(case) { &[0x48] } else { &[] };
    p.raw(&[0x0f, 0x20, 0xc0 | register << 3]);
    p.raw(&[bits, &[0x0f, 0xba, 0xf8, bit]].concat());
    p.raw(&[0x0f, 0x22, 0xc0 | register << 3]);
    p.known[0] = None;
}

/// WRMSR of a base.
fn model_specific(p: &mut Program, case: &Case, r: &mut Random) {
    let at = spot(case, r) & !0xfff;
    p.set(1, 0xc000_0100 + u64::from(r.below(3)));
    p.set(0, at & 0xffff_ffff);
    p.set(2, at >> 32);
    p.raw(&[0x0f, 0x30]);
}
