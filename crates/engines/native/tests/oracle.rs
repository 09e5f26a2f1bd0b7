//! The oracle itself: known instructions, faults, system calls, death.

use native::oracle::{CODE, CODE_END, Case, CpuImage, DATA, End, Mode, Oracle, READ_ONLY, WINDOW};

fn case(code: &[u8]) -> Case {
    let gpr = std::array::from_fn(|i| 0x1111_1111_1111_1111 * i as u64);
    let mut image = CpuImage { gpr, ..CpuImage::default() };
    image.gpr[4] = DATA + 0x1000;
    Case {
        code: code.to_vec(),
        mode: Mode::Long,
        step: false,
        image,
        window: 0x1000 - WINDOW / 2,
        memory: [0; WINDOW],
    }
}

#[test]
fn known_instructions() {
    let mut oracle = Oracle::new().unwrap();
    let add = case(&[0x48, 0x01, 0xd8]); // add rax, rbx
    let push = case(&[0x50 + 3]); // push rbx
    let mut step = add.clone();
    step.step = true;
    let jump = Case { step: true, ..case(&[0xeb, 0x10]) };
    let mut last = case(&[0x48, 0x01, 0xd8]);
    last.image.rip = CODE_END - 3;
    let replies = oracle.run(&[add, push, step, jump, last]).unwrap();
    for reply in &replies {
        assert_eq!(reply.end, End::Completed);
        assert!(!reply.strayed);
    }
    for i in [0, 2, 4] {
        assert_eq!(replies[i].image.gpr[0], 0x3333_3333_3333_3333);
        assert_eq!(replies[i].image.gpr[1..4], [1, 2, 3].map(|i| i * 0x1111_1111_1111_1111)[..]);
        assert_eq!(replies[i].image.gpr[4], DATA + 0x1000);
    }
    assert_eq!(replies[0].image.rip, CODE + 3);
    assert_eq!(replies[1].image.gpr[4], DATA + 0x1000 - 8);
    assert_eq!(replies[1].memory[WINDOW / 2 - 8..WINDOW / 2], [0x33; 8]);
    assert_eq!(replies[2].image, replies[0].image);
    assert_eq!(replies[3].image.rip, CODE + 0x12);
    assert_eq!(replies[4].image.rip, CODE_END);
}

#[test]
fn faults() {
    let mut oracle = Oracle::new().unwrap();
    let at = |code: &[u8], rax: u64| {
        let mut case = case(code);
        case.image.gpr[0] = rax;
        case
    };
    let mut fetch = case(&[0x48, 0xb8]); // mov rax, imm64, cut off by the end of the pages
    fetch.image.rip = CODE_END - 2;
    let mut divide = case(&[0xf7, 0xf1]);
    divide.image.gpr[1] = 0;
    let mut simd = case(&[0x0f, 0x5e, 0xc0]); // divps xmm0, xmm0: 0 / 0
    simd.image.simd.mxcsr = 0x1f00;
    let mut x87 = case(&[0xd8, 0xc1]); // fadd with an unmasked exception pending
    x87.image.simd.fcw = 0x37e;
    x87.image.simd.fsw = 0x8081;
    let mut aligned = at(&[0x8b, 0x18], DATA + 1);
    aligned.image.rflags |= 1 << 18;
    let cases = [
        (at(&[0x8b, 0x18], DATA - 4), 14, 4, DATA - 4),
        (at(&[0x89, 0x18], DATA + 0x1ffe), 14, 6, DATA + 0x2000),
        (at(&[0x89, 0x18], READ_ONLY), 14, 7, READ_ONLY),
        (at(&[0x8b, 0x18], 1 << 63), 13, 0, 0),
        (fetch, 14, 0x14, CODE_END),
        (divide, 0, 0, 0),
        (case(&[0x0f, 0x0b]), 6, 0, 0),
        (case(&[0xf4]), 13, 0, 0),
        (case(&[0xcd, 0x81]), 13, 0x81 * 8 + 2, 0),
        (simd, 19, 0, 0),
        (x87, 16, 0, 0),
        (aligned, 17, 0, 0),
        (case(&[0xcc]), 3, 0, 0),
    ];
    let replies = oracle.run(&cases.clone().map(|case| case.0)).unwrap();
    for ((case, vector, error, address), reply) in cases.iter().zip(&replies) {
        let fault = End::Fault { vector: *vector, error: *error, address: *address };
        assert_eq!(reply.end, fault, "{:x?}", case.code);
    }
    // A fault leaves the registers as they were, MXCSR's flag apart.
    assert_eq!(replies[0].image, cases[0].0.image);
    assert_eq!(replies[9].image.simd.mxcsr, 0x1f01);
}

