//! A machine's seed: the file system from which it takes its name, users and keys at its first start, in the form that cloud-init
//! calls NoCloud. The user-data are a script for our own systems, and cloud-init's own form for images that were fetched.

use std::fmt::Write as _;
use std::io::{self, Cursor, Read, Seek, Write};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use serde_json::json;

use crate::Error;
use crate::packages::check_name;

/// Bytes of the file system.
const SIZE: usize = 4 << 20;
/// What a machine does at every start.
const START: &str = include_str!("guest/start.sh");
/// How a system of ours installs the packages that the host has fetched.
const INSTALL: &str = include_str!("guest/install.sh");

/// What a machine is told at its first start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// Its name in the network; the VM's own, else `debian`.
    pub hostname: Option<String>,
    /// A user that is made, who may become root by sudo.
    pub user: Option<String>,
    /// Public keys, by which that user and root may log in.
    pub ssh_keys: Vec<String>,
    /// Packages that are installed before the commands run.
    pub packages: Vec<String>,
    /// Commands that are run as root, in this order.
    pub commands: Vec<String>,
    /// The password of the image's own user, or of `user`, for the console: of images that were fetched.
    pub password: Option<String>,
}

/// What the user-data are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// A script for the shell.
    Script,
    /// `#cloud-config`, as cloud-init and tiny-cloud read it.
    CloudConfig,
}

impl Settings {
    /// Refuses names that are none.
    pub fn check(&self) -> Result<(), Error> {
        if let Some(name) = self.hostname.as_ref().filter(|name| !is_name(name, 63)) {
            return Err(Error::Name(name.clone()));
        }
        let small = |name: &str| {
            is_name(name, 32)
                && name.starts_with(|c: char| c.is_ascii_lowercase())
                && !name.contains(|c: char| c.is_ascii_uppercase())
        };
        match self.user.as_ref().filter(|user| !small(user)) {
            Some(user) => Err(Error::User(user.clone())),
            None => self.packages.iter().try_for_each(|name| check_name(name)),
        }
    }

    /// The same for cloud-init: YAML, of which JSON is a part. `user` is the image's own user, by another name.
    fn cloud_config(&self) -> String {
        let mut config = serde_json::Map::new();
        if let Some(user) = &self.user {
            config.insert("user".into(), json!({ "name": user }));
        }
        if !self.ssh_keys.is_empty() {
            let keys: Vec<&str> = self.ssh_keys.iter().map(|key| key.trim()).collect();
            config.insert("ssh_authorized_keys".into(), json!(keys));
        }
        if let Some(password) = &self.password {
            config.insert("password".into(), json!(password));
            config.insert("chpasswd".into(), json!({ "expire": false }));
            config.insert("ssh_pwauth".into(), json!(false));
        }
        if !self.packages.is_empty() {
            config.insert("packages".into(), json!(self.packages));
        }
        if !self.commands.is_empty() {
            config.insert("runcmd".into(), json!(self.commands));
        }
        // At every start, as `lodge-seed.service` does it in systems of ours.
        let start = "mkdir -p /run/lodge-seed /var/lib/lodge; mount -o ro LABEL=CIDATA /run/lodge-seed && \
                     sh /run/lodge-seed/start /run/lodge-seed || true";
        config.insert("bootcmd".into(), json!([start]));
        format!("#cloud-config\n{:#}\n", serde_json::Value::Object(config))
    }

    /// The script for the first start. `install`: packages are there to be installed.
    fn script(&self, install: bool) -> String {
        let mut text = String::from("#!/bin/sh\n# What `lodge run` was told of this machine.\n");
        let mut line = |line: String| {
            text += &line;
            text.push('\n');
        };
        line("status=0".into());
        if let Some(user) = &self.user {
            line(format!("useradd --create-home --shell /bin/bash --groups sudo,adm {user} || status=$?"));
            line(format!("echo '{user} ALL=(ALL) NOPASSWD:ALL' >/etc/sudoers.d/90-{user}"));
            line(format!("chmod 440 /etc/sudoers.d/90-{user}"));
        }
        if !self.ssh_keys.is_empty() {
            for user in ["root"].into_iter().chain(self.user.as_deref()) {
                let home = format!("~{user}/.ssh");
                line(format!("install -d -m 700 -o {user} -g {user} {home}"));
                line(format!("cat >>{home}/authorized_keys <<'END-OF-KEYS'"));
                self.ssh_keys.iter().for_each(|key| line(key.trim().replace('\n', " ")));
                line("END-OF-KEYS".into());
                line(format!("chown {user}:{user} {home}/authorized_keys"));
                line(format!("chmod 600 {home}/authorized_keys"));
            }
        }
        if install {
            line(INSTALL.trim_end().into());
        }
        for command in &self.commands {
            line(format!("sh -c {} || status=$?", quote(command)));
        }
        line("exit $status".into());
        text
    }
}

/// The seed of the machine `id`: what is for its first start, by the names of the files. `install`: packages are there to be
/// installed.
pub(crate) fn first_start(
    settings: &Settings,
    form: Form,
    install: bool,
    id: &str,
    hostname: &str,
) -> Vec<(&'static str, Vec<u8>)> {
    let mut meta = String::new();
    let _ = write!(meta, "instance-id: {id}\nlocal-hostname: {hostname}\n");
    let user = match form {
        Form::Script => settings.script(install),
        Form::CloudConfig => settings.cloud_config(),
    };
    vec![("meta-data", meta.into_bytes()), ("user-data", user.into_bytes())]
}

