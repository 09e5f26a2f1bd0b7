//! The configuration file: defaults for flags that one does not want to give each time.

use std::path::PathBuf;

use anyhow::Context;
use clap::ValueEnum;
use serde::Deserialize;

use crate::args;
use crate::report::Usage;

/// `~/.config/lodge/config.toml`, all of it optional.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The Debian archive to fetch from, instead of the one that apt uses.
    pub mirror: Option<String>,
    /// Default of `--engine`.
    #[serde(default, deserialize_with = "engine")]
    pub engine: Option<args::Engine>,
    /// Default of `--cpus`.
    pub cpus: Option<u32>,
    /// Default of `--memory`, such as "512M".
    pub memory: Option<String>,
}

fn engine<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<args::Engine>, D::Error> {
    let name = String::deserialize(from)?;
    args::Engine::from_str(&name, false).map(Some).map_err(serde::de::Error::custom)
}

impl Config {
    /// Where it is looked for: `$LODGE_CONFIG`, else below `$XDG_CONFIG_HOME` or `~/.config`.
    pub fn path() -> Option<PathBuf> {
        let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        set("LODGE_CONFIG").or_else(|| {
            let base = set("XDG_CONFIG_HOME").or_else(|| set("HOME").map(|home| home.join(".config")))?;
            Some(base.join("lodge/config.toml"))
        })
    }

    /// Reads it; no file is an empty one.
    pub fn read() -> anyhow::Result<Self> {
        let Some(path) = Self::path() else { return Ok(Self::default()) };
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(e) => {
                return Err(e)
                    .context(Usage(format!("cannot read the configuration file {}", path.display())));
            }
        };
        toml::from_str(&text).map_err(|e: toml::de::Error| {
            let line =
                e.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            Usage(format!("{}, line {line}: {}", path.display(), e.message())).into()
        })
    }
}
