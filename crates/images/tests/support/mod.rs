//! An archive made by the test, and a server for it that can misbehave.
#![allow(dead_code)] // each test program uses some of it

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use images::Options;
use pgp::composed::{
    CleartextSignedMessage, DetachedSignature, KeyType, SecretKeyParamsBuilder, SignedSecretKey,
    SubkeyParamsBuilder,
};
use pgp::crypto::hash::HashAlgorithm;
use pgp::types::Password;
use sha2::{Digest, Sha256};

/// The key that the archives are signed with: its signing subkey does it, as Debian's.
pub static KEY: LazyLock<SignedSecretKey> = LazyLock::new(make_key);

pub fn make_key() -> SignedSecretKey {
    let subkey =
        SubkeyParamsBuilder::default().key_type(KeyType::Ed25519Legacy).can_sign(true).build().unwrap();
    let mut params = SecretKeyParamsBuilder::default();
    params.key_type(KeyType::Ed25519Legacy).can_sign(true).can_certify(true).subkey(subkey);
    params.primary_user_id("Archive of a test <test@example.org>".into());
    params.build().unwrap().generate(rand::thread_rng()).unwrap()
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An ar archive.
pub fn ar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = b"!<arch>\n".to_vec();
    for (name, data) in members {
        bytes.extend_from_slice(
            format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, 100644, data.len()).as_bytes(),
        );
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(2), b'\n');
    }
    bytes
}

pub fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut writer = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
    writer.write_all(bytes).unwrap();
    writer.finish().unwrap()
}

/// A package of these files.
pub fn deb(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut data = tar::Builder::new(Vec::new());
    for (path, contents) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(contents.len() as u64);
        header.set_mode(0o644);
        data.append_data(&mut header, format!("./{path}"), *contents).unwrap();
    }
    let data = data.into_inner().unwrap();
    ar(&[("debian-binary", b"2.0\n"), ("control.tar.xz", &xz(b"")), ("data.tar.xz", &xz(&data))])
}

/// What a kernel stands for in the tests: not compressible, so that connections can break in the middle of it.
pub fn kernel(seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..300_000).map(|_| next()).collect()
}

/// An archive under construction, in a directory.
pub struct Archive {
    pub dir: PathBuf,
    pub suite: String,
    packages: String,
}

impl Archive {
    pub fn new(dir: &Path, suite: &str) -> Self {
        Self { dir: dir.to_owned(), suite: suite.to_owned(), packages: String::new() }
    }

    /// An archive as Debian's: a package that leads to the kernel, the kernel, and busybox.
    pub fn standard(dir: &Path, suite: &str, version: &str) -> Self {
        let mut archive = Self::new(dir, suite);
        let image = format!("linux-image-{version}-cloud-amd64");
        let number = version.bytes().map(u32::from).sum();
        archive.add("linux-image-cloud-amd64", version, &format!("{image} (= {version})"), &deb(&[]));
        let files = [
            (format!("boot/config-{version}"), b"CONFIG".to_vec()),
            (format!("boot/vmlinuz-{version}-cloud-amd64"), kernel(number)),
            (format!("lib/modules/{version}/kvm.ko"), b"module".to_vec()),
        ];
        let files: Vec<(&str, &[u8])> = files.iter().map(|(path, data)| (path.as_str(), &data[..])).collect();
        archive.add(&image, version, "kmod, linux-base (>= 4.3~)", &deb(&files));
        archive.add("busybox-static", "1:1.35", "", &deb(&[("bin/busybox", b"\x7fELF busybox")]));
        archive
    }

    pub fn add(&mut self, name: &str, version: &str, depends: &str, deb: &[u8]) {
        let path = format!("pool/{name}_{}.deb", version.replace(':', "%3a"));
        write(&self.dir.join(&path), deb);
        self.packages += &format!(
            "Package: {name}\nVersion: {version}\nArchitecture: amd64\nDepends: {depends}\nDescription: x\n more\n\
             Filename: {path}\nSize: {}\nSHA256: {}\n\n",
            deb.len(),
            sha256(deb)
        );
    }

