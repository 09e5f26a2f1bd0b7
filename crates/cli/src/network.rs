//! `--network`, `--forward` and `--rule`: what the guest's network cards are connected to; and `lodge nic`, for VMs that run.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use indicatif::HumanBytes;
use netctl::{Answer, Attach, Attached, Direct, MOST_QUEUES, Request, Rule, Target};
use networks::forwards::Forwards;
use networks::tap::{Event, Maker, Tap};
use networks::user::{self, Forward, Protocol, User};
use sha2::{Digest, Sha256};
use vm::control::{NicStatus, Request as ToVm};
use vm::{Limits, Mac, Nic, NicModel, Nics};

use crate::args::{NicCommand, Run};
use crate::host::{print, table};
use crate::net;
use crate::report::{Help, Usage};
use crate::running::connect;

/// How long a guest has to give up a card.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is said of a card on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    to: To,
    /// The card's address.
    mac: Option<netctl::Mac>,
    model: NicModel,
    limits: Limits,
    /// The cable is in.
    plugged: bool,
    /// What the user called it.
    name: String,
}

/// What a card is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum To {
    /// There is no card.
    None,
    /// A network that needs no rights, with these addresses: see [`networks::user`].
    User(Option<Ipv4Addr>),
    /// What the network helper makes.
    Helper {
        target: Target,
        /// The guest's address.
        address: Option<Ipv4Addr>,
        spoofing: bool,
    },
}

/// Reads `none`, `user`, `bridge=LINK`, `direct=LINK` or a network's name, and options after commas.
pub fn parse(text: &str) -> Result<Network, String> {
    let mut parts = text.split(',');
    let name = parts.next().unwrap_or_default();
    let helper = |target| To::Helper { target, address: None, spoofing: false };
    let to = match name.split_once('=') {
        None if name == "none" => To::None,
        None if name == "user" => To::User(None),
        None if netctl::Network::is_name(name) => helper(Target::Network(name.into())),
        Some(("bridge", link)) if !link.is_empty() => helper(Target::Bridge(link.into())),
        Some(("direct", link)) if !link.is_empty() => {
            helper(Target::Direct { link: link.into(), mode: Direct::default(), host_access: false })
        }
        _ => {
            return Err(format!(
                "\"{name}\" is no network; there are `user`, `none`, `bridge=LINK`, `direct=LINK` and the names that `lodge net ls` shows"
            ));
        }
    };
    let mut network = Network {
        to,
        mac: None,
        model: NicModel::default(),
        limits: Limits::default(),
        plugged: true,
        name: name.into(),
    };
    for part in parts {
        if network.to == To::None {
            return Err("`none` has no options".into());
        }
        network.option(part)?;
    }
    Ok(network)
}

impl Network {
    fn option(&mut self, part: &str) -> Result<(), String> {
        match (part.split_once('=').unwrap_or((part, "")), &mut self.to) {
            (("mac", value), _) => self.mac = Some(value.parse()?),
            (("model", "virtio"), _) => self.model = NicModel::Virtio,
            (("model", "e1000"), _) => self.model = NicModel::E1000,
            (("model", other), _) => {
                return Err(format!("\"{other}\" is no model; there are virtio and e1000"));
            }
            (("link", "up"), _) => self.plugged = true,
            (("link", "down"), _) => self.plugged = false,
            (("rate", value), _) => {
                let rate = Some(parse_rate(value)?);
                self.limits = Limits { to_guest: rate, from_guest: rate };
            }
            (("rate-in", value), _) => self.limits.to_guest = Some(parse_rate(value)?),
            (("rate-out", value), _) => self.limits.from_guest = Some(parse_rate(value)?),
            (("net", value), To::User(net)) => *net = Some(parse_net(value)?),
            (("ip", value), To::Helper { address, .. }) => {
                let wrong = || format!("\"{value}\" is no IPv4 address, such as 192.168.122.9");
                *address = Some(value.parse().map_err(|_| wrong())?);
            }
            (("spoofing", "allow"), To::Helper { spoofing, .. }) => *spoofing = true,
            (("mode", value), To::Helper { target: Target::Direct { mode, .. }, .. }) => {
                *mode = match value {
                    "bridge" => Direct::Bridge,
                    "vepa" => Direct::Vepa,
                    "private" => Direct::Private,
                    "passthru" => Direct::Passthru,
                    _ => {
                        return Err(format!(
                            "\"{value}\" is no mode; there are bridge, vepa, private and passthru"
                        ));
                    }
                }
            }
            (("host-access", ""), To::Helper { target: Target::Direct { host_access, .. }, .. }) => {
                *host_access = true;
            }
            (_, to) => {
                let more = match to {
                    To::User(_) | To::None => "net=",
                    To::Helper { target: Target::Direct { .. }, .. } => {
                        "mode=, host-access, ip= and spoofing=allow"
                    }
                    To::Helper { .. } => "ip= and spoofing=allow",
                };
                return Err(format!(
                    "\"{part}\" is not known of this network; there are model=, mac=, link=, rate=, rate-in=, rate-out=, {more}"
                ));
            }
        }
        Ok(())
    }
}

