//! Packages that a system gets beside those that it was made of.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use crate::Options;
use crate::archive::Archives;
use crate::bundle;
use crate::cache::{Cache, Lock};
use crate::error::Error;
use crate::packages::Package;
use crate::progress::Progress;
use crate::resolve::{More, Unmet, resolve_more};

/// Fetches the packages `wanted` of `options.suite` and what they need beside `installed` (versions by names), and writes them to the
/// file `out` as one tar archive: `NAME.deb`, and `needed/NAME.deb` for what is new but was not asked for. `false` if there is nothing to be added.
///
/// What was fetched stays in the cache for a while.
pub fn more_packages(
    options: &Options,
    wanted: &[&str],
    installed: &HashMap<&str, &str>,
    cache: &Cache,
    lock: &Lock,
    out: &Path,
    progress: &mut dyn Progress,
) -> Result<bool, Error> {
    let mut archives = Archives::open(options, cache, lock, progress)?;
    let index = archives.everything(progress)?;
    let unmet = |Unmet { package, needs }: Unmet| match wanted.contains(&needs.as_str()) {
        true => Error::NoPackage { archive: archives.name(), package: needs, arch: options.arch.clone() },
        false => Error::Unmet { archive: archives.name(), package, needs },
    };
    let More { wanted, needed } = resolve_more(&index, installed, wanted).map_err(unmet)?;
    let (asked_for, all) = (wanted.len(), [wanted, needed].concat());
    if all.is_empty() {
        return Ok(false);
    }
    let fetched = bundle::fetch(&archives, all, cache, lock, progress)?;
    let mut tar = tar::Builder::new(File::create(out).map_err(Error::cache(out))?);
    for (n, (package, path)) in fetched.iter().enumerate() {
        let Package { name, .. } = package;
        // What is only renewed stays what it was: wanted by somebody, or by itself.
        let new = n >= asked_for && !installed.contains_key(name.as_str());
        let name = if new { format!("needed/{name}.deb") } else { format!("{name}.deb") };
        let mut file = File::open(path).map_err(Error::cache(path))?;
        tar.append_file(name, &mut file).map_err(Error::cache(out))?;
    }
    tar.finish().map_err(Error::cache(out))?;
    Ok(true)
}
