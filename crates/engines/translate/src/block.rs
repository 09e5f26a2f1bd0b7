//! Rewriting a block of guest code: the common part. What an instruction becomes is in `rewrite` and `control`.

use iced_x86::{Encoder, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind};
use x86::cpuid::Cpuid;

use crate::allowed::{self, Class};
use crate::asm::{Asm, Fixup, Mem, based, cc, frame, reg, sum};
use crate::decode::{self, Page, STATUS};
use crate::frame::at;
use crate::host::Host;
use crate::plan::{Member, Origin, Place, Plan};
use crate::seats::{Seat, seat};
use crate::stubs::Stubs;

/// Instructions in a block at most.
const LENGTH: usize = 48;

/// What decides, beside its bytes, what code means: part of a block's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mode(pub u8);

impl Mode {
    /// 64-bit code; else 32-bit code with flat segments.
    pub const LONG: u8 = 1;
    /// SSE instructions do not fault.
    pub const SSE: u8 = 2;
    /// AVX instructions do not fault.
    pub const AVX: u8 = 4;
    /// FS spans 4 GiB and may be written (32-bit code).
    pub const FS: u8 = 8;
    /// GS likewise.
    pub const GS: u8 = 16;
    /// Each access looks its page up by itself: for where groups of accesses cross a page. From such a block execution goes
    /// on in others.
    pub const SOLO: u8 = 64;
    /// String instructions move backward.
    pub const DF: u8 = 32;

    /// The mode of blocks that a block is linked to.
    pub fn linked(self) -> Self {
        Self(self.0 & !Self::SOLO)
    }

    /// 64 or 32.
    pub fn bits(self) -> u32 {
        if self.0 & Self::LONG != 0 { 64 } else { 32 }
    }

    /// Bytes of what PUSH pushes.
    pub fn word(self) -> i32 {
        if self.0 & Self::LONG != 0 { 8 } else { 4 }
    }

    /// Whether addresses have 64 bits.
    pub fn wide(self) -> bool {
        self.0 & Self::LONG != 0
    }
}

/// Why translated code is left at a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The page of an access is not in the linear page table, or the access crosses a page.
    Access {
        /// Bytes.
        size: u8,
        /// It stores.
        write: bool,
        /// Bits of its address that must be 0.
        align: u8,
    },
    /// The page of a group of accesses is not in the linear page table.
    Group {
        /// The first of them stores.
        write: bool,
        /// Bits of its address that must be 0, and how far it is from the group's first byte.
        align: u8,
        /// See `align`.
        skip: u16,
        /// Bytes of the group.
        span: u16,
    },
    /// A group of accesses crosses a page. The four bytes at the host address are the distance of the branch that found out,
    /// which can lead to a block without groups.
    Cross,
    /// The reference engine executes this instruction, which is number `op` of the block's, and execution goes on at the
    /// site's host address, if that is not 0.
    Helper {
        /// Index.
        op: u32,
    },
    /// The reference engine executes the instruction here, of which the translator knows nothing.
    Instruction,
    /// The table of jumps does not have the salted linear address in RDI.
    Jump {
        /// What is added to RSP if the jump turns out not to have happened.
        undo: i32,
    },
    /// A jump to an address that is not canonical, which faults.
    Wild {
        /// What is added to RSP, for the jump does not happen.
        undo: i32,
    },
    /// A jump to an address in the same page, not yet linked: the four bytes at the host address are its distance.
    Link,
    /// Somebody rang.
    Poll,
    /// The block's code has changed.
    Stale,
}

/// A place where translated code is left.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// Why.
    pub kind: Kind,
    /// Offset in the page of the guest instruction, or of a jump's target.
    pub guest: u16,
    /// The block.
    pub block: u32,
    /// Where translated code goes on, or what is patched.
    pub host: u64,
}

/// What lies at a host address and after.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    /// Offset in the block's code.
    pub host: u32,
    /// Offset of the guest instruction in its page.
    pub guest: u16,
    /// An access begins here: it can be tried again from here.
    pub access: bool,
    /// The guest's status flags are the host's.
    pub flags_in_host: bool,
}

