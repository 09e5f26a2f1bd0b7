//! Divides the smallest integer by -1, and anything by 0, in every width: each is a divide error at the instruction.
#![no_std]
#![no_main]

use bare::{
    code,
    report::Report,
    trap::{self, Frame, run},
};

bare::guest!(main);

code! {
    idiv8: "idiv bl";
    idiv16: "idiv bx";
    idiv32: "idiv ebx";
    idiv64: "idiv rbx";
    div8: "div bl";
    div16: "div bx";
    div32: "div ebx";
    div64: "div rbx";
    aam0: ".code32", "aam 0";
}

fn main() {
    let mut t = Report::new("idiv");
    let minus_one = u64::MAX;
    // Name, code, (R)DX, (R)AX, divisor.
    let cases: [(&str, u64, u64, u64, u64); 14] = [
        ("idiv8 smallest by -1", idiv8(), 0, 0xff80, minus_one),
        ("idiv16 smallest by -1", idiv16(), 0xffff, 0x8000, minus_one),
        ("idiv32 smallest by -1", idiv32(), 0xffff_ffff, 0x8000_0000, minus_one),
        ("idiv64 smallest by -1", idiv64(), minus_one, 1 << 63, minus_one),
        ("idiv8 by 0", idiv8(), 0, 1, 0),
        ("idiv16 by 0", idiv16(), 0, 1, 0),
        ("idiv32 by 0", idiv32(), 0, 1, 0),
        ("idiv64 by 0", idiv64(), 0, 1, 0),
        ("idiv64 smallest double by -1", idiv64(), 1 << 63, 0, minus_one),
        ("div8 too large", div8(), 0, 0x200, 2),
        ("div16 too large", div16(), 2, 0, 2),
        ("div32 too large", div32(), 2, 0, 2),
        ("div64 too large", div64(), 2, 0, 2),
        ("div64 by 0", div64(), 0, 0, 0),
    ];
    for (name, code, rdx, rax, rbx) in cases {
        let trap = run(&Frame { rdx, rax, rbx, ..Frame::kernel(code) });
        let f = trap.frame;
        t.eq(name, (f.vector, f.rip, f.rax, f.rdx), (trap::DE, code, rax, rdx));
    }
    let trap = run(&Frame { rax: 7, ..Frame::kernel32(aam0()) });
    t.eq("aam 0", (trap.frame.vector, trap.frame.rip), (trap::DE, aam0()));
    let trap = run(&Frame { rdx: minus_one, rax: (1 << 63) + 1, rbx: minus_one, ..Frame::kernel(idiv64()) });
    t.eq(
        "idiv64 largest",
        (trap.frame.vector, trap.frame.rax, trap.frame.rdx),
        (trap::UD, i64::MAX as u64, 0),
    );
    t.end()
}
