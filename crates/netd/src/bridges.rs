//! Bridges over links of the host's: made, kept and removed, with the host's addresses and routes, all or nothing.
//!
//! What is to happen is noted before the first step; whoever finds such a note at the start puts everything back on the port.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use netctl::{Bridge, Target};
use serde::{Deserialize, Serialize};

use crate::addresses::check_device;
use crate::helper::Helper;
use crate::links::{Kind, Link};
use crate::moving::Moved;
use crate::{Error, Result, settings, store};

/// Bridges that there may be, and ports of one.
const MOST: usize = 64;
const MOST_PORTS: usize = 16;
/// What the kernel does with IPv6 routers' words, which the bridge does as the port did.
const MANNERS: [&str; 4] = ["accept_ra", "autoconf", "use_tempaddr", "accept_redirects"];
/// The port of SSH.
const SSH: u16 = 22;
/// TCP's state of a connection (linux/tcp_states.h, `TCP_ESTABLISHED`).
const ESTABLISHED: &str = "01";

/// A bridge that was made, or is being made or removed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// As it was asked for.
    pub bridge: Bridge,
    /// The port whose addresses it has.
    source: Option<String>,
    /// It is being removed.
    #[serde(default)]
    removing: bool,
    /// The kernel's settings of ports as they were.
    settings: Vec<(String, String)>,
    /// Ports that were switched off.
    down: Vec<String>,
    /// What moves.
    moved: Moved,
}

impl Record {
    /// The host's addresses that it took over.
    pub fn ips(&self) -> Vec<IpAddr> {
        self.moved.ips()
    }

    fn alias(&self) -> String {
        format!("Lodge's bridge {}", self.bridge.name)
    }
}

impl Helper {
    /// Ends what was interrupted, and makes the bridges that are declared and not there: the host has started anew.
    pub(crate) async fn adopt_bridges(&mut self) -> Result<()> {
        for record in self.read_records(self.store.runtime(), "moving")? {
            let name = record.bridge.name.clone();
            eprintln!(
                "the bridge {name} was interrupted while it was made or removed; its ports get everything back"
            );
            if let Err(error) = self.dissolve(&record).await {
                eprintln!("warning: {error}; the next start tries again");
                continue;
            }
            if record.removing {
                store::remove(&self.kept(&name))?;
            }
            store::remove(&self.note(&name))?;
        }
        for record in self.read_records(self.store.state(), "bridge")? {
            let name = record.bridge.name.clone();
            let there = self.links.find(&name).await?;
            if there.is_some_and(|link| link.alias == Some(record.alias())) {
                self.bridges.insert(name, record);
            } else if let Err(error) = self.make_bridge(record.bridge, true).await {
                eprintln!("warning: the bridge {name} cannot be made: {error}");
            }
        }
        Ok(())
    }

    fn read_records(&self, directory: &Path, extension: &str) -> Result<Vec<Record>> {
        let mut records = Vec::new();
        for path in store::files(directory, extension)? {
            let record = std::fs::read(&path).map_err(|error| error.to_string());
            match record.and_then(|bytes| serde_json::from_slice(&bytes).map_err(|error| error.to_string())) {
                Ok(record) => records.push(record),
                Err(error) => eprintln!("warning: {} cannot be read: {error}", path.display()),
            }
        }
        Ok(records)
    }

    fn kept(&self, name: &str) -> PathBuf {
        self.store.state().join(format!("{name}.bridge"))
    }

    fn note(&self, name: &str) -> PathBuf {
        self.store.runtime().join(format!("{name}.moving"))
    }

    /// Makes a bridge over ports; the host's addresses and routes move to it. `force`: even if that may cut somebody off.
    pub(crate) async fn make_bridge(&mut self, bridge: Bridge, force: bool) -> Result<Vec<String>> {
        if let Some(known) = self.bridges.get(&bridge.name) {
            if known.bridge == bridge {
                return Ok(Vec::new());
            }
            return Err(Error::new(format!("there is a bridge {} already, with other ports", bridge.name))
                .help(format!("lodge net bridge rm {}", bridge.name)));
        }
        let record = self.plan(bridge, force).await?;
        let name = record.bridge.name.clone();
        store::write_json(&self.note(&name), &record)?;
        let made = match self.build(&record).await {
            Ok(()) => store::write_json(&self.kept(&name), &record),
            Err(error) => Err(error),
        };
        if let Err(error) = made {
            // The first error counts. Should this fail, the next start tries again.
            if self.dissolve(&record).await.is_ok() {
                let _ = store::remove(&self.note(&name));
            }
            return Err(error);
        }
        store::remove(&self.note(&name))?;
        let source = record.source.clone().filter(|_| !record.moved.is_empty());
        self.bridges.insert(name.clone(), record);
        let note = |source| format!("the host's addresses and routes on {source} are on {name} now");
        Ok(source.map(note).into_iter().collect())
    }

