//! Whether somebody changes the firewall, or links.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType, bind,
    netlink::{self, SocketAddrNetlink},
    recv, socket_with,
};
use tokio::io::unix::AsyncFd;

use crate::process::readable;
use crate::{Context, Result};

/// Changes of nftables, of everybody's (linux/netfilter/nfnetlink.h, `NFNLGRP_NFTABLES`).
const FIREWALL: u32 = 7;
/// Changes of links (linux/rtnetlink.h, `RTNLGRP_LINK`).
const LINKS: u32 = 1;

/// Hears of changes.
#[derive(Debug)]
pub struct Changes(AsyncFd<OwnedFd>);

impl Changes {
    /// Hears of the firewall's rules from now on.
    ///
    /// # Errors
    /// The kernel has no nftables.
    pub fn of_firewall() -> Result<Self> {
        Self::listen(Some(netlink::NETFILTER), FIREWALL)
    }

    /// Hears of links from now on.
    ///
    /// # Errors
    /// The kernel has no descriptors left.
    pub fn of_links() -> Result<Self> {
        // NETLINK_ROUTE is protocol 0, the default.
        Self::listen(None, LINKS)
    }

    fn listen(protocol: Option<Protocol>, group: u32) -> Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let open = || -> std::io::Result<_> {
            let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
            bind(&socket, &SocketAddrNetlink::new(0, 1 << (group - 1)))?;
            readable(socket)
        };
        open().map(Self).context(|| "changes of the firewall and of links cannot be noticed".into())
    }

    /// Waits for one; what came in the meantime counts as one.
    ///
    /// # Errors
    /// There will be no more.
    pub async fn next(&mut self) -> Result<()> {
        loop {
            let mut ready = self
                .0
                .readable()
                .await
                .context(|| "the firewall and links cannot be watched any more".into())?;
            let mut seen = false;
            let mut bytes = [0; 256];
            loop {
                // What it was is looked up afterwards, so bytes that are cut off are not missed; and too many events are one, too.
                match recv(ready.get_inner(), &mut bytes[..], RecvFlags::DONTWAIT) {
                    Ok(_) | Err(Errno::NOBUFS) => seen = true,
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => break,
                    Err(error) => {
                        return Err(error)
                            .context(|| "the firewall and links cannot be watched any more".into());
                    }
                }
            }
            ready.clear_ready();
            if seen {
                return Ok(());
            }
        }
    }
}
