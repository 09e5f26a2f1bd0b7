//! Whole Debian systems: made from packages, started, shut down, started again.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lodge_tests::{Done, Scratch, cached_guest, lodge, start_typing};

/// Making the system takes minutes, and more where other tests run beside it.
const MAKING: Duration = Duration::from_secs(900);
const STARTING: Duration = Duration::from_secs(300);

/// Starts `lodge run ARGS` with VMs kept in `data`, types `commands` at the prompt, and waits for the end.
fn session(data: &Scratch, args: &[&str], patience: Duration, commands: &str) -> Done {
    session_with(data, args, patience, commands, || ())
}

/// The same, with something done beside it when the prompt is there.
fn session_with(
    data: &Scratch,
    args: &[&str],
    patience: Duration,
    commands: &str,
    beside: impl FnOnce(),
) -> Done {
    let mut command = Command::new(lodge());
    let engine: &[&str] = if args.contains(&"--engine") { &[] } else { &["--engine", "translate"] };
    command.arg("run").args(engine).args(args);
    command.env("LODGE_DATA_DIR", data.path()).env("LODGE_RUNTIME_DIR", data.path().join("run"));
    let (running, mut input) = start_typing(&mut command);
    running.line("login: root (automatic login)", patience);
    // What is typed before the prompt is there is thrown away.
    running.line(":~# ", patience.max(STARTING));
    beside();
    input.write_all(format!("{commands}\npoweroff\n").as_bytes()).unwrap();
    let done = running.wait(patience.max(STARTING)).expect(0);
    assert!(done.out.contains("Power down"), "{}", done.out);
    done
}

/// What a line of output says after `key=`.
fn value<'a>(done: &'a Done, key: &str) -> &'a str {
    // The shell ends the terminal's mode for pasting before it runs a command.
    let value = |line: &'a str| line.trim_start_matches("\x1b[?2004l").strip_prefix(key)?.strip_prefix('=');
    done.out.lines().find_map(value).unwrap_or_else(|| panic!("no {key}= in:\n{}", done.out))
}