    pub fn deb_path(&self, start: &str) -> PathBuf {
        let list = fs::read_dir(self.dir.join("pool")).unwrap();
        let mut found = list.map(|entry| entry.unwrap().path());
        found.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(start)).unwrap()
    }

    /// The text of the Release file, with `fields` before the list of files.
    pub fn release(&self, fields: &str, by_hash: bool) -> String {
        let plain = self.packages.as_bytes();
        let base = self.dir.join("dists").join(&self.suite);
        let packed = xz(plain);
        let dir = "main/binary-amd64";
        let place = if by_hash {
            format!("{dir}/by-hash/SHA256/{}", sha256(&packed))
        } else {
            format!("{dir}/Packages.xz")
        };
        write(&base.join(place), &packed);
        let by_hash = if by_hash { "yes" } else { "no" };
        let suite = &self.suite;
        format!(
            "Origin: Debian\nLabel: Debian\nSuite: stable\nCodename: {suite}\nVersion: 99.1\nComponents: main contrib\n\
             Acquire-By-Hash: {by_hash}\n{fields}SHA256:\n {} {} {dir}/Packages\n {} {} {dir}/Packages.xz\n",
            sha256(plain),
            plain.len(),
            sha256(&packed),
            packed.len()
        )
    }

    /// Signs and writes it all.
    pub fn finish(&self) {
        self.sign_inline(&self.release("", false));
    }

    pub fn sign_inline(&self, release: &str) {
        let signer = &KEY.secret_subkeys[0].key;
        let text =
            CleartextSignedMessage::sign(rand::thread_rng(), release, signer, &Password::empty()).unwrap();
        let text = text.to_armored_string(None.into()).unwrap();
        write(&self.dir.join("dists").join(&self.suite).join("InRelease"), text.as_bytes());
    }

    pub fn sign_detached(&self, release: &str) {
        let (rng, none) = (rand::thread_rng(), Password::empty());
        let signer = &KEY.primary_key;
        let made = DetachedSignature::sign_binary_data(
            rng,
            signer,
            &none,
            HashAlgorithm::Sha256,
            release.as_bytes(),
        );
        let base = self.dir.join("dists").join(&self.suite);
        write(&base.join("Release"), release.as_bytes());
        write(&base.join("Release.gpg"), made.unwrap().to_armored_string(None.into()).unwrap().as_bytes());
    }
}

pub fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// A host: its configuration, its cache, and a directory for archives.
pub struct Host {
    _dir: tempfile::TempDir,
    pub root: PathBuf,
    pub cache: PathBuf,
    pub archive: PathBuf,
}

impl Host {
    /// A host that trusts [`KEY`] and has these lines in sources.list, `ARCHIVE` standing for the directory.
    pub fn new(sources: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let host = Self { root: at("root"), cache: at("cache"), archive: at("archive"), _dir: dir };
        let sources = sources.replace("ARCHIVE", host.archive.to_str().unwrap());
        write(&host.root.join("etc/apt/sources.list"), sources.as_bytes());
        write(&host.root.join("etc/os-release"), b"ID=debian\nVERSION_CODENAME=test\n");
        let public = KEY.to_public_key().to_armored_string(None.into()).unwrap();
        write(&host.root.join("usr/share/keyrings/debian-archive-keyring.gpg"), public.as_bytes());
        host
    }

    pub fn options(&self) -> Options {
        Options {
            sysroot: self.root.clone(),
            cache_dir: Some(self.cache.clone()),
            patience: Some((3, Duration::ZERO)),
            ..Options::default()
        }
    }

    /// Names of what is in a directory of the cache.
    pub fn cached(&self, dir: &str) -> Vec<String> {
        let list = fs::read_dir(self.cache.join(dir)).into_iter().flatten();
        list.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// How the server treats files whose path contains a text.
#[derive(Clone)]
pub enum Mood {
    /// Break off after so many bytes of the body, so many times.
    Break { bytes: usize, times: usize },
    /// Break off after so many bytes once, and say 503 so many times after that.
    BreakAndFail { bytes: usize, fails: usize },
    /// Know nothing of ranges.
    NoRanges,
    /// Say this status.
    Status(u16),
    /// Send elsewhere.
    Redirect(String),
    /// Do not say how long the body is, and go on after its end.
    Endless,
}

#[derive(Default)]
struct Behaviour {
    moods: Vec<(String, Mood)>,
    requests: Vec<String>,
}

/// A server of the files in a directory, on the loopback interface. Its thread ends with the process.
#[derive(Clone)]
pub struct Server {
    pub address: SocketAddr,
    behaviour: Arc<Mutex<Behaviour>>,
}

impl Server {
    pub fn new(dir: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self { address: listener.local_addr().unwrap(), behaviour: Arc::default() };
        let (serving, dir) = (server.clone(), dir.to_owned());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (serving, dir) = (serving.clone(), dir.clone());
                std::thread::spawn(move || serving.answer(stream, &dir));
            }
        });
        server
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn set(&self, path: &str, mood: Mood) {
        let mut behaviour = self.behaviour.lock().unwrap();
        behaviour.moods.retain(|(other, _)| other != path);
        behaviour.moods.push((path.to_owned(), mood));
    }

