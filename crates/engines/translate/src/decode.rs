//! Guest code of one page, decoded, and which status flags live through it.

use iced_x86::{
    Code, ConditionCode, Decoder, FlowControl, Instruction, Mnemonic, OpKind, Register, RflagsBits,
};
use memory::Memory;

use crate::allowed::{self, Class};

/// Bytes of the longest instruction.
pub const LONGEST: u64 = 15;
const PAGE: u64 = 0x1000;
/// Instructions that are looked at to see whether a jump's target needs the flags.
const AHEAD: usize = 32;

/// The six status flags, as iced has them.
pub const STATUS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Why no more instructions were decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// No more were wanted.
    Enough,
    /// What follows is not in the page, or not as a whole.
    Beyond,
}

/// Room for a page, and for an instruction that reaches beyond it.
pub type Bytes = [u8; PAGE as usize + 64];

/// A page of guest code: read, and marked as cached, as far as it was looked at.
pub struct Page<'a> {
    memory: &'a Memory,
    /// Offset of the page in guest memory.
    offset: u64,
    /// Offset of the page that follows it in the linear address space, if an instruction may reach into that.
    next: Option<u64>,
    bits: u32,
    options: u32,
    bytes: &'a mut Bytes,
    /// A bit for each 64-byte line that was read.
    lines: u128,
}

impl<'a> Page<'a> {
    /// The page of guest memory at `offset`, not yet looked at. With `next`, the page after it, an instruction may reach
    /// into that. What `bytes` holds does not matter.
    pub fn new(
        memory: &'a Memory,
        offset: u64,
        next: Option<u64>,
        (bits, options): (u32, u32),
        bytes: &'a mut Bytes,
    ) -> Self {
        Self {
            memory,
            offset: offset & !(PAGE - 1),
            next: next.map(|n| n & !(PAGE - 1)),
            bits,
            options,
            bytes,
            lines: 0,
        }
    }

    fn look(&mut self, from: u64, to: u64) {
        let (first, last) = (from / 64, (to - 1) / 64);
        for line in first..=last.min(64) {
            if self.lines >> line & 1 == 0 {
                self.lines |= 1 << line;
                let at = line * 64;
                let offset = match self.next {
                    Some(next) if at >= PAGE => next,
                    _ => self.offset + at,
                };
                // Marked before it is read: see `memory::code`.
                self.memory.code().mark(offset, 64);
                for n in (0..64).step_by(8) {
                    let word: u64 = self.memory.load(offset + n);
                    let to = (at + n) as usize;
                    self.bytes[to..to + 8].copy_from_slice(&word.to_le_bytes());
                }
            }
        }
    }

    /// Where the bytes end that can be looked at.
    fn end(&self) -> u64 {
        if self.next.is_some() { PAGE + LONGEST } else { PAGE }
    }

    /// Decodes instructions from `at` on, with offsets in the page as their IPs, while `each` wants the next. Tells of the end,
    /// if it comes to that: of the page, or an instruction that reaches beyond what can be looked at.
    pub fn decode(&mut self, mut at: u64, mut each: impl FnMut(Instruction) -> bool) -> End {
        while at < PAGE {
            let needed = (at + LONGEST).min(self.end());
            self.look(at, needed);
            // Lines are looked at as a whole.
            let end = needed.next_multiple_of(64).min(self.end());
            let bytes = &self.bytes[at as usize..end as usize];
            let mut decoder = Decoder::with_ip(self.bits, bytes, at, self.options);
            while at < PAGE && (at + LONGEST <= end || end == self.end()) {
                let i = decoder.decode();
                // One that is cut off by the page's end decodes as invalid too.
                if i.is_invalid() && end == PAGE && at + LONGEST > PAGE {
                    return End::Beyond;
                }
                if !each(i) {
                    return End::Enough;
                }
                at = i.next_ip();
            }
        }
        End::Beyond
    }

