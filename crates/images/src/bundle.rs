//! The packages of a whole system: chosen, fetched and checked.

use std::fs::File;
use std::io::{BufReader, Write};
use std::path::PathBuf;

use crate::Options;
use crate::archive::Archives;
use crate::cache::{Cache, Lock};
use crate::deb::{Choice, Deb, DebFile};
use crate::error::Error;
use crate::packages::Package;
use crate::progress::Progress;
use crate::resolve::{Unmet, resolve};
use crate::tree::Tree;

/// Packages first whose directories have modes of their own.
const FIRST: &str = "base-files";

/// The packages of a system, fetched, and where they come from.
pub struct Bundle<'a> {
    archive: String,
    sources: Vec<(String, String)>,
    packages: Vec<(Package, PathBuf)>,
    /// The packages' files are nobody else's while this is held.
    _lock: &'a Lock,
}

/// Hands on how far a step of several transfers is.
struct Part<'a>(&'a mut dyn Progress);

impl Progress for Part<'_> {
    fn begin(&mut self, _what: &str, _total: Option<u64>) {}
    fn advance(&mut self, bytes: u64) {
        self.0.advance(bytes);
    }
    fn finish(&mut self) {}
}

/// Fetches packages, each into a file of the cache. What was fetched before and lost to an interruption is not fetched again.
pub(crate) fn fetch(
    archives: &Archives,
    packages: Vec<&Package>,
    cache: &Cache,
    lock: &Lock,
    progress: &mut dyn Progress,
) -> Result<Vec<(Package, PathBuf)>, Error> {
    let size = packages.iter().map(|package| package.expected.size).sum();
    let what = match &packages[..] {
        [one] => format!("{} {}", one.name, one.version),
        some => format!("{} packages of {}", some.len(), archives.name()),
    };
    progress.begin(&what, Some(size));
    let get = |package: &Package| {
        let path = cache.partial(&package.expected.sha256, lock);
        archives.get(package, &path, &mut Part(progress))?;
        Ok((package.clone(), path))
    };
    let fetched = packages.into_iter().map(get).collect();
    progress.finish();
    fetched
}

impl<'a> Bundle<'a> {
    /// Fetches the essential and required packages of `options.suite`, those that are `wanted` (`?name` if there is such a
    /// package) and all that these depend on.
    pub fn fetch(
        options: &Options,
        wanted: &[&str],
        cache: &Cache,
        lock: &'a Lock,
        progress: &mut dyn Progress,
    ) -> Result<Self, Error> {
        let mut archives = Archives::open(options, cache, lock, progress)?;
        let index = archives.everything(progress)?;
        let unmet = |Unmet { package, needs }| Error::Unmet { archive: archives.name(), package, needs };
        let mut chosen = resolve(&index, wanted).map_err(unmet)?;
        chosen.sort_by_key(|package| package.name != FIRST);
        let packages = fetch(&archives, chosen, cache, lock, progress)?;
        let owned = |(uri, suite): (&str, &str)| (uri.to_owned(), suite.to_owned());
        Ok(Self {
            archive: archives.name(),
            sources: archives.sources().map(owned).collect(),
            packages,
            _lock: lock,
        })
    }

    /// The archive's name for people, such as `Debian 13.2 (trixie)`.
    pub fn archive(&self) -> &str {
        &self.archive
    }

    /// Where it comes from: URI and suite of the archive, then those of its updates.
    pub fn sources(&self) -> &[(String, String)] {
        &self.sources
    }

    /// Names and versions of the packages.
    pub fn versions(&self) -> impl Iterator<Item = (&str, &str)> {
        self.packages.iter().map(|(package, _)| (package.name.as_str(), package.version.as_str()))
    }

    /// The files that `choose` takes from the package `name`, or from the first whose name begins with it.
    pub fn files(&self, name: &str, choose: impl FnMut(&str) -> Choice) -> Result<Vec<DebFile>, Error> {
        let exact = self.packages.iter().find(|(package, _)| package.name == name);
        let like = || self.packages.iter().find(|(package, _)| package.name.starts_with(name));
        let missing = || Error::Unmet {
            archive: self.archive.clone(),
            package: "the system".to_owned(),
            needs: name.to_owned(),
        };
        let (package, path) = exact.or_else(like).ok_or_else(missing)?;
        let file = File::open(path).map_err(Error::cache(path))?;
        let files = Deb::new(BufReader::new(file)).and_then(|deb| deb.files(choose));
        files.map_err(|source| Error::Package { package: package.name.clone(), source })
    }

    /// Adds to `tree` what is in the packages but for those whose names pass `without`.
    pub fn unpack<W: Write>(
        &self,
        tree: &mut Tree<W>,
        without: impl Fn(&str) -> bool,
        progress: &mut dyn Progress,
    ) -> Result<(), Error> {
        let size = self.packages.iter().map(|(package, _)| package.expected.size).sum();
        progress.begin("unpacking packages", Some(size));
        let mut add = |(package, path): &(Package, PathBuf)| {
            if !without(&package.name) {
                let file = File::open(path).map_err(Error::cache(path))?;
                let added = tree.package(BufReader::with_capacity(256 << 10, file));
                added.map_err(|source| Error::Package { package: package.name.clone(), source })?;
            }
            progress.advance(package.expected.size);
            Ok(())
        };
        let done = self.packages.iter().try_for_each(&mut add);
        progress.finish();
        done
    }

    /// Removes the packages' files from the cache, where they are of no use any more.
    pub fn remove(self) {
        for (_, path) in self.packages {
            // What stays is swept away later.
            let _ = std::fs::remove_file(path);
        }
    }
}
