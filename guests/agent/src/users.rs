//! Users and groups, by `/etc/passwd` and `/etc/group`: a static program has no other way to ask.

use std::io;

/// A user.
#[derive(Debug)]
pub struct User {
    pub name: Vec<u8>,
    pub uid: u32,
    pub gid: u32,
    /// The groups that he is in beside his own.
    pub groups: Vec<u32>,
    pub home: Vec<u8>,
    pub shell: Vec<u8>,
}

fn number(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// The user called `name`; root if that is none.
pub fn find(name: Option<&[u8]>) -> io::Result<Option<User>> {
    let wanted = name.unwrap_or(b"root");
    let users = std::fs::read("/etc/passwd").or_else(|error| match error.kind() {
        // A system that has no users has root.
        io::ErrorKind::NotFound => Ok(b"root:x:0:0:root:/root:/bin/sh\n".to_vec()),
        _ => Err(error),
    })?;
    let user = users.split(|&b| b == b'\n').find_map(|line| {
        let mut fields = line.split(|&b| b == b':');
        let name = fields.next().filter(|name| *name == wanted)?;
        let (uid, gid) = (number(fields.nth(1)?)?, number(fields.next()?)?);
        let (home, shell) = (fields.nth(1)?, fields.next().unwrap_or_default());
        let shell = if shell.is_empty() { b"/bin/sh" } else { shell };
        Some(User { name: name.into(), uid, gid, groups: Vec::new(), home: home.into(), shell: shell.into() })
    });
    let Some(mut user) = user else { return Ok(None) };
    user.groups.push(user.gid);
    let groups = std::fs::read("/etc/group").unwrap_or_default();
    for line in groups.split(|&b| b == b'\n') {
        let mut fields = line.split(|&b| b == b':');
        let (Some(gid), Some(members)) = (fields.nth(2).and_then(number), fields.next()) else { continue };
        if members.split(|&b| b == b',').any(|member| member == user.name) && !user.groups.contains(&gid) {
            user.groups.push(gid);
        }
    }
    Ok(Some(user))
}
