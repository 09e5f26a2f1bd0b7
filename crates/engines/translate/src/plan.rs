//! Which accesses of a block share one lookup.
//!
//! Accesses at constant distances from one register lie mostly in one page: fields of a structure, a frame on the stack.
//! They form a group. The first of them looks the page up and makes sure that the whole group lies in it; the others go
//! straight to memory. A group ends when its register changes by other than a constant, and when the reference engine may
//! have changed the linear page table.

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use crate::allowed::is_bit_string;
use crate::block::Mode;
use crate::decode::is_skipped;
use crate::frame::at;
use crate::seats::number;

/// Bytes from a group's first to its last at most: groups that cross a page cost much.
const SPAN: i64 = 256;

/// Accesses off one register.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// First byte, from where the register pointed when the group began.
    min: i64,
    max: i64,
    /// What the register had been moved by when the group was last looked at.
    members: u32,
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
    /// The group's first byte, from where the register points now.
    pub start: i32,
}

/// The groups of a block.
#[derive(Default)]
pub struct Plan {
    /// All groups, those with one member too.
    pub groups: Vec<Group>,
    /// For each instruction its accesses in order, at most two.
    members: Vec<[Option<(usize, i64)>; 2]>,
    firsts: Vec<(usize, usize)>,
}

#[derive(Clone, Copy)]
struct Base {
    register: u8,
    disp: i64,
    size: i64,
}

impl Plan {
    /// Frame offset in which a group's addend is kept.
    pub fn slot(group: usize) -> i32 {
        at::GROUPS - 8 * group as i32
    }

    /// Groups that have a slot.
    const SLOTS: usize = 14;

    /// Plans a block. `helper` tells which instructions the reference engine executes.
    pub fn new(
        instructions: &[Instruction],
        mode: Mode,
        info: &mut InstructionInfoFactory,
        helper: impl Fn(&Instruction) -> bool,
    ) -> Self {
        let mut plan = Self::default();
        // For each register its group, and what it has been moved by since that began.
        let mut open: [Option<(usize, i64)>; 16] = [None; 16];
        for (n, i) in instructions.iter().enumerate() {
            let mut members = [None; 2];
            // The override of SMAP chooses another table.
            if helper(i) || matches!(i.mnemonic(), Mnemonic::Stac | Mnemonic::Clac) {
                open = [None; 16];
                plan.members.push(members);
                continue;
            }
            if is_skipped(i) {
                plan.members.push(members);
                continue;
            }
            let word = i64::from(mode.word());
            for (k, base) in accesses(i, mode, word).into_iter().enumerate() {
                let Some(base) = base else { continue };
                members[k] = plan.join(&mut open[usize::from(base.register)], base, (n, k));
            }
            plan.members.push(members);
            update(i, mode, word, info, &mut open);
        }
        plan
    }

    fn join(
        &mut self,
        open: &mut Option<(usize, i64)>,
        base: Base,
        here: (usize, usize),
    ) -> Option<(usize, i64)> {
        if let Some((g, moved)) = *open {
            let from = moved + base.disp;
            let group = &mut self.groups[g];
            let (min, max) = (group.min.min(from), group.max.max(from + base.size));
            if max - min <= SPAN {
                (group.min, group.max) = (min, max);
                group.members += 1;
                return Some((g, moved));
            }
        }
        if self.groups.len() >= Self::SLOTS {
            *open = None;
            return None;
        }
        let (min, max) = (base.disp, base.disp + base.size);
        self.groups.push(Group { min, max, members: 1 });
        self.firsts.push(here);
        *open = Some((self.groups.len() - 1, 0));
        Some((self.groups.len() - 1, 0))
    }

    /// What the plan says of access `k` of instruction `n`.
    pub fn member(&self, n: usize, k: usize) -> Option<Member> {
        let (group, moved) = (*self.members.get(n)?.get(k)?)?;
        let g = &self.groups[group];
        if g.members < 2 {
            return None;
        }
        let start = i32::try_from(g.min - moved).ok()?;
        Some(Member { group, first: self.firsts[group] == (n, k), start })
    }
}

fn off(register: u8, disp: i64, size: i64) -> Option<Base> {
    Some(Base { register, disp, size })
}

/// The accesses of an instruction that are at a constant distance from a register, in the order in which they are made.
fn accesses(i: &Instruction, mode: Mode, word: i64) -> [Option<Base>; 2] {
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

fn operand(i: &Instruction, mode: Mode) -> Option<Base> {
    (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory)?;
    let base = i.memory_base();
    let right = if mode.wide() { base.is_gpr64() } else { base.is_gpr32() };
    let plain =
        i.memory_index() == Register::None && !matches!(i.memory_segment(), Register::FS | Register::GS);
    let size = i.memory_size().size() as i64;
    let disp = i64::from(i.memory_displacement64() as i32);
    (right && plain && (1..=64).contains(&size)).then(|| Base { register: number(base), disp, size })
}

/// What an instruction does to the registers of open groups.
fn update(
    i: &Instruction,
    mode: Mode,
    word: i64,
    info: &mut InstructionInfoFactory,
    open: &mut [Option<(usize, i64)>; 16],
) {
    if let Some((register, by)) = constant(i, mode, word) {
        open[usize::from(register)] =
            open[usize::from(register)].map(|(g, moved)| (g, moved + by)).filter(|(_, m)| m.abs() < 1 << 20);
        if i.mnemonic() != Mnemonic::Pop {
            return;
        }
        // What is popped into changes too.
        let popped = usize::from(number(i.op0_register()));
        open[popped] = None;
        return;
    }
    for used in info.info(i).used_registers() {
        let writes = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None);
        if writes && used.register().is_gpr() {
            open[usize::from(number(used.register()))] = None;
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
