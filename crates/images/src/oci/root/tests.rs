use super::*;

const LIMIT: u64 = 1 << 20;

/// A layer of `KIND PATH VALUE` lines: `d`irectories, `f`iles, `s`ymbolic and `h`ard links.
fn layer(text: &str) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let mut words = line.split_whitespace();
        let (kind, path, value) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap_or(""));
        let mut header = tar::Header::new_gnu();
        let (kind, data) = match kind {
            "d" => (EntryType::Directory, ""),
            "f" => (EntryType::Regular, value),
            "s" => (EntryType::Symlink, ""),
            _ => (EntryType::Link, ""),
        };
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_mode(0o755);
        // By bytes, for the library would refuse some of what a stranger can write.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        if matches!(kind, EntryType::Symlink | EntryType::Link) {
            header.as_old_mut().linkname[..value.len()].copy_from_slice(value.as_bytes());
        }
        header.set_cksum();
        builder.append(&header, data.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

fn root(layers: &[&str]) -> Root {
    let mut root = Root::default();
    layers.iter().for_each(|text| root.add(&layer(text)[..], LIMIT).unwrap());
    root
}

fn paths(root: &Root) -> Vec<&str> {
    root.entries.keys().map(String::as_str).collect()
}

#[test]
fn layers_lie_over_each_other_and_whiteouts_hide_what_is_below() {
    let root = root(&[
        "d a\nf a/one 1\nf a/two 2\nd b\nd b/c\nf b/c/three 3\nf gone 4\nf kept 5\n",
        "f a/two 22\nf a/.wh.one\nf .wh.gone\nf b/new 6\nf b/.wh..wh..opq\nf .wh.nothing\n",
        "f gone/again 7\n",
    ]);
    assert_eq!(paths(&root), ["a", "a/two", "b", "b/new", "gone", "gone/again", "kept"]);
    assert_eq!(root.read("a/two"), Some(&b"22"[..]));
    let root = self::root(&["d d\nf d/x 1\n", "f d file\n", "d d\n"]);
    assert_eq!(paths(&root), ["d"], "a file takes a directory's place with all that was in it");
}

#[test]
fn links_end_at_the_root() {
    let root = root(&[
        "s up ../../../../etc\ns abs /etc\nd etc\nf etc/passwd root:x:0:0:root:/root:/bin/sh\ns lib usr/lib\nd usr/lib\n",
        "f up/a 1\nf abs/b 2\nf lib/c 3\nh hard up/a\n",
    ]);
    assert_eq!(
        paths(&root),
        ["abs", "etc", "etc/a", "etc/b", "etc/passwd", "hard", "lib", "up", "usr", "usr/lib", "usr/lib/c"]
    );
    assert_eq!(root.read("hard"), Some(&b"1"[..]));
    for (bad, part) in [
        ("f ../x 1\n", "path"),
        ("f a/../../x 1\n", "path"),
        ("s a b\ns b a\nf a/x 1\n", "directory"),
        ("f a 1\nf a/b 2\n", "directory"),
        ("h x ../../etc/passwd\n", "no file"),
        ("h x nothing\n", "no file"),
        ("d d\nh x d\n", "no file"),
    ] {
        let error = Root::default().add(&layer(bad)[..], LIMIT).unwrap_err();
        assert!(error.contains(part), "{bad}: {error}");
    }
    let big = "x".repeat(100);
    assert_eq!(
        Root::default().add(&layer(&format!("f a {big}\nf b {big}\n"))[..], 150).unwrap_err(),
        TOO_LARGE
    );
    Root::default()
        .add(&b"no archive at all, but as long as one block of one would be"[..], LIMIT)
        .unwrap_err();
}

#[test]
fn programs_and_users_are_those_of_the_image() {
    let root = root(&[
        "f bin/busybox x\ns bin/sh busybox\nf etc/passwd root:x:0:0::/root:/bin/sh\nf etc/group wheel:x:10:\n",
    ]);
    let config = Config { working_dir: "/bin".into(), ..Config::default() };
    assert_eq!(root.program("sh", &config).as_deref(), Some("/bin/sh"));
    assert_eq!(root.program("./sh", &config).as_deref(), Some("/bin/./sh"));
    assert_eq!(root.program("none", &config), None);
    assert_eq!(root.home(0).as_deref(), Some("/root"));
    for (user, numbers) in [
        ("", Some((0, 0))),
        ("root:wheel", Some((0, 10))),
        ("7:8", Some((7, 8))),
        ("7", Some((7, 0))),
        ("ada", None),
    ] {
        assert_eq!(root.user(user), numbers, "{user}");
    }
}

#[test]
fn hard_links_share_their_contents_in_the_archive() {
    let mut image = Cpio::new();
    root(&["f a contents\nh b a\nh c b\nf d other\n"]).write(&mut image);
    let bytes = image.finish();
    let count = bytes.windows(8).filter(|eight| eight == b"contents").count();
    assert_eq!(count, 1);
    let headers: Vec<(String, String)> = bytes
        .windows(6)
        .enumerate()
        .filter(|(_, six)| six == b"070701")
        .map(|(at, _)| {
            let field = |n: usize| String::from_utf8_lossy(&bytes[at + 6 + 8 * n..][..8]).into_owned();
            (field(0), field(4))
        })
        .collect();
    assert!(headers[0].0 == headers[1].0 && headers[0].0 == headers[2].0 && headers[0].0 != headers[3].0);
    assert!(headers[..3].iter().all(|(_, links)| links == "00000003") && headers[3].1 == "00000001");
}
