//! Builds the agent, which is a workspace of its own, for it is linked statically.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

/// With a target named, the flags are for the program alone, not for what builds it.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let variable = |name| env::var_os(name).unwrap_or_default();
    let (own, out) = (variable("CARGO_MANIFEST_DIR"), variable("OUT_DIR"));
    let (root, out) = (Path::new(&own).join("../.."), Path::new(&out));
    let agent = root.join("guests/agent");
    for source in [agent.clone(), root.join("crates/exec/src"), root.join("crates/exec/Cargo.toml")] {
        println!("cargo::rerun-if-changed={}", source.display());
    }
    let mut cargo = Command::new(variable("CARGO"));
    cargo.args(["build", "--quiet", "--release", "--locked", "--target", TARGET, "--manifest-path"]);
    cargo.arg(agent.join("Cargo.toml")).arg("--target-dir").arg(out.join("target"));
    // What the outer build is built with is not for this one: lints, flags of fuzzers, profiles.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let others =
            ["RUSTC_", "RUSTFLAGS", "CARGO_ENCODED_", "CARGO_PROFILE_", "CARGO_BUILD_", "CARGO_TARGET_"];
        if others.iter().any(|other| text.starts_with(other)) {
            cargo.env_remove(&name);
        }
    }
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static");
    let built = cargo.status().is_ok_and(|status| status.success());
    let program = fs::read(out.join("target").join(TARGET).join("release/agent")).ok().filter(|_| built);
    if program.is_none() {
        println!(
            "cargo::warning=the agent for guests does not build; `lodge exec` will not work (a static C library is needed: Debian's \
             libc6-dev, Fedora's glibc-static)"
        );
    }
    fs::write(out.join("agent"), program.unwrap_or_default()).expect("the build's directory can be written");
}
