//! The name servers that the host uses.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// After so long without an answer the next one is asked.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often the file is looked at.
const FRESH: Duration = Duration::from_secs(5);
/// As many as are used of a file, and of the domains in it.
const MOST: usize = 8;

/// The name servers that the host uses.
#[derive(Debug)]
pub struct Resolvers {
    file: PathBuf,
    read: Option<Instant>,
    servers: Vec<SocketAddr>,
    search: Vec<String>,
    current: usize,
    unanswered: Option<Instant>,
}

impl Resolvers {
    /// As `file` names them, which has the form of `resolv.conf(5)`.
    pub fn new(file: PathBuf) -> Self {
        Self { file, read: None, servers: Vec::new(), search: Vec::new(), current: 0, unanswered: None }
    }

    fn refresh(&mut self, now: Instant) {
        if self.read.is_some_and(|read| now < read + FRESH) {
            return;
        }
        self.read = Some(now);
        let text = std::fs::read_to_string(&self.file).unwrap_or_default();
        let (servers, search) = parse(&text);
        if servers != self.servers {
            (self.servers, self.current, self.unanswered) = (servers, 0, None);
        }
        self.search = search;
    }

    /// The domains in which the host looks for short names.
    pub fn search(&mut self, now: Instant) -> &[String] {
        self.refresh(now);
        &self.search
    }

    /// Whom to ask now: one that has not been silent.
    pub fn ask(&mut self, now: Instant) -> SocketAddr {
        self.refresh(now);
        if self.unanswered.is_some_and(|since| now > since + PATIENCE) {
            self.current += 1;
            self.unanswered = None;
        }
        self.unanswered.get_or_insert(now);
        self.servers[self.current % self.servers.len()]
    }

    /// It has answered.
    pub fn answered(&mut self) {
        self.unanswered = None;
    }
}

fn parse(text: &str) -> (Vec<SocketAddr>, Vec<String>) {
    let (mut servers, mut search) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            // A zone is of no use here: such servers are on one of the host's links.
            Some("nameserver") => {
                let address = words.next().and_then(|word| word.parse::<IpAddr>().ok());
                servers.extend(address.map(|address| SocketAddr::new(address, 53)));
            }
            Some("search" | "domain") => search = words.map(str::to_owned).take(MOST).collect(),
            _ => {}
        }
    }
    servers.truncate(MOST);
    if servers.is_empty() {
        // As the C library does.
        servers.push(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 53));
    }
    (servers, search)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_silent_server_gives_way_to_the_next() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"# comment\nsearch example.org lan\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\nnameserver 2001:db8::1\n")
            .unwrap();
        let mut resolvers = Resolvers::new(file.path().to_owned());
        let begin = Instant::now();
        let [first, second] = ["192.0.2.1:53", "[2001:db8::1]:53"].map(|a| a.parse().unwrap());
        let after = |millis| begin + Duration::from_millis(millis);
        assert_eq!(resolvers.ask(begin), first);
        resolvers.answered();
        assert_eq!(resolvers.ask(after(3000)), first);
        assert_eq!(resolvers.ask(after(4000)), first);
        assert_eq!(resolvers.ask(after(5100)), second);
        assert_eq!(resolvers.ask(after(7200)), first);
        assert_eq!(resolvers.search(begin), ["example.org", "lan"]);
    }

    #[test]
    fn a_host_without_the_file_has_a_server_of_its_own() {
        let mut resolvers = Resolvers::new("/nonexistent".into());
        assert_eq!(resolvers.ask(Instant::now()), "127.0.0.1:53".parse().unwrap());
    }
}
