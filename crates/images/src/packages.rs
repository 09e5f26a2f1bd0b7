//! The index of packages: which there are, of what version, and where (deb-control(5), "DebianRepository/Format").

use std::cmp::Ordering;
use std::io::{self, BufRead};

use crate::deb822::Paragraphs;
use crate::release::Expected;

/// One package of an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version, in Debian's form: `[epoch:]upstream[-revision]`.
    pub version: String,
    /// What it needs, as written.
    pub depends: String,
    /// What has to be there before it is unpacked, as written.
    pub pre_depends: String,
    /// Other names that it stands for, as written.
    pub provides: String,
    /// How much every system wants it.
    pub priority: Priority,
    /// Whether a system without it would not work.
    pub essential: bool,
    /// Where its file is, below the archive's URI.
    pub filename: String,
    /// Size and digest of that file.
    pub expected: Expected,
    /// Which of the archives that are read has it.
    pub archive: usize,
}

impl Package {
    /// What it needs: each clause is one or several alternatives, as written.
    pub fn needs(&self) -> impl Iterator<Item = &str> {
        let clauses = self.pre_depends.split(',').chain(self.depends.split(','));
        clauses.map(str::trim).filter(|clause| !clause.is_empty())
    }
}

/// How much every system wants a package, most first (Debian Policy, 2.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Without it dpkg may not work.
    Required,
    /// Expected on any Unix.
    Important,
    /// What a system with a terminal has.
    Standard,
    /// Everything else.
    Optional,
}

impl Priority {
    fn parse(text: &str) -> Self {
        match text {
            "required" => Self::Required,
            "important" => Self::Important,
            "standard" => Self::Standard,
            _ => Self::Optional,
        }
    }
}

/// Reads an index and keeps the packages whose name passes `wanted`. Takes memory for these only.
pub fn read(index: impl BufRead, archive: usize, wanted: impl Fn(&str) -> bool) -> io::Result<Vec<Package>> {
    const FIELDS: [&str; 10] = [
        "Package",
        "Version",
        "Depends",
        "Pre-Depends",
        "Provides",
        "Priority",
        "Essential",
        "Filename",
        "Size",
        "SHA256",
    ];
    let mut found = Vec::new();
    for paragraph in Paragraphs::new(index, |field| FIELDS.contains(&field)) {
        let paragraph = paragraph?;
        let field = |name| paragraph.get(name).unwrap_or_default();
        if !wanted(field("Package")) {
            continue;
        }
        let filename = field("Filename").trim_start_matches("./");
        let leaves = filename.starts_with('/') || filename.split('/').any(|part| part == "..");
        if let Some(expected) = Expected::parse(field("SHA256"), field("Size")).filter(|_| !leaves) {
            found.push(Package {
                name: field("Package").to_owned(),
                version: field("Version").to_owned(),
                depends: field("Depends").to_owned(),
                pre_depends: field("Pre-Depends").to_owned(),
                provides: field("Provides").to_owned(),
                priority: Priority::parse(field("Priority")),
                essential: field("Essential") == "yes",
                filename: filename.to_owned(),
                expected,
                archive,
            });
        }
    }
    Ok(found)
}

/// The newest package of this name, in exactly the version if one is given.
pub fn newest<'a>(packages: &'a [Package], name: &str, version: Option<&str>) -> Option<&'a Package> {
    let same = packages.iter().filter(|one| one.name == name);
    let fits = same.filter(|one| version.is_none_or(|version| one.version == version));
    fits.max_by(|a, b| compare_versions(&a.version, &b.version))
}

/// Where a package without contents leads: the first dependency whose name begins with `prefix`, and the version that
/// it must have exactly, if one is stated. `linux-image-cloud-amd64` leads to `linux-image-6.1.0-50-cloud-amd64`.
pub fn leads_to(depends: &str, prefix: &str) -> Option<(String, Option<String>)> {
    let first = depends.split([',', '|']).map(str::trim).find(|item| item.starts_with(prefix))?;
    let name = first.split([' ', '(', ':']).next()?.to_owned();
    let relation = first.split_once('(').map(|(_, rest)| rest.trim_end_matches(')').trim());
    let exact =
        relation.and_then(|relation| relation.strip_prefix('=')).map(|version| version.trim().to_owned());
    Some((name, exact))
}

