//! What is easy to get wrong: faults in the middle, code that changes itself, corners of arithmetic and of protection.

mod common;

use common::{CODE, End, Guest, PAGES, STACK, STOP, code, gate};
use machine::cpu::{Debug, Exit, Stop, Vcpu};
use x86::control::{cr4, dr6, dr7};
use x86::flags;
use x86::gpr::{RAX, RBX, RCX, RDI, RSI, RSP};

const DE: u8 = 0;
const DB: u8 = 1;
const DF: u8 = 8;
const GP: u8 = 13;
const PF: u8 = 14;

#[test]
fn fetch_across_a_page() {
    // mov eax, imm32 with two bytes in the next page; then stop.
    let at = PAGES + 0xffd;
    let mut guest = Guest::long(&[]);
    guest.memory.write(at, &code(&[&[0xb8, 1, 2, 3, 4], &STOP]));
    guest.set(|s| s.rip = at);
    guest.map(PAGES + 0x1000, 0);
    let (end, state) = guest.run();
    assert_eq!(end, End::Exception(PF, Some(0x10), at), "NXE is set, so fetches say that they are");
    assert_eq!(state.cr2, PAGES + 0x1000);
    // The second page is elsewhere than behind the first.
    guest.map(PAGES + 0x1000, (PAGES + 0x5000) | 3);
    guest.memory.write(PAGES + 0x5000, &code(&[&[9, 4], &STOP]));
    guest.set(|s| s.rip = at);
    let (end, state) = guest.run();
    assert_eq!(end, End::Stopped);
    assert_eq!(state.gpr[RAX], 0x0409_0201);
    // What lies there changes: the block must not be used again.
    guest.memory.store(PAGES + 0x5000, 7u8);
    guest.set(|s| s.rip = at);
    assert_eq!(guest.run().1.gpr[RAX], 0x0407_0201);
    // Now the instruction ends before it: the page is neither needed nor touched.
    guest.map(PAGES + 0x1000, 0);
    guest.memory.write(at, &STOP);
    guest.set(|s| s.rip = at);
    assert_eq!(guest.run().0, End::Stopped);
}

#[test]
fn store_across_a_page_is_all_or_nothing() {
    // mov [rdi], rax
    let mut guest = Guest::long(&code(&[&[0x48, 0x89, 0x07], &STOP]));
    let at = PAGES + 0xffc;
    guest.map(PAGES + 0x1000, 0);
    guest.set(|s| (s.gpr[RDI], s.gpr[RAX]) = (at, u64::MAX));
    let (end, state) = guest.run();
    assert_eq!((end, state.cr2), (End::Exception(PF, Some(2), CODE), PAGES + 0x1000));
    assert_eq!(guest.memory.load::<u32>(at), 0);
    guest.map(PAGES + 0x1000, (PAGES + 0x7000) | 3);
    guest.set(|s| s.rip = CODE);
    assert_eq!(guest.run().0, End::Stopped);
    assert_eq!(guest.memory.load::<u32>(at), u32::MAX);
    assert_eq!(guest.memory.load::<u64>(PAGES + 0x7000), 0xffff_ffff);
    assert_eq!(guest.entry(PAGES) & 0x60, 0x60, "accessed and dirty");
}

#[test]
fn an_instruction_overwrites_the_next() {
    // mov byte [rip+1], 42; mov al, 1; stop
    let mut guest = Guest::long(&code(&[&[0xc6, 0x05, 1, 0, 0, 0, 42, 0xb0, 1], &STOP]));
    for _ in 0..2 {
        guest.set(|s| s.rip = CODE);
        assert_eq!(guest.run().1.gpr[RAX], 42);
        guest.memory.store(CODE + 8, 1u8);
    }
}

