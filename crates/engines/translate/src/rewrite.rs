//! What instructions become that do not branch: copies with their operands elsewhere, and stack operations.

use iced_x86::{
    Code, EncodingKind, Instruction, InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register,
};

use crate::allowed::{self, Class};
use crate::asm::{Mem, based, frame, reg};
use crate::block::{Builder, Mode};
use crate::decode;
use crate::frame::at;
use crate::plan::{self, Origin, Place};
use crate::seats::{Seat, is_high, number, register, seat};

/// Host register that holds the guest's RSP and RBP.
const STACK: u8 = 10;
const FRAME_POINTER: u8 = 5;

/// Of an instruction nothing is asked but how it accesses its operands.
const ACCESS: u32 = InstructionInfoOptions::NO_MEMORY_USAGE | InstructionInfoOptions::NO_REGISTER_USAGE;

/// A guest register that the instruction works on in RSI or RDI.
#[derive(Clone, Copy)]
struct Temporary {
    guest: u8,
    host: u8,
    load: bool,
    store: bool,
}

fn is_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
}

impl Builder<'_, '_> {
    /// Whether the operand in memory is in a segment that flat addressing does not cover.
    pub fn segment_is_special(&self, i: &Instruction) -> bool {
        if !is_memory(i) || i.mnemonic() == Mnemonic::Lea || self.c.mode.wide() {
            return false;
        }
        match i.memory_segment() {
            Register::CS => true,
            Register::FS => self.c.mode.0 & Mode::FS == 0,
            Register::GS => self.c.mode.0 & Mode::GS == 0,
            _ => false,
        }
    }

    /// Whether the operand in memory is addressed in a way that is left to the reference engine.
    pub fn address_is_special(&self, i: &Instruction) -> bool {
        let odd = |r: Register| r.is_gpr16() || r == Register::EIP || r.is_vector_register();
        let short = i.memory_base() == Register::None
            && i.memory_index() == Register::None
            && i.memory_displ_size() == 2;
        let far =
            i.memory_base() == Register::RIP && i32::try_from(i.memory_displacement64() as i64).is_err();
        is_memory(i) && (odd(i.memory_base()) || odd(i.memory_index()) || short || far)
    }

    /// Emits the linear address of the operand in memory to RDI; without the segment's base if it is LEA's.
    fn address(&mut self, i: &Instruction, segment: bool) {
        let (base, index) = (i.memory_base(), i.memory_index());
        let disp = i.memory_displacement64();
        let scale = i.memory_index_scale().trailing_zeros() as u8;
        let wide = if base == Register::None && index == Register::None {
            i.memory_displ_size() == 8
        } else {
            base.is_gpr64() || index.is_gpr64() || base == Register::RIP
        };
        let small = i32::try_from(disp as i64).ok().or((!wide).then_some(disp as u32 as i32));
        let Some(disp) = small else {
            // MOV with a 64-bit address.
            self.a.raw(&[0x48, 0xbf]);
            self.a.raw(&disp.to_le_bytes());
            return self.add_segment(i, segment);
        };
        if base == Register::RIP {
            self.a.load(reg::T, frame(at::PAGE));
            self.a.lea(true, reg::T, based(reg::T, disp));
            return self.add_segment(i, segment);
        }
        let base = (base != Register::None).then(|| self.seated(number(base), reg::T));
        let index = (index != Register::None).then(|| (self.seated(number(index), reg::U), scale));
        let plain = index.is_none() && disp == 0;
        match base {
            Some(b) if plain && wide => {
                if b != reg::T {
                    self.a.mov(reg::T, b);
                }
            }
            Some(b) if plain => self.a.mov32(reg::T, b),
            _ => self.a.lea(wide, reg::T, crate::asm::Mem { base, index, disp }),
        }
        self.add_segment(i, segment);
    }