/// Where the guest's status flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flags {
    Host,
    Memory,
    Both,
    Dead,
}

/// A rewritten block.
#[derive(Default)]
pub struct Output {
    pub code: Vec<u8>,
    pub marks: Vec<Mark>,
    pub sites: Vec<Site>,
    /// Guest instructions for the reference engine.
    pub ops: Vec<interpret::op::Op>,
    /// All guest instructions.
    pub instructions: Vec<Instruction>,
}

/// What builders use one after the other: memory, above all.
pub struct Tools {
    encoder: Encoder,
    info: InstructionInfoFactory,
    helpers: Vec<bool>,
    live: Vec<u32>,
    cold: Vec<Cold>,
    plan: Plan,
    output: Output,
}

impl Tools {
    /// New ones.
    pub fn new() -> Self {
        Self {
            encoder: Encoder::new(64),
            info: InstructionInfoFactory::new(),
            helpers: Vec::new(),
            live: Vec::new(),
            cold: Vec::new(),
            plan: Plan::default(),
            output: Output::default(),
        }
    }

    /// Takes back what a block was described with.
    pub fn take_back(&mut self, mut output: Output) {
        output.code.clear();
        output.marks.clear();
        output.sites.clear();
        output.ops.clear();
        output.instructions.clear();
        self.output = output;
    }
}

/// What comes after the block's code, out of the way.
pub enum Cold {
    /// Leave at a site.
    Leave { from: Fixup, site: usize },
    /// An access that is not aligned, which is well unless it crosses a page.
    Misaligned { from: Fixup, back: u64, size: u32, site: usize },
    /// A jump out of the page.
    Jump { from: Fixup, delta: i32, guest: u16, flags: Flags },
}

/// What the builder wants to know.
pub struct Context<'a> {
    pub host: Host,
    pub stubs: Stubs,
    pub cpuid: &'a Cpuid,
    pub mode: Mode,
    pub vcpu: &'a interpret::Cpu,
    /// The host address of a block of the same page, if it is there.
    pub find: &'a dyn Fn(u16) -> Option<u64>,
    /// The block is one instruction, which reaches into the next page: it is linked to nothing.
    pub alone: bool,
    /// Blocks are linked to nothing.
    pub unlinked: bool,
    /// Dead status flags are kept too wherever an exception or an interrupt may push them.
    pub all_flags: bool,
    /// LOCK is needed.
    pub keep_lock: bool,
    /// Number of the block.
    pub block: u32,
    /// Number of its first site.
    pub first_site: usize,
}

/// A block in the making.
pub struct Builder<'a, 'p> {
    pub c: Context<'a>,
    pub a: Asm,
    pub page: Page<'p>,
    pub start: u16,
    pub encoder: &'p mut Encoder,
    pub info: &'p mut InstructionInfoFactory,
    pub marks: Vec<Mark>,
    pub sites: Vec<Site>,
    pub cold: &'p mut Vec<Cold>,
    pub ops: Vec<interpret::op::Op>,
    pub flags: Flags,
    /// Status flags that are needed before, and after, the instruction at hand.
    pub live: u32,
    pub live_after: u32,
    pub guest: u16,
    plan: &'p mut Plan,
    /// Number of the instruction at hand, and of its next access.
    number: usize,
    access: usize,
    /// The group whose addend is in RSI.
    pub owner: Option<usize>,
    /// The site for the operand of the instruction at hand, if that crosses a page.
    crossing: Option<usize>,
    /// Bits of that operand's address that must be 0.
    align: u8,
}

