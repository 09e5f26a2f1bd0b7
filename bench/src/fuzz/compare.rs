//! What counts as a difference.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic as M, RflagsBits};
use native::oracle::{Case, End, Mode, Reply};

/// CF, PF, AF, ZF, SF, OF and DF.
const FLAGS: u64 = 0xcd5;

fn undefined(i: &Instruction) -> u64 {
    let pairs = [
        (RflagsBits::CF, 1),
        (RflagsBits::PF, 4),
        (RflagsBits::AF, 0x10),
        (RflagsBits::ZF, 0x40),
        (RflagsBits::SF, 0x80),
        (RflagsBits::OF, 0x800),
    ];
    let bits = pairs.iter().filter(|(b, _)| i.rflags_undefined() & b != 0).fold(0, |m, (_, bit)| m | bit);
    // Shifts by more than one leave OF undefined, though iced knows only what one by CL may do.
    let shift = matches!(
        i.mnemonic(),
        M::Shl | M::Shr | M::Sar | M::Sal | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    );
    if shift { bits | 0x810 } else { bits }
}

/// SHLD and SHRD of 16 bits by more than 16 are undefined altogether.
fn double_shift_too_far(i: &Instruction, case: &Case) -> bool {
    let narrow = matches!(i.mnemonic(), M::Shld | M::Shrd) && i.op1_register().is_gpr16();
    let count = match i.op2_kind() {
        iced_x86::OpKind::Register => case.image.gpr[1] as u8,
        _ => i.immediate8(),
    };
    narrow && count & 31 > 16
}

/// All that differs, in words; empty if nothing does.
pub fn differences(case: &Case, expected: &Reply, got: &Reply) -> Vec<String> {
    let bits = match case.mode {
        Mode::Long => 64,
        Mode::Compat32 => 32,
        Mode::Protected16 => 16,
    };
    let i = Decoder::with_ip(bits, &case.code, case.image.rip, DecoderOptions::NONE).decode();
    let mut all = Vec::new();
    // AMD's MXCSR has a bit more, which no model shows.
    if double_shift_too_far(&i, case) || expected.image.simd.mxcsr > 0xffff {
        return all;
    }
    if expected.end != got.end {
        // CR2 means something for page faults alone; whether the system has a page in its half is its business.
        let same = match (expected.end, got.end) {
            (
                End::Fault { vector: 14, error: e, address: a },
                End::Fault { vector: 14, error: f, address: b },
            ) => a == b && (e ^ f) & !u64::from(a >> 63 != 0) == 0,
            // Misaligned and over the stack segment's end at once: which comes first differs.
            (End::Fault { vector: 13, .. }, End::Fault { vector: 12, .. }) => true,
            (End::Fault { vector: a, error: e, .. }, End::Fault { vector: b, error: f, .. }) if a != 14 => {
                (a, e) == (b, f)
            }
            _ => false,
        };
        if !same {
            all.push(format!("ends with {:?}, not {:?}", got.end, expected.end));
            return all;
        }
    }
    let (e, g) = (&expected.image, &got.image);
    for (n, (e, g)) in e.gpr.iter().zip(&g.gpr).enumerate().take(if bits == 64 { 16 } else { 8 }) {
        let mask = match (bits, n) {
            (64, _) => u64::MAX,
            (16, 4) => 0xffff, // ESP's upper half is the oracle's
            _ => 0xffff_ffff,
        };
        if (e ^ g) & mask != 0 {
            all.push(format!("register {n} is {g:#x}, not {e:#x}"));
        }
    }
    if e.rip != g.rip {
        all.push(format!("RIP is {:#x}, not {:#x}", g.rip, e.rip));
    }
    let flags = (e.rflags ^ g.rflags) & FLAGS & !undefined(&i);
    if flags != 0 {
        all.push(format!("flags are {:#x}, not {:#x} (of {flags:#x})", g.rflags & FLAGS, e.rflags & FLAGS));
    }
    let (e, g) = (&e.simd, &g.simd);
    for n in 0..if bits == 64 { 16 } else { 8 } {
        if e.ymm[n] != g.ymm[n] {
            all.push(format!("ymm{n} is {:x?}, not {:x?}", g.ymm[n], e.ymm[n]));
        }
        if n < 8 && (e.fpr[n] ^ g.fpr[n]) << 48 != 0 {
            all.push(format!("x87 register {n} is {:x}, not {:x}", g.fpr[n], e.fpr[n]));
        }
    }
    // Which flags come beside the one that raised #XM: inexactness, and DPPS's two stages. See `native`'s float.rs.
    let corner = match (expected.end, i.mnemonic()) {
        (End::Fault { vector: 19, .. }, M::Dpps | M::Dppd | M::Vdpps | M::Vdppd) => 0x3f,
        (End::Fault { vector: 19, .. }, _) => 0x30,
        _ => 0,
    };
    for (what, e, g) in [
        ("MXCSR", e.mxcsr | corner, g.mxcsr | corner),
        ("FCW", e.fcw.into(), g.fcw.into()),
        ("FSW", e.fsw.into(), g.fsw.into()),
        ("FTW", e.ftw.into(), g.ftw.into()),
    ] {
        if e != g {
            all.push(format!("{what} is {g:#x}, not {e:#x}"));
        }
    }
    if expected.memory != got.memory || expected.strayed != got.strayed {
        let at = expected.memory.iter().zip(&got.memory).position(|(e, g)| e != g);
        all.push(format!("memory differs at {at:x?} of the window"));
    }
    all
}