/// Bits a second, as bytes a second: `10M` is 1250000.
fn parse_rate(text: &str) -> Result<u64, String> {
    let wrong = || format!("\"{text}\" is no rate; give bits per second, such as 500K, 10M or 1G");
    let (number, unit) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 1_000),
        Some((at, 'M' | 'm')) => (&text[..at], 1_000_000),
        Some((at, 'G' | 'g')) => (&text[..at], 1_000_000_000),
        _ => (text, 1),
    };
    let bits = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit)).ok_or_else(wrong)?;
    if bits < 8000 { Err(wrong()) } else { Ok(bits / 8) }
}

fn parse_net(text: &str) -> Result<Ipv4Addr, String> {
    let address = text.strip_suffix("/24").unwrap_or(text).parse::<Ipv4Addr>();
    match address {
        Ok(address) if address.octets()[3] == 0 && address.is_private() => Ok(address),
        _ => Err(format!("\"{text}\" is no private network of 24 bits; give one such as 10.0.9.0/24")),
    }
}

/// Reads `[ADDRESS:]PORT:GUEST_PORT[/udp]`.
pub fn parse_forward(text: &str) -> Result<Forward, String> {
    let wrong = || format!("\"{text}\" is no [ADDRESS:]PORT:GUEST_PORT[/udp], such as 8080:80");
    let (ports, protocol) = match text.rsplit_once('/') {
        None => (text, Protocol::Tcp),
        Some((ports, "tcp")) => (ports, Protocol::Tcp),
        Some((ports, "udp")) => (ports, Protocol::Udp),
        Some(_) => return Err(wrong()),
    };
    let (listen, guest) = ports.rsplit_once(':').ok_or_else(wrong)?;
    let (address, port) =
        listen.rsplit_once(':').map_or((None, listen), |(address, port)| (Some(address), port));
    let address: IpAddr = match address {
        None => Ipv4Addr::LOCALHOST.into(),
        Some(address) => address.trim_matches(['[', ']']).parse().map_err(|_| wrong())?,
    };
    let number = |port: &str| port.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(wrong);
    Ok(Forward { protocol, listen: SocketAddr::new(address, number(port)?), port: number(guest)? })
}

/// An address for a card, which stays the same as long as the host, the user and the VM's name do.
fn address_of(name: &str, number: usize) -> Mac {
    let host = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let user = rustix::process::getuid().as_raw();
    let digest = Sha256::digest(format!("{}\n{user}\n{name}\n{number}", host.trim()));
    // Of those that nobody has bought.
    [0x52, 0x4c, digest[0], digest[1], digest[2], digest[3]]
}

/// What all cards of a VM have in common.
#[derive(Clone)]
struct Owner {
    vm: String,
    cpus: u32,
    host_access: bool,
    rules: Vec<Rule>,
}

