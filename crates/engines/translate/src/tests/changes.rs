//! Code that changes while it is rewritten.

use machine::cpu::Vcpu;

use super::{Bench, CODE, state};

/// mov eax, 1; mov cr2, rax (which serializes); dec ecx; jnz to the first; ud2
const BEFORE: &[u8] = b"\xb8\x01\x00\x00\x00\x0f\x22\xd0\xff\xc9\x75\xf4\x0f\x0b";
/// The second byte of `mov eax, 2`.
const AFTER: &[u8] = b"\x02";

/// Runs the loop at `at` three times, while another vCPU changes it as soon as it has been read first.
#[track_caller]
fn is_noticed(at: u64) {
    let mut gpr = [0; 16];
    gpr[1] = 3;
    let mut bench = Bench::new(64, &[], &gpr);
    bench.memory.write(at, BEFORE);
    let memory = bench.memory.clone();
    bench.cpu.cache.meanwhile = Some(Box::new(move || assert!(memory.write(at + 1, AFTER))));
    let mut start = state(64, &gpr);
    start.rip = at;
    bench.cpu.set_state(&start).unwrap();
    bench.run().unwrap();
    assert!(bench.cpu.cache.meanwhile.is_none(), "it was rewritten");
    assert_eq!(bench.cpu.state().unwrap().gpr[..2], [2, 0], "at {at:#x}");
}

#[test]
fn a_store_while_a_block_is_made() {
    is_noticed(CODE);
}

#[test]
fn a_store_while_a_block_of_two_pages_is_made() {
    (1..5).for_each(|bytes| is_noticed(CODE + 0x1000 - bytes));
}
