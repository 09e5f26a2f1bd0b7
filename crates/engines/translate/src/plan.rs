//! Which accesses of a block share one lookup.
//!
//! Accesses at constant distances from one register, or from the same two, lie mostly in one page: fields of a structure, a frame on the stack.
//! They form a group. The first of them looks the page up and makes sure that the whole group lies in it; the others go
//! straight to memory. A group ends when its register changes by other than a constant, and when the reference engine may
//! have changed the linear page table.

use iced_x86::{
    Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register,
};

use crate::allowed::is_bit_string;
use crate::block::Mode;
use crate::decode::is_skipped;
use crate::frame::at;
use crate::seats::{Seat, number, seat};

/// Of an instruction nothing is asked but which registers it uses.
const REGISTERS: u32 = InstructionInfoOptions::NO_MEMORY_USAGE;
/// Bytes from a group's first to its last at most: groups that cross a page cost much.
const SPAN: i64 = 256;

/// What the addresses of a group have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Guest register.
    pub base: u8,
    /// Guest register, and by how much it is shifted.
    pub index: Option<(u8, u8)>,
}

/// A place at a constant distance from an origin.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Where it starts from.
    pub origin: Origin,
    /// How far.
    pub disp: i32,
}

/// Accesses off one origin.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// First byte, from where the origin was when the group began.
    min: i64,
    max: i64,
    /// The access that looks the page up: instruction and access.
    first: (usize, usize),
    members: u32,
    /// Where its addend is kept, if it is a group at all.
    slot: Option<i32>,
}

impl Group {
    /// Bytes from the first to the last.
    pub fn span(&self) -> u32 {
        (self.max - self.min) as u32
    }
}

/// An access that belongs to a group.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// Its group.
    pub group: usize,
    /// It is the one that looks the page up.
    pub first: bool,
    /// The group's first byte, from where the origin is now.
    pub start: i32,
    /// Frame offset of the group's addend.
    pub slot: i32,
}

/// A group that may still grow.
struct Open {
    origin: Origin,
    group: usize,
    /// What the base has been moved by since the group began.
    moved: i64,
}

/// The groups of a block.
#[derive(Default)]
pub struct Plan {
    /// All groups, those with one member too.
    pub groups: Vec<Group>,
    /// For each instruction its accesses in order, at most two: group, and what its base had been moved by.
    members: Vec<[Option<(usize, i64)>; 2]>,
    /// Groups that may still grow, while a plan is made.
    open: Vec<Open>,
}

#[derive(Clone, Copy)]
struct Access {
    origin: Origin,
    disp: i64,
    size: i64,
}

/// Groups that have room for their addend.
const SLOTS: i32 = 14;

impl Plan {
    /// Plans a block. `helpers` tells which instructions the reference engine executes.
    pub fn make(
        &mut self,
        instructions: &[Instruction],
        helpers: &[bool],
        mode: Mode,
        info: &mut InstructionInfoFactory,
    ) {
        self.groups.clear();
        self.members.clear();
        let mut open = std::mem::take(&mut self.open);
        let word = i64::from(mode.word());
        for (n, (i, &helper)) in instructions.iter().zip(helpers).enumerate() {
            let mut members = [None; 2];
            // The override of SMAP chooses another table.
            if helper || matches!(i.mnemonic(), Mnemonic::Stac | Mnemonic::Clac) {
                open.clear();
            } else if !is_skipped(i) {
                for (k, access) in accesses(i, mode, word).into_iter().enumerate() {
                    members[k] = access.map(|access| self.join(&mut open, access, (n, k)));
                }
                update(i, mode, word, info, &mut open);
            }
            self.members.push(members);
        }
        open.clear();
        self.open = open;
        let groups = self.groups.iter_mut().filter(|g| g.members > 1);
        for (group, n) in groups.zip(0..SLOTS) {
            group.slot = Some(at::GROUPS - 8 * n);
        }
    }

    fn join(&mut self, open: &mut Vec<Open>, access: Access, here: (usize, usize)) -> (usize, i64) {
        if let Some(n) = open.iter().position(|o| o.origin == access.origin) {
            let o = &open[n];
            let from = o.moved + access.disp;
            let group = &mut self.groups[o.group];
            let (min, max) = (group.min.min(from), group.max.max(from + access.size));
            if max - min <= SPAN {
                (group.min, group.max) = (min, max);
                group.members += 1;
                return (o.group, o.moved);
            }
            open.swap_remove(n);
        }
        let (min, max) = (access.disp, access.disp + access.size);
        let group = self.groups.len();
        self.groups.push(Group { min, max, first: here, members: 1, slot: None });
        open.push(Open { origin: access.origin, group, moved: 0 });
        (group, 0)
    }