/// Looks whether what these flags want can be had at all, before anything is made for the guest.
pub fn check(args: &Run) -> anyhow::Result<()> {
    if args.network.len() > 1 && args.network.iter().any(|network| network.to == To::None) {
        return Err(Usage("--network none means that there is no other".into()).into());
    }
    let has_card = args.network.iter().all(|network| network.to != To::None);
    if !has_card && (!args.forward.is_empty() || args.host_access || !args.rule.is_empty()) {
        return Err(anyhow::Error::new(Usage("without a network nothing is forwarded to the guest".into()))
            .context(Help("leave --network none away".into())));
    }
    if args.network.iter().any(|network| matches!(network.to, To::Helper { .. })) {
        net::connect()?;
    }
    Ok(())
}

/// Makes the networks of a VM of this name, and its cards.
pub fn open(args: &Run, name: &str, cpus: u32) -> anyhow::Result<Nics> {
    let default = [parse("user").expect("a network")];
    let networks = if args.network.is_empty() { &default[..] } else { &args.network };
    let owner = Owner { vm: name.into(), cpus, host_access: args.host_access, rules: args.rule.clone() };
    let mut nics: Vec<Nic> = Vec::new();
    for (number, network) in networks.iter().filter(|network| network.to != To::None).enumerate() {
        // The first one is the guest's way out, and the way in.
        let forwards = if number == 0 { &args.forward[..] } else { &[] };
        nics.push(owner.connect(network, number, forwards)?);
    }
    let later = move |words: &str, taken: &dyn Fn(Mac) -> bool| {
        let network = parse(words)?;
        let number = (0..).find(|number| !taken(address_of(&owner.vm, *number))).unwrap_or_default();
        if network.to == To::None {
            return Err("`none` is no network to attach".into());
        }
        owner.connect(&network, number, &[]).map_err(|error| one_line(&error))
    };
    Ok(Nics::new(nics, Some(Box::new(later)))?)
}

/// An error and its way out, for who asks over the control socket.
fn one_line(error: &anyhow::Error) -> String {
    match error.downcast_ref::<Help>() {
        Some(help) => format!("{}; {help}", error.root_cause()),
        None => format!("{error:#}"),
    }
}

impl Owner {
    /// Connects a card.
    fn connect(&self, network: &Network, number: usize, forwards: &[Forward]) -> anyhow::Result<Nic> {
        let mac = network.mac.map_or_else(|| address_of(&self.vm, number), netctl::Mac::bytes);
        let link: Arc<dyn vm::Link> = match &network.to {
            To::None => unreachable!("it has no card"),
            To::User(net) => {
                Arc::new(self.user(mac, net.unwrap_or_else(|| user::free_network(number)), forwards)?)
            }
            To::Helper { target, address, spoofing } => {
                let mut target = target.clone();
                if let Target::Direct { host_access, .. } = &mut target {
                    *host_access |= self.host_access;
                }
                let queues = match network.model {
                    NicModel::Virtio => (self.cpus as usize).clamp(1, MOST_QUEUES),
                    NicModel::E1000 => 1,
                };
                let attach = Attach {
                    vm: self.vm.clone(),
                    mac: netctl::Mac::new(mac).expect("of a card"),
                    to: target,
                    again: false,
                    queues,
                    address: *address,
                    spoofing: *spoofing,
                    rules: self.rules.clone(),
                    forwards: forwards.iter().map(of_helper).collect(),
                };
                let own = forwards.iter().filter(|forward| !of_helper(forward).by_kernel());
                Arc::new(helped(attach, &network.name, &own.copied().collect::<Vec<_>>())?)
            }
        };
        let (model, network_name) = (network.model, network.name.clone());
        Ok(Nic { mac, model, link, network: network_name, limits: network.limits, plugged: network.plugged })
    }

    fn user(&self, mac: Mac, network: Ipv4Addr, forwards: &[Forward]) -> anyhow::Result<User> {
        let options = user::Options {
            network,
            loopback: self.host_access,
            forwards: forwards.to_vec(),
            rules: self.rules.clone(),
            ..user::Options::new(mac)
        };
        User::new(&options).map_err(explain)
    }
}

/// Says what to do about it.
fn explain(error: user::Error) -> anyhow::Error {
    let help = match &error {
        user::Error::Listen { forward, .. } if forward.listen.port() < 1024 => {
            "choose a port from 1024 on: those below are root's"
        }
        user::Error::Listen { .. } => "choose another port or address with --forward",
        user::Error::Host(_) => "see `ulimit -n`, or run without a network: --network none",
    };
    anyhow::Error::new(error).context(Help(help.into()))
}

