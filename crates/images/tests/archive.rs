//! From a host's configuration to a guest, with archives made here.

mod support;

use std::fs;

use images::{Error, FetchError, Progress, SignatureError, Silent, Source, default_guest};
use support::{Archive, Host, KEY, Mood, Server, deb, kernel, make_key, read, sha256, write};

const LOCAL: &str = "deb file:ARCHIVE test main\n";

/// A host that reaches its archive through a server.
fn served() -> (Host, Server, Archive) {
    let host = Host::new("");
    let server = Server::new(&host.archive);
    write(&host.root.join("etc/apt/sources.list"), format!("deb {}/ test main\n", server.url()).as_bytes());
    let archive = Archive::standard(&host.archive, "test", "6.1");
    archive.finish();
    (host, server, archive)
}

fn kernel_of(version: &str) -> Vec<u8> {
    kernel(version.bytes().map(u32::from).sum())
}

#[test]
fn the_first_start_fetches_and_the_second_needs_no_archive() {
    let host = Host::new(LOCAL);
    Archive::standard(&host.archive, "test", "6.1").finish();
    let guest = default_guest(&host.options(), &mut Silent).unwrap();
    assert_eq!(read(&guest.kernel), kernel_of("6.1"));
    assert_eq!(guest.release, "6.1-cloud-amd64");
    assert_eq!(guest.description, "Debian 99.1 (test), Linux 6.1-cloud-amd64 (6.1), busybox 1:1.35");
    let initrd = read(&guest.initrd);
    assert!(initrd.starts_with(b"070701"));
    assert!(initrd.windows(12).any(|part| part == b"\x7fELF busybox"));
    assert!(!guest.cached);

    fs::remove_dir_all(&host.archive).unwrap();
    fs::remove_dir_all(&host.root).unwrap();
    let again = default_guest(&host.options(), &mut Silent).unwrap();
    assert!(again.cached);
    assert_eq!(
        (again.kernel, again.initrd, again.description),
        (guest.kernel, guest.initrd, guest.description)
    );
}

#[test]
fn the_newest_kernel_of_main_and_security_wins_and_foreign_archives_are_passed_over() {
    let host = Host::new(
        "deb file:ARCHIVE/foreign test main\n\
         deb file:ARCHIVE/main test main\n\
         deb file:ARCHIVE/security test-security main\n\
         deb file:ARCHIVE/main test-updates main\n",
    );
    let foreign = Archive::standard(&host.archive.join("foreign"), "test", "9.9");
    foreign.sign_inline(&foreign.release("", false).replace("Origin: Debian", "Origin: Somebody"));
    Archive::standard(&host.archive.join("main"), "test", "6.1.9").finish();
    let security = Archive::standard(&host.archive.join("security"), "test-security", "6.1.10");
    security.sign_inline(&security.release("", true).replace("Components: main", "Components: updates/main"));
    let guest = default_guest(&host.options(), &mut Silent).unwrap();
    assert_eq!(guest.release, "6.1.10-cloud-amd64");
    assert_eq!(read(&guest.kernel), kernel_of("6.1.10"));
}

#[test]
fn a_newer_kernel_is_taken_when_asked_for() {
    let host = Host::new(LOCAL);
    Archive::standard(&host.archive, "test", "6.1").finish();
    default_guest(&host.options(), &mut Silent).unwrap();
    Archive::standard(&host.archive, "test", "6.2").finish();
    assert_eq!(default_guest(&host.options(), &mut Silent).unwrap().release, "6.1-cloud-amd64");
    let fresh = images::Options { refresh: true, ..host.options() };
    assert_eq!(default_guest(&fresh, &mut Silent).unwrap().release, "6.2-cloud-amd64");
    assert_eq!(default_guest(&host.options(), &mut Silent).unwrap().release, "6.2-cloud-amd64");
}

