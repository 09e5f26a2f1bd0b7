//! Directories of the host as stock kernels use them.

use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::Duration;

use images::Options;
use lodge_tests::{Scratch, default_guest, lodge, start_with};

const PATIENCE: Duration = Duration::from_secs(240);

#[test]
fn a_guest_uses_directories_of_the_host_and_nothing_else() {
    for (image, suite) in [("tiny", None), ("tiny:trixie", Some("trixie"))] {
        let options = Options { suite: suite.map(Into::into), ..Options::default() };
        if default_guest(&options).is_none() {
            continue;
        }
        let scratch = Scratch::new(&format!("share-{}", suite.unwrap_or("host")));
        for dir in ["src", "data", "src/many"] {
            std::fs::create_dir_all(scratch.path().join(dir)).unwrap();
        }
        scratch.file("src/from-host", b"hello\n");
        scratch.file("data/kept", b"kept\n");
        scratch.file("outside", b"host secret\n");
        symlink(scratch.path().join("outside"), scratch.path().join("src/link")).unwrap();
        symlink("/etc/hostname", scratch.path().join("src/etc")).unwrap();
        (0..2000).for_each(|n| drop(scratch.file(&format!("src/many/{n}"), b"")));
        // The guest's own file, to which the link leads in the guest.
        let input = "echo guest-own >/etc/hostname; cd /mnt/src; cat from-host; cat etc; cat link 2>&1; cat ../outside\n\
             ls many | wc -l; rm -r many\n\
             head -c 9000000 /dev/urandom >big; sync big; sha256sum big; echo appended >>from-host; mv from-host renamed\n\
             exec 3>gone; rm gone; echo x >&3; exec 3>&-\n\
             dd if=/dev/zero of=sparse bs=1 seek=6000000000 count=1 2>/dev/null; du -k sparse; stat -c %u:%s sparse\n\
             cd /mnt/data; cat kept; touch new; echo x >kept; rm kept; mkdir d; mv kept k; cat kept; echo status $?\n";
        let mut command = Command::new(lodge());
        command.args(["run", image, "--engine", "translate"]);
        command.arg("--share").arg(format!("{}:src", scratch.path().join("src").display()));
        command.arg("--share").arg(format!("{},readonly", scratch.path().join("data").display()));
        let done = start_with(&mut command, input).wait(PATIENCE).expect(0);
        let has = |line: &str| assert!(done.out.lines().any(|l| l.trim() == line), "{line}: {}", done.out);
        ["hello", "guest-own", "2000", "kept", "status 0", "0:6000000001"].into_iter().for_each(has);
        assert!(!done.out.contains("host secret"), "{}", done.out);
        assert_eq!(done.out.matches("Read-only file system").count(), 5, "{}", done.out);
        let src = scratch.path().join("src");
        assert_eq!(std::fs::read(src.join("renamed")).unwrap(), b"hello\nappended\n");
        let sum = Command::new("sha256sum").arg(src.join("big")).output().unwrap();
        let sum = String::from_utf8_lossy(&sum.stdout).split(' ').next().unwrap_or_default().to_owned();
        has(&format!("{sum}  big"));
        assert!(!src.join("many").exists() && !src.join("gone").exists() && !src.join("from-host").exists());
        let data: Vec<_> = std::fs::read_dir(scratch.path().join("data")).unwrap().flatten().collect();
        assert_eq!(data.len(), 1, "{data:?}");
    }
}

#[test]
fn what_cannot_be_shared_is_refused_before_the_guest_starts() {
    let scratch = Scratch::new("share-refused");
    let file = scratch.file("file", b"");
    for (args, part) in [
        (vec![format!("{}/nothing:a", scratch.path().display())], "No such file"),
        (vec![format!("{}:a", file.display())], "Not a directory"),
        (vec![format!("{}:a", scratch.path().display()); 2], "two shares"),
    ] {
        let mut command = Command::new(lodge());
        command.args(["run", "--kernel", "/dev/null"]);
        for share in &args {
            command.args(["--share", share]);
        }
        let done = start_with(&mut command, "").wait(PATIENCE);
        assert!(done.code() != 0 && done.err.contains(part), "{args:?}: {}", done.err);
    }
}
