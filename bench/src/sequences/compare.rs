//! What counts as a difference.

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Formatter, Instruction, Mnemonic as M, NasmFormatter, OpKind,
    RflagsBits,
};
use machine::cpu::{Debug, Exit};
use x86::flags;
use x86::segment::{attr, index};

use super::case::Case;
use super::layout::{CODE_AT, HANDLERS, KERNEL};
use super::pair::{Outcome, Pair, Side};

/// Instructions that are followed at most when flags have to be understood.
const STEPS: usize = 4000;

/// Instructions that are looked at to see which flags are needed.
const AHEAD: usize = 48;

const STATUS: [(u32, u64); 6] = [
    (RflagsBits::CF, flags::CF),
    (RflagsBits::PF, flags::PF),
    (RflagsBits::AF, flags::AF),
    (RflagsBits::ZF, flags::ZF),
    (RflagsBits::SF, flags::SF),
    (RflagsBits::OF, flags::OF),
];

fn bits(iced: u32) -> u64 {
    STATUS.iter().filter(|(b, _)| iced & b != 0).fold(0, |m, (_, bit)| m | bit)
}

fn is_shift(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        M::Shl | M::Shr | M::Sar | M::Sal | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    )
}

fn undefined(i: &Instruction) -> u64 {
    let rotation = matches!(i.mnemonic(), M::Rol | M::Ror | M::Rcl | M::Rcr);
    bits(i.rflags_undefined())
        | if rotation {
            flags::OF
        } else if is_shift(i) {
            flags::OF | flags::AF | flags::CF
        } else {
            0
        }
}

/// All that differs after both ran `case`, in words.
pub fn differences(pair: &Pair, reference: &Outcome, subject: &Outcome) -> Vec<String> {
    let mut all = Vec::new();
    if (reference.exit, reference.endless) != (subject.exit, subject.endless) {
        all.push(format!(
            "end is {:?} ({}), not {:?} ({})",
            subject.exit, subject.endless, reference.exit, reference.endless
        ));
    }
    if reference.state != subject.state {
        let values = [&subject.state, &reference.state].map(|s| format!("{s:x?}"));
        let parts = values.each_ref().map(|v| v.split([',', '{', '}']).collect::<Vec<_>>());
        let names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"];
        for n in 0..16 {
            let (a, b) = (subject.state.gpr[n], reference.state.gpr[n]);
            if a != b {
                let name = names.get(n).map_or_else(|| format!("r{n}"), |s| (*s).to_owned());
                all.push(format!("{name} is {a:x}, not {b:x}"));
            }
        }
        for (n, (a, b)) in subject.state.fpu.ymm.iter().zip(&reference.state.fpu.ymm).enumerate() {
            if a != b {
                all.push(format!("ymm{n} is {a:02x?}, not {b:02x?}"));
            }
        }
        let rest = parts[0].iter().zip(&parts[1]).filter(|(a, b)| a != b && a.contains(':'));
        all.extend(rest.map(|(a, b)| format!("state has{a}, not{b}")));
        if all.is_empty() {
            all.push("states differ".into());
        }
    }
    for (n, (a, b)) in
        pair.subject.now.iter().zip(&pair.reference.now).enumerate().filter(|(_, (a, b))| a != b)
    {
        all.push(format!("memory at {:x} is {a:016x}, not {b:016x}", 8 * n));
        if all.len() > 20 {
            all.push("and so on".into());
            break;
        }
    }
    all
}

/// Flags that may be read, from the instruction at `rip` on, before they are written. What a fault pushes of the others
/// is lost on nobody who goes on after it, and the translate engine does not keep it.
fn live(side: &mut Side, width: u32, base: u64, mut rip: u64, most: usize) -> u64 {
    let (mut live, mut written) = (0, 0);
    for n in 0..most {
        let bytes: [u8; 15] = side.peek(rip.wrapping_add(if width == 64 { 0 } else { base }));
        let i = Decoder::with_ip(width, &bytes, rip, DecoderOptions::NONE).decode();
        let modified = bits(i.rflags_modified());
        let maybe = is_shift(&i) && i.op_kind(i.op_count() - 1) == OpKind::Register || i.has_rep_prefix();
        live |= bits(i.rflags_read()) & !written;
        written |= if maybe { 0 } else { modified };
        if i.is_invalid() || live | written == flags::STATUS {
            break;
        }
        match i.flow_control() {
            FlowControl::Next => rip = i.next_ip(),
            FlowControl::UnconditionalBranch if i.near_branch_target() != 0 => rip = i.near_branch_target(),
            FlowControl::ConditionalBranch => {
                let both = [i.next_ip(), i.near_branch_target()];
                return both
                    .into_iter()
                    .fold(live, |l, at| l | self::live(side, width, base, at, (most - n) / 2) & !written);
            }
            _ => break,
        }
    }
    live | flags::STATUS & !written
}

