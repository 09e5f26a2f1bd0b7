//! What a translation does beside faulting: large pages, accessed and dirty bits, INVLPG, global pages, PCID.

use core::arch::asm;

use bare::{
    code,
    cpu::{self, CR4_PCIDE, CR4_PGE},
    paging::{
        self, A, D, G, LARGE, P, SCRATCH, TEST, U, W, frame, get, map, pde, pdpte, pte, read, set, unmap,
        write,
    },
    report::Report,
    trap::{self, Frame, GP, PF, UD, catch},
};

code! {
    store: "mov [rdi], rax";
    load: "mov rax, [rdi]";
}

pub fn run(t: &mut Report) {
    large_pages(t);
    accessed_dirty(t);
    invlpg(t);
    global(t);
    pcid(t);
}

fn large_pages(t: &mut Report) {
    let address = TEST + 0x20_0000;
    set(pde(1), SCRATCH | LARGE | P | W, address);
    write(address + 0x1f_fff8, 0x1234);
    t.eq("2 MiB page", read(SCRATCH + 0x1f_fff8), 0x1234);
    t.eq("2 MiB page, A and D", get(pde(1)) & (A | D), A | D);
    set(pde(1), SCRATCH | LARGE | P, address);
    t.trap("2 MiB page, read-only", catch(|| write(address, 1)), PF, P | 2);
    t.eq("2 MiB page, no D by a fault", get(pde(1)) & D, 0);
    // Across the border to the next, which is absent.
    set(pde(2), 0, address + 0x20_0000);
    let trap = catch(|| _ = read(address + 0x1f_fffc));
    t.eq("read across the end, CR2", trap.map(|t| (t.frame.error, t.cr2)), Some((0, address + 0x20_0000)));
    set(pde(1), 0, address);

    if !cpu::has(0x8000_0001, 3, 26) {
        return t.skip("1 GiB page", "not in CPUID");
    }
    let address = 4 << 30;
    set(pdpte(4), LARGE | P | W, address);
    write(address + SCRATCH + 8, 0x5678);
    t.eq("1 GiB page", read(SCRATCH + 8), 0x5678);
    t.eq("1 GiB page, A and D", get(pdpte(4)) & (A | D), A | D);
    set(pdpte(4), 0x2000 | LARGE | P | W, address);
    t.tcg("P is clear when a reserved bit is set").trap(
        "1 GiB page, reserved address bit",
        catch(|| _ = read(address)),
        PF,
        P | 8,
    );
    set(pdpte(4), 0, address);
}

fn accessed_dirty(t: &mut Report) {
    let page = map(0, frame(0), P | W);
    t.eq("new entry", get(pte(0)) & (A | D), 0);
    read(page);
    t.eq("A by a read", get(pte(0)) & (A | D), A);
    write(page, 1);
    t.eq("D by a write after a read", get(pte(0)) & (A | D), A | D);
    map(0, frame(0), P | W);
    write(page, 1);
    t.eq("A and D by a write", get(pte(0)) & (A | D), A | D);
    map(0, frame(0), P);
    _ = catch(|| write(page, 1));
    t.eq("no D by a faulting write", get(pte(0)) & D, 0);
    map(0, frame(0), P | W);
    trap::run(&Frame { rdi: page, ..Frame::user(store()) });
    t.eq("no D by a faulting ring-3 write", get(pte(0)) & D, 0);
    map(0, frame(0), P | W);
    // SAFETY: a frame of ours; the comparison fails, the write cycle happens all the same.
    unsafe { asm!("lock cmpxchg [{}], {}", in(reg) page, in(reg) 5u64, inout("rax") 0x9999u64 => _) };
    t.eq("D by a LOCK CMPXCHG that fails", get(pte(0)) & (A | D), A | D);
    let directory = get(pde(0)) & !A;
    map(0, frame(0), P | W);
    set(pde(0), directory, page);
    // SAFETY: the same tables; forgets cached directories.
    unsafe { cpu::set_cr3(cpu::cr3()) };
    read(page);
    t.eq("A in the directory", get(pde(0)) & A, A);
    let code = map(1, frame(1), P | W | U);
    // SAFETY: a frame of ours; UD2.
    unsafe { (frame(1) as *mut u16).write_volatile(0x0b0f) };
    trap::run(&Frame::kernel(code));
    t.eq("A by a fetch", get(pte(1)) & (A | D), A);
}

fn invlpg(t: &mut Report) {
    write(frame(2), 0xa);
    write(frame(3), 0xb);
    let page = map(2, frame(2), P | W);
    t.eq("first mapping", read(page), 0xa);
    map(2, frame(3), P | W);
    t.eq("other frame after INVLPG", read(page), 0xb);
    // SAFETY: a test entry; then all non-global entries go.
    unsafe {
        pte(2).write_volatile(frame(2) | P | W);
        cpu::set_cr3(cpu::cr3());
    }
    t.eq("other frame after a CR3 load", read(page), 0xa);
    // SAFETY: a test entry.
    unsafe { pte(2).write_volatile(frame(2) | P) };
    cpu::invlpg(page + 0xfff);
    t.trap("less rights after INVLPG of another byte of the page", catch(|| write(page, 1)), PF, P | 2);
    // More rights need no INVLPG: a fault must be judged by the tables as they are.
    // SAFETY: a test entry.
    unsafe { pte(2).write_volatile(frame(2) | P | W) };
    let mut trap = catch(|| write(page, 0xc));
    if trap.is_some() {
        trap = catch(|| write(page, 0xc));
    }
    t.no_trap("more rights without INVLPG, at the second try at last", trap);
    let page = unmap(2);
    _ = catch(|| _ = read(page));
    // SAFETY: a test entry; absence is never cached.
    unsafe { pte(2).write_volatile(frame(2) | P | W) };
    t.no_trap("absent to present without INVLPG", catch(|| _ = read(page)));
}

