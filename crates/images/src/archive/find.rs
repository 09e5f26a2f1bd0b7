//! Finding the archive: candidates from the configuration, and what they are by their signed `Release` files.

use super::{Archive, IndexFile, title};
use crate::Options;
use crate::apt::{Apt, Entry, SignedBy};
use crate::cache::{Cache, Lock};
use crate::error::Error;
use crate::fetch::{FetchError, Fetcher};
use crate::openpgp::Keyring;
use crate::progress::Progress;
use crate::release::{self, Release};

/// `Release` files have some 150 KB, indices of packages 50 MB.
const LARGEST_RELEASE: u64 = 16 << 20;
const LARGEST_INDEX: u64 = 1 << 30;
/// What distributions append to a release's name for the archives that go with it.
const POCKETS: [&str; 3] = ["-security", "-updates", "/updates"];
/// Names of Debian's suites that do not change with releases.
const SUITES: [&str; 5] = ["stable", "oldstable", "testing", "unstable", "sid"];
/// Origins whose kernels and busybox we know.
const ORIGINS: [&str; 2] = ["Debian", "Ubuntu"];
/// Keyrings that distributions install, trusted where apt's configuration names none.
const KEYRINGS: [&str; 4] = [
    "usr/share/keyrings/debian-archive-keyring.gpg",
    "usr/share/keyrings/debian-archive-keyring.pgp",
    "usr/share/keyrings/ubuntu-archive-keyring.gpg",
    "etc/apt/trusted.gpg",
];

/// Where an archive might be.
#[derive(Debug, Clone, PartialEq)]
struct Candidate<'a> {
    /// Copies of each other.
    uris: Vec<&'a str>,
    suite: String,
    signed_by: Option<&'a SignedBy>,
    check_valid_until: Option<bool>,
}

impl<'a> Candidate<'a> {
    fn new(entry: &'a Entry, suite: String) -> Self {
        let uris = entry.uris.iter().map(|uri| uri.trim_end_matches('/')).collect();
        Self { uris, suite, signed_by: entry.signed_by.as_ref(), check_valid_until: entry.check_valid_until }
    }

    /// The release's name without what distributions append to it, and what that is.
    fn split(&self) -> (&str, &str) {
        let pocket = POCKETS.iter().find(|pocket| self.suite.ends_with(**pocket)).copied().unwrap_or("");
        (self.suite.strip_suffix(pocket).unwrap_or(&self.suite), pocket)
    }
}

/// A suite whose `Release` file is signed by whom it has to be.
struct Checked {
    uri: String,
    suite: String,
    release: Release,
}

impl Checked {
    /// Whether it is the main archive of a distribution that we know.
    fn is_known(&self) -> bool {
        ORIGINS.contains(&self.release.origin()) && self.release.has_component("main")
    }
}

/// What finding archives takes.
pub(super) struct Finder<'a> {
    pub options: &'a Options,
    pub apt: &'a Apt,
    pub fetcher: &'a Fetcher,
    pub cache: &'a Cache,
    pub lock: &'a Lock,
}

