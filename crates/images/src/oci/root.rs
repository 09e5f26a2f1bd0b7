//! A root file system, put together in memory from layers.
//!
//! Nothing of it touches the host's file system: names, links and `..` mean what they mean in the image, and end at its root.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::sync::Arc;

use tar::{Archive, EntryType};

use super::Config;
use crate::cpio::{Cpio, Inode};

/// How many symbolic links may lead to one another.
const MAX_LINKS: usize = 40;
const MAX_ENTRIES: usize = 1 << 20;
const MAX_PATH: usize = 4096;
const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";

#[derive(Debug, Clone)]
enum Kind {
    Directory,
    /// Its contents, which hard links share.
    File(Arc<Vec<u8>>),
    Symlink(String),
    /// A character or block device, or a pipe: the type's bits of the mode, major and minor.
    Node(u32, u32, u32),
}

#[derive(Debug, Clone)]
struct Entry {
    kind: Kind,
    /// Permission bits.
    mode: u32,
    owner: (u32, u32),
    /// Which layer it is of.
    layer: usize,
}

/// The files of an image.
#[derive(Debug, Default)]
pub struct Root {
    /// By path, without a leading `/`; the root directory is not in it.
    entries: BTreeMap<String, Entry>,
    layers: usize,
    /// Bytes of contents.
    size: u64,
}