#[test]
fn repeated_moves_stop_where_they_fault() {
    // rep movsb
    let mut guest = Guest::long(&code(&[&[0xf3, 0xa4], &STOP]));
    let to = PAGES + 0x1000 - 100;
    guest.map(PAGES + 0x1000, 0);
    guest.memory.write(PAGES + 0x3000, &[7; 200]);
    guest.set(|s| (s.gpr[RSI], s.gpr[RDI], s.gpr[RCX]) = (PAGES + 0x3000, to, 200));
    let (end, state) = guest.run();
    assert_eq!(end, End::Exception(PF, Some(2), CODE));
    assert_eq!((state.gpr[RCX], state.gpr[RDI], state.gpr[RSI]), (100, PAGES + 0x1000, PAGES + 0x3064));
    guest.map(PAGES + 0x1000, (PAGES + 0x1000) | 3);
    guest.set(|s| (s.rip, s.gpr[RSP]) = (CODE, STACK));
    let (end, state) = guest.run();
    assert_eq!((end, state.gpr[RCX]), (End::Stopped, 0));
    assert_eq!(guest.memory.load::<u8>(PAGES + 0x1000 + 99), 7);
    assert_eq!(guest.memory.load::<u8>(PAGES + 0x1000 + 100), 0);
}

#[test]
fn the_smallest_integer_divided_by_minus_one() {
    // idiv r/m: 8, 16, 32 and 64 bits of it
    for (bytes, high, low) in [
        (&[0xf6u8, 0xfb][..], 0u64, 0x8000u64),
        (&[0x66, 0xf7, 0xfb], 0xffff, 0x8000),
        (&[0xf7, 0xfb], 0xffff_ffff, 0x8000_0000),
        (&[0x48, 0xf7, 0xfb], u64::MAX, 1 << 63),
        (&[0x48, 0xf7, 0xfb], 1 << 63, 0),
    ] {
        let mut guest = Guest::long(&code(&[bytes, &STOP]));
        guest.set(|s| (s.gpr[RAX], s.gpr[2], s.gpr[RBX]) = (low, high, u64::MAX));
        let (end, state) = guest.run();
        assert_eq!(end, End::Exception(DE, None, CODE));
        assert_eq!((state.gpr[RAX], state.gpr[2]), (low, high));
    }
}

#[test]
fn shifts_by_zero_leave_flags_alone() {
    // shl eax, cl
    let mut guest = Guest::long(&code(&[&[0xd3, 0xe0], &STOP]));
    let all = flags::STATUS | flags::FIXED;
    guest.set(|s| (s.gpr[RAX], s.gpr[RCX], s.rflags) = (u64::MAX, 32, all));
    let state = guest.run().1;
    assert_eq!(state.rflags, all);
    assert_eq!(state.gpr[RAX], 0xffff_ffff, "but the register is written");
}

#[test]
fn supervisor_access_prevention() {
    // mov eax, [rdi]; stac; mov eax, [rdi]; clac; mov eax, [rdi]
    let load = [0x8b, 0x07];
    let mut guest = Guest::long(&code(&[&[0x0f, 0x01, 0xcb], &load, &[0x0f, 0x01, 0xca], &load, &STOP]));
    guest.map(PAGES, PAGES | 7);
    guest.set(|s| (s.gpr[RDI], s.cr4) = (PAGES, s.cr4 | cr4::SMAP));
    assert_eq!(guest.run().0, End::Exception(PF, Some(1), CODE + 8));
}

#[test]
fn writes_and_fetches_that_rights_forbid() {
    let mut guest = Guest::long(&code(&[&[0x88, 0x07], &STOP])); // mov [rdi], al
    guest.map(PAGES, PAGES | 1);
    guest.set(|s| s.gpr[RDI] = PAGES);
    assert_eq!(guest.run().0, End::Exception(PF, Some(3), CODE), "CR0.WP");
    guest.map(PAGES, PAGES | 3 | 1 << 63);
    guest.set(|s| s.rip = PAGES);
    assert_eq!(guest.run().0, End::Exception(PF, Some(0x11), PAGES), "no execution");
    guest.map(PAGES, PAGES | 7);
    guest.set(|s| (s.rip, s.cr4) = (PAGES, s.cr4 | cr4::SMEP));
    assert_eq!(guest.run().0, End::Exception(PF, Some(0x11), PAGES), "SMEP");
    guest.map(PAGES, PAGES | 3 | 1 << 51);
    guest.set(|s| (s.rip, s.gpr[RSP]) = (CODE, STACK));
    assert_eq!(guest.run().0, End::Exception(PF, Some(0xb), CODE), "a reserved bit");
}

