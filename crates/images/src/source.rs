//! Files of packages, from the cache or from the archive.

use std::path::PathBuf;
use std::rc::Rc;

use serde::{Deserialize, Serialize};

use crate::Options;
use crate::archive::Archives;
use crate::cache::{Cache, Lock, Made, Stored};
use crate::deb::{Choice, Deb, DebFile};
use crate::error::Error;
use crate::fetch::sha256;
use crate::progress::Progress;

/// Files of one package, in the cache.
#[derive(Debug, Clone)]
pub struct PackageFiles {
    /// The archive that they come from, such as `Debian 12.15 (bookworm)`.
    pub archive: String,
    /// The package, such as `linux-image-6.1.0-50-cloud-amd64`.
    pub package: String,
    /// Its version.
    pub version: String,
    /// The files, in the order in which they were asked for.
    pub files: Vec<PackageFile>,
    /// Whether they were in the cache already.
    pub cached: bool,
}

/// One file of a package.
#[derive(Debug, Clone)]
pub struct PackageFile {
    /// Its path in the package, without a leading `/`.
    pub path: String,
    /// Its permission bits.
    pub mode: u32,
    /// Where it is now. Not to be changed: others use it too.
    pub stored: PathBuf,
    /// Its SHA-256, in hexadecimal.
    pub sha256: String,
}

impl PackageFile {
    /// The kernel module in it, unpacked: some packages have them compressed.
    pub fn module(&self) -> Result<Vec<u8>, Error> {
        let data = std::fs::read(&self.stored).map_err(Error::cache(&self.stored))?;
        let file = DebFile { path: self.path.clone(), mode: self.mode, data };
        file.module().map_err(|source| Error::Package { package: self.path.clone(), source })
    }
}

/// What the cache remembers of a package's files.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    archive: String,
    package: String,
    version: String,
    files: Vec<RecordedFile>,
}

#[derive(Debug, Serialize, Deserialize)]
struct RecordedFile {
    path: String,
    mode: u32,
    stored: Stored,
}

/// Gives files of packages. The archive is asked only for what the cache does not have, and its index read once.
pub struct Source<'a> {
    options: &'a Options,
    cache: Cache,
    /// Held from the first thing that is fetched.
    archives: Option<Archives>,
    lock: Option<Rc<Lock>>,
}

impl<'a> Source<'a> {
    /// A source by these options. Nothing is fetched or written yet.
    pub fn new(options: &'a Options) -> Result<Self, Error> {
        Ok(Self { options, cache: Cache::open(options.cache_dir.as_deref())?, archives: None, lock: None })
    }

    /// The first file that matches each of `patterns`, from the first of `packages` that there is, in its newest
    /// version. In a pattern, `*` stands for any characters, also for `/`; with `?` before it the file may be absent.
    ///
    /// A kernel's package without contents (`linux-image-cloud-amd64`) stands for the one with the kernel. Ask for all
    /// that belongs together, such as a kernel and its modules, in one call: then it is of one version.
    pub fn files(
        &mut self,
        packages: &[&str],
        patterns: &[&str],
        progress: &mut dyn Progress,
    ) -> Result<PackageFiles, Error> {
        let key = self.key(packages, patterns);
        if let Some(found) = self.cached(&key).filter(|_| !self.options.refresh) {
            return Ok(found);
        }
        self.lock(progress)?;
        // Another process may have fetched it while we waited.
        if let Some(found) = self.cached(&key).filter(|_| !self.options.refresh) {
            return Ok(found);
        }
        self.fetch(&key, packages, patterns, progress)?;
        self.cached(&key).map(|found| PackageFiles { cached: false, ..found }).ok_or_else(|| lost(&key))
    }

    /// Takes the cache's lock, once; it is held until this source is dropped.
    fn lock(&mut self, progress: &mut dyn Progress) -> Result<Rc<Lock>, Error> {
        if let Some(lock) = &self.lock {
            return Ok(lock.clone());
        }
        Ok(self.lock.insert(Rc::new(self.cache.lock(progress)?)).clone())
    }

    fn fetch(
        &mut self,
        key: &str,
        packages: &[&str],
        patterns: &[&str],
        progress: &mut dyn Progress,
    ) -> Result<(), Error> {
        let lock = &self.lock(progress)?;
        let Self { options, cache, archives, .. } = self;
        let archives = match archives {
            Some(archives) => archives,
            None => archives.insert(Archives::open(options, cache, lock, progress)?),
        };
        archives.look_for(packages, progress)?;
        let found = archives.package(packages)?;
        let package = found.clone();
        let partial = cache.partial(&package.expected.sha256, lock);
        let file = archives.download(found, &partial, progress)?;
        progress.begin(&format!("unpacking {}", package.name), None);
        let taken = take(std::io::BufReader::new(file), patterns);
        progress.finish();
        let taken = taken.map_err(|source| Error::Package { package: package.name.clone(), source })?;
        let mut files = Vec::new();
        for (pattern, file) in patterns.iter().zip(taken) {
            if file.is_none() && pattern.starts_with('?') {
                continue;
            }
            let missing = || Error::NoFile { package: package.name.clone(), file: (*pattern).to_owned() };
            let file = file.ok_or_else(missing)?;
            let name = file.path.rsplit('/').next().unwrap_or_default();
            files.push(RecordedFile {
                stored: cache.store(name, &file.data, lock)?,
                path: file.path,
                mode: file.mode,
            });
        }
        let record =
            Record { archive: archives.name(), package: package.name, version: package.version, files };
        cache.set_record(key, &record, lock)?;
        // All that we wanted of it is stored.
        let _ = std::fs::remove_file(partial);
        Ok(())
    }