impl<'a, 'p> Builder<'a, 'p> {
    /// Rewrites the block at `start` of `page` into code for the host address `base`.
    pub fn build(c: Context<'a>, page: Page<'p>, start: u16, base: u64, tools: &'p mut Tools) -> Output {
        let Tools { encoder, info, helpers, live, cold, plan, output } = tools;
        let Output { code, marks, sites, ops, mut instructions } = std::mem::take(output);
        let mut b = Self {
            c,
            a: Asm { code, base },
            page,
            start,
            encoder,
            info,
            marks,
            sites,
            cold,
            ops,
            flags: Flags::Dead,
            live: 0,
            live_after: 0,
            guest: start,
            plan,
            number: 0,
            access: 0,
            owner: None,
            crossing: None,
            align: 0,
        };
        let whole = b.decode(&mut instructions);
        helpers.clear();
        helpers.extend(instructions.iter().map(|i| b.is_helper(i)));
        b.liveness(&instructions, helpers, live);
        let planned = if b.c.mode.0 & Mode::SOLO == 0 { &instructions[..] } else { &[] };
        b.plan.make(planned, helpers, b.c.mode, b.info);
        if live[0] != 0 {
            b.flags = Flags::Memory;
        }
        let mut open = true;
        for (n, i) in instructions.iter().enumerate() {
            (b.live, b.live_after) = (live[n], live[n + 1]);
            b.guest = i.ip() as u16;
            (b.number, b.access) = (n, 0);
            if b.live == 0 {
                b.flags = Flags::Dead;
            }
            b.mark(false);
            open = if helpers[n] { b.helper(i) } else { b.instruction(i) };
        }
        if open {
            b.live = STATUS;
            let end = instructions.last().map_or(start.into(), Instruction::next_ip);
            let reaches = !b.c.alone && end > 0x1000 - decode::LONGEST && end != u64::from(start);
            if whole || end >= 0x1000 || reaches {
                // What reaches into the next page is looked up like what lies there.
                if reaches {
                    b.flags_to_memory();
                    b.jump_by(end as i32);
                } else {
                    b.edge(end, false);
                }
            } else {
                // An instruction that reaches into the next page, or is none.
                b.guest = end as u16;
                b.flags_to_memory();
                b.leave(Kind::Instruction, end as u16);
            }
        }
        b.finish_cold();
        Output { code: b.a.code, marks: b.marks, sites: b.sites, ops: b.ops, instructions }
    }

    /// The block's instructions. Tells whether it ends for its length and not for what comes next.
    fn decode(&mut self, out: &mut Vec<Instruction>) -> bool {
        let mut at = u64::from(self.start);
        let most = if self.c.alone { 1 } else { LENGTH };
        let mut valid = true;
        let end = self.page.decode(at, |i| {
            valid = !i.is_invalid();
            if !valid {
                return false;
            }
            at = i.next_ip();
            out.push(i);
            out.len() < most && matches!(i.flow_control(), FlowControl::Next | FlowControl::ConditionalBranch)
        });
        at >= 0x1000 || valid && end == decode::End::Enough
    }

    /// Status flags needed before each instruction, and after the last.
    fn liveness(&mut self, instructions: &[Instruction], helpers: &[bool], live: &mut Vec<u32>) {
        live.clear();
        live.resize(instructions.len() + 1, STATUS);
        for (n, i) in instructions.iter().enumerate().rev() {
            let mut after = live[n + 1];
            if self.c.alone {
                after = STATUS;
            } else if decode::is_near(i) && matches!(i.mnemonic(), Mnemonic::Jmp) {
                after = self.live_at(self.target(i));
            } else if i.flow_control() == FlowControl::ConditionalBranch {
                after |= self.live_at(self.target(i));
            }
            live[n + 1] = after;
            let all = helpers[n] || self.c.all_flags && decode::may_fault(i);
            live[n] = if all { STATUS } else { after & !decode::writes(i) | decode::reads(i) };
        }
    }

    /// Status flags needed at a branch's target.
    pub fn live_at(&mut self, target: u64) -> u32 {
        if self.c.all_flags { STATUS } else { self.page.live_at(target) }
    }

    /// Where a direct branch leads, from the start of the page.
    pub fn target(&self, i: &Instruction) -> u64 {
        let target = i.near_branch_target();
        if self.c.mode.wide() { target } else { i64::from(target as u32 as i32) as u64 }
    }

