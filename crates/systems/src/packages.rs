//! Packages that a machine of ours gets at its first start, beside those of its base: the host fetches them, for the guest may have
//! no network.

use std::path::Path;

use images::{Cache, Options, Progress, more_packages};
use tempfile::TempPath;

use crate::base::Base;
use crate::recipe::{self, Release};
use crate::{Error, instance};

/// Packages that were fetched and checked, with all that they need: a tar archive.
#[derive(Debug)]
pub struct Packages(TempPath);

impl Packages {
    /// Fetches `wanted`, and what these need beside the packages of `base`; `None` if it has all of them.
    pub fn fetch(
        release: Release,
        base: &Base,
        wanted: &[String],
        options: &Options,
        progress: &mut dyn Progress,
    ) -> Result<Option<Self>, Error> {
        if wanted.is_empty() {
            return Ok(None);
        }
        wanted.iter().try_for_each(|name| check_name(name))?;
        let cache = Cache::open(options.cache_dir.as_deref())?;
        let lock = cache.lock(progress)?;
        let wanted: Vec<&str> = wanted.iter().map(String::as_str).collect();
        let installed = base.packages.iter().map(|(name, version)| (name.as_str(), version.as_str()));
        let installed = installed.filter(|(name, _)| *name != recipe::BUSYBOX).collect();
        let vms = instance::vms()?;
        let file = tempfile::Builder::new().prefix(".new-").tempfile_in(&vms).map_err(Error::file(&vms))?;
        let path = file.into_temp_path();
        let options = release.options(options);
        let any = more_packages(&options, &wanted, &installed, &cache, &lock, &path, progress)?;
        Ok(any.then_some(Self(path)))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

/// Refuses names that no package can have (Debian Policy, 5.6.7).
pub(crate) fn check_name(name: &str) -> Result<(), Error> {
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || b"+-.".contains(&c);
    let fits = name.len() >= 2 && name.bytes().all(plain) && name.as_bytes()[0].is_ascii_alphanumeric();
    if fits { Ok(()) } else { Err(Error::PackageName(name.to_owned())) }
}