    /// The instruction at `at`, if it does not reach beyond what can be looked at.
    pub fn one(&mut self, at: u64) -> Option<Instruction> {
        let mut one = None;
        self.decode(at, |i| {
            one = Some(i);
            false
        });
        one
    }

    /// The bytes of an instruction that [`Page::decode`] gave.
    pub fn bytes(&self, i: &Instruction) -> &[u8] {
        let at = (i.ip() as usize).min(PAGE as usize);
        &self.bytes[at..(at + i.len().max(1)).min(self.bytes.len())]
    }

    /// The status flags that are read at `at` before they are written.
    pub fn live_at(&mut self, at: u64) -> u32 {
        let (mut live, mut written, mut left) = (0, 0, AHEAD);
        let mut next = Some(at);
        while let Some(at) = next.take() {
            self.decode(at, |i| {
                live |= reads(&i) & !written;
                written |= writes(&i);
                left -= 1;
                if live | written == STATUS || left == 0 {
                    return false;
                }
                let flow = i.flow_control();
                if flow == FlowControl::UnconditionalBranch && is_near(&i) {
                    next = Some(i.near_branch_target());
                }
                flow == FlowControl::Next
            });
        }
        live | STATUS & !written
    }
}

/// Whether a branch has its target in itself.
pub fn is_near(i: &Instruction) -> bool {
    i.op_count() == 1
        && matches!(i.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
}

/// Whether the count of a shift or rotation may be 0, which leaves the flags as they are.
fn may_not_write(i: &Instruction) -> bool {
    use Mnemonic as M;
    let shift = matches!(
        i.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    );
    if !shift {
        return i.has_rep_prefix() || i.has_repne_prefix();
    }
    let n = i.op_count() - 1;
    match i.op_kind(n) {
        OpKind::Immediate8 => i.immediate8() & 31 == 0 || i.immediate8() & 31 >= 16,
        _ => i.op_register(n) == Register::CL,
    }
}

/// The status flags that an instruction writes whatever happens.
pub fn writes(i: &Instruction) -> u32 {
    if i.rflags_modified() & STATUS == 0 || may_not_write(i) { 0 } else { i.rflags_modified() & STATUS }
}

/// The status flags that an instruction may write.
pub fn may_write(i: &Instruction) -> u32 {
    i.rflags_modified() & STATUS
}

/// The status flags that an instruction needs as they were.
pub fn reads(i: &Instruction) -> u32 {
    let own = i.rflags_read() & STATUS;
    if may_not_write(i) { own | i.rflags_modified() & STATUS } else { own }
}

/// Whether an instruction may fault, or be left to the reference engine: all but those on registers alone.
pub fn may_fault(i: &Instruction) -> bool {
    use Mnemonic as M;
    let plain = (0..i.op_count()).all(|n| match i.op_kind(n) {
        OpKind::Register => i.op_register(n).is_gpr(),
        kind => kind != OpKind::Memory,
    });
    !plain
        || i.is_stack_instruction()
        || allowed::class(i) != Some(Class::Integer)
        || matches!(i.mnemonic(), M::Div | M::Idiv)
}

/// The number of the condition of a Jcc, SETcc or CMOVcc, as the encoding has it.
pub fn condition(i: &Instruction) -> Option<u8> {
    Some(match i.condition_code() {
        ConditionCode::None => return None,
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        ConditionCode::g => 15,
    })
}

/// The same instruction in an encoding that 64-bit code has and that can name any register.
pub fn general(i: &Instruction) -> Instruction {
    let code = match i.code() {
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        _ => return *i,
    };
    let mut i = *i;
    i.set_code(code);
    i
}

/// Whether the instruction does nothing that a guest could see.
pub fn is_skipped(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Nop
            | M::Reservednop
            | M::Endbr64
            | M::Endbr32
            | M::Rdsspd
            | M::Rdsspq
            | M::Cldemote
            | M::Prefetchwt1
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchw
    )
}
