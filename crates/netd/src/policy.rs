//! Who may do what.

use std::ffi::CString;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use netctl::Target;
use nix::unistd::{Gid, Group, Uid, User, getgrouplist};
use serde::Deserialize;

use crate::{Context, Error, Result};

/// The group whose members may do everything but pretend, where nothing else is said.
pub const GROUP: &str = "lodge";

/// The file that says it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    #[serde(default)]
    allow: Vec<Allow>,
}

/// What somebody may do.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Allow {
    /// A group's members.
    group: Option<String>,
    /// A user.
    user: Option<String>,
    /// What cards may be connected to: a network's name, `bridge:NAME`, `direct:LINK`; `*` stands for any name, or for all.
    #[serde(default)]
    attach: Vec<String>,
    /// Making, starting, stopping and removing networks and bridges.
    #[serde(default)]
    manage: bool,
    /// Cards that may pretend to be others.
    #[serde(default)]
    spoofing: bool,
}

impl Default for Policy {
    fn default() -> Self {
        let all = Allow {
            group: Some(GROUP.into()),
            user: None,
            attach: vec!["*".into()],
            manage: true,
            spoofing: false,
        };
        Self { allow: vec![all] }
    }
}

impl Policy {
    /// Reads it; where there is no file, the default holds.
    ///
    /// # Errors
    /// The file makes no sense.
    pub fn read(path: &Path) -> Result<Self> {
        match fs::read_to_string(path) {
            Ok(text) => toml::from_str(&text).context(|| format!("{} makes no sense", path.display())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).context(|| format!("{} cannot be read", path.display())),
        }
    }

    /// What this user may do. The host's files are asked each time: who has just been added to a group need not log in again.
    pub fn rights(&self, uid: u32, gid: u32) -> Rights {
        let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
        let mut groups = vec![Gid::from_raw(gid)];
        if let Some(user) = &user
            && let Ok(name) = CString::new(user.name.clone())
        {
            groups.extend(getgrouplist(&name, user.gid).unwrap_or_default());
        }
        let name = user.map_or_else(|| uid.to_string(), |user| user.name);
        let is_in = |group: &str| {
            Group::from_name(group).ok().flatten().is_some_and(|group| groups.contains(&group.gid))
        };
        let applies = |allow: &&Allow| {
            allow.user.as_deref() == Some(name.as_str()) || allow.group.as_deref().is_some_and(is_in)
        };
        let allow = self.allow.iter().filter(applies).cloned().collect();
        Rights { root: uid == 0, default: self.is_default(), allow, name }
    }

    fn is_default(&self) -> bool {
        matches!(self.allow.as_slice(), [allow] if allow.group.as_deref() == Some(GROUP))
    }
}

/// What one user may do.
#[derive(Debug)]
pub struct Rights {
    root: bool,
    default: bool,
    allow: Vec<Allow>,
    name: String,
}

impl Rights {
    /// To see what there is.
    ///
    /// # Errors
    /// Not.
    pub fn see(&self) -> Result<()> {
        self.check(!self.allow.is_empty(), || format!("{} may not use this host's networks", self.name))
    }

    /// To make, start, stop and remove.
    ///
    /// # Errors
    /// Not.
    pub fn manage(&self) -> Result<()> {
        let may = self.allow.iter().any(|allow| allow.manage);
        self.check(may, || format!("{} may not change this host's networks", self.name))
    }

    /// To connect a card.
    ///
    /// # Errors
    /// Not.
    pub fn attach(&self, to: &Target) -> Result<()> {
        let (kind, name) = match to {
            Target::Network(name) => ("", name),
            Target::Bridge(name) => ("bridge:", name),
            Target::Direct { link, .. } => ("direct:", link),
        };
        let covers = |pattern: &str| {
            pattern == "*"
                || pattern
                    .strip_prefix(kind)
                    .is_some_and(|rest| rest == name || (rest == "*" && !kind.is_empty()))
        };
        let may = self.allow.iter().any(|allow| allow.attach.iter().any(|pattern| covers(pattern)));
        self.check(may, || format!("{} may not connect cards to {kind}{name}", self.name))
    }

    /// To connect cards that may pretend to be others.
    ///
    /// # Errors
    /// Not.
    pub fn spoof(&self) -> Result<()> {
        if self.root || self.allow.iter().any(|allow| allow.spoofing) {
            return Ok(());
        }
        Err(Error::new(format!("{} may not connect cards that pretend to be others", self.name))
            .help("root may, and whom /etc/lodge/netd.toml gives `spoofing = true`"))
    }

    /// To have ports of the host's that only root has.
    ///
    /// # Errors
    /// Not.
    pub fn listen(&self, port: u16) -> Result<()> {
        if self.root || port >= 1024 {
            return Ok(());
        }
        Err(Error::new(format!(
            "{} may not forward the host's port {port}: those below 1024 are root's",
            self.name
        ))
        .help("take another port, such as 8080, or run the VM as root"))
    }

    fn check(&self, may: bool, why: impl FnOnce() -> String) -> Result<()> {
        if self.root || may {
            return Ok(());
        }
        Err(Error::new(why()).help(if self.default {
            let create = Group::from_name(GROUP).ok().flatten().is_none();
            let create = if create { format!("sudo groupadd --system {GROUP}; ") } else { String::new() };
            format!("{create}sudo usermod -aG {GROUP} {}", self.name)
        } else {
            "an administrator says in /etc/lodge/netd.toml who may".into()
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_allowed_is_refused_with_a_way_out() {
        let policy: Policy = toml::from_str(
            "[[allow]]\nuser = \"daemon\"\nattach = [\"default\", \"bridge:br0\", \"direct:*\"]\n",
        )
        .unwrap();
        let direct = |link: &str| Target::Direct {
            link: link.into(),
            mode: netctl::Direct::Bridge,
            host_access: false,
        };
        // Debian's user of number 1.
        let Some(daemon) = User::from_name("daemon").unwrap() else { return };
        let rights = policy.rights(daemon.uid.as_raw(), daemon.gid.as_raw());
        assert!(rights.see().is_ok() && rights.manage().is_err() && rights.spoof().is_err());
        assert!(rights.attach(&Target::Network("default".into())).is_ok());
        assert!(rights.attach(&Target::Network("lab".into())).is_err());
        assert!(rights.attach(&Target::Bridge("br0".into())).is_ok());
        assert!(rights.attach(&Target::Bridge("br1".into())).is_err());
        assert!(rights.attach(&direct("eth7")).is_ok());
        assert!(rights.listen(1024).is_ok() && rights.listen(1023).is_err());
        let default = Policy::default();
        let refused = default.rights(daemon.uid.as_raw(), daemon.gid.as_raw()).see().unwrap_err();
        assert!(refused.help.unwrap().ends_with("sudo usermod -aG lodge daemon"));
        assert!(default.rights(0, 0).manage().is_ok());
        assert!(toml::from_str::<Policy>("[[allow]]\nuser = \"a\"\nattack = true").is_err());
    }
}
