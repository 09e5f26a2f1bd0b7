//! The root directory of a system, as one tar archive made from packages: what dpkg would unpack, and its database of that
//! (dpkg(1), deb-triggers(5), "The Debian package management system's internals").
//!
//! To dpkg all packages look unpacked and not yet configured, so `dpkg --configure --pending` in that tree does the rest. The
//! system is one with merged /usr: `/bin`, `/lib` and their kind are links.

use std::collections::{BTreeMap, HashSet};
use std::io::{self, Read, Write};

use md5::{Digest, Md5};

use crate::deb::{Deb, DebError, Entry, Kind};

/// What lies below /usr, and has a link there.
const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// Writes the archive.
pub struct Tree<W: Write> {
    tar: tar::Builder<W>,
    directories: HashSet<String>,
    /// `/var/lib/dpkg/status`.
    status: String,
    /// `/var/lib/dpkg/triggers/File`, and files beside it by their names.
    file_triggers: String,
    triggers: BTreeMap<String, String>,
    mtime: u64,
}

impl<W: Write> Tree<W> {
    /// An archive that goes to `out`. What belongs to no package was made at `mtime`, in seconds since 1970.
    pub fn new(out: W, mtime: u64) -> io::Result<Self> {
        let mut tree = Self {
            tar: tar::Builder::new(out),
            directories: HashSet::new(),
            status: String::new(),
            file_triggers: String::new(),
            triggers: BTreeMap::new(),
            mtime,
        };
        tree.dir("usr", 0o755)?;
        for name in MERGED {
            tree.dir(&format!("usr/{name}"), 0o755)?;
            let link = tree.own(name, Kind::Symlink(format!("usr/{name}")), 0o777, 0);
            tree.write(name, &link, &mut io::empty())?;
        }
        Ok(tree)
    }

    /// Adds a directory of root's, unless it is there.
    pub fn dir(&mut self, path: &str, mode: u32) -> io::Result<()> {
        self.entry(&self.own(path, Kind::Directory, mode, 0), &mut io::empty())
    }

    /// Adds a file of root's.
    pub fn file(&mut self, path: &str, mode: u32, contents: &[u8]) -> io::Result<()> {
        self.entry(&self.own(path, Kind::File, mode, contents.len() as u64), &mut &contents[..])
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(&self.own(path, Kind::Symlink(target.to_owned()), 0o777, 0), &mut io::empty())
    }

    /// Adds all that is in a package.
    pub fn package(&mut self, package: impl Read) -> Result<(), DebError> {
        let deb = Deb::new(package)?;
        let control = deb.control()?;
        let text = |name: &str| {
            let file = control.iter().find(|file| file.path == name);
            file.map(|file| String::from_utf8_lossy(&file.data).into_owned()).unwrap_or_default()
        };
        let stanza = text("control");
        let field = |name: &str| field(&stanza, name).unwrap_or_default();
        let (name, arch) = (field("Package"), field("Architecture"));
        let plain = |text: &str| text.bytes().all(|c| c.is_ascii_alphanumeric() || b"+-._".contains(&c));
        if name.is_empty() || !plain(name) || !plain(arch) {
            return Err(DebError::Malformed("its name or architecture is none"));
        }
        // dpkg's name of it, where several architectures may have one installed.
        let unique = match field("Multi-Arch") {
            "same" => format!("{name}:{arch}"),
            _ => name.to_owned(),
        };
        let list = text("conffiles");
        // A line may have a flag before the path, of a file that is to go.
        let conffiles: HashSet<&str> =
            list.lines().map(str::trim).filter(|line| line.starts_with('/')).collect();
        let (mut paths, mut digests) = (String::new(), String::new());
        deb.walk(|entry, data| {
            let path = format!("/{}", entry.path);
            paths += if entry.path.is_empty() { "/." } else { &path };
            paths.push('\n');
            let mut data = Hashing { data, digest: Md5::new() };
            self.entry(entry, &mut data)?;
            if conffiles.contains(path.as_str()) {
                let digest: String =
                    data.digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
                digests += &format!(" {path} {digest}\n");
            }
            Ok(true)
        })?;
        self.register(&stanza, &digests);
        self.interests(&unique, &text("triggers"));
        let info = format!("var/lib/dpkg/info/{unique}");
        self.parents(&info)?;
        self.file(&format!("{info}.list"), 0o644, paths.as_bytes())?;
        for file in control.iter().filter(|file| file.path != "control" && !file.path.contains('/')) {
            self.file(&format!("{info}.{}", file.path), file.mode, &file.data)?;
        }
        Ok(())
    }