#[test]
fn addresses_that_are_not_canonical() {
    let mut guest = Guest::long(&code(&[&[0x8b, 0x07], &STOP])); // mov eax, [rdi]
    guest.set(|s| s.gpr[RDI] = 1 << 47);
    assert_eq!(guest.run().0, End::Exception(GP, Some(0), CODE));
    let mut guest = Guest::long(&code(&[&[0x8b, 0x45, 0], &STOP])); // mov eax, [rbp]
    guest.set(|s| s.gpr[5] = 0x7fff_ffff_fffe);
    assert_eq!(guest.run().0, End::Exception(12, Some(0), CODE), "the stack segment's fault");
}

#[test]
fn double_and_triple_faults() {
    let mut guest = Guest::long(&[0x0f, 0x0b]); // ud2
    // #UD's gate is not present: #NP, which after a benign #UD is just delivered.
    let ud = guest.memory.load::<u64>(gate(6));
    guest.memory.store(gate(6), ud & !(1 << 47));
    assert_eq!(guest.run().0, End::Exception(11, Some(6 << 3 | 2 | 1), CODE));
    // #PF whose gate is not present: #DF, here on IST1.
    let pf = guest.memory.load::<u64>(gate(14));
    guest.memory.store(gate(14), pf & !(1 << 47));
    guest.memory.store(gate(8), guest.memory.load::<u64>(gate(8)) | 1 << 32);
    guest.map(PAGES, 0);
    guest.set(|s| (s.rip, s.gpr[RSP]) = (PAGES, STACK));
    let (end, state) = guest.run();
    assert_eq!(end, End::Exception(DF, Some(0), PAGES));
    assert_eq!(state.gpr[RSP], STACK);
    // And without a gate for that: the end.
    guest.set(|s| (s.rip, s.idtr.limit) = (PAGES, 0));
    assert_eq!(guest.run().0, End::TripleFault);
}

#[test]
fn single_step_and_breakpoints() {
    // inc eax; mov [rdi], eax; nop; stop
    let snippet = code(&[&[0xff, 0xc0, 0x89, 0x07, 0x90], &STOP]);
    let mut guest = Guest::long(&snippet);
    guest.set(|s| (s.gpr[RDI], s.rflags) = (PAGES, s.rflags | flags::TF));
    let (end, state) = guest.run();
    assert_eq!(end, End::Exception(DB, None, CODE + 2));
    assert_eq!(state.dr6 & !dr6::FIXED, dr6::BS);
    // A watchpoint traps after the store, an execution breakpoint faults before the NOP, with RF set.
    let mut guest = Guest::long(&snippet);
    guest.set(|s| {
        s.gpr[RDI] = PAGES + 2;
        s.dr = [PAGES + 4, CODE + 4, 0, 0];
        s.dr7 = dr7::FIXED | 1 | 1 << 2 | (0b0001 << 16);
    });
    let (end, state) = guest.run();
    assert_eq!((end, state.dr6 & 0xf), (End::Exception(DB, None, CODE + 4), 1));
    guest.set(|s| (s.rip, s.gpr[RSP], s.dr6) = (CODE + 4, STACK, dr6::FIXED));
    let (end, state) = guest.run();
    assert_eq!((end, state.dr6 & 0xf), (End::Exception(DB, None, CODE + 4), 2));
    assert_ne!(state.rflags & flags::RF, 0);
    guest.set(|s| (s.rip, s.rflags, s.gpr[RSP]) = (CODE + 4, flags::RF | flags::FIXED, STACK));
    assert_eq!(guest.run().0, End::Stopped, "RF lets one instruction pass");
}

#[test]
fn the_debugger_sees_without_being_seen() {
    let mut guest = Guest::long(&code(&[&[0xff, 0xc0, 0x89, 0x07, 0x90], &STOP]));
    guest.set(|s| s.gpr[RDI] = PAGES);
    guest.cpu.debug(&Debug { step: true, ..Debug::default() }).unwrap();
    assert_eq!(guest.cpu.run().unwrap(), Exit::Debug(Stop::Step));
    assert_eq!(guest.cpu.state().unwrap().rip, CODE + 2);
    let watchpoints = vec![(PAGES, 4, false)];
    guest.cpu.debug(&Debug { watchpoints, breakpoints: vec![CODE + 4], step: false }).unwrap();
    assert_eq!(guest.cpu.run().unwrap(), Exit::Debug(Stop::Watchpoint(PAGES)));
    assert_eq!(guest.cpu.run().unwrap(), Exit::Debug(Stop::Breakpoint(CODE + 4)));
    let state = guest.cpu.state().unwrap();
    assert_eq!((state.dr6 & 0xf, state.gpr[RAX]), (0, 1));
}

