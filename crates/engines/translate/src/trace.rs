//! What the engine does, written down for its developers.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::{Arc, Mutex};

use iced_x86::{Decoder, DecoderOptions, FastFormatter, Instruction};

/// Where it is written; clones write to the same file.
#[derive(Clone)]
pub struct Trace(Arc<Mutex<BufWriter<File>>>);

impl Trace {
    /// Writes to `file`.
    pub fn new(file: File) -> Self {
        Self(Arc::new(Mutex::new(BufWriter::new(file))))
    }

    /// Writes a line, or several.
    pub fn say(&self, text: &str) {
        let mut file = self.0.lock().unwrap_or_else(|e| e.into_inner());
        // A trace that cannot be written must not stop the guest.
        let _ = writeln!(file, "{text}").and_then(|()| file.flush());
    }

    /// Writes what became of the guest's instructions: `guest` from offset `start` of the page at `page`, `host` at `at`.
    pub fn block(&self, page: u64, start: u16, bits: u32, guest: &[u8], at: u64, host: &[u8]) {
        let mut text = format!("block at {:#x} of guest memory, {bits}-bit code\n", page + u64::from(start));
        list(&mut text, bits, guest, start.into());
        text.push_str("becomes\n");
        list(&mut text, 64, host, at);
        self.say(&text);
    }
}

fn list(text: &mut String, bits: u32, code: &[u8], at: u64) {
    let mut formatter = FastFormatter::new();
    let mut decoder = Decoder::with_ip(bits, code, at, DecoderOptions::NONE);
    let mut line = String::new();
    while decoder.can_decode() {
        let i: Instruction = decoder.decode();
        line.clear();
        formatter.format(&i, &mut line);
        let from = (i.ip() - at) as usize;
        let bytes: String =
            code[from..from + i.len()].iter().fold(String::new(), |all, b| all + &format!("{b:02x}"));
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {:>12x}  {bytes:<30} {line}", i.ip());
    }
}
