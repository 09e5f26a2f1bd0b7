//! Page-fault error codes (SDM 3A, 4.7), CR0.WP, NX, SMEP, SMAP, reserved bits.

use core::arch::asm;

use bare::{
    code,
    cpu::{self, CR0_WP, CR4_SMAP, CR4_SMEP, EFER},
    paging::{self, LARGE, NX, P, TEST, U, W, map, pde, read, set, unmap, write},
    report::Report,
    trap::{self, Frame, PF, Trap, UD, catch},
};

code! {
    load: "mov rax, [rdi]";
    store: "mov [rdi], rax";
    call: "call rdi";
    land: "ud2";
}

const READ: u64 = 0;
const WRITE: u64 = 2;
const USER: u64 = 4;
const RESERVED: u64 = 8;
const FETCH: u64 = 16;
const RESERVED_WHY: &str = "P is clear when a reserved bit is set";

fn user(code: u64, rdi: u64) -> Option<Trap> {
    Some(trap::run(&Frame { rdi, ..Frame::user(code) }))
}

fn kernel(code: u64, rdi: u64) -> Option<Trap> {
    Some(trap::run(&Frame { rdi, ..Frame::kernel(code) }))
}

pub fn run(t: &mut Report) {
    supervisor(t);
    ring3(t);
    fetches(t);
    reserved(t);
    smep(t);
    smap(t);
}

fn supervisor(t: &mut Report) {
    let page = unmap(0);
    let trap = catch(|| _ = read(page + 0x123));
    t.trap("absent page, read", trap, PF, READ);
    t.eq("absent page, CR2", trap.map(|t| t.cr2), Some(page + 0x123));
    t.trap("absent page, write", catch(|| write(page, 1)), PF, WRITE);
    t.trap("absent table, read", catch(|| _ = read(TEST + 0x60_0000)), PF, READ);

    map(0, paging::frame(0), P);
    t.no_trap("read-only page, read", catch(|| _ = read(page)));
    t.trap("read-only page, write", catch(|| write(page, 1)), PF, P | WRITE);
    // SAFETY: only test pages are read-only.
    unsafe { cpu::set_cr0(cpu::cr0() & !CR0_WP) };
    t.no_trap("read-only page, write without CR0.WP", catch(|| write(page, 0x77)));
    map(0, paging::frame(0), P | U);
    t.trap("the same, ring 3", user(store(), page), PF, P | WRITE | USER);
    // SAFETY: as before.
    unsafe { cpu::set_cr0(cpu::cr0() | CR0_WP) };
    t.eq("what it wrote", read(paging::frame(0)), 0x77);
    t.trap("read-only page, write with CR0.WP again", catch(|| write(page, 1)), PF, P | WRITE);
}

fn ring3(t: &mut Report) {
    let page = unmap(1);
    t.trap("ring 3, absent page, read", user(load(), page), PF, USER);
    t.trap("ring 3, absent page, write", user(store(), page), PF, USER | WRITE);
    map(1, paging::frame(1), P | W);
    t.trap("ring 3, supervisor page, read", user(load(), page), PF, P | USER);
    t.trap("ring 3, supervisor page, write", user(store(), page), PF, P | USER | WRITE);
    map(1, paging::frame(1), P | W | U);
    t.trap("ring 3, its own page, write", user(store(), page), UD, 0);
    map(1, paging::frame(1), P | U);
    t.trap("ring 3, read-only page, write", user(store(), page), PF, P | USER | WRITE);
    t.trap("ring 3, read-only page, read", user(load(), page), UD, 0);
    // The directory's rights count too.
    let directory = paging::get(pde(0));
    map(1, paging::frame(1), P | W | U);
    set(pde(0), directory & !W, page);
    t.trap("ring 3, read-only directory, write", user(store(), page), PF, P | USER | WRITE);
    set(pde(0), directory & !U, page);
    t.trap("ring 3, supervisor directory, read", user(load(), page), PF, P | USER);
    set(pde(0), directory, page);
}

