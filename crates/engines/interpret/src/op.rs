//! Decoded instructions, in the compact form that handlers execute.

use iced_x86::Instruction;

use crate::core::Core;

/// The exception is in [`Core::exception`]. Zero-sized, so that results travel in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// How a handler went.
pub type Result<T> = std::result::Result<T, Fault>;

/// Where execution goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Flow {
    /// At the next instruction.
    Next,
    /// At [`Core::rip`], which the handler set.
    Jump,
    /// At the next instruction, which must be looked up anew: the mode, the mapping or the code itself may have changed.
    End,
    /// At this instruction again: it did part of its work (string instructions), or waits.
    Again,
}

/// Executes one instruction.
pub type Handler = fn(&mut Core, &Op) -> Result<Flow>;

/// Numbers in [`Core::r`] beyond the general-purpose registers.
pub mod slot {
    /// Always zero: no base, no index, no segment base.
    pub const ZERO: u8 = 16;
    /// RIP of the block's first instruction.
    pub const START: u8 = 17;
    /// FS base.
    pub const FS: u8 = 18;
    /// GS base.
    pub const GS: u8 = 19;
}

/// A register number with this bit is AH, CH, DH or BH (of 0 to 3).
pub const HIGH: u8 = 0x20;

/// One decoded instruction.
pub struct Op {
    /// What executes it.
    pub run: Handler,
    /// Immediate operand, sign-extended to the operand's size, or the distance to a branch's target.
    pub imm: u64,
    /// Displacement; for RIP-relative operands from the block's start.
    pub disp: u64,
    /// The whole instruction, for handlers that are not specialised.
    pub instruction: Option<Box<Instruction>>,
    /// Bytes from the block's start to the next instruction.
    pub end: u16,
    /// Length in bytes.
    pub len: u8,
    /// First operand's register.
    pub dst: u8,
    /// Second operand's register.
    pub src: u8,
    /// Third operand's register.
    pub third: u8,
    /// Memory operand: base register or slot.
    pub base: u8,
    /// Index register or slot.
    pub index: u8,
    /// Shift of the index.
    pub scale: u8,
    /// Slot of the segment's base in 64-bit mode.
    pub seg_slot: u8,
    /// Segment register number of the memory operand.
    pub segment: u8,
    /// The address is plain: 64-bit mode with a 64-bit address.
    pub flat: bool,
    /// Bytes of the address size: 2, 4 or 8.
    pub address_size: u8,
    /// Operand size in bytes.
    pub size: u8,
    /// LOCK prefix.
    pub lock: bool,
    /// An operand is in memory.
    pub memory: bool,
}
