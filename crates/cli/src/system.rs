//! Whole systems: which one `lodge run` means, and what it is told at its first start.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::Context;
use systems::{Instance, Release, Settings};

use crate::args::Run;
use crate::progress::Bars;
use crate::report::{Help, Usage};

/// The whole system that is asked for, if it is one: made if need be, ready to start.
pub fn instance(args: &Run, mirror: Option<&str>, engine: vm::Choice) -> anyhow::Result<Option<Instance>> {
    if args.kernel.is_some() {
        return Ok(None);
    }
    let release = match args.image.as_deref().map(|image| image.split_once(':').unwrap_or((image, ""))) {
        Some(("debian", which)) => {
            let which = Some(which).filter(|which| !which.is_empty());
            Some(Release::parse(which).ok_or_else(|| unknown(which.unwrap_or_default()))?)
        }
        Some(_) => None,
        None => None,
    };
    let shares: Vec<String> = args.share.iter().map(|share| share.tag.clone()).collect();
    // A VM that has a name needs nothing else to be started again.
    let known = match &args.name {
        Some(name) if release.is_some() || args.image.is_none() => Instance::find(name, &shares)?,
        _ => None,
    };
    if let Some(mut known) = known {
        if args.hostname.is_some()
            || args.user.is_some()
            || !args.ssh_key.is_empty()
            || !args.runcmd.is_empty()
        {
            let name = args.name.clone().unwrap_or_default();
            let path = systems::data_dir()?.join("vms").join(&name);
            return Err(systems::Error::Settled { name, path }.into());
        }
        add(&mut known, args);
        return Ok(Some(known));
    }
    let Some(release) = release else { return Ok(None) };
    let settings = settings(args)?;
    let options = images::Options {
        mirror: args.mirror.clone().or_else(|| mirror.map(Into::into)),
        ..images::Options::default()
    };
    let base = systems::debian(release, &options, engine, &mut Bars::default())?;
    if std::io::stderr().is_terminal() || !base.cached {
        eprintln!("{}", base.description);
    }
    let mut made = match &args.name {
        Some(name) => Instance::create(name, &base, &settings, &shares)?,
        None => Instance::throw_away(&base, &settings, &shares)?,
    };
    add(&mut made, args);
    Ok(Some(made))
}

fn unknown(which: &str) -> anyhow::Error {
    anyhow::Error::new(Usage(format!("there is no image called debian:{which}")))
        .context(Help("of whole Debian systems there are debian:12 (bookworm) and debian:13 (trixie)".into()))
}

/// Adds what the user adds to the kernel's command line.
fn add(instance: &mut Instance, args: &Run) {
    if let (vm::Boot::Kernel { cmdline, .. }, Some(more)) = (&mut instance.boot, &args.cmdline) {
        *cmdline = format!("{cmdline} {more}");
    }
}

fn settings(args: &Run) -> anyhow::Result<Settings> {
    let mut ssh_keys = Vec::new();
    for path in &args.ssh_key {
        let text = std::fs::read_to_string(path)
            .with_context(|| Usage(format!("cannot read the key {}; name a public key", path.display())))?;
        if text.contains("PRIVATE KEY") {
            let what = format!("{} is a private key", path.display());
            return Err(anyhow::Error::new(Usage(what)).context(Help("name the public one, FILE.pub".into())));
        }
        ssh_keys.extend(keys(&text));
    }
    if args.ssh_key.is_empty() {
        let texts = own_keys().into_iter().filter_map(|path| std::fs::read_to_string(path).ok());
        ssh_keys.extend(texts.flat_map(|text| keys(&text)));
    }
    Ok(Settings {
        hostname: args.hostname.clone(),
        user: args.user.clone(),
        ssh_keys,
        commands: args.runcmd.clone(),
    })
}

/// The lines that are keys: whatever else is in the file is nobody's business.
fn keys(text: &str) -> Vec<String> {
    let is_key = |line: &&str| ["ssh-", "ecdsa-", "sk-"].iter().any(|kind| line.starts_with(kind));
    text.lines().map(str::trim).filter(is_key).map(str::to_owned).collect()
}

/// `~/.ssh/*.pub`.
fn own_keys() -> Vec<PathBuf> {
    let Some(home) = std::env::var_os("HOME") else { return Vec::new() };
    let list = std::fs::read_dir(Path::new(&home).join(".ssh")).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = list.map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "pub"));
    paths.sort();
    paths
}