/// Compares versions as dpkg does (deb-version(7)).
pub fn compare_versions(a: &str, b: &str) -> Ordering {
    let split = |version: &str| {
        let (epoch, rest) = version.split_once(':').unwrap_or(("0", version));
        let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, "0"));
        (epoch.parse::<u64>().unwrap_or(0), upstream.to_owned(), revision.to_owned())
    };
    let (a, b) = (split(a), split(b));
    a.0.cmp(&b.0).then_with(|| compare_parts(&a.1, &b.1)).then_with(|| compare_parts(&a.2, &b.2))
}

/// Compares by turns a run of other characters and a run of digits.
fn compare_parts(a: &str, b: &str) -> Ordering {
    // `~` sorts before the end, the end before letters, letters before everything else.
    let weight = |c: Option<&u8>| match c {
        Some(b'~') => -1,
        None => 0,
        Some(c) if c.is_ascii_digit() => 0,
        Some(c) if c.is_ascii_alphabetic() => i32::from(*c),
        Some(c) => i32::from(*c) + 256,
    };
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    while !a.is_empty() || !b.is_empty() {
        loop {
            let other = |c: Option<&u8>| c.is_some_and(|c| !c.is_ascii_digit());
            if !other(a.first()) && !other(b.first()) {
                break;
            }
            match weight(a.first()).cmp(&weight(b.first())) {
                Ordering::Equal => (a, b) = (a.get(1..).unwrap_or(a), b.get(1..).unwrap_or(b)),
                unequal => return unequal,
            }
        }
        let digits = |text: &[u8]| text.iter().take_while(|c| c.is_ascii_digit()).count();
        let ((x, rest_a), (y, rest_b)) = (a.split_at(digits(a)), b.split_at(digits(b)));
        let bare = |number: &[u8]| number[number.iter().take_while(|c| **c == b'0').count()..].to_vec();
        let (x, y) = (bare(x), bare(y));
        match x.len().cmp(&y.len()).then_with(|| x.cmp(&y)) {
            Ordering::Equal => (a, b) = (rest_a, rest_b),
            unequal => return unequal,
        }
    }
    Ordering::Equal
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_in_dpkg() {
        let rising = [
            "0~",
            "0",
            "1.0~rc1-1",
            "1.0~rc1-2",
            "1.0",
            "1.0-0.1",
            "1.0-1",
            "1.0-1+b1",
            "1.0+dfsg-1",
            "1.9",
            "1.10",
            "6.1.9-1",
            "6.1.112-1",
            "6.1.112-10",
            "6.12.9-1~bpo12+1",
            "6.12.9-1",
            "1:0.1",
        ];
        for (i, a) in rising.iter().enumerate() {
            for (j, b) in rising.iter().enumerate() {
                assert_eq!(compare_versions(a, b), i.cmp(&j), "{a} {b}");
            }
        }
        assert_eq!(compare_versions("1.01-1", "0:1.1-1"), Ordering::Equal);
        assert_eq!(compare_versions("1.0", "1.0-0"), Ordering::Equal);
    }

    #[test]
    fn dependencies_lead_to_the_kernel() {
        let exact = leads_to("foo, linux-image-6.1.0-50-cloud-amd64 (= 6.1.176-1), bar", "linux-image-");
        assert_eq!(exact, Some(("linux-image-6.1.0-50-cloud-amd64".into(), Some("6.1.176-1".into()))));
        let any = leads_to("linux-image-6.8.0-49-generic | x, linux-firmware", "linux-image-");
        assert_eq!(any, Some(("linux-image-6.8.0-49-generic".into(), None)));
        assert_eq!(leads_to("kmod, linux-base (>= 4.3~)", "linux-image-"), None);
    }

    #[test]
    fn packages_that_would_leave_the_archive_are_not_taken() {
        let digest = "0".repeat(64);
        let one = |name: &str, file: &str| {
            format!("Package: {name}\nVersion: 1\nFilename: {file}\nSize: 5\nSHA256: {digest}\n\n")
        };
        let index =
            one("a", "pool/a.deb") + &one("b", "pool/../../b.deb") + &one("c", "/c") + &one("d", "./d.deb");
        let found = read(index.as_bytes(), 0, |name| name != "x").unwrap();
        let files: Vec<_> = found.iter().map(|one| one.filename.as_str()).collect();
        assert_eq!(files, ["pool/a.deb", "d.deb"]);
    }
}