fn of_helper(forward: &Forward) -> netctl::Forward {
    let Forward { protocol, listen, port } = *forward;
    let protocol = match protocol {
        Protocol::Tcp => netctl::Protocol::Tcp,
        Protocol::Udp => netctl::Protocol::Udp,
    };
    netctl::Forward { protocol, listen, port }
}

/// Has the network helper connect a card. `own`: ports that this process forwards, for the kernel does not.
fn helped(mut attach: Attach, name: &str, own: &[Forward]) -> anyhow::Result<Tap> {
    let (attached, taps) = ask(&attach)?;
    for note in &attached.notes {
        eprint!("lodge: {note}\r\n");
    }
    attach.again = true;
    let interface = Mutex::new(attached.interface);
    let helped = Arc::new(Helped { attach, interface, name: name.into(), forwards: OnceLock::new() });
    // It is connected no more if this fails.
    let tap = Tap::new(taps, helped.clone())?;
    if let Some(guest) = attached.address.filter(|_| !own.is_empty()) {
        let _ = helped.forwards.set(Forwards::new(guest, own).map_err(explain)?);
    }
    Ok(tap)
}

/// What the network helper has connected.
struct Helped {
    attach: Attach,
    /// The host's link for it.
    interface: Mutex<String>,
    /// What the user calls it.
    name: String,
    /// Ports that lead to it by this process.
    forwards: OnceLock<Forwards>,
}

