//! Whole systems: which one `lodge run` means, and what it is told at its first start.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

use anyhow::Context;
use systems::{Instance, Origin, Packages, Release, Settings, Start};

use crate::args::Run;
use crate::progress::Bars;
use crate::report::{Help, Usage};

/// The whole system that is asked for, if it is one: made or fetched if need be, ready to start.
pub fn instance(args: &Run, mirror: Option<&str>, engine: vm::Choice) -> anyhow::Result<Option<Instance>> {
    let Some(wish) = wish(args)? else { return Ok(None) };
    let shares: Vec<String> = args.share.iter().map(|share| share.tag.clone()).collect();
    // A VM that has a name needs nothing else to be started again.
    let known = args.name.as_deref().map(|name| Instance::find(name, &shares)).transpose()?.flatten();
    if let Some(mut known) = known {
        if args.hostname.is_some()
            || args.user.is_some()
            || !args.ssh_key.is_empty()
            || !args.package.is_empty()
            || !args.runcmd.is_empty()
        {
            let name = args.name.clone().unwrap_or_default();
            let path = systems::data_dir()?.join("vms").join(&name);
            return Err(systems::Error::Settled { name, path }.into());
        }
        if args.firmware.is_none() {
            known.follow_kernel()?;
        }
        add(&mut known, args)?;
        return Ok(Some(known));
    }
    let options = images::Options {
        mirror: args.mirror.clone().or_else(|| mirror.map(Into::into)),
        ..images::Options::default()
    };
    let mut made = match wish {
        Wish::Known => return Ok(None),
        Wish::Debian(release) => {
            let settings = settings(args)?;
            settings.check()?;
            let base = systems::debian(release, &options, engine, &mut Bars::default())?;
            if std::io::stderr().is_terminal() || !base.cached {
                eprintln!("{}", base.description);
            }
            let wanted = &settings.packages;
            let packages = Packages::fetch(release, &base, wanted, &options, &mut Bars::default())?;
            make(args, Origin::Base(&base, packages.as_ref()), &settings, &shares)?
        }
        Wish::Image(name) => {
            let mut settings = settings(args)?;
            settings.check()?;
            let image = crate::image::find_or_pull(&name, &options)?;
            let user = args.user.as_deref().or(image.about.user.as_deref());
            if let Some(user) = user.filter(|_| std::io::stderr().is_terminal()) {
                let password = password()?;
                eprintln!("{}: log in as {user}, password {password} (on the console)", image.about.title);
                settings.password = Some(password);
            }
            make(args, Origin::Pulled(&image), &settings, &shares)?
        }
    };
    add(&mut made, args)?;
    Ok(Some(made))
}

/// Which whole system is meant.
enum Wish {
    /// The one that a VM has.
    Known,
    Debian(Release),
    /// One in the cache or in the catalogue.
    Image(String),
}

fn wish(args: &Run) -> anyhow::Result<Option<Wish>> {
    if args.kernel.is_some() {
        return Ok(None);
    }
    let Some(image) = args.image.as_deref() else {
        return Ok(Some(Wish::Known));
    };
    match image.split_once(':').unwrap_or((image, "")) {
        ("debian", "") => return Ok(Release::parse(None).map(Wish::Debian)),
        ("debian", which) => {
            return Ok(Some(Wish::Debian(Release::parse(Some(which)).ok_or_else(|| unknown(which))?)));
        }
        _ => {}
    }
    // A file goes before a name.
    let named = !Path::new(image).exists() && crate::image::is_known(image)?;
    Ok(named.then(|| Wish::Image(image.to_owned())))
}

fn make(
    args: &Run,
    origin: Origin<'_>,
    settings: &Settings,
    shares: &[String],
) -> Result<Instance, systems::Error> {
    match &args.name {
        Some(name) => Instance::create(name, origin, settings, shares),
        None => Instance::throw_away(origin, settings, shares),
    }
}

/// Twelve letters and digits, none like another.
fn password() -> anyhow::Result<String> {
    const LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let mut bytes = [0; 12];
    let random = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    random.context("the host gives no random numbers")?;
    Ok(bytes.iter().map(|byte| char::from(LETTERS[usize::from(byte % 32)])).collect())
}

fn unknown(which: &str) -> anyhow::Error {
    anyhow::Error::new(Usage(format!("there is no image called debian:{which}")))
        .context(Help("of whole Debian systems there are debian:12 (bookworm) and debian:13 (trixie)".into()))
}

/// Adds what the user adds to the kernel's command line.
fn add(instance: &mut Instance, args: &Run) -> anyhow::Result<()> {
    match (&mut instance.start, &args.cmdline) {
        (Start::Kernel(vm::Boot::Kernel { cmdline, .. }), Some(more)) => {
            *cmdline = format!("{cmdline} {more}")
        }
        (Start::Firmware(_), Some(_)) => {
            return Err(anyhow::Error::new(Usage("the image's own boot loader loads its kernel".into()))
                .context(Help("leave --cmdline away, or start a kernel with --kernel".into())));
        }
        _ => {}
    }
    Ok(())
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
        packages: args.package.clone(),
        commands: args.runcmd.clone(),
        password: None,
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