    fn add_segment(&mut self, i: &Instruction, segment: bool) {
        if !segment {
            return;
        }
        let field = match i.memory_segment() {
            Register::FS => at::FS,
            Register::GS => at::GS,
            _ => return,
        };
        self.a.rm(self.c.mode.wide(), &[0x03], reg::T, frame(field));
    }

    /// The host register with a guest register's value: its own, or `temporary`.
    fn seated(&mut self, guest: u8, temporary: u8) -> u8 {
        match seat(guest) {
            Seat::Host(r) => r,
            Seat::Frame(slot) => {
                self.a.load(temporary, frame(slot));
                if temporary == reg::U {
                    self.owner = None;
                }
                temporary
            }
        }
    }

    /// Writes a guest register, all of it.
    pub fn assign(&mut self, guest: u8, from: u8) {
        match seat(guest) {
            Seat::Host(r) if self.c.mode.wide() => self.a.mov(r, from),
            Seat::Host(r) => self.a.mov32(r, from),
            Seat::Frame(slot) => self.a.store(frame(slot), from),
        }
    }

    fn temporaries(&mut self, i: &Instruction) -> Vec<Temporary> {
        let high = allowed::names_high(i);
        let mut out: Vec<Temporary> = Vec::new();
        for n in 0..i.op_count() {
            let r = i.op_register(n);
            if i.op_kind(n) != OpKind::Register || !r.is_gpr() || is_high(r) {
                continue;
            }
            let guest = number(r);
            let needed = match seat(guest) {
                Seat::Frame(_) => true,
                Seat::Host(h) => high && h >= 8,
            };
            if !needed {
                continue;
            }
            let access = self.info.info_options(i, ACCESS).op_access(n);
            let writes = !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None);
            let load = access != OpAccess::Write || r.size() < 4;
            match out.iter_mut().find(|t| t.guest == guest) {
                Some(t) => {
                    t.load |= load;
                    t.store |= writes;
                }
                None => out.push(Temporary { guest, host: 0, load, store: writes }),
            }
        }
        out
    }

    /// Whether the instruction needs more registers than there are to be had.
    pub fn too_many_temporaries(&self, i: &Instruction) -> bool {
        let mut seen = [None; 4];
        let mut count = 0;
        let high = allowed::names_high(i);
        for n in 0..i.op_count().min(4) {
            let r = i.op_register(n);
            if i.op_kind(n) != OpKind::Register || !r.is_gpr() || is_high(r) {
                continue;
            }
            let guest = number(r);
            let needed = match seat(guest) {
                Seat::Frame(_) => true,
                Seat::Host(h) => high && h >= 8,
            };
            if needed && !seen.contains(&Some(guest)) {
                seen[count] = Some(guest);
                count += 1;
            }
        }
        count > if is_memory(i) { 1 } else { 2 }
    }

    /// LEA.
    pub fn load_address(&mut self, i: &Instruction) {
        self.address(i, false);
        let to = number(i.op0_register());
        let size = i.op0_register().size();
        match (seat(to), size) {
            (Seat::Host(r), 8) => self.a.mov(r, reg::T),
            (Seat::Host(r), 4) => self.a.mov32(r, reg::T),
            (Seat::Host(r), _) => {
                self.a.raw(&[0x66]);
                self.a.rm16(r, reg::T);
            }
            (Seat::Frame(slot), 8) => self.a.store(frame(slot), reg::T),
            (Seat::Frame(slot), 4) => {
                self.a.mov32(reg::T, reg::T);
                self.a.store(frame(slot), reg::T);
            }
            (Seat::Frame(slot), _) => {
                self.a.raw(&[0x66]);
                self.a.store32(frame(slot), reg::T);
            }
        }
    }

    /// The instruction itself, its operands being elsewhere.
    pub fn copy(&mut self, guest: &Instruction) {
        let mut i = decode::general(guest);
        if !self.c.keep_lock {
            i.set_has_lock_prefix(false);
        }
        let memory = is_memory(&i);
        let mut temporaries = self.temporaries(&i);
        let mut operand = None;
        if memory {
            let size = i.memory_size().size().max(1) as u32;
            let n = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory).unwrap_or(0);
            let access = self.info.info_options(&i, ACCESS).op_access(n);
            let write = !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None);
            operand = Some(self.access(size, write, plan::place(&i, self.c.mode), |b| b.address(&i, true)));
        }
        let partial = decode::may_write(&i) != 0 && self.live_after & !decode::writes(&i) != 0;
        if decode::reads(&i) != 0 || partial {
            self.flags_to_host();
        }
        if let (None, [t]) = (operand, temporaries.as_slice())
            && let (Seat::Frame(slot), false) = (seat(t.guest), t.store)
            && let Some(in_memory) = folded(&i, t.guest, slot)
        {
            let out = reseat(&in_memory, &[], Some(frame(slot)));
            self.encode(&out);
            return self.flags_written(&i);
        }
        let mut hosts = [reg::U, reg::T];
        if let (Some(m), false) = (operand, temporaries.is_empty()) {
            let (m, host) = self.temporary(m);
            operand = Some(m);
            hosts[0] = host;
        }
        for (t, host) in temporaries.iter_mut().zip(hosts) {
            t.host = host;
            if host == reg::U {
                self.owner = None;
            }
            if t.load {
                match seat(t.guest) {
                    Seat::Host(r) => self.a.mov(host, r),
                    Seat::Frame(slot) => self.a.load(host, frame(slot)),
                }
            }
        }
        self.mark_op();
        if operand.is_none() && temporaries.is_empty() && i == *guest && is_the_hosts(&i) {
            self.a.raw(self.page.bytes(&i));
        } else {
            self.encode(&reseat(&i, &temporaries, operand));
        }
        for t in temporaries.iter().filter(|t| t.store) {
            match seat(t.guest) {
                Seat::Host(r) => self.a.mov(r, t.host),
                Seat::Frame(slot) => self.a.store(frame(slot), t.host),
            }
        }
        self.flags_written(&i);
    }

    /// Where the op itself begins the flags may no longer be the host's, or be again.
    pub fn mark_op(&mut self) {
        let Some(last) = self.marks.last().copied() else { return };
        let in_host = matches!(self.flags, crate::block::Flags::Host | crate::block::Flags::Both);
        if last.flags_in_host != in_host {
            let access = last.access;
            self.mark(false);
            if access && let Some(m) = self.marks.last_mut() {
                m.access = false;
            }
        }
    }

    /// VZEROUPPER or VZEROALL of 32-bit code, which has eight vector registers: the host's own would clear sixteen.
    pub fn zero_vectors(&mut self, all: bool) {
        for n in 0..8u8 {
            let operands = 0xc0 | n << 3 | n;
            if all {
                self.a.raw(&[0xc5, 0x81 | (15 - n) << 3, 0xef, operands]); // VPXOR xmm, xmm, xmm
            } else {
                self.a.raw(&[0xc5, 0xf8, 0x28, operands]); // VMOVAPS xmm, xmm
            }
        }
    }

    fn encode(&mut self, i: &Instruction) {
        let at = self.a.address();
        match self.encoder.encode(i, at) {
            Ok(_) => {
                let bytes = self.encoder.take_buffer();
                self.a.raw(&bytes);
                self.encoder.set_buffer({
                    let mut b = bytes;
                    b.clear();
                    b
                });
            }
            Err(_) => {
                // Nothing that `allowed` lets through; the reference engine executes it.
                let _ = self.encoder.take_buffer();
                self.a.raw(&[0x0f, 0x0b]);
            }
        }
    }

    /// Whether the instruction pushes or pops a word.
    pub fn is_stack(&self, i: &Instruction) -> bool {
        let word = self.c.mode.word();
        let size = i.stack_pointer_increment().abs() == word;
        match i.mnemonic() {
            Mnemonic::Push => {
                size && match i.op0_kind() {
                    OpKind::Register => i.op0_register().is_gpr(),
                    OpKind::Memory => !self.segment_is_special(i) && !self.address_is_special(i),
                    _ => true,
                }
            }
            Mnemonic::Pop => size && i.op0_kind() == OpKind::Register && i.op0_register().is_gpr(),
            Mnemonic::Leave => {
                matches!((i.code(), word), (iced_x86::Code::Leaveq, 8) | (iced_x86::Code::Leaved, 4))
            }
            _ => false,
        }
    }

    /// PUSH, POP, LEAVE.
    pub fn stack(&mut self, i: &Instruction) {
        match (i.mnemonic(), i.op0_kind()) {
            (Mnemonic::Push, OpKind::Register) => {
                let to = self.push_place();
                match seat(number(i.op0_register())) {
                    Seat::Host(r) => self.store_word(to, r),
                    Seat::Frame(slot) => {
                        let (to, r) = self.temporary(to);
                        self.a.load(r, frame(slot));
                        self.store_word(to, r);
                    }
                }
                self.move_stack(-self.c.mode.word());
            }
            (Mnemonic::Push, OpKind::Memory) => {
                self.load_operand(i);
                self.a.store(frame(at::SCRATCH2), reg::T);
                self.push_scratch();
            }
            (Mnemonic::Push, _) => {
                let to = self.push_place();
                let value = i.immediate(0) as i32;
                self.a.rm(self.c.mode.wide(), &[0xc7], 0, to);
                self.a.raw(&value.to_le_bytes());
                self.move_stack(-self.c.mode.word());
            }
            (Mnemonic::Pop, _) => {
                let guest = number(i.op0_register());
                self.pop_to_t();
                if guest != 4 {
                    self.move_stack(self.c.mode.word());
                }
                self.assign(guest, reg::T);
            }
            _ => {
                let word = self.c.mode.word();
                let from =
                    self.access(word as u32, false, Some(off(5, 0)), |b| b.copy_pointer(FRAME_POINTER));
                self.load_word(reg::T, from);
                self.a.lea(self.c.mode.wide(), STACK, based(FRAME_POINTER, word));
                self.assign(5, reg::T);
            }
        }
    }

    /// Pushes what is in the frame's second scratch field.
    pub fn push_scratch(&mut self) {
        let to = self.push_place();
        let (to, r) = self.temporary(to);
        self.a.load(r, frame(at::SCRATCH2));
        self.store_word(to, r);
        self.move_stack(-self.c.mode.word());
    }

    /// Whether the instruction works on a bit whose number is in a register, of a bit string in memory.
    pub fn is_bit_string(&self, i: &Instruction) -> bool {
        allowed::is_bit_string(i)
            && matches!(i.op1_register().size(), 4 | 8)
            && matches!(seat(number(i.op1_register())), Seat::Host(_))
    }

    /// BT, BTS, BTR, BTC of a bit string: first to the word that the bit is in.
    pub fn bit_string(&mut self, i: &Instruction) {
        let size = i.op1_register().size();
        let wide = self.c.mode.wide();
        let Seat::Host(bit) = seat(number(i.op1_register())) else { return };
        let operand = self.access(size as u32, i.mnemonic() != Mnemonic::Bt, None, |b| {
            b.address(i, true);
            if size == 8 {
                b.a.mov(reg::U, bit);
                b.a.raw(&[0x48, 0xc1, 0xfe, 6]); // SAR RSI, 6
            } else {
                b.a.sign_extend32(reg::U, bit);
                b.a.raw(&[0x48, 0xc1, 0xfe, 5]);
            }
            let scale = size.trailing_zeros() as u8;
            b.a.lea(wide, reg::T, Mem { base: Some(reg::T), index: Some((reg::U, scale)), disp: 0 });
        });
        self.a.lea(true, reg::U, operand);
        self.owner = None;
        self.a.mov32(reg::T, bit);
        self.a.and_imm32(reg::T, size as u32 * 8 - 1);
        self.flags_lost();
        if self.live_after & !decode::writes(i) != 0 {
            self.flags_to_host();
        }
        let mut out = reseat(i, &[], Some(based(reg::U, 0)));
        out.set_op1_register(register(reg::T, size));
        self.mark_op();
        self.encode(&out);
        self.flags_written(i);
    }

    fn copy_pointer(&mut self, from: u8) {
        if self.c.mode.wide() {
            self.a.mov(reg::T, from);
        } else {
            self.a.mov32(reg::T, from);
        }
    }

    /// MOV [mem], r of a word.
    pub fn store_word(&mut self, mem: Mem, r: u8) {
        self.a.rm(self.c.mode.wide(), &[0x89], r, mem);
    }

    fn load_word(&mut self, r: u8, mem: Mem) {
        self.a.rm(self.c.mode.wide(), &[0x8b], r, mem);
    }

    /// Moves the guest's stack pointer.
    pub fn move_stack(&mut self, by: i32) {
        self.a.lea(self.c.mode.wide(), STACK, based(STACK, by));
    }

    /// Where a pushed word goes.
    pub fn push_place(&mut self) -> Mem {
        let word = self.c.mode.word();
        self.access(word as u32, true, Some(off(4, -word)), |b| {
            b.a.lea(b.c.mode.wide(), reg::T, based(STACK, -word));
        })
    }

    /// The word on top of the stack to RDI.
    pub fn pop_to_t(&mut self) {
        let from = self.access(self.c.mode.word() as u32, false, Some(off(4, 0)), |b| b.copy_pointer(STACK));
        self.load_word(reg::T, from);
    }

    /// The word that is the first operand, in a register or in memory, to RDI.
    pub fn load_operand(&mut self, i: &Instruction) {
        if i.op0_kind() == OpKind::Register {
            let r = self.seated(number(i.op0_register()), reg::T);
            // Code of 32 bits may find the upper halves of registers as code of 64 bits left them.
            if !self.c.mode.wide() {
                self.a.mov32(reg::T, r);
            } else if r != reg::T {
                self.a.mov(reg::T, r);
            }
            return;
        }
        let word = self.c.mode.word() as u32;
        let from = self.access(word, false, plan::place(i, self.c.mode), |b| b.address(i, true));
        self.load_word(reg::T, from);
    }
}

