//! `lodge-netd`: see the library.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use caps::{CapSet, Capability, CapsHashSet};
use clap::Parser;
use netd::policy::Policy;
use netd::{Error, Helper, Result, Store, server};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Mutex;

/// It ended because its rights are missing.
const NO_RIGHTS: u8 = 4;
/// Whoever changes the firewall does so in many steps.
const CALM: Duration = Duration::from_millis(200);

/// Lodge's privileged network helper: it connects the VMs of those who may to networks, bridges and links of the host's.
#[derive(Parser)]
#[command(name = "lodge-netd", version)]
struct Flags {
    /// Where it listens
    #[arg(long, value_name = "PATH", default_value = "/run/lodge/netd.sock")]
    socket: PathBuf,
    /// Where networks and leases are kept
    #[arg(long, value_name = "DIR", default_value = "/var/lib/lodge/networks")]
    state: PathBuf,
    /// Where it notes what is connected; need not outlive the host's restart
    #[arg(long, value_name = "DIR", default_value = "/run/lodge/net")]
    runtime: PathBuf,
    /// Who may do what; without it, the members of the group lodge may do all
    #[arg(long, value_name = "FILE", default_value = "/etc/lodge/netd.toml")]
    config: PathBuf,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    if let Err(error) = limit() {
        return complain(&error, NO_RIGHTS);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = match runtime {
        Ok(runtime) => runtime.block_on(run(flags)),
        Err(error) => Err(Error::new(format!("it cannot start: {error}"))),
    };
    served.map_or_else(|error| complain(&error, 1), |()| ExitCode::SUCCESS)
}

fn complain(error: &Error, status: u8) -> ExitCode {
    eprintln!("error: {error}");
    if let Some(help) = &error.help {
        eprintln!("  help: {help}");
    }
    ExitCode::from(status)
}

/// Gives up all rights but those over networks.
fn limit() -> Result<()> {
    // Raw sockets and low ports are for DHCP and name servers, device nodes for MacVTaps where /dev has none.
    let wanted = [
        Capability::CAP_NET_ADMIN,
        Capability::CAP_NET_RAW,
        Capability::CAP_NET_BIND_SERVICE,
        Capability::CAP_MKNOD,
    ];
    let fail = |error: caps::errors::CapsError| Error::new(format!("rights cannot be given up: {error}"));
    let have = caps::read(None, CapSet::Permitted).map_err(fail)?;
    if !have.contains(&Capability::CAP_NET_ADMIN) {
        return Err(Error::new("CAP_NET_ADMIN is missing, without which no network can be made")
            .help("sudo systemctl start lodge-netd, or run it as root"));
    }
    let kept: CapsHashSet = wanted.into_iter().filter(|right| have.contains(right)).collect();
    // Programs that it starts (nft) have no more either. Without CAP_SETPCAP this cannot be done, and need not be.
    if have.contains(&Capability::CAP_SETPCAP) {
        let bound = caps::read(None, CapSet::Bounding).map_err(fail)?;
        bound
            .difference(&kept)
            .try_for_each(|right| caps::drop(None, CapSet::Bounding, *right))
            .map_err(fail)?;
    }
    caps::set(None, CapSet::Effective, &kept).map_err(fail)?;
    caps::set(None, CapSet::Permitted, &kept).map_err(fail)?;
    // `nft` needs them, too, where this is not root.
    let network = CapsHashSet::from([Capability::CAP_NET_ADMIN]);
    caps::set(None, CapSet::Inheritable, &network).map_err(fail)?;
    caps::set(None, CapSet::Ambient, &network).map_err(fail)?;
    rustix::thread::set_no_new_privs(true)
        .map_err(|error| Error::new(format!("rights cannot be given up: {error}")))
}

async fn run(flags: Flags) -> Result<()> {
    let wait = |kind| signal(kind).map_err(|error| Error::new(format!("signals cannot be heard: {error}")));
    let (mut end, mut interrupt) = (wait(SignalKind::terminate())?, wait(SignalKind::interrupt())?);
    // Whose terminal is closed has made networks that stay.
    let _hangup = wait(SignalKind::hangup())?;
    Policy::read(&flags.config)?;
    let store = Store::open(&flags.state, &flags.runtime)?;
    let helper = Helper::start(store).await?;
    let listener = server::listen(&flags.socket)?;
    tokio::spawn(keep_rules(helper.clone()));
    tokio::spawn(look_after_cards(helper.clone()));
    tokio::spawn(server::serve(listener, helper, flags.config));
    tokio::select! {
        _ = end.recv() => {}
        _ = interrupt.recv() => {}
    }
    // What it has made stays for the next start, and guests are told of no end: nothing is dropped, as if it had been killed.
    std::process::exit(0)
}

/// Disconnects cards whose links are not as they were made.
async fn look_after_cards(helper: Arc<Mutex<Helper>>) {
    let complain = |error: &Error| eprintln!("warning: {error}");
    let mut changes = match netd::Changes::of_links() {
        Ok(changes) => changes,
        Err(error) => return complain(&error),
    };
    loop {
        if let Err(error) = helper.lock().await.look_after_cards().await {
            complain(&error);
        }
        if let Err(error) = changes.next().await {
            return complain(&error);
        }
    }
}

/// Sets rules again that somebody else has removed: `nft flush ruleset`, a firewall that starts anew.
async fn keep_rules(helper: Arc<Mutex<Helper>>) {
    let complain = |error: &Error| eprintln!("warning: {error}");
    let mut changes = match netd::Changes::of_firewall() {
        Ok(changes) => changes,
        Err(error) => return complain(&error),
    };
    loop {
        match helper.lock().await.repair().await {
            Ok(tables) if tables.is_empty() => {}
            Ok(tables) => eprintln!("somebody changed the firewall's rules; repaired: {}", tables.join(", ")),
            Err(error) => complain(&error),
        }
        if let Err(error) = changes.next().await {
            return complain(&error);
        }
        tokio::time::sleep(CALM).await;
    }
}