#[test]
fn another_suite_and_other_files_can_be_chosen() {
    let host = Host::new(LOCAL);
    Archive::standard(&host.archive, "test", "6.1").finish();
    Archive::standard(&host.archive, "next", "6.12").finish();
    let options = images::Options { suite: Some("next".to_owned()), ..host.options() };
    let mut source = Source::new(&options).unwrap();
    let patterns = ["*/kvm.ko*", "boot/vmlinuz-*"];
    let found =
        source.files(&["linux-image-none", "linux-image-cloud-amd64"], &patterns, &mut Silent).unwrap();
    assert_eq!(found.package, "linux-image-6.12-cloud-amd64");
    assert_eq!(read(&found.files[0].stored), b"module");
    assert_eq!(found.files[1].path, "boot/vmlinuz-6.12-cloud-amd64");

    let missing = source.files(&["busybox-static"], &["bin/busybox", "bin/none"], &mut Silent);
    assert!(matches!(missing, Err(Error::NoFile { file, .. }) if file == "bin/none"));
    let missing = source.files(&["no-such"], &["*"], &mut Silent);
    assert!(matches!(missing, Err(Error::NoPackage { .. })));
    drop(source);
    let options = images::Options { arch: "i386".to_owned(), ..host.options() };
    let error = default_guest(&options, &mut Silent).unwrap_err().to_string();
    assert!(error.contains("no packages for the architecture i386"), "{error}");
}

#[test]
fn firmware_is_the_hosts_own_or_comes_from_the_archive() {
    let host = Host::new(LOCAL);
    let mut archive = Archive::new(&host.archive, "test");
    let files: [(&str, &[u8]); 2] =
        [("usr/share/OVMF/OVMF_CODE_4M.fd", b"code"), ("usr/share/OVMF/OVMF_VARS_4M.fd", b"variables")];
    archive.add("ovmf", "2022", "", &deb(&files));
    archive.finish();
    let found = images::firmware(&host.options(), images::Firmware::Uefi, &mut Silent).unwrap();
    assert_eq!(read(&found.code), b"code");
    assert_eq!(found.variables.map(|path| read(&path)), Some(b"variables".to_vec()));
    let own = host.root.join("usr/share/seabios/bios-256k.bin");
    let vga = host.root.join("usr/share/seabios/vgabios-stdvga.bin");
    write(&own, b"bios");
    write(&vga, b"driver");
    let found = images::firmware(&host.options(), images::Firmware::Bios, &mut Silent).unwrap();
    assert_eq!(found, images::FirmwareFiles { code: own, variables: None, vga: Some(vga) });
}

#[test]
fn a_mirror_that_is_named_goes_before_the_configuration() {
    let host = Host::new("deb file:/nowhere test main\n");
    Archive::standard(&host.archive, "stable", "6.1").finish();
    let mirror = format!("file://{}/", host.archive.display());
    let options = images::Options { mirror: Some(mirror), ..host.options() };
    // There is no suite `test`, which is the host's: Debian's stable one is next.
    assert_eq!(default_guest(&options, &mut Silent).unwrap().release, "6.1-cloud-amd64");
}

#[test]
fn without_a_usable_configuration_the_message_says_what_to_do() {
    let host = Host::new("# nothing\n");
    let error = default_guest(&host.options(), &mut Silent).unwrap_err();
    assert!(matches!(error, Error::NoArchive));
    assert!(error.to_string().contains("--mirror URL"));

    let host = Host::new(LOCAL);
    let archive = Archive::standard(&host.archive, "test", "6.1");
    archive.sign_inline(&archive.release("", false).replace("Origin: Debian", "Origin: Somebody"));
    let error = default_guest(&host.options(), &mut Silent).unwrap_err();
    assert!(matches!(error, Error::NoMainArchive { tried: 1 }), "{error}");

    let options = images::Options { mirror: Some("gopher://x".to_owned()), ..host.options() };
    let error = default_guest(&options, &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Fetch(FetchError::BadUrl { .. })), "{error}");
}