    /// The file that was made and stored with this key, if it is sound.
    pub(crate) fn stored(&self, key: &str) -> Option<PathBuf> {
        self.cache.path(&self.cache.record::<Made>(key)?.stored)
    }

    /// Stores a file that we made from one with the SHA-256 `from`, and gives its path.
    pub(crate) fn store(
        &mut self,
        key: &str,
        from: &str,
        name: &str,
        bytes: &[u8],
        progress: &mut dyn Progress,
    ) -> Result<PathBuf, Error> {
        let lock = &self.lock(progress)?;
        let stored = self.cache.store(name, bytes, lock)?;
        self.cache.set_record(key, &Made { from: from.to_owned(), stored }, lock)?;
        self.stored(key).ok_or_else(|| lost(key))
    }

    fn cached(&self, key: &str) -> Option<PackageFiles> {
        let record: Record = self.cache.record(key)?;
        let file = |file: RecordedFile| {
            let stored = self.cache.path(&file.stored)?;
            Some(PackageFile { path: file.path, mode: file.mode, stored, sha256: file.stored.sha256 })
        };
        let files = record.files.into_iter().map(file).collect::<Option<Vec<_>>>()?;
        let Record { archive, package, version, .. } = record;
        Some(PackageFiles { archive, package, version, files, cached: true })
    }

    /// The record's name: readable, and different for everything that may lead to other files.
    fn key(&self, packages: &[&str], patterns: &[&str]) -> String {
        let Options { mirror, suite, arch, keyring, sysroot, .. } = self.options;
        let all = format!("1 {mirror:?} {suite:?} {arch} {keyring:?} {sysroot:?} {packages:?} {patterns:?}");
        let name =
            format!("{}-{arch}-{}", packages.first().unwrap_or(&"none"), suite.as_deref().unwrap_or("host"));
        let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.+".contains(c) { c } else { '-' };
        format!("{}-{}", name.chars().map(plain).take(100).collect::<String>(), &sha256(all.as_bytes())[..12])
    }
}

/// Something changes the cache while we use it.
fn lost(key: &str) -> Error {
    Error::cache(key)(std::io::Error::other("what was just written there has changed"))
}

/// For each pattern the first file that matches it.
fn take(
    package: impl std::io::Read,
    patterns: &[&str],
) -> Result<Vec<Option<DebFile>>, crate::deb::DebError> {
    let mut paths: Vec<Option<String>> = vec![None; patterns.len()];
    let choose = |path: &str| {
        let mut choice = Choice::Skip;
        for (taken, pattern) in paths.iter_mut().zip(patterns) {
            if taken.is_none() && matches(pattern.trim_start_matches('?'), path) {
                *taken = Some(path.to_owned());
                choice = Choice::Take;
            }
        }
        match choice {
            Choice::Take if paths.iter().all(Option::is_some) => Choice::TakeAndStop,
            choice => choice,
        }
    };
    let files = Deb::new(package)?.files(choose)?;
    let file = |path: Option<String>| files.iter().find(|file| Some(&file.path) == path.as_ref()).cloned();
    Ok(paths.into_iter().map(file).collect())
}

/// Whether `text` is what `pattern` describes; `*` stands for any characters.
fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((head, tail)) => {
            let Some(rest) = text.strip_prefix(head) else { return false };
            (0..=rest.len()).filter(|at| rest.is_char_boundary(*at)).any(|at| matches(tail, &rest[at..]))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns() {
        for (pattern, text) in
            [("boot/vmlinuz-*", "boot/vmlinuz-6"), ("*bin/busybox", "usr/bin/busybox"), ("*", "")]
        {
            assert!(matches(pattern, text), "{pattern} {text}");
        }
        assert!(matches("*/kvm.ko*", "usr/lib/modules/6/kernel/arch/x86/kvm/kvm.ko.xz"));
        for (pattern, text) in
            [("boot/vmlinuz-*", "x/boot/vmlinuz-6"), ("*bin/busybox", "bin/busyboxes"), ("a", "ab")]
        {
            assert!(!matches(pattern, text), "{pattern} {text}");
        }
    }
}