    /// Whether the reference engine must execute the instruction.
    pub fn is_helper(&self, i: &Instruction) -> bool {
        if !interpret::supported(i, self.c.cpuid) {
            return true;
        }
        if decode::is_skipped(i) || self.is_control(i) || self.is_stack(i) {
            return false;
        }
        if self.is_system(i) || self.is_string(i) {
            return false;
        }
        if self.segment_is_special(i) || self.address_is_special(i) {
            return true;
        }
        if self.is_bit_string(i) {
            return false;
        }
        if i.mnemonic() == Mnemonic::Lea {
            return false;
        }
        match allowed::class(i) {
            // It reads 32 bits from memory, whatever its name.
            Some(Class::Integer) if i.mnemonic() == Mnemonic::Movsxd && i.op0_register().is_gpr16() => true,
            Some(Class::Integer) => self.too_many_temporaries(i),
            Some(Class::Sse) => self.c.mode.0 & Mode::SSE == 0 || self.too_many_temporaries(i),
            Some(Class::Avx) => {
                let gpr_only = (0..i.op_count())
                    .all(|n| i.op_kind(n) != OpKind::Register || i.op_register(n).is_gpr())
                    && !matches!(i.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall);
                !gpr_only && self.c.mode.0 & Mode::AVX == 0 || self.too_many_temporaries(i)
            }
            None => true,
        }
    }

    /// Rewrites one instruction. Tells whether execution can go on behind it.
    fn instruction(&mut self, i: &Instruction) -> bool {
        if decode::is_skipped(i) {
            return true;
        }
        if self.is_control(i) {
            return self.control(i);
        }
        if self.is_system(i) {
            self.system(i);
        } else if self.is_string(i) {
            self.string(i);
        } else if self.is_bit_string(i) {
            self.bit_string(i);
        } else if self.is_stack(i) {
            self.stack(i);
        } else if i.mnemonic() == Mnemonic::Lea {
            self.load_address(i);
        } else if matches!(i.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall) && !self.c.mode.wide() {
            self.zero_vectors(i.mnemonic() == Mnemonic::Vzeroall);
        } else {
            self.crossing = None;
            let size = i.memory_size().size() as u8;
            self.align = if interpret::alignment_counts(i) { size.saturating_sub(1) } else { 0 };
            self.copy(i);
            self.align = 0;
            self.go_on_after(i);
        }
        true
    }

    fn helper(&mut self, i: &Instruction) -> bool {
        self.flags_to_memory();
        let op = self.op(i);
        self.leave(Kind::Helper { op }, i.ip() as u16);
        // INTO, say, ends a block and still may go on behind itself: there is no code to go on with.
        let goes_on = i.flow_control() == FlowControl::Next;
        let site = self.sites.len() - 1;
        self.sites[site].host = if goes_on { self.a.address() } else { 0 };
        self.flags = Flags::Memory;
        self.owner = None;
        goes_on
    }

    /// Lets translated code go on behind an instruction whose operand crossed a page, if nothing but its result is expected
    /// there: the reference engine leaves the flags in memory.
    fn go_on_after(&mut self, i: &Instruction) {
        let Some(site) = self.crossing.take() else { return };
        if decode::may_write(i) == 0 && decode::reads(i) == 0 && self.owner.is_none() {
            let op = self.op(i);
            self.sites[site].kind = Kind::Helper { op };
            self.sites[site].host = self.a.address();
        }
    }

    /// Keeps an instruction for the reference engine: its number.
    pub fn op(&mut self, i: &Instruction) -> u32 {
        self.ops.push(self.c.vcpu.compile(self.page.bytes(i)));
        self.ops.len() as u32 - 1
    }

    /// Notes what begins here.
    pub fn mark(&mut self, access: bool) {
        let flags_in_host = matches!(self.flags, Flags::Host | Flags::Both);
        let host = self.a.here() as u32;
        self.marks.push(Mark { host, guest: self.guest, access, flags_in_host });
    }

    /// A site's number in the block.
    pub fn site(&mut self, kind: Kind, guest: u16, host: u64) -> usize {
        self.sites.push(Site { kind, guest, block: self.c.block, host });
        self.sites.len() - 1
    }

    /// Leaves here.
    fn leave(&mut self, kind: Kind, guest: u16) {
        let site = self.site(kind, guest, 0);
        self.leave_at(site);
    }

