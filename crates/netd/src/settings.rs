//! The kernel's settings of networks: files below `/proc/sys/net`.

use std::fs;
use std::path::Path;

use crate::{Context, Result};

const ROOT: &str = "/proc/sys/net";

/// Reads one, such as `ipv4/ip_forward`.
pub fn get(name: &str) -> Option<String> {
    Some(fs::read_to_string(Path::new(ROOT).join(name)).ok()?.trim().to_owned())
}

/// Whether the kernel has IPv6.
pub fn has_ipv6() -> bool {
    get("ipv6/conf/all/forwarding").is_some()
}

/// Changes one if it is another.
///
/// # Errors
/// It cannot be changed.
pub fn set(name: &str, value: &str) -> Result<()> {
    if get(name).as_deref() == Some(value) {
        return Ok(());
    }
    let written = fs::write(Path::new(ROOT).join(name), value);
    written.context(|| format!("the kernel's setting net/{name} cannot be {value}"))
}

/// The host neither has addresses of IPv6 on this link, nor listens to routers there: what is there is a guest's. It is to be switched off.
pub fn leave_alone(link: &str) {
    // A kernel without IPv6 has none of them.
    let _ = set(&format!("ipv6/conf/{link}/disable_ipv6"), "1");
}

/// The host is the router on this bridge, and nobody else.
pub fn rule(bridge: &str) {
    for (name, value) in [
        // Where the host has no IPv6 elsewhere, guests have it among each other.
        ("disable_ipv6", "0"),
        ("accept_ra", "0"),
        ("autoconf", "0"),
        ("accept_dad", "0"),
        ("accept_redirects", "0"),
        ("router_solicitations", "0"),
    ] {
        let _ = set(&format!("ipv6/conf/{bridge}/{name}"), value);
    }
}

/// The host passes on what is not for it.
///
/// # Errors
/// It cannot be told to.
pub fn forward() -> Result<()> {
    set("ipv4/ip_forward", "1")?;
    if !matches!(get("ipv6/conf/all/forwarding").as_deref(), Some("0")) {
        return Ok(());
    }
    // A host that forwards listens to no routers any more, and would lose its own way out, unless told to listen all the same
    // (Documentation/networking/ip-sysctl.rst, accept_ra).
    let links = fs::read_dir(Path::new(ROOT).join("ipv6/conf")).into_iter().flatten().flatten();
    for link in links
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|link| link != "all" && link != "default")
    {
        let name = format!("ipv6/conf/{link}/accept_ra");
        if get(&name).as_deref() == Some("1") {
            // A link may have gone meanwhile.
            let _ = set(&name, "2");
        }
    }
    set("ipv6/conf/all/forwarding", "1")
}
