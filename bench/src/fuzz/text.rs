//! Cases as text files: bytes, state in, state out. One `key value` per line, numbers in hexadecimal; what is not named is
//! as in [`CpuImage::default`]. After `out` comes what the processor made of it.

use std::fmt::Write;

use native::oracle::{Case, CpuImage, End, Mode, Reply, WINDOW};

const MODES: [(Mode, &str); 3] =
    [(Mode::Long, "long"), (Mode::Compat32, "compat32"), (Mode::Protected16, "protected16")];

/// Writes a case and what is right.
pub fn print(case: &Case, reply: &Reply) -> String {
    let mut text = String::new();
    let mode = MODES.iter().find(|(m, _)| *m == case.mode).map_or("long", |(_, name)| name);
    let _ = writeln!(
        text,
        "mode {mode}\ncode {}\nstep {}\nwindow {:x}",
        hex(&case.code),
        u8::from(case.step),
        case.window
    );
    image(&mut text, &case.image);
    let _ = writeln!(text, "memory {}\nout", hex(&case.memory));
    if let End::Fault { vector, error, address } = reply.end {
        let _ = writeln!(text, "fault {vector:x} {error:x} {address:x}");
    }
    image(&mut text, &reply.image);
    let _ = writeln!(text, "memory {}", hex(&reply.memory));
    text
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn image(text: &mut String, image: &CpuImage) {
    let plain = CpuImage::default();
    let _ = writeln!(text, "rip {:x}\nrflags {:x}", image.rip, image.rflags);
    for (n, value) in image.gpr.iter().enumerate().filter(|(_, v)| **v != 0) {
        let _ = writeln!(text, "r{n} {value:x}");
    }
    for (n, [low, high]) in image.simd.ymm.iter().enumerate().filter(|(_, v)| **v != [0; 2]) {
        let _ = writeln!(text, "ymm{n} {low:x} {high:x}");
    }
    for (n, value) in image.simd.fpr.iter().enumerate().filter(|(_, v)| **v != 0) {
        let _ = writeln!(text, "fpr{n} {value:x}");
    }
    let (s, d) = (&image.simd, &plain.simd);
    for (name, value, default) in [
        ("mxcsr", s.mxcsr, d.mxcsr),
        ("fcw", s.fcw.into(), d.fcw.into()),
        ("fsw", s.fsw.into(), d.fsw.into()),
        ("ftw", s.ftw.into(), d.ftw.into()),
    ] {
        if value != default {
            let _ = writeln!(text, "{name} {value:x}");
        }
    }
}

/// Reads a case and what is right.
///
/// # Errors
/// The line that makes no sense.
pub fn parse(text: &str) -> Result<(Case, Reply), String> {
    let mut case = Case {
        code: Vec::new(),
        mode: Mode::Long,
        step: false,
        image: CpuImage::default(),
        window: super::form::AT,
        memory: [0; WINDOW],
    };
    let (mut end, mut out, mut memory) = (End::Completed, None::<CpuImage>, [0; WINDOW]);
    for line in text.lines().filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let bad = || format!("this line makes no sense: {line}");
        let mut words = line.split_whitespace();
        let key = words.next().ok_or_else(bad)?;
        let values: Vec<&str> = words.collect();
        let number = |n: usize| u128::from_str_radix(values.get(n).ok_or_else(bad)?, 16).map_err(|_| bad());
        let bytes = || -> Result<Vec<u8>, String> {
            let digits = values.first().ok_or_else(bad)?;
            let pair =
                |n: usize| digits.get(n..n + 2).and_then(|p| u8::from_str_radix(p, 16).ok()).ok_or_else(bad);
            (0..digits.len()).step_by(2).map(pair).collect()
        };
        match key {
            "mode" => case.mode = MODES.iter().find(|(_, n)| Some(n) == values.first()).ok_or_else(bad)?.0,
            "code" => case.code = bytes()?,
            "step" => case.step = number(0)? != 0,
            "window" => case.window = number(0)? as usize,
            "out" => {
                out = Some(CpuImage::default());
                memory = case.memory;
            }
            "fault" => {
                end = End::Fault {
                    vector: number(0)? as u8,
                    error: number(1)? as u64,
                    address: number(2)? as u64,
                }
            }
            "memory" => {
                let bytes: [u8; WINDOW] = bytes()?.try_into().map_err(|_| bad())?;
                *(if out.is_some() { &mut memory } else { &mut case.memory }) = bytes;
            }
            _ => {
                let image = out.as_mut().unwrap_or(&mut case.image);
                let split = key.find(|c: char| c.is_ascii_digit()).unwrap_or(key.len());
                let n: usize = if split < key.len() { key[split..].parse().map_err(|_| bad())? } else { 0 };
                let s = &mut image.simd;
                match (&key[..split], n) {
                    ("rip", _) => image.rip = number(0)? as u64,
                    ("rflags", _) => image.rflags = number(0)? as u64,
                    ("r", 0..16) => image.gpr[n] = number(0)? as u64,
                    ("ymm", 0..16) => s.ymm[n] = [number(0)?, number(1)?],
                    ("fpr", 0..8) => s.fpr[n] = number(0)?,
                    ("mxcsr", _) => s.mxcsr = number(0)? as u32,
                    ("fcw", _) => s.fcw = number(0)? as u16,
                    ("fsw", _) => s.fsw = number(0)? as u16,
                    ("ftw", _) => s.ftw = number(0)? as u8,
                    _ => return Err(bad()),
                }
            }
        }
    }
    let image = out.ok_or("there is no `out`")?;
    Ok((case, Reply { end, image, memory, strayed: false }))
}