#[test]
fn system_calls_are_refused() {
    let mut oracle = Oracle::new().unwrap();
    let mut exit = case(&[0x0f, 0x05]);
    exit.image.gpr[0] = 231;
    let mut old = case(&[0xcd, 0x80]);
    old.image.gpr[0] = 1;
    let replies = oracle.run(&[exit, old, case(&[0x90])]).unwrap();
    assert_eq!(replies[0].end, End::Syscall);
    assert_ne!(replies[1].end, End::Died);
    assert_eq!(replies[2].end, End::Completed);
}

#[test]
fn a_hanging_case_is_reported_and_the_rest_goes_on() {
    let mut oracle = Oracle::new().unwrap();
    let replies = oracle.run(&[case(&[0x90]), case(&[0xeb, 0xfe]), case(&[0x90])]).unwrap();
    assert_eq!(replies[0].end, End::Completed);
    assert_eq!(replies[1].end, End::Died);
    assert_eq!(replies[2].end, End::Completed);
}

#[test]
fn compatibility_mode() {
    let mut oracle = Oracle::new().unwrap();
    let compat = |code: &[u8], eax: u64| {
        let mut case = case(code);
        case.mode = Mode::Compat32;
        case.image.gpr[0] = eax;
        case
    };
    let bound = |index: u64| {
        let mut case = compat(&[0x62, 0x03], index); // bound eax, [ebx]
        case.image.gpr[3] = DATA + 0x1000;
        case.memory[WINDOW / 2 + 4] = 9;
        case
    };
    let mut into = compat(&[0xce], 0);
    into.image.rflags |= 1 << 11;
    let cases = [
        compat(&[0x37], 0x0f),        // aaa
        compat(&[0x40], 0xffff_ffff), // inc eax
        compat(&[0x60], 0),           // pusha
        bound(5),
        bound(10),
        into,
        Case { step: true, ..compat(&[0xeb, 0x10], 0) },
    ];
    let replies = oracle.run(&cases).unwrap();
    assert_eq!(replies[0].end, End::Completed);
    assert_eq!(replies[0].image.gpr[0] as u32, 0x105);
    assert_eq!(replies[1].image.gpr[0] as u32, 0);
    assert_eq!(replies[2].image.gpr[4] as u32, DATA as u32 + 0x1000 - 32);
    assert_eq!(replies[3].end, End::Completed);
    assert_eq!(replies[4].end, End::Fault { vector: 5, error: 0, address: 0 });
    assert_eq!(replies[5].end, End::Fault { vector: 4, error: 0, address: 0 });
    assert_eq!(replies[6].image.rip, CODE + 0x12);
}

#[test]
fn sixteen_bit_code() {
    let mut oracle = Oracle::new().unwrap();
    if !oracle.has_16_bit() {
        println!("skipped: this system has no modify_ldt");
        return;
    }
    let short = |code: &[u8]| {
        let mut case = case(code);
        case.mode = Mode::Protected16;
        case.image.rip = 0x1100;
        case.image.gpr = [0xaaaa_0000; 16];
        case.image.gpr[4] = 0x1000;
        case.image.gpr[3] = 0x0ffe;
        case.image.gpr[6] = 0x0001;
        case
    };
    let mut load = short(&[0x8b, 0x00]); // mov ax, [bx+si]
    load.memory[WINDOW / 2 - 1..][..2].copy_from_slice(&[0x34, 0x12]);
    let mut beyond = short(&[0x8b, 0x07]); // mov ax, [bx]
    beyond.image.gpr[3] = 0x1fff;
    let mut stack = short(&[0x50]);
    stack.image.gpr[4] = 1;
    let cases = [load, short(&[0x66, 0x60]), beyond, stack, Case { step: true, ..short(&[0xeb, 0x10]) }];
    let replies = oracle.run(&cases).unwrap();
    assert_eq!((replies[0].end, replies[0].image.gpr[0]), (End::Completed, 0xaaaa_1234));
    assert_eq!(replies[0].image.rip, 0x1102);
    assert_eq!((replies[1].end, replies[1].image.gpr[4] as u32), (End::Completed, 0x1000 - 32));
    assert_eq!(replies[2].end, End::Fault { vector: 13, error: 0, address: 0 });
    assert_eq!(replies[3].end, End::Fault { vector: 12, error: 0, address: 0 });
    assert_eq!((replies[4].end, replies[4].image.rip), (End::Completed, 0x1112));
}