impl<'a> Finder<'a> {
    /// The main archive, and after it those of its security and other updates, as far as they are configured.
    pub(super) fn find(&self, progress: &mut dyn Progress) -> Result<Vec<Archive>, Error> {
        progress.begin("looking for the archive", None);
        let main = match &self.options.mirror {
            Some(mirror) => self.mirror(mirror),
            None => self.configured(),
        };
        progress.finish();
        let (main, updates) = main?;
        let origin = main.release.origin().to_owned();
        let mut list = vec![self.archive(main, progress)?];
        for update in updates {
            match self.update(&update, &origin, progress) {
                Ok(archive) => list.extend(archive),
                // A guest with older packages is better than none, where it is not a question of trust.
                Err(Error::Fetch(error)) => {
                    progress.note(&format!("Going on without the updates of {}: {error}.", update.suite));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(list)
    }

    /// The archive of some updates, if there are any for this release and architecture.
    fn update(
        &self,
        candidate: &Candidate,
        origin: &str,
        progress: &mut dyn Progress,
    ) -> Result<Option<Archive>, Error> {
        let checked = match self.release(candidate) {
            Ok(checked) => checked,
            // Not every suite has updates: we may have made up the name.
            Err(Error::Fetch(FetchError::NotFound { .. })) => return Ok(None),
            Err(error) => return Err(error),
        };
        if checked.release.origin() != origin || !checked.release.has_component("main") {
            return Ok(None);
        }
        match self.archive(checked, progress) {
            Ok(archive) => Ok(Some(archive)),
            Err(Error::Archive { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The archive that the user named, and its updates. Without a suite, the host's own is tried, then Debian's
    /// stable one.
    fn mirror(&self, mirror: &'a str) -> Result<(Checked, Vec<Candidate<'a>>), Error> {
        let mut suites: Vec<&str> = self.options.suite.iter().map(String::as_str).collect();
        if suites.is_empty() {
            suites.extend(self.apt.codename.as_deref().into_iter().chain(["stable"]));
        }
        let candidate = |suite: String| Candidate {
            uris: vec![mirror.trim_end_matches('/')],
            suite,
            signed_by: None,
            check_valid_until: None,
        };
        let mut result = Err(Error::NoArchive);
        for suite in suites {
            result = self.release(&candidate(suite.to_owned()));
            if !matches!(result, Err(Error::Fetch(FetchError::NotFound { .. }))) {
                break;
            }
        }
        let main = result?;
        let updates = POCKETS.iter().map(|pocket| candidate(format!("{}{pocket}", main.suite))).collect();
        Ok((main, updates))
    }

    /// The main archive by apt's configuration, and where its updates are.
    fn configured(&self) -> Result<(Checked, Vec<Candidate<'a>>), Error> {
        let candidates = candidates(self.apt, &self.options.arch);
        if candidates.is_empty() {
            return Err(Error::NoArchive);
        }
        let known = |candidate: &Candidate| {
            let (base, _) = candidate.split();
            SUITES.contains(&base) || self.apt.codename.as_deref() == Some(base)
        };
        // The distribution's own suites first: what others have is fetched only if these fail.
        let main = |candidate: &&Candidate| candidate.split().1.is_empty();
        let (likely, others): (Vec<_>, Vec<_>) = candidates.iter().filter(main).partition(|one| known(one));
        let mut failure = None;
        for configured in likely.into_iter().chain(others) {
            let suite = self.options.suite.clone().unwrap_or_else(|| configured.suite.clone());
            let candidate = Candidate { suite, ..configured.clone() };
            match self.release(&candidate) {
                Ok(main) if main.is_known() => {
                    return Ok((main, updates(&candidates, &configured.suite, &candidate.suite)));
                }
                Ok(_) => {}
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        Err(failure.unwrap_or(Error::NoMainArchive { tried: candidates.len() }))
    }

    /// Fetches and checks what says which files an archive has, from the first of its copies that can be reached.
    fn release(&self, candidate: &Candidate) -> Result<Checked, Error> {
        let mut result = Err(Error::NoArchive);
        for uri in &candidate.uris {
            result = self.release_at(uri, candidate).map(|release| Checked {
                uri: (*uri).to_owned(),
                suite: candidate.suite.clone(),
                release,
            });
            if result.is_ok() {
                break;
            }
        }
        result
    }

    fn release_at(&self, uri: &str, candidate: &Candidate) -> Result<Release, Error> {
        let dir = format!("{uri}/dists/{}", candidate.suite);
        let url = format!("{dir}/InRelease");
        let keyring = self.keyring(candidate.signed_by);
        if keyring.is_empty() {
            return Err(Error::NoKeyring { url });
        }
        let utf8 = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let untrusted = |source| Error::Signature { url: url.clone(), source };
        let text = match self.fetcher.small(&url, LARGEST_RELEASE) {
            Ok(bytes) => keyring.verify_cleartext(&utf8(bytes), release::now()).map_err(untrusted)?,
            Err(missing @ FetchError::NotFound { .. }) => {
                // Without the older form either, it is the newer one's absence that is worth telling.
                let text =
                    self.fetcher.small(&format!("{dir}/Release"), LARGEST_RELEASE).map_err(|_| missing)?;
                let signature = self.fetcher.small(&format!("{dir}/Release.gpg"), LARGEST_RELEASE)?;
                keyring.verify_detached(&text, &signature, release::now()).map_err(untrusted)?;
                utf8(text)
            }
            Err(error) => return Err(error.into()),
        };
        let broken = |problem: String| Error::Archive { url: url.clone(), problem };
        let release = Release::parse(&text).ok_or_else(|| broken("lists no files by SHA-256".to_owned()))?;
        // A valid signature on another release, an old one for instance, must not pass.
        if !release.is_of_suite(&candidate.suite) {
            return Err(broken(format!("is that of {}", title(&release))));
        }
        self.check_dates(&release, candidate).map_err(|problem| Error::Date { url: url.clone(), problem })?;
        Ok(release)
    }

    fn check_dates(&self, release: &Release, candidate: &Candidate) -> Result<(), &'static str> {
        let flag = |name| self.apt.conf.flag(name).unwrap_or(true);
        let (made, valid_until) = release.dates();
        let now = release::now();
        // Ten seconds are what apt allows (Acquire::Max-FutureTime).
        if flag("Acquire::Check-Date") && made.is_some_and(|made| made > now + 10) {
            return Err("has an index from the future");
        }
        let check = candidate.check_valid_until.unwrap_or_else(|| flag("Acquire::Check-Valid-Until"));
        if check && flag("Acquire::Check-Date") && valid_until.is_some_and(|until| until < now) {
            return Err("has an index that is out of date");
        }
        Ok(())
    }

    /// The keys that may sign: those named with the archive or by the user, else all that the host trusts.
    fn keyring(&self, signed_by: Option<&SignedBy>) -> Keyring {
        let mut keyring = Keyring::default();
        if let Some(path) = &self.options.keyring {
            let _ = keyring.add_file(path);
            return keyring;
        }
        let root = &self.apt.root;
        match signed_by {
            Some(SignedBy::Files(paths)) => {
                for path in paths {
                    let _ = keyring.add_file(&root.join(path.strip_prefix("/").unwrap_or(path)));
                }
            }
            Some(SignedBy::Key(text)) => keyring.add(text.as_bytes()),
            Some(SignedBy::Fingerprints(_)) | None => {
                for path in KEYRINGS.iter().map(|path| root.join(path)).chain(self.apt.trusted_keyrings()) {
                    let _ = keyring.add_file(&path);
                }
                if let Some(SignedBy::Fingerprints(prints)) = signed_by {
                    keyring.retain(prints);
                }
            }
        }
        keyring
    }

    /// Fetches an archive's index of packages, in the smallest form that there is.
    fn archive(&self, checked: Checked, progress: &mut dyn Progress) -> Result<Archive, Error> {
        let Checked { uri, suite, release } = checked;
        let dir = format!("main/binary-{}", self.options.arch);
        let forms = ["Packages.xz", "Packages.gz", "Packages"];
        let base = format!("{uri}/dists/{suite}");
        let first =
            forms.iter().find_map(|name| Some((*name, release.file(&format!("{dir}/{name}"))?.clone())));
        let Some((name, expected)) = first else {
            let problem = format!("has no packages for the architecture {}", self.options.arch);
            return Err(Error::Archive { url: base, problem });
        };
        let size = release.file(&format!("{dir}/Packages")).map_or(LARGEST_INDEX, |plain| plain.size);
        let path = self.cache.partial(&expected.sha256, self.lock);
        progress.begin(&format!("index of {}", title(&release)), Some(expected.size));
        let mut get =
            |name: &str| self.fetcher.download(&format!("{base}/{dir}/{name}"), &expected, &path, progress);
        let by_hash = release.by_hash().then(|| get(&format!("by-hash/SHA256/{}", expected.sha256)));
        let result = match by_hash {
            Some(Err(Error::Fetch(FetchError::NotFound { .. }))) | None => get(name),
            Some(result) => result,
        };
        progress.finish();
        let index = IndexFile { file: result?, name, size: size.min(LARGEST_INDEX) };
        Ok(Archive { uri, suite, release, index })
    }
}

/// All archives of apt's configuration with a component `main`, in its order.
fn candidates<'a>(apt: &'a Apt, arch: &str) -> Vec<Candidate<'a>> {
    let usable = |entry: &&Entry| {
        // Guests may be of another architecture than the host; entries for neither are of no use.
        let fits = |one: &String| one == arch || one == "amd64";
        let fits = entry.architectures.is_empty() || entry.architectures.iter().any(fits);
        fits && entry.components.iter().any(|component| component == "main")
    };
    let each = |entry: &'a Entry| entry.suites.iter().map(|suite| Candidate::new(entry, suite.clone()));
    apt.entries.iter().filter(usable).flat_map(each).collect()
}

/// The candidates that hold updates of `configured`, with `suite` in its place where the user chose another.
fn updates<'a>(candidates: &[Candidate<'a>], configured: &str, suite: &str) -> Vec<Candidate<'a>> {
    let mut found: Vec<Candidate> = Vec::new();
    for candidate in candidates {
        let (base, pocket) = candidate.split();
        if base == configured && !pocket.is_empty() {
            let update = Candidate { suite: format!("{suite}{pocket}"), ..candidate.clone() };
            if !found.contains(&update) {
                found.push(update);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apt(text: &str) -> Apt {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("etc/apt")).unwrap();
        std::fs::write(dir.path().join("etc/apt/sources.list"), text).unwrap();
        Apt::load(dir.path())
    }

    #[test]
    fn updates_follow_the_suite_that_the_user_chose() {
        let apt = apt("deb http://a.example/debian/ bookworm main\n\
             deb http://a.example/debian bookworm-updates main\n\
             deb http://s.example/debian-security bookworm-security main\n\
             deb http://a.example/debian bookworm-backports main\n\
             deb http://a.example/debian sid main\n\
             deb [arch=armhf] http://b.example/debian bookworm main\n\
             deb http://c.example/x bookworm stable\n");
        let all = candidates(&apt, "i386");
        let suites: Vec<_> = all.iter().map(|one| (one.uris[0], one.suite.as_str())).collect();
        assert_eq!(
            suites,
            [
                ("http://a.example/debian", "bookworm"),
                ("http://a.example/debian", "bookworm-updates"),
                ("http://s.example/debian-security", "bookworm-security"),
                ("http://a.example/debian", "bookworm-backports"),
                ("http://a.example/debian", "sid"),
            ]
        );
        let found: Vec<_> = updates(&all, "bookworm", "trixie").into_iter().map(|one| one.suite).collect();
        assert_eq!(found, ["trixie-updates", "trixie-security"]);
        assert!(updates(&all, "sid", "sid").is_empty());
    }
}
