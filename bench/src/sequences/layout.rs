//! Where things are in the machines' memory, and what they hold before a case is put there.

use crate::fuzz::Random;

/// Where ring 0 sees memory from its start.
pub const KERNEL: u64 = 0x7000_0000;
/// Linear address of the two pages of code; behind them is nothing.
pub const CODE_AT: u64 = 0x40_0000;
/// Linear address of the eight pages of data; behind them is nothing.
pub const DATA_AT: u64 = 0x41_0000;
/// Linear address of the pages of code once more, to be written.
pub const ALIAS_AT: u64 = 0x42_0000;
/// Pages of data.
pub const DATA_PAGES: usize = 8;
/// Pages whose entries a case decides about.
pub const PAGES: usize = 12;
/// Their frames: two of code, eight of data, and those of code again. No two neighbours are neighbours in memory.
pub const FRAMES: [u64; PAGES] = [
    0x1_0000, 0x1_2000, 0x1_5000, 0x1_4000, 0x1_7000, 0x1_9000, 0x1_6000, 0x1_8000, 0x1_b000, 0x1_a000,
    0x1_0000, 0x1_2000,
];

pub const GDT: u64 = 0x1000;
const RETURNS: u64 = 0x1800;
/// Changes a page-table entry: code that does that to its own page may or may not be fetched in between.
pub const REMAP: u64 = 0x1a00;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
pub const TSS_32: u64 = 0x3800;
/// What ends a run: 16 bytes for each vector.
pub const HANDLERS: u64 = 0x4000;
pub const IDT_32: u64 = 0x6000;
pub const IDT_IST: u64 = 0x7000;
const IST_STACK: u64 = 0x8ff0;
/// A sum over the addresses at which single steps stopped.
const HASH: u64 = 0x8010;
const STACK: u64 = 0x9ff0;
pub const PML4: u64 = 0xa000;
const PDPT: u64 = 0xb000;
pub const PDPT_PAE: u64 = 0xc000;
const LOW: u64 = 0xd000;
/// The page table with the entries of [`FRAMES`].
pub const TABLE: u64 = 0xe000;
const MIDDLE: u64 = 0xf000;
/// Root of another address space, for ring 0 in 64-bit mode.
pub const OTHER_PML4: u64 = 0x5000;
const OTHER_PDPT: u64 = 0x1_1000;
const OTHER_LOW: u64 = 0x1_3000;
const OTHER_TABLE: u64 = 0;
/// Where it all ends.
pub const END: u64 = 0x1_c000;

/// Ports: a write ends the run, ends an interrupt, or asks for an interrupt. As code, they are NOP and
/// exchanges of registers: jumps may lead there.
pub const PORT: u64 = 0x90;
/// Vectors of interrupts.
pub const INTERRUPTS: std::ops::Range<u64> = 0x30..0x38;

/// Linear address of page `n` of [`FRAMES`], and where its entry lies.
pub fn page(n: usize) -> (u64, u64) {
    let linear = match n {
        0..2 => CODE_AT + 0x1000 * n as u64,
        2..10 => DATA_AT + 0x1000 * (n as u64 - 2),
        _ => ALIAS_AT + 0x1000 * (n as u64 - 10),
    };
    (linear, TABLE + 8 * (linear >> 12 & 511))
}