    fn leave_at(&mut self, site: usize) {
        let number = (self.c.first_site + site) as u32;
        self.a.store_imm32(frame(at::SITE), number);
        self.a.jump_to(self.c.stubs.site);
    }

    /// Makes sure that the flags are in memory. They stay in the host's too, if they are there.
    pub fn flags_to_memory(&mut self) {
        if self.flags == Flags::Host {
            self.a.mov(reg::T, reg::RAX);
            self.a.flags_to_ax();
            self.a.store32(frame(at::FLAGS), reg::RAX);
            self.a.mov(reg::RAX, reg::T);
            self.flags = Flags::Both;
        }
    }

    /// Makes sure that the flags are the host's, without touching any register.
    pub fn flags_to_host(&mut self) {
        if self.flags == Flags::Memory {
            self.a.store(frame(at::SCRATCH), reg::RAX);
            self.a.load32(reg::RAX, frame(at::FLAGS));
            self.a.flags_from_ax();
            self.a.load(reg::RAX, frame(at::SCRATCH));
            self.flags = Flags::Both;
        }
    }

    /// Allows the host's flags to be overwritten. RDI is.
    pub fn release_flags(&mut self) {
        if self.live == 0 {
            self.flags = Flags::Dead;
            return;
        }
        self.flags_to_memory();
    }

    /// Notes that the host's flags have been overwritten.
    pub fn flags_lost(&mut self) {
        if self.flags == Flags::Both {
            self.flags = Flags::Memory;
        }
    }

    /// After an instruction that may write flags.
    pub fn flags_written(&mut self, i: &Instruction) {
        if decode::may_write(i) != 0 {
            self.flags = if self.live_after == 0 { Flags::Dead } else { Flags::Host };
        }
    }

    /// An access: `address` emits its linear address to RDI, `place` is where it is if it may belong to a group. Gives the
    /// operand, which may need RSI and RDI.
    pub fn access(
        &mut self,
        size: u32,
        write: bool,
        place: Option<Place>,
        address: impl FnOnce(&mut Self),
    ) -> Mem {
        let member = self.plan.member(self.number, self.access);
        self.access += 1;
        let operand = match (member, place) {
            (Some(member), Some(place)) => {
                if member.first {
                    self.check_group(member, place, write);
                } else if self.owner != Some(member.group) {
                    self.a.load(reg::U, frame(member.slot));
                    self.owner = Some(member.group);
                }
                self.member(place)
            }
            _ => {
                self.release_flags();
                self.mark(true);
                self.owner = None;
                address(self);
                self.check(size, write)
            }
        };
        let again = self.marks.last().is_some_and(|m| m.access);
        if again && member.is_some_and(|m| !m.first) && place.is_some() {
            // To try an access before this one again would not look this one's page up again.
            self.mark(false);
        }
        self.mark_op();
        operand
    }

    /// Where a place is, RSI being in use: at most RDI is changed.
    fn locate(&mut self, origin: Origin, disp: i32) -> Mem {
        let mut host = |guest: u8| match seat(guest) {
            Seat::Host(r) => r,
            Seat::Frame(slot) => {
                self.a.load(reg::T, frame(slot));
                reg::T
            }
        };
        Mem { base: Some(host(origin.base)), index: origin.index.map(|(r, s)| (host(r), s)), disp }
    }

    /// The operand at a place in the group whose addend is in RSI.
    fn member(&mut self, place: Place) -> Mem {
        let at = self.locate(place.origin, place.disp);
        if self.c.mode.wide() && at.index.is_none() {
            return Mem { index: Some((reg::U, 0)), ..at };
        }
        // In 32-bit code the address wraps at 4 GiB before the addend is added.
        self.a.lea(self.c.mode.wide(), reg::T, at);
        sum(reg::T, reg::U)
    }