    /// Writes dpkg's database, and the end.
    pub fn finish(mut self) -> io::Result<W> {
        for dir in ["alternatives", "info", "parts", "triggers", "updates"] {
            self.parents(&format!("var/lib/dpkg/{dir}/x"))?;
        }
        let (status, files) = (std::mem::take(&mut self.status), std::mem::take(&mut self.file_triggers));
        self.file("var/lib/dpkg/status", 0o644, status.as_bytes())?;
        self.file("var/lib/dpkg/available", 0o644, b"")?;
        self.file("var/lib/dpkg/info/format", 0o644, b"1\n")?;
        self.file("var/lib/dpkg/triggers/File", 0o644, files.as_bytes())?;
        for (name, packages) in std::mem::take(&mut self.triggers) {
            self.file(&format!("var/lib/dpkg/triggers/{name}"), 0o644, packages.as_bytes())?;
        }
        self.tar.into_inner()
    }

    /// Adds the directories above `path` that are missing.
    pub fn parents(&mut self, path: &str) -> io::Result<()> {
        path.match_indices('/').try_for_each(|(at, _)| self.dir(&path[..at], 0o755))
    }

    fn own(&self, path: &str, kind: Kind, mode: u32, size: u64) -> Entry {
        Entry { path: path.to_owned(), kind, mode, uid: 0, gid: 0, mtime: self.mtime, size }
    }

    fn entry(&mut self, entry: &Entry, data: &mut dyn Read) -> io::Result<()> {
        // Those links are there from the start.
        if MERGED.contains(&entry.path.as_str()) {
            return Ok(());
        }
        let path = merged(&entry.path);
        self.parents(&path)?;
        if entry.kind == Kind::Directory && !self.directories.insert(path.clone()) {
            return Ok(());
        }
        self.write(&path, entry, data)
    }

    fn write(&mut self, path: &str, entry: &Entry, data: &mut dyn Read) -> io::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_mode(entry.mode);
        header.set_uid(entry.uid);
        header.set_gid(entry.gid);
        header.set_mtime(entry.mtime);
        header.set_size(if entry.kind == Kind::File { entry.size } else { 0 });
        let path = if path.is_empty() { "./" } else { path };
        match &entry.kind {
            Kind::File => self.tar.append_data(&mut header, path, data),
            Kind::Directory => {
                header.set_entry_type(tar::EntryType::Directory);
                self.tar.append_data(&mut header, path, io::empty())
            }
            Kind::Symlink(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                self.tar.append_link(&mut header, path, target)
            }
            Kind::Link(target) => {
                header.set_entry_type(tar::EntryType::Link);
                self.tar.append_link(&mut header, path, merged(target))
            }
        }
    }

    /// Adds a package to dpkg's list of them.
    fn register(&mut self, stanza: &str, conffiles: &str) {
        let (first, rest) = stanza.trim_end().split_once('\n').unwrap_or((stanza, ""));
        self.status += &format!("{first}\nStatus: install ok unpacked\n{rest}\n");
        if !conffiles.is_empty() {
            self.status += &format!("Conffiles:\n{conffiles}");
        }
        self.status.push('\n');
    }

    /// Notes which triggers a package wants to be told of.
    fn interests(&mut self, package: &str, triggers: &str) {
        for line in triggers.lines() {
            let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
            let (Some(directive), Some(trigger)) = (words.next(), words.next()) else { continue };
            let package = match directive {
                "interest" | "interest-await" => package.to_owned(),
                "interest-noawait" => format!("{package}/noawait"),
                _ => continue,
            };
            if trigger.starts_with('/') {
                self.file_triggers += &format!("{trigger} {package}\n");
            } else if !trigger.contains('/') && !trigger.starts_with('.') {
                *self.triggers.entry(trigger.to_owned()).or_default() += &format!("{package}\n");
            }
        }
    }
}

/// Reads, and takes a digest of what is read.
struct Hashing<'a> {
    data: &'a mut dyn Read,
    digest: Md5,
}

impl Read for Hashing<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.data.read(buffer)?;
        self.digest.update(&buffer[..read]);
        Ok(read)
    }
}

/// Where a path of a package is in a system with merged /usr.
fn merged(path: &str) -> String {
    let first = path.split('/').next().unwrap_or(path);
    match MERGED.contains(&first) {
        true => format!("usr/{path}"),
        false => path.to_owned(),
    }
}