#[test]
fn only_a_signature_of_a_trusted_key_on_this_very_text_counts() {
    let host = Host::new(LOCAL);
    let archive = Archive::standard(&host.archive, "test", "6.1");
    archive.finish();
    let keyring = host.root.join("usr/share/keyrings/debian-archive-keyring.gpg");
    let trusted = read(&keyring);
    let failure = || match default_guest(&host.options(), &mut Silent).unwrap_err() {
        Error::Signature { source, .. } => source,
        other => panic!("{other}"),
    };

    let other = make_key().to_public_key().to_armored_string(None.into()).unwrap();
    write(&keyring, other.as_bytes());
    assert!(matches!(failure(), SignatureError::UnknownKey { .. }));

    fs::remove_file(&keyring).unwrap();
    let error = default_guest(&host.options(), &mut Silent).unwrap_err();
    assert!(matches!(error, Error::NoKeyring { .. }), "{error}");

    write(&keyring, &trusted);
    let path = host.archive.join("dists/test/InRelease");
    let signed = String::from_utf8(read(&path)).unwrap();
    write(&path, signed.replace("Version: 99.1", "Version: 99.2").as_bytes());
    assert_eq!(failure(), SignatureError::Bad);
    // Text outside of what is signed is not what we read.
    write(&path, format!("Origin: Debian\n\n{signed}").as_bytes());
    assert_eq!(failure(), SignatureError::Malformed);
    write(&path, archive.release("", false).as_bytes());
    assert_eq!(failure(), SignatureError::Malformed);
    assert!(host.cached("files").is_empty() && host.cached("records").is_empty());

    write(&path, signed.as_bytes());
    default_guest(&host.options(), &mut Silent).unwrap();
}

#[test]
fn the_key_named_with_the_archive_is_the_only_one_that_counts() {
    let armour = KEY.to_public_key().to_armored_string(None.into()).unwrap();
    let lines: Vec<String> = armour
        .lines()
        .map(|line| if line.is_empty() { " .".to_owned() } else { format!(" {line}") })
        .collect();
    let other = make_key().to_public_key().to_armored_string(None.into()).unwrap();
    let print = pgp::types::KeyDetails::fingerprint(&KEY.primary_key).to_string().to_uppercase();
    let cases = [
        (format!("Signed-By:\n{}", lines.join("\n")), true),
        ("Signed-By: /etc/apt/other.asc".to_owned(), false),
        (format!("Signed-By: {print}"), true),
        (format!("Signed-By: {}", "0".repeat(40)), false),
    ];
    for (signed_by, good) in cases {
        let host = Host::new("");
        write(&host.root.join("etc/apt/other.asc"), other.as_bytes());
        let uri = host.archive.display();
        let sources = format!("Types: deb\nURIs: file:{uri}\nSuites: test\nComponents: main\n{signed_by}\n");
        write(&host.root.join("etc/apt/sources.list.d/x.sources"), sources.as_bytes());
        Archive::standard(&host.archive, "test", "6.1").finish();
        let result = default_guest(&host.options(), &mut Silent);
        assert_eq!(result.is_ok(), good, "{signed_by}: {result:?}");
    }
}

#[test]
fn a_release_file_with_a_separate_signature_is_as_good() {
    let host = Host::new(LOCAL);
    let archive = Archive::standard(&host.archive, "test", "6.1");
    let release = archive.release("", false);
    archive.sign_detached(&release);
    default_guest(&host.options(), &mut Silent).unwrap();
    let host = Host::new(LOCAL);
    let archive = Archive::standard(&host.archive, "test", "6.1");
    archive.sign_detached(&archive.release("", false));
    write(&host.archive.join("dists/test/Release"), release.replace("99.1", "99.2").as_bytes());
    let error = default_guest(&host.options(), &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Signature { source: SignatureError::Bad, .. }), "{error}");
}