    /// Removes a bridge; addresses and routes move back. `force`: even if cards are connected.
    pub(crate) async fn remove_bridge(&mut self, name: &str, force: bool) -> Result<Vec<String>> {
        let Some(record) = self.bridges.get(name) else {
            return Err(Error::new(format!("no bridge {name} was made by Lodge"))
                .help(format!("whoever made it removes it, or: ip link del {name}")));
        };
        let mut record = Record { removing: true, ..record.clone() };
        let cards = self.cards.values().filter(|card| card.to == Target::Bridge(name.into())).cloned();
        let cards: Vec<_> = cards.collect();
        if !cards.is_empty() && !force {
            let vms: Vec<_> = cards.iter().map(|card| card.vm.as_str()).collect();
            return Err(Error::new(format!("VMs are connected to the bridge {name}: {}", vms.join(", ")))
                .help("stop them first, or use --force: their links go down"));
        }
        for card in cards {
            self.cards.remove(&card.interface);
            self.unplug(&card).await;
        }
        let mut notes = Vec::new();
        if let Some(bridge) = self.links.find(name).await? {
            record.moved = Moved::of(&self.links, &bridge).await?;
            if let Some(source) = record.source.as_ref().filter(|_| !record.moved.is_empty()) {
                notes.push(format!("the host's addresses and routes on {name} are on {source} again"));
            }
            store::write_json(&self.note(name), &record)?;
            if let Err(error) = self.dissolve(&record).await {
                // It stays as it was, as far as that can be; the next start ends it.
                if self.build(&record).await.is_ok() {
                    let _ = store::remove(&self.note(name));
                }
                return Err(error);
            }
        }
        store::remove(&self.kept(name))?;
        store::remove(&self.note(name))?;
        self.bridges.remove(name);
        Ok(notes)
    }

    /// What is to be done, if it can be.
    async fn plan(&self, bridge: Bridge, force: bool) -> Result<Record> {
        check_device(&bridge.name)?;
        if self.bridges.len() >= MOST || bridge.ports.len() > MOST_PORTS {
            return Err(Error::new(format!("there can be {MOST} bridges with {MOST_PORTS} ports each")));
        }
        let links = self.links.all().await?;
        let device = |net: &crate::networks::Net| net.device == bridge.name;
        if links.iter().any(|link| link.name == bridge.name) || self.networks.values().any(device) {
            return Err(Error::new(format!("a link is called {} already", bridge.name)).help(
                "choose another name, or connect cards to the one that is there: --network bridge=NAME",
            ));
        }
        let (mut source, mut moved): (Option<String>, _) = (None, Moved::default());
        let (mut settings, mut down) = (Vec::new(), Vec::new());
        for (number, name) in bridge.ports.iter().enumerate() {
            let port = links.iter().find(|link| link.name == *name);
            let port = port.ok_or_else(|| {
                Error::new(format!("there is no link {name}")).help("ip link shows which there are")
            })?;
            if bridge.ports[..number].contains(name) {
                return Err(Error::new(format!("{name} is named twice")));
            }
            self.check_port(port, &links)?;
            let has = Moved::of(&self.links, port).await?;
            if !force {
                check_manager(port, &bridge.name, &has)?;
                check_sessions(port, &has)?;
            }
            if !has.is_empty() {
                if let Some(first) = source {
                    return Err(Error::new(format!("both {first} and {name} have addresses or routes"))
                        .help(
                            "a bridge takes over those of one port; remove the other's: ip address flush",
                        ));
                }
                (source, moved) = (Some(name.clone()), has);
            }
            for setting in ["disable_ipv6", "accept_dad"] {
                let setting = format!("ipv6/conf/{name}/{setting}");
                settings.extend(settings::get(&setting).map(|value| (setting, value)));
            }
            if !port.up {
                down.push(name.clone());
            }
        }
        Ok(Record { bridge, source, removing: false, settings, down, moved })
    }

