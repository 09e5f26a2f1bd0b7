//! Images by their URLs, from a server that misbehaves.

mod support;

use std::fs;
use std::io::Write;
use std::time::Duration;

use images::{Cache, Check, Error, Options, PullError, Pulled, Silent, pull};
use support::{Mood, Server, kernel, sha256, write, xz};

/// A server with one image, its checksum beside it, and a cache.
struct Bed {
    dir: tempfile::TempDir,
    server: Server,
    options: Options,
    image: Vec<u8>,
}

impl Bed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("files")).unwrap();
        let server = Server::new(&dir.path().join("files"));
        let options = Options {
            cache_dir: Some(dir.path().join("cache")),
            sysroot: dir.path().join("root"),
            patience: Some((3, Duration::ZERO)),
            ..Options::default()
        };
        let bed = Self { dir, server, options, image: kernel(7) };
        bed.publish("disk.img", &bed.image);
        bed.publish("SHA256SUMS", format!("{}  disk.img\n", sha256(&bed.image)).as_bytes());
        bed
    }

    fn publish(&self, name: &str, bytes: &[u8]) {
        write(&self.dir.path().join("files").join(name), bytes);
    }

    fn url(&self, name: &str) -> String {
        format!("{}/{name}", self.server.url())
    }

    fn pull(&self, name: &str, check: &Check) -> Result<Pulled, Error> {
        let cache = Cache::open(self.options.cache_dir.as_deref())?;
        let lock = cache.lock(&mut Silent)?;
        pull(&self.url(name), check, &self.options, &cache, &lock, &mut Silent)
    }

    /// What `GET`s of the image there were: the range of each.
    fn asked(&self) -> Vec<String> {
        let requests = self.server.requests();
        let of_image = requests.iter().filter(|line| line.contains("/disk.img HTTP"));
        of_image.map(|line| line.split(' ').nth(3).unwrap().to_owned()).collect()
    }
}