    /// Makes sure that a group lies in one page, and gets the page's addend to RSI and the group's slot.
    fn check_group(&mut self, member: Member, place: Place, write: bool) {
        let span = self.plan.groups[member.group].span();
        self.release_flags();
        self.mark(true);
        let retry = self.a.address();
        let start = self.locate(place.origin, member.start);
        self.a.lea(self.c.mode.wide(), reg::T, start);
        self.look_up();
        let missing = self.a.jump_if(cc::Z);
        self.a.and_imm32(reg::T, 0xfff);
        self.a.cmp_imm32(reg::T, 0x1000 - span);
        let crosses = self.a.jump_if(cc::A);
        let skip = (place.disp - member.start) as u16;
        let kind = Kind::Group { write, align: self.align, skip, span: span as u16 };
        let site = self.site(kind, self.guest, retry);
        self.cold.push(Cold::Leave { from: missing, site });
        let site = self.site(Kind::Cross, self.guest, self.a.base + crosses.0 as u64);
        self.cold.push(Cold::Leave { from: crosses, site });
        self.a.store(frame(member.slot), reg::U);
        self.owner = Some(member.group);
        self.flags_lost();
    }

    /// The entry for the linear address in RDI to RSI; ZF tells whether there is none.
    pub fn look_up(&mut self) {
        if self.c.host.bmi1 {
            self.a.page_number();
        } else {
            self.a.page_number_by_shifts();
        }
        self.a.entry();
        self.a.test(reg::U);
    }

    /// From the linear address in RDI of an access of `size` bytes to its operand.
    fn check(&mut self, size: u32, write: bool) -> Mem {
        let retry = self.marks.last().map_or(0, |m| self.a.base + u64::from(m.host));
        self.look_up();
        let missing = self.a.jump_if(cc::Z);
        let kind = Kind::Access { size: size as u8, write, align: self.align };
        let site = self.site(kind, self.guest, retry);
        self.cold.push(Cold::Leave { from: missing, site });
        let operand = if size >= 16 {
            // Vectors are often not aligned.
            self.a.add64(reg::U, reg::T);
            self.a.and_imm32(reg::T, 0xfff);
            self.a.cmp_imm32(reg::T, 0x1000 - size);
            let crosses = self.a.jump_if(cc::A);
            let site = self.site(Kind::Instruction, self.guest, 0);
            self.cold.push(Cold::Leave { from: crosses, site });
            self.crossing = Some(site);
            based(reg::U, 0)
        } else {
            if size > 1 {
                self.a.test_low(reg::T, (size - 1) as u8);
                let from = self.a.jump_if(cc::NZ);
                let back = self.a.address();
                self.cold.push(Cold::Misaligned { from, back, size, site });
            }
            sum(reg::T, reg::U)
        };
        self.flags_lost();
        operand
    }

    /// A temporary register beside an operand, which may have to move for it.
    pub fn temporary(&mut self, operand: Mem) -> (Mem, u8) {
        let uses = |r: u8| operand.base == Some(r) || operand.index.is_some_and(|(i, _)| i == r);
        match (uses(reg::T), uses(reg::U)) {
            (false, _) => (operand, reg::T),
            (true, false) => {
                self.owner = None;
                (operand, reg::U)
            }
            (true, true) => {
                self.a.lea(true, reg::T, operand);
                self.owner = None;
                (based(reg::T, 0), reg::U)
            }
        }
    }

    fn finish_cold(&mut self) {
        while let Some(cold) = self.cold.pop() {
            match cold {
                Cold::Leave { from, site } => {
                    self.a.bind(from);
                    self.leave_at(site);
                }
                Cold::Misaligned { from, back, size, site } => {
                    self.a.bind(from);
                    self.a.store(frame(at::SCRATCH), reg::U);
                    self.a.lea(true, reg::U, crate::asm::based(reg::T, size as i32 - 1));
                    self.a.xor32(reg::U, reg::T);
                    self.a.test_imm(reg::U, 0x1000);
                    self.a.load(reg::U, frame(at::SCRATCH));
                    let crosses = self.a.jump_if(cc::NZ);
                    self.a.jump_to(back);
                    self.a.bind(crosses);
                    self.leave_at(site);
                }
                Cold::Jump { from, delta, guest, flags } => {
                    self.a.bind(from);
                    (self.guest, self.flags) = (guest, flags);
                    self.flags_to_memory();
                    self.jump_by(delta);
                }
            }
        }
    }
}