/// What runs is reached by its name: by the agent, and by ssh through it.
fn reached_without_a_network(data: &Scratch, key: &Path) {
    let ask = |args: &[&str]| {
        let mut command = Command::new(lodge());
        command
            .args(args)
            .env("LODGE_DATA_DIR", data.path())
            .env("LODGE_RUNTIME_DIR", data.path().join("run"));
        lodge_tests::start_with(&mut command, "").wait(STARTING)
    };
    let done =
        ask(&["exec", "web", "--user", "ada", "--", "sh", "-c", "id -nu; id -nG; pwd; exit 3"]).expect(3);
    assert_eq!(done.out, "ada\nada adm sudo\n/home/ada\n");
    let key = key.display().to_string();
    let ssh =
        ["ssh", "web", "-u", "ada", "--", "-i", &key, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"];
    let command = "sudo sh -c 'echo $SUDO_USER was here >/mnt/src/answer; exit 4'";
    ask(&[&ssh[..], &[command]].concat()).expect(4);
}

#[test]
fn debian_is_made_starts_shuts_down_and_starts_again() {
    // It comes from the same archive.
    if cached_guest().is_none() {
        return;
    }
    let data = Scratch::new("debian");
    let (src, key) = (data.path().join("src"), data.path().join("key"));
    std::fs::create_dir(&src).unwrap();
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
    assert!(made.unwrap().success());
    let public = key.with_extension("pub").display().to_string();
    let first = session(
        &data,
        &[
            &[
                "debian:13",
                "--name",
                "web",
                "--user",
                "ada",
                "--ssh-key",
                &public,
                "--package",
                "jq,nginx-light",
            ][..],
            &["--runcmd", "date >/root/ran; jq -n 40+2 >/root/sum; systemctl is-active nginx >/root/nginx"],
        ]
        .concat(),
        MAKING,
        "echo state=$(systemctl is-system-running --wait) failed=$(systemctl --failed --no-legend | wc -l)\n\
         echo name=$(hostname) id=$(cat /etc/machine-id)\necho id=$(cat /etc/machine-id)\n\
         echo user=$(id -nu ada) $(sudo -u ada sudo -n id -nu)\necho keys=$(cat /etc/ssh/*.pub | sha256sum)\n\
         echo audit=$(dpkg --audit | wc -l) $(dpkg -l | grep -c ^ii)\n\
         echo packages=$(cat /root/sum /root/nginx) $(apt-mark showmanual jq nginx-light libjq1) $(ls /var/tmp | grep packages)\n\
         cp /root/ran /root/ran.first; echo kept >/root/file\n\
         cd /boot; for a in vmlinuz initrd.img; do cp $a-$(uname -r) $a-new; ln -sf boot/$a-new /$a; done; \
         echo new >>vmlinuz-new; cd",
    );
    assert_eq!(value(&first, "state"), "running failed=0", "{}", first.out);
    assert!(value(&first, "name").starts_with("web "), "{}", first.out);
    assert_eq!(value(&first, "user"), "ada root", "{}", first.out);
    let (audit, packages) = value(&first, "audit").split_once(' ').unwrap();
    assert!(audit == "0" && packages.parse::<u32>().unwrap() > 100, "{}", first.out);
    assert_eq!(value(&first, "packages"), "42 active jq nginx-light", "{}", first.out);
    let packages = data.path().join("vms/web/packages.tar");
    assert!(packages.exists());

    let again = session_with(
        &data,
        &["--name", "web", "--share", &format!("{}:src", src.display())],
        STARTING,
        "echo id=$(cat /etc/machine-id)\necho keys=$(cat /etc/ssh/*.pub | sha256sum)\n\
         echo file=$(cat /root/file)\ncmp /root/ran /root/ran.first && echo once=yes\n\
         echo journal=$(dmesg | grep -c 'EXT4-fs.*recovery')\n\
         until ip route | grep -q ^default; do sleep 0.2; done; export DEBIAN_FRONTEND=noninteractive\n\
         grep -q URIs /etc/apt/sources.list.d/* && apt-get -qq update </dev/null && apt-get -qq install tree </dev/null >/dev/null\n\
         echo apt=$? $(tree --version | cut -d' ' -f1)",
        || reached_without_a_network(&data, &key),
    );
    assert!(!packages.exists(), "they are of no use any more");
    // As after an upgrade: what `/vmlinuz` on the disk leads to is what starts.
    assert!(std::fs::read(data.path().join("vms/web/vmlinuz")).unwrap().ends_with(b"new\n"));
    assert_eq!(std::fs::read(src.join("answer")).unwrap(), b"ada was here\n");
    for key in ["id", "keys"] {
        assert_eq!(value(&again, key), value(&first, key), "{key}");
    }
    assert_eq!((value(&again, "file"), value(&again, "once")), ("kept", "yes"));
    assert_eq!(value(&again, "journal"), "0", "the file system was shut down cleanly");
    assert_eq!(value(&again, "apt"), "0 tree", "{}", again.out);

    // By its own boot loader it is the same machine.
    for firmware in ["bios", "uefi"] {
        let by_grub = session(
            &data,
            &["--name", "web", "--firmware", firmware],
            STARTING,
            "echo id=$(cat /etc/machine-id)\necho file=$(cat /root/file)\necho loader=$(grep -c BOOT_IMAGE /proc/cmdline)\n\
             echo efi=$(ls -d /sys/firmware/efi 2>/dev/null) $(ls /boot/efi/EFI)\necho failed=$(systemctl --failed --no-legend)",
        );
        assert!(by_grub.text().contains("Booting `Debian"), "{}", by_grub.out);
        assert_eq!(value(&by_grub, "id"), value(&first, "id"), "{firmware}");
        assert_eq!((value(&by_grub, "file"), value(&by_grub, "loader")), ("kept", "1"), "{firmware}");
        let efi = if firmware == "uefi" { "/sys/firmware/efi BOOT" } else { "BOOT" };
        assert_eq!(value(&by_grub, "efi").trim(), efi);
        assert_eq!(value(&by_grub, "failed"), "", "{}", by_grub.out);
    }

    // Another machine, thrown away, is another, also on the reference engine; it finds nothing wrong with the first one's disk.
    let disk = data.path().join("vms/web/disk.qcow2").display().to_string();
    let other = session(
        &data,
        &["debian", "--engine", "interpret", "--disk", &format!("{disk},readonly")],
        MAKING,
        "echo state=$(systemctl is-system-running --wait)\necho id=$(cat /etc/machine-id)\necho name=$(hostname)\ne2fsck -fn /dev/vdc3; echo e2fsck=$?",
    );
    assert_ne!(value(&other, "id"), value(&first, "id"));
    assert_eq!(value(&other, "name"), "debian");
    assert_eq!(value(&other, "state"), "running", "{}", other.out);
    assert_eq!(value(&other, "e2fsck"), "0", "{}", other.out);
    let kept: Vec<_> = std::fs::read_dir(data.path().join("vms")).unwrap().flatten().collect();
    assert_eq!(kept.len(), 1, "nothing is left of what was thrown away: {kept:?}");
    let check = Command::new("qemu-img").args(["check", "-q", &disk]).status().unwrap();
    assert!(check.success(), "qemu-img finds the overlay sound");

    // What is said for the first start is refused later, and so are systems that there are not.
    for (args, part) in [
        (&["--name", "web", "--user", "bob"][..], "first start"),
        (&["debian:99"], "debian:12"),
        (&["debian", "--user", "no name"], "letters"),
        (&["debian", "--package", "no-such-package"], "no package no-such-package"),
    ] {
        let mut command = Command::new(lodge());
        command.arg("run").args(args).env("LODGE_DATA_DIR", data.path());
        let (running, _) = start_typing(&mut command);
        let done = running.wait(STARTING);
        assert!(done.code() != 0 && done.err.contains(part), "{args:?}: {}", done.err);
    }
}
