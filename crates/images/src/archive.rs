//! A distribution's archive: found in the host's apt configuration or named by the user, its index checked and read.

mod find;

use std::fs::File;
use std::io::{BufReader, Seek};
use std::path::Path;

use crate::Options;
use crate::apt::Apt;
use crate::cache::{Cache, Lock};
use crate::deb;
use crate::error::Error;
use crate::fetch::Fetcher;
use crate::packages::{self, Package};
use crate::progress::Progress;
use crate::release::Release;

/// One suite of an archive, with a valid signature.
struct Archive {
    uri: String,
    suite: String,
    release: Release,
    /// The index of packages, checked.
    index: IndexFile,
}

struct IndexFile {
    file: File,
    name: &'static str,
    /// Its size when unpacked.
    size: u64,
}

/// The archives that a guest comes from: a main one, and those of its security and other updates.
pub struct Archives {
    fetcher: Fetcher,
    arch: String,
    list: Vec<Archive>,
    found: Vec<Package>,
    /// Names that were looked for in the indices.
    looked_for: Vec<String>,
}

impl Archives {
    /// Finds the archives, and fetches their indices.
    pub fn open(
        options: &Options,
        cache: &Cache,
        lock: &Lock,
        progress: &mut dyn Progress,
    ) -> Result<Self, Error> {
        let apt = Apt::load(&options.sysroot);
        let mut fetcher = Fetcher::new(&apt.conf);
        if let Some((tries, pause)) = options.patience {
            fetcher = fetcher.patience(tries, pause);
        }
        let list = find::Finder { options, apt: &apt, fetcher: &fetcher, cache, lock }.find(progress)?;
        Ok(Self { fetcher, arch: options.arch.clone(), list, found: Vec::new(), looked_for: Vec::new() })
    }

    /// The archive's name for people, such as `Debian 12.15 (bookworm)`.
    pub fn name(&self) -> String {
        self.list.first().map(|archive| title(&archive.release)).unwrap_or_default()
    }

    /// Finds the first of these packages that there is, in its newest version. A kernel's package without contents is
    /// followed to the one that has the kernel.
    /// `look_for` comes first.
    pub fn package(&self, names: &[&str]) -> Result<&Package, Error> {
        const KERNEL: &str = "linux-image-";
        let missing = || Error::NoPackage {
            archive: self.name(),
            package: names.join(" or "),
            arch: self.arch.clone(),
        };
        let first = names.iter().find_map(|name| packages::newest(&self.found, name, None));
        let mut found = first.ok_or_else(missing)?;
        // Debian's lead there in one step, Ubuntu's in up to three.
        for _ in 0..4 {
            if !found.name.starts_with(KERNEL) {
                break;
            }
            let Some((name, version)) = packages::leads_to(&found.depends, KERNEL) else { break };
            found = packages::newest(&self.found, &name, version.as_deref()).ok_or_else(missing)?;
        }
        Ok(found)
    }

    /// Gives the packages' file, checked.
    pub fn download(
        &self,
        package: &Package,
        path: &Path,
        progress: &mut dyn Progress,
    ) -> Result<File, Error> {
        progress.begin(&format!("{} {}", package.name, package.version), Some(package.expected.size));
        let file = self.get(package, path, progress);
        progress.finish();
        file
    }

    /// As [`Archives::download`], as a part of a step of the caller's.
    pub fn get(&self, package: &Package, path: &Path, progress: &mut dyn Progress) -> Result<File, Error> {
        let url = format!("{}/{}", self.list[package.archive].uri, package.filename);
        self.fetcher.download(&url, &package.expected, path, progress)
    }

    /// Reads the indices whole: every package of every archive.
    pub fn everything(&mut self, progress: &mut dyn Progress) -> Result<Vec<Package>, Error> {
        self.read(progress, |_| true)
    }

    /// Where the archives are and which of their suites are meant: `deb URI SUITE`, as in sources.list(5).
    pub fn sources(&self) -> impl Iterator<Item = (&str, &str)> {
        self.list.iter().map(|archive| (archive.uri.as_str(), archive.suite.as_str()))
    }

    /// Reads the indices for packages of these names and for kernels, unless that was done.
    pub fn look_for(&mut self, names: &[&str], progress: &mut dyn Progress) -> Result<(), Error> {
        if names.iter().all(|name| self.looked_for.iter().any(|other| other == name)) {
            return Ok(());
        }
        // Nearly every guest wants busybox too: one reading serves both.
        self.looked_for.extend(names.iter().chain(&["busybox-static"]).map(|name| (*name).to_owned()));
        let looked_for = self.looked_for.clone();
        self.found = self.read(progress, |name| {
            name.starts_with("linux-image-") || looked_for.iter().any(|other| other == name)
        })?;
        Ok(())
    }

    fn read(
        &mut self,
        progress: &mut dyn Progress,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Vec<Package>, Error> {
        let mut all = Vec::new();
        for (number, archive) in self.list.iter_mut().enumerate() {
            progress.begin(&format!("reading the index of {}", title(&archive.release)), None);
            let found = archive.read_index(number, &wanted);
            progress.finish();
            all.append(&mut found?);
        }
        Ok(all)
    }
}

impl Archive {
    fn read_index(&mut self, number: usize, wanted: impl Fn(&str) -> bool) -> Result<Vec<Package>, Error> {
        let unreadable = |error: &dyn std::fmt::Display| Error::Archive {
            url: format!("{}/dists/{}", self.uri, self.suite),
            problem: format!("has an index that cannot be read ({error})"),
        };
        let IndexFile { file, name, size } = &mut self.index;
        file.rewind().map_err(|error| unreadable(&error))?;
        let text = deb::decompress(name, BufReader::new(file), *size).map_err(|error| unreadable(&error))?;
        packages::read(BufReader::with_capacity(64 << 10, text), number, wanted)
            .map_err(|error| unreadable(&error))
    }
}

fn title(release: &Release) -> String {
    match release.version() {
        Some(version) => format!("{} {version} ({})", release.origin(), release.codename()),
        None => format!("{} ({})", release.origin(), release.codename()),
    }
}
