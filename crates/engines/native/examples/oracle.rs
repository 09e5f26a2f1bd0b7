//! Nanoseconds per case of the oracle: `cargo run --release -p lodge-native --example oracle --features oracle`.

use std::time::Instant;

use native::oracle::{Case, CpuImage, DATA, Mode, Oracle, WINDOW};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut oracle = Oracle::new()?;
    let image = CpuImage { gpr: [DATA; 16], ..CpuImage::default() };
    let add = Case {
        code: vec![0x48, 0x01, 0xd8],
        mode: Mode::Long,
        step: false,
        image,
        window: 0,
        memory: [0; WINDOW],
    };
    let step = Case { step: true, ..add.clone() };
    let compat = Case { mode: Mode::Compat32, code: vec![0x01, 0xd8], ..add.clone() };
    let fault = Case { code: vec![0x0f, 0x0b], ..add.clone() };
    for (name, case) in [("runs through", add), ("stepped", step), ("32-bit", compat), ("faults", fault)] {
        let cases = vec![case; 512];
        let rounds = 100;
        let start = Instant::now();
        for _ in 0..rounds {
            oracle.run(&cases)?;
        }
        println!("{name:14} {:6.0} ns", start.elapsed().as_nanos() as f64 / (rounds * cases.len()) as f64);
    }
    Ok(())
}