    /// Whether a link can be a port at all.
    fn check_port(&self, port: &Link, links: &[Link]) -> Result<()> {
        let name = &port.name;
        let refuse =
            |why: String, help: &str| Err(Error::new(format!("{name} cannot be a port: {why}")).help(help));
        if let Some(master) = port.master {
            let master = links.iter().find(|link| link.index == master);
            let master = master.map_or("another link".into(), |link| link.name.clone());
            let help = format!(
                "connect cards to {master} if it is a bridge, or take it out: ip link set {name} nomaster"
            );
            return refuse(format!("it belongs to {master}"), &help);
        }
        if name == "lo" {
            return refuse(
                "it is the loopback".into(),
                "choose the link that leads to the network: ip route show default",
            );
        }
        let ours = self.cards.contains_key(name) || self.networks.values().any(|net| net.device == *name);
        if ours || port.kind == Some(Kind::Bridge) {
            let what = if ours { "it is one of Lodge's own" } else { "it is a bridge itself" };
            return refuse(what.into(), &format!("connect cards to it: --network bridge={name}"));
        }
        if port.mac.is_none() {
            return refuse(
                "it carries no Ethernet".into(),
                "a network with NAT needs no bridge: --network default",
            );
        }
        let wireless = ["wireless", "phy80211"];
        if wireless.iter().any(|entry| Path::new("/sys/class/net").join(name).join(entry).exists()) {
            return refuse(
                "it is wireless, and access points take frames only from the card that they know (IEEE 802.11)".into(),
                "a network with NAT needs no bridge: --network default",
            );
        }
        let rides = |link: &&Link| {
            link.parent == Some(port.index)
                && matches!(link.kind, Some(Kind::MacVlan | Kind::MacVtap | Kind::IpVlan))
        };
        if let Some(rider) = links.iter().find(rides) {
            return refuse(format!("{} sits on it", rider.name), "stop the VMs that use it directly first");
        }
        Ok(())
    }

    /// Makes what is noted. Short moments matter: the port is cut off from its enslavement until the addresses are on the bridge.
    async fn build(&self, record: &Record) -> Result<()> {
        let name = &record.bridge.name;
        let links = self.links.all().await?;
        let port = |name: &String| links.iter().find(|link| link.name == *name);
        let ports: Vec<&Link> = record.bridge.ports.iter().filter_map(port).collect();
        if ports.len() < record.bridge.ports.len() {
            return Err(Error::new(format!("a port of {name} is gone")));
        }
        let source = record.source.as_ref().and_then(port);
        let bridge = match self.links.find(name).await? {
            Some(bridge) => bridge,
            None => {
                // With the port's own address, so that routers, DHCP and SLAAC find nothing changed.
                let mac = source.or(ports.first().copied()).and_then(|port| port.mac);
                self.links.add_bridge(name, mac).await?
            }
        };
        self.links.set_alias(&bridge, &record.alias()).await?;
        if let Some(mtu) = ports.iter().map(|port| port.mtu).min() {
            self.links.set_mtu(&bridge, mtu).await?;
        }
        // Nobody else has addresses that were ours a moment ago.
        let _ = settings::set(&format!("ipv6/conf/{name}/accept_dad"), "0");
        for manner in MANNERS {
            let of = |link: &str| format!("ipv6/conf/{link}/{manner}");
            if let Some(value) = source.and_then(|source| settings::get(&of(&source.name))) {
                let _ = settings::set(&of(name), &value);
            }
        }
        self.links.set_up(&bridge, true).await?;
        for port in &ports {
            self.links.set_up(port, true).await?;
            self.links.set_master(port, Some(bridge.index)).await?;
            settings::leave_alone(&port.name);
        }
        record.moved.put(&self.links, source, &bridge).await
    }

    /// Undoes what is noted, however much of it was done.
    async fn dissolve(&self, record: &Record) -> Result<()> {
        let links = self.links.all().await?;
        let find = |name: &String| links.iter().find(|link| link.name == *name);
        let bridge = find(&record.bridge.name);
        for port in record.bridge.ports.iter().filter_map(find) {
            if bridge.is_some_and(|bridge| port.master == Some(bridge.index)) {
                self.links.set_master(port, None).await?;
            }
            let _ = settings::set(&format!("ipv6/conf/{}/accept_dad", port.name), "0");
        }
        let restore = |which: &str| {
            for (setting, value) in record.settings.iter().filter(|(setting, _)| setting.ends_with(which)) {
                // Where the port is gone, so are its settings.
                let _ = settings::set(setting, value);
            }
        };
        restore("disable_ipv6");
        if let Some(source) = &record.source {
            let source = find(source).ok_or_else(|| {
                Error::new(format!(
                    "{source} is gone, to which the addresses of {} would move",
                    record.bridge.name
                ))
                .help("ip link shows which links there are")
            })?;
            record.moved.put(&self.links, bridge, source).await?;
        }
        if let Some(bridge) = bridge {
            self.links.delete(bridge).await?;
        }
        restore("accept_dad");
        for port in record.down.iter().filter_map(find) {
            self.links.set_up(port, false).await?;
        }
        Ok(())
    }
}

