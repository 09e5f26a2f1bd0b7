//! Lockstep notices what the translator does wrong.

use machine::cpu::Exit;

use super::{Bench, CODE};

/// mov rax, [rbx]; add rax, 5; mov [rbx + 8], rax; ud2
const CODE_BYTES: &[u8] = b"\x48\x8b\x03\x48\x83\xc0\x05\x48\x89\x43\x08\x0f\x0b";
const ADD: &[u8] = b"\x48\x83\xc0\x05";
/// mov [rbx + rsi + …], rax
const STORE: &[u8] = b"\x48\x89\x44\x33";

fn bench(spoil: Option<fn(&mut [u8])>) -> Bench {
    let mut gpr = [0; 16];
    gpr[3] = 0x2_0000;
    let mut bench = Bench::new(64, CODE_BYTES, &gpr);
    bench.memory.write(0x2_0000, &0x1000u64.to_le_bytes());
    bench.cpu.cache.spoil = spoil;
    bench.cpu.lockstep();
    bench
}

#[test]
fn code_that_is_right_passes() {
    let mut bench = bench(None);
    assert_eq!(bench.run().unwrap(), Exit::TripleFault);
    let mut word = [0; 8];
    bench.memory.read(0x2_0008, &mut word);
    assert_eq!(u64::from_le_bytes(word), 0x1005);
}

#[test]
fn a_wrong_constant_is_found_and_told_with_the_block() {
    let mut bench = bench(Some(|code| {
        let at = code.windows(4).position(|w| w == ADD).unwrap();
        code[at + 3] = 6;
    }));
    let text = bench.run().unwrap_err().to_string();
    for part in [
        "a bug",
        "differs from the reference engine",
        "RAX is 0x1006, should be 0x1005",
        "the byte at 0x20008 in guest memory is 0x6, should be 0x5",
        &format!("{CODE:#x}: 48 8b 03"),
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}

#[test]
fn a_store_to_the_wrong_place_is_found() {
    let mut bench = bench(Some(|code| {
        let at = code.windows(4).position(|w| w == STORE).unwrap();
        code[at + 4] = 0x10;
    }));
    let text = bench.run().unwrap_err().to_string();
    assert!(text.contains("the byte at 0x20008 in guest memory is 0x0, should be 0x5"), "{text}");
}
