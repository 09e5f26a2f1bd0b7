//! From a guest's instruction to a stub: one listed instruction, re-encoded here, between loads and stores.

use std::mem::offset_of;

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, EncodingKind, Instruction, InstructionInfo,
    InstructionInfoFactory, MemoryOperand, OpAccess, OpKind, Register,
};

use crate::table::{self, Class};
use crate::{Bounce, SimdState, Unsupported, features, x87};

/// EFLAGS bits that compute instructions read and write: CF, PF, AF, ZF, SF, OF.
pub(crate) const ARITHMETIC_FLAGS: u64 = 0x8d5;

/// What stubs are called with: the state, the general registers, and the bounce buffer.
const STATE: Register = Register::RDI;
const GPRS: Register = Register::RSI;
const BOUNCE: Register = Register::R11;
/// Where explicit general register operands go, in order of appearance. With the implicit RAX, RCX and RDX they are
/// all that an instruction may touch; none is callee-saved.
const OPERANDS: [Register; 3] = [Register::R8, Register::R9, Register::R10];

/// How a stub is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Plain,
    Float,
    X87 { stores: bool },
}

/// A stub, not yet in executable memory.
pub(crate) struct Compiled {
    pub kind: Kind,
    /// It moves the x87 to MMX: TOP becomes 0, all registers valid.
    pub mmx: bool,
    pub reads_flags: bool,
    pub writes_flags: u64,
    pub code: Vec<u8>,
    /// For x87: the way without FXRSTOR and FXSAVE.
    pub fast: Option<(x87::Plan, Vec<u8>)>,
}

/// A guest's general register and the host's that stands for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Slot {
    guest: Register,
    host: Register,
    /// AH, CH, DH or BH: bits 8 to 15 of `guest`, only ever read.
    high_byte: bool,
    written: bool,
}

impl Slot {
    /// Of the guest's register in the array of them.
    fn offset(&self) -> i64 {
        8 * self.guest.number() as i64
    }
}

/// Compiles `guest`, whose memory operand (if any) becomes the bounce buffer.
pub(crate) fn compile(guest: &Instruction) -> Result<Compiled, Unsupported> {
    let class = table::class(guest.code()).ok_or(Unsupported::NotListed)?;
    if !guest.code().cpuid_features().iter().all(|&feature| features::host_has(feature)) {
        return Err(Unsupported::HostLacks);
    }
    let (instruction, slots) = normalise(guest).ok_or(Unsupported::NotListed)?;
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(&instruction);
    let uses = Uses::of(info, slots).ok_or(Unsupported::NotListed)?;
    let writes_flags =
        flags(instruction.rflags_written() | instruction.rflags_set() | instruction.rflags_cleared());
    let reads_flags = flags(instruction.rflags_read()) != 0;
    let wraps = FlagWraps { reads_flags, writes_flags: writes_flags != 0 };
    let (kind, code, fast) = if class == Class::X87 {
        let stores = info.used_memory().iter().any(|memory| writes(memory.access()));
        let fast = match x87::plan(&instruction) {
            Some((plan, inner)) => Some((plan, x87_fast(&plan, &inner, wraps)?)),
            None => None,
        };
        (Kind::X87 { stores }, x87_slow(&instruction, wraps)?, fast)
    } else {
        let float = class == Class::Float;
        let kind = if float { Kind::Float } else { Kind::Plain };
        (kind, vector_stub(&instruction, &uses, float, wraps)?, None)
    };
    let mmx = uses.mmx.iter().any(Option::is_some);
    Ok(Compiled { kind, mmx, reads_flags, writes_flags, code, fast })
}

/// The registers that an instruction touches; for vector and MMX registers, whether it writes them.
struct Uses {
    vectors: [Option<bool>; 16],
    mmx: [Option<bool>; 8],
    gprs: Vec<Slot>,
}

