//! The few host instructions that rewritten code is padded with. Guest instructions are encoded by iced-x86.

/// Host registers by number.
pub mod reg {
    /// RAX.
    pub const RAX: u8 = 0;
    /// RSP: the frame.
    pub const RSP: u8 = 4;
    /// RSI: the addend of an access.
    pub const U: u8 = 6;
    /// RDI: the linear address of an access.
    pub const T: u8 = 7;
}

/// A memory operand.
#[derive(Clone, Copy, Debug)]
pub struct Mem {
    /// Base register.
    pub base: Option<u8>,
    /// Index register and shift.
    pub index: Option<(u8, u8)>,
    /// Displacement.
    pub disp: i32,
}

/// A field of the frame.
pub fn frame(disp: i32) -> Mem {
    Mem { base: Some(reg::RSP), index: None, disp }
}

/// `[base + disp]`.
pub fn based(base: u8, disp: i32) -> Mem {
    Mem { base: Some(base), index: None, disp }
}

/// `[base + index]`.
pub fn sum(base: u8, index: u8) -> Mem {
    Mem { base: Some(base), index: Some((index, 0)), disp: 0 }
}

/// A branch whose distance is filled in later: the offset of its four bytes.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Fixup(pub usize);

/// Code that will lie at a known address.
pub struct Asm {
    /// The code.
    pub code: Vec<u8>,
    /// Where it will be executed.
    pub base: u64,
}

impl Asm {
    /// Nothing yet.
    pub fn new(base: u64) -> Self {
        Self { code: Vec::new(), base }
    }

    /// Bytes so far.
    pub fn here(&self) -> usize {
        self.code.len()
    }

