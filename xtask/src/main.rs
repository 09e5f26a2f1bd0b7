//! The project's own chores, run as `cargo xtask …`.
#![forbid(unsafe_code)]

mod nested;

fn main() -> anyhow::Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("nested") => nested::run(std::env::args().nth(2).as_deref() == Some("--verbose")),
        _ => anyhow::bail!("usage: cargo xtask nested [--verbose]"),
    }
}