/// The value of a field of one line in a control file.
fn field<'a>(stanza: &'a str, name: &str) -> Option<&'a str> {
    stanza.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A package of these entries and control files.
    fn deb(control: &[(&str, &str)], data: &[(&str, Kind, &str)]) -> Vec<u8> {
        let tar = |entries: &[(&str, Kind, &str)]| {
            let mut tree = tar::Builder::new(Vec::new());
            for (path, kind, text) in entries {
                let mut header = tar::Header::new_gnu();
                header.set_mode(0o751);
                header.set_size(text.len() as u64);
                match kind {
                    Kind::File => tree.append_data(&mut header, path, text.as_bytes()).unwrap(),
                    Kind::Directory => {
                        header.set_entry_type(tar::EntryType::Directory);
                        tree.append_data(&mut header, path, io::empty()).unwrap();
                    }
                    Kind::Symlink(to) => {
                        header.set_entry_type(tar::EntryType::Symlink);
                        tree.append_link(&mut header, path, to).unwrap();
                    }
                    Kind::Link(to) => {
                        header.set_entry_type(tar::EntryType::Link);
                        tree.append_link(&mut header, path, to).unwrap();
                    }
                }
            }
            tree.into_inner().unwrap()
        };
        let control: Vec<_> = control.iter().map(|(path, text)| (*path, Kind::File, *text)).collect();
        let mut bytes = b"!<arch>\n".to_vec();
        for (name, tar) in [("control.tar", tar(&control)), ("data.tar", tar(data))] {
            bytes.extend_from_slice(format!("{name:<48}{:<10}`\n", tar.len()).as_bytes());
            bytes.extend_from_slice(&tar);
        }
        bytes
    }

    /// What is in an archive: path with `@target` of links, and text.
    fn read(tar: &[u8]) -> Vec<(String, String)> {
        let mut archive = tar::Archive::new(tar);
        let one = |entry: io::Result<tar::Entry<_>>| {
            let mut entry = entry.unwrap();
            let link = entry.link_name_bytes().map(|to| format!("@{}", String::from_utf8_lossy(&to)));
            let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned() + &link.unwrap_or_default();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            (path, text)
        };
        archive.entries().unwrap().map(one).collect()
    }

    #[test]
    fn packages_look_unpacked_in_a_system_with_merged_usr() {
        let control = "Package: a\nArchitecture: amd64\nMulti-Arch: same\nDescription: x\n more\n";
        let a = deb(
            &[
                ("control", control),
                ("conffiles", "/etc/a.conf\nremove-on-upgrade /etc/old\n"),
                ("triggers", "interest-noawait /usr/lib/x # why\ninterest ldconfig\nactivate other\n"),
                ("postinst", "#!/bin/sh\n"),
            ],
            &[
                ("./", Kind::Directory, ""),
                ("./bin/", Kind::Directory, ""),
                ("./bin/a", Kind::File, "program"),
                ("./bin/b", Kind::Link("./bin/a".into()), ""),
                ("./etc/", Kind::Directory, ""),
                ("./etc/a.conf", Kind::File, "text"),
                ("./lib/c", Kind::Symlink("../etc/a.conf".into()), ""),
            ],
        );
        let b = deb(
            &[("control", "Package: b\nArchitecture: all\n"), ("triggers", "interest ldconfig\n")],
            &[("./etc/", Kind::Directory, "")],
        );
        let mut tree = Tree::new(Vec::new(), 1).unwrap();
        tree.package(&a[..]).unwrap();
        tree.package(&b[..]).unwrap();
        let found = read(&tree.finish().unwrap());
        let text = |path: &str| {
            let mut of = found.iter().filter(|(name, _)| name == path);
            let text = of.next().unwrap_or_else(|| panic!("no {path} in {found:?}")).1.as_str();
            assert!(of.next().is_none(), "{path} is there once");
            text
        };
        for path in ["bin@usr/bin", "usr/bin", "etc", "usr/bin/b@usr/bin/a", "usr/lib/c@../etc/a.conf"] {
            assert_eq!(text(path), "");
        }
        assert_eq!((text("usr/bin/a"), text("etc/a.conf")), ("program", "text"));
        let dpkg = |file: &str| text(&format!("var/lib/dpkg/{file}")).to_owned();
        assert_eq!(dpkg("info/a:amd64.list"), "/.\n/bin\n/bin/a\n/bin/b\n/etc\n/etc/a.conf\n/lib/c\n");
        assert_eq!(dpkg("info/a:amd64.postinst"), "#!/bin/sh\n");
        let digest = "1cb251ec0d568de6a929b520c4aed8d1"; // md5sum of "text"
        let status = format!(
            "Package: a\nStatus: install ok unpacked\nArchitecture: amd64\nMulti-Arch: same\nDescription: x\n more\n\
             Conffiles:\n /etc/a.conf {digest}\n\nPackage: b\nStatus: install ok unpacked\nArchitecture: all\n\n"
        );
        assert_eq!(dpkg("status"), status);
        assert_eq!(dpkg("triggers/File"), "/usr/lib/x a:amd64/noawait\n");
        assert_eq!(dpkg("triggers/ldconfig"), "a:amd64\nb\n");
    }

    #[test]
    fn a_package_without_a_sound_name_is_refused() {
        for control in ["", "Package: ../x\nArchitecture: all\n", "Package: x\nArchitecture: a/b\n"] {
            let mut tree = Tree::new(Vec::new(), 1).unwrap();
            assert!(tree.package(&deb(&[("control", control)], &[])[..]).is_err(), "{control}");
        }
    }
}
