//! Entries of sources.list and of `.sources` files (sources.list(5)).

use std::path::PathBuf;

use crate::deb822;

/// Whose signature an archive must bear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SignedBy {
    /// Keyrings, as absolute paths on the host.
    Files(Vec<PathBuf>),
    /// Fingerprints of keys in the host's usual keyrings: hexadecimal, upper case.
    Fingerprints(Vec<String>),
    /// A key written into the entry itself, in ASCII armour.
    Key(String),
}

/// One entry: an archive, or several that differ in URI and suite only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where the archive is; several are copies of each other.
    pub uris: Vec<String>,
    /// Suites such as `bookworm` or `bookworm-security`. Those that end in `/` (flat repositories) are left out.
    pub suites: Vec<String>,
    /// Components such as `main`.
    pub components: Vec<String>,
    /// The architectures that this entry is for; all if empty.
    pub architectures: Vec<String>,
    /// Whose signature is required; any key that the host trusts if absent.
    pub signed_by: Option<SignedBy>,
    /// What the entry says on `Valid-Until`, if it does.
    pub check_valid_until: Option<bool>,
}

/// Whether a value means yes, no or nothing, as apt reads it.
pub fn truth(value: &str) -> Option<bool> {
    match value.trim().to_ascii_lowercase().as_str() {
        "yes" | "true" | "with" | "on" | "enable" | "1" => Some(true),
        "no" | "false" | "without" | "off" | "disable" | "0" => Some(false),
        _ => None,
    }
}

/// Parses the one-line form: `deb [option=value …] URI suite component…`.
pub fn parse_list(text: &str) -> Vec<Entry> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Entry> {
    let line = line.split('#').next()?.trim();
    let mut rest = line.strip_prefix("deb")?;
    if !rest.starts_with([' ', '\t', '[']) {
        return None;
    }
    rest = rest.trim_start();
    let mut options = "";
    if let Some(inside) = rest.strip_prefix('[') {
        (options, rest) = inside.split_once(']')?;
    }
    let mut words = rest.split_whitespace();
    let uri = words.next()?.to_owned();
    let suite = words.next()?.to_owned();
    let mut entry = Entry {
        uris: vec![uri],
        suites: vec![suite],
        components: words.map(str::to_owned).collect(),
        architectures: Vec::new(),
        signed_by: None,
        check_valid_until: None,
    };
    for option in options.split_whitespace() {
        let Some((name, value)) = option.split_once('=') else { continue };
        match name.trim_end_matches(['+', '-']).to_ascii_lowercase().as_str() {
            // `arch+=` and `arch-=` alter the default list: only the plain form restricts.
            "arch" if name.eq_ignore_ascii_case("arch") => {
                entry.architectures = value.split(',').map(str::to_owned).collect();
            }
            "signed-by" => entry.signed_by = signed_by(&value.replace(',', " ")),
            "check-valid-until" => entry.check_valid_until = truth(value),
            _ => {}
        }
    }
    finish(entry)
}

/// Parses a `.sources` file.
pub fn parse_deb822(text: &str) -> Vec<Entry> {
    let one = |paragraph: &deb822::Paragraph| {
        if paragraph.get("Enabled").and_then(truth) == Some(false) {
            return None;
        }
        if !paragraph.words("Types").any(|kind| kind == "deb") {
            return None;
        }
        let list = |name| paragraph.words(name).map(str::to_owned).collect();
        finish(Entry {
            uris: list("URIs"),
            suites: list("Suites"),
            components: list("Components"),
            architectures: list("Architectures"),
            signed_by: paragraph.get("Signed-By").and_then(signed_by),
            check_valid_until: paragraph.get("Check-Valid-Until").and_then(truth),
        })
    };
    deb822::parse(text).iter().filter_map(one).collect()
}

fn signed_by(value: &str) -> Option<SignedBy> {
    if value.contains("-----BEGIN PGP PUBLIC KEY BLOCK-----") {
        // In a field, an empty line is written as a single dot.
        let lines = value.trim().lines().map(|line| if line == "." { "" } else { line });
        return Some(SignedBy::Key(lines.collect::<Vec<_>>().join("\n") + "\n"));
    }
    let words: Vec<&str> = value.split_whitespace().collect();
    if words.iter().any(|word| word.starts_with('/')) {
        let files = words.iter().filter(|word| word.starts_with('/'));
        return Some(SignedBy::Files(files.map(PathBuf::from).collect()));
    }
    let prints = words.iter().map(|word| word.trim_end_matches('!').to_ascii_uppercase());
    (!words.is_empty()).then(|| SignedBy::Fingerprints(prints.collect()))
}

fn finish(mut entry: Entry) -> Option<Entry> {
    entry.suites.retain(|suite| !suite.ends_with('/'));
    (!entry.suites.is_empty() && !entry.uris.is_empty()).then_some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_entries() {
        let text = "# deb http://old.example/ bookworm main\n\
             deb-src http://a.example/debian bookworm main\n\
             deb   [ arch=amd64,i386 signed-by=/usr/share/keyrings/x.gpg check-valid-until=no ] http://a.example/debian \
             bookworm main contrib # note\n\
             deb [trusted=yes] http://b.example/ ./\n\
             debx http://c.example/ bookworm main\n\
             deb http://d.example/\n";
        let found = parse_list(text);
        assert_eq!(found.len(), 1, "{found:?}");
        let entry = &found[0];
        assert_eq!(entry.uris, ["http://a.example/debian"]);
        assert_eq!(entry.suites, ["bookworm"]);
        assert_eq!(entry.components, ["main", "contrib"]);
        assert_eq!(entry.architectures, ["amd64", "i386"]);
        assert_eq!(entry.signed_by, Some(SignedBy::Files(vec!["/usr/share/keyrings/x.gpg".into()])));
        assert_eq!(entry.check_valid_until, Some(false));
    }

    #[test]
    fn deb822_entries() {
        let text = "Enabled: no\nTypes: deb\nURIs: http://a.example/\nSuites: x\nComponents: main\n\n\
             Types: deb-src\nURIs: http://a.example/\nSuites: x\nComponents: main\n\n\
             Types: deb deb-src\n# http://comment.example/\nURIs: http://a.example/ http://b.example/\nSuites: x\n y flat/\n\
             Components: main universe\nSigned-By: DDE9C9B7 f6ecb376!\n\n\
             Types: deb\nURIs: http://c.example/\nSuites: z\nComponents: main\nSigned-By:\n \
             -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINB\n -----END PGP PUBLIC KEY BLOCK-----\n";
        let found = parse_deb822(text);
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(found[0].uris.len(), 2);
        assert_eq!(found[0].suites, ["x", "y"]);
        assert_eq!(found[0].components, ["main", "universe"]);
        let prints = vec!["DDE9C9B7".to_owned(), "F6ECB376".to_owned()];
        assert_eq!(found[0].signed_by, Some(SignedBy::Fingerprints(prints)));
        let armour = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmQINB\n-----END PGP PUBLIC KEY BLOCK-----\n";
        assert_eq!(found[1].signed_by, Some(SignedBy::Key(armour.to_owned())));
    }
}
