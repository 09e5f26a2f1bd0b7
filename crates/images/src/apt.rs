//! What the host's apt configuration says: which archives there are, whom they are signed by, and through which proxy
//! they are reached (sources.list(5), apt.conf(5), apt-transport-http(1)).

mod conf;
mod sources;

use std::path::{Path, PathBuf};

pub use conf::AptConf;
pub use sources::{Entry, SignedBy};

#[cfg(fuzzing)]
pub(crate) fn parse_sources(text: &str) {
    let _ = (sources::parse_list(text), sources::parse_deb822(text));
}

/// The apt configuration of one host.
#[derive(Debug, Default)]
pub struct Apt {
    /// The archives, in the order of the files; disabled ones and sources are left out.
    pub entries: Vec<Entry>,
    /// The settings of apt.conf.
    pub conf: AptConf,
    /// The distribution's name for its release, such as `bookworm` (os-release(5)).
    pub codename: Option<String>,
    /// The directory under which all of this was found: `/` but in tests.
    pub root: PathBuf,
}

impl Apt {
    /// Reads the configuration under `root`. What is missing or not readable counts as empty.
    pub fn load(root: &Path) -> Self {
        let conf = AptConf::load(root);
        let mut entries = Vec::new();
        let main = std::fs::read_to_string(root.join("etc/apt/sources.list")).unwrap_or_default();
        entries.extend(sources::parse_list(&main));
        for path in parts(&root.join("etc/apt/sources.list.d"), &["list", "sources"]) {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            if path.extension().is_some_and(|extension| extension == "list") {
                entries.extend(sources::parse_list(&text));
            } else {
                entries.extend(sources::parse_deb822(&text));
            }
        }
        for entry in &mut entries {
            entry.uris = entry.uris.iter().flat_map(|uri| mirrors(root, uri)).collect();
        }
        entries.retain(|entry| !entry.uris.is_empty());
        Self { entries, conf, codename: codename(root), root: root.to_owned() }
    }

    /// The keyrings that apt trusts for archives that do not name their own.
    pub fn trusted_keyrings(&self) -> Vec<PathBuf> {
        parts(&self.root.join("etc/apt/trusted.gpg.d"), &["gpg", "asc"])
    }
}

/// The files of a `.d` directory that apt would read, in its order (apt.conf(5), "files in the .d directories").
fn parts(dir: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let Ok(list) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = list.flatten().map(|item| item.path()).collect();
    paths.retain(|path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("~");
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or("");
        let plain = name.bytes().all(|c| c.is_ascii_alphanumeric() || b"-_.".contains(&c));
        plain && extensions.contains(&extension) && path.is_file()
    });
    paths.sort();
    paths
}

/// What a URI of a source stands for: itself, or the lines of a `mirror+file:` list (apt-transport-mirror(1)).
/// Kinds that we cannot read (cdrom:, ssh:, tor+http: …) are left out.
fn mirrors(root: &Path, uri: &str) -> Vec<String> {
    let known = |uri: &str| ["http://", "https://", "file:"].iter().any(|kind| uri.starts_with(kind));
    let uri = uri.strip_prefix("copy:").map_or_else(|| uri.to_owned(), |rest| format!("file:{rest}"));
    let Some(list) = uri.strip_prefix("mirror+file:") else {
        return if known(&uri) { vec![uri] } else { Vec::new() };
    };
    let path = root.join(list.trim_start_matches('/'));
    let text = std::fs::read_to_string(path).unwrap_or_default();
    // Each line: a URI and, after a tab, properties such as `priority:1`. The order of such files is by priority.
    let first = |line: &str| line.split_whitespace().next().map(str::to_owned);
    text.lines().filter_map(first).filter(|uri| known(uri)).collect()
}

/// `VERSION_CODENAME` of os-release(5).
fn codename(root: &Path) -> Option<String> {
    let text = ["etc/os-release", "usr/lib/os-release"]
        .iter()
        .find_map(|path| std::fs::read_to_string(root.join(path)).ok())?;
    let value = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(value.trim_matches(['"', '\'']).to_owned()).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn files_are_read_in_the_order_of_apt_and_strange_names_are_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        write(root, "etc/apt/sources.list", "deb http://one.example/debian bookworm main\n");
        write(root, "etc/apt/sources.list.d/b.list", "deb http://three.example/debian bookworm main\n");
        write(
            root,
            "etc/apt/sources.list.d/a.sources",
            "Types: deb\nURIs: http://two.example/debian/\nSuites: bookworm bookworm-updates\nComponents: main\n",
        );
        write(root, "etc/apt/sources.list.d/c.list.save", "deb http://no.example/debian bookworm main\n");
        write(root, "etc/apt/sources.list.d/d~.list", "deb http://no.example/debian bookworm main\n");
        write(root, "etc/os-release", "ID=debian\nVERSION_CODENAME=\"bookworm\"\n");
        let apt = Apt::load(root);
        let uris: Vec<_> = apt.entries.iter().flat_map(|entry| &entry.uris).collect();
        assert_eq!(
            uris,
            ["http://one.example/debian", "http://two.example/debian/", "http://three.example/debian"]
        );
        assert_eq!(apt.codename.as_deref(), Some("bookworm"));
    }

    #[test]
    fn mirror_lists_are_followed_and_foreign_kinds_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        write(
            root,
            "etc/apt/sources.list",
            "deb mirror+file:/etc/apt/mirrors.txt noble main\ndeb cdrom:[Debian]/ bookworm main\n\
             deb tor+http://x.onion/debian bookworm main\ndeb copy:/srv/debian bookworm main\n",
        );
        write(
            root,
            "etc/apt/mirrors.txt",
            "http://near.example/ubuntu/\tpriority:1\n\nhttps://far.example/ubuntu/\tpriority:2\nftp://no.example/\n",
        );
        let apt = Apt::load(root);
        assert_eq!(apt.entries.len(), 2);
        assert_eq!(apt.entries[0].uris, ["http://near.example/ubuntu/", "https://far.example/ubuntu/"]);
        assert_eq!(apt.entries[1].uris, ["file:/srv/debian"]);
    }

    #[test]
    fn a_host_without_apt_has_no_entries() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Apt::load(dir.path()).entries.is_empty());
    }
}
