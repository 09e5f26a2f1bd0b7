//! `--share`: which directories the guest may use.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::report::Usage;

/// What is said of a share on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    path: PathBuf,
    /// What the guest knows it by.
    pub tag: String,
    read_only: bool,
}

/// Reads `DIRECTORY[:TAG][,readonly]`; `,,` is a comma of the path's. Without a tag it is the directory's own name.
pub fn parse(text: &str) -> Result<Share, String> {
    let mut parts = crate::disk::split(text).into_iter();
    let place = parts.next().unwrap_or_default();
    let (path, tag) = match place.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => (PathBuf::from(path), tag.to_owned()),
        _ => (PathBuf::from(&place), name(Path::new(&place))),
    };
    if path.as_os_str().is_empty() {
        return Err("give the path of a directory".into());
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !(1..=vm::LONGEST_TAG).contains(&tag.len()) || !tag.chars().all(plain) || tag.starts_with(['-', '.']) {
        return Err(format!(
            "\"{tag}\" is no tag; give one of 1 to {} letters, digits, -, _ and dots after a colon",
            vm::LONGEST_TAG
        ));
    }
    let mut share = Share { path, tag, read_only: false };
    for part in parts {
        match part.as_str() {
            "readonly" => share.read_only = true,
            _ => return Err(format!("\"{part}\" is not known of shares; there is readonly")),
        }
    }
    Ok(share)
}

/// The directory's own name, also where its path ends in `..`.
fn name(path: &Path) -> String {
    let own = path.file_name().map(ToOwned::to_owned);
    let own = own.or_else(|| path.canonicalize().ok()?.file_name().map(ToOwned::to_owned));
    own.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Opens them.
pub fn open(shares: &[Share]) -> anyhow::Result<Vec<vm::Share>> {
    for (n, share) in shares.iter().enumerate() {
        if shares[..n].iter().any(|other| other.tag == share.tag) {
            let what = format!(
                "two shares have the tag \"{0}\"; give one another, as in --share DIR:{0}2",
                share.tag
            );
            return Err(Usage(what).into());
        }
    }
    let open = |share: &Share| {
        let directory = Arc::new(vm::ShareDirectory::open(&share.path, share.read_only)?);
        Ok(vm::Share { directory, tag: share.tag.clone() })
    };
    shares.iter().map(open).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_and_options_follow_the_path() {
        let share =
            |path: &str, tag: &str, read_only| Share { path: path.into(), tag: tag.into(), read_only };
        assert_eq!(parse("/srv/a:src"), Ok(share("/srv/a", "src", false)));
        assert_eq!(parse("a,,b:c:src,readonly"), Ok(share("a,b:c", "src", true)));
        assert_eq!(parse("/srv/data/"), Ok(share("/srv/data/", "data", false)));
        for bad in [
            "",
            ":src",
            "/srv:",
            "/srv:a b",
            "/srv:-x",
            "/srv:a,rw",
            "/",
            &format!("/srv:{}", "x".repeat(37)),
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
