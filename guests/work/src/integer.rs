//! User-mode integer work. Buffers are made before the loop, so that the kernel has no part in it.

use std::collections::HashMap;
use std::fmt::Write;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::hint::black_box;

use crate::tool::{Random, mix, text};

/// SHA-256's round constants, made as FIPS 180-4 section 4.2.2 says: from the cube roots of the first primes.
fn round_constants() -> [u32; 64] {
    let mut constants = [0; 64];
    let primes = (2u64..).filter(|n| (2..*n).all(|d| n % d != 0));
    for (constant, prime) in constants.iter_mut().zip(primes) {
        // floor(2^32 × cbrt(prime)), by bisection of the cube: exact, where floating point need not be.
        let (mut low, mut high) = (0u128, 1u128 << 36);
        while high - low > 1 {
            let middle = (low + high) / 2;
            if middle.pow(3) <= u128::from(prime) << 96 { low = middle } else { high = middle }
        }
        *constant = low as u32;
    }
    constants
}

/// One block of SHA-256 (FIPS 180-4, section 6.2.2).
fn sha256_block(state: &mut [u32; 8], block: &[u8], constants: &[u32; 64]) {
    let mut w = [0u32; 64];
    for (word, bytes) in w.iter_mut().zip(block.as_chunks::<4>().0) {
        *word = u32::from_be_bytes(*bytes);
    }
    for t in 16..64 {
        let s0 = w[t - 15].rotate_right(7) ^ w[t - 15].rotate_right(18) ^ w[t - 15] >> 3;
        let s1 = w[t - 2].rotate_right(17) ^ w[t - 2].rotate_right(19) ^ w[t - 2] >> 10;
        w[t] = w[t - 16].wrapping_add(s0).wrapping_add(w[t - 7]).wrapping_add(s1);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for t in 0..64 {
        let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let choice = e & f ^ !e & g;
        let t1 = h.wrapping_add(s1).wrapping_add(choice).wrapping_add(constants[t]).wrapping_add(w[t]);
        let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let t2 = s0.wrapping_add(a & b ^ a & c ^ b & c);
        (h, g, f, e, d, c, b, a) = (g, f, e, d.wrapping_add(t1), c, b, a, t1.wrapping_add(t2));
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *word = word.wrapping_add(add);
    }
}

/// SHA-256 of 64 KiB.
pub fn hash(iterations: u64) -> u64 {
    let constants = round_constants();
    let mut data = text(64 << 10, 1).into_bytes();
    data.truncate(64 << 10);
    let mut state = [
        0x6a09_e667,
        0xbb67_ae85,
        0x3c6e_f372,
        0xa54f_f53a,
        0x510e_527f,
        0x9b05_688c,
        0x1f83_d9ab,
        0x5be0_cd19,
    ];
    for _ in 0..iterations {
        data.chunks_exact(64).for_each(|block| sha256_block(&mut state, block, &constants));
    }
    state.iter().fold(0, |sum, &word| mix(sum, word.into()))
}

/// 20,000 insertions into a hash map (SipHash), as many look-ups, and removals.
pub fn hashmap(iterations: u64) -> u64 {
    let mut map: HashMap<u64, u64, BuildHasherDefault<DefaultHasher>> = HashMap::default();
    let mut sum = 0;
    for round in 0..iterations {
        let keys = || {
            let mut random = Random::new(round);
            (0..20_000).map(move |_| random.next() >> 48)
        };
        keys().for_each(|key| *map.entry(key).or_insert(0) += key);
        sum = keys().fold(sum, |sum, key| mix(sum, map.get(&(key ^ 1)).copied().unwrap_or(7)));
        sum = keys().filter_map(|key| map.remove(&key)).fold(sum, mix);
    }
    sum
}

/// Sorts 64 Ki numbers, unstably, then their indices, stably.
pub fn sort(iterations: u64) -> u64 {
    let mut numbers = vec![0u64; 64 << 10];
    let mut indices = vec![0u32; numbers.len()];
    let mut sum = 0;
    for round in 0..iterations {
        let mut random = Random::new(round);
        numbers.fill_with(|| random.next());
        (0..).zip(&mut indices).for_each(|(n, index)| *index = n);
        indices.sort_by_key(|&n| numbers[n as usize] >> 40);
        numbers.sort_unstable();
        sum = numbers.iter().step_by(97).fold(sum, |sum, &n| mix(sum, n));
        sum = indices.iter().step_by(97).fold(sum, |sum, &n| mix(sum, n.into()));
    }
    sum
}

/// The shortest copy that is worth its three bytes.
const SHORTEST: usize = 4;

/// A small LZ77: runs of literals (length below 128, bytes) and copies (128 + length - 4, distance in two bytes).
fn pack(data: &[u8], heads: &mut [u32], out: &mut Vec<u8>) {
    heads.fill(u32::MAX);
    let (mut at, mut literals) = (0, 0);
    let flush = |out: &mut Vec<u8>, bytes: &[u8]| {
        for run in bytes.chunks(127) {
            out.push(run.len() as u8);
            out.extend_from_slice(run);
        }
    };
    while at + SHORTEST <= data.len() {
        let word = u32::from_le_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]);
        let slot = (word.wrapping_mul(0x9e37_79b1) >> 20) as usize % heads.len();
        let before = heads[slot] as usize;
        heads[slot] = at as u32;
        let far = before > at || at - before > 0xffff;
        let most = (data.len() - at).min(SHORTEST + 127);
        let same = |before: usize| {
            data[before..].iter().zip(&data[at..at + most]).take_while(|(a, b)| a == b).count()
        };
        let length = if far { 0 } else { same(before) };
        if length < SHORTEST {
            at += 1;
            continue;
        }
        flush(out, &data[literals..at]);
        out.push(128 + (length - SHORTEST) as u8);
        out.extend_from_slice(&((at - before) as u16).to_le_bytes());
        at += length;
        literals = at;
    }
    flush(out, &data[literals..]);
}

