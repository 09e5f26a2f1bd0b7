//! OCI images: pushed to Debian's registry on the loopback interface, started from there.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use images::{Options, Silent, Source};
use lodge_tests::{Scratch, cached_guest, lodge, start_with};
use sha2::Digest;

const PATIENCE: Duration = Duration::from_secs(240);

/// A registry, which ends with the test.
struct Registry {
    child: Child,
    address: String,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Registry {
    fn start(scratch: &Scratch) -> Self {
        // A port that was free a moment ago; the registry cannot be asked to choose one.
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let address = free.to_string();
        let root = scratch.path().join("registry");
        let config = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n",
            root.display()
        );
        let config = scratch.file("registry.yml", config.as_bytes());
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("package docker-registry is installed");
        let begun = Instant::now();
        while TcpStream::connect(&address).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(30), "the registry does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { child, address }
    }

    /// Sends a request; the status and the Location header.
    fn request(&self, line: &str, kind: &str, body: &[u8]) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let head = format!(
            "{line} HTTP/1.1\r\nHost: {}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            self.address,
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        let mut lines = BufReader::new(stream).take(1 << 20).lines().map_while(Result::ok);
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let location = lines.find_map(|line| line.strip_prefix("Location: ").map(str::to_owned));
        (status, location.unwrap_or_default())
    }

    /// Pushes a blob; its descriptor.
    fn blob(&self, kind: &str, bytes: &[u8]) -> String {
        let digest = digest(bytes);
        let (status, place) = self.request("POST /v2/test/image/blobs/uploads/", "", &[]);
        assert_eq!(status, 202);
        let path = &place[place.find("/v2/").unwrap()..];
        let (status, _) =
            self.request(&format!("PUT {path}&digest={digest}"), "application/octet-stream", bytes);
        assert_eq!(status, 201);
        format!(r#"{{"mediaType":"{kind}","digest":"{digest}","size":{}}}"#, bytes.len())
    }

    /// Pushes an image: a configuration, and layers.
    fn image(&self, tag: &str, config: &str, layers: &[Vec<u8>]) {
        let config = self.blob("application/vnd.oci.image.config.v1+json", config.as_bytes());
        let layers: Vec<String> =
            layers.iter().map(|layer| self.blob("application/vnd.oci.image.layer.v1.tar", layer)).collect();
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{kind}","config":{config},"layers":[{}]}}"#,
            layers.join(",")
        );
        let (status, _) =
            self.request(&format!("PUT /v2/test/image/manifests/{tag}"), kind, manifest.as_bytes());
        assert_eq!(status, 201);
    }
}

fn digest(bytes: &[u8]) -> String {
    let digits: String = sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{digits}")
}

/// A layer: of each entry the path, the type, and the contents or the link's target.
fn layer(entries: &[(&str, tar::EntryType, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, kind, data) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o755);
        let link = matches!(kind, tar::EntryType::Symlink | tar::EntryType::Link);
        if link {
            header.set_link_name_literal(data).unwrap();
        }
        header.set_size(if link { 0 } else { data.len() as u64 });
        builder.append_data(&mut header, path, if link { &[] } else { *data }).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn an_image_runs_its_command_in_its_own_files() {
    use tar::EntryType::{Directory, Link, Regular, Symlink};
    let Ok(found) = Source::new(&Options::default())
        .and_then(|mut source| source.files(&["busybox-static"], &["*bin/busybox"], &mut Silent))
    else {
        println!("skipped: no busybox in the archive");
        return;
    };
    let Some(guest) = cached_guest() else { return };
    let busybox = std::fs::read(&found.files[0].stored).unwrap();
    let scratch = Scratch::new("oci");
    // A cache with the kernel in it, and without what other runs of this test have left.
    let cache = scratch.path().join("cache");
    std::fs::create_dir(&cache).unwrap();
    for dir in ["files", "records"] {
        let from = guest.kernel.parent().unwrap().with_file_name(dir);
        let copied = Command::new("cp").arg("-rs").arg(from).arg(&cache).status().unwrap();
        assert!(copied.success());
    }
    let registry = Registry::start(&scratch);
    let script = b"#!/bin/sh\necho \"I am $(id -u):$(id -g) in $(pwd), $GREETING, $*\"\n\
                   cat /etc/passwd; ls /data; cat /escaped/file; [ /a -ef /b ] && echo linked\n\
                   cat /etc/resolv.conf /proc/net/route\nexit 7\n";
    let layers = [
        layer(&[
            ("bin/", Directory, b""),
            ("bin/busybox", Regular, &busybox),
            ("bin/sh", Symlink, b"busybox"),
            ("bin/cat", Symlink, b"/bin/busybox"),
            ("bin/ls", Link, b"bin/busybox"),
            ("bin/id", Symlink, b"../../../bin/busybox"),
            ("etc/passwd", Regular, b"root:x:0:0:root:/root:/bin/sh\nada:x:1000:1001::/home/ada:/bin/sh\n"),
            ("data/gone", Regular, b"x"),
            ("data/kept", Regular, b"x"),
            ("hidden/old", Regular, b"x"),
            // To the host's, were it followed there.
            ("escaped", Symlink, b"../../../../../../../inside"),
            ("inside/", Directory, b""),
        ]),
        layer(&[
            ("data/.wh.gone", Regular, b""),
            ("hidden/.wh..wh..opq", Regular, b""),
            ("escaped/file", Regular, b"in the image\n"),
            ("a", Regular, b"one file"),
            ("b", Link, b"a"),
            ("start.sh", Regular, script),
        ]),
    ];
    let config = r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"config":{
        "Env":["PATH=/bin","GREETING=it's me"],"Entrypoint":["/start.sh"],"Cmd":["two words"],"WorkingDir":"/work","User":"ada"}}"#;
    registry.image("1", config, &layers);
    let name = format!("oci:{}/test/image", registry.address);
    let run = |tag: &str| {
        let mut command = Command::new(lodge());
        command.env("LODGE_CACHE_DIR", &cache);
        command.args(["run", &format!("{name}:{tag}"), "--engine", "translate"]);
        start_with(&mut command, "").wait(PATIENCE)
    };
    let done = run("1").expect(0);
    for what in [
        "I am 1000:1001 in /work, it's me, two words",
        "ada:x:1000",
        "\nkept\n",
        "in the image",
        "linked",
        // The way out, through the gateway.
        "nameserver 10.0.",
        "eth0\t00000000\t",
        "Lodge: the command ended with status 7.",
    ] {
        assert!(done.out.contains(what), "{what}: {}", done.out);
    }
    assert!(!done.out.contains("gone") && done.err.contains("sha256:"), "{}{}", done.out, done.err);
    let missing = run("2").expect(4);
    assert!(missing.err.contains("test/image:2") && missing.err.contains("help: "), "{}", missing.err);
    // Without its registry, from the cache.
    drop(registry);
    assert!(run("1").expect(0).out.contains("status 7."));
    let image = |args: &[&str]| {
        let mut command = Command::new(lodge());
        command.env("LODGE_CACHE_DIR", &cache).arg("image").args(args);
        start_with(&mut command, "").wait(PATIENCE)
    };
    let full = format!("{name}:1");
    assert!(image(&["ls"]).expect(0).out.contains(&full));
    assert!(image(&["inspect", &full]).expect(0).out.contains("sha256:"));
    image(&["rm", &full]).expect(0);
    assert!(!image(&["ls"]).expect(0).out.contains(&full));
    image(&["rm", &full]).expect(2);
    run("1").expect(4);
}