/// What is for every start: the directories of the host that it mounts, and our agent.
pub(crate) fn every_start(shares: &[String]) -> Vec<(&'static str, Vec<u8>)> {
    let tags: String = shares.iter().map(|tag| format!("{tag}\n")).collect();
    let start = [("start", START.into()), ("shares", tags.into_bytes()), ("agent", agent::PROGRAM.into())];
    start.into_iter().filter(|(_, bytes): &(_, Vec<u8>)| !bytes.is_empty()).collect()
}

/// What is for the first start in the seed that is there.
pub(crate) fn read(seed: impl Read + Write + Seek) -> io::Result<Vec<(&'static str, Vec<u8>)>> {
    let volume = FileSystem::new(seed, FsOptions::new())?;
    let read = |name| {
        let mut bytes = Vec::new();
        volume.root_dir().open_file(name)?.take(SIZE as u64).read_to_end(&mut bytes)?;
        Ok((name, bytes))
    };
    ["meta-data", "user-data"].into_iter().map(read).collect()
}

/// Makes a seed with these files.
pub(crate) fn make(files: &[(&str, Vec<u8>)]) -> io::Result<Vec<u8>> {
    let mut bytes = Cursor::new(vec![0; SIZE]);
    fatfs::format_volume(&mut bytes, FormatVolumeOptions::new().volume_label(*b"CIDATA     "))?;
    {
        let volume = FileSystem::new(&mut bytes, FsOptions::new())?;
        let root = volume.root_dir();
        for (name, bytes) in files {
            let mut file = root.create_file(name)?;
            file.write_all(bytes)?;
            file.flush()?;
        }
    }
    Ok(bytes.into_inner())
}

/// Whether this is a name of letters, digits, `-` and `_`.
pub fn is_name(text: &str, longest: usize) -> bool {
    let plain = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
    (1..=longest).contains(&text.len()) && text.bytes().all(plain) && !text.starts_with('-')
}

/// A word for the shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_holds_what_was_told() {
        let settings = Settings {
            hostname: None,
            user: Some("ada".into()),
            ssh_keys: vec!["ssh-ed25519 AAAA ada@host\n".into()],
            packages: vec!["g++".into(), "jq".into()],
            commands: vec!["echo 'it works'".into()],
            password: Some("secret".into()),
        };
        settings.check().unwrap();
        let first = first_start(&settings, Form::Script, true, "id-1", "web");
        let bytes = make(&first).unwrap();
        // At the next start, with another version of Lodge.
        let again = read(Cursor::new(bytes)).unwrap();
        assert_eq!(again, first);
        let bytes = make(&[again, every_start(&["src".into(), "data".into()])].concat()).unwrap();
        let volume = FileSystem::new(Cursor::new(bytes), FsOptions::new()).unwrap();
        assert_eq!(volume.volume_label(), "CIDATA");
        let read = |name: &str| {
            let mut text = String::new();
            volume.root_dir().open_file(name).unwrap().read_to_string(&mut text).unwrap();
            text
        };
        assert_eq!(read("meta-data"), "instance-id: id-1\nlocal-hostname: web\n");
        assert_eq!(read("shares"), "src\ndata\n");
        assert!(read("start").starts_with("#!/bin/sh\n"));
        let script = read("user-data");
        let config = settings.cloud_config();
        let mut config: serde_json::Value =
            serde_json::from_str(config.strip_prefix("#cloud-config\n").unwrap()).unwrap();
        assert!(config["bootcmd"][0].as_str().unwrap().contains("/run/lodge-seed/start"), "{config}");
        config.as_object_mut().unwrap().remove("bootcmd");
        let expected = json!({
            "user": { "name": "ada" },
            "ssh_authorized_keys": ["ssh-ed25519 AAAA ada@host"],
            "password": "secret",
            "chpasswd": { "expire": false },
            "ssh_pwauth": false,
            "packages": ["g++", "jq"],
            "runcmd": ["echo 'it works'"],
        });
        assert_eq!(config, expected);
        assert!(script.starts_with("#!/bin/sh\n") && script.contains("useradd"), "{script}");
        assert!(script.contains("\nssh-ed25519 AAAA ada@host\nEND-OF-KEYS\n"), "{script}");
        let parts = ["\ninstall_packages ||", "sh -c 'echo '\\''it works'\\'''"];
        let [install, command] = parts.map(|part| script.find(part).expect(part));
        assert!(install < command, "{script}");
        assert!(!settings.script(false).contains("install_packages"));
    }

    #[test]
    fn names_that_a_shell_would_take_for_more_are_refused() {
        for bad in ["", "a b", "$(x)", "-x", "a/b", "Ada", "9a", &"a".repeat(33)] {
            let settings = Settings { user: Some(bad.into()), ..Settings::default() };
            assert!(settings.check().is_err(), "{bad}");
        }
        let settings = Settings { hostname: Some("a;b".into()), ..Settings::default() };
        assert!(settings.check().is_err());
        for bad in ["", "a", "?jq", "jq=1", "a b", "-ab", "Jq", "../x", "jq;x"] {
            let settings = Settings { packages: vec![bad.into()], ..Settings::default() };
            assert!(settings.check().is_err(), "{bad}");
        }
    }
}