fn unpack(mut packed: &[u8], out: &mut Vec<u8>) {
    while let [token, rest @ ..] = packed {
        let token = usize::from(*token);
        if token < 128 {
            out.extend_from_slice(&rest[..token]);
            packed = &rest[token..];
        } else {
            let from = out.len() - usize::from(u16::from_le_bytes([rest[0], rest[1]]));
            (from..from + token - 128 + SHORTEST).for_each(|n| out.push(out[n]));
            packed = &rest[2..];
        }
    }
}

/// Compresses 64 KiB of text and unpacks it again.
pub fn compress(iterations: u64) -> u64 {
    let data = text(64 << 10, 2).into_bytes();
    let (mut heads, mut packed, mut unpacked) = (vec![0; 4096], Vec::new(), Vec::new());
    let mut sum = 0;
    for _ in 0..iterations {
        packed.clear();
        unpacked.clear();
        pack(black_box(&data), &mut heads, &mut packed);
        unpack(&packed, &mut unpacked);
        sum = mix(sum, mix(packed.len() as u64, (unpacked == data).into()));
    }
    packed.iter().fold(sum, |sum, &byte| mix(sum, byte.into()))
}

/// An instruction of a small stack machine.
#[derive(Clone, Copy)]
enum Op {
    Push(i64),
    Load(u8),
    Store(u8),
    Add,
    Multiply,
    And,
    ShiftRight,
    Dup,
    Less,
    JumpIf(u16),
    JumpIfNot(u16),
    Jump(u16),
    End,
}