fn fetches(t: &mut Report) {
    let page = unmap(2);
    t.trap("absent page, fetch", kernel(call(), page), PF, FETCH);
    t.trap("ring 3, absent page, fetch", user(call(), page), PF, USER | FETCH);
    map(2, paging::frame(2), P | W | U);
    // SAFETY: a frame of ours; UD2.
    unsafe { (page as *mut u16).write_volatile(0x0b0f) };
    t.trap("executable page, fetch", kernel(call(), page), UD, 0);
    map(2, paging::frame(2), P | W | U | NX);
    t.no_trap("NX page, read", catch(|| _ = read(page)));
    let trap = kernel(call(), page);
    t.trap("NX page, fetch", trap, PF, P | FETCH);
    t.eq("NX page, RIP and CR2", trap.map(|t| (t.frame.rip, t.cr2)), Some((page, page)));
    t.trap("ring 3, NX page, fetch", user(call(), page), PF, P | USER | FETCH);
    map(2, paging::frame(2), P | W);
    t.trap("ring 3, supervisor page, fetch", user(call(), page), PF, P | USER | FETCH);
    t.trap("ring 3, jump to kernel code", user(call(), land()), PF, P | USER | FETCH);
}

fn reserved(t: &mut Report) {
    if cpu::physical_bits() < 52 {
        let page = map(3, paging::frame(3) | 1 << 51, P | W);
        t.tcg(RESERVED_WHY).trap("reserved bit, read", catch(|| _ = read(page)), PF, P | RESERVED);
        t.tcg(RESERVED_WHY).trap("reserved bit, write", catch(|| write(page, 1)), PF, P | RESERVED | WRITE);
        t.tcg(RESERVED_WHY).trap("reserved bit, ring 3", user(load(), page), PF, P | RESERVED | USER);
        unmap(3);
    } else {
        t.skip("reserved bit", "52 physical address bits");
    }
    let large = TEST + 0x20_0000;
    set(pde(1), paging::SCRATCH | 1 << 13 | LARGE | P | W, large);
    t.tcg(RESERVED_WHY).trap("2 MiB page, reserved address bit", catch(|| _ = read(large)), PF, P | RESERVED);
    set(pde(1), 0, large);

    let page = map(3, paging::frame(3), P | W | NX);
    // SAFETY: no page of ours but this one has NX.
    unsafe { cpu::wrmsr(EFER, cpu::rdmsr(EFER) & !0x800) };
    cpu::invlpg(page);
    t.tcg(RESERVED_WHY).trap("NX bit without EFER.NXE", catch(|| _ = read(page)), PF, P | RESERVED);
    unmap(3);
    t.trap("absent page, fetch without NXE or SMEP", kernel(call(), page), PF, 0);
    // SAFETY: as it was.
    unsafe { cpu::wrmsr(EFER, cpu::rdmsr(EFER) | 0x800) };
}

fn smep(t: &mut Report) {
    if !cpu::has(7, 1, 7) {
        return t.skip("SMEP", "not in CPUID");
    }
    let page = map(4, paging::frame(2), P | W | U);
    // SAFETY: the kernel runs in supervisor pages.
    unsafe { cpu::set_cr4(cpu::cr4() | CR4_SMEP) };
    t.trap("SMEP, fetch from a user page", kernel(call(), page), PF, P | FETCH);
    t.trap("SMEP, ring 3 fetches", user(call(), page), UD, 0);
    t.no_trap("SMEP, read of a user page", catch(|| _ = read(page)));
    // SAFETY: as it was.
    unsafe { cpu::set_cr4(cpu::cr4() & !CR4_SMEP) };
}

fn smap(t: &mut Report) {
    if !cpu::has(7, 1, 20) {
        t.trap("STAC without SMAP", catch(|| unsafe { asm!("stac") }), UD, 0);
        return t.skip("SMAP", "not in CPUID");
    }
    let page = map(5, paging::frame(2), P | W | U);
    // SAFETY: the kernel's data is in supervisor pages.
    unsafe { cpu::set_cr4(cpu::cr4() | CR4_SMAP) };
    t.trap("SMAP, read", catch(|| _ = read(page)), PF, P);
    t.trap("SMAP, write", catch(|| write(page, 0)), PF, P | WRITE);
    // SAFETY: AC is cleared again, also by the recovery of a fault.
    let trap = catch(|| unsafe { asm!("stac", "mov rax, [{}]", "clac", in(reg) page, out("rax") _) });
    t.no_trap("SMAP, read with AC", trap);
    t.trap("SMAP, fetch is SMEP's matter", kernel(call(), page), UD, 0);
    t.trap("SMAP, ring 3 reads", user(load(), page), UD, 0);
    t.trap("STAC in ring 3", user(stac(), 0), UD, 0);
    // SAFETY: as it was.
    unsafe { cpu::set_cr4(cpu::cr4() & !CR4_SMAP) };
}

code! {
    stac: "stac", "int3";
}