/// What an execution says about undefined flags.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trace {
    /// Flags that are undefined at the end.
    pub open: u64,
    /// An instruction, or a frame on the stack, depended on undefined flags.
    pub depends: bool,
}

/// Follows the case on the reference engine. Memory is then as it was at the end.
pub fn trace(
    side: &mut Side,
    case: &Case,
    image: &[u64],
    show: &mut dyn FnMut(&str),
) -> anyhow::Result<Trace> {
    side.prepare(case, image)?;
    side.cpu.debug(&Debug { step: true, ..Debug::default() })?;
    let mut trace = Trace::default();
    let mut formatter = NasmFormatter::new();
    for _ in 0..STEPS {
        let state = side.cpu.state()?;
        let cs = state.segments[index::CS];
        let handlers = KERNEL + HANDLERS;
        let width = match (cs.has(attr::L), cs.has(attr::DB)) {
            (true, _) => 64,
            (_, true) => 32,
            _ => 16,
        };
        if (handlers..handlers + 0x1000).contains(&state.rip) {
            break;
        }
        let bytes: [u8; 15] = side.peek(state.rip.wrapping_add(if width == 64 { 0 } else { cs.base }));
        let i = Decoder::with_ip(width, &bytes, state.rip, DecoderOptions::NONE).decode();
        let mut text = String::new();
        formatter.format(&i, &mut text);
        let at = state.rip.wrapping_sub(case.offset() + CODE_AT);
        show(&format!(
            "{at:6x} {text}  rflags {:x} rax {:x} rcx {:x} rsp {:x}",
            state.rflags, state.gpr[0], state.gpr[1], state.gpr[4]
        ));
        let reads = match i.mnemonic() {
            M::Pushf | M::Pushfd | M::Pushfq | M::Lahf | M::Syscall | M::Int | M::Int1 => flags::STATUS,
            _ => bits(i.rflags_read()),
        };
        trace.depends |= reads & trace.open != 0;
        // 16-bit double shifts by more than 16 leave even the result undefined.
        let narrow = matches!(i.mnemonic(), M::Shld | M::Shrd) && i.op1_register().is_gpr16();
        let count = if i.op_kind(i.op_count().saturating_sub(1)) == OpKind::Immediate8 {
            i.immediate8()
        } else {
            state.gpr[1] as u8
        };
        trace.depends |= narrow && count & 31 > 16;
        let code = side.code();
        let dead = flags::STATUS & !live(side, width, cs.base, i.next_ip(), AHEAD);
        let dead_here = flags::STATUS & !live(side, width, cs.base, state.rip, AHEAD);
        let exit = side.cpu.run()?;
        if exit == Exit::TripleFault {
            trace.open |= dead_here;
            break;
        }
        let after = side.cpu.state()?;
        let ended = (handlers..handlers + 0x1000).contains(&after.rip);
        if ended && i.flow_control() != FlowControl::Interrupt {
            trace.open |= dead_here;
        }
        if i.is_invalid() || exit == Exit::Kicked {
            break;
        }
        // A frame was pushed on the way to a handler that comes back.
        if (KERNEL..KERNEL + 0x4000).contains(&after.rip) && trace.open != 0 && state.rip < KERNEL {
            trace.depends = true;
        }
        if !ended {
            let conditional = is_shift(&i) || i.has_rep_prefix() || i.has_repne_prefix();
            let written = if conditional { 0 } else { bits(i.rflags_modified()) };
            trace.open = trace.open & !written | undefined(&i);
            if side.code() != code {
                // Flags that the code as it was would not have needed.
                trace.open |= dead;
            }
        }
    }
    side.cpu.debug(&Debug::default())?;
    Ok(trace)
}