/// Counts the steps of the Collatz sequences from 1 to local 0, into local 1.
const COLLATZ: [Op; 32] = {
    use Op::*;
    [
        // 0: n = i (i in local 0, n in local 2)
        Load(0),
        Store(2),
        // 2: while 1 < n
        Push(1),
        Load(2),
        Less,
        JumpIfNot(23),
        // 6: steps += 1
        Load(1),
        Push(1),
        Add,
        Store(1),
        // 10: odd?
        Load(2),
        Dup,
        Push(1),
        And,
        JumpIf(18),
        // 15: even: n >>= 1
        ShiftRight,
        Store(2),
        Jump(2),
        // 18: odd: n = 3 n + 1
        Push(3),
        Multiply,
        Push(1),
        Add,
        Jump(30),
        // 23: i -= 1; again until 0
        Load(0),
        Push(-1),
        Add,
        Dup,
        Store(0),
        JumpIf(0),
        End,
        // 30: on with the n that is on the stack
        Store(2),
        Jump(2),
    ]
};

fn execute(code: &[Op], locals: &mut [i64; 4]) -> u64 {
    let mut stack = [0i64; 16];
    let (mut top, mut at, mut steps) = (0usize, 0usize, 0u64);
    loop {
        let Some(&op) = code.get(at) else { return steps };
        at += 1;
        steps += 1;
        match op {
            Op::Push(value) => {
                stack[top & 15] = value;
                top += 1;
            }
            Op::Load(local) => {
                stack[top & 15] = locals[usize::from(local & 3)];
                top += 1;
            }
            Op::Store(local) => {
                top -= 1;
                locals[usize::from(local & 3)] = stack[top & 15];
            }
            Op::Add | Op::Multiply | Op::And | Op::Less => {
                top -= 1;
                let (a, b) = (stack[(top - 1) & 15], stack[top & 15]);
                stack[(top - 1) & 15] = match op {
                    Op::Add => a.wrapping_add(b),
                    Op::Multiply => a.wrapping_mul(b),
                    Op::And => a & b,
                    _ => (a < b).into(),
                };
            }
            Op::ShiftRight => stack[(top - 1) & 15] >>= 1,
            Op::Dup => {
                stack[top & 15] = stack[(top - 1) & 15];
                top += 1;
            }
            Op::JumpIf(to) | Op::JumpIfNot(to) => {
                top -= 1;
                if (stack[top & 15] != 0) == matches!(op, Op::JumpIf(_)) {
                    at = to.into();
                }
            }
            Op::Jump(to) => at = to.into(),
            Op::End => return steps,
        }
    }
}

/// An interpreter's loop: a match on an instruction, which is an indirect jump.
pub fn interpreter(iterations: u64) -> u64 {
    let mut sum = 0;
    for _ in 0..iterations {
        let mut locals = [1500, 0, 0, 0];
        let steps = execute(black_box(&COLLATZ), &mut locals);
        sum = mix(sum, mix(steps, locals[1] as u64));
    }
    sum
}

#[derive(Default)]
struct Node {
    key: u64,
    left: Option<Box<Node>>,
    right: Option<Box<Node>>,
}

fn insert(mut place: &mut Option<Box<Node>>, key: u64) {
    while let Some(node) = place {
        place = if key < node.key { &mut node.left } else { &mut node.right };
    }
    *place = Some(Box::new(Node { key, ..Node::default() }));
}

fn depth(root: &Option<Box<Node>>, key: u64) -> u64 {
    let (mut node, mut depth) = (root, 0);
    while let Some(here) = node {
        if here.key == key {
            break;
        }
        node = if key < here.key { &here.left } else { &here.right };
        depth += 1;
    }
    depth
}

/// Builds a binary tree of 8,000 nodes, each allocated for itself, looks all of them up, and drops it.
pub fn tree(iterations: u64) -> u64 {
    let mut sum = 0;
    for round in 0..iterations {
        let mut root = None;
        let mut random = Random::new(round);
        (0..8000).for_each(|_| insert(&mut root, random.next()));
        let mut random = Random::new(round);
        sum = (0..8000).fold(sum, |sum, _| mix(sum, depth(&root, random.next())));
    }
    sum
}

#[inline(never)]
fn fibonacci(n: u64) -> u64 {
    if n < 2 { n } else { black_box(fibonacci(n - 1)) + fibonacci(n - 2) }
}