impl Uses {
    /// `None` if there is a register that no stub handles.
    fn of(info: &InstructionInfo, gprs: Vec<Slot>) -> Option<Self> {
        let mut uses = Uses { vectors: [None; 16], mmx: [None; 8], gprs };
        for used in info.used_registers() {
            let (register, write) = (used.register(), writes(used.access()));
            if register.is_vector_register() {
                let entry = uses.vectors.get_mut(register.number())?;
                *entry = Some(entry.unwrap_or(false) | write);
            } else if register.is_mm() {
                let entry = uses.mmx.get_mut(register.number())?;
                *entry = Some(entry.unwrap_or(false) | write);
            } else if register.is_gpr() {
                note_gpr(&mut uses.gprs, register, write)?;
            } else if !register.is_st() && register != Register::DS {
                return None;
            }
        }
        Some(uses)
    }
}

/// All registers that the instruction names are loaded, even those it only writes: what it leaves of them stays.
fn vector_stub(
    instruction: &Instruction,
    uses: &Uses,
    float: bool,
    wraps: FlagWraps,
) -> Result<Vec<u8>, Unsupported> {
    let vex = instruction.code().encoding() == EncodingKind::VEX;
    let mut asm = Assembler::default();
    asm.emit(Instruction::with2(Code::Mov_r64_rm64, BOUNCE, Register::RDX))?;
    asm.load_flags(wraps.reads_flags)?;
    for number in touched(&uses.vectors) {
        asm.load_vector(number, vex)?;
    }
    for number in touched(&uses.mmx) {
        asm.emit(Instruction::with2(
            Code::Movq_mm_mmm64,
            Register::MM0 + number,
            memory(STATE, fpr(number)),
        ))?;
    }
    for slot in &uses.gprs {
        asm.load_gpr(slot)?;
    }
    if float {
        asm.emit(Instruction::with1(Code::Ldmxcsr_m32, bounce(offset_of!(Bounce, mxcsr))))?;
    }
    asm.put(instruction)?;
    asm.store_flags(wraps.writes_flags)?;
    if float {
        asm.emit(Instruction::with1(Code::Stmxcsr_m32, bounce(offset_of!(Bounce, mxcsr))))?;
    }
    for number in written(&uses.vectors) {
        asm.store_vector(number, vex)?;
    }
    for number in written(&uses.mmx) {
        let (low, exponent) = (memory(STATE, fpr(number)), memory(STATE, fpr(number) + 8));
        asm.emit(Instruction::with2(Code::Movq_mmm64_mm, low, Register::MM0 + number))?;
        // A written MMX register has an exponent of all ones (SDM vol. 1, 9.5.1).
        asm.emit(Instruction::with2(Code::Mov_rm16_imm16, exponent, 0xffffu32))?;
    }
    for slot in uses.gprs.iter().filter(|slot| slot.written) {
        asm.emit(Instruction::with2(Code::Mov_rm64_r64, memory(GPRS, slot.offset()), slot.host))?;
    }
    if float {
        asm.host_mxcsr()?;
    }
    if vex && touched(&uses.vectors).next().is_some() {
        asm.put0(Code::VEX_Vzeroupper)?;
    }
    if touched(&uses.mmx).next().is_some() {
        asm.put0(Code::Emms)?;
    }
    asm.put0(Code::Retnq)?;
    Ok(asm.code)
}

fn touched(registers: &[Option<bool>]) -> impl Iterator<Item = u32> {
    (0..).zip(registers).filter(|(_, used)| used.is_some()).map(|(number, _)| number)
}

fn written(registers: &[Option<bool>]) -> impl Iterator<Item = u32> {
    (0..).zip(registers).filter(|(_, used)| **used == Some(true)).map(|(number, _)| number)
}

