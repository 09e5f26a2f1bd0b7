//! `lodge host`: which engines can be used here.

use std::io::Write;

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{ContentArrangement, Table};

use crate::args;

/// Prints the table.
pub fn host(args: &args::Host) -> anyhow::Result<()> {
    let engines = vm::host::engines();
    if args.json {
        return print(&serde_json::to_string_pretty(&engines)?);
    }
    let mut table = table(&["engine", "usable", "why", "what to do"]);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    for engine in &engines {
        let usable = match (engine.usable, engine.chosen) {
            (true, true) => "yes, the default",
            (true, false) => "yes",
            (false, _) => "no",
        };
        table.add_row([engine.name, usable, &engine.reason, engine.remedy.as_deref().unwrap_or("")]);
    }
    print(&table.to_string())
}

/// An empty table, as all of ours look.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_header(header.iter().copied());
    table
}

/// Prints a text. A reader that has seen enough (`| head`) is no error.
pub fn print(text: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e.into()),
        _ => Ok(()),
    }
}