#[inline(never)]
fn ackermann(m: u64, n: u64) -> u64 {
    match (m, n) {
        (0, n) => n + 1,
        (m, 0) => black_box(ackermann(m - 1, 1)),
        (m, n) => {
            let inner = ackermann(m, n - 1);
            black_box(ackermann(m - 1, inner))
        }
    }
}

/// Moves `count` discs from one peg to another; a peg is the number of discs on it.
#[inline(never)]
fn hanoi(count: u64, pegs: &mut [u64; 3], from: usize, to: usize) -> u64 {
    if count == 0 {
        return 0;
    }
    let other = 3 - from - to;
    let before = hanoi(count - 1, pegs, from, other);
    pegs[from] -= 1;
    pegs[to] += 1;
    before + 1 + hanoi(count - 1, pegs, other, to)
}

/// Calls and returns.
pub fn recursion(iterations: u64) -> u64 {
    let mut sum = 0;
    for _ in 0..iterations {
        let mut pegs = [16, 0, 0];
        sum = mix(sum, fibonacci(black_box(25)));
        sum = mix(sum, ackermann(black_box(2), 200));
        sum = mix(sum, hanoi(16, &mut pegs, 0, 2) + pegs[2]);
    }
    sum
}

/// Follows pointers through 4 MiB, in a circle of cache lines in no order (Sattolo's algorithm).
pub fn chase(iterations: u64) -> u64 {
    #[derive(Clone, Copy)]
    #[repr(align(64))]
    struct Line(u32);
    let count = 4 << 20 >> 6;
    let mut lines: Vec<Line> = (0..count).map(Line).collect();
    let mut random = Random::new(3);
    for n in (1..lines.len()).rev() {
        lines.swap(n, random.below(n));
    }
    let mut at = 0;
    for _ in 0..iterations {
        at = lines[at as usize].0;
    }
    at.into()
}

/// Copies, fills and compares: half a MiB at once, and 2,000 small pieces of up to 256 bytes.
pub fn copy(iterations: u64) -> u64 {
    let mut from: Vec<u8> = (0..512 << 10).map(|n: u32| ((n * 7) >> 3) as u8).collect();
    let mut to = vec![0u8; from.len()];
    let mut sum = 0;
    for round in 0..iterations {
        from[0] = round as u8;
        to.copy_from_slice(black_box(&from));
        let mut random = Random::new(round);
        for _ in 0..2000 {
            let (a, b, length) = (random.below(500_000), random.below(500_000), random.below(256));
            to[b..b + length].copy_from_slice(&from[a..a + length]);
        }
        to.copy_within(..256 << 10, 100);
        sum = mix(sum, (from.iter().zip(&to).position(|(a, b)| a != b)).map_or(0, |n| n as u64));
        sum = mix(sum, (to[300_000..] == from[300_000..]).into());
        to[400_000..].fill(round as u8);
    }
    to.iter().step_by(61).fold(sum, |sum, &byte| mix(sum, byte.into()))
}

/// Searches, splits, parses and formats text.
pub fn strings(iterations: u64) -> u64 {
    let data = text(32 << 10, 4).into_bytes();
    let mut out = String::with_capacity(64 << 10);
    let mut sum = 0;
    for round in 0..iterations {
        let Ok(text) = std::str::from_utf8(black_box(&data)) else { return 0 };
        sum = mix(sum, text.matches("processor and").count() as u64);
        sum = mix(sum, text.chars().filter(|c| c.is_alphabetic()).count() as u64);
        out.clear();
        for (n, line) in text.lines().enumerate() {
            let numbers: u64 = line.split(' ').filter_map(|word| word.parse::<u64>().ok()).sum();
            // Writing to a string cannot fail.
            let _ = writeln!(out, "{n:4} {numbers:#x} {:>20} {}", line.len(), line.to_uppercase());
        }
        sum = mix(sum, out.rfind("LODGE").map_or(round, |n| n as u64));
    }
    out.bytes().fold(sum, |sum, byte| mix(sum, byte.into()))
}