/// The instruction with its operands where they are.
/// Whether the instruction, which has no operand in memory, is the same for the host: all its registers are in themselves. VEX
/// means other sizes in 32-bit code, and what iced takes for PAUSE is XCHG with R8 to processors, if it has REX.B.
fn is_the_hosts(i: &Instruction) -> bool {
    let in_itself = |r: Register| seat(number(r)) == Seat::Host(number(r));
    allowed::class(i) == Some(Class::Integer)
        && i.code().encoding() == EncodingKind::Legacy
        && i.mnemonic() != Mnemonic::Pause
        && (0..i.op_count()).all(|n| {
            i.op_kind(n) != OpKind::Register || i.op_register(n).is_gpr() && in_itself(i.op_register(n))
        })
}

fn reseat(i: &Instruction, temporaries: &[Temporary], operand: Option<Mem>) -> Instruction {
    let mut out = *i;
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Memory => {
                let mem = operand.unwrap_or(based(reg::T, 0));
                let name = |r: Option<u8>| r.map_or(Register::None, |r| register(r, 8));
                out.set_memory_base(name(mem.base));
                out.set_memory_index(name(mem.index.map(|x| x.0)));
                out.set_memory_index_scale(1);
                out.set_memory_displacement64(i64::from(mem.disp) as u64);
                out.set_memory_displ_size(u32::from(mem.disp != 0));
                out.set_segment_prefix(Register::None);
            }
            OpKind::Register if i.op_register(n).is_gpr() && !is_high(i.op_register(n)) => {
                let r = i.op_register(n);
                let guest = number(r);
                let host = match temporaries.iter().find(|t| t.guest == guest) {
                    Some(t) => t.host,
                    None => match seat(guest) {
                        Seat::Host(h) => h,
                        Seat::Frame(_) => guest,
                    },
                };
                out.set_op_register(n, register(host, r.size()));
            }
            _ => {}
        }
    }
    out
}

