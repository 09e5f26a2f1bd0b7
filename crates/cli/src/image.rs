//! `lodge image`: the whole systems in the cache, and the catalogue of those that can be fetched.

use comfy_table::{ContentArrangement, Table};
use images::oci::{self, Reference};
use images::{Catalogue, Check, Entry, Options};
use indicatif::HumanBytes;
use systems::pulled::{self, Pulled};

use crate::args::{Image, Pull};
use crate::config::Config;
use crate::host::{self, print};
use crate::progress::Bars;
use crate::report::{Help, Usage};

/// Does what is asked for.
pub fn image(args: &Image) -> anyhow::Result<()> {
    match args {
        Image::Pull(args) => pull(args),
        Image::Catalogue => list_catalogue(),
        Image::Ls => ls(),
        Image::Inspect { name } => inspect(name),
        Image::Rm { name } => match remove(name, &mut Bars::default())? {
            true => Ok(()),
            false => Err(unknown(name)),
        },
    }
}

fn remove(name: &str, bars: &mut Bars) -> anyhow::Result<bool> {
    let options = Options::default();
    match Reference::parse(name) {
        Some(reference) => Ok(oci::remove(&reference.map_err(images::Error::from)?, &options, bars)?),
        None => Ok(systems::remove(name, bars)? || pulled::remove(name, &options, bars)?),
    }
}

/// Lodge's catalogue with the user's, which is beside the configuration file.
fn catalogue() -> anyhow::Result<Catalogue> {
    let own = Config::path().map(|path| path.with_file_name("catalogue.toml"));
    let catalogue = Catalogue::builtin();
    Ok(match own {
        Some(path) => catalogue.with(&path)?,
        None => catalogue,
    })
}

fn pull(args: &Pull) -> anyhow::Result<()> {
    if let Some(reference) = Reference::parse(&args.what) {
        let reference = reference.map_err(images::Error::from)?;
        let options = Options { refresh: true, ..Options::default() };
        let guest = oci::oci_guest(&reference, &options, &mut Bars::default())?;
        return print(&format!("{}: `lodge run {reference}` starts it", guest.description));
    }
    let catalogue = catalogue()?;
    let (name, mut entry) = match catalogue.find(&args.what) {
        Some((name, entry)) => (name.to_owned(), entry.clone()),
        None if args.what.contains("://") || args.what.starts_with("file:") => {
            let url = args.what.clone();
            let entry = Entry {
                title: url.rsplit('/').next().unwrap_or(&url).to_owned(),
                url,
                sums: None,
                sha256: None,
                firmware: images::Firmware::default(),
                user: None,
            };
            (name_of(&entry.title), entry)
        }
        None => {
            let what = format!("there is no image called {} in the catalogue", args.what);
            let help = "`lodge image catalogue` lists those that there are; or give a URL";
            return Err(anyhow::Error::new(Usage(what)).context(Help(help.into())));
        }
    };
    entry.firmware = args.firmware.unwrap_or(entry.firmware);
    let check = match &args.sha256 {
        _ if args.unverified => Check::Unverified,
        Some(sum) => Check::Sha256(sum.clone()),
        None => check_of(&entry),
    };
    let name = args.name.clone().unwrap_or(name);
    if name == "debian" || name.starts_with("debian:") || name == "tiny" || name.starts_with("tiny:") {
        let what = format!("{name} is what Lodge makes itself");
        return Err(anyhow::Error::new(Usage(what)).context(Help("choose another name with --name".into())));
    }
    let pulled = pulled::pull(&name, &entry, &check, &Options::default(), &mut Bars::default())?;
    print(&format!("{}: `lodge run {}` starts it", pulled.about.title, pulled.name))
}

fn check_of(entry: &Entry) -> Check {
    match (&entry.sha256, &entry.sums) {
        (Some(sum), _) => Check::Sha256(sum.clone()),
        (None, Some(sums)) => Check::Sums(sums.clone()),
        (None, None) => Check::Beside,
    }
}