    /// What the plan says of access `k` of instruction `n`.
    pub fn member(&self, n: usize, k: usize) -> Option<Member> {
        let (group, moved) = (*self.members.get(n)?.get(k)?)?;
        let g = &self.groups[group];
        let start = i32::try_from(g.min - moved).ok()?;
        Some(Member { group, first: g.first == (n, k), start, slot: g.slot? })
    }
}

fn off(base: u8, disp: i64, size: i64) -> Option<Access> {
    Some(Access { origin: Origin { base, index: None }, disp, size })
}

/// The accesses of an instruction that are at a constant distance from an origin, in the order in which they are made.
fn accesses(i: &Instruction, mode: Mode, word: i64) -> [Option<Access>; 2] {
    const RSP: u8 = 4;
    const RBP: u8 = 5;
    match i.mnemonic() {
        Mnemonic::Push if i.op0_kind() == OpKind::Memory => [operand(i, mode), off(RSP, -word, word)],
        Mnemonic::Call if i.op0_kind() == OpKind::Memory => [operand(i, mode), off(RSP, -word, word)],
        Mnemonic::Push | Mnemonic::Pushfq | Mnemonic::Pushfd | Mnemonic::Call => {
            [off(RSP, -word, word), None]
        }
        Mnemonic::Pop | Mnemonic::Ret => [off(RSP, 0, word), None],
        Mnemonic::Leave => [off(RBP, 0, word), None],
        Mnemonic::Lea => [None; 2],
        _ if is_bit_string(i) => [None; 2],
        _ => [operand(i, mode), None],
    }
}

fn operand(i: &Instruction, mode: Mode) -> Option<Access> {
    (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory)?;
    let place = place(i, mode)?;
    let plain = !matches!(i.memory_segment(), Register::FS | Register::GS);
    let size = i.memory_size().size() as i64;
    (plain && (1..=64).contains(&size)).then(|| Access {
        origin: place.origin,
        disp: place.disp.into(),
        size,
    })
}

/// Where the operand in memory is, if that is at a constant distance from registers that can be an origin.
pub fn place(i: &Instruction, mode: Mode) -> Option<Place> {
    let right = |r: Register| if mode.wide() { r.is_gpr64() } else { r.is_gpr32() };
    let (base, index) = (i.memory_base(), i.memory_index());
    let stolen = |r: Register| matches!(seat(number(r)), Seat::Frame(_));
    // One register beside the addend's is free, so one of them may have no seat.
    let index = match index {
        Register::None => None,
        r if right(r) && !(stolen(r) && stolen(base)) => {
            Some((number(r), i.memory_index_scale().trailing_zeros() as u8))
        }
        _ => return None,
    };
    let disp = i.memory_displacement64() as i32;
    right(base).then(|| Place { origin: Origin { base: number(base), index }, disp })
}

/// What an instruction does to the registers of open groups.
fn update(i: &Instruction, mode: Mode, word: i64, info: &mut InstructionInfoFactory, open: &mut Vec<Open>) {
    let uses = |o: &Open, r: u8| o.origin.index.is_some_and(|(x, _)| x == r);
    if let Some((register, by)) = constant(i, mode, word) {
        open.retain_mut(|o| {
            o.moved += if o.origin.base == register { by } else { 0 };
            !uses(o, register) && o.moved.abs() < 1 << 20
        });
        if i.mnemonic() == Mnemonic::Pop {
            // What is popped into changes too.
            let popped = number(i.op0_register());
            open.retain(|o| o.origin.base != popped && !uses(o, popped));
        }
        return;
    }
    for used in info.info_options(i, REGISTERS).used_registers() {
        let writes = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None);
        if writes && used.register().is_gpr() {
            let written = number(used.register());
            open.retain(|o| o.origin.base != written && !uses(o, written));
        }
    }
}

/// The register that an instruction moves by a constant, if it is such a one.
fn constant(i: &Instruction, mode: Mode, word: i64) -> Option<(u8, i64)> {
    let to = i.op0_register();
    let whole =
        || i.op0_kind() == OpKind::Register && if mode.wide() { to.is_gpr64() } else { to.is_gpr32() };
    match i.mnemonic() {
        Mnemonic::Push | Mnemonic::Pushfq | Mnemonic::Pushfd | Mnemonic::Call => Some((4, -word)),
        Mnemonic::Pop => Some((4, word)),
        Mnemonic::Add | Mnemonic::Sub if whole() => {
            let value = match i.op1_kind() {
                OpKind::Immediate8to64
                | OpKind::Immediate32to64
                | OpKind::Immediate8to32
                | OpKind::Immediate32 => i64::from(i.immediate(1) as i32),
                _ => return None,
            };
            Some((number(to), if i.mnemonic() == Mnemonic::Add { value } else { -value }))
        }
        Mnemonic::Lea if whole() => {
            let same = i.memory_base() == to && i.memory_index() == Register::None;
            same.then(|| (number(to), i64::from(i.memory_displacement64() as i32)))
        }
        _ => None,
    }
}