fn writes(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

/// The instruction with plain prefixes, its memory operand at [`BOUNCE`] and its general registers renamed.
/// `None` when an operand is of a kind that is not allowed.
fn normalise(guest: &Instruction) -> Option<(Instruction, Vec<Slot>)> {
    if guest.has_lock_prefix() {
        return None;
    }
    let mut instruction = *guest;
    instruction.set_segment_prefix(Register::None);
    instruction.set_has_repe_prefix(false);
    instruction.set_has_repne_prefix(false);
    instruction.set_has_xacquire_prefix(false);
    instruction.set_has_xrelease_prefix(false);
    let mut slots: Vec<Slot> = Vec::new();
    for i in 0..guest.op_count() {
        match guest.op_kind(i) {
            OpKind::Immediate8 | OpKind::Immediate8_2nd => {}
            OpKind::Memory => {
                if guest.is_vsib() || !(1..=64).contains(&guest.memory_size().size()) {
                    return None;
                }
                instruction.set_memory_base(BOUNCE);
                instruction.set_memory_index(Register::None);
                instruction.set_memory_index_scale(1);
                instruction.set_memory_displ_size(0);
                instruction.set_memory_displacement64(0);
            }
            OpKind::Register => {
                let register = guest.op_register(i);
                if register.is_gpr() {
                    instruction.set_op_register(i, rename(&mut slots, register)?);
                } else if !(register.is_xmm() || register.is_ymm() || register.is_mm() || register.is_st()) {
                    return None;
                }
            }
            _ => return None,
        }
    }
    Some((instruction, slots))
}

/// The host register of the guest's `register`, of the same size.
fn rename(slots: &mut Vec<Slot>, register: Register) -> Option<Register> {
    let high_byte = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
    let guest = register.full_register();
    let known = slots.iter().find(|slot| slot.guest == guest && slot.high_byte == high_byte);
    let host = match known {
        Some(slot) => slot.host,
        None => {
            let host = *OPERANDS.get(slots.len())?;
            slots.push(Slot { guest, host, high_byte, written: false });
            host
        }
    };
    let number = host.number() as u32;
    Some(match register.size() {
        1 => Register::AL + 4 + number,
        2 => Register::AX + number,
        4 => Register::EAX + number,
        8 => host,
        _ => return None,
    })
}

/// Notes that the renamed instruction uses general register `register`: an operand of ours, or an implicit one.
fn note_gpr(slots: &mut Vec<Slot>, register: Register, write: bool) -> Option<()> {
    let host = register.full_register();
    if host == BOUNCE {
        return if write { None } else { Some(()) };
    }
    if let Some(slot) = slots.iter_mut().find(|slot| slot.host == host) {
        slot.written |= write;
        return if slot.high_byte && write { None } else { Some(()) };
    }
    if !matches!(host, Register::RAX | Register::RCX | Register::RDX) {
        return None;
    }
    slots.push(Slot { guest: host, host, high_byte: false, written: write });
    Some(())
}

fn flags(bits: u32) -> u64 {
    use iced_x86::RflagsBits as B;
    let map = [(B::CF, 0), (B::PF, 2), (B::AF, 4), (B::ZF, 6), (B::SF, 7), (B::OF, 11)];
    map.iter().filter(|(bit, _)| bits & bit != 0).fold(0, |flags, (_, at)| flags | 1 << at)
}

fn memory(base: Register, displacement: i64) -> MemoryOperand {
    MemoryOperand::with_base_displ(base, displacement)
}

fn bounce(offset: usize) -> MemoryOperand {
    memory(BOUNCE, offset as i64)
}

/// Offset of MM`number` in the state.
fn fpr(number: u32) -> i64 {
    offset_of!(SimdState, fpr) as i64 + 16 * i64::from(number)
}

#[derive(Clone, Copy)]
struct FlagWraps {
    reads_flags: bool,
    writes_flags: bool,
}

/// The whole x87 from and to an FXSAVE image at the first argument.
fn x87_slow(instruction: &Instruction, wraps: FlagWraps) -> Result<Vec<u8>, Unsupported> {
    let mut asm = Assembler::default();
    asm.emit(Instruction::with2(Code::Mov_r64_rm64, BOUNCE, Register::RDX))?;
    asm.emit(Instruction::with1(Code::Fxrstor64_m512byte, memory(STATE, 0)))?;
    asm.load_flags(wraps.reads_flags)?;
    asm.put(instruction)?;
    asm.store_flags(wraps.writes_flags)?;
    asm.emit(Instruction::with1(Code::Fxsave64_m512byte, memory(STATE, 0)))?;
    asm.put0(Code::Fninit)?;
    asm.host_mxcsr()?;
    asm.put0(Code::Retnq)?;
    Ok(asm.code)
}

/// Only the registers that the instruction needs: ST(0), or the one to push, at the first argument; ST(i) at the
/// second. All exceptions are masked, no stack fault can happen.
fn x87_fast(plan: &x87::Plan, inner: &Instruction, wraps: FlagWraps) -> Result<Vec<u8>, Unsupported> {
    let mut asm = Assembler::default();
    asm.emit(Instruction::with2(Code::Mov_r64_rm64, BOUNCE, Register::RDX))?;
    // Flags that earlier instructions left on the host must not become the guest's, unless it has them set already.
    // FNCLEX is slow, and so rarely needed.
    asm.emit(Instruction::with1(Code::Fnstsw_AX, Register::AX))?;
    asm.emit(Instruction::with2(Code::Test_rm8_r8, bounce(offset_of!(Bounce, fsw)), Register::AL))?;
    let fnclex_size = 2;
    asm.skip_if_equal(fnclex_size)?;
    asm.put0(Code::Fnclex)?;
    asm.load_flags(wraps.reads_flags)?;
    asm.emit(Instruction::with1(Code::Fldcw_m2byte, bounce(offset_of!(Bounce, fcw))))?;
    if plan.other.is_some() {
        asm.emit(Instruction::with1(Code::Fld_m80fp, memory(GPRS, 0)))?;
    }
    if plan.top {
        asm.emit(Instruction::with1(Code::Fld_m80fp, memory(STATE, 0)))?;
    }
    asm.put(inner)?;
    asm.store_flags(wraps.writes_flags)?;
    asm.emit(Instruction::with1(Code::Fnstsw_m2byte, bounce(offset_of!(Bounce, fsw))))?;
    if plan.stores_top() {
        asm.emit(Instruction::with1(Code::Fstp_m80fp, memory(STATE, 0)))?;
    }
    if plan.stores_other() {
        asm.emit(Instruction::with1(Code::Fstp_m80fp, memory(GPRS, 0)))?;
    }
    asm.emit(Instruction::with2(Code::Mov_rm16_imm16, memory(Register::RSP, -8), 0x37fu32))?;
    asm.emit(Instruction::with1(Code::Fldcw_m2byte, memory(Register::RSP, -8)))?;
    asm.put0(Code::Retnq)?;
    Ok(asm.code)
}

/// Collects machine code. An instruction that does not encode as meant makes the whole unsupported.
#[derive(Default)]
struct Assembler {
    code: Vec<u8>,
}

impl Assembler {
    fn put0(&mut self, code: Code) -> Result<(), Unsupported> {
        self.put(&Instruction::with(code))
    }

    fn emit(&mut self, built: Result<Instruction, iced_x86::IcedError>) -> Result<(), Unsupported> {
        self.put(&built.map_err(|_| Unsupported::NotListed)?)
    }

    /// Encodes `instruction` and checks by decoding that the bytes mean it, and nothing else.
    fn put(&mut self, instruction: &Instruction) -> Result<(), Unsupported> {
        let at = self.code.len() as u64;
        let mut encoder = Encoder::new(64);
        encoder.encode(instruction, at).map_err(|_| Unsupported::NotListed)?;
        let bytes = encoder.take_buffer();
        let mut decoder = Decoder::with_ip(64, &bytes, at, DecoderOptions::NONE);
        let decoded = decoder.decode();
        if decoded.len() != bytes.len() || !same(&decoded, instruction) {
            return Err(Unsupported::NotListed);
        }
        self.code.extend_from_slice(&bytes);
        Ok(())
    }

    fn skip_if_equal(&mut self, bytes: u64) -> Result<(), Unsupported> {
        let jump_size = 2;
        let target = self.code.len() as u64 + jump_size + bytes;
        self.emit(Instruction::with_branch(Code::Je_rel8_64, target))
    }

    fn load_vector(&mut self, number: u32, vex: bool) -> Result<(), Unsupported> {
        let at = memory(STATE, i64::from(number) * 32);
        if vex {
            self.emit(Instruction::with2(Code::VEX_Vmovdqu_ymm_ymmm256, Register::YMM0 + number, at))
        } else {
            self.emit(Instruction::with2(Code::Movdqu_xmm_xmmm128, Register::XMM0 + number, at))
        }
    }

    /// Legacy instructions keep the upper half (SDM vol. 1, 14.1.1): it stays as it is in the state.
    fn store_vector(&mut self, number: u32, vex: bool) -> Result<(), Unsupported> {
        let at = memory(STATE, i64::from(number) * 32);
        if vex {
            self.emit(Instruction::with2(Code::VEX_Vmovdqu_ymmm256_ymm, at, Register::YMM0 + number))
        } else {
            self.emit(Instruction::with2(Code::Movdqu_xmmm128_xmm, at, Register::XMM0 + number))
        }
    }

    fn load_gpr(&mut self, slot: &Slot) -> Result<(), Unsupported> {
        let (host, at) = (slot.host, slot.offset());
        self.emit(if slot.high_byte {
            Instruction::with2(Code::Movzx_r32_rm8, host.full_register32(), memory(GPRS, at + 1))
        } else {
            Instruction::with2(Code::Mov_r64_rm64, host, memory(GPRS, at))
        })
    }

    fn load_flags(&mut self, wanted: bool) -> Result<(), Unsupported> {
        if wanted {
            self.emit(Instruction::with1(Code::Push_rm64, bounce(offset_of!(Bounce, flags))))?;
            self.put0(Code::Popfq)?;
        }
        Ok(())
    }

    fn store_flags(&mut self, wanted: bool) -> Result<(), Unsupported> {
        if wanted {
            self.put0(Code::Pushfq)?;
            self.emit(Instruction::with1(Code::Pop_rm64, bounce(offset_of!(Bounce, flags))))?;
        }
        Ok(())
    }

    /// The MXCSR that Rust code runs with, by way of the red zone.
    fn host_mxcsr(&mut self) -> Result<(), Unsupported> {
        self.emit(Instruction::with2(Code::Mov_rm32_imm32, memory(Register::RSP, -8), 0x1f80u32))?;
        self.emit(Instruction::with1(Code::Ldmxcsr_m32, memory(Register::RSP, -8)))
    }
}

/// Whether two instructions are the same operation on the same operands.
fn same(a: &Instruction, b: &Instruction) -> bool {
    let operand = |i| {
        a.op_kind(i) == b.op_kind(i)
            && match a.op_kind(i) {
                OpKind::Register => a.op_register(i) == b.op_register(i),
                OpKind::Memory => {
                    a.memory_base() == b.memory_base()
                        && a.memory_index() == b.memory_index()
                        && a.memory_displacement64() == b.memory_displacement64()
                        && a.memory_segment() == b.memory_segment()
                        && a.memory_size() == b.memory_size()
                }
                OpKind::NearBranch64 => a.near_branch64() == b.near_branch64(),
                _ => a.immediate(i) == b.immediate(i),
            }
    };
    a.code() == b.code() && a.op_count() == b.op_count() && (0..a.op_count()).all(operand)
}