    /// Bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    fn imm32(&mut self, v: i32) {
        self.raw(&v.to_le_bytes());
    }

    /// An instruction with a register and a register operand.
    fn rr(&mut self, wide: bool, opcode: &[u8], reg: u8, rm: u8) {
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | rm >> 3;
        if rex != 0x40 {
            self.code.push(rex);
        }
        self.raw(opcode);
        self.code.push(0xc0 | (reg & 7) << 3 | rm & 7);
    }

    /// An instruction with a register and a memory operand.
    pub fn rm(&mut self, wide: bool, opcode: &[u8], reg: u8, mem: Mem) {
        let (b, x) = (mem.base.unwrap_or(0), mem.index.map_or(0, |(i, _)| i));
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | (x >> 3) << 1 | b >> 3;
        if rex != 0x40 {
            self.code.push(rex);
        }
        self.raw(opcode);
        self.modrm(reg, mem);
    }

    fn modrm(&mut self, reg: u8, mem: Mem) {
        let reg = (reg & 7) << 3;
        let Some(base) = mem.base else {
            // No base: SIB with a 32-bit displacement.
            let (index, scale) = mem.index.unwrap_or((4, 0));
            self.raw(&[reg | 4, scale << 6 | (index & 7) << 3 | 5]);
            return self.imm32(mem.disp);
        };
        let short = i8::try_from(mem.disp);
        let mode = match short {
            Ok(0) if base & 7 != 5 => 0,
            Ok(_) => 0x40,
            Err(_) => 0x80,
        };
        match mem.index {
            Some((index, scale)) => {
                self.raw(&[mode | reg | 4, scale << 6 | (index & 7) << 3 | base & 7]);
            }
            None if base & 7 == 4 => self.raw(&[mode | reg | 4, 0x24]),
            None => self.code.push(mode | reg | base & 7),
        }
        match (mode, short) {
            (0, _) => {}
            (0x40, Ok(d)) => self.code.push(d as u8),
            _ => self.imm32(mem.disp),
        }
    }

    /// MOV r64, [mem].
    pub fn load(&mut self, reg: u8, mem: Mem) {
        self.rm(true, &[0x8b], reg, mem);
    }

    /// MOV r32, [mem].
    pub fn load32(&mut self, reg: u8, mem: Mem) {
        self.rm(false, &[0x8b], reg, mem);
    }

    /// MOV [mem], r64.
    pub fn store(&mut self, mem: Mem, reg: u8) {
        self.rm(true, &[0x89], reg, mem);
    }

    /// MOV [mem], r32.
    pub fn store32(&mut self, mem: Mem, reg: u8) {
        self.rm(false, &[0x89], reg, mem);
    }

    /// MOV dword [mem], imm.
    pub fn store_imm32(&mut self, mem: Mem, value: u32) {
        self.rm(false, &[0xc7], 0, mem);
        self.imm32(value as i32);
    }

    /// MOV r64, r64.
    pub fn mov(&mut self, to: u8, from: u8) {
        self.rr(true, &[0x8b], to, from);
    }

    /// MOV r32, r32.
    pub fn mov32(&mut self, to: u8, from: u8) {
        self.rr(false, &[0x8b], to, from);
    }

    /// MOV r16, r16; the caller has put the operand-size prefix before it.
    pub fn rm16(&mut self, to: u8, from: u8) {
        self.rr(false, &[0x8b], to, from);
    }

    /// LEA, of 64 or 32 bits.
    pub fn lea(&mut self, wide: bool, reg: u8, mem: Mem) {
        self.rm(wide, &[0x8d], reg, mem);
    }

    /// BEXTR RSI, RDI, RSP.
    pub fn page_number(&mut self) {
        self.raw(&[0xc4, 0xe2, 0xd8, 0xf7, 0xf7]);
    }

    /// What BEXTR RSI, RDI, RSP does, for processors without BMI1.
    pub fn page_number_by_shifts(&mut self) {
        self.raw(&[0x48, 0x89, 0xfe, 0x48, 0xc1, 0xe6, 16, 0x48, 0xc1, 0xee, 28]);
    }

    /// MOV RSI, GS:[RSI * 8].
    pub fn entry(&mut self) {
        self.raw(&[0x65, 0x48, 0x8b, 0x34, 0xf5, 0, 0, 0, 0]);
    }

    /// TEST r64, r64.
    pub fn test(&mut self, reg: u8) {
        self.rr(true, &[0x85], reg, reg);
    }

    /// TEST of the low bits of a register.
    pub fn test_low(&mut self, reg: u8, mask: u8) {
        self.rr(false, &[0xf7], 0, reg);
        self.imm32(mask.into());
    }

    /// TEST r32, imm.
    pub fn test_imm(&mut self, reg: u8, mask: u32) {
        self.rr(false, &[0xf7], 0, reg);
        self.imm32(mask as i32);
    }

    /// XOR r32, r32.
    pub fn xor32(&mut self, to: u8, from: u8) {
        self.rr(false, &[0x33], to, from);
    }

    /// AND r32, imm.
    pub fn and_imm32(&mut self, reg: u8, value: u32) {
        self.rr(false, &[0x81], 4, reg);
        self.imm32(value as i32);
    }

    /// CMP r32, imm.
    pub fn cmp_imm32(&mut self, reg: u8, value: u32) {
        self.rr(false, &[0x81], 7, reg);
        self.imm32(value as i32);
    }

    /// CMP r64, imm.
    pub fn cmp64_imm32(&mut self, reg: u8, value: i32) {
        self.rr(true, &[0x81], 7, reg);
        self.imm32(value);
    }

    /// An instruction with a register and a memory operand of 1, 2, 4 or 8 bytes: `opcode` is that of the larger ones, of
    /// which the one for bytes is one less.
    fn sized(&mut self, size: u32, opcode: u8, reg: u8, mem: Mem) {
        match size {
            // RSI and RDI have low bytes only with a REX prefix.
            1 if reg < 8 && mem.base.is_none_or(|b| b < 8) && mem.index.is_none_or(|(x, _)| x < 8) => {
                self.raw(&[0x40, opcode - 1]);
                self.modrm(reg, mem);
            }
            1 => self.rm(false, &[opcode - 1], reg, mem),
            2 => {
                self.code.push(0x66);
                self.rm(false, &[opcode], reg, mem);
            }
            _ => self.rm(size == 8, &[opcode], reg, mem),
        }
    }

    /// MOV [mem], register, of 1, 2, 4 or 8 bytes.
    pub fn store_sized(&mut self, size: u32, mem: Mem, reg: u8) {
        self.sized(size, 0x89, reg, mem);
    }

    /// CMP register, [mem], of 1, 2, 4 or 8 bytes.
    pub fn cmp_sized(&mut self, size: u32, reg: u8, mem: Mem) {
        self.sized(size, 0x3b, reg, mem);
    }

    /// MOV register, [mem], of 1, 2, 4 or 8 bytes, with zeros above.
    pub fn load_sized(&mut self, size: u32, reg: u8, mem: Mem) {
        match size {
            1 => self.rm(false, &[0x0f, 0xb6], reg, mem),
            2 => self.rm(false, &[0x0f, 0xb7], reg, mem),
            _ => self.rm(size == 8, &[0x8b], reg, mem),
        }
    }

    /// A string instruction with REP, on elements of 1, 2, 4 or 8 bytes; `opcode` is that for bytes.
    pub fn rep(&mut self, opcode: u8, size: u32) {
        match size {
            1 => self.raw(&[0xf3, opcode]),
            2 => self.raw(&[0x66, 0xf3, opcode + 1]),
            4 => self.raw(&[0xf3, opcode + 1]),
            _ => self.raw(&[0xf3, 0x48, opcode + 1]),
        }
    }

    /// ADD r64, r64.
    pub fn add64(&mut self, to: u8, from: u8) {
        self.rr(true, &[0x03], to, from);
    }

    /// ADD r64, [mem].
    pub fn add(&mut self, reg: u8, mem: Mem) {
        self.rm(true, &[0x03], reg, mem);
    }

    /// ADD r32, r32.
    pub fn add32(&mut self, to: u8, from: u8) {
        self.rr(false, &[0x03], to, from);
    }

    /// AND dword [mem], imm.
    pub fn and_mem(&mut self, mem: Mem, value: u32) {
        self.rm(false, &[0x81], 4, mem);
        self.imm32(value as i32);
    }

    /// OR dword [mem], imm.
    pub fn or_mem(&mut self, mem: Mem, value: u32) {
        self.rm(false, &[0x81], 1, mem);
        self.imm32(value as i32);
    }

    /// CMP qword [mem], imm8.
    pub fn cmp_imm64(&mut self, mem: Mem, value: i8) {
        self.rm(true, &[0x83], 7, mem);
        self.code.push(value as u8);
    }

    /// CMP r64, [mem].
    pub fn cmp(&mut self, reg: u8, mem: Mem) {
        self.rm(true, &[0x3b], reg, mem);
    }

    /// CMP dword [mem], imm8.
    pub fn cmp_imm(&mut self, mem: Mem, value: i8) {
        self.rm(false, &[0x83], 7, mem);
        self.code.push(value as u8);
    }

    /// MOVZX r32, r16.
    pub fn zero_extend16(&mut self, to: u8, from: u8) {
        self.rr(false, &[0x0f, 0xb7], to, from);
    }

    /// MOVSXD r64, r32.
    pub fn sign_extend32(&mut self, to: u8, from: u8) {
        self.rr(true, &[0x63], to, from);
    }

    /// LAHF; SETO AL.
    pub fn flags_to_ax(&mut self) {
        self.raw(&[0x9f, 0x0f, 0x90, 0xc0]);
    }

    /// ADD AL, 127; SAHF.
    pub fn flags_from_ax(&mut self) {
        self.raw(&[0x04, 0x7f, 0x9e]);
    }

    /// JMP [mem].
    pub fn jump_mem(&mut self, mem: Mem) {
        self.rm(false, &[0xff], 4, mem);
    }

    /// JMP to an address.
    pub fn jump_to(&mut self, target: u64) {
        let fixup = self.jump();
        self.point(fixup, target);
    }

    /// JMP somewhere.
    pub fn jump(&mut self) -> Fixup {
        self.code.push(0xe9);
        self.imm32(0);
        Fixup(self.here() - 4)
    }

    /// Jcc somewhere: `cc` is the condition's number.
    pub fn jump_if(&mut self, cc: u8) -> Fixup {
        self.raw(&[0x0f, 0x80 | cc & 15]);
        self.imm32(0);
        Fixup(self.here() - 4)
    }

    /// Lets a branch lead to an address.
    pub fn point(&mut self, fixup: Fixup, target: u64) {
        let next = self.base.wrapping_add(fixup.0 as u64 + 4);
        let distance = target.wrapping_sub(next) as i32;
        self.code[fixup.0..fixup.0 + 4].copy_from_slice(&distance.to_le_bytes());
    }

    /// Lets a branch lead here.
    pub fn bind(&mut self, fixup: Fixup) {
        let here = self.address();
        self.point(fixup, here);
    }

    /// The address of what comes next.
    pub fn address(&self) -> u64 {
        self.base + self.here() as u64
    }
}

/// Condition numbers.
pub mod cc {
    /// Zero.
    pub const Z: u8 = 4;
    /// Not zero.
    pub const NZ: u8 = 5;
    /// Above.
    pub const A: u8 = 7;
}