impl Helped {
    fn interface(&self) -> MutexGuard<'_, String> {
        self.interface.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Maker for Helped {
    fn attach(&self) -> Option<Vec<OwnedFd>> {
        let (attached, taps) = ask(&self.attach).ok()?;
        *self.interface() = attached.interface;
        if let (Some(forwards), Some(guest)) = (self.forwards.get(), attached.address) {
            forwards.lead_to(guest);
        }
        Some(taps)
    }

    fn tell(&self, event: Event) {
        let name = &self.name;
        match event {
            Event::Gone => eprint!(
                "\r\nlodge: the host's link for the network {name} is gone: the guest's cable is out until it is back (`lodge net ls`)\r\n"
            ),
            Event::Back => eprint!("\r\nlodge: the network {name} is back\r\n"),
        }
    }

    fn detach(&self) {
        // A helper that does not run finds out at its next start.
        if let Ok(mut client) = netctl::Client::connect(&netctl::socket()) {
            let _ = client.ask(&Request::Detach { interface: self.interface().clone() });
        }
    }
}

fn ask(attach: &Attach) -> anyhow::Result<(Attached, Vec<OwnedFd>)> {
    let (answer, taps) = net::ask(&Request::Attach(Box::new(attach.clone())))?;
    let Answer::Attached(attached) = answer else { return Err(netctl::Error::Unknown.into()) };
    Ok((attached, taps))
}

/// `lodge nic`.
pub fn nic(command: &NicCommand) -> anyhow::Result<()> {
    match command {
        NicCommand::Attach { name, network } => {
            parse(network).map_err(Usage)?;
            connect(name)?.nics(&ToVm::AttachNic(network.clone()))?;
            list(&connect(name)?.nics(&ToVm::Nics)?)
        }
        NicCommand::Detach { name, nic, timeout, force } => {
            let patience = timeout.unwrap_or(PATIENCE).as_secs_f64();
            Ok(connect(name)?.tell(&ToVm::DetachNic { which: nic.clone(), patience, force: *force })?)
        }
        NicCommand::Up { name, nic } => plug(name, nic, true),
        NicCommand::Down { name, nic } => plug(name, nic, false),
        NicCommand::Ls { name, json } => {
            let nics = connect(name)?.nics(&ToVm::Nics)?;
            if *json {
                return print(&serde_json::to_string_pretty(&nics)?);
            }
            list(&nics)
        }
    }
}

fn plug(name: &str, nic: &str, plugged: bool) -> anyhow::Result<()> {
    Ok(connect(name)?.tell(&ToVm::PlugNic { which: nic.into(), plugged })?)
}

fn list(nics: &[NicStatus]) -> anyhow::Result<()> {
    let mut rows = table(&["NIC", "MAC", "MODEL", "NETWORK", "LINK", "IN", "OUT", "LIMITS"]);
    for (number, nic) in nics.iter().enumerate() {
        let link = match (nic.traffic.present, nic.traffic.plugged) {
            (true, true) => "up",
            (_, false) => "down",
            (false, true) => "gone",
        };
        let rate = |rate: Option<u64>| rate.map_or("-".into(), |rate| format!("{}bit/s", scaled(rate * 8)));
        let limits = match nic.limits {
            Limits { to_guest: None, from_guest: None } => String::new(),
            limits => format!("in {}, out {}", rate(limits.to_guest), rate(limits.from_guest)),
        };
        rows.add_row([
            (number + 1).to_string(),
            nic.mac.clone(),
            nic.model.clone(),
            nic.network.clone(),
            link.into(),
            HumanBytes(nic.traffic.to_guest.bytes).to_string(),
            HumanBytes(nic.traffic.from_guest.bytes).to_string(),
            limits,
        ]);
    }
    print(&rows.to_string())
}

/// A number with the largest decimal unit that divides it.
fn scaled(number: u64) -> String {
    let units = [(1_000_000_000, " G"), (1_000_000, " M"), (1_000, " k")];
    let unit = units.into_iter().find(|(unit, _)| number.is_multiple_of(*unit) && number > 0);
    unit.map_or_else(|| format!("{number} "), |(unit, letter)| format!("{}{letter}", number / unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        let user = parse("user").unwrap();
        let mac = Some("52:4c:00:00:00:01".parse().unwrap());
        let all = "user,model=e1000,mac=52:4c:00:00:00:01,net=10.0.9.0/24,rate=8M,rate-out=80K,link=down";
        assert_eq!(
            parse(all),
            Ok(Network {
                to: To::User(Some(Ipv4Addr::new(10, 0, 9, 0))),
                mac,
                model: NicModel::E1000,
                limits: Limits { to_guest: Some(1_000_000), from_guest: Some(10_000) },
                plugged: false,
                ..user
            })
        );
        let direct = "direct=eth0,mode=vepa,host-access,ip=192.0.2.7,spoofing=allow";
        let target = Target::Direct { link: "eth0".into(), mode: Direct::Vepa, host_access: true };
        let to = To::Helper { target, address: Some(Ipv4Addr::new(192, 0, 2, 7)), spoofing: true };
        assert_eq!(parse(direct).map(|network| network.to), Ok(to));
        let to = To::Helper { target: Target::Network("lab".into()), address: None, spoofing: false };
        assert_eq!(parse("lab").map(|network| (network.to, network.name)), Ok((to, "lab".into())));
        for bad in [
            "",
            "No Name",
            "none,model=virtio",
            "user,model=ne2000",
            "user,mac=1:2:3:4:5:6",
            "user,mac=01:00:00:00:00:00",
            "user,net=10.0.9.1",
            "user,net=192.0.2.0",
            "user,speed=fast",
            "user,rate=fast",
            "user,rate=7999",
            "user,ip=10.0.2.9",
            "user,mode=vepa",
            "bridge=",
            "bridge=br0,mode=vepa",
            "default,net=10.0.9.0",
            "direct=eth0,mode=hub",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn forwards() {
        let forward =
            |protocol, listen: &str, port| Ok(Forward { protocol, listen: listen.parse().unwrap(), port });
        assert_eq!(parse_forward("8080:80"), forward(Protocol::Tcp, "127.0.0.1:8080", 80));
        assert_eq!(parse_forward("0.0.0.0:53:5353/udp"), forward(Protocol::Udp, "0.0.0.0:53", 5353));
        assert_eq!(parse_forward("[::1]:8080:80/tcp"), forward(Protocol::Tcp, "[::1]:8080", 80));
        for bad in ["", "80", "80:", ":80", "80:0", "80:80/icmp", "x:80:80", "80:65536"] {
            assert!(parse_forward(bad).is_err(), "{bad}");
        }
    }
}