/// Memory from 0 to [`END`].
pub fn image() -> Vec<u8> {
    let mut bytes = vec![0; END as usize];
    let mut put = |at: u64, what: &[u8]| bytes[at as usize..][..what.len()].copy_from_slice(what);
    let mut word = |at: u64, value: u64| put(at, &value.to_le_bytes());
    // Code and data of ring 0, code of 32 bits; the same of ring 3; a small data segment; code
    // of 16 bits.
    for (n, descriptor) in [
        (1, 0x00af_9b00_0000_ffff),
        (2, 0x00cf_9300_0000_ffff),
        (3, 0x00cf_9b00_0000_ffff),
        (4, 0x00cf_fb00_0000_ffff),
        (5, 0x00cf_f300_0000_ffff),
        (6, 0x00af_fb00_0000_ffff),
        (7, 0x0040_f341_0000_2fff),
        (10, 0x008f_9b00_0000_ffff),
        (11, 0x008f_fb00_0000_ffff),
    ] {
        word(GDT + 8 * n, descriptor);
    }
    word(TSS + 4, KERNEL + STACK);
    word(TSS + 36, KERNEL + IST_STACK);
    word(TSS_32 + 4, (KERNEL + STACK) | 0x10 << 32);
    for vector in 0..256 {
        let (long, flat) = match vector {
            1 => (RETURNS, RETURNS + 0x40),
            v if INTERRUPTS.contains(&v) => (RETURNS + 0x80, RETURNS + 0xc0),
            v => (HANDLERS + 16 * v, HANDLERS + 16 * v),
        };
        let gate = |to: u64, selector: u64, ist: u64| {
            let to = KERNEL + to;
            to & 0xffff | selector << 16 | ist << 32 | 0xee00 << 32 | (to >> 16) << 48
        };
        word(IDT + 16 * vector, gate(long, 8, 0));
        word(IDT_IST + 16 * vector, gate(long, 8, 1));
        word(IDT_32 + 8 * vector, gate(flat, 0x18, 0));
    }
    let all = 0x67; // present, writable, user, accessed, dirty
    word(PML4, PDPT | all);
    word(PML4 + 8 * 511, PDPT | all);
    for (n, table) in [(0, LOW), (1, MIDDLE), (510, LOW)] {
        word(PDPT + 8 * n, table | all);
        if n < 4 {
            word(PDPT_PAE + 8 * n, table | 1);
        }
    }
    word(LOW + 8 * (CODE_AT >> 21), TABLE | all);
    // The other address space: the same code, and the data pages in another order.
    word(OTHER_PML4, OTHER_PDPT | all);
    word(OTHER_PML4 + 8 * 511, OTHER_PDPT | all);
    for (n, table) in [(0, OTHER_LOW), (1, MIDDLE), (510, OTHER_LOW)] {
        word(OTHER_PDPT + 8 * n, table | all);
    }
    word(OTHER_LOW + 8 * (CODE_AT >> 21), OTHER_TABLE | all);
    for n in 0..PAGES {
        let frame = FRAMES[if (2..10).contains(&n) { 11 - n } else { n }];
        word(page(n).1 - TABLE + OTHER_TABLE, frame | 0x63);
    }
    word(MIDDLE + 8 * (KERNEL >> 21 & 511), 0x1e3);
    for vector in 0..256 {
        put(HANDLERS + 16 * vector, &[0xe6, PORT as u8, 0xeb, 0xfe]); // OUT PORT, AL; JMP to itself
    }
    let hash = ((KERNEL + HASH) as u32).to_le_bytes();
    // PUSH RAX; MOV RAX, [RSP + 8]; ADD [HASH], RAX; ROL [HASH], 1; POP RAX; IRET
    put(RETURNS, &[&[0x50, 0x48, 0x8b, 0x44, 0x24, 8, 0x48, 1, 4, 0x25], &hash[..]].concat());
    put(RETURNS + 14, &[&[0x48, 0xd1, 4, 0x25], &hash[..], &[0x58, 0x48, 0xcf]].concat());
    put(RETURNS + 0x40, &[&[0x50, 0x36, 0x8b, 0x44, 0x24, 4, 0x36, 1, 5], &hash[..]].concat());
    put(RETURNS + 0x40 + 13, &[&[0x36, 0xd1, 5], &hash[..], &[0x58, 0xcf]].concat());
    // OUT PORT + 1, AL; IRET
    put(RETURNS + 0x80, &[0xe6, PORT as u8 + 1, 0x48, 0xcf]);
    put(RETURNS + 0xc0, &[0xe6, PORT as u8 + 1, 0xcf]);
    // MOV [RDI], EAX; INVLPG [RSI]; MOV EDI, ESI; RET
    put(REMAP, &[0x89, 0x07, 0x0f, 0x01, 0x3e, 0x89, 0xf7, 0xc3]);
    put(FRAMES[0], &[0xcc; 0x1000]);
    put(FRAMES[1], &[0xcc; 0x1000]);
    let mut random = Random::new(7);
    for frame in &FRAMES[2..10] {
        for n in 0..256 {
            put(frame + 16 * n, &random.vector().to_le_bytes());
        }
    }
    bytes
}