impl Root {
    /// Adds a layer, a tar archive, over those that are there; `limit` is for all contents together. Says what is wrong.
    pub fn add(&mut self, layer: impl Read, limit: u64) -> Result<(), String> {
        self.layers += 1;
        let mut archive = Archive::new(layer);
        let damaged = |error: std::io::Error| format!("a layer is damaged ({error})");
        for entry in archive.entries().map_err(damaged)? {
            let mut entry = entry.map_err(damaged)?;
            let path = entry.path_bytes().into_owned();
            let Some(path) = String::from_utf8(path).ok().and_then(|path| plain(&path)) else {
                return Err("a layer has a path that is none".to_owned());
            };
            if path.is_empty() {
                continue; // the root directory itself
            }
            if self.entries.len() >= MAX_ENTRIES {
                return Err("it has more than a million files".to_owned());
            }
            let (folder, name) = path.rsplit_once('/').unwrap_or(("", &path));
            let folder =
                self.folder(folder).ok_or_else(|| format!("{path:?} lies in what is no directory"))?;
            if name == OPAQUE {
                self.whiteout(&folder, false);
                continue;
            }
            let place = join(&folder, name);
            if let Some(gone) = name.strip_prefix(WHITEOUT) {
                self.whiteout(&join(&folder, gone), true);
                continue;
            }
            let header = entry.header();
            let number = |field: std::io::Result<u64>| field.map_or(0, |value| value as u32);
            let mode = header.mode().unwrap_or(0o755) & 0o7777;
            let owner = (number(header.uid()), number(header.gid()));
            let device = |header: &tar::Header| {
                let field = |value: std::io::Result<Option<u32>>| value.ok().flatten().unwrap_or(0);
                (field(header.device_major()), field(header.device_minor()))
            };
            let target = || -> Result<String, String> {
                let target = entry.link_name_bytes().unwrap_or_default().into_owned();
                String::from_utf8(target)
                    .ok()
                    .filter(|target| !target.is_empty() && target.len() <= MAX_PATH && !target.contains('\0'))
                    .ok_or_else(|| format!("{path:?} links to nothing"))
            };
            let kind = match header.entry_type() {
                EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                    self.size = self.size.saturating_add(entry.size());
                    if self.size > limit {
                        return Err(TOO_LARGE.to_owned());
                    }
                    let mut contents = Vec::new();
                    let room = entry.size();
                    (&mut entry).take(room).read_to_end(&mut contents).map_err(damaged)?;
                    Kind::File(contents.into())
                }
                EntryType::Directory => Kind::Directory,
                EntryType::Symlink => Kind::Symlink(target()?),
                EntryType::Link => {
                    let target = target()?;
                    let there =
                        plain(&target).and_then(|target| self.entries.get(&self.place(&target)?).cloned());
                    match there {
                        Some(Entry { kind: Kind::Directory, .. }) | None => {
                            return Err(format!("{path:?} is a hard link to {target:?}, which is no file"));
                        }
                        Some(other) => {
                            self.put(place, Entry { layer: self.layers, ..other });
                            continue;
                        }
                    }
                }
                EntryType::Char => Kind::Node(0o020000, device(header).0, device(header).1),
                EntryType::Block => Kind::Node(0o060000, device(header).0, device(header).1),
                EntryType::Fifo => Kind::Node(0o010000, 0, 0),
                // Extended headers and what nobody knows.
                _ => continue,
            };
            self.put(place, Entry { kind, mode, owner, layer: self.layers });
        }
        Ok(())
    }

    /// Puts an entry in its place; a directory that is there keeps what is in it.
    fn put(&mut self, place: String, entry: Entry) {
        let both = matches!(entry.kind, Kind::Directory)
            && self.entries.get(&place).is_some_and(|old| matches!(old.kind, Kind::Directory));
        if !both {
            self.remove(&place, |_| true, true);
        }
        self.entries.insert(place, entry);
    }

    /// Removes what lower layers have at a place, or below it.
    fn whiteout(&mut self, place: &str, itself: bool) {
        let layer = self.layers;
        self.remove(place, |entry| entry.layer < layer, itself);
    }

    fn remove(&mut self, place: &str, which: impl Fn(&Entry) -> bool, itself: bool) {
        let below = if place.is_empty() { String::new() } else { format!("{place}/") };
        let mut gone: Vec<String> = self
            .entries
            .range(below.clone()..)
            .take_while(|(path, _)| path.starts_with(&below))
            .filter(|(_, entry)| which(entry))
            .map(|(path, _)| path.clone())
            .collect();
        if itself && self.entries.get(place).is_some_and(&which) {
            gone.push(place.to_owned());
        }
        for path in gone {
            // A directory of a lower layer stays if this one has put something into it.
            self.entries.remove(&path);
        }
    }

    /// Where `path` leads when the links in all but its last part are followed; `None` where that ends nowhere.
    fn place(&self, path: &str) -> Option<String> {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        Some(join(&self.follow(folder)?, name))
    }

    /// Where `path` leads when all links are followed: what is not there leads to itself. `None` where links lead in circles.
    fn follow(&self, path: &str) -> Option<String> {
        let mut done = String::new();
        let mut rest: Vec<String> = path.split('/').rev().map(str::to_owned).collect();
        let mut links = 0;
        while let Some(part) = rest.pop() {
            match part.as_str() {
                "" | "." => continue,
                // At the root it stays there.
                ".." => {
                    done.truncate(done.rfind('/').unwrap_or(0));
                    continue;
                }
                _ => {}
            }
            let next = join(&done, &part);
            match self.entries.get(&next).map(|entry| &entry.kind) {
                Some(Kind::Symlink(target)) => {
                    links += 1;
                    if links > MAX_LINKS || rest.len() > MAX_PATH {
                        return None;
                    }
                    if target.starts_with('/') {
                        done.clear();
                    }
                    rest.extend(target.split('/').rev().map(str::to_owned));
                }
                _ => done = next,
            }
        }
        Some(done)
    }

    /// Where a directory is, made if it is missing; `None` if something else is there.
    fn folder(&mut self, path: &str) -> Option<String> {
        let place = self.follow(path)?;
        let ends = place.match_indices('/').map(|(at, _)| at).chain([place.len()]);
        let missing: Vec<String> = ends
            .map(|end| place[..end].to_owned())
            .filter(|path| !path.is_empty() && !self.entries.contains_key(path))
            .collect();
        for path in missing {
            let entry = Entry { kind: Kind::Directory, mode: 0o755, owner: (0, 0), layer: self.layers };
            self.entries.insert(path, entry);
        }
        let is_directory =
            |place: &str| self.entries.get(place).is_some_and(|entry| matches!(entry.kind, Kind::Directory));
        // All of the way: a file may be in it.
        let mut ends = place.match_indices('/').map(|(at, _)| at).chain([place.len()]);
        (place.is_empty() || ends.all(|end| is_directory(&place[..end]))).then_some(place)
    }

    /// A file's contents.
    pub fn read(&self, path: &str) -> Option<&[u8]> {
        match &self.entries.get(&self.follow(path)?)?.kind {
            Kind::File(contents) => Some(contents),
            _ => None,
        }
    }

    /// The absolute path of a program, which is looked for as a shell does.
    pub fn program(&self, name: &str, config: &Config) -> Option<String> {
        const USUAL: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        let is_program = |path: &String| self.read(path).is_some();
        if name.contains('/') {
            let path = if name.starts_with('/') {
                name.to_owned()
            } else {
                format!("{}/{name}", config.working_dir)
            };
            return Some(path).filter(is_program);
        }
        let path = config.env.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or(USUAL);
        path.split(':').map(|dir| format!("{dir}/{name}")).find(is_program)
    }

    /// The numbers of `USER[:GROUP]`, each a name or a number; of none it is root's.
    pub fn user(&self, user: &str) -> Option<(u32, u32)> {
        let (name, group) = user.split_once(':').unwrap_or((user, ""));
        let field = |line: &[String], at: usize| line.get(at)?.parse::<u32>().ok();
        let passwd = self.lines("etc/passwd");
        let line = passwd.iter().find(|line| line.first().is_some_and(|first| first == name));
        let (user, own) = match (name, line) {
            ("", _) => (0, 0),
            (_, Some(line)) => (field(line, 2)?, field(line, 3)?),
            (number, None) => {
                let number: u32 = number.parse().ok()?;
                let line = passwd.iter().find(|line| field(line, 2) == Some(number));
                (number, line.and_then(|line| field(line, 3)).unwrap_or(0))
            }
        };
        let group = match group {
            "" => own,
            name => match self
                .lines("etc/group")
                .iter()
                .find(|line| line.first().is_some_and(|first| first == name))
            {
                Some(line) => field(line, 2)?,
                None => name.parse().ok()?,
            },
        };
        Some((user, group))
    }

    /// The home directory of a user.
    pub fn home(&self, user: u32) -> Option<String> {
        let user = user.to_string();
        let line = self.lines("etc/passwd").into_iter().find(|line| line.get(2) == Some(&user))?;
        line.get(5).filter(|home| home.starts_with('/')).cloned()
    }

    fn lines(&self, path: &str) -> Vec<Vec<String>> {
        let text = String::from_utf8_lossy(self.read(path).unwrap_or_default()).into_owned();
        text.lines().map(|line| line.split(':').map(str::to_owned).collect()).collect()
    }

    /// Adds all of it to an archive.
    pub fn write(&self, image: &mut Cpio) {
        let mut links: HashMap<*const Vec<u8>, u32> = HashMap::new();
        for entry in self.entries.values() {
            if let Kind::File(contents) = &entry.kind {
                *links.entry(Arc::as_ptr(contents)).or_default() += 1;
            }
        }
        let mut numbers: HashMap<*const Vec<u8>, u32> = HashMap::new();
        for (path, entry) in &self.entries {
            let Entry { mode, owner, .. } = *entry;
            let plain = Inode { owner, ..Inode::default() };
            match &entry.kind {
                Kind::Directory => image.inode(path, 0o040000 | mode, plain, &[]),
                Kind::Symlink(target) => image.inode(path, 0o120777, plain, target.as_bytes()),
                Kind::Node(kind, major, minor) => {
                    image.inode(path, kind | mode, Inode { device: (*major, *minor), ..plain }, &[])
                }
                Kind::File(contents) => {
                    let file = Arc::as_ptr(contents);
                    let links = links.get(&file).copied().unwrap_or(1);
                    let first = numbers.get(&file).copied();
                    let inode = Inode { links, number: first, ..plain };
                    // The kernel takes the contents of the first of them.
                    let data: &[u8] = if first.is_some() { &[] } else { contents };
                    let number = image.inode(path, 0o100000 | mode, inode, data);
                    numbers.entry(file).or_insert(number);
                    number
                }
            };
        }
    }
}

/// What [`Root::add`] says of more than its limit.
pub const TOO_LARGE: &str = "too large";

fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}

/// A path in its plain form, relative to the root; `None` if it is none, or leads upwards.
fn plain(path: &str) -> Option<String> {
    let parts: Vec<&str> = path.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    let sound = path.len() <= MAX_PATH && !path.contains('\0') && !parts.contains(&"..");
    sound.then(|| parts.join("/"))
}

#[cfg(test)]
mod tests;
