//! Random instructions of a given form, and random states that are interesting to floating point.

use iced_x86::{Code, Encoder, Instruction, MemoryOperand, OpCodeOperandKind as Kind, OpKind, Register};
use native::SimdState;
use native::oracle::{CpuImage, DATA};

/// xorshift64*: small, and the same everywhere.
pub struct Random(u64);

impl Random {
    /// From the environment variable LODGE_SEED, or fixed; the seed is printed for the case of failure.
    pub fn new() -> Self {
        let seed = std::env::var("LODGE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_121);
        println!("LODGE_SEED={seed}");
        Random(seed | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, bound: u32) -> u32 {
        (self.next() >> 32) as u32 % bound
    }

    fn chance(&mut self, one_in: u32) -> bool {
        self.below(one_in) == 0
    }
}

/// Where the tests' memory operand is: `[rbx + DISPLACEMENT]`, RBX pointing so that it hits [`OPERAND`].
pub const OPERAND: u64 = DATA + 0x1000 - 64;
const DISPLACEMENT: i64 = 0x40;

/// A random instruction of form `code` in 64-bit mode, and its bytes.
pub fn instruction(code: Code, random: &mut Random) -> Option<(Instruction, Vec<u8>)> {
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    let kinds = code.op_code().op_kinds();
    let wants_memory = random.chance(2);
    for (i, &kind) in kinds.iter().enumerate() {
        let i = i as u32;
        let mut register = |instruction: &mut Instruction, first: Register, count: u32| {
            instruction.set_op_kind(i, OpKind::Register);
            instruction.set_op_register(i, first + random.below(count));
        };
        let or_memory = |instruction: &mut Instruction| {
            let operand = MemoryOperand::with_base_displ(Register::RBX, DISPLACEMENT);
            instruction.set_op_kind(i, OpKind::Memory);
            instruction.set_memory_base(operand.base);
            instruction.set_memory_displacement64(DISPLACEMENT as u64);
            instruction.set_memory_displ_size(1);
        };
        match kind {
            Kind::mem => or_memory(&mut instruction),
            Kind::xmm_or_mem | Kind::ymm_or_mem | Kind::mm_or_mem if wants_memory => {
                or_memory(&mut instruction)
            }
            Kind::r8_or_mem | Kind::r16_or_mem | Kind::r32_or_mem | Kind::r64_or_mem if wants_memory => {
                or_memory(&mut instruction)
            }
            Kind::xmm_or_mem | Kind::xmm_reg | Kind::xmm_rm | Kind::xmm_vvvv | Kind::xmm_is4 => {
                register(&mut instruction, Register::XMM0, 16)
            }
            Kind::ymm_or_mem | Kind::ymm_reg | Kind::ymm_rm | Kind::ymm_vvvv | Kind::ymm_is4 => {
                register(&mut instruction, Register::YMM0, 16)
            }
            Kind::mm_or_mem | Kind::mm_reg | Kind::mm_rm => register(&mut instruction, Register::MM0, 8),
            Kind::r8_or_mem | Kind::r8_reg => register(&mut instruction, Register::AL, 8),
            Kind::r16_or_mem | Kind::r16_reg | Kind::r16_rm => register(&mut instruction, Register::AX, 16),
            Kind::r32_or_mem | Kind::r32_reg | Kind::r32_rm | Kind::r32_vvvv => {
                register(&mut instruction, Register::EAX, 16)
            }
            Kind::r64_or_mem | Kind::r64_reg | Kind::r64_rm | Kind::r64_vvvv => {
                register(&mut instruction, Register::RAX, 16)
            }
            Kind::st0 => register(&mut instruction, Register::ST0, 1),
            Kind::sti_opcode => register(&mut instruction, Register::ST0, 8),
            Kind::imm8 => {
                let second = kinds[..i as usize].contains(&Kind::imm8);
                let value = random.next() as u8;
                if second {
                    instruction.set_op_kind(i, OpKind::Immediate8_2nd);
                    instruction.set_immediate8_2nd(value);
                } else {
                    instruction.set_op_kind(i, OpKind::Immediate8);
                    instruction.set_immediate8(value);
                }
            }
            _ => return None,
        }
    }
    let mut encoder = Encoder::new(64);
    encoder.encode(&instruction, 0).ok()?;
    Some((instruction, encoder.take_buffer()))
}

/// A random state; RBX such that the memory operand is at [`OPERAND`].
pub fn image(random: &mut Random) -> CpuImage {
    let mut image = CpuImage { simd: simd(random), ..CpuImage::default() };
    for gpr in &mut image.gpr {
        *gpr = integer(random);
    }
    image.gpr[3] = OPERAND - DISPLACEMENT as u64;
    image.rflags = random.next() & 0x8d5 | 0x202;
    image
}

fn simd(random: &mut Random) -> SimdState {
    let mut state = SimdState::default();
    let flavour = random.below(4);
    for half in state.ymm.iter_mut().flatten() {
        *half = vector(flavour, random);
    }
    for register in &mut state.fpr {
        *register = extended(random);
    }
    state.mxcsr = match random.below(4) {
        0 => 0x1f80,
        1 => 0x1f80 | random.next() as u32 & 0xe07f,
        _ => random.next() as u32 & 0xffff,
    };
    state.fcw = match random.below(3) {
        0 => 0x37f,
        1 => 0x07f | random.next() as u16 & 0xf00,
        _ => 0x040 | random.next() as u16 & 0xf3f,
    };
    let pending = if random.chance(8) { 0x3f } else { state.fcw & 0x3f };
    state.fsw = random.next() as u16 & (0x7f40 | pending);
    if state.fsw & !state.fcw & 0x3f != 0 {
        state.fsw |= 0x8080;
    }
    state.ftw = if random.chance(2) { 0xff } else { random.next() as u8 };
    state
}

/// 16 bytes for flavour 0: integers, 1: floats, 2: doubles, 3: halves.
pub fn vector(flavour: u32, random: &mut Random) -> u128 {
    let mut bytes = [0; 16];
    match flavour {
        1 => bytes.chunks_mut(4).for_each(|part| part.copy_from_slice(&single(random).to_le_bytes())),
        2 => bytes.chunks_mut(8).for_each(|part| part.copy_from_slice(&double(random).to_le_bytes())),
        3 => bytes.chunks_mut(2).for_each(|part| part.copy_from_slice(&(random.next() as u16).to_le_bytes())),
        _ => bytes.chunks_mut(8).for_each(|part| part.copy_from_slice(&integer(random).to_le_bytes())),
    }
    u128::from_le_bytes(bytes)
}

fn integer(random: &mut Random) -> u64 {
    let value = random.next();
    match random.below(6) {
        0 => value & 0xff,
        1 => [0, 1, u64::MAX, 1 << 63, 0x8000_0000, 0x7fff_ffff_7fff_ffff][value as usize % 6],
        2 => value & random.next() & random.next(),
        _ => value,
    }
}

/// A floating-point number of 1 sign, `exponent_bits` and `fraction_bits`, often at an edge.
fn float(exponent_bits: u32, fraction_bits: u32, random: &mut Random) -> u64 {
    let bias = (1 << (exponent_bits - 1)) - 1;
    let top = (1 << exponent_bits) - 1;
    let exponent: u64 = match random.below(8) {
        0 => 0,
        1 => top,
        2 => 1 + u64::from(random.below(2)),
        3 => top - 1 - u64::from(random.below(2)),
        4 => bias + u64::from(random.below(70)),
        5 => u64::from(random.below(top as u32 + 1)),
        _ => bias - 4 + u64::from(random.below(8)),
    };
    let ones = (1 << fraction_bits) - 1;
    let fraction = match random.below(5) {
        0 => 0,
        1 => 1 << random.below(fraction_bits),
        2 => ones - u64::from(random.below(2)),
        _ => random.next() & ones,
    };
    (random.next() >> 63) << (exponent_bits + fraction_bits) | exponent << fraction_bits | fraction
}

fn single(random: &mut Random) -> u32 {
    float(8, 23, random) as u32
}

fn double(random: &mut Random) -> u64 {
    float(11, 52, random)
}

fn extended(random: &mut Random) -> u128 {
    let wide = float(11, 52, random);
    let exponent = match random.below(4) {
        0 => random.next() >> 49,
        1 => [0, 1, 0x7ffe, 0x7fff][random.below(4) as usize],
        _ => 0x3fff - 8 + u64::from(random.below(80)),
    };
    let integer_bit = u64::from(!random.chance(6) && exponent != 0) << 63;
    let significand = integer_bit | wide << 11 | if random.chance(2) { 0 } else { random.next() & 0x7ff };
    u128::from(wide >> 63) << 79
        | u128::from(exponent) << 64
        | u128::from(significand & !(1 << 63) | integer_bit)
}

/// What to put at the memory operand.
pub fn operand(random: &mut Random) -> [u8; 64] {
    let flavour = random.below(5);
    let mut bytes = [0; 64];
    for chunk in bytes.chunks_mut(16) {
        let value = if flavour == 4 { extended(random) } else { vector(flavour, random) };
        chunk.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}