/// Whether somebody else configures the link, who would do so again.
fn check_manager(port: &Link, bridge: &str, has: &Moved) -> Result<()> {
    let (name, index) = (&port.name, port.index);
    let says = |file: String, no: &str| {
        std::fs::read_to_string(file).is_ok_and(|text| !text.lines().any(|line| line == no))
    };
    let refuse = |who: &str, help: String| {
        Err(Error::new(format!("{who} manages {name}, and would take no notice of the bridge"))
            .help(format!("{help}; or use --force, until the next change")))
    };
    if says(format!("/run/NetworkManager/devices/{index}"), "managed=false") {
        return refuse(
            "NetworkManager",
            format!(
                "nmcli connection add type bridge ifname {bridge} && nmcli connection add type bridge-slave ifname {name} master {bridge}"
            ),
        );
    }
    if says(format!("/run/systemd/netif/links/{index}"), "ADMIN_STATE=unmanaged") {
        return refuse(
            "systemd-networkd",
            format!(
                "declare {bridge} with Kind=bridge in a .netdev file, and Bridge={bridge} in {name}'s .network file; networkctl reload"
            ),
        );
    }
    if has.is_lent() {
        return Err(Error::new(format!("{name} has its address by DHCP, and its client would go on asking there"))
            .help(format!("let the client use {bridge} (ifupdown: bridge_ports {name}), or use --force: the address stays until its lease ends")));
    }
    Ok(())
}

/// Whether somebody works over the link.
fn check_sessions(port: &Link, has: &Moved) -> Result<()> {
    let own = has.ips();
    let tables =
        ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let sessions =
        tables.iter().flat_map(|table| sessions(table)).filter(|address| own.contains(address)).count();
    if sessions == 0 {
        return Ok(());
    }
    let them =
        if sessions == 1 { "an SSH session goes".into() } else { format!("{sessions} SSH sessions go") };
    Err(Error::new(format!("{them} over {}", port.name)).help(
        "use --force: the address moves within milliseconds and sessions go on; have another way in, should it fail",
    ))
}

/// The host's addresses of SSH sessions, from /proc/net/tcp or tcp6.
fn sessions(table: &str) -> Vec<IpAddr> {
    let session = |line: &str| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let (local, _, state) = (words.next()?, words.next()?, words.next()?);
        let (address, port) = local.split_once(':')?;
        (u16::from_str_radix(port, 16).ok()? == SSH && state == ESTABLISHED)
            .then(|| parse_address(address))?
    };
    table.lines().skip(1).filter_map(session).collect()
}

/// An address as the kernel prints it: words of 32 bits in the processor's byte order.
fn parse_address(hex: &str) -> Option<IpAddr> {
    let words = hex
        .as_bytes()
        .chunks(8)
        .map(|word| u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok().map(u32::to_ne_bytes));
    let bytes = words.collect::<Option<Vec<_>>>()?.concat();
    match <[u8; 4]>::try_from(&bytes[..]) {
        Ok(bytes) => Some(Ipv4Addr::from(bytes).into()),
        Err(_) => Some(Ipv6Addr::from(<[u8; 16]>::try_from(&bytes[..]).ok()?).to_canonical()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ssh_sessions_in_the_kernel_s_words() {
        let tcp = "  sl  local_address rem_address   st tx_queue\n\
            0: 0100007F:0016 00000000:0000 0A 00000000\n\
            1: 0A00000A:0016 0B00000A:D431 01 00000000\n\
            2: 0A00000A:0050 0B00000A:D432 01 00000000\n";
        assert_eq!(sessions(tcp), ["10.0.0.10".parse::<IpAddr>().unwrap()]);
        let tcp6 = "  sl  local_address remote_address st\n\
            0: 0000000000000000FFFF00000A00000A:0016 0000000000000000FFFF00000B00000A:D431 01 0\n\
            1: B80D0120000000000000000001000000:0016 B80D0120000000000000000002000000:D431 01 0\n\
            2: nonsense\n";
        let expected: [IpAddr; 2] = ["10.0.0.10".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        assert_eq!(sessions(tcp6), expected);
    }
}
