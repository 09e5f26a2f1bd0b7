//! Images by name: fetched over HTTP, kept, and started over and over, each VM with a disk and a seed of its own.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lodge_tests::bootable::{self, Kind};
use lodge_tests::{Done, Scratch, lodge, start_with};
use sha2::Digest;

const PATIENCE: Duration = Duration::from_secs(300);

/// A server of one file, each connection broken off after 4 MB, which knows of ranges; its address.
fn serve(bytes: Vec<u8>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let head: Vec<String> = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
            let range = head.iter().find_map(|line| {
                line.to_lowercase().strip_prefix("range: bytes=")?.strip_suffix('-')?.parse().ok()
            });
            let from: usize = range.unwrap_or(0);
            let rest = &bytes[from..];
            let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
            let answer = format!(
                "HTTP/1.1 {status}\r\nETag: \"1\"\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{}\r\n\
                 Connection: close\r\n\r\n",
                rest.len(),
                bytes.len() - 1,
                bytes.len()
            );
            let _ = stream.write_all(answer.as_bytes());
            let _ = stream.write_all(&rest[..rest.len().min(4 << 20)]);
        }
    });
    format!("http://{address}")
}

fn run(scratch: &Scratch, args: &[&str]) -> Done {
    let mut command = Command::new(lodge());
    command
        .env("LODGE_DATA_DIR", scratch.path().join("data"))
        .env("LODGE_CACHE_DIR", scratch.path().join("cache"));
    command.env("LODGE_CONFIG", scratch.path().join("config.toml")).args(args);
    start_with(&mut command, "").wait(PATIENCE)
}

#[test]
fn an_image_is_pulled_listed_started_and_removed() {
    let scratch = Scratch::new("images");
    // What a disk tells of itself at each start: whether it was started before, and what its seed says.
    let script = "dd if=/dev/vda skip=1000 count=1 2>/dev/null | grep before || echo fresh\n\
                  echo before | dd of=/dev/vda seek=1000 conv=fsync 2>/dev/null\n\
                  tr -d '\\000' </dev/vdb | grep -a -e hostname -e '\"name\"' -e cloud-config; poweroff -f\n";
    let Some(disk) = bootable::disk(&scratch, Kind::Bios, script, &[]) else { return };
    let bytes = std::fs::read(disk).unwrap();
    let sum: String = sha2::Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    let url = format!("{}/Some-Image.img", serve(bytes));

    let wrong = run(&scratch, &["image", "pull", &url, "--sha256", &"0".repeat(64)]).expect(4);
    assert!(wrong.err.contains(&sum) && wrong.err.contains("help: "), "{}", wrong.err);
    run(&scratch, &["run", "Some-Image"]).expect(2);
    // By way of the user's own catalogue.
    let entry = format!("[\"mine:1\"]\ntitle = \"An image of mine\"\nurl = \"{url}\"\nsha256 = \"{sum}\"\n");
    std::fs::write(scratch.path().join("catalogue.toml"), entry).unwrap();
    let listed = run(&scratch, &["image", "catalogue"]).expect(0);
    assert!(listed.out.contains("ubuntu:24.04") && listed.out.contains("mine:1"), "{}", listed.out);
    let pulled = run(&scratch, &["image", "pull", "mine"]).expect(0);
    assert!(pulled.out.contains("lodge run mine:1"), "{}", pulled.out);
    let listed = run(&scratch, &["image", "ls"]).expect(0);
    assert!(listed.out.contains("mine:1") && listed.out.contains("An image of mine"), "{}", listed.out);
    assert!(run(&scratch, &["image", "inspect", "mine:1"]).expect(0).out.contains(&sum));

    let once = run(&scratch, &["run", "mine", "--user", "ada"]).expect(0).text();
    for what in ["fresh", "local-hostname: mine", "#cloud-config", "\"name\": \"ada\""] {
        assert!(once.contains(what), "{what}: {once}");
    }
    let first = run(&scratch, &["run", "mine", "--name", "kept"]).expect(0).text();
    assert!(first.contains("fresh") && first.contains("local-hostname: kept"), "{first}");
    // It outlives the image.
    run(&scratch, &["image", "rm", "mine:1"]).expect(0);
    run(&scratch, &["image", "rm", "mine:1"]).expect(2);
    let again = run(&scratch, &["run", "--name", "kept"]).expect(0).text();
    assert!(again.contains("before") && !again.contains("fresh"), "{again}");
    assert!(
        is_empty(&scratch.path().join("cache/images")) && is_empty(&scratch.path().join("cache/partial"))
    );
}

fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).unwrap().next().is_none()
}

/// A backing file in an image from elsewhere could be any file of the host.
#[test]
fn an_image_that_names_files_of_the_host_is_refused() {
    let scratch = Scratch::new("images-alone");
    let base = scratch.file("base.img", &[0; 4096]);
    let overlay = scratch.path().join("overlay.qcow2");
    disks::create(&overlay, disks::Format::Qcow2, 0, Some(&base)).unwrap();
    let url = format!("file:{}", overlay.display());
    let done = run(&scratch, &["image", "pull", &url, "--unverified"]).expect(4);
    assert!(done.err.contains("base.img") && done.err.contains("files of this host"), "{}", done.err);
    assert!(
        is_empty(&scratch.path().join("cache/images")) && is_empty(&scratch.path().join("cache/partial"))
    );
    run(&scratch, &["image", "pull", "nonsense"]).expect(2);
    run(&scratch, &["image", "pull", &url, "--unverified", "--name", "../x"]).expect(4);
}
