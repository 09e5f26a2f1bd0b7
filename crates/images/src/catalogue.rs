//! The catalogue: which images have names, and where they are.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::Firmware;

/// An image that can be pulled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// What it is, for people.
    pub title: String,
    /// Where it is.
    pub url: String,
    /// Where a file with its SHA-256 or SHA-512 is.
    pub sums: Option<String>,
    /// Its SHA-256, in hexadecimal.
    pub sha256: Option<String>,
    /// What starts it.
    #[serde(default)]
    pub firmware: Firmware,
    /// Who is there to log in.
    pub user: Option<String>,
}

/// Images by name, such as `ubuntu:24.04`.
#[derive(Debug, Clone)]
pub struct Catalogue(Vec<(String, Entry)>);

/// Why a catalogue cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// The file cannot be read.
    #[error("cannot read the catalogue {}: {source}; check the path and its permissions", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// It is not in the right form.
    #[error("the catalogue {} is not in the right form: {reason}; correct it", path.display())]
    Form {
        /// Which.
        path: PathBuf,
        /// What is wrong, and in which line.
        reason: String,
    },
}

impl Catalogue {
    /// The catalogue that Lodge brings.
    pub fn builtin() -> Self {
        // A test sees to it that it is in the right form.
        Self(read(include_str!("catalogue.toml")).unwrap_or_default())
    }

    /// Adds a file's entries, which go before those of the same names. A file that is not there adds nothing.
    pub fn with(mut self, path: &Path) -> Result<Self, CatalogueError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(self),
            Err(source) => return Err(CatalogueError::File { path: path.to_owned(), source }),
        };
        let form = |reason| CatalogueError::Form { path: path.to_owned(), reason };
        let more = read(&text).map_err(|error| form(error.to_string().trim().replace('\n', " ")))?;
        if let Some((name, _)) = more.iter().find(|(name, _)| !is_name(name)) {
            return Err(form(format!("{name:?} is no name of an image")));
        }
        self.0.retain(|(name, _)| !more.iter().any(|(other, _)| other == name));
        self.0.extend(more);
        Ok(self)
    }

    /// The entry called `name`, or the last one called `name:…`, with its full name.
    pub fn find(&self, name: &str) -> Option<(&str, &Entry)> {
        let of = |full: &str| full.split_once(':').is_some_and(|(first, _)| first == name);
        let exact = self.0.iter().find(|(full, _)| full == name);
        let found = exact.or_else(|| self.0.iter().rev().find(|(full, _)| of(full)))?;
        Some((&found.0, &found.1))
    }

    /// All, in the order of the files.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.0.iter().map(|(name, entry)| (name.as_str(), entry))
    }
}

fn read(text: &str) -> Result<Vec<(String, Entry)>, toml::de::Error> {
    // As a table that keeps the order: the last of several versions is the one that a bare name means.
    let table: toml::Table = text.parse()?;
    table.into_iter().map(|(name, value)| Ok((name, value.try_into()?))).collect()
}

/// Whether this can be a name of an image: of letters, digits, and `.`, `_`, `-`, perhaps with one `:` in it.
pub fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let word = |word: &str| word.starts_with(|c: char| c.is_ascii_alphanumeric()) && word.chars().all(plain);
    let (first, rest) = name.split_once(':').unwrap_or((name, "0"));
    name.len() <= 100 && word(first) && word(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lodge_brings_is_whole() {
        let builtin = read(include_str!("catalogue.toml")).unwrap();
        for (name, entry) in &builtin {
            assert!(is_name(name), "{name}");
            assert!(entry.url.starts_with("https://") && entry.user.is_some(), "{name}");
            assert!(entry.sums.as_ref().is_some_and(|sums| sums.starts_with("https://")), "{name}");
        }
        let catalogue = Catalogue::builtin();
        assert_eq!(catalogue.entries().count(), builtin.len());
        for (short, full) in [
            ("ubuntu", "ubuntu:24.04"),
            ("ubuntu:22.04", "ubuntu:22.04"),
            ("debian-cloud", "debian-cloud:13"),
            ("centos", "centos:10"),
        ] {
            assert_eq!(catalogue.find(short).unwrap().0, full);
        }
        assert!(catalogue.find("ubu").is_none() && catalogue.find("debian").is_none());
    }

    #[test]
    fn a_file_adds_and_overrides() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalogue.toml");
        let mine = "[mine]\ntitle = \"x\"\nurl = \"file:/x\"\nfirmware = \"uefi\"\n";
        fs::write(&path, format!("{mine}[\"ubuntu:24.04\"]\ntitle = \"y\"\nurl = \"file:/y\"\n")).unwrap();
        let catalogue = Catalogue::builtin().with(&path).unwrap().with(&dir.path().join("none")).unwrap();
        assert_eq!(catalogue.find("mine").unwrap().1.firmware, Firmware::Uefi);
        assert_eq!(catalogue.find("ubuntu").unwrap().1.url, "file:/y");
        for (bad, part) in [
            ("[x]\ntitle = \"x\"\n", "url"),
            ("[\"../x\"]\ntitle = \"x\"\nurl = \"y\"\n", "name"),
            ("[x]\ntitle = \"x\"\nurl = \"y\"\nshape = 1\n", "shape"),
            ("[x", "line 1"),
        ] {
            fs::write(&path, bad).unwrap();
            let error = Catalogue::builtin().with(&path).unwrap_err().to_string();
            assert!(error.contains(part), "{bad}: {error}");
        }
    }
}