fn global(t: &mut Report) {
    write(frame(2), 0xa);
    write(frame(3), 0xb);
    let page = map(3, frame(2), P | W | G);
    // SAFETY: only this page is global.
    unsafe { cpu::set_cr4(cpu::cr4() | CR4_PGE) };
    read(page);
    map(3, frame(3), P | W | G);
    t.eq("global page after INVLPG", read(page), 0xb);
    // SAFETY: a test entry; changing PGE forgets all.
    unsafe {
        pte(3).write_volatile(frame(2) | P | W | G);
        cpu::set_cr4(cpu::cr4() & !CR4_PGE);
    }
    t.eq("global page after PGE is cleared", read(page), 0xa);
    // SAFETY: a test entry; with PGE clear, G means nothing.
    unsafe {
        pte(3).write_volatile(frame(3) | P | W | G);
        cpu::set_cr3(cpu::cr3());
    }
    t.eq("G bit without PGE after a CR3 load", read(page), 0xb);
    unmap(3);
}

fn pcid(t: &mut Report) {
    if !cpu::has(1, 2, 17) {
        let trap = catch(|| unsafe { cpu::set_cr4(cpu::cr4() | CR4_PCIDE) });
        t.tcg("ignored").trap("CR4.PCIDE without PCID", trap, GP, 0);
        return t.skip("PCID", "not in CPUID");
    }
    let cr3 = cpu::cr3();
    write(frame(2), 0xa);
    write(frame(3), 0xb);
    let page = map(4, frame(2), P | W);
    // SAFETY: the same tables under each identifier; bit 63 keeps their translations.
    unsafe {
        t.trap(
            "CR4.PCIDE with a PCID in CR3",
            catch(|| {
                cpu::set_cr3(cr3 | 8);
                cpu::set_cr4(cpu::cr4() | CR4_PCIDE);
            }),
            GP,
            0,
        );
        cpu::set_cr3(cr3);
        cpu::set_cr4(cpu::cr4() | CR4_PCIDE);
        read(page);
        cpu::set_cr3(cr3 | 1);
        t.eq("CR3 holds the PCID", cpu::cr3(), cr3 | 1);
        read(page);
        pte(4).write_volatile(frame(3) | P | W);
        cpu::set_cr3(cr3);
        t.eq("PCID 0 after a flushing load", read(page), 0xb);
        cpu::set_cr3(cr3 | 1 | 1 << 63);
        t.eq("CR3 does not hold bit 63", cpu::cr3(), cr3 | 1);
        cpu::set_cr3(cr3 | 1);
        t.eq("PCID 1 after a flushing load", read(page), 0xb);
        pte(4).write_volatile(frame(2) | P | W);
        cpu::invlpg(page);
        t.eq("INVLPG in PCID 1", read(page), 0xa);
        cpu::set_cr3(cr3);
        if cpu::has(7, 1, 10) {
            invpcid(t, cr3, page);
        }
        t.trap("CR0.PG clear with PCIDE", catch(|| cpu::set_cr0(cpu::cr0() & !(1 << 31))), GP, 0);
        cpu::set_cr4(cpu::cr4() & !CR4_PCIDE);
    }
    unmap(4);
}

/// INVPCID types 0 to 3, each after a change in PCID 1 that is looked at from PCID 1 without another flush.
///
/// # Safety
/// CR4.PCIDE is set and CR3 is `cr3`, PCID 0.
unsafe fn invpcid(t: &mut Report, cr3: u64, page: u64) {
    for kind in 0..4u64 {
        let descriptor = [1u64, page];
        // SAFETY: the same tables under each identifier.
        unsafe {
            cpu::set_cr3(cr3 | 1);
            pte(4).write_volatile(frame(2) | P | W);
            cpu::invlpg(page);
            read(page);
            cpu::set_cr3(cr3);
            pte(4).write_volatile(frame(3) | P | W);
            asm!("invpcid {}, [{}]", in(reg) kind, in(reg) &descriptor);
            cpu::set_cr3(cr3 | 1 | 1 << 63);
            let name = ["INVPCID address", "INVPCID context", "INVPCID all", "INVPCID all but global"];
            t.eq(name[kind as usize], read(page), 0xb);
            cpu::set_cr3(cr3);
        }
    }
    // SAFETY: faults.
    let trap = catch(|| unsafe { asm!("invpcid {}, [{}]", in(reg) 4u64, in(reg) &[0u64, 0]) });
    t.trap("INVPCID of an unknown type", trap, GP, 0);
    let trap = trap::run(&Frame { rdi: page, ..Frame::user(load()) });
    t.trap("ring 3 after all", Some(trap), if paging::get(pte(4)) & U != 0 { UD } else { PF }, P | U);
}