#[test]
fn an_index_out_of_date_is_refused_unless_apt_is_told_otherwise() {
    let host = Host::new(LOCAL);
    let archive = Archive::standard(&host.archive, "test", "6.1");
    archive.sign_inline(&archive.release("Valid-Until: Thu, 01 Jan 2015 00:00:00 UTC\n", false));
    let error = default_guest(&host.options(), &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Date { .. }), "{error}");
    write(&host.root.join("etc/apt/apt.conf.d/50x"), b"Acquire::Check-Valid-Until \"false\";");
    default_guest(&host.options(), &mut Silent).unwrap();

    let host = Host::new(LOCAL);
    let archive = Archive::standard(&host.archive, "test", "6.1");
    archive.sign_inline(&archive.release("Date: Thu, 01 Jan 2150 00:00:00 UTC\n", false));
    let error = default_guest(&host.options(), &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Date { .. }), "{error}");
    write(&host.root.join("etc/apt/apt.conf"), b"Acquire { Check-Date no; };");
    default_guest(&host.options(), &mut Silent).unwrap();
}

#[test]
fn a_valid_signature_on_another_release_does_not_pass() {
    let host = Host::new(LOCAL);
    Archive::standard(&host.archive, "older", "5.10").finish();
    fs::rename(host.archive.join("dists/older"), host.archive.join("dists/test")).unwrap();
    let error = default_guest(&host.options(), &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Archive { .. }), "{error}");
}

#[test]
fn a_changed_package_is_found_out_and_leaves_nothing() {
    let (host, _, archive) = served();
    let path = archive.deb_path("linux-image-6.1");
    let mut bytes = read(&path);
    let sound = bytes.clone();
    bytes[1000] ^= 1;
    write(&path, &bytes);
    let error = default_guest(&host.options(), &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Fetch(FetchError::Corrupt { .. })), "{error}");
    assert!(host.cached("files").is_empty() && host.cached("records").is_empty());
    write(&path, &sound);
    default_guest(&host.options(), &mut Silent).unwrap();
}

#[test]
fn a_connection_that_breaks_is_taken_up_where_it_was() {
    let (host, server, _) = served();
    server.set("pool/linux-image-6.1", Mood::Break { bytes: 100_000, times: 2 });
    let guest = default_guest(&host.options(), &mut Silent).unwrap();
    assert_eq!(read(&guest.kernel), kernel_of("6.1"));
    let requests = server.requests();
    let ranges: Vec<_> = requests.iter().filter(|one| one.contains("linux-image-6.1")).collect();
    assert_eq!(ranges.len(), 3, "{requests:#?}");
    assert!(ranges[1].contains("bytes=100000-") && ranges[2].contains("bytes=200000-"));
}

#[test]
fn a_transfer_that_fails_leaves_what_the_next_start_goes_on_with() {
    let (host, server, _) = served();
    // Once it breaks off, and then the server has enough.
    server.set("pool/linux-image-6.1", Mood::Break { bytes: 100_000, times: 1 });
    server.set("pool/linux", Mood::Status(503));
    let error = default_guest(&host.options(), &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Fetch(FetchError::Status { status: 503, .. })), "{error}");
    assert!(host.cached("files").is_empty() && host.cached("records").is_empty());
    let before = server.requests().len();
    server.calm();
    default_guest(&host.options(), &mut Silent).unwrap();
    let requests = &server.requests()[before..];
    assert!(
        requests.iter().any(|one| one.contains("linux-image-6.1") && one.contains("bytes=100000-")),
        "{requests:#?}"
    );
    // Nor was the index fetched again.
    assert!(!requests.iter().any(|one| one.contains("Packages")), "{requests:#?}");
}

