//! Getting an image from its registry, by the OCI distribution specification.

use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::OciError;
use super::root::{Root, TOO_LARGE};
use crate::apt::AptConf;
use crate::cache::{Cache, Lock};
use crate::fetch::{FetchError, Fetcher, sha256};
use crate::progress::Progress;
use crate::release::Expected;
use crate::{Error, Options};

/// Bytes of a manifest or a configuration: registries take no larger ones.
const LARGEST_DOCUMENT: u64 = 4 << 20;
/// Bytes of all files together.
const LARGEST_IMAGE: u64 = 1 << 30;
const MAX_LAYERS: usize = 256;
/// The kinds of manifests that we read.
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
                         application/vnd.docker.distribution.manifest.list.v2+json, \
                         application/vnd.docker.distribution.manifest.v2+json";

/// An image's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The registry's host, perhaps with a port.
    pub registry: String,
    /// The image's name there.
    pub name: String,
    /// A tag, or a digest (`sha256:…`).
    pub tag: String,
}

impl Reference {
    /// Reads `oci:REGISTRY/NAME[:TAG|@DIGEST]` and `docker:NAME[:TAG]`; `None` if it begins with neither.
    pub fn parse(text: &str) -> Option<Result<Self, OciError>> {
        let (registry, rest) = match text.split_once(':')? {
            ("oci", rest) => {
                let rest = rest.trim_start_matches('/');
                rest.split_once('/').unwrap_or((rest, ""))
            }
            ("docker", rest) => ("registry-1.docker.io", rest.trim_start_matches('/')),
            _ => return None,
        };
        let (name, tag) = match rest.split_once('@') {
            Some((name, digest)) => (name, digest),
            None => rest.rsplit_once(':').unwrap_or((rest, "latest")),
        };
        let name = match registry {
            "registry-1.docker.io" if !name.contains('/') => format!("library/{name}"),
            _ => name.to_owned(),
        };
        let is = |text: &str, more: &str| {
            !text.is_empty()
                && text.len() <= 255
                && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || more.contains(c))
        };
        let sound = is(registry, ".-:") && is(&name, "._-/") && is(&tag.to_ascii_lowercase(), "._-:");
        let reference = Reference { registry: registry.to_owned(), name, tag: tag.to_owned() };
        Some(if sound { Ok(reference) } else { Err(OciError::Reference(text.to_owned())) })
    }

    /// Where something of it is. This host is spoken to without encryption, as all tools do.
    fn url(&self, kind: &str, what: &str) -> String {
        let host = self.registry.split(':').next().unwrap_or_default();
        let scheme = if host == "localhost" || host.starts_with("127.") { "http" } else { "https" };
        format!("{scheme}://{}/v2/{}/{kind}/{what}", self.registry, self.name)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let between = if self.tag.contains(':') { '@' } else { ':' };
        write!(to, "oci:{}/{}{between}{}", self.registry, self.name, self.tag)
    }
}

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
    size: u64,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Document {
    architecture: String,
    os: String,
    #[serde(default)]
    config: Option<Config>,
}

/// How an image wants to be run.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
pub struct Config {
    /// `NAME=VALUE`.
    #[serde(rename = "Env", deserialize_with = "or_none")]
    pub env: Vec<String>,
    /// What is run, before `cmd`.
    #[serde(rename = "Entrypoint", deserialize_with = "or_none")]
    pub entrypoint: Vec<String>,
    /// What is run, or its arguments.
    #[serde(rename = "Cmd", deserialize_with = "or_none")]
    pub cmd: Vec<String>,
    /// Where.
    #[serde(rename = "WorkingDir", deserialize_with = "or_none")]
    pub working_dir: String,
    /// As whom: `USER[:GROUP]`.
    #[serde(rename = "User", deserialize_with = "or_none")]
    pub user: String,
}

/// Takes `null` for what is not there.
fn or_none<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl Config {
    /// The program and its arguments; a shell where the image says nothing.
    pub fn command(&self) -> Vec<String> {
        let all: Vec<String> = self.entrypoint.iter().chain(&self.cmd).cloned().collect();
        if all.is_empty() { vec!["/bin/sh".to_owned()] } else { all }
    }
}