/// A place off one register.
fn off(base: u8, disp: i32) -> Place {
    Place { origin: Origin { base, index: None }, disp }
}

/// The instruction with the register `guest`, which it only reads and which is in the frame at `slot`, as an operand in
/// memory; if it has such a form.
fn folded(i: &Instruction, guest: u8, slot: i32) -> Option<Instruction> {
    let is = |n: u32| {
        i.op_kind(n) == OpKind::Register && i.op_register(n).is_gpr() && number(i.op_register(n)) == guest
    };
    let mut places = (0..i.op_count()).filter(|&n| is(n));
    let (n, None) = (places.next()?, places.next()) else { return None };
    let code = match n {
        1 => reading_second(i)?,
        0 => reading_first(i)?,
        _ => return None,
    };
    let mut out = *i;
    out.set_code(code);
    if n == 1 && i.mnemonic() == Mnemonic::Test {
        // TEST has one form, in which it is the first operand that may be in memory.
        out.set_op1_register(i.op0_register());
        out.set_op0_kind(OpKind::Memory);
    } else {
        out.set_op_kind(n, OpKind::Memory);
    }
    out.set_memory_base(Register::RSP);
    out.set_memory_index(Register::None);
    out.set_memory_index_scale(1);
    out.set_memory_displacement64(slot as u64);
    out.set_memory_displ_size(1);
    Some(out)
}

