//! The project's own chores, run as `cargo xtask …`.
#![forbid(unsafe_code)]

fn main() -> anyhow::Result<()> {
    Ok(())
}