/// A name after a file's, without what tells of its format.
fn name_of(file: &str) -> String {
    let mut stem = file.split(['?', '#']).next().unwrap_or(file);
    for end in [".xz", ".gz", ".zst", ".qcow2", ".img", ".raw"] {
        stem = stem.strip_suffix(end).unwrap_or(stem);
    }
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' };
    stem.chars().map(plain).take(64).collect()
}

/// Whether an image of this name is in the cache or in the catalogue.
pub fn is_known(name: &str) -> anyhow::Result<bool> {
    Ok(pulled::find(name, &Options::default())?.is_some() || catalogue()?.find(name).is_some())
}

/// The image of this name: from the cache, or else fetched as the catalogue says.
pub fn find_or_pull(name: &str, options: &Options) -> anyhow::Result<Pulled> {
    let catalogue = catalogue()?;
    let entry = catalogue.find(name);
    for name in [Some(name), entry.map(|(full, _)| full)].into_iter().flatten() {
        if let Some(found) = pulled::find(name, options)? {
            return Ok(found);
        }
    }
    let (full, entry) = entry.ok_or_else(|| unknown(name))?;
    Ok(pulled::pull(full, entry, &check_of(entry), options, &mut Bars::default())?)
}

/// As wide as the terminal is, for titles are long.
fn table(header: &[&str]) -> Table {
    let mut table = host::table(header);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    table
}

fn list_catalogue() -> anyhow::Result<()> {
    let mut table = table(&["name", "what it is", "user", "fetched"]);
    for (name, entry) in catalogue()?.entries() {
        let fetched = if pulled::find(name, &Options::default())?.is_some() { "yes" } else { "" };
        table.add_row([name, &entry.title, entry.user.as_deref().unwrap_or_default(), fetched]);
    }
    print(&table.to_string())
}

fn ls() -> anyhow::Result<()> {
    let mut table = table(&["name", "what it is", "packages", "size"]);
    for one in systems::list()? {
        let (packages, size) = (one.packages.len().to_string(), HumanBytes(one.size).to_string());
        table.add_row([one.name, one.description, packages, size]);
    }
    for one in pulled::list(&Options::default())? {
        table.add_row([one.name, one.about.title, String::new(), HumanBytes(one.size).to_string()]);
    }
    for one in oci::list(&Options::default())? {
        let manifest = one.manifest.chars().take(19).collect();
        table.add_row([one.name, manifest, String::new(), HumanBytes(one.size).to_string()]);
    }
    print(&table.to_string())
}

fn inspect(name: &str) -> anyhow::Result<()> {
    if let Some(reference) = Reference::parse(name) {
        let reference = reference.map_err(images::Error::from)?.to_string();
        let one = oci::list(&Options::default())?.into_iter().find(|one| one.name == reference);
        return print(&serde_json::to_string_pretty(&one.ok_or_else(|| unknown(name))?)?);
    }
    if let Some(one) = pulled::find(name, &Options::default())? {
        return print(&serde_json::to_string_pretty(&one.about)?);
    }
    let found = systems::list()?.into_iter().find(|one| one.name == name);
    let one = found.ok_or_else(|| unknown(name))?;
    let packages: Vec<String> =
        one.packages.iter().map(|(name, version)| format!("{name} {version}")).collect();
    print(&format!("{}\n{}\n{}", one.description, HumanBytes(one.size), packages.join("\n")))
}

fn unknown(name: &str) -> anyhow::Error {
    anyhow::Error::new(Usage(format!("there is no image called {name} in the cache")))
        .context(Help("`lodge image ls` lists those that there are".into()))
}

#[cfg(test)]
mod tests {
    use super::name_of;

    #[test]
    fn names_after_files() {
        for (file, name) in
            [("a-1.2.qcow2", "a-1.2"), ("b.img.xz", "b"), ("c d.raw?x=y", "c-d"), ("e.qcow2.zst", "e")]
        {
            assert_eq!(name_of(file), name);
        }
    }
}
