//! `lodge image`: the whole systems in the cache.

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{ContentArrangement, Table};
use indicatif::HumanBytes;

use crate::args::Image;
use crate::host::print;
use crate::progress::Bars;
use crate::report::{Help, Usage};

/// Does what is asked for.
pub fn image(args: &Image) -> anyhow::Result<()> {
    match args {
        Image::Ls => ls(),
        Image::Inspect { name } => inspect(name),
        Image::Rm { name } => match systems::remove(name, &mut Bars::default())? {
            true => Ok(()),
            false => Err(unknown(name)),
        },
    }
}

fn ls() -> anyhow::Result<()> {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["name", "what it is", "packages", "size"]);
    for one in systems::list()? {
        let (packages, size) = (one.packages.len().to_string(), HumanBytes(one.size).to_string());
        table.add_row([one.name, one.description, packages, size]);
    }
    print(&table.to_string())
}

fn inspect(name: &str) -> anyhow::Result<()> {
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