/// Gets an image's files and configuration, and its manifest's digest.
pub(super) fn fetch(
    reference: &Reference,
    options: &Options,
    cache: &Cache,
    lock: &Lock,
    progress: &mut dyn Progress,
) -> Result<(Root, Config, String), Error> {
    let fetcher = Fetcher::new(&AptConf::load(&options.sysroot));
    let fetcher = match options.patience {
        Some((tries, pause)) => fetcher.patience(tries, pause),
        None => fetcher,
    };
    let malformed =
        |reason: &str| OciError::Malformed { image: reference.to_string(), reason: reason.to_owned() };
    progress.begin(&format!("looking up {reference}"), None);
    let found = manifest(&fetcher, reference);
    progress.finish();
    let (manifest, digest) = found?;
    if manifest.layers.len() > MAX_LAYERS {
        return Err(malformed("it has too many layers").into());
    }
    let text = document(&fetcher, reference, "blobs", &manifest.config.digest)?;
    let document: Document = parse(&text, reference)?;
    if (document.os.as_str(), document.architecture.as_str()) != ("linux", "amd64") {
        return Err(OciError::Platform(reference.to_string()).into());
    }
    let mut root = Root::default();
    for (n, layer) in manifest.layers.iter().enumerate() {
        let sha256 = digest_of(&layer.digest).ok_or_else(|| malformed("a layer's digest is no SHA-256"))?;
        let expected = Expected { size: layer.size, sha256: sha256.to_owned() };
        let path = cache.partial(sha256, lock);
        let what = format!("fetching layer {} of {} of {}", n + 1, manifest.layers.len(), reference.name);
        progress.begin(&what, Some(layer.size));
        let url = reference.url("blobs", &layer.digest);
        let file = fetcher.download(&url, &expected, &path, progress);
        progress.finish();
        let file = file.map_err(|error| match error {
            Error::Fetch(error) => told(error, reference),
            other => other,
        })?;
        progress.begin(&format!("unpacking layer {}", n + 1), None);
        let unpacked = unpack(file).and_then(|reader| root.add(reader, LARGEST_IMAGE));
        progress.finish();
        unpacked.map_err(|reason| match reason.as_str() {
            TOO_LARGE => OciError::TooLarge { image: reference.to_string(), limit: LARGEST_IMAGE },
            reason => malformed(reason),
        })?;
        // It is in the image that is kept.
        let _ = std::fs::remove_file(path);
    }
    Ok((root, document.config.unwrap_or_default(), digest))
}

/// The manifest for our kind of machine, and its digest.
fn manifest(fetcher: &Fetcher, reference: &Reference) -> Result<(Manifest, String), Error> {
    let text = document(fetcher, reference, "manifests", &reference.tag)?;
    let Ok(index) = serde_json::from_slice::<Index>(&text) else {
        return Ok((parse(&text, reference)?, format!("sha256:{}", sha256(&text))));
    };
    let ours = |one: &&Descriptor| {
        one.platform
            .as_ref()
            .is_some_and(|platform| platform.os == "linux" && platform.architecture == "amd64")
    };
    let found = index.manifests.iter().find(ours);
    let found = found.ok_or_else(|| OciError::Platform(reference.to_string()))?;
    let text = document(fetcher, reference, "manifests", &found.digest)?;
    Ok((parse(&text, reference)?, found.digest.clone()))
}

/// A manifest or a configuration; what is named by its digest is checked.
fn document(fetcher: &Fetcher, reference: &Reference, kind: &str, what: &str) -> Result<Vec<u8>, Error> {
    let malformed = |reason: String| OciError::Malformed { image: reference.to_string(), reason };
    if what.contains(':') && digest_of(what).is_none() {
        return Err(malformed(format!("{what} is no SHA-256")).into());
    }
    let accept = (kind == "manifests").then_some(MANIFESTS);
    let url = reference.url(kind, what);
    let text = fetcher.small_as(&url, LARGEST_DOCUMENT, accept).map_err(|error| told(error, reference))?;
    match digest_of(what) {
        Some(digest) if digest != sha256(&text) => {
            Err(malformed(format!("what the registry gives for {what} is not that")).into())
        }
        _ => Ok(text),
    }
}

fn parse<T: DeserializeOwned>(text: &[u8], reference: &Reference) -> Result<T, Error> {
    serde_json::from_slice(text).map_err(|error| {
        OciError::Malformed {
            image: reference.to_string(),
            reason: format!("the registry's answer is no manifest ({error})"),
        }
        .into()
    })
}

/// The hexadecimal digits of a digest.
fn digest_of(text: &str) -> Option<&str> {
    let digits = text.strip_prefix("sha256:")?;
    let sound = digits.len() == 64 && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    sound.then_some(digits)
}

fn told(error: FetchError, reference: &Reference) -> Error {
    match error {
        FetchError::NotFound { .. } | FetchError::Status { status: 401 | 403, .. } => {
            OciError::NotFound(reference.to_string()).into()
        }
        other => crate::pull::told(Error::Fetch(other), &reference.to_string()),
    }
}

/// A layer's archive, whichever way it is packed.
fn unpack(file: File) -> Result<Box<dyn Read>, String> {
    let mut input = BufReader::new(file);
    let magic = std::io::BufRead::fill_buf(&mut input).map_err(|error| error.to_string())?;
    Ok(match magic {
        [0x1f, 0x8b, ..] => Box::new(flate2::read::MultiGzDecoder::new(input)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(input);
            Box::new(decoder.map_err(|error| format!("a layer is damaged ({error})"))?)
        }
        _ => Box::new(input),
    })
}
