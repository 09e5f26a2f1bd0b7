//! Ports in ring 3: IOPL and the I/O permission bitmap of the TSS.

use bare::{
    code, paging,
    report::Report,
    segments::{TaskState, tss},
    trap::{self, Frame, GP, UD},
};

code! {
    in8: "in al, dx";
    in16: "in ax, dx";
    in32: "in eax, dx";
    out8: "out dx, al";
    insb: "insb";
    outsb: "outsb";
    in_immediate: "in al, 0x80";
}

pub fn run(t: &mut Report) {
    let base = core::mem::offset_of!(TaskState, io_map) as u16;
    let go = |code: u64, port: u64, rflags: u64| {
        let data = paging::user(paging::frame(0));
        Some(trap::run(&Frame { rdx: port, rdi: data, rsi: data, rflags: 2 | rflags, ..Frame::user(code) }))
    };
    tss().io_map_base = size_of::<TaskState>() as u16;
    t.trap("no bitmap", go(in8(), 0x80, 0), GP, 0);
    t.trap("IOPL 3", go(in8(), 0x80, 0x3000), UD, 0);
    t.trap("IOPL 2", go(in8(), 0x80, 0x2000), GP, 0);
    t.trap("ring 0", Some(trap::run(&Frame { rdx: 0x80, ..Frame::kernel(in8()) })), UD, 0);

    tss().io_map_base = base;
    t.trap("bitmap forbids", go(in8(), 0x80, 0), GP, 0);
    tss().io_map[0x10] = 0xfe;
    t.trap("bitmap allows IN", go(in8(), 0x80, 0), UD, 0);
    t.trap("bitmap allows OUT", go(out8(), 0x80, 0), UD, 0);
    t.trap("bitmap allows IN by immediate", go(in_immediate(), 0, 0), UD, 0);
    t.trap("bitmap allows INS", go(insb(), 0x80, 0), UD, 0);
    t.trap("bitmap allows OUTS", go(outsb(), 0x80, 0), UD, 0);
    t.trap("the next port", go(in8(), 0x81, 0), GP, 0);
    t.trap("two ports, one forbidden", go(in16(), 0x80, 0), GP, 0);
    tss().io_map[0x10] = 0x87;
    t.trap("four ports over two bytes, forbidden", go(in32(), 0x84, 0), GP, 0);
    t.trap("four ports, allowed", go(in32(), 0x83, 0), UD, 0);
    tss().io_map[0x10] = 0x3f;
    tss().io_map[0x11] = 0xfc;
    t.trap("four ports over two bytes, allowed", go(in32(), 0x86, 0), UD, 0);
    t.trap("beyond the bitmap", go(in8(), 0x500, 0), GP, 0);
    tss().io_map = [0xff; 129];
    tss().io_map_base = size_of::<TaskState>() as u16;
}