#[test]
fn a_server_without_ranges_and_a_remainder_that_does_not_fit_are_managed() {
    let (host, server, archive) = served();
    server.set("pool/linux-image-6.1", Mood::Break { bytes: 70_000, times: 1 });
    server.set("pool/", Mood::Status(403));
    default_guest(&host.options(), &mut Silent).unwrap_err();
    // What a killed process may leave: other bytes under the right name.
    let partial = host.cache.join("partial").join(sha256(&read(&archive.deb_path("linux-image-6.1"))));
    write(&partial, &[b'x'; 5000]);
    server.calm();
    server.set("pool/busybox", Mood::NoRanges);
    let busybox = host.cache.join("partial").join(sha256(&read(&archive.deb_path("busybox"))));
    write(&busybox, b"!<arch>");
    let guest = default_guest(&host.options(), &mut Silent).unwrap();
    assert_eq!(read(&guest.kernel), kernel_of("6.1"));
    assert!(!partial.exists());
}

#[test]
fn more_than_the_index_states_is_not_taken() {
    let (host, server, archive) = served();
    server.set("pool/linux-image-6.1", Mood::Endless);
    let error = default_guest(&host.options(), &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Fetch(FetchError::TooLarge { .. })), "{error}");
    server.calm();
    // A server that says another size is not even read.
    let path = archive.deb_path("linux-image-6.1");
    let longer = [read(&path), vec![0; 10]].concat();
    write(&path, &longer);
    let error = default_guest(&host.options(), &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Fetch(FetchError::WrongSize { .. })), "{error}");
    server.set("InRelease", Mood::Endless);
    let error = default_guest(&host.options(), &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Fetch(FetchError::TooLarge { .. })), "{error}");
}

#[test]
fn redirects_are_followed_but_not_in_circles() {
    let (host, server, _) = served();
    let elsewhere = Server::new(&host.archive);
    server.set(
        "pool/linux",
        Mood::Redirect(format!("{}/pool/linux-image-6.1-cloud-amd64_6.1.deb", elsewhere.url())),
    );
    server.set("pool/busybox", Mood::Redirect("/pool/busybox-static_1%3a1.35.deb".to_owned()));
    let error = default_guest(&host.options(), &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Fetch(FetchError::Redirect { .. })), "{error}");
    assert_eq!(elsewhere.requests().len(), 1);
    server.calm();
    default_guest(&host.options(), &mut Silent).unwrap();
}

#[test]
fn plain_http_goes_to_the_proxy_as_a_whole_url() {
    let host = Host::new("deb http://archive.invalid/x test main\n");
    Archive::standard(&host.archive.join("x"), "test", "6.1").finish();
    let proxy = Server::new(&host.archive);
    let setting = format!("Acquire::http::Proxy \"http://me:s%40cret@{}/\";", proxy.address);
    write(&host.root.join("etc/apt/apt.conf.d/proxy.conf"), setting.as_bytes());
    default_guest(&host.options(), &mut Silent).unwrap();
    let requests = proxy.requests();
    let wanted = "GET http://archive.invalid/x/dists/test/InRelease HTTP/1.1";
    assert!(requests[0].starts_with(wanted), "{requests:#?}");
    assert!(requests.iter().all(|one| one.ends_with("Basic bWU6c0BjcmV0")), "{requests:#?}");
}

#[test]
fn a_cache_that_cannot_be_written_is_named_with_a_way_out() {
    let host = Host::new(LOCAL);
    Archive::standard(&host.archive, "test", "6.1").finish();
    write(&host.cache, b"a file where the directory should be");
    let error = default_guest(&host.options(), &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Cache { .. }), "{error}");
    assert!(error.to_string().contains("LODGE_CACHE_DIR"));
}

