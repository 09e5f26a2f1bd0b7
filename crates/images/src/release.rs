//! What an archive's `Release` file says: which files there are, how large, with which SHA-256 (Debian wiki,
//! "DebianRepository/Format").

use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::deb822::{self, Paragraph};

/// Size and digest of a file, as a signed text states them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// In bytes.
    pub size: u64,
    /// SHA-256, 64 hexadecimal digits in lower case.
    pub sha256: String,
}

impl Expected {
    /// Takes a digest and a size as written in indices; `None` unless both are well formed.
    pub fn parse(sha256: &str, size: &str) -> Option<Self> {
        let hexadecimal = sha256.len() == 64 && sha256.bytes().all(|c| c.is_ascii_hexdigit());
        let size = size.parse().ok()?;
        hexadecimal.then(|| Self { size, sha256: sha256.to_ascii_lowercase() })
    }
}

/// A `Release` file whose signature was checked.
#[derive(Debug, Clone)]
pub struct Release {
    fields: Paragraph,
    files: HashMap<String, Expected>,
}

impl Release {
    /// Takes apart the text that was signed. `None` if it lists no file by SHA-256.
    pub fn parse(text: &str) -> Option<Self> {
        let fields = deb822::parse(text).into_iter().next()?;
        let mut files = HashMap::new();
        for line in fields.get("SHA256")?.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let [sha256, size, path] = words[..]
                && let Some(expected) = Expected::parse(sha256, size)
            {
                files.insert(path.to_owned(), expected);
            }
        }
        (!files.is_empty()).then_some(Self { fields, files })
    }

    /// Who made it: `Debian`, `Ubuntu`, or another name.
    pub fn origin(&self) -> &str {
        self.fields.get("Origin").unwrap_or_default()
    }

    /// The name of the release, such as `bookworm`, or of the suite.
    pub fn codename(&self) -> &str {
        self.fields.get("Codename").or(self.fields.get("Suite")).unwrap_or_default()
    }

    /// Whether this is the release file of that suite, by its name or by its codename.
    pub fn is_of_suite(&self, suite: &str) -> bool {
        let first = suite.split('/').next().unwrap_or(suite);
        ["Suite", "Codename"]
            .iter()
            .filter_map(|name| self.fields.get(name))
            .any(|own| own == suite || own == first)
    }

    /// The version, such as `12.15`, if it has one.
    pub fn version(&self) -> Option<&str> {
        self.fields.get("Version")
    }

    /// Whether there is a component of this name. Security archives call theirs `updates/main`.
    pub fn has_component(&self, name: &str) -> bool {
        self.fields.words("Components").any(|word| word.trim_start_matches("updates/") == name)
    }

    /// Whether files can also be had under names made of their digests, which never change under a reader.
    pub fn by_hash(&self) -> bool {
        self.fields.get("Acquire-By-Hash") == Some("yes")
    }

    /// The stated size and digest of a file, by its path below the suite's directory.
    pub fn file(&self, path: &str) -> Option<&Expected> {
        self.files.get(path)
    }

    /// When this file was made and until when it may be used, in seconds since 1970.
    pub fn dates(&self) -> (Option<u64>, Option<u64>) {
        let date = |name| self.fields.get(name).and_then(parse_date);
        (date("Date"), date("Valid-Until"))
    }
}

/// The present time in seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Parses `Sat, 11 Jul 2026 10:16:37 UTC` to seconds since 1970.
fn parse_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let words: Vec<&str> = text.split_whitespace().collect();
    let [_, day, month, year, time, zone] = words[..] else { return None };
    if !["UTC", "GMT", "Z", "+0000"].contains(&zone) {
        return None;
    }
    let month = MONTHS.iter().position(|name| *name == month)? as u64 + 1;
    let (day, year): (u64, u64) = (day.parse().ok()?, year.parse().ok()?);
    if !(1970..10_000).contains(&year) || !(1..=31).contains(&day) {
        return None;
    }
    let clock: Vec<u64> =
        time.split(':').map(|part| part.parse().ok().filter(|part| *part < 61)).collect::<Option<_>>()?;
    let [hours, minutes, seconds] = clock[..] else { return None };
    // Days of the civil calendar, with years that begin in March so that the leap day comes last.
    let (year, month) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1;
    Some((days - 719_468) * 86_400 + hours * 3600 + minutes * 60 + seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_release_files() {
        assert_eq!(parse_date("Thu, 01 Jan 1970 00:00:00 UTC"), Some(0));
        assert_eq!(parse_date("Sat, 11 Jul 2026 10:16:37 UTC"), Some(1_783_764_997));
        assert_eq!(parse_date("Thu, 29 Feb 2024  3:00:00 UTC"), Some(1_709_175_600));
        for wrong in [
            "",
            "Sat, 11 Jul 2026 10:16:37 CEST",
            "Sat, 11 Jul 99999999999999999 10:16:37 UTC",
            "a b c d e f",
        ] {
            assert_eq!(parse_date(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn only_the_sha256_list_counts() {
        let digest = "a".repeat(64);
        let text = format!(
            "Origin: Debian\nComponents: updates/main x\nMD5Sum:\n 00 1 main/b\nSHA256:\n {digest} 12 main/a\n x 1 main/c\n"
        );
        let release = Release::parse(&text).unwrap();
        assert_eq!(release.file("main/a").map(|file| file.size), Some(12));
        assert!(release.file("main/b").is_none() && release.file("main/c").is_none());
        assert!(release.has_component("main") && !release.has_component("y"));
        assert!(Release::parse("Origin: Debian\nMD5Sum:\n 00 1 main/b\n").is_none());
    }
}
