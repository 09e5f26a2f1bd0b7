//! `--network` and `--forward`: what the guest's network cards are connected to.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use networks::user::{self, Forward, Protocol, User};
use sha2::{Digest, Sha256};
use vm::{Mac, Nic, NicModel};

use crate::args::Run;
use crate::report::{Help, Usage};

/// What is said of a card on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// There is none.
    None,
    /// One that needs no rights: see [`networks::user`].
    User {
        /// The card's address.
        mac: Option<Mac>,
        model: NicModel,
        /// Its network, of 24 bits.
        net: Option<Ipv4Addr>,
    },
}

/// Reads `none` or `user[,model=…][,mac=…][,net=…]`.
pub fn parse(text: &str) -> Result<Network, String> {
    let mut parts = text.split(',');
    match parts.next() {
        Some("none") if text == "none" => return Ok(Network::None),
        Some("user") => {}
        _ => return Err("there are `user` and `none`".into()),
    }
    let (mut mac, mut model, mut net) = (None, NicModel::default(), None);
    for part in parts {
        match part.split_once('=') {
            Some(("mac", value)) => mac = Some(parse_mac(value)?),
            Some(("model", "virtio")) => model = NicModel::Virtio,
            Some(("model", "e1000")) => model = NicModel::E1000,
            Some(("model", other)) => {
                return Err(format!("\"{other}\" is no model; there are virtio and e1000"));
            }
            Some(("net", value)) => net = Some(parse_net(value)?),
            _ => return Err(format!("\"{part}\" is not known of networks; there are model=, mac= and net=")),
        }
    }
    Ok(Network::User { mac, model, net })
}

fn parse_mac(text: &str) -> Result<Mac, String> {
    let bytes: Option<Vec<u8>> =
        text.split(':').map(|byte| (byte.len() == 2).then(|| u8::from_str_radix(byte, 16).ok())?).collect();
    let mac: Option<Mac> = bytes.and_then(|bytes| bytes.try_into().ok());
    match mac {
        Some(mac) if mac[0] & 1 == 0 && mac != [0; 6] => Ok(mac),
        Some(_) => Err(format!("{text} is no address of a card; its first byte must be even")),
        None => Err(format!("\"{text}\" is no address; give six bytes, such as 52:4c:00:00:00:01")),
    }
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

/// An address for a card, which stays the same as long as the host and the VM's name do.
fn address_of(name: &str, number: usize) -> Mac {
    let host = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let digest = Sha256::digest(format!("{}\n{name}\n{number}", host.trim()));
    // Of those that nobody has bought.
    [0x52, 0x4c, digest[0], digest[1], digest[2], digest[3]]
}

/// Makes the networks of a VM of this name, and its cards.
pub fn open(args: &Run, name: &str) -> anyhow::Result<Vec<Nic>> {
    let default = [Network::User { mac: None, model: NicModel::default(), net: None }];
    let networks = if args.network.is_empty() { &default[..] } else { &args.network };
    if args.network.len() > 1 && args.network.contains(&Network::None) {
        return Err(Usage("--network none means that there is no other".into()).into());
    }
    let cards: Vec<_> = networks.iter().filter(|network| **network != Network::None).collect();
    if cards.is_empty() && (!args.forward.is_empty() || args.host_access) {
        return Err(anyhow::Error::new(Usage("without a network nothing is forwarded to the guest".into()))
            .context(Help("leave --network none away".into())));
    }
    let mut nics = Vec::new();
    for (number, network) in cards.into_iter().enumerate() {
        let Network::User { mac, model, net } = network else { continue };
        let mac = mac.unwrap_or_else(|| address_of(name, number));
        let options = user::Options {
            network: net.unwrap_or_else(|| user::free_network(number)),
            loopback: args.host_access,
            // The first one is the guest's way out, and the way in.
            forwards: if number == 0 { args.forward.clone() } else { Vec::new() },
            ..user::Options::new(mac)
        };
        let link = User::new(&options).map_err(|error| {
            let help = match &error {
                user::Error::Listen { forward, .. } if forward.listen.port() < 1024 => {
                    "choose a port from 1024 on: those below are root's"
                }
                user::Error::Listen { .. } => "choose another port or address with --forward",
                user::Error::Host(_) => "see `ulimit -n`, or run without a network: --network none",
            };
            anyhow::Error::new(error).context(Help(help.into()))
        })?;
        nics.push(Nic { mac, model: *model, link: Arc::new(link) });
    }
    Ok(nics)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        assert_eq!(parse("none"), Ok(Network::None));
        let net = Some(Ipv4Addr::new(10, 0, 9, 0));
        let mac = Some([0x52, 0x4c, 0, 0, 0, 1]);
        let all = "user,model=e1000,mac=52:4c:00:00:00:01,net=10.0.9.0/24";
        assert_eq!(parse(all), Ok(Network::User { mac, model: NicModel::E1000, net }));
        for bad in [
            "",
            "nonesuch",
            "none,model=virtio",
            "user,model=ne2000",
            "user,mac=1:2:3:4:5:6",
            "user,mac=01:00:00:00:00:00",
            "user,net=10.0.9.1",
            "user,net=192.0.2.0",
            "user,speed=fast",
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