#[test]
fn interrupts_wait_one_instruction_after_sti() {
    // mov ecx, 0x830 (x2APIC ICR); a self IPI by the xAPIC would need its page: use the MSR. Then sti; inc ebx; inc ebx.
    let mut guest = Guest::long(&code(&[
        &[0xb9, 0x1b, 0, 0, 0, 0x0f, 0x32, 0x0d, 0, 0x0c, 0, 0, 0x0f, 0x30], // APIC_BASE |= EN | EXTD
        &[0xb9, 0x0f, 8, 0, 0, 0xb8, 0xff, 1, 0, 0, 0x31, 0xd2, 0x0f, 0x30], // SVR: enabled
        &[0xb9, 0x3f, 8, 0, 0, 0xb8, 0x40, 0, 0, 0, 0x0f, 0x30],             // SELF_IPI: vector 0x40
        &[0xfb, 0xff, 0xc3, 0xff, 0xc3],                                     // sti; inc ebx; inc ebx
        &STOP,
    ]));
    let entry = (0x7000 + 16 * 0x10) | (8 << 16) | 0x8e00u64 << 32;
    guest.memory.store(gate(0x40), entry);
    guest.memory.store(gate(0x40) + 8, 0u64);
    guest.set(|s| (s.idtr.limit, s.gpr[RBX]) = (0xfff, 0));
    let (end, state) = guest.run();
    assert_eq!(end, End::Exception(0x10, None, CODE + 14 + 14 + 12 + 3));
    assert_eq!(state.gpr[RBX], 1);
}

#[test]
fn real_mode_interrupts_and_limits() {
    // int 0x21; mov ax, [0xffff]
    let mut guest = Guest::real(&[0xcd, 0x21, 0xa1, 0xff, 0xff]);
    guest.memory.store(4 * 0x21, 0x0100_0020u32); // 0100:0020
    guest.memory.write(0x1020, &[0xbb, 0x34, 0x12, 0xcf]); // mov bx, 0x1234; iret
    guest.memory.store(4 * 13, 0x0200_0000u32); // #GP: 0200:0000
    guest.memory.write(0x2000, &STOP);
    let state = guest.run().1;
    assert_eq!(state.gpr[RBX], 0x1234);
    assert_eq!((state.segments[1].selector, state.rip), (0x200, 2), "a word beyond the limit is a #GP");
    assert_eq!(guest.memory.load::<u16>(state.gpr[RSP]), 0x8002);
}

#[test]
fn the_same_offset_in_another_segment_is_other_code() {
    // again: inc ax; dec cx; jz done; jmp far 0x100:0x8000, where: add ax, 16; dec cx; jz done; jmp far 0:0x8000
    let mut guest = Guest::real(&[0x40, 0x49, 0x74, 5, 0xea, 0, 0x80, 0, 1, 0xe6, 0xf4]);
    guest.memory.write(0x9000, &[0x83, 0xc0, 16, 0x49, 0x74, 5, 0xea, 0, 0x80, 0, 0, 0xe6, 0xf4]);
    guest.set(|s| s.gpr[RCX] = 20);
    assert_eq!(guest.run().1.gpr[RAX], 170);
}

#[test]
fn more_than_15_bytes_are_a_general_protection_fault() {
    let mut guest = Guest::long(&[[0x2e; 15].as_slice(), &[0x90]].concat());
    assert_eq!(guest.run().0, End::Exception(GP, Some(0), CODE));
}

#[test]
fn mov_ss_keeps_traps_back() {
    // mov ss, ax; inc ebx; inc ebx
    let mut guest = Guest::long(&code(&[&[0x8e, 0xd0, 0xff, 0xc3, 0xff, 0xc3], &STOP]));
    guest.set(|s| (s.gpr[RAX], s.rflags) = (16, s.rflags | flags::TF));
    assert_eq!(guest.run().0, End::Exception(DB, None, CODE + 4));
}
