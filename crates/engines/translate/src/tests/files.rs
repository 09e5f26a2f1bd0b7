//! File tests: guest code, what becomes of it, and what state it ends in. `cases/*.txt`; `LODGE_UPDATE=1 cargo test -p
//! lodge-translate` writes what is, for a reader to check.
//!
//! A case's head is one `key value` per line: `bits`, `code` in hexadecimal (it ends with ud2, 0f0b), registers, and
//! `mem ADDRESS WORD …`. Behind `---` is what is expected: the guest's code, the first block that became of it, the
//! registers, flags and memory that changed.

use std::fmt::Write;
use std::path::Path;

use iced_x86::{
    Decoder, DecoderOptions, Formatter, FormatterOutput, FormatterTextKind, Instruction, NasmFormatter,
    SymbolResolver, SymbolResult,
};
use machine::cpu::{Exit, Vcpu};
use x86::flags;

use super::{Bench, CODE, SIZE};
use crate::stubs::Stubs;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

struct Case {
    bits: u32,
    code: Vec<u8>,
    gpr: [u64; 16],
    memory: Vec<(u64, Vec<u64>)>,
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text, 16).unwrap_or_else(|_| panic!("{text:?} is no hexadecimal number"))
}

impl Case {
    fn parse(head: &str) -> Self {
        let mut case = Self { bits: 64, code: Vec::new(), gpr: [0; 16], memory: Vec::new() };
        case.gpr[4] = 0x3_0000;
        for line in head.lines().filter(|l| !l.is_empty() && !l.starts_with('#')) {
            let (key, rest) = line.split_once(' ').unwrap_or_else(|| panic!("a line without value: {line}"));
            let mut words = rest.split_whitespace();
            match key {
                "bits" => case.bits = rest.parse().unwrap(),
                "code" => {
                    let digits: String = words.collect();
                    case.code.extend((0..digits.len()).step_by(2).map(|n| hex(&digits[n..n + 2]) as u8));
                }
                "mem" => case.memory.push((hex(words.next().unwrap()), words.map(hex).collect())),
                name => {
                    let n =
                        NAMES.iter().position(|&n| n == name).unwrap_or_else(|| panic!("what is {name}?"));
                    case.gpr[n] = hex(rest);
                }
            }
        }
        case
    }

    fn run(&self) -> String {
        let mut bench = Bench::new(self.bits, &self.code, &self.gpr);
        for (at, words) in &self.memory {
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            bench.memory.write(*at, &bytes);
        }
        let mut out = String::new();
        list(&mut out, self.bits, &self.code, CODE, None);
        let cpu = &mut bench.cpu;
        let mode = cpu.mode().expect("code that is translated");
        let host = cpu.find(CODE, mode).expect("a block");
        let (start, code) = cpu.cache.code(host).expect("its code");
        out.push_str("becomes\n");
        list(&mut out, 64, code, start, Some(cpu.cache.stubs));
        let before = contents(&bench);
        assert_eq!(bench.run().unwrap(), Exit::TripleFault, "the code ends with ud2");
        self.ends(&mut out, &mut bench, &before);
        out
    }

    /// What changed.
    fn ends(&self, out: &mut String, bench: &mut Bench, before: &[u8]) {
        let state = bench.cpu.state().unwrap();
        let _ = writeln!(out, "ends at {:x}", state.rip);
        for (n, name) in NAMES.iter().enumerate().filter(|&(n, _)| state.gpr[n] != self.gpr[n]) {
            let _ = writeln!(out, "  {name} {:x}", state.gpr[n]);
        }
        let set = [
            (flags::CF, "cf"),
            (flags::PF, "pf"),
            (flags::AF, "af"),
            (flags::ZF, "zf"),
            (flags::SF, "sf"),
            (flags::OF, "of"),
        ];
        let set: Vec<_> = set.iter().filter(|f| state.rflags & f.0 != 0).map(|f| f.1).collect();
        let _ = writeln!(out, "  flags {}", set.join(" "));
        for (n, y) in state.fpu.ymm.iter().enumerate().filter(|(_, y)| **y != [0; 32]) {
            let _ = writeln!(out, "  ymm{n} {:032x} {:032x}", half(y, 16), half(y, 0));
        }
        let after = contents(bench);
        for (n, (a, b)) in before.chunks(8).zip(after.chunks(8)).enumerate().filter(|(_, (a, b))| a != b) {
            let word = |b: &[u8]| u64::from_le_bytes(b.try_into().unwrap());
            let _ = writeln!(out, "  mem {:x} {:016x}, was {:016x}", 8 * n, word(b), word(a));
        }
    }
}

fn half(ymm: &[u8; 32], at: usize) -> u128 {
    u128::from_le_bytes(ymm[at..at + 16].try_into().unwrap())
}

fn contents(bench: &Bench) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    bench.memory.read(0, &mut bytes);
    bytes
}

/// Host addresses differ from run to run.
struct Names {
    start: u64,
    len: u64,
    stubs: Stubs,
}

impl SymbolResolver for Names {
    fn symbol(
        &mut self,
        _: &Instruction,
        _: u32,
        _: Option<u32>,
        address: u64,
        _: u32,
    ) -> Option<SymbolResult<'_>> {
        let name = match address {
            a if a == self.stubs.site => "leave".to_string(),
            a if (self.start..=self.start + self.len).contains(&a) => format!("+{:x}", a - self.start),
            _ => return None,
        };
        Some(SymbolResult::with_string(address, name))
    }
}

struct Plain<'a>(&'a mut String);

impl FormatterOutput for Plain<'_> {
    fn write(&mut self, text: &str, _: FormatterTextKind) {
        self.0.push_str(text);
    }
}

fn list(out: &mut String, bits: u32, code: &[u8], at: u64, stubs: Option<Stubs>) {
    let names = stubs
        .map(|stubs| Box::new(Names { start: at, len: code.len() as u64, stubs }) as Box<dyn SymbolResolver>);
    let shown = if stubs.is_some() { 0 } else { at };
    let mut formatter = NasmFormatter::with_options(names, None);
    formatter.options_mut().set_space_after_operand_separator(true);
    let mut decoder = Decoder::with_ip(bits, code, at, DecoderOptions::NONE);
    while decoder.can_decode() {
        let i = decoder.decode();
        let _ = write!(out, "  {:>5x}  ", i.ip() - at + shown);
        formatter.format(&i, &mut Plain(out));
        out.push('\n');
    }
}

#[test]
fn code_becomes_what_the_files_say() {
    let host = crate::host::Host::detect();
    if !(host.bmi1 && host.avx && host.fsgsbase) {
        println!("skipped: this host's code looks different");
        return;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases");
    let (mut count, mut wrong) = (0, String::new());
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let (head, expected) = text.split_once("---\n").unwrap_or((&text, ""));
        let is = Case::parse(head).run();
        count += 1;
        if std::env::var_os("LODGE_UPDATE").is_some() {
            std::fs::write(&path, format!("{}---\n{is}", head)).unwrap();
        } else if is != expected {
            let _ = writeln!(wrong, "{}:\n{is}instead of\n{expected}", path.display());
        }
    }
    assert!(count >= 10, "the files are there");
    assert!(wrong.is_empty(), "{wrong}");
}
