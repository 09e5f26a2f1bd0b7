//! Nanoseconds per run of some instructions: `cargo run --release -p lodge-native --example speed`.

use std::time::Instant;

use iced_x86::{Decoder, DecoderOptions};
use native::{Bounce, SimdState, Stubs};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let instructions: [(&str, &[u8]); 12] = [
        ("addps xmm1,xmm2", &[0x0f, 0x58, 0xca]),
        ("addsd xmm1,[mem]", &[0xf2, 0x0f, 0x58, 0x08]),
        ("vfmadd213pd ymm1,ymm2,ymm3", &[0xc4, 0xe2, 0xed, 0xa8, 0xcb]),
        ("paddd xmm1,xmm2", &[0x66, 0x0f, 0xfe, 0xca]),
        ("vpaddd ymm1,ymm2,ymm3", &[0xc5, 0xed, 0xfe, 0xcb]),
        ("paddd mm1,mm2", &[0x0f, 0xfe, 0xca]),
        ("fadd st,st(1)", &[0xd8, 0xc1]),
        ("faddp st(1),st", &[0xde, 0xc1]),
        ("fld m64", &[0xdd, 0x00]),
        ("fincstp (by FXRSTOR)", &[0xd9, 0xf7]),
        ("ucomisd xmm1,xmm2", &[0x66, 0x0f, 0x2e, 0xca]),
        ("pdep rax,rbx,rcx", &[0xc4, 0xe2, 0xe3, 0xf5, 0xc1]),
    ];
    let mut stubs = Stubs::new()?;
    let mut bounce = Bounce::default();
    for (name, bytes) in instructions {
        let id = stubs.compile(&Decoder::new(64, bytes, DecoderOptions::NONE).decode())?;
        let (mut gprs, mut flags) = ([3; 16], 0);
        let one = 0x3fff_8000_0000_0000_0000;
        let pops = name.starts_with("faddp") || name.starts_with("fld");
        let mut state = SimdState { ftw: 0x0f, fpr: [one; 8], ..SimdState::default() };
        let runs = 10_000_000;
        let start = Instant::now();
        for _ in 0..runs {
            if pops {
                state.ftw = 0x0f;
                state.fsw = 0;
            }
            stubs.run(id, &mut state, &mut gprs, &mut flags, &mut bounce);
        }
        println!("{name:30} {:6.1} ns", start.elapsed().as_nanos() as f64 / runs as f64);
    }
    let shuffles = 4096;
    let start = Instant::now();
    for i in 0..shuffles {
        // shufps xmm0 to xmm7, immediate
        let bytes = [0x0f, 0xc6, 0xc0 | (i >> 8 << 3) as u8 & 0x38, i as u8];
        stubs.compile(&Decoder::new(64, &bytes, DecoderOptions::NONE).decode())?;
    }
    println!("{:30} {:6.1} us", "compile", start.elapsed().as_micros() as f64 / f64::from(shuffles));
    Ok(())
}