fn reading_second(i: &Instruction) -> Option<Code> {
    use Mnemonic as M;
    let size = i.op1_register().size();
    if i.op0_kind() != OpKind::Register {
        return None;
    }
    let pick = |four: Code, eight: Code| match size {
        4 => Some(four),
        8 => Some(eight),
        _ => None,
    };
    match i.mnemonic() {
        M::Mov => pick(Code::Mov_r32_rm32, Code::Mov_r64_rm64),
        M::Add => pick(Code::Add_r32_rm32, Code::Add_r64_rm64),
        M::Or => pick(Code::Or_r32_rm32, Code::Or_r64_rm64),
        M::Adc => pick(Code::Adc_r32_rm32, Code::Adc_r64_rm64),
        M::Sbb => pick(Code::Sbb_r32_rm32, Code::Sbb_r64_rm64),
        M::And => pick(Code::And_r32_rm32, Code::And_r64_rm64),
        M::Sub => pick(Code::Sub_r32_rm32, Code::Sub_r64_rm64),
        M::Xor => pick(Code::Xor_r32_rm32, Code::Xor_r64_rm64),
        M::Cmp => pick(Code::Cmp_r32_rm32, Code::Cmp_r64_rm64),
        M::Test => pick(Code::Test_rm32_r32, Code::Test_rm64_r64),
        M::Imul | M::Movzx | M::Movsx | M::Movsxd | M::Popcnt | M::Tzcnt | M::Lzcnt => Some(i.code()),
        // CMOVcc.
        _ if decode::condition(i).is_some() => Some(i.code()),
        _ => None,
    }
}

fn reading_first(i: &Instruction) -> Option<Code> {
    let register = i.op_count() == 2 && i.op1_kind() == OpKind::Register;
    match (i.mnemonic(), i.op0_register().size()) {
        (Mnemonic::Cmp, 4) if register => Some(Code::Cmp_rm32_r32),
        (Mnemonic::Cmp, 8) if register => Some(Code::Cmp_rm64_r64),
        (Mnemonic::Test, 4) if register => Some(Code::Test_rm32_r32),
        (Mnemonic::Test, 8) if register => Some(Code::Test_rm64_r64),
        (Mnemonic::Cmp | Mnemonic::Test, 4 | 8) => Some(i.code()),
        _ => None,
    }
}
