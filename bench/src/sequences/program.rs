//! Programs in the making: instructions whose addresses are not known yet.

use iced_x86::{Code, Encoder, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register};

use super::case::Case;
use super::layout::{ALIAS_AT, CODE_AT};

/// What of an instruction depends on where another one lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fix {
    /// Nothing.
    None,
    /// The target of a branch: an item, and a distance into it.
    Branch(usize, u8),
    /// The operand in memory: likewise; at the code's other address if `true`.
    Memory(usize, u8, bool),
    /// The immediate.
    Immediate(usize, u8),
}

#[derive(Clone, Debug)]
enum What {
    One(Instruction),
    Raw(Vec<u8>),
}

/// One instruction, or bytes.
#[derive(Clone, Debug)]
struct Item {
    what: What,
    fix: Fix,
}

/// A program.
pub struct Program {
    bits: u32,
    offset: u64,
    items: Vec<Item>,
    /// Registers whose values are known here, if execution came straight.
    pub known: [Option<u64>; 16],
    info: InstructionInfoFactory,
    encoder: Encoder,
}

impl Program {
    /// An empty one.
    pub fn new(case: &Case) -> Self {
        Self {
            bits: case.mode.bits(),
            offset: case.offset(),
            items: Vec::new(),
            known: [None; 16],
            info: InstructionInfoFactory::new(),
            encoder: Encoder::new(case.mode.bits()),
        }
    }

    /// Number of the next item.
    pub fn next(&self) -> usize {
        self.items.len()
    }

    /// Registers that an instruction writes, as a mask.
    pub fn writes(&mut self, i: &Instruction) -> u16 {
        let mut mask = 0;
        for used in self.info.info(i).used_registers() {
            let r = used.register();
            if r.is_gpr() && !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None) {
                mask |= 1 << (r.full_register().number() & 15);
            }
        }
        mask
    }

    /// Appends an instruction; `false` if it has no encoding.
    pub fn push(&mut self, i: Instruction, fix: Fix) -> bool {
        let ok = self.encoder.encode(&i, self.offset + CODE_AT + 0x800).is_ok();
        let _ = self.encoder.take_buffer();
        if !ok {
            return false;
        }
        let written = self.writes(&i);
        for (n, known) in self.known.iter_mut().enumerate() {
            if written >> n & 1 != 0 {
                *known = None;
            }
        }
        self.items.push(Item { what: What::One(i), fix });
        true
    }

    /// Appends bytes, which are one instruction that says nothing about known registers.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.items.push(Item { what: What::Raw(bytes.to_vec()), fix: Fix::None });
    }

    /// MOV of a constant to a register, of which it is known then.
    pub fn set(&mut self, register: usize, value: u64) {
        let long = self.bits == 64;
        let value = if long { value } else { value & 0xffff_ffff };
        let i = if long && i32::try_from(value as i64).is_err() {
            Instruction::with2(Code::Mov_r64_imm64, Register::RAX + register as u32, value)
        } else if long {
            Instruction::with2(Code::Mov_rm64_imm32, Register::RAX + register as u32, value as i64)
        } else {
            Instruction::with2(Code::Mov_r32_imm32, Register::EAX + register as u32, value as u32)
        };
        if let Ok(i) = i {
            self.push(i, Fix::None);
            self.known[register] = Some(value);
        }
    }

    /// MOV of an item's address to a register.
    pub fn set_to_item(&mut self, register: usize, item: usize, into: u8) {
        let i = if self.bits == 64 {
            Instruction::with2(Code::Mov_r64_imm64, Register::RAX + register as u32, 0u64)
        } else {
            Instruction::with2(Code::Mov_r32_imm32, Register::EAX + register as u32, 0u32)
        };
        if let Ok(i) = i {
            self.push(i, Fix::Immediate(item, into));
        }
    }

    /// PUSH of an item's address.
    pub fn push_item(&mut self, item: usize, into: u8) {
        let code = if self.bits == 64 { Code::Pushq_imm32 } else { Code::Pushd_imm32 };
        if let Ok(i) = Instruction::with1(code, 0i32) {
            self.push(i, Fix::Immediate(item, into));
        }
    }

    /// Bytes of all items, if they start at `start` in the code pages: and their lengths. Where an item's address does not
    /// fit, NOPs.
    pub fn assemble(&mut self, start: u16) -> (Vec<u8>, Vec<u8>) {
        let base = self.offset + CODE_AT + u64::from(start);
        let mut addresses = Vec::with_capacity(self.items.len() + 1);
        let mut at = base;
        for n in 0..self.items.len() {
            addresses.push(at);
            at += self.length(n, at) as u64;
        }
        addresses.push(at);
        let (mut code, mut lengths) = (Vec::new(), Vec::new());
        for (n, item) in self.items.iter().enumerate() {
            let len = (addresses[n + 1] - addresses[n]) as usize;
            let address =
                |item: usize, into: u8| addresses[item.min(addresses.len() - 1)].wrapping_add(into.into());
            let bytes = match &item.what {
                What::Raw(bytes) => bytes.clone(),
                What::One(i) => {
                    let mut i = *i;
                    fix(&mut i, item.fix, address, self.bits);
                    let ok = self.encoder.encode(&i, addresses[n]).is_ok();
                    let bytes = self.encoder.take_buffer();
                    if ok && bytes.len() == len { bytes } else { vec![0x90; len] }
                }
            };
            lengths.push(bytes.len() as u8);
            code.extend(bytes);
        }
        (code, lengths)
    }

    fn length(&mut self, n: usize, at: u64) -> usize {
        match &self.items[n].what {
            What::Raw(bytes) => bytes.len(),
            What::One(i) => {
                let mut i = *i;
                fix(&mut i, self.items[n].fix, |_, _| at, self.bits);
                let len = self.encoder.encode(&i, at).unwrap_or(0);
                let _ = self.encoder.take_buffer();
                len
            }
        }
    }
}

fn fix(i: &mut Instruction, fix: Fix, address: impl Fn(usize, u8) -> u64, bits: u32) {
    match fix {
        Fix::None => {}
        Fix::Branch(item, into) if bits == 64 => i.set_near_branch64(address(item, into)),
        Fix::Branch(item, into) => i.set_near_branch32(address(item, into) as u32),
        Fix::Memory(item, into, alias) => {
            let more = if alias { ALIAS_AT - CODE_AT } else { 0 };
            i.set_memory_displacement64(address(item, into).wrapping_add(more));
        }
        Fix::Immediate(item, into) => {
            let value = address(item, into);
            let n = i.op_count() - 1;
            match i.op_kind(n) {
                OpKind::Immediate64 => i.set_immediate64(value),
                OpKind::Immediate32to64 => i.set_immediate32to64(value as i64),
                _ => i.set_immediate32(value as u32),
            }
        }
    }
}