    pub fn calm(&self) {
        self.behaviour.lock().unwrap().moods.clear();
    }

    /// Request lines, each with its range and other headers of interest.
    pub fn requests(&self) -> Vec<String> {
        self.behaviour.lock().unwrap().requests.clone()
    }

    fn answer(&self, stream: TcpStream, dir: &Path) -> Option<()> {
        let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
        let request = lines.next()?.ok()?;
        let headers: Vec<String> = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
        let header = |name: &str| {
            let line = headers.iter().find(|line| line.to_ascii_lowercase().starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let range = header("range").unwrap_or_default();
        let proxy = header("proxy-authorization").unwrap_or_default();
        let target = request.split(' ').nth(1)?.to_owned();
        // As a proxy it is asked for whole URLs, and has the files of all hosts.
        let path =
            target.strip_prefix("http://").map_or(&target[..], |rest| &rest[rest.find('/').unwrap_or(0)..]);
        let mood = {
            let mut behaviour = self.behaviour.lock().unwrap();
            behaviour.requests.push(format!("{request} {range} {proxy}"));
            let spent = |mood: &Mood| {
                matches!(mood, Mood::Break { times: 0, .. } | Mood::BreakAndFail { bytes: 0, fails: 0 })
            };
            let mut moods = behaviour.moods.iter_mut();
            moods.find(|(part, mood)| path.contains(&part[..]) && !spent(mood)).map(|(_, mood)| {
                let now = mood.clone();
                match mood {
                    Mood::Break { times, .. } => *times -= 1,
                    Mood::BreakAndFail { bytes: 0, fails } => *fails -= 1,
                    Mood::BreakAndFail { bytes, .. } => *bytes = 0,
                    _ => {}
                }
                now
            })
        };
        let mut stream = stream;
        let mut head = |status: &str, more: &str| {
            stream.write_all(format!("HTTP/1.1 {status}\r\n{more}Connection: close\r\n\r\n").as_bytes()).ok()
        };
        let Ok(mut body) = fs::read(dir.join(path.trim_start_matches('/'))) else {
            return head("404 Not Found", "Content-Length: 0\r\n");
        };
        let whole = body.len();
        let mut status = "200 OK".to_owned();
        let mut more = String::new();
        let tag = format!("\"{}\"", sha256(&body));
        more += &format!("ETag: {tag}\r\n");
        let same = header("if-range").is_none_or(|version| version == tag);
        let first =
            range.strip_prefix("bytes=").and_then(|range| range.trim_end_matches('-').parse::<usize>().ok());
        if let Some(first) = first.filter(|_| same && !matches!(mood, Some(Mood::NoRanges))) {
            if first >= whole {
                return head("416 Range Not Satisfiable", "Content-Length: 0\r\n");
            }
            status = "206 Partial Content".to_owned();
            more += &format!("Content-Range: bytes {first}-{}/{whole}\r\n", whole - 1);
            body.drain(..first);
        }
        match mood {
            Some(Mood::Status(code)) => return head(&format!("{code} No"), "Content-Length: 0\r\n"),
            Some(Mood::BreakAndFail { bytes: 0, .. }) => return head("503 No", "Content-Length: 0\r\n"),
            Some(Mood::Redirect(to)) => {
                return head("302 Found", &format!("Location: {to}\r\nContent-Length: 0\r\n"));
            }
            Some(Mood::Endless) => {
                head(&status, &more)?;
                stream.write_all(&body).ok()?;
                while stream.write_all(&[0; 4096]).is_ok() {}
                return None;
            }
            _ => {}
        }
        more += &format!("Content-Length: {}\r\n", body.len());
        head(&status, &more)?;
        if let Some(Mood::Break { bytes, .. } | Mood::BreakAndFail { bytes, .. }) = mood {
            body.truncate(bytes);
        }
        stream.write_all(&body).ok()
    }
}

/// What a path in the file system holds.
pub fn read(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    fs::File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}