#[track_caller]
fn refused(result: Result<Pulled, Error>, parts: &[&str]) -> String {
    let error = result.unwrap_err().to_string();
    for part in parts {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
    assert_eq!(error.matches("; ").count(), 1, "what happened; what to do: {error}");
    error
}

#[test]
fn an_image_is_checked_by_what_is_beside_it_named_or_given() {
    let bed = Bed::new();
    let sum = sha256(&bed.image);
    for check in [
        Check::Beside,
        Check::Sums(bed.url("SHA256SUMS")),
        Check::Sha256(sum.to_uppercase()),
        Check::Unverified,
    ] {
        let pulled = bed.pull("disk.img", &check).unwrap();
        assert!(fs::read(&pulled.path).unwrap() == bed.image);
        assert_eq!(pulled.checksum.is_some(), check != Check::Unverified);
        fs::remove_file(pulled.path).unwrap();
    }
    bed.publish("SHA256SUMS", b"nothing\n");
    refused(bed.pull("disk.img", &Check::Beside), &["no checksum", "--sha256"]);
    refused(bed.pull("disk.img", &Check::Sums(bed.url("SHA256SUMS"))), &["SHA256SUMS", "disk.img"]);
    refused(bed.pull("disk.img", &Check::Sha256("12".into())), &["64"]);
    refused(bed.pull("disk.img", &Check::Sha256("0".repeat(64))), &[&sum, &"0".repeat(64), "removed"]);
    refused(bed.pull("none.img", &Check::Unverified), &["none.img", "does not exist"]);
    bed.publish("disk.img.sha512", b"12\n");
    bed.publish("disk.img.sha256", format!("{sum}\n").as_bytes());
    bed.pull("disk.img", &Check::Beside).unwrap();
}

#[test]
fn what_breaks_off_is_gone_on_with_by_this_process_and_by_the_next() {
    let bed = Bed::new();
    let sums = Check::Sums(bed.url("SHA256SUMS"));
    // Each attempt gets further: all within one pull.
    bed.server.set("disk.img", Mood::Break { bytes: 100_000, times: 2 });
    let pulled = bed.pull("disk.img", &sums).unwrap();
    assert!(fs::read(&pulled.path).unwrap() == bed.image);
    assert_eq!(bed.asked(), ["", "bytes=100000-", "bytes=200000-"]);
    fs::remove_file(pulled.path).unwrap();

    // The server goes away after the first part: the pull fails, and the next one goes on.
    let asked = bed.asked().len();
    bed.server.set("disk.img", Mood::BreakAndFail { bytes: 120_000, fails: 3 });
    refused(bed.pull("disk.img", &sums), &["disk.img", "503", "is kept"]);
    let pulled = bed.pull("disk.img", &sums).unwrap();
    assert!(fs::read(&pulled.path).unwrap() == bed.image);
    let again = ["", "bytes=120000-", "bytes=120000-", "bytes=120000-", "bytes=120000-"];
    assert_eq!(bed.asked()[asked..], again);
}

#[test]
fn another_version_is_begun_anew() {
    let bed = Bed::new();
    let newer = kernel(8);
    bed.server.set("disk.img", Mood::BreakAndFail { bytes: 120_000, fails: 3 });
    refused(bed.pull("disk.img", &Check::Unverified), &["503"]);
    bed.publish("disk.img", &newer);
    let pulled = bed.pull("disk.img", &Check::Unverified).unwrap();
    assert!(fs::read(&pulled.path).unwrap() == newer);
    assert_eq!(bed.asked().last().unwrap(), "bytes=120000-", "it asked, and got another version");
}

#[test]
fn a_beginning_of_unknown_origin_is_not_gone_on_with() {
    let bed = Bed::new();
    let partial = bed.options.cache_dir.as_ref().unwrap().join("partial");
    let name = sha256(bed.url("disk.img").as_bytes());
    // As from a server that does not say which version it has.
    write(&partial.join(&name), &[1; 1000]);
    let pulled = bed.pull("disk.img", &Check::Beside).unwrap();
    assert!(fs::read(&pulled.path).unwrap() == bed.image);
    assert_eq!(bed.asked(), [""]);
    // A whole file that was not looked at before the process ended is not fetched again, but checked.
    write(
        &partial.join(&name).with_extension("begun"),
        format!("{{\"size\":{}}}", bed.image.len()).as_bytes(),
    );
    bed.pull("disk.img", &Check::Beside).unwrap();
    assert_eq!(bed.asked().len(), 1);
    write(&partial.join(&name), &vec![1; bed.image.len()]);
    write(
        &partial.join(&name).with_extension("begun"),
        format!("{{\"size\":{}}}", bed.image.len()).as_bytes(),
    );
    let pulled = bed.pull("disk.img", &Check::Beside).unwrap();
    assert!(fs::read(&pulled.path).unwrap() == bed.image);
    assert_eq!(bed.asked().len(), 2);
}

#[test]
fn redirects_servers_that_fail_and_disks_that_are_full() {
    let bed = Bed::new();
    bed.server.set("/there.img", Mood::Redirect("/disk.img".into()));
    bed.publish("there.img", b"");
    bed.pull("there.img", &Check::Sha256(sha256(&bed.image))).unwrap();
    bed.server.set("/there.img", Mood::Redirect("/there.img".into()));
    refused(bed.pull("there.img", &Check::Unverified), &["leads to", "not followed"]);
    bed.server.set("/there.img", Mood::Status(503));
    refused(bed.pull("there.img", &Check::Unverified), &["the server says 503"]);
    bed.server.calm();
    // Nobody listens there.
    let cache = Cache::open(bed.options.cache_dir.as_deref()).unwrap();
    let lock = cache.lock(&mut Silent).unwrap();
    let nowhere = "http://127.0.0.1:1/disk.img";
    let result = pull(nowhere, &Check::Unverified, &bed.options, &cache, &lock, &mut Silent);
    refused(result, &["127.0.0.1:1", "network"]);
    drop(lock);
    let partial = bed.options.cache_dir.as_ref().unwrap().join("partial");
    let name = sha256(bed.url("disk.img").as_bytes());
    std::os::unix::fs::symlink("/dev/full", partial.join(name)).unwrap();
    let result = bed.pull("disk.img", &Check::Unverified);
    assert!(matches!(result, Err(Error::Pull(PullError::Full { .. }))), "{result:?}");
    refused(result, &["no room", "make room"]);
}

#[test]
fn packed_images_are_unpacked() {
    let bed = Bed::new();
    let plain = [bed.image.clone(), vec![0; 1_000_000], bed.image.clone(), vec![0; 70_000]].concat();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let zstd = ruzstd::encoding::compress_to_vec(&plain[..], ruzstd::encoding::CompressionLevel::Fastest);
    for (name, packed) in [("a.xz", xz(&plain)), ("a.gz", gzip.finish().unwrap()), ("a.zst", zstd)] {
        bed.publish(name, &packed);
        let pulled = bed.pull(name, &Check::Sha256(sha256(&packed))).unwrap();
        assert!(fs::read(&pulled.path).unwrap() == plain, "{name}");
        bed.publish(name, &packed[..packed.len() / 2]);
        refused(bed.pull(name, &Check::Unverified), &[name, "unpacked"]);
    }
    bed.publish("a.bz2", b"BZh91AY");
    refused(bed.pull("a.bz2", &Check::Unverified), &["bzip2"]);
}
