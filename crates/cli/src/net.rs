//! `lodge net`: networks that need the network helper.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use indicatif::HumanDuration;
use netctl::{Answer, Bridge, Client, Declared, Error, Lease, Mode, Network, Problem, Request, Status};

use crate::args::{Net, NetBridge, NetCreate};
use crate::host::{print, table};
use crate::report::{Help, Usage};

/// The helper's program.
const PROGRAM: &str = "lodge-netd";
/// How long it has to start.
const PATIENCE: Duration = Duration::from_secs(10);

/// Connects to the helper; root starts it where it does not run.
pub fn connect() -> anyhow::Result<Client> {
    let path = netctl::socket();
    match Client::connect(&path) {
        Ok(client) => Ok(client),
        Err(Error::Absent(_)) if rustix::process::geteuid().is_root() => start(&path),
        Err(error) => {
            let help = format!(
                "start it as root, once: `sudo {PROGRAM} &`, or `systemctl enable --now {PROGRAM}`; or use --network user, which needs no rights"
            );
            Err(anyhow::Error::new(error).context(Help(help)))
        }
    }
}

fn start(path: &Path) -> anyhow::Result<Client> {
    let beside = std::env::current_exe().ok().map(|program| program.with_file_name(PROGRAM));
    let program = beside.filter(|program| program.exists()).unwrap_or_else(|| PathBuf::from(PROGRAM));
    // It goes on when we end, and does not hear the terminal's signals.
    let mut command = Command::new(&program);
    command.arg("--socket").arg(path).process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| {
        let help = format!("install it beside lodge: `cargo build --release -p {PROGRAM}` makes it");
        let what = format!("cannot start the network helper, {}", program.display());
        anyhow::Error::new(error).context(what).context(Help(help))
    })?;
    let end = Instant::now() + PATIENCE;
    loop {
        match Client::connect(path) {
            Ok(client) => {
                eprint!("lodge: the network helper was started ({})\r\n", program.display());
                return Ok(client);
            }
            Err(error) if Instant::now() > end => return Err(error.into()),
            Err(_) => {}
        }
        if let Ok(Some(status)) = child.try_wait() {
            return Err(anyhow::anyhow!("the network helper ended at once: {status}")
                .context(Help(format!("run `{}` to see why", program.display()))));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Asks the helper something.
pub fn ask(request: &Request) -> anyhow::Result<(Answer, Vec<OwnedFd>)> {
    connect()?.ask(request).map_err(|error| match error {
        Error::Refused { why, help: Some(help) } => anyhow::Error::new(Usage(why)).context(Help(help)),
        Error::Refused { why, help: None } => Usage(why).into(),
        error => error.into(),
    })
}

/// Has something done, and says what there is to say of it.
fn tell(request: &Request) -> anyhow::Result<ExitCode> {
    let (Answer::Done(notes), _) = ask(request)? else { return Err(Error::Unknown.into()) };
    notes.iter().for_each(|note| eprintln!("lodge: {note}"));
    Ok(ExitCode::SUCCESS)
}

/// `lodge net`.
pub fn net(command: &Net) -> anyhow::Result<ExitCode> {
    match command {
        Net::Ls { json } => list(*json),
        Net::Create(args) => tell(&Request::Create(Box::new(described(args)?))),
        Net::Inspect { name, json } => inspect(name, *json),
        Net::Start { name } => tell(&Request::Start { network: name.clone() }),
        Net::Stop { name, force } => tell(&Request::Stop { network: name.clone(), force: *force }),
        Net::Rm { name, force } => tell(&Request::Remove { network: name.clone(), force: *force }),
        Net::Leases { name, json } => leases(name, *json),
        Net::Check { name, json } => check(name.clone(), *json),
        Net::Apply { file } => tell(&Request::Apply(Box::new(declared(file)?))),
        Net::Schema => {
            print(&serde_json::to_string_pretty(&schemars::schema_for!(Declared))?)?;
            Ok(ExitCode::SUCCESS)
        }
        Net::Bridge(NetBridge::Create { name, ports, force }) => {
            let bridge = Bridge { name: name.clone(), ports: ports.clone() };
            tell(&Request::CreateBridge { bridge, force: *force })
        }
        Net::Bridge(NetBridge::Rm { name, force }) => {
            tell(&Request::RemoveBridge { name: name.clone(), force: *force })
        }
    }
}

fn described(args: &NetCreate) -> anyhow::Result<Network> {
    if !Network::is_name(&args.name) || matches!(args.name.as_str(), "user" | "none") {
        let why = format!("\"{}\" is no name for a network", args.name);
        let help = "use small letters, digits and `-`, a letter first; `user` and `none` are taken";
        return Err(anyhow::Error::new(Usage(why)).context(Help(help.into())));
    }
    let mode = match (args.isolated, args.routed) {
        (true, _) => Mode::Isolated,
        (_, true) => Mode::Routed,
        _ => Mode::Nat,
    };
    Ok(Network {
        mode,
        device: args.device.clone(),
        ipv4: args.ipv4,
        ipv6: args.ipv6,
        autostart: !args.no_autostart,
        ..Network::new(&args.name)
    })
}

/// Reads a file of networks and bridges.
fn declared(file: &Path) -> anyhow::Result<Declared> {
    let mut text = String::new();
    let read = match file.to_str() {
        Some("-") => std::io::stdin().read_to_string(&mut text).map(|_| ()),
        _ => std::fs::read_to_string(file).map(|all| text = all),
    };
    read.with_context(|| Usage(format!("cannot read {}", file.display())))?;
    let declared: Declared = toml::from_str(&text).map_err(|error| {
        let why = format!("{} declares no networks: {}", file.display(), error.message());
        let line = error.span().map(|span| text[..span.start].matches('\n').count() + 1);
        let line = line.map_or_else(String::new, |line| format!(" (line {line})"));
        anyhow::Error::new(Usage(why + &line))
            .context(Help("`lodge net schema` prints what may be in it".into()))
    })?;
    Ok(declared)
}

fn statuses() -> anyhow::Result<Vec<Status>> {
    let (Answer::Networks(networks), _) = ask(&Request::List)? else { return Err(Error::Unknown.into()) };
    Ok(networks)
}

fn list(json: bool) -> anyhow::Result<ExitCode> {
    let networks = statuses()?;
    if json {
        print(&serde_json::to_string_pretty(&networks)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = table(&["NETWORK", "KIND", "LINK", "STATE", "IPV4", "IPV6", "GUESTS"]);
    for status in &networks {
        let network = status.network.as_ref();
        let kind = network.map_or("host's", |network| match network.mode {
            Mode::Nat => "nat",
            Mode::Routed => "routed",
            Mode::Isolated => "isolated",
        });
        let guests: Vec<&str> = status.cards.iter().map(|card| card.vm.as_str()).collect();
        rows.add_row([
            network.map_or("-".into(), |network| network.name.clone()),
            kind.into(),
            status.device.clone(),
            if status.active { "up" } else { "down" }.into(),
            network.and_then(|network| network.ipv4).map_or_else(String::new, |net| net.to_string()),
            network.and_then(|network| network.ipv6).map_or_else(String::new, |net| net.to_string()),
            guests.join(" "),
        ]);
    }
    print(&rows.to_string())?;
    Ok(ExitCode::SUCCESS)
}

fn inspect(name: &str, json: bool) -> anyhow::Result<ExitCode> {
    let is_it = |status: &&Status| match &status.network {
        Some(network) => network.name == name,
        None => status.device == name,
    };
    let networks = statuses()?;
    let status = networks.iter().find(is_it).ok_or_else(|| {
        anyhow::Error::new(Usage(format!("no network is called {name}")))
            .context(Help("`lodge net ls` lists them".into()))
    })?;
    if json {
        print(&serde_json::to_string_pretty(status)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    print(&described_again(status)?)?;
    Ok(ExitCode::SUCCESS)
}

/// A file that declares the network, with what there is to say of its guests in comments.
fn described_again(status: &Status) -> anyhow::Result<String> {
    let mut text = String::new();
    if let Some(network) = &status.network {
        let declared = Declared { networks: vec![network.clone()], bridges: Vec::new() };
        text = toml::to_string(&declared)? + "\n";
    }
    let mut rows = table(&["GUEST", "PID", "MAC", "ADDRESS", "LINK", "SPOOFED", "DENIED"]);
    for card in &status.cards {
        let address = card.address.map_or_else(String::new, |address| address.to_string());
        let (pid, mac) = (card.pid.to_string(), card.mac.to_string());
        let (spoofed, denied) = (card.spoofed.to_string(), card.denied.to_string());
        rows.add_row([card.vm.clone(), pid, mac, address, card.interface.clone(), spoofed, denied]);
    }
    let lines: Vec<String> = rows.lines().map(|line| format!("# {line}")).collect();
    Ok(text + &lines.join("\n"))
}

fn leases(name: &str, json: bool) -> anyhow::Result<ExitCode> {
    let (Answer::Leases(leases), _) = ask(&Request::Leases { network: name.into() })? else {
        return Err(Error::Unknown.into());
    };
    if json {
        print(&serde_json::to_string_pretty(&leases)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = table(&["ADDRESS", "MAC", "NAME", "UID", "ASKED FOR"]);
    for Lease { mac, address, name, owner, seen, fixed } in &leases {
        let asked = match seen {
            Some(seen) => {
                let at = SystemTime::UNIX_EPOCH + Duration::from_secs(*seen);
                format!("{} ago", HumanDuration(at.elapsed().unwrap_or_default()))
            }
            None => "never".into(),
        };
        let asked = if *fixed { format!("{asked} (declared)") } else { asked };
        let owner = owner.map_or_else(String::new, |uid| uid.to_string());
        let name = name.clone().unwrap_or_default();
        rows.add_row([address.to_string(), mac.to_string(), name, owner, asked]);
    }
    print(&rows.to_string())?;
    Ok(ExitCode::SUCCESS)
}

fn check(network: Option<String>, json: bool) -> anyhow::Result<ExitCode> {
    let (Answer::Problems(problems), _) = ask(&Request::Check { network })? else {
        return Err(Error::Unknown.into());
    };
    if json {
        print(&serde_json::to_string_pretty(&problems)?)?;
    } else if problems.is_empty() {
        print("Nothing was found that would keep networks from working.")?;
    }
    for Problem { network, what, command } in problems.iter().filter(|_| !json) {
        let whose = network.as_ref().map_or_else(String::new, |network| format!("{network}: "));
        print(&format!("{whose}{what}"))?;
        command.iter().try_for_each(|command| print(&format!("  {command}")))?;
    }
    Ok(if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_inspect_prints_declares_the_network() {
        let host = netctl::Host {
            mac: "52:4c:00:00:00:01".parse().unwrap(),
            address: "192.168.200.9".parse().unwrap(),
            name: None,
        };
        let network = Network {
            mode: Mode::Routed,
            ipv4: Some("192.168.200.1/24".parse().unwrap()),
            ipv6: Some("fd00:1:2:3::1/64".parse().unwrap()),
            hosts: vec![host],
            ..Network::new("lab")
        };
        let card = netctl::Card {
            vm: "web".into(),
            pid: 77,
            mac: "52:4c:00:00:00:02".parse().unwrap(),
            address: Some("192.168.200.10".parse().unwrap()),
            interface: "ltap0".into(),
            spoofed: 0,
            denied: 3,
        };
        let mut status = Status {
            network: Some(network.clone()),
            device: "virbr1".into(),
            active: true,
            cards: vec![card],
        };
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = |status: &Status| {
            let text = described_again(status).unwrap();
            assert!(text.contains("web") && text.contains("192.168.200.10"), "{text}");
            std::fs::write(file.path(), text).unwrap();
            declared(file.path()).unwrap().networks
        };
        assert_eq!(read(&status), [network]);
        // A bridge of the host's is none of ours.
        status.network = None;
        assert_eq!(read(&status), []);
    }

    #[test]
    fn a_file_declares_networks() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "[[network]]\nname = \"lab\"\nmode = \"isolated\"\nipv4 = \"192.168.200.0/24\"\n\
                    [[network.host]]\nmac = \"52:4c:00:00:00:01\"\naddress = \"192.168.200.9\"\n\
                    [[bridge]]\nname = \"br0\"\nports = [\"eth0\"]\n";
        std::fs::write(file.path(), text).unwrap();
        let read = declared(file.path()).unwrap();
        assert_eq!((read.networks[0].mode, read.bridges[0].ports.len()), (Mode::Isolated, 1));
        assert_eq!(read.networks[0].hosts[0].address.to_string(), "192.168.200.9");
        for bad in
            ["[[network]]\nname = \"lab\"\nspeed = 1\n", "[[network]]\nname = \"lab\"\nipv4 = \"no\"\n"]
        {
            std::fs::write(file.path(), bad).unwrap();
            let error = format!("{:#}", declared(file.path()).unwrap_err());
            assert!(error.contains("line 3"), "{error}");
        }
    }
}