#[test]
fn a_damaged_cache_is_noticed_and_mended() {
    let host = Host::new(LOCAL);
    Archive::standard(&host.archive, "test", "6.1").finish();
    let guest = default_guest(&host.options(), &mut Silent).unwrap();
    let mut bytes = read(&guest.kernel);
    bytes[5] ^= 1;
    write(&guest.kernel, &bytes);
    let truncated = read(&guest.initrd);
    write(&guest.initrd, &truncated[..100]);
    let mended = default_guest(&host.options(), &mut Silent).unwrap();
    assert!(!mended.cached);
    assert_eq!(read(&mended.kernel), kernel_of("6.1"));
    assert_eq!(read(&mended.initrd), truncated);
    for record in host.cached("records") {
        write(&host.cache.join("records").join(record), b"{ not a record");
    }
    assert!(!default_guest(&host.options(), &mut Silent).unwrap().cached);
    // A record cannot name a file outside.
    for record in host.cached("records") {
        let path = host.cache.join("records").join(record);
        let text = String::from_utf8(read(&path)).unwrap();
        write(&path, text.replace("\"file\": \"", "\"file\": \"../../archive/").as_bytes());
    }
    assert!(!default_guest(&host.options(), &mut Silent).unwrap().cached);
}

#[test]
fn two_at_once_fetch_once() {
    let (host, server, _) = served();
    let start = || {
        std::thread::scope(|scope| {
            let one = || default_guest(&host.options(), &mut Silent).unwrap().kernel;
            let both = [scope.spawn(one), scope.spawn(one)];
            both.map(|thread| thread.join().unwrap())
        })
    };
    let [a, b] = start();
    assert_eq!(a, b);
    let fetched = server.requests().iter().filter(|one| one.contains("linux-image-6.1")).count();
    assert_eq!(fetched, 1);
}

#[test]
fn a_package_that_is_none_is_an_error_of_the_package() {
    let host = Host::new(LOCAL);
    let mut archive = Archive::new(&host.archive, "test");
    archive.add("linux-image-cloud-amd64", "1", "", b"no package at all");
    archive.add("busybox-static", "1", "", &deb(&[("bin/busybox", b"x")]));
    archive.finish();
    let error = default_guest(&host.options(), &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Package { .. }), "{error}");
}

#[test]
fn updates_that_cannot_be_had_are_told_and_left_out() {
    struct Notes(Vec<String>);
    impl Progress for Notes {
        fn begin(&mut self, _: &str, _: Option<u64>) {}
        fn advance(&mut self, _: u64) {}
        fn finish(&mut self) {}
        fn note(&mut self, text: &str) {
            self.0.push(text.to_owned());
        }
    }
    let host = Host::new("deb file:ARCHIVE test main\ndeb file:ARCHIVE test-security main\n");
    Archive::standard(&host.archive, "test", "6.1").finish();
    Archive::standard(&host.archive, "test-security", "6.1.1").finish();
    let index = host.archive.join("dists/test-security/main/binary-amd64/Packages.xz");
    write(&index, b"of another time");
    let mut notes = Notes(Vec::new());
    assert_eq!(default_guest(&host.options(), &mut notes).unwrap().release, "6.1-cloud-amd64");
    assert!(matches!(&notes.0[..], [note] if note.contains("test-security")), "{:?}", notes.0);
}

/// The host's own archive, where it can be reached.
#[test]
fn the_hosts_own_archive_gives_a_kernel() {
    let cache = tempfile::tempdir().unwrap();
    let options = images::Options {
        cache_dir: Some(cache.path().to_owned()),
        patience: Some((1, std::time::Duration::ZERO)),
        ..images::Options::default()
    };
    match default_guest(&options, &mut Silent) {
        Ok(guest) => {
            // A bzImage has this at 0x202 (Documentation/arch/x86/boot.rst).
            assert_eq!(&read(&guest.kernel)[0x202..0x206], b"HdrS");
            assert!(read(&guest.initrd).len() > 1 << 20);
            let unpacked = images::unpacked_kernel(&options, &guest.kernel, &mut Silent).unwrap();
            assert!(read(&unpacked).len() > 2 * read(&guest.kernel).len());
        }
        Err(
            error @ (Error::NoArchive
            | Error::NoMainArchive { .. }
            | Error::NoKeyring { .. }
            | Error::Fetch(_)),
        ) => {
            println!("skipped: the host's archive cannot be used: {error}");
        }
        Err(error) => panic!("{error}"),
    }
}
