//! Every listed instruction, by its stub and by the whole processor: the same registers, flags, memory, exceptions.

mod common;

use std::collections::BTreeMap;

use common::{OPERAND, Random};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, Register};
use native::oracle::{Case, DATA, End, Mode, Oracle, Reply, WINDOW};
use native::{Bounce, Outcome, Stubs, Unsupported};

/// Offset of the window in the data pages, and of the operand in the window.
const WINDOW_AT: usize = (OPERAND - DATA) as usize - 64;
const AT: usize = 64;

/// How many random states per instruction; more with LODGE_CASES.
fn cases_per_instruction() -> usize {
    std::env::var("LODGE_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(64)
}

fn case(code: &[u8], random: &mut Random) -> Case {
    let mut memory = [0; WINDOW];
    memory[AT..AT + 64].copy_from_slice(&common::operand(random));
    let image = common::image(random);
    Case { code: code.to_vec(), mode: Mode::Long, step: false, image, window: WINDOW_AT, memory }
}

/// Known differences, documented in `float`: PE beside an unmasked underflow; the flags of the stages of DPPS;
/// unmasked underflow of VCVTPS2PH.
const PE_BESIDE_UNDERFLOW: u32 = 1 << 5;
const STAGED: [Mnemonic; 4] = [Mnemonic::Dpps, Mnemonic::Dppd, Mnemonic::Vdpps, Mnemonic::Vdppd];

/// Runs the stub on the state of `case` and says how it differs from what the processor did.
fn difference(stubs: &mut Stubs, instruction: &Instruction, case: &Case, truth: &Reply) -> Option<String> {
    let id = stubs.compile(instruction).expect("compiled before");
    let mut image = case.image.clone();
    let mut bounce = Bounce::default();
    bounce.bytes.copy_from_slice(&case.memory[AT..AT + 64]);
    let outcome = stubs.run(id, &mut image.simd, &mut image.gpr, &mut image.rflags, &mut bounce);
    let expected = match truth.end {
        End::Fault { vector: 19, .. } if instruction.mnemonic() == Mnemonic::Vcvtps2ph => return None,
        End::Completed => matches!(outcome, Outcome::Done | Outcome::NotStored),
        End::Fault { vector: 19, .. } => outcome == Outcome::SimdException,
        End::Fault { vector: 16, .. } => outcome == Outcome::PendingX87,
        _ => false,
    };
    if !expected {
        return Some(format!("outcome {outcome:?} for {:?}", truth.end));
    }
    if outcome == Outcome::NotStored && truth.memory != case.memory {
        return Some("said not stored".into());
    }
    if matches!(outcome, Outcome::Done) && bounce.bytes != truth.memory[AT..AT + 64] {
        return Some(format!("memory {:x?} for {:x?}", bounce.bytes, &truth.memory[AT..AT + 64]));
    }
    let mut real = truth.image.clone();
    let allowed = if STAGED.contains(&instruction.mnemonic()) { 0x3f } else { PE_BESIDE_UNDERFLOW };
    if outcome == Outcome::SimdException && (image.simd.mxcsr ^ real.simd.mxcsr) & !allowed == 0 {
        real.simd.mxcsr = image.simd.mxcsr;
    }
    let pointers = (image.simd.fop, image.simd.fip, image.simd.fdp);
    assert_eq!(pointers, (0, 0, 0), "a pointer of the host's reached the guest");
    (real.simd.fop, real.simd.fip, real.simd.fdp) = pointers;
    let undefined = u64::from(instruction.rflags_undefined());
    let flags = if undefined == 0 { 0x8d5 } else { 0x8d5 & !undefined_bits(instruction) };
    let differs = [
        ("ymm", image.simd.ymm != real.simd.ymm),
        ("mxcsr", image.simd.mxcsr != real.simd.mxcsr),
        ("fpr", image.simd.fpr != real.simd.fpr),
        ("fcw", image.simd.fcw != real.simd.fcw),
        ("fsw", image.simd.fsw != real.simd.fsw),
        ("ftw", image.simd.ftw != real.simd.ftw),
        ("gpr", image.gpr != real.gpr),
        ("flags", (image.rflags ^ real.rflags) & flags != 0),
    ];
    let names: Vec<_> = differs.iter().filter(|(_, differs)| *differs).map(|(name, _)| *name).collect();
    if names.is_empty() {
        return None;
    }
    let before = &case.image.simd;
    Some(format!(
        "{names:?} (end {:?}) mxcsr {:x} -> {:x} for {:x}, fsw {:x} -> {:x} for {:x}, fcw {:x}, ftw {:x} -> {:x} for {:x}",
        truth.end,
        before.mxcsr,
        image.simd.mxcsr,
        real.simd.mxcsr,
        before.fsw,
        image.simd.fsw,
        real.simd.fsw,
        before.fcw,
        before.ftw,
        image.simd.ftw,
        real.simd.ftw
    ))
}

fn undefined_bits(instruction: &Instruction) -> u64 {
    use iced_x86::RflagsBits as B;
    let map = [(B::CF, 0), (B::PF, 2), (B::AF, 4), (B::ZF, 6), (B::SF, 7), (B::OF, 11)];
    let undefined = instruction.rflags_undefined();
    map.iter().filter(|(bit, _)| undefined & bit != 0).fold(0, |flags, (_, at)| flags | 1 << at)
}

#[test]
fn stubs_agree_with_the_processor() {
    let mut random = Random::new();
    let mut oracle = Oracle::new().unwrap();
    let mut stubs = Stubs::new().unwrap();
    let mut wrong: BTreeMap<String, (usize, String)> = BTreeMap::new();
    let (mut forms, mut total) = (0, 0);
    for code in Code::values().filter(|&code| native::listed(code)) {
        let mut tried = false;
        for _ in 0..4 {
            let Some((instruction, bytes)) = common::instruction(code, &mut random) else { continue };
            match stubs.compile(&instruction) {
                Ok(_) => {}
                Err(Unsupported::HostLacks) => continue,
                Err(Unsupported::Full) => {
                    stubs.reset();
                    stubs.compile(&instruction).unwrap();
                }
                Err(error) => panic!("{code:?}: {error}"),
            }
            tried = true;
            let cases: Vec<_> = (0..cases_per_instruction() / 4).map(|_| case(&bytes, &mut random)).collect();
            for (case, truth) in cases.iter().zip(oracle.run(&cases).unwrap()) {
                total += 1;
                if let Some(text) = difference(&mut stubs, &instruction, case, &truth) {
                    wrong.entry(format!("{code:?}")).or_insert((0, text)).0 += 1;
                }
            }
        }
        forms += usize::from(tried);
    }
    println!("{forms} forms, {total} cases");
    assert!(forms > 700, "only {forms} forms were tried");
    for (code, (count, text)) in &wrong {
        println!("{code}: {count} wrong, first: {text}");
    }
    assert!(wrong.is_empty(), "{} forms differ", wrong.len());
}

#[test]
fn the_host_keeps_its_own_controls() {
    let mut random = Random::new();
    let mut stubs = Stubs::new().unwrap();
    for code in Code::values().filter(|&code| native::listed(code)) {
        let Some((instruction, bytes)) = common::instruction(code, &mut random) else { continue };
        let Ok(id) = stubs.compile(&instruction) else { continue };
        for _ in 0..8 {
            let Case { mut image, .. } = case(&bytes, &mut random);
            let mut bounce = Bounce::default();
            stubs.run(id, &mut image.simd, &mut image.gpr, &mut image.rflags, &mut bounce);
            let (mut mxcsr, mut x87) = (0u32, [0u16; 14]);
            // SAFETY: store MXCSR and the x87 environment to variables of their size; FLDENV undoes the mask that
            // FNSTENV sets.
            unsafe {
                std::arch::asm!(
                    "stmxcsr [{}]", "fnstenv [{1}]", "fldenv [{1}]",
                    in(reg) &mut mxcsr, in(reg) &mut x87,
                );
            }
            assert_eq!(mxcsr & !0x3f, 0x1f80, "{code:?}");
            let (control, status, tags) = (x87[0], x87[2], x87[4]);
            assert_eq!((control, status & 0xb880, tags), (0x37f, 0, 0xffff), "{code:?}: {x87:x?}");
        }
    }
}

#[test]
fn code_is_never_writable_and_executable() {
    let mut random = Random::new();
    let mut stubs = Stubs::new().unwrap();
    let (instruction, _) = common::instruction(Code::Addps_xmm_xmmm128, &mut random).unwrap();
    stubs.compile(&instruction).unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(maps.contains(" r-xp "));
    assert!(!maps.lines().any(|line| line.contains(" rwx")), "{maps}");
}

#[test]
fn a_full_buffer_says_so_and_a_reset_makes_old_ids_stale() {
    let mut stubs = Stubs::new().unwrap();
    let shuffle = |a: u32, b: u32, immediate: u32| {
        Instruction::with3(Code::Shufps_xmm_xmmm128_imm8, Register::XMM0 + a, Register::XMM0 + b, immediate)
            .unwrap()
    };
    let first = stubs.compile(&shuffle(0, 0, 0)).unwrap();
    assert_eq!(stubs.compile(&shuffle(0, 0, 0)), Ok(first));
    let full = (0..65536).find_map(|i| stubs.compile(&shuffle(i & 15, i >> 4 & 15, i >> 8)).err());
    assert_eq!(full, Some(Unsupported::Full));
    stubs.reset();
    let second = stubs.compile(&shuffle(1, 2, 0)).unwrap();
    let Case { mut image, .. } = case(&[], &mut Random::new());
    let before = image.clone();
    let mut run =
        |id| stubs.run(id, &mut image.simd, &mut image.gpr, &mut image.rflags, &mut Bounce::default());
    assert_eq!(run(first), Outcome::Stale);
    assert_eq!(run(second), Outcome::Done);
    assert_eq!(image.gpr, before.gpr);
}

#[test]
fn bad_prefixes_and_operands_are_refused() {
    let mut stubs = Stubs::new().unwrap();
    let mut compile = |bytes: &[u8]| {
        stubs.compile(&Decoder::new(64, bytes, DecoderOptions::NO_INVALID_CHECK).decode()).map(|_| ())
    };
    assert_eq!(compile(&[0xf0, 0x0f, 0x58, 0x08]), Err(Unsupported::NotListed)); // lock addps
    assert_eq!(compile(&[0xc4, 0xe2, 0x71, 0x92, 0x04, 0x10]), Err(Unsupported::NotListed)); // vgatherdps
    assert_eq!(compile(&[0x0f, 0xae, 0x10]), Err(Unsupported::NotListed)); // ldmxcsr
    assert_eq!(compile(&[0xcc]), Err(Unsupported::NotListed));
    assert_eq!(compile(&[0x64, 0x67, 0x0f, 0x58, 0x4c, 0xc8, 0x10]), Ok(())); // addps xmm1, fs:[eax+ecx*8+16]
    assert_eq!(compile(&[0x0f, 0x58, 0x0d, 0, 0, 0, 0]), Ok(())); // addps xmm1, [rip]
    assert_eq!(compile(&[0xf2, 0x0f, 0x38, 0xf0, 0xc4]), Ok(())); // crc32 eax, ah
}
